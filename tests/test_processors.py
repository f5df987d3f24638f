"""Processors that may be used: control groups are files of a folder here."""

import os
import sys
from pathlib import Path

import pytest
import torch

from densely import processors as module
from densely import runtime
from densely.processors import processors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 processors, to all of which the process is bound."""
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    monkeypatch.setattr(module, "_GROUPS_OF_PROCESS", tmp_path / "of-process")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("12800000 100000", 64),
        ("anything", 64),
        ("1 0", 64),
    ],
)
def test_quota_of_version_2(groups: Path, text: str, expected: int) -> None:
    write(groups, **{"of-process": "0::/"}, cpu__max=text)
    assert processors() == expected


def test_the_smallest_quota_of_all_groups_above_counts(groups: Path) -> None:
    write(groups, **{"of-process": "0::/a/b"})
    write(groups / "a", cpu__max="300000 100000")
    write(groups / "a/b", cpu__max="max 100000")
    assert processors() == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("400000", 4)])
def test_quota_of_version_1_in_a_container_with_the_machines_path(
    groups: Path, quota: str, expected: int
) -> None:
    write(groups, **{"of-process": "9:name=systemd:/\n5:cpu,cpuacct:/docker/0123\n2:memory:/x"})
    write(groups / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert processors() == expected


def test_without_control_groups_the_binding_counts(groups: Path) -> None:
    assert processors() == 64


def test_this_machine_gives_some() -> None:
    assert 1 <= processors() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("threads", "expected"), [(8, 2), (1, 1)])
def test_computing_takes_no_more_threads_than_may_run(
    threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [threads]
    monkeypatch.setattr(runtime, "processors", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    runtime.settle_process()
    assert taken[-1] == expected
