"""Philox's words by NumPy, where it makes them: bit for bit those by torch."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast.reference import normal, philox

INDEX = torch.tensor([0, 7, -1, 2**32 - 1, 2**33 + 1, -(2**62)])


class Mode(TorchDispatchMode):
    """Changes nothing, and NumPy cannot know it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def numpys(monkeypatch):
    """How often NumPy makes words."""
    calls, words = [], philox._numpy_words
    monkeypatch.setattr(philox, "_numpy_words", lambda *a: (calls.append(a), words(*a))[1])
    return calls


@pytest.mark.parametrize(
    "index, groups",
    [
        pytest.param(INDEX, 3, id="a few"),
        pytest.param(INDEX, philox._BLOCK // 3, id="two blocks and a tail"),
        pytest.param(INDEX[:1], 2 * philox._BLOCK, id="blocks of one sample"),
        pytest.param(INDEX.to(torch.int32)[::2], 5, id="int32, strided"),
        pytest.param(INDEX[:0], 3, id="no sample"),
        pytest.param(INDEX, 0, id="no group"),
    ],
)
def test_numpys_words(numpys, index, groups):
    for seed, draw in [(0, 0), (2**63 + 2**40 + 3, 2**32 - 1), (-5, -1), (torch.tensor(-(2**40)), torch.tensor([9]))]:
        found = philox.draw_words(seed, index, draw, groups)
        with Mode():
            expected = philox.draw_words(seed, index, draw, groups)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert {(word.dtype, word.shape) for word in found} == {(torch.int64, (len(index), groups))}
    assert len(numpys) == 4


def test_words_of_tensors():
    """A seed or draw number of one element has any shape."""
    with Mode():
        one = philox.draw_words(torch.tensor([[[7]]], dtype=torch.uint8), INDEX, torch.tensor([[1]]), 2)
    assert all(torch.equal(a, b) for a, b in zip(one, philox.draw_words(7, INDEX, 1, 2)))


def test_the_first_known_answer():
    words = philox._numpy_words(0, np.zeros(1, np.int64), 0, 1)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def _compiled():
    return torch.compile(lambda index: normal(0, index, (3,)), fullgraph=True, backend="eager")(INDEX)


def _traced():
    return torch.jit.trace(lambda index: normal(0, index, (3,)), INDEX[:1].expand(6), check_trace=False)(INDEX)


def _moded():
    with Mode():
        return normal(0, INDEX, (3,))




@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_compiled, id="compile"),
        pytest.param(_traced, id="trace"),
        pytest.param(_moded, id="a mode"),
        pytest.param(lambda: torch.vmap(lambda i: normal(0, i[None], (3,))[0])(INDEX), id="vmap"),
    ],
)
def test_where_numpy_stays_away(numpys, make):
    z = make()
    assert not numpys and torch.equal(z, normal(0, INDEX, (3,)))


def test_where_torch_has_threads(numpys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    groups = philox._SMALL // 4
    large = philox.draw_words(0, INDEX, 0, groups)
    assert not numpys and philox.draw_words(0, INDEX[:4], 0, groups)[0].shape[0] == 4 and len(numpys) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert all(torch.equal(a, b) for a, b in zip(large, philox.draw_words(0, INDEX, 0, groups))) and len(numpys) == 2
