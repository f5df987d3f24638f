"""Stage `traffic`: bytes that a training step moves, an image, beside those of the design.

With a GPU, what went to its memory and came from it, if ncu is there and may count. Without one, an
account: the launches of densely's kernels are left out, and what they are given is added up, each
operand once, what is added to twice. That is what a step moves with a cache that holds all that a
kernel reads more than once.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from densely.runtime import choose_runtime
from gpu_check.launches import Launch, each_launch
from gpu_check.setting import NETS, CheckedNet, Findings, Setting, in_a_line
from gpu_check.training import batch_for, step_for

#: MB an image in training: section 2 of the design, computed by hand.
DESIGN = {"d2l": 8.1, "121": 203.0, "bc": 53.0}
BATCH = 256
#: What PyTorch runs in between that reads or writes maps.
_ATEN = ("aten::mm", "aten::addmm", "aten::copy_", "aten::fill_", "aten::sum", "aten::mul")
_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def run(setting: Setting) -> int:
    """Run the stage; 0 if all was counted."""
    by_ncu = torch.cuda.is_available() and not setting.smoke
    way = "ncu" if by_ncu else "account"
    findings = Findings(setting, f"traffic-{way}", batch=BATCH, design=DESIGN)
    for net in setting.nets:
        row: dict[str, Any] = {"net": net.name}
        try:
            if by_ncu:
                found = _by_ncu(net, setting.left_s())
            else:
                found = account(net, 2 if setting.smoke else BATCH)
            row |= {"mb_per_image": round(sum(found.values()), 2), "by_kernel": found}
        except Exception as error:  # ncu may be missing, or not be allowed to count
            row["gap"] = in_a_line(error)
        findings.add(row)
        _print(row, way)
    return 1 if any("gap" in row for row in findings.rows) else 0


def account(net: CheckedNet, batch: int) -> dict[str, float]:
    """MB an image by kernel, from what a step on a CPU hands to kernels that do not run."""
    moved: Counter[str] = Counter()

    def count(launch: Launch) -> None:
        moved[launch.kernel] += launch.bytes

    with each_launch(count, anywhere=True), torch.random.fork_rng([]):
        step = _step(net, "cpu", batch)
        step()
        moved.clear()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    for event in _flat(tree):
        if event.name in _ATEN:
            inputs = event.extra_fields.inputs
            moved["PyTorch"] += sum(_size(x) for x in inputs if hasattr(x, "sizes"))
    return {name: round(count / batch / 1e6, 3) for name, count in moved.most_common()}


def _step(net: CheckedNet, device: str, batch: int) -> Callable[[], None]:
    """A training step in bfloat16, launched kernel by kernel."""
    runtime = choose_runtime(device, "bfloat16", "channels_last")
    images, labels = batch_for(net, runtime, batch)
    model = runtime.place(net.build()).train()
    return partial(step_for(model, runtime, images, labels, captured=False), images, labels)


def _by_ncu(net: CheckedNet, seconds: float) -> dict[str, float]:
    """MB an image by kernel, as counted by the GPU."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        raise FileNotFoundError("ncu is not installed")
    # Caches as the kernel before has left them, or what it wrote would be counted nowhere. Clocks
    # do not matter to bytes, and are others' too.
    command = [tool, "--csv", "--profile-from-start", "off", "--cache-control", "none"]
    command += ["--clock-control", "none"]
    command += ["--metrics", ",".join(_METRICS)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "gpu_check.traffic", net.name],
        capture_output=True, text=True, check=False, timeout=max(1.0, seconds),
    )  # fmt: skip
    moved = bytes_by_kernel(done.stdout)
    if done.returncode or not moved:
        raise RuntimeError((done.stdout + done.stderr)[-300:])
    return {name: round(count / BATCH / 1e6, 3) for name, count in moved.most_common()}


def bytes_by_kernel(printed: str) -> Counter[str]:
    """What ncu has counted; it prints a table after words of its own and of the program."""
    moved: Counter[str] = Counter()
    at = printed.find('"ID"')
    for row in csv.DictReader(io.StringIO(printed[at:] if at >= 0 else "")):
        if row["Metric Name"] in _METRICS:
            value = float(row["Metric Value"].replace(",", ""))
            moved[row["Kernel Name"].strip("_")[:60]] += int(value * _UNITS[row["Metric Unit"]])
    return moved


def _one_step_under_ncu(name: str) -> None:
    step = _step(NETS[name], "cuda", BATCH)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def _print(row: dict[str, Any], way: str) -> None:
    if "gap" in row:
        print(f"{row['net']:4} {way}: {row['gap']}", flush=True)
        return
    total, design = row["mb_per_image"], DESIGN[row["net"]]
    print(f"{row['net']:4} {way}: {total:.2f} MB an image, {total / design:.2f} of {design}")
    print(f"     {json.dumps(dict(list(row['by_kernel'].items())[:8]))}", flush=True)


def _flat(events: Any) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flat(event.children)


def _size(metadata: Any) -> int:
    count = 1
    for size in metadata.sizes:
        count *= size
    return count * metadata.dtype.itemsize  # type: ignore[no-any-return]


if __name__ == "__main__":
    _one_step_under_ncu(sys.argv[1])
