"""The training loop: plain PyTorch, one step after another, and nothing lost when it is stopped."""

import dataclasses
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densely.data import ImageSet, absolute
from densely.data.augmentation import crop_and_flip
from densely.environment import device_name
from densely.errors import ConfigError, DataError, Diverged, RunError, Stopped, TrainingError
from densely.forward import Forward
from densely.runtime import choose_runtime, ran_out_of_memory, settle_process
from densely.training.captured import TrainingStep, training_step
from densely.training.card import model_card
from densely.training.checkpoint import (
    Progress,
    find_checkpoint,
    load_info,
    load_model,
    load_progress,
    save_checkpoint,
)
from densely.training.config import FREE_ON_RESUME, TrainConfig
from densely.training.curves import draw_curves
from densely.training.norm_statistics import average_norm_statistics
from densely.training.reporting import Reporter, RunFacts, Summary
from densely.training.run import EpochMetrics, RunDirectory
from densely.training.scoring import Score, batch_sizes, score_of
from densely.training.seeds import generator_seed, seed_generators
from densely.training.sgd import SGD
from densely.training.splits import held_out_digest, splits_of
from densely.training.start import begin, check_start
from densely.training.stopping import StopRequest
from densely.whole_file import write_whole

#: A crash costs at most so much work; a stop by Ctrl-C or SIGTERM costs none.
SAVE_SECONDS = 300.0
#: An epoch's end is saved if the last save is so long ago, and drawn if the last picture is:
#: saving takes 0.04 to 0.2 s, and drawing as long as an epoch of a small network.
SAVE_EPOCH_SECONDS = 5.0
DRAW_SECONDS = 60.0
REPORT_SECONDS = 0.25


def train(
    config: TrainConfig,
    *,
    resume: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Train a network as `config` says, and write its run directory.

    Args:
        config: the run; with `resume`, the run's own, of which epochs and machine may differ.
        resume: run directory to go on with, from the step at which it was stopped.
        reporter: what to tell while it goes on; None for nothing but the run's folder at the end.

    Returns:
        Where the run is, and how well it does on the test split.

    Raises:
        DenselyError: wrong data or settings; training diverged; memory was too small; or
            (`Stopped`) a signal ended it after saving.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train: {type(config).__name__} given, a TrainConfig expected, as of "
            "TrainConfig.from_values({'epochs': 2})"
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:  # each process would train the same network
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: densely trains in one process, on one device: "
            "start it without torchrun"
        )
    begun = None if resume is None else Path(resume)
    try:
        return _Trainer(from_anywhere(config), begun, reporter or Reporter()).fit()
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            advice = (
                "choose a smaller --batch-size, --image-size or --model"
                if resume is None
                else "sizes are fixed by the run; free some, or go on with another --device"
            )
            raise TrainingError(f"not enough memory: {advice}") from error
        raise


def from_anywhere(config: TrainConfig) -> TrainConfig:
    """The same run, with its folders and its file of weights by their full paths."""
    weights = config.weights
    return dataclasses.replace(
        config,
        data=absolute(config.data),
        data_dir=str(Path(config.data_dir).resolve()) if config.data_dir else None,
        weights=str(Path(weights).resolve()) if weights and Path(weights).is_file() else weights,
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Fields that may not change when a run goes on; where it is kept is no matter of the run's."""
    free = {*FREE_ON_RESUME, "output", "name", "recipe"}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def batches(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Bounds of the batches of `count` images.

    A last batch of one image is joined to the one before it: one image may have no batch variance.
    """
    bounds = [(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds[-2:] = [(bounds[-2][0], count)]
    return bounds


class _Trainer:
    def __init__(self, config: TrainConfig, resume: Path | None, reporter: Reporter) -> None:
        self._began = time.monotonic()
        self.config, self.reporter = config, reporter
        self.runtime = choose_runtime(config.device, config.precision, config.memory_format)
        if self.runtime.device.type == "cpu":
            settle_process()

        if resume is None:
            check_start(config)
        reporter.note(f"reading {config.data} ...")
        splits = splits_of(config)
        for text in (splits.overview(), *splits.notes):
            reporter.note(text)
        train_set = splits.train
        seed_generators(self.runtime.device, config.seed)
        if resume is None:
            self.info, self.model, report = begin(config, train_set)
            if report is not None:
                reporter.note(str(report))
        else:
            self.info = load_info(RunDirectory.open(resume).last)
            self.model = self.info.build()
        self.runtime.place(self.model)
        self.forward = Forward(self.model, self.runtime)
        self.forward_by_batch = Forward(self.model, self.runtime, training=True)
        device = self.runtime.device
        self.train_set, self.test_set = train_set.to(device), splits.test.to(device)
        self.validation_set = splits.validation.to(device) if splits.validation else None
        self.batches = batches(len(train_set), config.batch_size)
        self.optimizer = SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        # Only now: what is wrong with data or model has shown, and left nothing behind.
        if resume is None:
            digests = train_set.digest(), held_out_digest(splits)
            self.progress = Progress(_settings(config), *digests)
            self.run = RunDirectory.create(config, self.runtime)
            self.run.lock()
        else:
            self.run = RunDirectory.open(resume)
            self.run.lock()
            try:
                self._restore(train_set.digest(), held_out_digest(splits))
            except BaseException:
                self.run.unlock()
                raise
        self._spent_before = self.progress.total_s
        self._saved_at = self._drawn_at = time.monotonic()

    def _restore(self, data_digest: str, held_out: str) -> None:
        self.progress = load_progress(self.run.last, self.model, self.optimizer)
        now = _settings(self.config)
        if other := [
            name for name, value in self.progress.settings.items() if now.get(name) != value
        ]:
            raise RunError(
                f"{self.run.path} began with another {', '.join(other)}; put the old value back "
                "into its config.yaml, or start a new run"
            )
        if self.progress.data_digest != data_digest:
            raise DataError(
                f"{self.run.path} began with other training images than {self.config.data} now "
                "gives; start a new run"
            )
        if self.progress.held_out_digest not in ("", held_out):
            raise DataError(
                f"{self.run.path} began with other validation or test images than "
                f"{self.config.data} now gives, so its epochs could not be compared: start a new "
                "run, or judge this one on them with densely evaluate --data"
            )
        self.progress.held_out_digest = held_out
        epochs, done = self.config.epochs, self.progress.epoch
        if epochs < done:
            raise ConfigError(f"epochs={epochs}: {done} are already done")
        if epochs == done and self.progress.step:  # the weights are not those of epoch `done`
            raise ConfigError(
                f"epochs={epochs}: epoch {done + 1} has begun; go on to {done + 1} at least"
            )
        before = self.run.config().epochs
        if self.config.schedule != "constant" and epochs != before:
            self.reporter.note(
                f"the {self.config.schedule} schedule goes by {epochs} epochs from here on, and "
                f"went by {before}"
            )
        self.run.keep_rows(self.progress.epoch)
        self.run.write_config(self.config)
        self.run.write_environment(self.runtime)

    def fit(self) -> Summary:
        try:
            return self._fit()
        except BrokenPipeError:  # of the output
            raise
        except OSError as error:
            message = f"{self.run.path} cannot be written: {error.strerror or error}"
            if find_checkpoint(self.run.last):
                message += f"; when it can be, {self._go_on()}"
            raise TrainingError(message) from error

    def _fit(self) -> Summary:
        facts = self._facts()
        self.reporter.started(facts)
        with StopRequest() as self.stop:
            try:
                self.step = self._training_step()
                while self.progress.epoch < self.config.epochs:
                    self._train_epoch()
                    self._finish_epoch()
                self._judge_last_epoch()
                summary = self._summary(self._final_test())
            finally:
                self.reporter.stopped()
                self.run.unlock()
            # Half a second, in which a signal would leave a finished run without its card.
            self._draw_curves()
            write_whole(self.run.card_file, model_card(facts, self.info, summary))
            self.reporter.finished(summary)
        return summary

    def _train_epoch(self) -> None:
        progress, config = self.progress, self.config
        with self.step.preparing():
            order = self._order(progress.epoch)
        begin, before = time.monotonic(), progress.seconds
        reported = 0.0

        def take_stock() -> None:
            # Reading the sums waits for the device: the clock comes after.
            progress.loss_sum = self.step.loss_sum.item()
            progress.correct = int(self.step.correct.item())
            progress.seconds = before + time.monotonic() - begin
            if not math.isfinite(progress.loss_sum):
                raise self._diverged(
                    f"the loss is {progress.loss_sum} in epoch {progress.epoch + 1}, step "
                    f"{progress.step}"
                )

        self.model.train()
        self.step.reset(progress.loss_sum, progress.correct)
        for first, end in self.batches[progress.step :]:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(progress.step)
            generator = seed_generators(
                self.runtime.device, config.seed, progress.epoch, progress.step
            )
            with self.step.preparing():
                index = order[first:end]
                inputs = self._inputs(index)
                if config.augment == "crop-flip":
                    inputs = self.runtime.layout(crop_and_flip(inputs, generator))
                labels = self.train_set.labels[index]
            self.step(inputs, labels)
            progress.step += 1
            progress.seen = end
            now = time.monotonic()
            if now - reported > REPORT_SECONDS:
                reported = now
                take_stock()
                self.reporter.step(
                    progress.epoch + 1,
                    progress.step,
                    len(self.batches),
                    progress.loss_sum / progress.seen,
                    progress.correct / progress.seen,
                )
            if self.stop.signal is not None or now - self._saved_at > SAVE_SECONDS:
                take_stock()
                self._require_numbers()
                self._stop_if_asked()
                self._save_last()
        take_stock()

    def _diverged(self, found: str) -> Diverged:
        saved = find_checkpoint(self.run.last) is not None
        return Diverged(
            f"{found}: training diverged; try a smaller --lr than {self.config.lr:g}"
            + (f". {self.run.path} keeps what was saved before" if saved else "")
        )

    def _require_numbers(self) -> None:
        """The loss is that from before a step, which may have made NaN of the weights."""
        weights = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        if not torch.stack([t.isfinite().all() for t in weights]).all():
            raise self._diverged(f"weights are no numbers in epoch {self.progress.epoch + 1}")

    def _order(self, epoch: int) -> Tensor:
        """Indices of all training images, in the order of an epoch, counted from 0."""
        seed = generator_seed(self.config.seed, epoch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.train_set), generator=generator).to(self.runtime.device)

    def _inputs(self, index: Tensor) -> Tensor:
        """The training images at `index`, as the network takes them."""
        return self.runtime.layout(self.info.preprocessing(self.train_set.images[index]))

    def _training_step(self) -> TrainingStep:
        first, end = self.batches[0]
        index = self._order(self.progress.epoch)[first:end]
        inputs = self._inputs(index)
        sizes = {end - first for first, end in self.batches if end - first < len(index)}
        return training_step(
            self.model.train(),
            self.optimizer,
            self.runtime,
            inputs,
            self.train_set.labels[index],
            other_sizes=sizes,
            beside=self._evaluations(inputs),
        )

    def _evaluations(self, inputs: Tensor) -> Iterator[Callable[[], Tensor]]:
        """What an epoch ends with, on batches of the sizes that it has."""
        counts = batch_sizes(len(self.validation_set or self.test_set))
        for size in sorted({n for count in counts for n in (count, self.forward.filled(count))}):
            some = inputs[torch.arange(size, device=inputs.device) % len(inputs)]
            yield partial(self.forward.launched, self.runtime.layout(some))
        if self.config.norm_batches:
            yield partial(self.forward_by_batch.launched, inputs)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        if config.schedule == "constant":
            return config.lr
        done = (self.progress.epoch + step / len(self.batches)) / config.epochs
        if config.schedule == "step":
            return config.lr * 0.1 ** sum(done >= share for share in (0.5, 0.75))
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))

    def _finish_epoch(self) -> None:
        progress, config, begin = self.progress, self.config, time.monotonic()
        self._require_numbers()
        row = EpochMetrics(
            epoch=progress.epoch + 1,
            lr=self._learning_rate(len(self.batches) - 1),
            train_loss=progress.loss_sum / progress.seen,
            train_accuracy=progress.correct / progress.seen,
            validation_loss=None,
            validation_accuracy=None,
            test_loss=None,
            test_accuracy=None,
            examples_per_s=progress.seen / progress.seconds,
            epoch_s=progress.seconds,
        )
        over = row.epoch == config.epochs
        if over or row.epoch % config.evaluate_every == 0:
            row = self._judged(row)
        row = dataclasses.replace(row, epoch_s=row.epoch_s + time.monotonic() - begin)
        progress.epoch += 1
        progress.step = progress.seen = progress.correct = 0
        progress.loss_sum = progress.seconds = 0.0
        improved = progress.best_epoch == progress.epoch
        self.run.append(row)
        if improved:
            self._save(self.run.best)
        if over or improved or time.monotonic() - self._saved_at > SAVE_EPOCH_SECONDS:
            self._save_last()
        if time.monotonic() - self._drawn_at > DRAW_SECONDS:
            self._draw_curves()
        self.reporter.epoch(row)
        if not over:
            self._stop_if_asked()

    def _judged(self, row: EpochMetrics) -> EpochMetrics:
        """The row with how good the weights now are on what is held out."""
        if self.config.norm_batches:
            epoch = row.epoch - 1
            # Dropout draws here too: after a resume the same as without one.
            seed_generators(self.runtime.device, self.config.seed, epoch, len(self.batches))
            order, bounds = self._order(epoch), self.batches[: self.config.norm_batches]
            inputs = (self._inputs(order[first:end]) for first, end in bounds)
            average_norm_statistics(self.forward_by_batch, inputs)
        held_out = self._score(self.forward, self.validation_set or self.test_set)
        if not math.isfinite(held_out.loss):
            raise self._diverged(
                f"the loss on held-out images is {held_out.loss} in epoch {row.epoch}"
            )
        if self.validation_set is None:
            return dataclasses.replace(
                row, test_loss=held_out.loss, test_accuracy=held_out.accuracy
            )
        # Small splits give many epochs the same accuracy: the surer one of them is better.
        progress = self.progress
        best = progress.best_accuracy, -progress.best_loss
        if (held_out.accuracy, -held_out.loss) > best:
            progress.best_epoch = row.epoch
            progress.best_accuracy, progress.best_loss = held_out.accuracy, held_out.loss
        return dataclasses.replace(
            row, validation_loss=held_out.loss, validation_accuracy=held_out.accuracy
        )

    def _judge_last_epoch(self) -> None:
        """For a run that went on to fewer epochs than it had been begun with."""
        last = self.run.rows()[-1]
        if last.validation_loss is not None or last.test_loss is not None:
            return
        row = self._judged(last)
        self.run.replace_last(row)
        if self.progress.best_epoch == row.epoch:
            self._save(self.run.best)
        self._save_last()
        self.reporter.epoch(row)

    def _final_test(self) -> Score:
        if self.validation_set is None:
            last = self.run.rows()[-1]
            assert last.test_loss is not None
            assert last.test_accuracy is not None
            return Score(last.test_loss, last.test_accuracy)
        best, _ = load_model(self.run.best)
        self.runtime.place(best)
        return self._score(Forward(best, self.runtime), self.test_set)

    def _score(self, forward: Forward, data: ImageSet) -> Score:
        return score_of(forward, data, self.info.preprocessing, self._stop_if_asked)

    def _draw_curves(self) -> None:
        if rows := self.run.rows():
            title = f"{self.config.model} on {self.config.data}"
            draw_curves(rows, self.run.curves_file, title)
        self._drawn_at = time.monotonic()

    def _save(self, folder: Path) -> None:
        self.progress.total_s = self._spent_before + time.monotonic() - self._began
        save_checkpoint(folder, self.model, self.info, self.optimizer, self.progress)

    def _save_last(self) -> None:
        self._save(self.run.last)
        self._saved_at = time.monotonic()

    def _stop_if_asked(self) -> None:
        if self.stop.signal is not None:
            self._save_last()
            self._draw_curves()
            raise Stopped(f"stopped and saved; {self._go_on()}", self.stop.exit_code)

    def _go_on(self) -> str:
        return f"go on with: densely train --resume {shlex.quote(str(self.run.path))}"

    def _facts(self) -> RunFacts:
        return RunFacts(
            run=self.run.path,
            config=self.config,
            parameters=sum(p.numel() for p in self.model.parameters()),
            train_images=len(self.train_set),
            validation_images=len(self.validation_set) if self.validation_set else 0,
            test_images=len(self.test_set),
            image_size=self.info.preprocessing.image_size,
            device=f"{self.runtime.device} ({device_name(self.runtime.device)})",
            precision=self.runtime.precision,
            memory_format=self.runtime.memory_format,
            first_epoch=self.progress.epoch,
        )

    def _summary(self, test: Score) -> Summary:
        seconds = self._spent_before + time.monotonic() - self._began
        return Summary(
            run=self.run.path,
            epochs=self.progress.epoch,
            best_epoch=self.progress.best_epoch or self.progress.epoch,
            test=test,
            seconds=seconds,
            examples_per_s=len(self.train_set) * self.progress.epoch / seconds,
            curves=self.run.curves_file,
        )
