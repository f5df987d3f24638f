"""Stage `all`: correctness and speed at once, each a process of its own, then bytes and kernels.

Most of their time goes to compilers, which the machine's processors run side by side; those that
measure take turns on the GPU, and wait until all are ready. So peers that torch.compile takes
minutes for come after the others. Each writes to a folder of its own in OUTDIR. What else there is
takes longer, or the GPU as a whole: peers compiled by max-autotune, and the trainings.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from gpu_check.setting import Setting

#: A training step by each of these, in turns.
COMPILED = "compiled default captured"
VARIANTS = ("densely captured", "eager NHWC", "captured NHWC", COMPILED)
QUICK, SLOW = VARIANTS[:3], (VARIANTS[0], VARIANTS[2], COMPILED)


class Job(NamedTuple):
    """A stage with its options, and the folder that it writes to."""

    folder: str
    words: tuple[str, ...]


def run(setting: Setting) -> int:
    """Run the stage; 0 if all of them ended with 0."""
    code = 0
    for group in jobs(setting):
        code |= _at_once(setting, group)
    return code


def jobs(setting: Setting) -> tuple[list[Job], ...]:
    """Groups, one after the other, of jobs that run at once."""
    nets = [net.name for net in setting.nets]
    every = ("--nets", ",".join(nets))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in setting.dtypes]

    def speed(folder: str, variants: Sequence[str]) -> list[Job]:
        words = ("speed", "--modes", "train", "--compile", "default", "--variants")
        return [Job(f"{folder}-{net}", (*words, ",".join(variants), "--nets", net)) for net in nets]

    return (
        [
            *(Job(f"correct-{name}", ("correct", "--dtypes", name, *every)) for name in dtypes),
            *speed("speed", QUICK),
        ],
        speed("compiled", SLOW),
        [Job("traffic", ("traffic", *every))],
        [Job("kernels", ("kernels", *every))],
    )


def _at_once(setting: Setting, group: list[Job]) -> int:
    """Run a group's processes; their outputs go to log.txt in their folders."""
    options = ["--turns", str(setting.out / "turns"), "--kernels", setting.kernels]
    options += ["--budget", f"{max(1.0, setting.left_s()):.0f}", *["--smoke"] * setting.smoke]
    running = {}
    for job in group:
        folder = setting.out / job.folder
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "gpu_check", job.words[0], str(folder), *job.words[1:]]
        with (folder / "log.txt").open("w") as log:
            running[job] = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    code = 0
    try:
        while running:
            time.sleep(0.1)
            for job, process in list(running.items()):
                if (ended := process.poll()) is not None:
                    del running[job]
                    code |= int(ended != 0)
                    _tell(setting, job, ended)
    finally:
        for process in running.values():
            process.terminate()
    return code


def _tell(setting: Setting, job: Job, code: int) -> None:
    seconds = setting.budget_s - setting.left_s()
    print(f"{job.folder} ended with {code} after {seconds:.0f} s:")
    lines = (setting.out / job.folder / "log.txt").read_text(encoding="utf-8").splitlines()
    print("\n".join(f"    {line}" for line in lines[-12:]), flush=True)
