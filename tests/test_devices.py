"""Each command on each device at hand: it runs, and says there what it says on a CPU.

In float32, so that what differs is the order of sums alone.
"""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import DEVICES, exact_convolutions

import densely
from densely.cli import main
from densely.data import load_data
from densely.evaluation.heat_maps import METHODS

Digits = list[tuple[Path, str]]

pytestmark = [
    pytest.mark.usefixtures("hasty_costs", "undrawn"),
    pytest.mark.parametrize("device", DEVICES),
]
BOUND = 1e-3  # relative
_NEEDS_CAPTUM = pytest.mark.skipif(find_spec("captum") is None, reason="captum is not installed")
EACH_METHOD = [
    pytest.param(method, marks=_NEEDS_CAPTUM if method == "integrated_gradients" else ())
    for method in METHODS
]


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which may be written to; it was trained on a CPU."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _device_is_used(device: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A command that computed on the CPU all the same, or kernel by kernel, would prove nothing."""
    if device == "cpu":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with exact_convolutions():
        yield
    assert torch.cuda.max_memory_allocated() > before
    records = [record for phase in ("setup", "call") for record in caplog.get_records(phase)]
    assert not [record for record in records if "without a CUDA graph" in record.getMessage()]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What a command prints with --json, line by line."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trains_and_goes_on(
    device: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--device", device, "--precision", precision)
    *_, end = said(capsys, "train", "--epochs", "2", "--output", tmp_path, *how)
    first = densely.evaluate(end["run"], device=device, precision="float32")
    *_, end = said(capsys, "train", "--resume", end["run"], "--epochs", "4", *how)
    assert end["epochs"] == 4
    result = densely.evaluate(end["run"], device=device, precision="float32")
    assert result.loss < first.loss
    assert result.accuracy > 0.9
    expected = densely.evaluate(end["run"], device="cpu", precision="float32")
    assert result.loss == pytest.approx(expected.loss, rel=0.05)


def test_evaluates_with_a_report(
    device: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--device", device, "--precision", "float32")
    (found,) = said(capsys, "evaluate", run, *how)
    expected = densely.evaluate(run, device="cpu", precision="float32")
    assert found["loss"] == pytest.approx(expected.loss, rel=BOUND)
    assert found["accuracy"] == pytest.approx(expected.accuracy, abs=2 / expected.images)
    assert Path(found["report"]).is_file()


def test_predicts(
    device: str, run: Path, digit_files: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [path for path, _ in digit_files]
    found = said(capsys, "predict", run, *images, "--device", device, "--precision", "float32")
    expected = densely.load(run, device="cpu", precision="float32").predict(images)
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other.label
        assert one["probability"] == pytest.approx(other.probability, rel=BOUND)


@pytest.mark.parametrize("method", EACH_METHOD)
def test_explains(
    device: str,
    method: Any,
    run: Path,
    digit_files: Digits,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [path for path, _ in digit_files[::5]]
    how = ("--method", method, "--device", device, "--output", tmp_path / "out")
    pictures = said(capsys, "explain", run, *images, *how)
    assert all(Path(picture["path"]).is_file() for picture in pictures)

    classifier, cpu = (densely.load(run, device=d, precision="float32") for d in (device, "cpu"))
    x = cpu.preprocessing(load_data("digits").test.images[:8])
    found = densely.explain(classifier.model, x.to(device), method=method)
    expected = densely.explain(cpu.model, x, method=method)
    assert found.maps.device.type == device
    assert torch.equal(found.targets.cpu(), expected.targets)
    assert (found.maps.cpu() - expected.maps).norm() <= 0.01 * expected.maps.norm()


def test_compares(
    device: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = densely.TrainConfig.from_values(
        {"epochs": 1, "output": str(tmp_path), "device": device, "options": {"growth_rate": 8}}
    )
    other = densely.train(config).run
    (found,) = said(capsys, "compare", run, other, "--device", device, "--output", tmp_path)
    assert [len(group["accuracies"]) for group in found["groups"]] == [1, 1]
    assert all(group["cost"]["parameters"] > 0 for group in found["groups"])
