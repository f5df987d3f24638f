"""Accelerated nets against what they were before: outputs, gradients, statistics, training."""

import copy
from collections.abc import Callable
from typing import Any

import foreign
import pytest
import torch
from on_gpu import DEVICES, exact_convolutions
from torch import Tensor, nn

from densely.fused import accelerate


def assert_all_ran(model: nn.Module, times: int) -> None:
    """Every unit ran densely's step that often, and never its own forward."""
    report = accelerate(model)
    names = [name for some in report.replaced.values() for name in some]
    calls = report.calls()
    assert len(report.replaced) == 4
    assert sorted(calls) == sorted(names)
    for name in names:
        assert (calls[name].densely, calls[name].plain) == (times, 0), name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", foreign.CASES.values(), ids=foreign.CASES)
def test_equal_in_float64(case: foreign.Case, train: bool) -> None:
    original, accelerated = foreign.pair(case.make())
    x = foreign.images(case.shape)
    for _ in range(2):  # the second step starts from statistics that the first one left
        foreign.assert_same(
            foreign.step(accelerated, x, train=train), foreign.step(original, x, train=train)
        )
    assert_all_ran(accelerated, times=2)


CHANNELS_LAST = {
    3: torch.preserve_format,
    4: torch.channels_last,
    5: torch.channels_last_3d,
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", foreign.CASES.values(), ids=foreign.CASES)
def test_equal_masks_of_dropout_under_the_same_seed(
    case: foreign.Case, channels_last: bool
) -> None:
    layout = CHANNELS_LAST[len(case.shape)] if channels_last else torch.preserve_format
    original, accelerated = (net.to(memory_format=layout) for net in foreign.pair(case.make(0.3)))
    x = foreign.images(case.shape).to(memory_format=layout)
    kept, whole = (foreign.step(original, x, train=train) for train in (True, False))
    foreign.assert_same(foreign.step(accelerated, x, train=True), kept)
    foreign.assert_same(foreign.step(accelerated, x, train=False), whole)
    assert_all_ran(accelerated, times=2)
    assert not torch.equal(kept.output, whole.output)


def distances(
    case: foreign.Case,
    models: tuple[nn.Module, nn.Module],
    dtype: torch.dtype,
    train: bool,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """How far outputs, gradients and statistics of each model are from float64 (on the CPU).

    Relative, all values together, and summed over batches: a single one says little, as which
    ReLUs flip is chance.
    """
    found: dict[str, list[float]] = {"output": [0, 0], "grads": [0, 0], "buffers": [0, 0]}
    exact_model = foreign.shuffle(case.make())
    exact_model.load_state_dict(models[0].state_dict())
    start = copy.deepcopy(exact_model.state_dict())
    for seed in (1, 4, 5):  # no value is within 6 roundings of float32 of a ReLU's zero
        x = foreign.images(case.shape, seed)
        exact_model.load_state_dict(start)
        with torch.autocast("cpu", enabled=False):
            exact = foreign.step(exact_model, x, train=train)
        for i, model in enumerate(models):
            model.to(device, dtype).load_state_dict(start)
            got = foreign.step(model, x.to(device, dtype), train=train)
            for part, far in found.items():
                a, b = (_all_values(getattr(r, part)) for r in (got, exact))
                far[i] += float((a - b).norm() / b.norm())
    return found


def _all_values(tensors: Tensor | dict[str, Tensor]) -> Tensor:
    some = tensors.values() if isinstance(tensors, dict) else [tensors]
    return torch.cat([t.double().flatten().cpu() for t in some])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI 1D", "MONAI 3D"])
@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_as_near_to_float64_as_before(device: str, name: str, train: bool) -> None:
    case = foreign.CASES[name]
    models = foreign.pair(case.make())
    with exact_convolutions():
        found = distances(case, models, torch.float32, train, device)
    # So few values of so few layers differ by chance, by some 1e-7: more than any on one device.
    slack = 1e-7 if device == "cpu" else 1e-6
    for part, (before, now) in found.items():
        assert now <= 1.5 * before + slack, part
    assert_all_ran(models[1], times=3)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["torchvision", "MONAI 1D"])
def test_bfloat16_weights_take_the_same_path(name: str, train: bool) -> None:
    models = foreign.pair(foreign.CASES[name].make())
    for part, (before, now) in distances(
        foreign.CASES[name], models, torch.bfloat16, train
    ).items():
        assert now <= 1.5 * before + 1e-7, part
    assert_all_ran(models[1], times=3)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["torchvision", "MONAI 1D"])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_the_same_path(device: str, name: str, train: bool) -> None:
    models = foreign.pair(foreign.CASES[name].make())
    with torch.autocast(device, torch.bfloat16):
        found = distances(foreign.CASES[name], models, torch.float32, train, device)
        x = foreign.images(foreign.CASES[name].shape).to(device, torch.float32)
        outputs = [model(x) for model in models]
    for part, (before, now) in found.items():
        assert now <= 1.5 * before + 1e-7, part
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert_all_ran(models[1], times=4)


def batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def cumulative(norms: list[Any]) -> None:
    for norm in norms:
        norm.momentum = None


def untracked(norms: list[Any]) -> None:
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def untracked_with_statistics(norms: list[Any]) -> None:
    for norm in norms:
        norm.track_running_stats = False


def other_settings(norms: list[Any]) -> None:
    for i, norm in enumerate(norms):
        norm.eps, norm.momentum = 0.01 + 0.1 * i, 0.01 * (i + 1)


def without_affine(norms: list[Any]) -> None:
    for norm in norms:
        norm.affine, norm.weight, norm.bias = False, None, None


def frozen_in_part(norms: list[Any]) -> None:
    for norm in norms[::2]:
        norm.eval()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI 1D"])
@pytest.mark.parametrize(
    "change",
    [
        cumulative,
        untracked,
        untracked_with_statistics,
        other_settings,
        without_affine,
        frozen_in_part,
    ],
)
def test_norms_work_as_in_torch(
    change: Callable[[list[Any]], None], name: str, train: bool
) -> None:
    case = foreign.CASES[name]
    original, accelerated = foreign.pair(case.make())
    x = foreign.images(case.shape)
    for model in (original, accelerated):
        model.train(train)
        change(batch_norms(model))
    for _ in range(2):
        foreign.assert_same(
            foreign.step(accelerated, x, train=None), foreign.step(original, x, train=None)
        )
    assert_all_ran(accelerated, times=2)


def test_nothing_of_the_model_changes_but_its_forward() -> None:
    net = foreign.shuffle(foreign.torchvision())
    names = [name for name, _ in net.named_modules()]
    state = net.state_dict()
    parameters = list(net.parameters())
    accelerate(net)
    assert [name for name, _ in net.named_modules()] == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(state)
    for name, tensor in net.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr(), name
    assert type(net) is not type(foreign.torchvision())
    assert isinstance(net, type(foreign.torchvision()))


def test_an_optimizer_made_before_trains_on() -> None:
    original, accelerated = foreign.shuffle(foreign.timm(0.2)), foreign.shuffle(foreign.timm(0.2))
    accelerated.load_state_dict(original.state_dict())
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (original, accelerated)
    ]
    accelerate(accelerated)
    for i in range(3):
        x = foreign.images((4, 3, 64, 48), seed=i)
        for model, optimizer in zip((original, accelerated), optimizers, strict=True):
            foreign.step(model, x)
            optimizer.step()
    found = accelerated.state_dict()
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10)
