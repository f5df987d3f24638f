"""Peak memory of a variant: of a process of its own on a CPU, the allocator's on a GPU."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from densely.bench.trial import Trial
from densely.errors import TrainingError

#: Steps of which the peak is taken: the first makes gradients and the optimizer's memory.
STEPS = 3


@dataclass(frozen=True)
class ChildTask:
    """What a fresh process is to run: a variant, by names."""

    net: str
    variant: str
    mode: str
    batch: int
    device: str
    threads: int
    allocator: str


def peak_in_fresh_process(task: ChildTask) -> int:
    """Bytes of resident memory that the first steps add in a process that does nothing else.

    Raises:
        TrainingError: the process failed; its last words are in the message.
    """
    command = [sys.executable, "-m", "densely.bench.child", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TrainingError(words[-1])
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def added_to_process(trial: Trial) -> int:
    """Bytes by which this process's peak of resident memory exceeds what it held before."""
    _forget_peak()
    before = peak_resident_bytes()
    trial.warm_up(STEPS)
    # Linux counts roughly, each core for itself: steps of next to nothing may come out below it.
    return max(0, peak_resident_bytes() - before)


def added_to_gpu(trial: Trial) -> int:
    """Bytes by which the GPU allocator's peak exceeds what it had given out before."""
    device = trial.runtime.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial.warm_up(STEPS)
    return int(torch.cuda.max_memory_allocated(device) - before)


def peak_resident_bytes() -> int:
    """The most memory that this process has had at once.

    From /proc where there is one: there `ru_maxrss` of a new process begins at what its parent
    had when it was started.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _forget_peak() -> None:
    """Let the peak begin again at what is resident now, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
