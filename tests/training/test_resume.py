"""A run that was stopped, cut short or edited: it goes on to the same bits, or says why not."""

import csv
import dataclasses
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_cases import StopAfter, StopAt, config, same_bits, weights
from safetensors import SafetensorError
from safetensors.torch import save_file

from densely.errors import ConfigError, DataError, RunError, Stopped, TrainingError
from densely.forward import Forward
from densely.runtime import choose_runtime
from densely.training import checkpoint, loop
from densely.training import run as run_module
from densely.training.checkpoint import load_model, load_state
from densely.training.config import TrainConfig
from densely.training.loop import train
from densely.training.reporting import Reporter, Summary
from densely.training.scoring import score_of
from densely.training.splits import splits_of

pytestmark = pytest.mark.usefixtures("undrawn")

LONGER = {"epochs": 3, "batch_size": 50}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return train(config(tmp_path_factory.mktemp("unbroken"), **LONGER))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 3), (3, 4)])
def test_stop_and_resume_give_the_bits_of_an_unbroken_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: Summary,
    epoch: int,
    step: int,
    number: int,
) -> None:
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
    settings = config(tmp_path, **LONGER)
    with pytest.raises(Stopped, match="--resume") as caught:
        train(settings, reporter=StopAt(epoch, step, number))
    assert caught.value.exit_code == 128 + number
    broken = tmp_path / "runs" / "quickstart-001"
    resumed = train(settings, resume=broken)
    assert resumed.test == unbroken.test
    for which in ("last", "best"):
        assert same_bits(weights(broken, which), weights(unbroken.run, which))
    timings = {"examples_per_s", "epoch_s"}
    tables = []
    for run in (broken, unbroken.run):
        with (run / "metrics.csv").open() as file:
            tables.append([{k: v for k, v in row.items() if k not in timings}
                           for row in csv.DictReader(file)])  # fmt: skip
    assert tables[0] == tables[1]


def stop_in_evaluation(settings: TrainConfig) -> None:
    """Train until the first evaluation, in which a signal comes."""
    score_of = loop.score_of

    def stopping(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score_of(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "score_of", stopping)
        with pytest.raises(Stopped):
            train(settings)


def test_a_stop_during_evaluation_loses_nothing(tmp_path: Path) -> None:
    settings = config(tmp_path)
    unbroken = train(settings)
    stop_in_evaluation(settings)
    broken = tmp_path / "runs" / "quickstart-002"
    state = json.loads((broken / "checkpoints" / "last" / "state.json").read_text())
    assert (state["epoch"], state["seen"]) == (0, 200)
    train(settings, resume=broken)
    assert same_bits(weights(broken), weights(unbroken.run))


def test_dropout_while_norms_are_averaged_is_the_same_after_a_stop(tmp_path: Path) -> None:
    settings = config(tmp_path, norm_batches=2, options={"drop_rate": 0.3})
    unbroken = train(settings)
    stop_in_evaluation(settings)
    again = train(settings, resume=tmp_path / "runs" / "quickstart-002")
    assert again.test == unbroken.test
    assert same_bits(weights(again.run), weights(unbroken.run))


def test_a_signal_when_all_is_trained_leaves_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "draw_curves", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    summary = train(config(tmp_path, epochs=1))
    assert (summary.run / "README.md").is_file()


def test_a_run_cannot_end_before_an_epoch_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are those of no epoch whose figures are known."""
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
    settings = config(tmp_path, **LONGER)
    with pytest.raises(Stopped):
        train(settings, reporter=StopAt(3, 2))
    run = tmp_path / "runs" / "quickstart-001"
    with pytest.raises(ConfigError, match="epochs=2: epoch 3 has begun; go on to 3 at least"):
        train(dataclasses.replace(settings, epochs=2), resume=run)


def test_another_number_of_epochs_changes_the_schedule_which_is_said(tmp_path: Path) -> None:
    class Notes(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    settings = config(tmp_path, epochs=1, schedule="cosine")
    run = train(settings).run
    train(dataclasses.replace(settings, epochs=2), resume=run, reporter=Notes())
    assert notes[-1] == "the cosine schedule goes by 2 epochs from here on, and went by 1"


def test_rows_without_their_last_end_of_line_are_mended(tmp_path: Path) -> None:
    settings = config(tmp_path, epochs=1)
    run = train(settings).run
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().rstrip("\n"))
    train(dataclasses.replace(settings, epochs=2), resume=run)
    assert [row.epoch for row in loop.RunDirectory.open(run).rows()] == [1, 2]


def test_a_crash_after_a_row_was_written_does_not_double_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = train(dataclasses.replace(settings, epochs=1)).run
    row = (run / "metrics.csv").read_text().splitlines()[1]
    with (run / "metrics.csv").open("a") as file:
        file.write("2" + row[1:] + "\n")  # an epoch of which the checkpoint knows nothing
    train(settings, resume=run)
    with (run / "metrics.csv").open() as file:
        assert [line["epoch"] for line in csv.DictReader(file)] == ["1", "2"]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    settings = config(tmp_path, schedule="constant")
    longer = dataclasses.replace(settings, epochs=3)
    run = train(settings).run
    assert train(longer, resume=run).epochs == 3
    assert same_bits(weights(run), weights(train(longer).run))


def test_time_that_was_spent_before_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
    settings = config(tmp_path, **LONGER)
    with pytest.raises(Stopped):
        train(settings, reporter=StopAt(1, 2))
    run = tmp_path / "runs" / "quickstart-001"
    path = run / "checkpoints" / "last" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"seconds": 1000.0, "total_s": 5000.0}))
    (run / "env.json").unlink()
    summary = train(dataclasses.replace(settings, epochs=2), resume=run)
    assert summary.seconds > 5000
    row = loop.RunDirectory.open(run).rows()[0]
    assert row.epoch_s > 1000
    assert row.examples_per_s == pytest.approx(200 / 1000, rel=0.05)
    assert (run / "env.json").is_file()  # of the machine that it went on on
    assert loop.RunDirectory.open(run).config().epochs == 2


def test_work_is_saved_within_a_long_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    saved = []
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda *a: saved.append(dataclasses.replace(a[-1]))
    )
    with pytest.raises(RunError):  # nothing was really written: the best one is not there
        train(config(tmp_path, epochs=1, batch_size=50))
    assert [(p.epoch, p.step) for p in saved[:3]] == [(0, 1), (0, 2), (0, 3)]


def test_a_row_that_does_not_fit_on_the_disk_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Summary
) -> None:
    monkeypatch.setattr(loop, "SAVE_EPOCH_SECONDS", 0.0)
    settings, calls = config(tmp_path, **LONGER), []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:  # of the second row, which is there by then
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "fsync", full)
        patch.setattr(checkpoint, "_sync", lambda path: None)
        with pytest.raises(TrainingError, match="No space left on device; when it can be, go on"):
            train(settings)
    broken = tmp_path / "runs" / "quickstart-001"
    assert len((broken / "metrics.csv").read_text().splitlines()) == 2
    assert train(settings, resume=broken).test == unbroken.test


@pytest.mark.parametrize("saves", [0, 3])
def test_a_full_disk_loses_nothing_that_was_saved(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Summary
) -> None:
    monkeypatch.setattr(loop, "SAVE_EPOCH_SECONDS", 0.0)
    settings, written = config(tmp_path, **LONGER), []

    def save(tensors: Any, path: Path, **more: Any) -> None:
        if path.name == "model.safetensors":
            written.append(path)
        if len(written) > saves:
            path.write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)\nmore words")
        save_file(tensors, path, **more)

    with monkeypatch.context() as full:
        full.setattr(checkpoint, "save_file", save)
        with pytest.raises(TrainingError) as caught:
            train(settings)
    run = tmp_path / "runs" / "quickstart-001"
    assert "cannot be written: I/O error: No space left on device" in str(caught.value)
    assert ("go on with: densely train --resume" in str(caught.value)) == (saves > 0)
    assert not list((run / "checkpoints").glob("*.new"))
    if saves:
        resumed = train(settings, resume=run)
        assert resumed.test == unbroken.test
        assert same_bits(weights(run), weights(unbroken.run))


@pytest.mark.parametrize(("seconds", "epochs"), [(0.0, [1, 2, 3]), (1e9, [3])])
def test_short_epochs_are_not_each_saved(
    seconds: float, epochs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EPOCH_SECONDS", seconds)
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a: saved.append(a[-1].epoch))
    train(config(tmp_path, epochs=3, validation=0.0))
    assert saved == epochs


def test_a_stop_between_short_epochs_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EPOCH_SECONDS", 1e9)

    settings = config(tmp_path, epochs=4, validation=0.0)
    with pytest.raises(Stopped, match="stopped and saved"):
        train(settings, reporter=StopAfter(2))
    (run,) = (tmp_path / "runs").iterdir()
    assert load_state(run / "checkpoints" / "last").epoch == 2
    assert same_bits(weights(train(settings, resume=run).run), weights(train(settings).run))


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_run_that_is_cut_short_before_any_evaluation_is_judged_all_the_same(
    tmp_path: Path, validation: float
) -> None:
    settings = config(
        tmp_path, epochs=9, evaluate_every=9, validation=validation, norm_batches=2, lr=0.2,
        schedule="constant", precision="float32", device="cpu",
    )  # fmt: skip
    with pytest.raises(Stopped):
        train(settings, reporter=StopAfter(3))
    (folder,) = (tmp_path / "runs").iterdir()
    summary = train(dataclasses.replace(settings, epochs=3), resume=folder)
    assert (summary.epochs, summary.best_epoch) == (3, 3)
    run = loop.RunDirectory.open(folder)
    last, name = run.rows()[-1], "validation" if validation else "test"
    assert getattr(last, f"{name}_accuracy") is not None
    assert (folder / "checkpoints" / "best").exists() == bool(validation)
    # What was judged is what was kept.
    model, info = load_model(run.weights())
    test = splits_of(settings).test
    runtime = choose_runtime("cpu", "float32")
    runtime.place(model)
    found = score_of(Forward(model, runtime), test, info.preprocessing)
    assert found == summary.test


def test_resume_refuses_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    run = train(settings).run
    monkeypatch.setattr(loop, "splits_of", lambda config: splits_of(
        dataclasses.replace(config, split_seed=1)))  # fmt: skip
    with pytest.raises(DataError, match="began with other training images than digits"):
        train(settings, resume=run)


@pytest.mark.parametrize("part", ["test", "val"])
def test_resume_refuses_other_images_to_judge_by(tmp_path: Path, part: str) -> None:
    for folder, shades in (("train", range(30, 90, 10)), ("val", (35, 45)), ("test", (55, 65))):
        for name, shift in (("dark", 0), ("light", 120)):
            (tmp_path / "data" / folder / name).mkdir(parents=True)
            for shade in shades:
                path = tmp_path / "data" / folder / name / f"{shade}.png"
                Image.new("L", (8, 8), shade + shift).save(path)
    settings = config(tmp_path, data=str(tmp_path / "data"), limit=None)
    run = train(settings).run
    assert train(settings, resume=str(run)).epochs == 2
    Image.new("L", (8, 8), 1).save(tmp_path / "data" / part / "dark" / "new.png")
    with pytest.raises(DataError, match="began with other validation or test images than"):
        train(dataclasses.replace(settings, epochs=3), resume=run)
    state = run / "checkpoints" / "last" / "state.json"
    values = json.loads(state.read_text())
    del values["held_out_digest"]  # as in runs of before it was kept
    state.write_text(json.dumps(values))
    assert train(dataclasses.replace(settings, epochs=3), resume=run).epochs == 3
    assert load_state(run / "checkpoints" / "last").held_out_digest


def test_resume_refuses_a_config_that_was_edited(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = train(settings).run
    with pytest.raises(RunError, match="began with another batch_size, lr"):
        train(dataclasses.replace(settings, lr=0.9, batch_size=16), resume=run)
    assert train(settings, resume=run).epochs == 2  # and the run is free for the right one


def test_resume_refuses_fewer_epochs_than_are_done(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = train(settings).run
    with pytest.raises(ConfigError, match="epochs=1: 2 are already done"):
        train(dataclasses.replace(settings, epochs=1), resume=run)
