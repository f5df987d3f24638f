"""Work beside the chain of launches of which each waits for the one before it.

In backward this chain are the gradients of inputs, and the small launches that end their sums, in
which most of a GPU has nothing to do. A weight's gradient is read by nobody before the block's
backward is over, so that it may run meanwhile, on a second stream, where a CUDA graph is recorded.
Outside of a graph it is Python that launches wait for, and a second stream would only add to that.

Source: PyTorch's notes on CUDA semantics, "CUDA streams" and "Usage with multiple streams".
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Aside:
    """A second stream, and what runs on it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._works: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> None:
        """Launch some work behind all that is launched already; no later launch waits for it.

        It allocates no memory, and keeps its tensors: nobody else is given theirs before `wait`.
        """
        stream = _second_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        self._works.append(work)  # at once: also after an error the streams have to come together
        with torch.cuda.stream(stream):
            work()

    def wait(self) -> None:
        """Let all later launches wait for what was run."""
        if self._works:
            torch.cuda.current_stream(self._device).wait_stream(_second_stream(self._device))
            self._works.clear()


_open: ContextVar[Aside | None] = ContextVar("open", default=None)


@contextmanager
def aside(x: Tensor) -> Iterator[None]:
    """Within it `current` may be used by steps on x's device; at its end all is waited for."""
    if not _is_recorded(x):
        yield
        return
    opened = Aside(x.device)
    token = _open.set(opened)
    try:
        yield
    finally:
        _open.reset(token)
        opened.wait()


def current() -> Aside | None:
    """Where work may be put aside; None where each launch waits for the one before it."""
    return _open.get()


def _is_recorded(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
