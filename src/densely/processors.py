"""How many processors this process may use.

A container sees all of its machine's, and may own two: its control group gives it so much time on
them and no more, and each thread beyond that makes the others wait.

Source: the Linux kernel's documentation, "Control Group v2" (cpu.max) and "CFS Bandwidth Control"
(cpu.cfs_quota_us).
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def processors() -> int:
    """Those that the process is bound to, within the quota of its control groups; at least 1."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return min([len(os.sched_getaffinity(0)), *(max(1, math.ceil(q)) for q in _quotas())])


def _quotas() -> Iterator[float]:
    """Processors' worth of time that each of the process's control groups has."""
    try:
        lines = _GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = _GROUPS
        elif "cpu" in controllers.split(","):
            top = _GROUPS / "cpu"
        else:
            continue
        # A container's path may be that on the machine, of which it sees the last folder as `top`.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _quota(folder)
            if folder == top:
                break


def _quota(folder: Path) -> Iterator[float]:
    """The quota of one group, if it has one: time in each period, both in microseconds."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text().strip() for name in names)
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not there, or nothing that we know
        return
