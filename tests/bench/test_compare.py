"""The comparison: turns, ratios, and gaps."""

import weakref
from typing import Any

import pytest
import torch
from tiny_nets import NET, RUNTIME, entrants, failing, mlp
from torch import nn

from densely.bench import compare as module
from densely.bench.config import BenchConfig
from densely.bench.peak import ChildTask
from densely.bench.progress import Progress
from densely.bench.results import Comparison, Measured
from densely.bench.trial import Trial
from densely.bench.variants import Variant

CONFIG = BenchConfig(rounds=3, steps=1, peak_memory=False)


def measure(
    monkeypatch: pytest.MonkeyPatch, log: list[str], mode: str, *more: Variant
) -> Comparison:
    monkeypatch.setattr(module, "variants", lambda *_: [*entrants(log), *more])
    return module.compare(CONFIG, NET, mode, Progress())


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_each_has_a_turn_before_any_has_the_next(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    log: list[str] = []
    found = measure(monkeypatch, log, mode)
    turns = [*2 * ["densely"], *2 * ["plain net"]]  # each with a step that is not timed
    assert log[-12:] == 3 * turns
    assert [len(row.images_per_s) for row in found.rows] == [3, 3, 0, 0]
    assert found.batch == 3
    kept = [row.kept_bytes_per_image for row in found.rows[:2]]
    assert kept == ([4 * (5 + 10) + 1] * 2 if mode == "train" else [None, None])


def test_the_peak_is_of_as_many_threads_as_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[ChildTask] = []
    monkeypatch.setattr(module, "variants", lambda *_: entrants([]))
    monkeypatch.setattr(module, "peak_in_fresh_process", lambda task: tasks.append(task) or 7)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    config = BenchConfig(rounds=1, steps=1, peak_memory=True)
    found = module.compare(config, NET, "train", Progress())
    assert [(task.variant, task.threads) for task in tasks] == [("densely", 3), ("plain net", 3)]
    assert [row.peak_bytes for row in found.rows] == [7, 7, None, None]


@pytest.mark.parametrize("allocator", ["system", "keep"])
def test_the_batch_and_the_allocator_that_are_asked_for_are_measured(
    monkeypatch: pytest.MonkeyPatch, allocator: Any
) -> None:
    sizes: set[int] = set()
    tasks: list[ChildTask] = []

    def net() -> nn.Module:
        model = mlp()
        model.register_forward_pre_hook(lambda _module, args: sizes.add(len(args[0])))
        return model

    monkeypatch.setattr(module, "variants", lambda *_: [Variant("plain net", net, RUNTIME)])
    monkeypatch.setattr(module, "peak_in_fresh_process", lambda task: tasks.append(task) or 7)
    config = BenchConfig(batch=2, rounds=1, steps=1, device="cpu", allocator=allocator)
    assert module.compare(config, NET, "train", Progress()).batch == 2
    assert sizes == {2}
    assert [(task.batch, task.allocator) for task in tasks] == [(2, allocator)]


def test_a_gap_has_no_figures_that_were_taken_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "kept_bytes", fails)
    for row in measure(monkeypatch, [], "train").rows[:2]:
        assert row.gap == "OutOfMemoryError: no room"
        assert row.parameters is row.kept_bytes_per_image is row.peak_bytes is None
        assert row.images_per_s == []


def test_what_cannot_be_measured_is_a_gap_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Variant("MONAI", failing(ValueError("no such\nthing")), RUNTIME)
    found = measure(monkeypatch, [], "train", broken)
    gaps = {row.name: row.gap for row in found.rows if row.gap}
    assert gaps == {
        "timm": "not installed: timm",
        "compiled": "left out",
        "MONAI": "ValueError: no such",
    }


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_a_failure_of_densely_is_no_gap(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    broken = Variant("x", failing(ValueError("ours")), RUNTIME, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ours"):
        measure(monkeypatch, [], "train", broken)


def test_a_peer_that_fails_in_its_turn_is_a_gap_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of its three; what it held is let go."""
    timed, turns, failed = Trial.images_per_s, [], []

    def fails(self: Trial, steps: int) -> float:
        turns.append(steps)
        if len(turns) == 4:  # of densely and the plain net in turn
            failed.append(weakref.ref(self))
            raise RuntimeError("no more memory for it")
        assert not any(trial() for trial in failed)
        return timed(self, steps)

    monkeypatch.setattr(Trial, "images_per_s", fails)
    ours, plain, *_ = measure(monkeypatch, [], "train").rows
    assert (plain.gap, plain.images_per_s) == ("RuntimeError: no more memory for it", [])
    assert (ours.gap, len(ours.images_per_s)) == (None, 3)
    assert len(turns) == 5


def test_what_is_timed_is_handed_on_before_peaks_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "variants", lambda *_: entrants([]))
    monkeypatch.setattr(module, "peak_in_fresh_process", interrupted)
    kept: list[Comparison] = []
    with pytest.raises(KeyboardInterrupt):
        module.compare(BenchConfig(rounds=1, steps=1), NET, "train", Progress(), kept.append)
    assert len(kept[0].rows[0].images_per_s) == 1


def test_ratios_are_taken_round_by_round_and_then_their_median() -> None:
    def row(name: str, *rates: float) -> Measured:
        return Measured(name, "peer", "float32", "contiguous", images_per_s=list(rates))

    # The machine slows down: the ratio of the medians, 4 / 2, would tell another story.
    ours, base = row("densely", 8, 4, 3), row("plain net", 2, 4, 1)
    found = Comparison("d2l", "train", 1, (1, 4, 4), 1, "plain net", [ours, base])
    assert found.ratios(ours) == [4, 1, 3]
    assert found.ratio(ours) == 3
    assert found.to_dict()["variants"]["densely"]["ratio"] == 3


def test_without_its_reference_a_comparison_has_no_ratios() -> None:
    ours = Measured("densely", "ours", "float32", "contiguous", images_per_s=[8.0])
    base = Measured("plain net", "peer", "float32", "contiguous", gap="not here")
    found = Comparison("d2l", "train", 1, (1, 4, 4), 1, "plain net", [ours, base])
    assert found.ratio(ours) is None
    assert found.to_dict()["variants"]["densely"]["ratio"] is None
