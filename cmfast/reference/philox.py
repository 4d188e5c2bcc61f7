"""Philox4x32-10 (Salmon et al. 2011): random words from (seed, sample index, draw number, counter) alone.

Key = seed, counter = (group of elements, draw, sample index low, high), so that what a sample draws is the same for any
batch size, rank count and device. `philox4x32` says what the words are. On a CPU NumPy makes the same in less time.
"""

import numpy as np
import torch
from torch import Tensor

from cmfast.reference._common import in_transform, watched

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

#: Up to so many counters torch takes one thread (its grain size), and NumPy, which never has more, less time; of two
#: threads it beats both.
_SMALL, _FEW_THREADS = 32768, 2
#: Devices whose random numbers the CPU makes: without float64 on them, they would be others.
ON_CPU = ("mps",)
#: Counters that are gone through at once: their buffers fit into a core's cache.
_BLOCK = 8192


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on a counter of four int64 tensors holding 32-bit words; four tensors of such words.

    Products of two 32-bit words wrap in int64, but keep their low 64 bits: the two halves are then shifts and masks.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & MASK, product0 & MASK
        high1, low1 = (product1 >> 32) & MASK, product1 & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def draw_words(seed: int | Tensor, index: Tensor, draw: int | Tensor, groups: int) -> tuple[Tensor, ...]:
    """The four Philox words of `groups` consecutive groups of elements, each int64 [B, groups]."""
    if index.device.type in ON_CPU:
        return tuple(word.to(index.device) for word in draw_words(here(seed), index.cpu(), here(draw), groups))
    if _for_numpy((index, seed, draw), index.shape[0] * groups):
        return _numpy_words(number(seed), index.numpy(), number(draw), groups)
    index = index.to(torch.int64)[:, None]
    seed = seed.to(torch.int64).reshape(()) if isinstance(seed, Tensor) else seed
    group = torch.arange(groups, device=index.device)[None, :] & MASK
    shape = (index.shape[0], groups)
    if isinstance(draw, Tensor):
        draw_word = draw.to(torch.int64).reshape(()) & MASK
    else:
        # Made on the device: a copy from the host would break the capture of a CUDA graph.
        draw_word = index.new_full((), draw & MASK)
    counter = (
        group.expand(shape),
        draw_word.expand(shape),
        (index & MASK).expand(shape),
        ((index >> 32) & MASK).expand(shape),
    )
    return philox4x32(counter, seed)


def here(x: int | Tensor) -> int | Tensor:
    """On the CPU."""
    return x.cpu() if isinstance(x, Tensor) else x


def _for_numpy(inputs: tuple[int | Tensor, ...], counters: int) -> bool:
    """Whether NumPy makes the words: of plain tensors on the CPU, with nothing between that looks on."""
    if watched() or in_transform():
        return False
    for tensor in inputs:
        if isinstance(tensor, Tensor) and (type(tensor) is not Tensor or tensor.device.type != "cpu"):
            return False
    return counters <= _SMALL or torch.get_num_threads() <= _FEW_THREADS


def number(x: int | Tensor) -> int:
    """By way of NumPy, to which it is no read from a device."""
    return int(x.numpy().reshape(())) if isinstance(x, Tensor) else x


def _numpy_words(seed: int, index: np.ndarray, draw: int, groups: int) -> tuple[Tensor, ...]:
    """The same words in fewer, unsigned operations. A round hands each half the product of the other, so that with
    every round the halves lie the other way round."""
    shape = (2, index.shape[0], groups)
    left, right, high = np.empty((3, *shape), np.uint64)
    counters = index.shape[0] * groups
    samples = index.astype(np.int64)[:, None].view(np.uint64)
    left[0], left[1] = np.arange(groups, dtype=np.uint64), samples & _MASK
    right[0], right[1] = draw & MASK, samples >> _WORD
    left, right, high = (half.reshape(2, counters) for half in (left, right, high))

    keys = (np.array([seed & MASK, (seed >> 32) & MASK], np.uint64) + _KEYS) & _MASK
    keys[1::2] = keys[1::2, ::-1]
    for start in range(0, counters, _BLOCK):
        a, b, c = (half[:, start : start + _BLOCK] for half in (left, right, high))
        for multipliers, key in zip(_FACTORS, keys[:, :, None]):
            a *= multipliers
            np.right_shift(a, _WORD, out=c)
            b ^= key
            c ^= b[::-1]
            a &= _MASK
            a, b, c = c, a, b
    # The three are one further after each of ten rounds.
    words = [half.view(np.int64).reshape(shape) for half in (high, left)]
    return tuple(torch.from_numpy(words[i % 2][i // 2]) for i in range(4))


_WORD, _MASK = np.uint64(32), np.uint64(MASK)
_FACTORS = np.array([MULTIPLIERS, MULTIPLIERS[::-1]] * (ROUNDS // 2), np.uint64)[:, :, None]
_KEYS = np.array(KEY_STEPS, np.uint64) * np.arange(ROUNDS, dtype=np.uint64)[:, None]
