"""Stage `profile`: which kernels a training step spends its time in, captured and not.

A text file for each network, profile-NET.txt, and the head of it on standard output. For densely's
captured step also launches-NET.txt: one step, launch after launch.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpu_check.setting import OUT_OF_TIME, CheckedNet, Setting, in_a_line
from gpu_check.speed import batch_of, peer_of
from gpu_check.training import batch_for, step_for

STEPS = 5
ROWS, ROWS_SHOWN = 60, 14


def run(setting: Setting) -> int:
    """Run the stage; 0 if all was profiled."""
    torch.backends.cudnn.benchmark = True
    failed = 0
    with setting.forced_kernels() as kernels:
        for net in setting.nets:
            parts = [f"{net.name}, batch {batch_of(setting)}, bf16, kernels {kernels}"]
            for title, build, captured in (
                ("densely captured", net.build, True),
                ("densely eager", net.build, False),
                ("plain NHWC captured", peer_of(net).build, True),
            ):
                try:
                    if setting.left_s() < 0:
                        raise TimeoutError(OUT_OF_TIME)
                    parts.append(_profiled(setting, net, title, build, captured))
                except Exception as error:
                    failed += 1
                    parts.append(f"{title}: {in_a_line(error)}")
                if title == "densely captured":
                    print("\n".join("\n\n".join(parts).splitlines()[: ROWS_SHOWN + 5]), flush=True)
                path = setting.out / f"profile-{net.name}.txt"
                path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _profiled(
    setting: Setting, net: CheckedNet, title: str, build: Callable[[], nn.Module], captured: bool
) -> str:
    runtime = setting.runtime
    model = runtime.place(build()).train()
    images, labels = batch_for(net, runtime, batch_of(setting))
    step = step_for(model, runtime, images, labels, captured=captured)
    steps = 1 if setting.smoke else STEPS
    for _ in range(2):
        step(images, labels)
    _wait(setting)

    begin = time.perf_counter()
    for _ in range(steps):
        step(images, labels)
    _wait(setting)
    wall_ms = 1000 * (time.perf_counter() - begin) / steps

    activities = [ProfilerActivity.CPU]
    if not setting.smoke:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step(images, labels)
        _wait(setting)
    if step.captured and title.startswith("densely"):
        path = setting.out / f"launches-{net.name}.txt"
        path.write_text(_launches(profiler, steps), encoding="utf-8")
    return _table(setting, f"{title} ({step.captured=})", profiler.key_averages(), steps, wall_ms)


def _launches(profiler: profile, steps: int) -> str:
    """The last step's: when each began, how long it took, and its programs."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    launches = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: float(e["ts"]))
    launches = launches[-(len(launches) // steps) :]
    lines = [
        f"{'at us':>9} {'us':>8} {'grid':>14} {'threads':>8} {'registers':>9} {'shared':>7}  kernel"
    ]
    for event in launches:
        at, facts = float(event["ts"]) - float(launches[0]["ts"]), event["args"]
        grid = "x".join(str(size) for size in facts.get("grid", ()))
        threads = math.prod(facts.get("block", ()))
        lines.append(
            f"{at:9.1f} {float(event['dur']):8.1f} {grid:>14} {threads:8} "
            f"{facts.get('registers per thread', ''):>9} {facts.get('shared memory', ''):>7}  "
            f"{event['name'][:200]}"
        )
    return "\n".join(lines) + "\n"


def _table(setting: Setting, title: str, events: Any, steps: int, wall_ms: float) -> str:
    kind = "CPU" if setting.smoke else "CUDA"
    time_of = "self_cpu_time_total" if setting.smoke else "self_device_time_total"
    kernels = [
        (getattr(event, time_of) / steps, event.count / steps, event.key)
        for event in events
        if event.device_type.name == kind and getattr(event, time_of) > 0
    ]
    kernels.sort(reverse=True)
    total = sum(us for us, _, _ in kernels)
    lines = [
        f"{title}: {wall_ms:.3f} ms a step on the clock, {total / 1000:.3f} ms in "
        f"{sum(count for _, count, _ in kernels):.0f} kernels",
        f"{'us/step':>9} {'share':>6} {'calls':>6} {'us/call':>8}  kernel",
    ]
    lines += [
        f"{us:9.1f} {100 * us / total:5.1f}% {count:6.0f} {us / count:8.1f}  {name[:110]}"
        for us, count, name in kernels[:ROWS]
    ]
    return "\n".join(lines)


def _wait(setting: Setting) -> None:
    if not setting.smoke:
        torch.cuda.synchronize()
