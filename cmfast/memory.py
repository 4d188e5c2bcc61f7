"""When a batch does not fit into memory: which would."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmfast.watch import fork_safe

#: Held while a CUDA graph is captured, one at a time in a process: PyTorch's allocator knows no more, and gives no
#: memory back meanwhile.
capturing = fork_safe(0)
#: What PyTorch's allocators and libraries say, where they raise no OutOfMemoryError.
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


def largest_that_fits(run: Callable[[int], object], size: int) -> int:
    """The largest batch below `size`, which does not fit, that `run` takes; 0 if none. By bisection.

    >>> def run(size):
    ...     if size > 120:
    ...         raise torch.OutOfMemoryError("too much")
    >>> largest_that_fits(run, 256)
    120
    """
    fits, too_large = 0, size
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if _fits(run, middle):
            fits = middle
        else:
            too_large = middle
    return fits


def _fits(run: Callable[[int], object], size: int) -> bool:
    try:
        run(size)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        if torch.cuda.is_initialized():
            with capturing:
                torch.cuda.empty_cache()
    return True
