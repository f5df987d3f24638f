"""The same work on many files, in as many processes as there are processors.

Python runs one thread at a time, and of reading a small image half is Python: two threads took
twice as long as one. Hence processes, on Linux, where a process is copied in milliseconds with all
that it knows. Elsewhere a new process imports PyTorch first, and threads do it.
"""

import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from densely.errors import DataError
from densely.processors import processors

LEAST_FILES = 256  # of fewer, if they are small, the start of processes takes what they save
FILES_PER_PROCESS = 16  # at least, or most of many processors would start for nothing
MOST_PROCESSES = 32
CHUNKS_PER_PROCESS = 8  # at least, so that all are done at about the same time
MOST_FILES_PER_CHUNK = 256

Result = TypeVar("Result")


def spread(work: Callable[[int], Result], count: int) -> list[Result]:
    """Return [work(0), ..., work(count - 1)], called side by side.

    Args:
        work: any function, closures too. It may run in a copy of this process: what it returns is
            pickled, and what it writes is seen only in memory from `shared_bytes`.
        count: number of calls.

    Raises:
        Exception: what `work` raises; of several failures that of the lowest index.
        DataError: a process was killed.
    """
    usable = processors()
    if (
        sys.platform == "linux"
        and count >= LEAST_FILES
        and usable > 1
        and not multiprocessing.current_process().daemon  # such a one may have no children
    ):
        processes = min(usable, count // FILES_PER_PROCESS, MOST_PROCESSES)
        results = _in_processes(work, count, processes)
        if results is not None:
            return results
    with ThreadPoolExecutor(usable) as pool:
        return list(pool.map(work, range(count)))


def shared_bytes(*shape: int) -> Tensor:
    """Zeros, uint8 of `shape`, in memory that this process shares with those of `spread`.

    Anonymous memory, and no file in /dev/shm, of which containers have 64 MB.

    Raises:
        MemoryError: there is not so much.
    """
    try:
        memory = mmap.mmap(-1, math.prod(shape))
    except OSError as error:
        raise MemoryError(f"{math.prod(shape):,} bytes: {error.strerror}") from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def _in_processes(work: Callable[[int], Result], count: int, processes: int) -> list[Result] | None:
    """`spread` by processes; None where so many may not be started."""
    size = min(max(count // (processes * CHUNKS_PER_PROCESS), 1), MOST_FILES_PER_CHUNK)
    stop = mmap.mmap(-1, 1)  # not 0: the children are to begin no other file
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("fork"),
        # Not pickled: a forked process has them already.
        initializer=_begin,
        initargs=(work, stop, os.getpid()),
    )
    others = set(multiprocessing.active_children())
    try:
        with _forking():
            chunks = [
                pool.submit(_run, start, min(start + size, count))
                for start in range(0, count, size)
            ]
    except OSError:  # the pool knows nothing of those that were started, and would not end them
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
            child.join()
        return None
    try:
        # In their order: the failure that is met first is that of the lowest index.
        return [result for chunk in chunks for result in chunk.result()]
    except BaseException as error:  # Ctrl-C too
        stop[0] = 1
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "a process that read images ended, most likely killed since memory ran out; "
                "choose a smaller --image-size, or end other programs"
            ) from None
        if isinstance(error, DataError):
            raise error from None  # without the other process's traceback
        raise
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the file that each child is at


@contextmanager
def _forking() -> Iterator[None]:
    """Start processes with SIGINT and SIGTERM held back until they know what to do with them."""
    with warnings.catch_warnings():
        # Python 3.12 warns that a lock held by another thread is never let go in the copy. The
        # children decode images, and use neither the GPU nor a thread of this process nor what
        # those may hold; PyTorch's DataLoader has long forked its workers for the same.
        warnings.filterwarnings(
            "ignore", message=r".*multi-threaded, use of fork\(\)", category=DeprecationWarning
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


#: In a child: the work, and whether to stop.
_work: Callable[[int], Any]
_stop: mmap.mmap


def _begin(work: Callable[[int], Any], stop: mmap.mmap, parent: int) -> None:
    """Prepare a child, first thing in it."""
    gc.freeze()  # what is garbage in the parent, perhaps of its GPU, is not this one's to end
    global _work, _stop
    _work, _stop = work, stop
    # Ctrl-C reaches every process in a terminal and is the parent's to handle: SIGINT stays
    # blocked. By SIGTERM the pool ends its processes; the parent's handler may do otherwise.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # A parent that is killed cannot end its children, which would wait for work for ever.
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))
    if os.getppid() != parent:  # killed before the line above
        os._exit(1)
    torch.set_num_threads(1)  # OpenMP's threads were not copied, and would be waited for


def _run(start: int, end: int) -> list[Any]:
    results = []
    for i in range(start, end):
        if _stop[0]:
            break  # nobody will ask for the results
        results.append(_work(i))
    return results
