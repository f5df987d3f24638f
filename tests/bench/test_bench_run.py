"""`densely bench` as people use it, with networks that take no time."""

import json
from pathlib import Path

import pytest
from tiny_nets import NET, entrants

from densely.bench import compare, run
from densely.bench.depth import DepthSeries
from densely.bench.nets import NETS
from densely.cli import main


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    series = [
        DepthSeries("densely", "ours", (40, 100), (100, 250)),
        DepthSeries("torchvision", "peer", (40, 100), gap="not installed: torchvision"),
    ]
    monkeypatch.setitem(NETS, "d2l", NET)
    monkeypatch.setattr(compare, "variants", lambda *_: entrants([]))
    monkeypatch.setattr(compare, "peak_in_fresh_process", lambda task: 2_000_000)
    monkeypatch.setattr(run, "depth_series", lambda *_: series)


@pytest.mark.usefixtures("small")
def test_tables_json_and_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    assert main(["bench", "--net", "d2l", "--rounds", "2", "--output", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "d2l at 4x4, training step, batch 3" in out
    assert "not measured: timm: not installed: timm" in out
    assert "memory as the system gives it" in out
    assert "L^1.00" in out
    assert "d2l train: round 2 of 2" in err

    found = json.loads((folder / "bench-cpu.json").read_text())
    assert found["command"] == "densely bench --net d2l --rounds 2"
    assert found["allocator"] == "system"
    assert found["date"]
    assert {"versions", "commit", "device_name", "threads"} <= set(found["environment"])
    assert str(tmp_path) not in json.dumps(found)
    train, inference = found["comparisons"]
    assert (train["mode"], inference["mode"]) == ("train", "inference")
    densely, timm = train["variants"]["densely"], train["variants"]["timm"]
    assert densely["ratio"] > 0
    assert densely["kept_reference_over_this"] == 1
    assert densely["peak_bytes"] == 2_000_000
    assert timm["gap"] == "not installed: timm"
    assert found["depth"]["series"]["densely"]["exponent"] == 1
    for name in ("bench-cpu.png", "bench-cpu-depth.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) == 3


@pytest.mark.usefixtures("small")
def test_of_inference_nothing_is_kept_and_nothing_said_of_depth(tmp_path: Path) -> None:
    assert main(["bench", "--mode", "inference", "--net", "d2l", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-cpu.json", "bench-cpu.png"]


@pytest.mark.usefixtures("small")
def test_an_allocator_that_cannot_be_set_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "keep_freed_memory", lambda: False)
    assert main(["bench", "--allocator", "keep", "--output", str(tmp_path / "x")]) == 2
    assert "Linux with glibc" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_what_was_measured_outlives_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "depth_series", interrupted)
    assert main(["bench", "--net", "d2l", "--quick", "--output", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "bench-cpu-quick.json").read_text())["comparisons"]) == 2


def test_an_output_that_takes_no_files_is_named_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run, "TemporaryFile", refuse)
    monkeypatch.setattr(run, "compare", None)
    assert main(["bench", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path}: cannot be written: Permission" in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "--output", str(tmp_path / "file")]) == 2
    assert "file: cannot be written: File exists" in capsys.readouterr().err
