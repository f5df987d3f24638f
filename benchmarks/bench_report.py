"""Time `densely evaluate` with its whole report, and keep what it found of calibration.

python benchmarks/bench_report.py runs/d2l-001

Writes results/report-DEVICE.json: seconds of the whole command, in a process of its own, and the
calibration of the run's network before and after, on the test split.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from densely.environment import environment
from densely.runtime import choose_runtime
from densely.training.run import RunDirectory

RESULTS = Path(__file__).parent / "results"
KEPT = ("data", "date", "method", "calibrated_on", "warnings")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = sys.argv[1]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "densely", "evaluate", run], check=True)
    seconds = time.perf_counter() - begin
    report = Path(run) / "report"
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    runtime = choose_runtime()
    config = RunDirectory.open(Path(run)).config()
    result = {
        "command": "densely evaluate RUN",
        "environment": environment(runtime) | {"command": ["python", *sys.argv[:1], "RUN"]},
        "model": found["cost"]["model"],
        "image_size": config.image_size,
        "epochs": len(RunDirectory.open(Path(run)).rows()),
        "images": found["scores"]["images"],
        "seconds": seconds,
        "page_bytes": (report / "report.html").stat().st_size,
        "accuracy": found["scores"]["accuracy"],
        "calibration": [
            {key: value for key, value in score.items() if key != "bins"}
            for score in found["calibration"]
        ],
        "choices": found["selective"]["choices"],
    } | {key: found[key] for key in KEPT}
    path = RESULTS / f"report-{runtime.device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{seconds:.1f} s for {result['images']:,} images; {path}")


if __name__ == "__main__":
    main()
