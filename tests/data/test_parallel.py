import errno
import gc
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from densely.data import parallel
from densely.data.parallel import LEAST_FILES, shared_bytes, spread
from densely.errors import DataError

if sys.platform != "linux":
    pytest.skip("processes are for Linux alone", allow_module_level=True)

COUNT = LEAST_FILES


def own_pid(_: int) -> int:
    return os.getpid()


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(parallel, "processors", lambda: 2)


@pytest.mark.parametrize("count", [0, 1, LEAST_FILES - 1, LEAST_FILES, COUNT, 5001])
def test_results_are_in_order(count: int) -> None:
    offset = 7  # a closure
    assert spread(lambda i: i + offset, count) == list(range(7, 7 + count))


def test_many_files_are_read_by_other_processes() -> None:
    assert os.getpid() not in spread(own_pid, LEAST_FILES)
    assert not multiprocessing.active_children()


def test_few_files_stay_in_this_process() -> None:
    assert set(spread(own_pid, LEAST_FILES - 1)) == {os.getpid()}


def test_one_processor_stays_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 1)
    assert set(spread(own_pid, COUNT)) == {os.getpid()}


def test_daemonic_process_has_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert set(spread(own_pid, COUNT)) == {os.getpid()}


def test_where_no_more_processes_may_start_threads_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 8)
    fork, forks = os.fork, iter(range(100))

    def limited() -> int:
        if next(forks) >= 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    assert set(spread(own_pid, COUNT)) == {os.getpid()}
    assert not multiprocessing.active_children()


def test_garbage_of_this_process_is_left_alone_in_the_others(tmp_path: Path) -> None:
    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    def work(i: int) -> None:
        gc.collect()

    gc.disable()
    try:
        Garbage()
        spread(work, COUNT)
        gc.collect()
    finally:
        gc.enable()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_too_much_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(parallel.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="1,000 bytes"):
        shared_bytes(10, 100)


def test_what_is_written_to_shared_bytes_is_seen_here() -> None:
    seen = shared_bytes(COUNT, 3, 2)
    assert (seen.dtype, seen.shape, seen.any().item()) == (torch.uint8, (COUNT, 3, 2), False)

    def write(i: int) -> None:
        seen[i] = i

    spread(write, COUNT)
    assert seen.equal(torch.arange(COUNT, dtype=torch.uint8)[:, None, None].expand(COUNT, 3, 2))


@pytest.mark.parametrize("count", [LEAST_FILES - 1, COUNT])
def test_failure_of_the_lowest_index_is_raised(count: int) -> None:
    def work(i: int) -> None:
        if i == 0:
            time.sleep(0.2)  # the others fail long before
        raise DataError(f"file {i}")

    with pytest.raises(DataError) as caught:
        spread(work, count)
    assert str(caught.value) == "file 0"
    assert caught.value.__cause__ is None  # no traceback of another process
    assert not multiprocessing.active_children()


def test_other_failures_arrive() -> None:
    with pytest.raises(ZeroDivisionError):
        spread(lambda i: 1 // (i - 150), COUNT)


def test_after_a_failure_no_other_file_is_begun() -> None:
    begun = shared_bytes(COUNT)

    def work(i: int) -> None:
        begun[i] = 1
        if i == 0:
            raise DataError("first")
        time.sleep(0.01)

    with pytest.raises(DataError, match="first"):
        spread(work, COUNT)
    assert begun.sum() < COUNT // 2


def test_killed_process_is_reported_in_one_line() -> None:
    def work(i: int) -> None:
        if i == 100:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match=r"killed.*memory.*--image-size") as caught:
        spread(work, COUNT)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not multiprocessing.active_children()


def test_signals_are_handled_here_as_before() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    spread(own_pid, COUNT)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_only_the_warning_of_forking_is_kept_quiet() -> None:
    with parallel._forking():
        told = "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks"
        warnings.warn(told, DeprecationWarning, stacklevel=1)
        with pytest.warns(DeprecationWarning, match="another"):
            warnings.warn("another", DeprecationWarning, stacklevel=1)


def fork_group(work: Callable[[], object], errors: Path) -> int:
    """Run `work` in a new process at the head of a new group, as a shell runs a command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        work()
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        pytest.param(signal.SIGINT, True, 130, id="Ctrl-C"),
        pytest.param(signal.SIGINT, False, 130, id="interrupted alone"),
        pytest.param(signal.SIGTERM, False, -signal.SIGTERM, id="ended"),
        pytest.param(signal.SIGKILL, False, -signal.SIGKILL, id="killed"),
    ],
)
def test_no_process_outlives_this_one(
    tmp_path: Path, number: signal.Signals, whole_group: bool, status: int
) -> None:
    started = shared_bytes(COUNT)
    reading, writing = os.pipe()  # at its end when all who may write to it are gone

    def work(i: int) -> None:
        started[i] = 1
        time.sleep(0.05)

    pid = fork_group(lambda: spread(work, COUNT), tmp_path / "errors")
    os.close(writing)
    try:
        until = time.monotonic() + 20
        while not started.any():
            assert time.monotonic() < until, (tmp_path / "errors").read_text()
            time.sleep(0.01)
        (os.killpg if whole_group else os.kill)(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert select.select([reading], [], [], 10)[0], "a process is left"
        assert started.sum() < COUNT // 2
        assert (tmp_path / "errors").read_text() == ""
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def test_any_thread_may_call_it() -> None:
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(spread(own_pid, COUNT)))
    thread.start()
    thread.join()
    assert len(found[0]) == COUNT
    assert os.getpid() not in found[0]
