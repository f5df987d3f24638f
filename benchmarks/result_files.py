"""The files in benchmarks/results, as the makers of pages read them."""

import csv
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def machine(env: dict[str, Any]) -> str:
    versions, why = env["versions"], env["reasons"].get("precision", "")
    return (
        f"{env['device_name']}{f' ({why})' if 'CPU' in why else ''}, {env['threads']} threads, "
        f"{env['precision']}, "
        f"{env['memory_format']}; torch {versions['torch']}, Python {env['python']}, "
        f"densely {versions['densely']}"
    )
