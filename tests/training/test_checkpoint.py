"""Checkpoints: whole at any moment, and every kind of damage named."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from densely.data import Preprocessing
from densely.errors import RunError
from densely.training import checkpoint
from densely.training.checkpoint import (
    ModelInfo,
    Progress,
    load_model,
    load_progress,
    load_state,
    save_checkpoint,
)
from densely.training.run import RunDirectory


@pytest.fixture
def saved(digits_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_run / "checkpoints" / "last", tmp_path / "last"))


def test_a_loaded_network_is_the_saved_one(saved: Path) -> None:
    model, info = load_model(saved)
    tensors = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert not model.training
    assert info.classes == tuple("0123456789")
    assert (info.preprocessing.image_size, info.preprocessing.channels) == (8, 1)


def test_optimizer_and_progress_come_back(tmp_path: Path) -> None:
    info = ModelInfo("densenet_bc_22_12", ("a", "b"), Preprocessing.identity(8, 1))
    model, other = (info.build().to(memory_format=torch.channels_last) for _ in range(2))
    optimizer, blank = (
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other)
    )
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    progress = Progress({"seed": 7}, "abc", epoch=3, step=2, loss_sum=0.1 + 0.2, correct=1)
    save_checkpoint(tmp_path / "last", model, info, optimizer, progress)
    assert load_progress(tmp_path / "last", other, blank) == progress
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        buffers = (s.state[p]["momentum_buffer"] for s, p in ((optimizer, mine), (blank, theirs)))
        momentum, loaded = buffers
        assert torch.equal(momentum, loaded)
        assert loaded.stride() == theirs.stride()  # or PyTorch's fused steps would not take it


def test_momentum_of_another_shape_is_named(saved: Path) -> None:
    model, _ = load_model(saved)
    path = saved / "optimizer.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    save_file(tensors | {key: torch.zeros(3, 2)}, path)
    with pytest.raises(RunError, match=rf"optimizer\.safetensors: {key} is \[3, 2\], expected \["):
        load_progress(saved, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    info = ModelInfo("densenet_bc_22_12", ("a", "b"), Preprocessing.identity(8, 1))
    model = info.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in (1, 2):
        progress = Progress({}, "abc", epoch=epoch)
        save_checkpoint(tmp_path / "last", model, info, optimizer, progress)
    assert load_progress(tmp_path / "last", model, optimizer).epoch == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_process_that_died_while_swapping_left_a_whole_checkpoint(saved: Path) -> None:
    saved.rename(saved.with_name("last.new"))
    model, _ = load_model(saved)
    assert model.num_classes == 10


def test_a_process_that_died_while_writing_left_the_old_one(saved: Path) -> None:
    new = saved.with_name("last.new")
    new.mkdir()
    (new / "model.safetensors").write_bytes(b"half")
    assert load_model(saved)[0].num_classes == 10


def save(folder: Path, epoch: int) -> None:
    model, info = load_model(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(folder, model, info, optimizer, Progress({}, "abc", epoch=epoch))


def test_saving_after_such_a_death_loses_nothing(saved: Path) -> None:
    saved.rename(saved.with_name("last.new"))  # died after the old one had moved to last.old
    save(saved, epoch=9)
    assert load_state(saved).epoch == 9
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def die_between_the_swaps(folder: Path, epoch: int) -> None:
    """Save, until the old checkpoint has given way and the new one has not taken its place."""
    swap = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == folder:
            raise SystemExit
        swap(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(SystemExit):
            save(folder, epoch)


def test_of_two_that_a_death_left_whole_the_newer_is_found(saved: Path) -> None:
    die_between_the_swaps(saved, epoch=9)
    assert sorted(path.name for path in saved.parent.glob("last*")) == ["last.new", "last.old"]
    assert load_state(saved).epoch == 9


def test_a_disk_that_is_full_after_such_a_death_loses_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    die_between_the_swaps(saved, epoch=9)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(saved, epoch=10)
    assert load_state(saved).epoch == 9


def test_the_old_one_is_found_where_only_it_is_whole(saved: Path) -> None:
    saved.rename(saved.with_name("last.old"))
    saved.with_name("last.new").mkdir()
    assert load_model(saved)[0].num_classes == 10


def test_the_best_checkpoint_is_used_wherever_it_was_left(digits_run: Path, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(digits_run, tmp_path / "run")))
    run.best.rename(run.best.with_name("best.new"))
    assert run.weights() == run.best
    assert load_model(run.weights())[0].num_classes == 10


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", "3"), ("loss_sum", None), ("settings", []), ("nonsense", 1)]
)
def test_a_state_of_wrong_types_is_named(saved: Path, key: str, value: object) -> None:
    path = saved / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=r"state\.json: damaged.*" + key):
        load_state(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage"])
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2]}.get(damage, b"\0x"))
    with pytest.raises(RunError, match=name):
        load_model(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "nonet"),
        ("classes", 3),
        ("preprocessing", {}),
        ("preprocessing", {"image_size": "x", "channels": 1, "mean": [0], "std": [1]}),
        ("preprocessing", {"image_size": 8, "channels": 1, "mean": [0], "std": []}),
    ],
)
def test_wrong_facts_about_the_model_are_named(saved: Path, key: str, value: object) -> None:
    path = saved / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=r"model\.json"):
        load_model(saved)


def test_weights_that_do_not_fit_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"] = tensors["classifier.weight"][:3].clone()
    tensors["extra"] = tensors.pop("features.norm5.bias")
    save_file(tensors, path)
    with pytest.raises(RunError) as caught:
        load_model(saved)
    for part in ("features.norm5.bias is missing", "extra is unexpected", "classifier.weight is"):
        assert part in str(caught.value)


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no checkpoint$"):
        load_model(tmp_path / "last")


def test_a_run_without_a_checkpoint_says_how_to_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match=r"no checkpoint.*train --config .*config\.yaml$"):
        load_model(tmp_path / "checkpoints" / "last")
