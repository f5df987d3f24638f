"""A step is what it is called, and what computes nonsense gets no time."""

import pytest
import torch
from tiny_nets import NET, RUNTIME, mlp

from densely.bench import trial as module
from densely.bench.trial import make_trial
from densely.bench.variants import Variant
from densely.errors import TrainingError


@pytest.mark.parametrize(("mode", "learns"), [("train", True), ("inference", False)])
def test_a_training_step_learns_and_inference_does_not(mode: str, learns: bool) -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, mode, 4)
    before = [p.clone() for p in trial.model.parameters()]
    assert trial.images_per_s(2) > 0
    pairs = zip(before, trial.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) is not learns
    assert trial.model.training is learns
    assert all(p.grad is None for p in trial.model.parameters())


def test_nonsense_is_not_timed() -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "inference", 2)
    trial.images.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        trial.warm_up()


def test_a_step_that_cannot_be_captured_is_not_timed_as_if_it_were() -> None:
    trial = make_trial(Variant("", mlp, RUNTIME, captured=True), NET, "train", 2)
    with pytest.raises(TrainingError, match="CUDA graph"):
        trial.warm_up()


def test_a_captured_step_is_recorded_once_and_then_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    monkeypatch.setattr(module, "record_graph", lambda work, device: (Graph(), work()))
    trial = make_trial(Variant("", mlp, RUNTIME, captured=True), NET, "inference", 2)
    trial.warm_up()
    assert trial.images_per_s(3) > 0
    assert len(replays) == module.WARM_UP + 3
