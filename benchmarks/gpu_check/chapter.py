"""Stage `chapter`: `densely train --recipe d2l` as people run it, everything included.

Needs the four files of Fashion-MNIST below DENSELY_DATA, and jsonargparse and rich, which
benchmarks/gpu_check.sh installs from a folder of wheels.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_check.setting import Findings, Setting

IMAGES = 60_000
KEPT = ("metrics.csv", "env.json", "config.yaml", "curves.png")


def run(setting: Setting) -> int:
    """Run the stage; the exit code of `densely train`."""
    command = ["train", "--recipe", "d2l", "--json"]
    images = IMAGES
    if setting.smoke:
        images = 64
        command += ["--limit", "64", "--epochs", "2", "--norm-batches", "1", "--image-size", "32"]
        command += ["--batch-size", "32", "--device", "cpu"]
    findings = Findings(setting, "chapter", command=["densely", *command])
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "densely", *command, "--output", folder],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        last = ""
        for line in process.stdout:  # as they come: a run that is cut off leaves its epochs
            last = line.strip()
            if '"step"' not in last[:40]:
                print(last, flush=True)
        code = process.wait()
        wall_s = time.perf_counter() - begin
        runs = sorted(Path(folder).iterdir())
        for name in KEPT if runs else ():
            if (runs[0] / name).exists():
                shutil.copy(runs[0] / name, setting.out / f"chapter-{name}")
    if code:
        findings.add({"error": f"exit code {code}"})
        return code
    with (setting.out / "chapter-metrics.csv").open(newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    row = {
        "epochs": len(epochs),
        "wall_s": round(wall_s, 2),
        "epochs_s": round(sum(float(epoch["epoch_s"]) for epoch in epochs), 2),
        "examples_per_s_all_included": round(images * len(epochs) / wall_s, 1),
        "examples_per_s_training": round(
            statistics.median(float(epoch["examples_per_s"]) for epoch in epochs), 1
        ),
        "train_loss": float(epochs[-1]["train_loss"]),
        "train_accuracy": float(epochs[-1]["train_accuracy"]),
        "test_accuracy": float(epochs[-1]["test_accuracy"]),
        "data": Path(os.environ.get("DENSELY_DATA", "")).name,
    }
    findings.add(row)
    print(json.dumps(row, indent=1))
    return 0
