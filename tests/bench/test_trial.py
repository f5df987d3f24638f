"""A step is what it is called, and what computes nonsense gets no time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_nets import NET, RUNTIME, mlp

from densely.bench import trial as module
from densely.bench.trial import make_trial
from densely.bench.variants import Variant
from densely.errors import TrainingError

CHANNELS_LAST = replace(RUNTIME, memory_format="channels_last")


@pytest.mark.parametrize(("mode", "learns"), [("train", True), ("inference", False)])
def test_a_training_step_learns_and_inference_does_not(mode: str, learns: bool) -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, mode, 4)
    before = [p.clone() for p in trial.model.parameters()]
    assert trial.images_per_s(2) > 0
    pairs = zip(before, trial.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) is not learns
    assert trial.model.training is learns
    assert all(p.grad is None for p in trial.model.parameters())


def test_the_rate_counts_the_images_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "inference", 4)
    times = iter([10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert trial.images_per_s(3) == 4 * 3 / 2


def test_a_turn_begins_with_a_step_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the caches and the allocator as the variant before has left them."""
    log: list[str] = []
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "inference", 4)
    monkeypatch.setattr(trial, "step", lambda: log.append("step"))
    monkeypatch.setattr("time.perf_counter", lambda: log.append("clock") or float(len(log)))
    trial.images_per_s(2)
    assert log == ["step", "clock", "step", "step", "clock"]


def test_each_step_has_gradients_of_its_own() -> None:
    trial = make_trial(Variant("", mlp, RUNTIME), NET, "train", 4)
    assert trial.optimizer is not None
    trial.optimizer.param_groups[0]["lr"] = 0.0  # so that the second step is the first again
    found = []
    for _ in range(2):
        trial.step()
        found.append([p.grad.clone() for p in trial.model.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    ("variant", "tried"),
    [
        (Variant("", mlp, RUNTIME), False),
        (Variant("", mlp, CHANNELS_LAST), True),
        (Variant("", mlp, RUNTIME, "ours"), True),
        (Variant("", mlp, RUNTIME, "accelerated"), False),
        (Variant("", mlp, CHANNELS_LAST, "accelerated"), True),
    ],
)
def test_cudnn_tries_its_kernels_for_what_is_tuned_alone(
    variant: Variant, tried: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tried)
    trial = make_trial(variant, NET, mode, 2)
    seen = set()
    trial.model.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.benchmark))
    trial.warm_up()
    trial.images_per_s(1)
    assert seen == {tried}
    assert torch.backends.cudnn.benchmark is not tried


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
    assert len(replays) == module.WARM_UP + 1 + 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_a_step_is_in_the_precision_of_its_runtime(mode: str, precision: Any) -> None:
    trial = make_trial(Variant("", mlp, replace(RUNTIME, precision=precision)), NET, mode, 2)
    dtypes = set()
    trial.model.register_forward_hook(lambda _module, _args, out: dtypes.add(out.dtype))
    trial.step()
    assert dtypes == {getattr(torch, precision)}


def test_all_trials_of_a_net_begin_with_the_same_weights_images_and_labels() -> None:
    first, second = (make_trial(Variant("", mlp, RUNTIME), NET, "train", 4) for _ in range(2))
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(second.images, first.images)
    assert torch.equal(second.labels, first.labels)
