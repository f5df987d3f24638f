"""Accuracy and wall time of the quick start for a few seeds.

    python benchmarks/bench_quickstart.py

Writes benchmarks/results/quickstart.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from densely.environment import environment
from densely.runtime import choose_runtime

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)


def main() -> None:
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "densely", "train", "--seed", str(seed), "--json"]
            begin = time.perf_counter()
            done = subprocess.run(
                [*command, "--output", folder], check=True, capture_output=True, text=True
            )
            wall_s = time.perf_counter() - begin
        test = json.loads(done.stdout.splitlines()[-1])["test"]
        runs.append({"seed": seed, "test_accuracy": test["accuracy"], "wall_s": round(wall_s, 2)})
        print(runs[-1], flush=True)
    result = {
        "command": "python benchmarks/bench_quickstart.py",
        "environment": environment(choose_runtime()) | {"command": None},
        "runs": runs,
    }
    path = HERE / "results" / "quickstart.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
