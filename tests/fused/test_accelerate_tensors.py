"""Tensors of other classes, modes, and what may be done with a step's output."""

import warnings
from typing import Any

import foreign
import peers
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densely.fused import report
from densely.fused.block_statistics import moments_of

SHAPE = (2, 3, 64, 32)
#: The children of features that a step replaces, or part of one; the norm at the end is the net's.
PARTS = [f"denseblock{i}" for i in range(1, 5)] + [f"transition{i}" for i in range(1, 4)]


class Annotated(Tensor):
    """Carries its class through PyTorch's functions, and looks at none."""


class Watching(Tensor):
    """Sees each function that is called with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Intercepting(Tensor):
    """Sees each operator that runs on it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def pair() -> tuple[nn.Module, nn.Module]:
    return foreign.pair(foreign.torchvision())


def calls(net: nn.Module) -> set[tuple[int, int]]:
    return {(found.densely, found.plain) for found in report(net).calls().values()}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_tensors_that_carry_their_class_run_fused(train: bool) -> None:
    original, net = pair()
    x = foreign.images(SHAPE).as_subclass(Annotated)
    wanted, got = (foreign.step(some, x, train=train) for some in (original, net))
    assert type(got.output) is type(wanted.output) is Annotated
    foreign.assert_same(got, wanted)
    assert calls(net) == {(1, 0)}


def test_hooks_see_tensors_of_the_class_and_blocks_leave_their_statistics() -> None:
    _, net = pair()
    seen: dict[str, Tensor] = {}
    for name in PARTS:
        net.features.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out})
        )
    net.train()(foreign.images(SHAPE).as_subclass(Annotated))
    assert {type(out) for out in seen.values()} == {Annotated}
    left = {name for name, out in seen.items() if moments_of(out) is not None}
    assert left == {name for name in PARTS if name.startswith("denseblock")}


@pytest.mark.parametrize("name", ["MONAI 2D", "MONAI 3D"])
def test_monais_tensors_run_fused_and_keep_what_they_know(name: str) -> None:
    peers.monai_networks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.data.meta_tensor import MetaTensor
    case = foreign.CASES[name]
    original, net = foreign.pair(case.make())
    x = MetaTensor(foreign.images(case.shape), meta={"filename_or_obj": "lung.nii"})
    results = []
    for some in (original, net):
        maps: list[Any] = []
        hook = some.features.transition1.register_forward_hook(
            lambda _, args, out, maps=maps: maps.append(out)
        )
        some.train().zero_grad()
        output = some(x)
        hook.remove()
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        grads = {name: parameter.grad for name, parameter in some.named_parameters()}
        for found in (output, *maps):
            assert type(found) is MetaTensor
            assert found.meta["filename_or_obj"] == "lung.nii"
        results.append(
            foreign.Result(output.detach().as_tensor(), grads, dict(some.named_buffers()))
        )
    foreign.assert_same(results[1], results[0])
    assert calls(net) == {(1, 0)}


@pytest.mark.parametrize("cls", [Watching, Intercepting])
def test_classes_that_see_each_operation_take_the_original_way(cls: type[Tensor]) -> None:
    original, net = pair()
    x = foreign.images(SHAPE).as_subclass(cls)
    wanted, got = original.eval()(x), net.eval()(x)
    assert type(got) is type(wanted)
    assert_close(got, wanted)
    assert report(net).calls()[""].reasons == {f"reads a {cls.__name__}": 1}


def test_modes_that_see_each_operation_take_the_original_way() -> None:
    class Log(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    original, net = pair()
    logs = []
    for some in (original, net):
        with Log() as log:
            some.eval()(foreign.images(SHAPE))
        logs.append([name for name in log.seen if name in ("conv2d", "batch_norm", "relu")])
    assert logs[0] == logs[1]
    assert len(logs[0]) > 50
    assert report(net).calls()[""].reasons == {"runs under a Log": 1}


def test_a_default_device_is_no_obstacle() -> None:
    _, net = pair()
    x = foreign.images(SHAPE)
    with torch.device("cpu"):
        net(x)
    torch.set_default_device("cpu")
    try:
        net(x)
    finally:
        torch.set_default_device(None)
    assert calls(net) == {(2, 0)}


def test_the_images_may_be_given_by_name() -> None:
    original, net = pair()
    x = foreign.images(SHAPE)
    assert_close(net.eval()(x=x), original.eval()(x=x))
    assert calls(net) == {(1, 0)}
    block, found = net.features.denseblock1, foreign.images((2, 16, 8, 8))
    assert_close(block(init_features=found), original.features.denseblock1(found))
    assert calls(block) == {(2, 0)}
    with pytest.raises(TypeError, match="unexpected keyword"):
        net(images=x)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_transition_gives_may_be_changed_in_place(grad: bool) -> None:
    found = []
    for net in pair():
        step = net.features.transition1
        x = foreign.images((2, step.norm.num_features, 8, 8)).requires_grad_()
        with torch.set_grad_enabled(grad):
            y = step(x)
        y.mul_(3)
        found.append(y.detach())
        if grad:
            (y**2).sum().backward()
            found.append(x.grad)
    for got, wanted in zip(found[len(found) // 2 :], found[: len(found) // 2], strict=True):
        assert_close(got, wanted)


def test_what_a_block_gives_without_gradients_may_be_changed_in_place() -> None:
    found = []
    for net in pair():
        features = net.train().features
        with torch.no_grad():
            y = features.denseblock1(foreign.images((2, features.norm0.num_features, 8, 8)))
        y.relu_()
        found.append(features.transition1(y))
    assert_close(found[1], found[0])


def test_changing_a_blocks_output_in_place_is_an_error_where_backward_needs_it() -> None:
    _, net = pair()
    features = net.features
    y = features.denseblock1(foreign.images((2, features.norm0.num_features, 8, 8)))
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_statistics_of_an_eval_pass_are_those_of_its_time() -> None:
    """Though a pass in train mode has changed them before the backward that both share."""
    original, net = pair()
    x, other = foreign.images(SHAPE), foreign.images(SHAPE, seed=2)
    loss = net.eval()(x).square().sum() + net.train()(other).square().sum()
    loss.backward()
    original.eval()(x).square().sum().backward()
    original.train()(other).square().sum().backward()
    for (name, got), wanted in zip(net.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for got, wanted in zip(net.buffers(), original.buffers(), strict=True):
        assert_close(got, wanted)
    assert calls(net) == {(2, 0)}
