"""Examples/s of `densely train --recipe d2l` against a learner's plain PyTorch loop.

    python benchmarks/bench_chapter.py --data-dir FOLDER/fashion-mnist

Each round runs every variant once, in a process of its own (densely changes how its process keeps
memory, which must not help the peer), one after the other; the table gives medians over rounds and
the ratio to the fastest peer. Figures are of the second epoch over `--images` images, the whole
training pass, loading included. Also measured: what share of a step the data pipeline takes.

Writes benchmarks/results/chapter-DEVICE.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: The book's default is 4 workers; on few cores none may be faster, which is the peer's to choose.
PEERS = {f"plain PyTorch, {workers} loader workers": workers for workers in (0, 4)}
OURS = {"densely": [], "densely --precision float32": ["--precision", "float32"]}


def last_line(command: list[str]) -> dict[str, Any]:
    """Run a command and read the JSON object that it prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def plain(data_dir: Path, images: int, workers: int) -> float:
    command = [sys.executable, str(HERE / "plain_chapter.py"), "--data-dir", str(data_dir)]
    command += ["--images", str(images), "--epochs", "2", "--workers", str(workers)]
    return float(last_line(command)["examples_per_s"])


def densely(data_dir: Path, images: int, flags: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "densely", "train", "--recipe", "d2l", "--quiet"]
        command += ["--data-dir", str(data_dir), "--limit", str(images), "--epochs", "2"]
        command += ["--norm-batches", "0", "--output", folder, *flags]
        subprocess.run(command, check=True, capture_output=True)
        rows = (Path(folder) / "d2l-001" / "metrics.csv").read_text().splitlines()
        return float(
            dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))["examples_per_s"]
        )


def pipeline_seconds(data_dir: Path, batches: int = 20) -> float:
    """Median time to pick, resize, scale and lay out one batch of 256."""
    import torch

    from densely.data import Preprocessing, load_data
    from densely.runtime import choose_runtime, keep_freed_memory

    keep_freed_memory()  # as the steps do, of which this is a share
    runtime = choose_runtime()
    train = load_data("fashion-mnist", data_dir=data_dir).train.to(runtime.device)
    preprocessing = Preprocessing.identity(96, 1)
    seconds = []
    for _ in range(batches + 3):
        index = torch.randint(0, len(train), (256,), device=runtime.device)
        begin = time.perf_counter()
        images, _labels = train.images[index], train.labels[index]
        runtime.layout(preprocessing(images))
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--images", type=int, default=2560, help="images of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    rates: dict[str, list[float]] = {name: [] for name in [*PEERS, *OURS]}
    for i in range(options.rounds):
        for name, workers in PEERS.items():
            rates[name].append(plain(options.data_dir, options.images, workers))
            print(f"round {i + 1}: {name}: {rates[name][-1]:.0f} examples/s", flush=True)
        for name, flags in OURS.items():
            rates[name].append(densely(options.data_dir, options.images, flags))
            print(f"round {i + 1}: {name}: {rates[name][-1]:.0f} examples/s", flush=True)

    from densely.environment import environment
    from densely.runtime import choose_runtime

    medians = {name: statistics.median(values) for name, values in rates.items()}
    best_peer = max(PEERS, key=lambda name: medians[name])
    pipeline = pipeline_seconds(options.data_dir)
    result = {
        "command": f"python benchmarks/bench_chapter.py --data-dir FOLDER "
        f"--images {options.images} --rounds {options.rounds}",
        "environment": environment(choose_runtime()) | {"command": None},
        "best_peer": best_peer,
        "variants": {
            name: {
                "examples_per_s": [round(value, 1) for value in values],
                "median": round(medians[name], 1),
                "ratio_to_best_peer": round(medians[name] / medians[best_peer], 3),
                # Neighbours in time share what else the machine was doing.
                "ratio_by_round": [
                    round(value / peer, 3)
                    for value, peer in zip(values, rates[best_peer], strict=True)
                ],
            }
            for name, values in rates.items()
        },
        "pipeline_ms": round(1000 * pipeline, 3),
        "step_ms": round(1000 * 256 / medians["densely"], 3),
        "pipeline_share_of_step": round(pipeline * medians["densely"] / 256, 4),
    }
    device = choose_runtime().device.type
    path = HERE / "results" / f"chapter-{device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["variants"], indent=2))
    print(f"data pipeline: {result['pipeline_share_of_step']:.1%} of a step; written to {path}")


if __name__ == "__main__":
    main()
