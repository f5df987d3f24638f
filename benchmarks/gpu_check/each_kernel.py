"""Stage `kernels`: each kernel of a training step by itself, beside the time of its memory traffic.

A step is launched kernel after kernel, and each launch is repeated in its place until its time is
known, with nothing of it in the cache. That is what a kernel is worth; what it costs in a step,
with others before and behind it, is what `profile` shows.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from gpu_check.launches import Launch, each_launch
from gpu_check.setting import OUT_OF_TIME, CheckedNet, Findings, Setting, in_a_line
from gpu_check.speed import batch_of, ceilings
from gpu_check.training import batch_for, step_for

SHOWN = 16
HEADING = (
    f"{'kernel':34} {'rows':>8} {'calls':>5} {'us':>8} {'MB':>8} {'GB/s':>6} {'of copying':>10}"
)


def run(setting: Setting) -> int:
    """Run the stage; 0 if every launch was measured."""
    with setting.forced_kernels() as name:
        return _run(setting, name)


def _run(setting: Setting, name: str) -> int:
    findings = Findings(setting, "kernels", kernels=name, batch=batch_of(setting))
    copy = None if setting.smoke else ceilings(setting.device)["copy_tb_per_s"]
    findings.facts["copy_tb_per_s"] = copy
    left = False
    for net in setting.nets:
        try:
            rows = _measured(setting, net)
        except Exception as error:
            findings.add({"net": net.name, "error": in_a_line(error)})
            print(f"{net.name}: {findings.rows[-1]['error']}", flush=True)
            left = True
            continue
        for row in rows:
            findings.add(row)
        left |= any("gap" in row for row in rows)
        print(f"\n{net.name}, batch {batch_of(setting)}\n{HEADING}")
        print("\n".join(_line(row, copy) for row in rows[:SHOWN]), flush=True)
    return 1 if left else 0


def _measured(setting: Setting, net: CheckedNet) -> list[dict[str, Any]]:
    """A row for each kernel on so many rows, those that take most of a step first."""
    clock = None if setting.smoke else _clock()
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(lambda: {"calls": 0, "mb": 0.0})

    def measure(launch: Launch) -> None:
        row = found[f"{launch.of} {launch.kernel}", launch.rows]
        if clock is not None and setting.left_s() < 0:
            row["gap"] = OUT_OF_TIME
            launch.run()
            return
        row["calls"] += 1
        row["mb"] += launch.bytes / 1e6
        if clock is not None:
            row["us"] = row.get("us", 0.0) + clock(launch.run)

    runtime = setting.runtime
    model = runtime.place(net.build()).train()
    images, labels = batch_for(net, runtime, batch_of(setting))
    with each_launch(lambda launch: None if clock is None else launch.run(), setting.smoke):
        step = step_for(model, runtime, images, labels, captured=False)
        step(images, labels)
    with each_launch(measure, setting.smoke):
        step(images, labels)
    if not found:
        raise RuntimeError("densely ran plain PyTorch: see `correct`")
    rows = [{"net": net.name, "kernel": name, "rows": n} | row for (name, n), row in found.items()]
    return sorted(rows, key=lambda row: (-row.get("us", 0.0), -row["mb"]))


def _clock() -> Callable[[Callable[[], None]], float]:
    from triton.testing import do_bench

    def microseconds(work: Callable[[], None]) -> float:
        return 1000 * float(do_bench(work, warmup=1, rep=4, return_mode="median"))

    return microseconds


def _line(row: dict[str, Any], copy: float | None) -> str:
    head, gap = f"{row['kernel']:34} {row['rows']:8} {row['calls']:5}", row.get("gap", "")
    if "us" not in row:
        return f"{head} {'':8} {row['mb']:8.1f} {gap}"
    speed = 1000 * row["mb"] / row["us"]
    share = "" if copy is None else f"{speed / copy / 1000:10.2f}"
    return f"{head} {row['us']:8.1f} {row['mb']:8.1f} {speed:6.0f} {share} {gap}".rstrip()
