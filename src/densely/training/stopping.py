"""Ctrl-C, SIGTERM and a closed terminal, as a question that the loop asks between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, notes SIGINT, SIGTERM and SIGHUP in `signal` in place of dying of them.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows
    no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is None:
                    continue
                if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # under nohup a closed terminal is no reason to stop
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that such a signal ended: 130, 143 or 129."""
        return 128 + (self.signal or 0)
