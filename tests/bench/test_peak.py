"""The peak of a process of its own: what its steps add, and what it says when it fails."""

import json
import mmap
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_nets import NET, entrants

from densely.bench import child, peak
from densely.bench.peak import (
    ChildTask,
    added_to_process,
    peak_in_fresh_process,
    peak_resident_bytes,
)
from densely.errors import TrainingError

TASK = ChildTask("bc_100_12", "plain net", "train", 1, "cpu", 1, "system")


def test_the_peak_of_a_fresh_process_is_that_of_its_steps() -> None:
    held = torch.ones(100_000_000)  # 400 MB, which the child must not begin with
    found = peak_in_fresh_process(TASK)
    assert 35e6 < found < 300e6  # 35 MB are kept for the backward pass of one image
    assert peak_resident_bytes() > held.nbytes


def test_what_was_held_before_is_no_part_of_the_peak() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot forget a peak")

    def take(size: int) -> None:
        with mmap.mmap(-1, size) as memory:  # which malloc cannot have kept
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1

    take(120_000_000)
    trial: Any = SimpleNamespace(warm_up=lambda steps: take(40_000_000))
    assert 30e6 < added_to_process(trial) < 80e6


@pytest.mark.parametrize(("allocator", "kept"), [("system", 0), ("keep", 1)])
def test_the_child_does_as_it_is_told_and_prints_one_json_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    allocator: str,
    kept: int,
) -> None:
    monkeypatch.setattr(child, "find", lambda *_: entrants([])[1])
    monkeypatch.setitem(child.NETS, "bc_100_12", NET)
    threads: list[int] = []
    keeps: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr(child, "keep_freed_memory", lambda: keeps.append(1))
    task = replace(TASK, threads=3, allocator=allocator)
    monkeypatch.setattr(child.sys, "argv", ["", json.dumps(vars(task))])
    child.main()
    assert threads == [3]
    assert len(keeps) == kept
    assert json.loads(capsys.readouterr().out)["peak_bytes"] >= 0


def test_the_last_words_of_a_failed_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak.sys, "executable", "false")
    with pytest.raises(TrainingError, match="exit code 1"):
        peak_in_fresh_process(TASK)
