"""Keep what a run measured in benchmarks/results/NAME, for docs/results.md.

python benchmarks/record_run.py runs/d2l-001 chapter-run
"""

import json
import shutil
import sys
from pathlib import Path

from densely.training.run import RunDirectory

HERE = Path(__file__).parent


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run = RunDirectory.open(Path(sys.argv[1]))
    target = HERE / "results" / sys.argv[2]
    target.mkdir(parents=True, exist_ok=True)
    for file in (run.metrics_file, run.curves_file):
        shutil.copy(file, target / file.name)
    environment = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    # Where a program or data lay on the machine says nothing about the run.
    environment["command"] = ["densely", *environment["command"][1:]]
    (target / "env.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    config = (run.path / "config.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in config if not line.startswith(("data_dir:", "output:"))]
    (target / "config.yaml").write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"kept in {target}")


if __name__ == "__main__":
    main()
