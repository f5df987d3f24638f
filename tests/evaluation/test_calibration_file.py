"""The file that keeps a calibration beside the weights that it was fitted for."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from densely.data import Preprocessing
from densely.errors import RunError
from densely.evaluation.calibration import (
    Calibration,
    load_calibration,
    save_calibration,
    weights_digest,
)
from densely.training.checkpoint import ModelInfo, Progress, find_checkpoint, save_checkpoint

VECTOR = Calibration("vector", (2.0, 0.5), (-1.0, 0.25), "validation", 40, 0.02, 0.9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "last"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def stored(folder: Path, num_classes: int) -> Calibration | None:
    return load_calibration(folder, weights_digest(folder), num_classes)


def test_it_stays_beside_the_weights(folder: Path) -> None:
    assert stored(folder, 2) is None
    save_calibration(folder, Calibration.none(2), weights_digest(folder))
    save_calibration(folder, VECTOR, weights_digest(folder))
    assert stored(folder, 2) == VECTOR
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "model.safetensors"]


def test_it_does_not_hold_for_other_weights(folder: Path) -> None:
    save_calibration(folder, VECTOR, weights_digest(folder))
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert stored(folder, 2) is None
    save_calibration(folder, VECTOR, weights_digest(folder))
    assert stored(folder, 2) == VECTOR


def test_a_run_that_goes_on_leaves_none_behind(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    info = ModelInfo("none", ("a", "b"), Preprocessing.identity(1, 3))
    saved = model, info, torch.optim.SGD(model.parameters()), Progress({}, "")
    save_checkpoint(tmp_path / "last", *saved)
    found = find_checkpoint(tmp_path / "last")
    assert found is not None
    save_calibration(found, VECTOR, weights_digest(found))
    assert stored(found, 2) == VECTOR
    with torch.no_grad():
        model.bias += 1
    kept = (found / "calibration.json").read_bytes()
    save_checkpoint(tmp_path / "last", *saved)
    assert stored(found, 2) is None
    (found / "calibration.json").write_bytes(kept)
    assert stored(found, 2) is None


def test_the_old_one_stays_if_the_new_one_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_calibration(folder, VECTOR, weights_digest(folder))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_calibration(folder, Calibration.none(2), weights_digest(folder))
    assert stored(folder, 2) == VECTOR


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[]",
        "\\xff",
        "{}",
        '{"weights_digest": "00"}',
        '{"weights_digest": "00", "calibration": {}}',
        '{"weights_digest": "00", "calibration": 3}',
        '{"weights_digest": "00", "calibration": []}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    (folder / "calibration.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"calibration\.json: damaged .* delete it, and densely"):
        stored(folder, 2)


def test_one_for_another_number_of_classes_is_refused(folder: Path) -> None:
    save_calibration(folder, VECTOR, weights_digest(folder))
    with pytest.raises(RunError, match="for 2 classes, and the network has 3"):
        stored(folder, 3)


def test_weights_must_be_there(folder: Path) -> None:
    digest = weights_digest(folder)
    save_calibration(folder, VECTOR, digest)
    (folder / "model.safetensors").unlink()
    for act in (
        lambda: save_calibration(folder, VECTOR, digest),
        lambda: weights_digest(folder),
    ):
        with pytest.raises(RunError, match=r"model\.safetensors: missing"):
            act()
