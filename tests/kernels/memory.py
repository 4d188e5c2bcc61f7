"""Memory of results under guard: poisoned before, fenced by canaries, checked after."""

from __future__ import annotations

import torch

_PAD = 64
_REAL = {name: getattr(torch, name) for name in ("empty", "empty_like")}
_REAL_NEW_EMPTY = torch.Tensor.new_empty


def _poison(buffer: torch.Tensor) -> None:
    buffer.fill_(float("nan") if buffer.is_floating_point() else 77 % (torch.iinfo(buffer.dtype).max + 1))


def _canaries(buffer: torch.Tensor, numel: int) -> torch.Tensor:
    """The bytes around the middle. NaN differs from itself; its bits do not."""
    return torch.cat([buffer[:_PAD], buffer[_PAD + numel :]]).view(torch.uint8)


class Guard:
    """Replaces torch.empty and its kin: buffers of poison, of which the middle is given out.

    A kernel that does not write an element leaves NaN; one that writes beside its tensor changes a canary.
    """

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch = monkeypatch
        self.buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def __enter__(self) -> Guard:
        self._monkeypatch.setattr(torch, "empty", self._empty)
        self._monkeypatch.setattr(torch, "empty_like", self._empty_like)
        self._monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda x, *size, **options: self._empty(*size, **{"dtype": x.dtype, **options})
        )
        return self

    def __exit__(self, *error) -> None:
        self._monkeypatch.undo()
        if error[0] is None:
            self.check()

    def check(self) -> None:
        """The canaries are whole."""
        for buffer, before, numel in self.buffers:
            assert torch.equal(_canaries(buffer, numel), before), "a kernel wrote outside of its tensor"
        self.buffers.clear()

    def _empty(self, *size, dtype=None, device=None, memory_format=torch.contiguous_format, **options):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if torch.device(device or "cpu").type == "meta" or options:
            return _REAL["empty"](shape, dtype=dtype, device=device, memory_format=memory_format, **options)
        buffer = _REAL["empty"](shape.numel() + 2 * _PAD, dtype=dtype or torch.get_default_dtype(), device=device)
        _poison(buffer)
        self.buffers.append((buffer, _canaries(buffer, shape.numel()), shape.numel()))
        strides = _REAL["empty"](shape, device="meta", memory_format=memory_format).stride()
        return buffer.as_strided(shape, strides, _PAD)

    def _empty_like(self, x, *, dtype=None, device=None, memory_format=torch.preserve_format, **options):
        like = _REAL["empty_like"](x, device="meta", memory_format=memory_format)
        made = self._empty(x.shape, dtype=dtype or x.dtype, device=device or x.device, **options)
        return made.as_strided(like.shape, like.stride(), made.storage_offset())
