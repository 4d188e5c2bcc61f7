"""An end on request: SIGTERM is noted, and a run stops after the step at hand, on all processes at the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from cmfast.ranks import Ranks


class Stopped(SystemExit):
    """A run that was told to end has: its checkpoint is written. Where nothing catches it, the program ends, status 0.

    text: at which step, and where the checkpoint is.
    """

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Stop:
    """Whether a run is to end. Within it as a context, SIGTERM says so; a handler that was there is called as well.

    Handlers belong to the main thread: in another one, and where one was set from C, SIGTERM does what it did.
    """

    def __init__(self, group: Ranks) -> None:
        self._group, self._asked = group, False
        self._before: Any = None
        self._answer: Callable[[], bool] | None = None

    def ask(self) -> None:
        """Have the run end: on any process, from a signal's handler or another thread."""
        self._asked = True

    def now(self) -> bool:
        """Whether to end after this step: for all processes to call after each.

        Of several, each sends its answer and reads those of the step before, which have arrived by then: none waits,
        and all end at the same step.
        """
        if self._group.size == 1:
            return self._asked
        before, self._answer = self._answer, self._group.any(self._asked)
        return before is not None and before()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM)
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._answer is not None and (error is None or isinstance(error, Stopped)):
            self._answer()  # on its way to processes that end as well
        self._before = self._answer = None
        self._asked = False  # a run that is begun again goes on

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # More than once where a scheduler signals every process of a job, and torchrun its own again.
        self.ask()
        if callable(self._before):
            self._before(number, frame)
