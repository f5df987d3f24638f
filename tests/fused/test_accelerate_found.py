"""What `accelerate` finds, wherever it stands; what it leaves alone; the report; the way back."""

import copy
import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from torch import Tensor, nn

from densely.errors import ConfigError
from densely.fused import accelerate, report, restore

SHAPE = (2, 3, 64, 48)


class UNet(nn.Module):
    """Uses the children of a DenseNet's features one by one, and joins what they give."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.encoder = net.features
        self.up = nn.Conv2d(54, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for name, child in self.encoder.named_children():
            x = child(x)
            if name.startswith(("denseblock", "norm5")):
                skips.append(nn.functional.interpolate(x, size=(16, 12)))
        return self.up(torch.cat(skips, 1)[:, :54])


class Detector(nn.Module):
    """Uses a DenseNet's features as a whole, deep inside of containers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        body = nn.ModuleDict({"body": nn.Sequential(OrderedDict(dense=net.features))})
        self.backbones = nn.ModuleList([body])
        self.head = nn.Conv2d(net.features.norm5.num_features, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbones[0]["body"](x))


@pytest.mark.parametrize("make", [foreign.torchvision, foreign.timm])
def test_inside_of_a_unet_whose_forward_calls_each_part(make: Callable[..., Any]) -> None:
    original = foreign.shuffle(UNet(make()))
    accelerated = copy.deepcopy(original)
    done = accelerate(accelerated)
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    calls = done.calls()
    ran = {name for name, n in calls.items() if n.densely == 1 and n.plain == 0}
    assert ran == set(calls) - {"encoder"}
    assert len(ran) == 7
    assert calls["encoder"].densely == 0  # its own forward is never called, so its stem is not


def test_deep_inside_of_a_detector() -> None:
    original = foreign.shuffle(Detector(foreign.torchvision()))
    accelerated = copy.deepcopy(original)
    done = accelerate(accelerated)
    x = foreign.images(SHAPE)
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    inside = "backbones.0.body.dense"
    assert done.replaced == {
        "stem": [inside],
        "dense block": [f"{inside}.denseblock{i}" for i in (1, 2, 3, 4)],
        "transition": [f"{inside}.transition{i}" for i in (1, 2, 3)],
    }
    assert {(n.densely, n.plain) for n in done.calls().values()} == {(1, 0)}


def test_torchxrayvision_but_for_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    net = foreign.torchxrayvision(monkeypatch).DenseNet(8, (2, 3), 16, 2, 0.3, num_classes=4)
    original = foreign.shuffle(net)
    accelerated = copy.deepcopy(original)
    done = accelerate(accelerated)
    x = foreign.images((4, 1, 40, 32))
    foreign.assert_same(foreign.step(accelerated, x), foreign.step(original, x))
    assert set(done.replaced) == {"stem", "dense block", "transition"}
    assert done.left_alone == {"": "also resizes images and rescales outputs in its forward"}
    assert {(n.densely, n.plain) for n in done.calls().values()} == {(1, 0)}


def test_timms_other_ways_in_work_as_before() -> None:
    original = foreign.shuffle(foreign.timm()).eval()
    accelerated = copy.deepcopy(original)
    accelerate(accelerated)
    x = foreign.images(SHAPE)
    for a, b in zip(
        accelerated.forward_intermediates(x)[1], original.forward_intermediates(x)[1], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    maps = accelerated.forward_features(x)
    torch.testing.assert_close(maps, original.forward_features(x), rtol=1e-10, atol=1e-10)
    logits = accelerated.forward_head(maps)
    torch.testing.assert_close(logits, original(x), rtol=1e-10, atol=1e-10)
    for model in (original, accelerated):
        model.prune_intermediate_layers([2])  # slices features, and takes the head away
    torch.testing.assert_close(accelerated(x), original(x), rtol=1e-10, atol=1e-10)
    assert report(accelerated).calls()[""].plain == 1
    restore(accelerated)
    assert type(accelerated.features) is nn.Sequential


def test_a_subclass_counts_unless_it_has_a_forward_of_its_own() -> None:
    class Renamed(type(foreign.torchvision())):
        def extra(self) -> int:
            return 1

    class Scaled(type(foreign.torchvision())):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    settings = (8, (2, 3, 2, 2), 16, 2)
    both = nn.ModuleDict({"renamed": Renamed(*settings), "scaled": Scaled(*settings)})
    done = accelerate(both)
    assert done.replaced["final norm"] == ["renamed"]
    assert done.replaced["stem"] == ["renamed.features", "scaled.features"]
    assert done.left_alone == {"scaled": "is of type Scaled with its own forward"}
    assert both["renamed"].extra() == 1


def instance_norm(net: nn.Module) -> None:
    net.features.denseblock2.denselayer3.norm2 = nn.InstanceNorm2d(16)


def wide_kernel(net: nn.Module) -> None:
    net.features.denseblock2.denselayer1.conv2 = nn.Conv2d(16, 8, 5, padding=2, bias=False)


def grouped(net: nn.Module) -> None:
    net.features.denseblock2.denselayer1.conv2 = nn.Conv2d(16, 8, 3, padding=1, groups=2)


def reflecting(net: nn.Module) -> None:
    net.features.denseblock2.denselayer1.conv2 = nn.Conv2d(
        16, 8, 3, padding=1, padding_mode="reflect"
    )


def leaky(net: nn.Module) -> None:
    net.features.denseblock2.denselayer2.relu1 = nn.PReLU()


def other_layer(net: nn.Module) -> None:
    layer = net.features.denseblock2.denselayer1
    layer.__class__ = type("Mine", (type(layer),), {})


def blurred(net: nn.Module) -> None:
    net.features.transition2.pool = nn.AvgPool2d(3, 2, 1)


def undivided(net: nn.Module) -> None:
    net.features.transition2.pool = nn.AvgPool2d(2, 2, divisor_override=1)


def longer(net: nn.Module) -> None:
    net.features.transition2.append(nn.Sigmoid())


def no_pooling(net: nn.Module) -> None:
    net.features.pool0 = nn.Identity()


def other_stem_pooling(net: nn.Module) -> None:
    net.features.pool0 = nn.MaxPool2d(2, 2)


def dilated_stem_pooling(net: nn.Module) -> None:
    net.features.pool0 = nn.MaxPool2d(3, 2, 1, dilation=2)


def other_last_norm(net: nn.Module) -> None:
    net.features.norm5 = nn.GroupNorm(2, net.features.norm5.num_features)


def own_features(net: nn.Module) -> None:
    class Features(nn.Sequential):
        pass

    net.features = Features(OrderedDict(net.features.named_children()))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (instance_norm, "features.denseblock2", "denselayer3.norm2 is of type InstanceNorm2d"),
        (wide_kernel, "features.denseblock2", "denselayer1.conv2 has other settings: Conv2d("),
        (grouped, "features.denseblock2", "denselayer1.conv2 has other settings: Conv2d("),
        (reflecting, "features.denseblock2", "denselayer1.conv2 has other settings: Conv2d("),
        (leaky, "features.denseblock2", "denselayer2.relu1 is of type PReLU"),
        (other_layer, "features.denseblock2", "denselayer1 is of type Mine"),
        (blurred, "features.transition2", "pool has other settings: AvgPool2d("),
        (undivided, "features.transition2", "pool has other settings: AvgPool2d("),
        (longer, "features.transition2", "holds norm, relu, conv, pool, 4; known is norm, relu"),
        (no_pooling, "features", "has no norm, ReLU and max pooling in a row"),
        (other_stem_pooling, "features", "pool0 has other settings: MaxPool2d("),
        (dilated_stem_pooling, "features", "pool0 has other settings: MaxPool2d("),
        (other_last_norm, "", "features.norm5 is of type GroupNorm"),
        (own_features, "", "features is of type Features"),
    ],
)
def test_what_cannot_be_replaced_is_left_alone_and_named(
    change: Callable[..., Any], name: str, reason: str
) -> None:
    original = foreign.torchvision()
    change(original)
    foreign.shuffle(original)
    changed_before = copy.deepcopy(original)
    done = accelerate(changed_before)
    assert list(done.left_alone) == [name]
    assert done.left_alone[name].startswith(reason)

    changed_after = foreign.torchvision()
    accelerate(changed_after)
    change(changed_after)
    changed_after.double().load_state_dict(original.state_dict())

    x = foreign.images(SHAPE)
    wanted = foreign.step(original, x)
    for net in (changed_before, changed_after):
        foreign.assert_same(foreign.step(net, x), wanted)
    assert {(n.densely, n.plain) for n in done.calls().values()} == {(1, 0)}
    calls = report(changed_after).calls()
    if name in calls:
        (met,) = calls.pop(name).reasons
        assert met.startswith(reason)
    assert {(n.densely, n.plain) for n in calls.values()} == {(1, 0)}


def test_a_second_time_changes_nothing() -> None:
    net = foreign.torchvision()
    first = accelerate(net)
    classes = [type(m) for m in net.modules()]
    second = accelerate(net)
    assert [type(m) for m in net.modules()] == classes
    assert (first.already, second.already) == (0, 9)
    assert second.replaced == first.replaced == report(net).replaced


def test_classes_are_the_same_for_all_nets() -> None:
    one, two = foreign.torchvision(), foreign.torchvision()
    accelerate(one)
    accelerate(two)
    assert [type(m) for m in one.modules()] == [type(m) for m in two.modules()]


@pytest.mark.parametrize("case", foreign.CASES.values(), ids=foreign.CASES)
def test_restore_leaves_no_trace(case: foreign.Case) -> None:
    net = foreign.shuffle(case.make())
    before = [(type(m), set(m.__dict__)) for m in net.modules()]
    x = foreign.images(case.shape)
    wanted = foreign.step(copy.deepcopy(net), x)
    done = accelerate(net)
    restore(net)
    assert [(type(m), set(m.__dict__)) for m in net.modules()] == before
    got = foreign.step(net, x)
    assert torch.equal(got.output, wanted.output)
    assert done.calls() == {}
    assert set(report(net).left_alone.values()) == {"not accelerated yet"}


def test_restore_refuses_a_class_that_others_made_of_ours() -> None:
    net = foreign.torchvision()
    accelerate(net)
    block = net.features.denseblock3
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(ConfigError, match=r"features\.denseblock3 cannot be restored.*Sharded"):
        restore(net)
    assert report(net).replaced["dense block"] == [f"features.denseblock{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("function", [accelerate, restore, report])
def test_something_else_than_a_module_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"dict given: a torch\.nn\.Module is needed"):
        function({"net": foreign.torchvision()})


def test_a_model_without_a_densenet_says_so() -> None:
    done = accelerate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert (done.replaced, done.left_alone) == ({}, {})
    assert str(done) == "nothing replaced: no DenseNet of torchvision, timm or MONAI was found"


def test_denselys_own_nets_are_accelerated_from_the_start() -> None:
    from densely.models import DenseNet

    sizes = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
    done = accelerate(DenseNet(**sizes))
    assert sum(map(len, done.replaced.values())) == done.already == 5
    assert done.left_alone == {}
    own = DenseNet(**sizes, fused=False)
    assert accelerate(own).already == 0
    restore(own)
    assert type(own) is DenseNet


def test_scripted_nets_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(foreign.torchvision())
    done = accelerate(nn.ModuleDict({"scripted": scripted}))
    assert done.replaced == {}
    assert done.left_alone == {"scripted": "is scripted: its code cannot be replaced"}


def test_the_report_reads_well_and_does_not_hold_the_model() -> None:
    net = foreign.torchvision()
    no_pooling(net)
    done = accelerate(net)
    net.features.transition1.norm.register_forward_hook(lambda *_: None)
    net(torch.randn(1, 3, 64, 64))
    lines = str(done).splitlines()
    assert lines[0] == "8 replaced (0 before), 1 left alone"
    assert "  final norm   (the model)                 1      0" in lines
    assert "  dense block  features.denseblock2        1      0" in lines
    i = lines.index("  transition   features.transition1        0      1")
    assert lines[i + 1].strip() == "1 of these: norm has hooks"
    assert lines[-1].split(maxsplit=3)[2] == "features"
    del net
    gc.collect()
    assert done.calls() == {}
    assert "8 replaced" in str(done)


@pytest.mark.parametrize("train", [True, False])
def test_what_a_block_gives_can_be_saved_and_loaded(train: bool, tmp_path: Path) -> None:
    _, net = foreign.pair(foreign.torchvision())
    features = net.train(train).features
    with torch.no_grad():
        made = features.denseblock1(foreign.images((2, features.norm0.num_features, 8, 8)))
    torch.save(made, tmp_path / "made.pt")
    assert torch.equal(torch.load(tmp_path / "made.pt", weights_only=True), made)


def test_other_data_in_a_blocks_output_are_seen() -> None:
    found = []
    for net in foreign.pair(foreign.torchvision()):
        features = net.train().features
        y = features.denseblock1(foreign.images((2, features.norm0.num_features, 8, 8)))
        y.data = 2 * y.data + 1
        found.append(features.transition1(y))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_maps_smaller_than_a_poolings_window_are_pytorchs_error() -> None:
    _, net = foreign.pair(foreign.torchvision())
    step = net.features.transition1
    with pytest.raises(RuntimeError, match="Output size is too small"):
        step(foreign.images((2, step.norm.num_features, 1, 1)))


def test_poolings_with_settings_in_tuples_of_one() -> None:
    net = foreign.torchvision()
    net.features.transition1.pool = nn.AvgPool2d((2,), (2,))
    net.features.pool0 = nn.MaxPool2d((3,), (2,), (1,))
    wanted, got = (foreign.step(some, foreign.images(SHAPE)) for some in foreign.pair(net))
    foreign.assert_same(got, wanted)


def test_a_gradient_that_is_one_number_for_all_places() -> None:
    """Its strides are zero: nothing may be added to it in place."""
    grads = []
    for net in foreign.pair(foreign.torchvision()):
        features = net.train().features
        x = foreign.images((2, features.norm0.num_features, 8, 8)).requires_grad_()
        sums = features.denseblock1(x).sum((0, 2, 3))
        (sums * torch.linspace(0, 1, len(sums), dtype=sums.dtype)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_a_layer_for_other_channels_is_pytorchs_error() -> None:
    _, net = foreign.pair(foreign.torchvision())
    layer = net.features.denseblock1.denselayer2
    fewer = layer.norm1.num_features - 8
    layer.norm1 = nn.BatchNorm2d(fewer).double()
    layer.conv1 = nn.Conv2d(fewer, layer.conv1.out_channels, 1, bias=False).double()
    with pytest.raises(RuntimeError, match=r"should contain|expected input"):
        net.eval()(foreign.images(SHAPE))
