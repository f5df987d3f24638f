"""A file of each kind of damage; `benchmarks/fuzz_weights.py` by itself makes 10,000."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_weights.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_damaged_and_malicious_files_raise_clear_errors_and_nothing_else(tmp_path: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in SCRIPT.parent.glob("fuzz_*.py")]
    kinds = "".join(sources).count("\n@mutation(")
    told = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--count", str(kinds), "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(told.read_text(encoding="utf-8"))
    assert result["faults"] == []
    assert result["mutations"]["unchanged"]["loads"] == 1
    assert [row["files"] for row in result["mutations"].values()] == [1] * kinds
