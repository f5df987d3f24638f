"""Keep what a run or a comparison measured in benchmarks/results/NAME, for the pages in docs.

python benchmarks/record_run.py runs/d2l-001 chapter-run
python benchmarks/record_run.py runs/compare-average-or-max-001 claims/average-or-max
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from densely.training.run import RunDirectory

HERE = Path(__file__).parent


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, target = Path(sys.argv[1]), HERE / "results" / sys.argv[2]
    target.mkdir(parents=True, exist_ok=True)
    if (folder / "comparison.json").is_file():
        keep_comparison(folder, target)
    else:
        keep_run(RunDirectory.open(folder), target)
    print(f"kept in {target}")


def keep_run(run: RunDirectory, target: Path) -> None:
    for file in (run.metrics_file, run.curves_file):
        shutil.copy(file, target / file.name)
    environment = json.loads((run.path / "env.json").read_text(encoding="utf-8"))
    write(target / "env.json", anywhere(environment))
    config = (run.path / "config.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in config if not line.startswith(("data_dir:", "output:"))]
    (target / "config.yaml").write_text("\n".join(kept) + "\n", encoding="utf-8")


def keep_comparison(folder: Path, target: Path) -> None:
    shutil.copy(folder / "comparison.png", target / "comparison.png")
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    comparison["environment"] = anywhere(comparison["environment"])
    for group in comparison["groups"]:
        group["runs"] = [Path(run).name for run in group["runs"]]
    write(target / "comparison.json", comparison)


def anywhere(environment: dict[str, Any]) -> dict[str, Any]:
    """Where a program or data lay on the machine says nothing about what was measured."""
    command, places = ["densely"], ("--data-dir", "--output", "--resume")
    words = iter(environment["command"][1:])
    for word in words:
        if word in places:
            next(words, None)
        elif not word.startswith(tuple(f"{place}=" for place in places)):
            command.append(word)
    return environment | {"command": command}


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
