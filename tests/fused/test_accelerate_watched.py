"""Who watches an inner module sees what was there before; that unit alone runs its own forward."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import foreign
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from densely.fused import accelerate, report
from densely.fused.accelerated import original_class

MAKERS = {
    "torchvision": foreign.torchvision,
    "timm": foreign.timm,
    "MONAI 2D": foreign.CASES["MONAI 2D"].make,
}
SHAPE = (2, 3, 64, 32)


def pair(name: str = "torchvision", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    return foreign.pair(MAKERS[name](**kwargs))


def unit_of(net: nn.Module, name: str) -> str | None:
    """Name of the unit that takes the tensors of an inner module, and so would not call it."""
    units = report(net).calls()
    if name in ("features", "features.norm5") or name.startswith("features.norm5."):
        return ""
    if name.startswith(("class_layers", "global_pool")) and name != "class_layers.out":
        return ""
    if name.split(".")[:2][-1] in ("norm0", "relu0", "pool0"):
        return "features"
    outer = [u for u in units if u and u != "features" and name.startswith(f"{u}.")]
    return outer[0] if outer else None


def assert_only_this_is_plain(net: nn.Module, unit: str | None, reason: str = "hooks") -> None:
    for name, calls in report(net).calls().items():
        if name == unit:
            assert (calls.densely, calls.plain) == (0, 1), name
            assert reason in next(iter(calls.reasons))
        else:
            assert (calls.densely, calls.plain) == (1, 0), name


def inner_names(net: nn.Module) -> list[str]:
    """All inner modules that are called, of the first block and transition only."""
    middle = [f"{kind}{i}" for kind in ("denseblock", "transition") for i in (2, 3, 4)]
    return [n for n, _ in net.named_modules() if n and not any(part in n for part in middle)]


@pytest.mark.parametrize("maker", MAKERS)
def test_forward_hooks_on_any_inner_module_see_the_same(maker: str) -> None:
    original, fresh = pair(maker)
    x = foreign.images(SHAPE)
    units = set()
    for name in inner_names(original):
        seen: list[list[Tensor]] = []
        accelerated = copy.deepcopy(fresh).eval()
        outputs = []
        for net in (original.eval(), accelerated):
            tensors: list[Tensor] = []

            def hook(_: nn.Module, args: Any, output: Tensor, into: list[Tensor] = tensors) -> None:
                given = args[0] if isinstance(args[0], list) else [args[0]]
                into += [t.detach().clone() for t in (*given, output)]

            handle = net.get_submodule(name).register_forward_hook(hook)
            with torch.no_grad():
                outputs.append(net(x))
            handle.remove()
            seen.append(tensors)
        assert len(seen[0]) == len(seen[1]) >= 2, name
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
        assert_only_this_is_plain(accelerated, unit_of(accelerated, name))
        units.add(unit_of(accelerated, name))
    assert units > {"", "features", "features.denseblock1", "features.transition1"}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # dense layers take lists
@pytest.mark.parametrize("maker", MAKERS)
def test_full_backward_hooks_on_any_inner_module_see_the_same(maker: str) -> None:
    original, fresh = pair(maker)
    for net in (original, fresh):  # torch forbids backward hooks on what is changed in place
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    x = foreign.images(SHAPE)
    for name in inner_names(original):
        seen: list[list[Tensor]] = []
        accelerated = copy.deepcopy(fresh)
        results: list[Any] = []
        for net in (copy.deepcopy(original), accelerated):
            tensors: list[Tensor] = []

            def hook(_: nn.Module, grads: Any, out: Any, into: list[Tensor] = tensors) -> None:
                into += [t.clone() for t in (*grads, *out) if t is not None]

            net.get_submodule(name).register_full_backward_hook(hook)
            try:
                results.append(foreign.step(net, x))
            except RuntimeError as error:  # torchvision's last ReLU is in place, in its forward
                results.append(str(error).splitlines()[0])
            seen.append(tensors)
        if isinstance(results[0], str):
            assert results[0] == results[1]
            assert name in ("features", "features.norm5")
            continue
        foreign.assert_same(results[1], results[0])
        assert len(seen[0]) == len(seen[1]) > 0, name
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
        assert_only_this_is_plain(accelerated, unit_of(accelerated, name))


@pytest.mark.parametrize("name", ["features.denseblock2.denselayer1.conv1", "features.norm5"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward_pre"])
def test_hooks_that_change_something_change_it(name: str, kind: str) -> None:
    def forward(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 0.5

    def before(_: nn.Module, grads: Any) -> Any:
        return (grads[0] * 0.5,)

    original, accelerated = pair()
    plain = foreign.step(copy.deepcopy(original), foreign.images(SHAPE))
    results = []
    if kind == "full_backward_pre":
        name = name.replace("norm5", "denseblock2.denselayer1.conv2")
    for net in (original, accelerated):
        register = getattr(net.get_submodule(name), f"register_{kind}_hook")
        register(forward if kind == "forward" else before)
        results.append(foreign.step(net, foreign.images(SHAPE)))
    foreign.assert_same(results[1], results[0])
    key = next(iter(plain.grads))
    assert not torch.equal(results[1].grads[key], plain.grads[key])
    assert_only_this_is_plain(accelerated, unit_of(accelerated, name))


def test_a_hook_that_changes_a_blocks_output_in_place_changes_what_follows() -> None:
    original, accelerated = pair()
    outputs = []
    for net in (original, accelerated):
        net.features.denseblock1.register_forward_hook(lambda _, args, out: out.mul_(3).add_(1))
        with torch.no_grad():
            outputs.append(net(foreign.images(SHAPE)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    assert_only_this_is_plain(accelerated, None)


def test_densely_runs_again_when_the_hook_has_gone() -> None:
    net = foreign.torchvision()
    handle = net.features.denseblock1.denselayer1.relu1.register_forward_hook(lambda *_: None)
    assert accelerate(net).left_alone == {}  # hooks do not stand in the way for good
    net(torch.randn(1, 3, 64, 64))
    handle.remove()
    net(torch.randn(1, 3, 64, 64))
    calls = report(net).calls()["features.denseblock1"]
    assert (calls.densely, calls.reasons) == (1, {"denselayer1.relu1 has hooks": 1})


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules(kind: str) -> None:
    original, accelerated = pair("MONAI 2D")
    names: list[list[str]] = [[], []]
    for into, net in zip(names, (original, accelerated), strict=True):
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        known = {module: name for name, module in net.named_modules()}
        handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(
            lambda module, *_, known=known, into=into: into.append(known[module])
        )
        try:
            net(foreign.images(SHAPE)).sum().backward()
        finally:
            handle.remove()
    assert names[0] == names[1]
    assert len(names[0]) > 30
    reasons = {tuple(n.reasons) for n in report(accelerated).calls().values()}
    assert reasons == {("runs under hooks on all modules",)}


def grad_cam(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The heat map as libraries make it, before its ReLU: from a layer's output and gradient."""
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        kept["maps"] = output
        output.register_hook(lambda grad: kept.update(grad=grad))

    handle = net.get_submodule(layer).register_forward_hook(keep)
    net.eval()(x)[:, 1].sum().backward()
    handle.remove()
    weights = kept["grad"].mean(dim=(2, 3), keepdim=True)
    return (weights * kept["maps"]).sum(1).detach()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "layer",
    ["features", "features.norm5", "features.denseblock2", "features.denseblock2.denselayer2"],
)
def test_grad_cam_draws_the_same_heat_map(maker: str, layer: str) -> None:
    original, accelerated = pair(maker)
    if maker == "MONAI 2D" and layer.endswith("denselayer2"):
        layer += ".layers.conv2"
    x = foreign.images((2, 3, 96, 96))
    wanted = grad_cam(original, layer, x)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(grad_cam(accelerated, layer, x), wanted, rtol=1e-9, atol=1e-10)
    assert_only_this_is_plain(accelerated, unit_of(accelerated, layer))


def test_the_grad_cam_package_draws_the_same_heat_map() -> None:
    original, accelerated = pair()  # before the import below: it needs torchvision
    package = pytest.importorskip("pytorch_grad_cam", reason="the package grad-cam is missing")
    x = foreign.images((1, 3, 96, 96)).float()
    maps = []
    for net in (original.float(), accelerated.float()):
        with package.GradCAM(model=net, target_layers=[net.features[-1]]) as cam:
            maps.append(torch.as_tensor(cam(input_tensor=x, targets=None)))
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-4)


def replaced_forward(net: nn.Module) -> None:
    conv = net.features.denseblock1.denselayer1.conv1
    own = conv.forward
    conv.forward = lambda x: 2 * own(x)


def replaced_method(net: nn.Module) -> None:
    layer = net.features.denseblock1.denselayer1
    own = layer.bn_function
    layer.bn_function = lambda xs: 2 * own(xs)


def parametrized(net: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(net.features.denseblock1.denselayer1.conv1)
    net.features.denseblock1.denselayer1.conv1.parametrizations.weight.original0.data *= 2


def pruned(net: nn.Module) -> None:
    prune.l1_unstructured(net.features.denseblock1.denselayer1.conv1, "weight", 0.5)


def synchronized(net: nn.Module) -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(net.features.denseblock1)
    assert block is net.features.denseblock1


def shared_norm(net: nn.Module) -> None:
    layers = net.features.denseblock1
    layers.denselayer2.norm2 = layers.denselayer1.norm2


def compiled(net: nn.Module) -> None:
    net.features.denseblock1.denselayer1.conv1.compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_forward, "denselayer1.conv1 was given another forward"),
        (replaced_method, "denselayer1 was given another bn_function"),
        (parametrized, "denselayer1.conv1 is of type ParametrizedConv2d"),
        (pruned, "denselayer1.conv1 has hooks"),
        (synchronized, "denselayer1.norm1 is of type SyncBatchNorm"),
        (shared_norm, "uses a norm twice"),
        (compiled, "denselayer1.conv1 is compiled on its own"),
    ],
)
def test_changes_made_after_acceleration_are_obeyed(
    change: Callable[[nn.Module], None], reason: str
) -> None:
    original, accelerated = pair()
    for net in (original, accelerated):
        change(net)
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    assert_only_this_is_plain(accelerated, "features.denseblock1", reason)


def class_of(net: nn.Module, name: str) -> type[nn.Module]:
    """Of the module of that name; of the net itself it is the class behind densely's."""
    return original_class(net.get_submodule(name)) if name else original_class(net)


@pytest.mark.parametrize(
    ("name", "method", "plain"),
    [
        ("features.denseblock1.denselayer1", "forward", {"dense block"}),
        ("features.denseblock1.denselayer1", "bn_function", {"dense block"}),
        ("features.denseblock1", "forward", {"dense block"}),
        ("features.transition1.pool", "forward", {"transition"}),
        ("features.norm0", "forward", {"stem", "dense block", "transition", "final norm"}),
        ("features", "forward", {"stem", "transition", "final norm"}),
        ("", "forward", {"final norm"}),
    ],
)
def test_methods_replaced_on_a_class_are_obeyed(
    name: str, method: str, plain: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test-time adaptation does with batch norms; such a method may be wrapped by functools."""
    original, accelerated = pair()
    x = foreign.images(SHAPE)
    foreign.step(copy.deepcopy(accelerated), x)  # what is known of the class by now
    before = foreign.step(copy.deepcopy(original), x)
    cls = class_of(original, name)
    own = getattr(cls, method)

    @functools.wraps(own)
    def doubled(self: nn.Module, *args: Any) -> Tensor:
        return 2 * own(self, *args)

    monkeypatch.setattr(cls, method, doubled)
    wanted, got = (foreign.step(net, x) for net in (original, accelerated))
    foreign.assert_same(got, wanted)
    assert not torch.allclose(wanted.output, before.output)
    found = report(accelerated)
    for kind, names in found.replaced.items():
        for unit in names:
            calls = found.calls()[unit]
            assert (calls.densely, calls.plain) == ((0, 1) if kind in plain else (1, 0)), unit


def test_a_net_whose_forward_is_wrapped_on_the_object_runs_within_it() -> None:
    """As Hugging Face's accelerate does for its mixed precision."""
    original, accelerated = pair()
    for net in (original, accelerated):
        own = net.forward
        net.forward = lambda x, own=own: 2 * own(x)
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    assert_only_this_is_plain(accelerated, None)


def test_checkpointing_is_not_needed_any_more() -> None:
    original, accelerated = pair(memory_efficient=False)
    for net in (accelerated,):
        for layer in net.features.denseblock1.values():
            layer.memory_efficient = True
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    assert_only_this_is_plain(accelerated, None)


def test_timm_with_another_head_or_activation() -> None:
    x = foreign.images(SHAPE)
    for kwargs, left in (
        ({"global_pool": "max"}, {""}),
        ({"act_layer": "silu"}, {"", "features"}),
        ({"norm_layer": "groupnorm1"}, {"", "features"}),
    ):
        original = foreign.shuffle(foreign.timm(**kwargs))
        accelerated = copy.deepcopy(original)
        done = accelerate(accelerated)
        assert left <= set(done.left_alone)
        assert ("dense block" in done.replaced) == ("global_pool" in kwargs)
        foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))


def test_a_method_of_the_net_replaced_on_the_object() -> None:
    original, accelerated = pair("timm")
    for net in (original, accelerated):
        own = net.forward_head
        net.forward_head = lambda x, own=own: 2 * own(x)
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    assert_only_this_is_plain(accelerated, "", "was given another forward_head")


def test_a_fallback_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densely.fused.calls._logged", set())
    _, accelerated = pair()
    for name in ("denselayer1.norm1", "denselayer2.conv2"):
        accelerated.features.denseblock1.get_submodule(name).register_forward_hook(lambda *_: None)
    for _ in range(2):
        accelerated(foreign.images(SHAPE))
    (record,) = caplog.records
    assert record.getMessage() == (
        "a _DenseBlock runs its original forward: denselayer1.norm1 has hooks; "
        "densely.fused.report(model) counts such calls"
    )
