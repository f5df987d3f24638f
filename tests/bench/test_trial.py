"""A step is what it is called, and what computes nonsense gets no time."""

import pytest
import torch
from tiny_nets import NET, RUNTIME, mlp

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
