"""Training: it learns, twice the same, what is held out is judged, and mistakes are said."""

import copy
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_cases import StopAt, config, same_bits, weights
from torch import Tensor, nn

from densely import evaluate
from densely.data import load_data
from densely.errors import ConfigError, Stopped, TrainingError
from densely.forward import Forward
from densely.runtime import choose_runtime
from densely.training import loop
from densely.training.captured import TrainingStep
from densely.training.checkpoint import ModelInfo, load_model, load_state
from densely.training.config import TrainConfig
from densely.training.loop import batches, train
from densely.training.reporting import Reporter, RunFacts, Summary
from densely.training.run import EpochMetrics
from densely.training.scoring import Score, score_of
from densely.training.splits import held_out_digest, splits_of

pytestmark = pytest.mark.usefixtures("undrawn")


def score(model: nn.Module, info: ModelInfo) -> Score:
    """How good a network is on the test digits."""
    forward = Forward(model.eval(), choose_runtime("cpu", "float32"))
    return score_of(forward, load_data("digits").test, info.preprocessing, lambda: None)


def test_the_quick_start_learns_the_digits(tmp_path: Path) -> None:
    summary = train(TrainConfig.from_values({"output": str(tmp_path), "epochs": 5}))
    assert summary.test.accuracy >= 0.97


def test_a_run_directory_holds_all_that_it_should(digits_run: Path) -> None:
    names = {path.relative_to(digits_run).as_posix() for path in digits_run.rglob("*")}
    files = {"model.safetensors", "model.json", "optimizer.safetensors", "state.json"}
    assert names == {
        "config.yaml", "env.json", "metrics.csv", "curves.png", "README.md", "checkpoints",
        "checkpoints/last", "checkpoints/best",
        *(f"checkpoints/{which}/{file}" for which in ("last", "best") for file in files),
    }  # fmt: skip
    with (digits_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0]["validation_accuracy"]
    assert not rows[0]["test_accuracy"]  # the test split is left alone until the end
    assert (digits_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((digits_run / "env.json").read_text())["versions"]["torch"]
    assert f"densely predict {digits_run} IMAGE..." in (digits_run / "README.md").read_text()


def test_the_same_command_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = (train(config(tmp_path)).run for _ in range(2))
    assert (first.name, second.name) == ("quickstart-001", "quickstart-002")
    assert same_bits(weights(first), weights(second))


def test_another_seed_gives_another_network(tmp_path: Path) -> None:
    first, second = (train(config(tmp_path, seed=seed)).run for seed in (0, 1))
    assert not same_bits(weights(first), weights(second))


@pytest.mark.parametrize("saved", [False, True])
def test_diverging_training_ends_with_advice_and_keeps_what_was_saved(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saved:
        monkeypatch.setattr(loop, "SAVE_EPOCH_SECONDS", 0.0)
    learning_rate = loop._Trainer._learning_rate
    monkeypatch.setattr(
        loop._Trainer,
        "_learning_rate",
        lambda self, step: 1e30 if self.progress.epoch else learning_rate(self, step),
    )
    with pytest.raises(TrainingError, match=r"diverged; try a smaller --lr than") as caught:
        train(config(tmp_path, epochs=5, validation=0.0))
    assert caught.value.exit_code == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert ("keeps what was saved before" in str(caught.value)) == saved
    assert (run / "checkpoints" / "last").exists() == saved


def test_the_best_epoch_is_chosen_by_validation_and_judged_on_test(tmp_path: Path) -> None:
    summary = train(config(tmp_path, epochs=4, lr=0.05))
    with (summary.run / "metrics.csv").open() as file:
        rows = [
            (float(r["validation_accuracy"]), -float(r["validation_loss"]))
            for r in csv.DictReader(file)
        ]
    assert summary.best_epoch == 1 + rows.index(max(rows))


def test_the_test_is_of_the_best_epoch_and_not_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [0.05, 0.05, 1.0]  # the last epoch spoils what was learnt
    monkeypatch.setattr(
        loop._Trainer, "_learning_rate", lambda self, step: rates[self.progress.epoch]
    )
    summary = train(config(tmp_path, epochs=3))
    assert summary.best_epoch < 3
    result = evaluate(summary.run, device="cpu", precision="float32")
    assert summary.test.loss == pytest.approx(result.loss, rel=0.05)
    last, info = load_model(loop.RunDirectory.open(summary.run).last)
    assert score(last, info).loss > 10 * summary.test.loss


def test_of_epochs_that_are_as_good_the_first_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "score_of", lambda *arguments: Score(0.5, 0.75))
    assert train(config(tmp_path, epochs=3)).best_epoch == 1


def test_a_better_epoch_is_saved_as_the_last_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = loop._Trainer._judged

    def failing(trainer: Any, row: EpochMetrics) -> EpochMetrics:
        if row.epoch == 2:
            raise RuntimeError("power failure")
        return judged(trainer, row)

    monkeypatch.setattr(loop._Trainer, "_judged", failing)
    with pytest.raises(RuntimeError, match="power failure"):
        train(config(tmp_path, epochs=2))
    last = loop.RunDirectory.open(tmp_path / "runs" / "quickstart-001").last
    assert load_state(last).epoch == 1


def test_norms_are_averaged_over_as_many_batches_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(
        loop, "average_norm_statistics", lambda forward, inputs: sizes.append([*map(len, inputs)])
    )
    train(config(tmp_path, epochs=1, batch_size=50, norm_batches=2))
    assert sizes == [[50, 50]]


def test_an_infinite_loss_is_divergence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(step: TrainingStep, *arguments: Any) -> None:
        step.loss_sum.fill_(float("inf"))

    monkeypatch.setattr(TrainingStep, "__call__", infinite)
    with pytest.raises(TrainingError, match="the loss is inf in epoch 1"):
        train(config(tmp_path))


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_a_last_step_that_went_too_far_is_not_kept(tmp_path: Path, validation: float) -> None:
    settings = config(tmp_path, limit=64, batch_size=64, lr=1e30, validation=validation)
    with pytest.raises(TrainingError, match="in epoch 1: training diverged"):
        train(settings)
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "checkpoints").exists()
    assert loop.RunDirectory.open(run).rows() == []


def test_weights_that_are_no_numbers_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch = loop._Trainer._train_epoch

    def spoiling(trainer: Any) -> None:
        train_epoch(trainer)
        if trainer.progress.epoch == 1:
            next(trainer.model.parameters()).data.view(-1)[0] = float("nan")

    monkeypatch.setattr(loop._Trainer, "_train_epoch", spoiling)
    with pytest.raises(TrainingError, match="weights are no numbers in epoch 2: training diverged"):
        train(config(tmp_path, evaluate_every=5, epochs=5))
    (run,) = (tmp_path / "runs").iterdir()
    assert [row.epoch for row in loop.RunDirectory.open(run).rows()] == [1]


def test_a_held_out_loss_that_is_no_number_is_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "score_of", lambda *arguments: Score(float("nan"), 0.9))
    with pytest.raises(TrainingError, match="the loss on held-out images is nan in epoch 1"):
        train(config(tmp_path))
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "checkpoints").exists()


def test_norms_of_other_kinds_have_nothing_to_average(tmp_path: Path) -> None:
    train(config(tmp_path, epochs=1, norm_batches=2, options={"norm": "group"}))


def test_a_class_whose_name_is_no_text_ends_in_a_card(tmp_path: Path) -> None:
    for name, shade in (("caf\udce9", 10), ("a|b\nc", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), shade + i).save(tmp_path / "data" / name / f"{i}.png")
    settings = config(tmp_path, data=str(tmp_path / "data"), validation=0, limit=None, epochs=1)
    card = (train(settings).run / "README.md").read_text(encoding="utf-8")
    assert r"| classes | 2: a\|b\nc, caf\udce9 |" in card


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: densely trains in one process"):
        train(config(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_folder_called_as_a_data_set_is_kept_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = TrainConfig(data="digits", data_dir="digits")
    found = loop.from_anywhere(given)
    assert (found.data, found.data_dir) == ("digits", str(tmp_path / "digits"))


def test_parts_follow_the_split_seed_and_not_the_runs(tmp_path: Path) -> None:
    def digests(**values: Any) -> tuple[str, str]:
        splits = splits_of(config(tmp_path, **values))
        return splits.train.digest(), held_out_digest(splits)

    assert digests(seed=1) == digests(seed=2)
    for mine, theirs in zip(digests(split_seed=1), digests(split_seed=2), strict=True):
        assert mine != theirs


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_epochs_between_evaluations_are_not_judged(tmp_path: Path, validation: float) -> None:
    settings = config(tmp_path, epochs=5, validation=validation, limit=60)
    sparse = train(dataclasses.replace(settings, evaluate_every=2))
    rows, every = (loop.RunDirectory.open(s.run).rows() for s in (sparse, train(settings)))
    name = "validation" if validation else "test"
    judged = [getattr(row, f"{name}_accuracy") for row in rows]
    assert [at for at, accuracy in enumerate(judged, 1) if accuracy is not None] == [2, 4, 5]
    for row, full in zip(rows, every, strict=True):  # learning does not notice
        assert row.train_loss == full.train_loss
        if getattr(row, f"{name}_loss") is not None:
            assert getattr(row, f"{name}_loss") == getattr(full, f"{name}_loss")
    assert sparse.best_epoch in ((2, 4, 5) if validation else (5,))


def test_without_validation_the_last_epoch_counts(tmp_path: Path) -> None:
    summary = train(config(tmp_path, validation=0))
    assert summary.best_epoch == summary.epochs
    assert not (summary.run / "checkpoints" / "best").exists()
    with (summary.run / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["test_accuracy"]) == summary.test.accuracy


def test_a_wrong_model_for_the_data_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 29"):
        train(config(tmp_path, model="d2l"))
    assert not (tmp_path / "runs").exists()


def test_odd_folder_names_do_not_matter(tmp_path: Path) -> None:
    for name, shade in (("a $_$", 10), ("b", 200)):
        (tmp_path / "c$_$ d" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), shade + i).save(tmp_path / "c$_$ d" / name / f"{i}.png")
    data = str(tmp_path / "c$_$ d")
    summary = train(config(tmp_path, data=data, validation=0, limit=None, epochs=1))
    assert summary.curves.is_file()


def test_what_was_read_is_said_and_noted(tmp_path: Path) -> None:
    class Notes(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    for part, count, first in (("train", 6, 0), ("valid", 2, 6)):
        for name, shade in (("a", 10), ("b", 200)):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(first, first + count):
                path = tmp_path / "data" / part / name / f"{i}.png"
                Image.new("L", (8, 8), shade + i).save(path)
    settings = config(
        tmp_path, data=str(tmp_path / "data"), validation=0.2, limit=None, epochs=1, image_size=16,
        schedule="constant",
    )  # fmt: skip
    expected = [
        f"reading {tmp_path / 'data'} ...",
        "9 training, 3 validation, 4 test images; 2 classes; images of 8x8 pixels, scaled to 16x16",
        "there is no test folder: valid/ is the test split",
    ]
    run = train(settings, reporter=Notes()).run
    assert notes == expected
    notes.clear()
    train(dataclasses.replace(settings, epochs=2), resume=run, reporter=Notes())
    assert notes == expected


def test_too_little_memory_is_said_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "__call__", full)
    with pytest.raises(TrainingError, match="smaller --batch-size"):
        train(config(tmp_path))


def test_too_little_memory_to_go_on_is_no_reason_to_change_what_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = train(config(tmp_path)).run
    monkeypatch.setattr(TrainingStep, "__call__", full)
    with pytest.raises(TrainingError, match="not enough memory: sizes are fixed") as caught:
        train(config(tmp_path, epochs=3), resume=run)
    assert "--batch-size" not in str(caught.value)


def test_cosine_falls_from_the_rate_to_nearly_zero(tmp_path: Path) -> None:
    class Rates(Reporter):
        def epoch(self, row: EpochMetrics) -> None:
            rates.append(row.lr)

    rates: list[float] = []
    train(config(tmp_path, epochs=4, lr=0.1), reporter=Rates())
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 0.1
    assert rates[-1] < 0.01


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_every_precision_and_layout_trains(
    tmp_path: Path, precision: str, memory_format: str
) -> None:
    settings = config(tmp_path, precision=precision, memory_format=memory_format, epochs=1)
    assert train(settings).run.is_dir()


def test_the_first_epoch_of_the_chapter_learns(tmp_path: Path, fashion_mnist_dir: Path) -> None:
    class Rows(Reporter):
        def started(self, facts: RunFacts) -> None:
            started.append(facts)

        def epoch(self, row: EpochMetrics) -> None:
            rows.append(row)

    class Done(Exception):
        pass

    started: list[RunFacts] = []
    rows: list[EpochMetrics] = []
    settings = TrainConfig.from_values(
        {"recipe": "d2l", "data_dir": str(fashion_mnist_dir), "limit": 480, "batch_size": 48,
         "norm_batches": 2, "epochs": 1, "output": str(tmp_path)}
    )  # fmt: skip
    trainer = loop._Trainer(settings, None, Rows())
    trainer.test_set = trainer.test_set.subset(torch.arange(64))  # seconds, not half a minute
    summary = trainer.fit()
    assert isinstance(summary, Summary)
    assert (started[0].parameters, started[0].image_size) == (758_226, 96)
    assert rows[0].train_accuracy > 0.3  # of ten classes, after ten steps


def test_a_step_is_told_what_else_will_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of other sizes, and the evaluation of an epoch; nothing of that leaves a trace."""
    told: list[tuple[int, set[int]]] = []
    sizes: list[tuple[int, bool]] = []
    original = loop.training_step

    def spy(model: Any, *given: Any, other_sizes: set[int], beside: Any) -> Any:
        told.append((len(given[-1]), other_sizes))
        hook = model.register_forward_pre_hook(
            lambda module, inputs: sizes.append((len(inputs[0]), module.training))
        )
        for work in beside:
            work()
        hook.remove()
        assert model.training
        return original(model, *given, other_sizes=other_sizes)

    monkeypatch.setattr(loop, "training_step", spy)
    for limit, batch_size in ((100, 30), (90, 30), (91, 30)):
        train(config(tmp_path, limit=limit, batch_size=batch_size, epochs=1, validation=0.0))
    assert told == [(30, {10}), (30, set()), (30, set())]  # the last has a batch of 31 at its end
    evaluated = [(104, False), (128, False), (256, False)]  # 360 test images; 104 fill up to 128
    assert sizes == 3 * evaluated
    sizes.clear()
    settings = config(tmp_path, limit=600, batch_size=120, epochs=1, validation=0.05)
    train(dataclasses.replace(settings, norm_batches=1))
    assert sizes == [(72, False), (128, False), (120, True)]  # 72 for validation


def test_batches_cover_all_images_once_and_none_is_single() -> None:
    for count in range(2, 40):
        for size in (2, 3, 7, 64):
            bounds = batches(count, size)
            assert [i for first, end in bounds for i in range(first, end)] == list(range(count))
            assert all(end - first > 1 for first, end in bounds)
            assert all(end - first <= size + 1 for first, end in bounds)


def test_each_step_has_a_seed_of_its_own_and_each_epoch_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    orders: dict[int, set[tuple[int, ...]]] = {}
    original = loop._Trainer._order

    def draw(images: Tensor, generator: torch.Generator) -> Tensor:
        seeds.append(generator.initial_seed())
        return images

    def order(trainer: loop._Trainer, epoch: int) -> Tensor:
        found = original(trainer, epoch)
        orders.setdefault(epoch, set()).add(tuple(found.tolist()))
        return found

    monkeypatch.setattr(loop, "crop_and_flip", draw)
    monkeypatch.setattr(loop._Trainer, "_order", order)
    train(config(tmp_path, augment="crop-flip", limit=100, batch_size=25, validation=0.0))
    assert len(seeds) == len(set(seeds)) == 8
    assert [len(of_an_epoch) for of_an_epoch in orders.values()] == [1, 1]
    assert orders[0] != orders[1]


def test_steps_are_nesterovs_with_weight_decay(tmp_path: Path) -> None:
    """As PyTorch has it after Sutskever et al. (2013): the decay is part of the gradient."""
    rate, momentum, decay = 0.05, 0.9, 0.03
    trainer = loop._Trainer(
        config(
            tmp_path, lr=rate, momentum=momentum, weight_decay=decay, limit=40, device="cpu",
            precision="float32",
        ),
        None,
        Reporter(),
    )  # fmt: skip
    model = copy.deepcopy(trainer.model).double().train()
    images, labels = trainer._inputs(torch.arange(20)), trainer.train_set.labels[:20]
    step = trainer._training_step()
    velocities = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(3):
        step(images, labels)
        loss = torch.nn.functional.cross_entropy(model(images.double()), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), gradients, velocities, strict=True):
                g = g + decay * p
                v.mul_(momentum).add_(g)
                p.sub_(rate * (g + momentum * v))
    for mine, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_step_schedule_divides_by_ten_at_half_and_three_quarters(tmp_path: Path) -> None:
    summary = train(config(tmp_path, schedule="step", lr=0.1, epochs=8, limit=30))
    with (summary.run / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_augmented_training_is_another_and_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
    plain = train(config(tmp_path))
    whole = train(config(tmp_path, augment="crop-flip"))
    assert not same_bits(weights(plain.run), weights(whole.run))
    with pytest.raises(Stopped):
        train(config(tmp_path, augment="crop-flip"), reporter=StopAt(2, 2))
    stopped = sorted((tmp_path / "runs").iterdir())[-1]
    again = train(config(tmp_path, augment="crop-flip"), resume=stopped)
    assert same_bits(weights(again.run), weights(whole.run))
