"""CUDA graphs: work of many kernels that is recorded once and launched as a whole.

Source: PyTorch's notes on CUDA semantics, "CUDA Graphs".
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from densely.errors import first_line
from densely.fused.kernels import compiling_ahead

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Held while a graph is recorded, and while one is replayed whose tensors threads may share.
one_at_a_time = threading.RLock()

#: Runs before the recording: kernels are compiled and chosen, libraries take their work space.
WARM_UP = 3


def record_graph(
    work: Callable[[], T],
    device: torch.device,
    pool: Any = None,
    before: Callable[[], None] | None = None,
    is_warm: bool = False,
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record what some work does on a GPU; before, it is run `WARM_UP` times for real.

    cuDNN tries its kernels in the first run, and keeps to the fastest for what is recorded, which
    may be another in another process: not where `torch.backends.cudnn.deterministic` is set.
    The state of the GPU's random numbers is put back; each replay goes on from where it then is.
    All graphs are recorded on one stream, one after another, and share what libraries keep for it,
    such as cuBLAS's work space: no two of them may run at the same time.

    Args:
        work: on tensors that stay where they are.
        device: the GPU.
        pool: memory that graphs share, of `torch.cuda.graph_pool_handle`: what one has returned is
            overwritten by another. None for memory of its own.
        before: called first, on the stream that records.
        is_warm: the work has been run there already.

    Returns:
        The graph, and what the recorded work has returned: tensors that each replay fills anew.
    """
    with one_at_a_time, torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state(device)
        tries_kernels = torch.backends.cudnn.benchmark
        here = torch.cuda.current_stream()
        aside = _recording_stream(torch.cuda.current_device())
        try:
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
            aside.wait_stream(here)
            try:
                with torch.cuda.stream(aside):
                    if before:
                        before()
                    if not is_warm:
                        warm_up(work)
            finally:
                here.wait_stream(aside)
            # On the same stream: autograd remembers on which one it first saw the weights.
            with torch.cuda.graph(graph, pool=pool, stream=aside):
                result = work()
        finally:
            torch.backends.cudnn.benchmark = tries_kernels
            torch.cuda.set_stream(here)  # which a capture that fails does not do
            torch.cuda.set_rng_state(random_state, device)
    return graph, result


def warm_up(work: Callable[[], object]) -> None:
    """Run some work as often as it takes until all is compiled, chosen and allocated."""
    for _ in range(WARM_UP):
        work()


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: memory that is free again serves the stream it was taken for only.

    Of a higher priority than what recorded work puts aside, which each kernel of a graph keeps.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def compile_kernels_of(work: Callable[[], object]) -> None:
    """Compile densely's kernels that some work launches, many at once; nothing is launched.

    What the work gives and changes is anything. Where kernels cannot be compiled so, it is not run.
    """
    ahead = compiling_ahead()
    if ahead is None:
        return
    try:
        with ahead:
            work()
    except Exception as error:  # of numbers that are none; what is wrong is so in the next run too
        _log.debug("kernels are compiled one after another: %s", first_line(error))
