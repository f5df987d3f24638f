"""Stages `chapter` and `cifar`: `densely train` as people run it, everything included.

Both need jsonargparse and rich, which benchmarks/gpu_check.sh installs from a folder of wheels, and
data below DENSELY_DATA: the four files of Fashion-MNIST in fashion-mnist/; CIFAR-10 as an image
folder in cifar10/, or packed as cifar10*.tar*.

A training that the budget or a SIGTERM cuts off is stopped as Ctrl-C does. What it saved stays in
OUTDIR, and the same stage with the same OUTDIR goes on from there.
"""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import IO

from gpu_check.setting import Findings, Setting

KEPT = ("metrics.csv", "env.json", "config.yaml", "curves.png")
STOPPED = (130, 143)  # by Ctrl-C and by SIGTERM, after saving
SMOKE = [
    *("--limit", "64", "--epochs", "2", "--norm-batches", "1", "--image-size", "32"),
    *("--batch-size", "32", "--device", "cpu"),
]


def chapter(setting: Setting) -> int:
    """Ten epochs of the chapter's recipe; the exit code."""
    return _train(setting, "chapter", 64 if setting.smoke else 60_000, ["--recipe", "d2l"])


def cifar(setting: Setting) -> int:
    """300 epochs of the paper's recipe, DenseNet-BC-100-12 on CIFAR-10; the exit code."""
    data = setting.out / "cifar10"
    if not data.is_dir():
        given = Path(os.environ["DENSELY_DATA"])
        if (given / "cifar10").is_dir():
            data = given / "cifar10"
        else:
            _unpack(next(given.glob("cifar10*.tar*")), data)
    words = ["--recipe", "cifar", "--data", str(data)]
    if setting.smoke:
        words += ["--model", "densenet_bc_22_12"]
    return _train(setting, "cifar", 64 if setting.smoke else 50_000, words)


def _unpack(archive: Path, folder: Path) -> None:
    """Take train/ and test/ out of an archive, wherever in it they stand."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(beside, filter="data")
    top = next(path.parent for path in beside.rglob("train") if path.is_dir())
    top.rename(folder)
    shutil.rmtree(beside, ignore_errors=True)


def _train(setting: Setting, stage: str, images: int, words: list[str]) -> int:
    runs = setting.out / f"{stage}-runs"
    begun = sorted(runs.iterdir()) if runs.is_dir() else []
    if begun and (begun[-1] / "README.md").is_file():
        print(f"{begun[-1]} is finished; name another OUTDIR for another one")
        return 0
    if begun:
        command = ["train", "--resume", str(begun[-1])]
    else:
        small = SMOKE if setting.smoke else []
        command = ["train", *words, *small, *setting.train, "--output", str(runs)]
    # Of a run that goes on, what it was begun with; its config.yaml has it all.
    said = ["densely", "train", *words, *([] if begun else setting.train)]
    findings = Findings(setting, stage, command=said, resumed=bool(begun))
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "densely", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    # Once: a second Ctrl-C would not wait until it has saved.
    clock = threading.Timer(max(1.0, setting.left_s()), process.send_signal, [signal.SIGINT])
    clock.start()
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        _echo(process.stdout)
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        clock.cancel()
    wall_s = time.perf_counter() - begin
    run = max(runs.iterdir()) if runs.is_dir() else None
    for name in KEPT if run else ():
        assert run is not None
        if (run / name).exists():
            shutil.copy(run / name, setting.out / f"{stage}-{name}")
    metrics = setting.out / f"{stage}-metrics.csv"
    if code not in (0, *STOPPED) or not metrics.exists():
        findings.add({"error": f"exit code {code}"})
        return code or 1
    with metrics.open(newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    judged = [epoch["test_accuracy"] for epoch in epochs if epoch["test_accuracy"]]
    row = {
        "finished": code == 0,
        "epochs": len(epochs),
        "wall_s": round(wall_s, 2),
        "epochs_s": round(sum(float(epoch["epoch_s"]) for epoch in epochs), 2),
        # Of this call; one that goes on with a run did not train all of its epochs.
        "examples_per_s_all_included": None if begun else round(images * len(epochs) / wall_s, 1),
        "examples_per_s_training": round(
            statistics.median(float(epoch["examples_per_s"]) for epoch in epochs), 1
        ),
        "train_loss": float(epochs[-1]["train_loss"]),
        "train_accuracy": float(epochs[-1]["train_accuracy"]),
        "test_accuracy": float(judged[-1]) if judged else None,
    }
    findings.add(row)
    print(json.dumps(row, indent=1))
    return 0 if code == 0 else 1


def _echo(lines: IO[str]) -> None:
    """Epochs as they come: a run that is cut off leaves them."""
    for line in lines:
        if '"step"' not in line[:40]:
            print(line.strip(), flush=True)
