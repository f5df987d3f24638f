"""Networks cut open: parts in turn are the whole, for every package, and refusals say why."""

import copy
import logging

import pytest
import torch
from explained_nets import CASES, images, monai, resnet, shuffled, timm, tiny, torchvision
from torch import nn

import densely
from densely.errors import ConfigError
from densely.evaluation.anatomy import blocks, read
from densely.models import DenseNet, FCDenseNet


@pytest.mark.parametrize("name", CASES)
def test_parts_in_turn_are_the_whole(name: str) -> None:
    case = CASES[name]
    model = shuffled(case.make()).eval()
    x = images(2, *case.shape)
    anatomy = read(model)
    assert anatomy.levels == case.levels
    with torch.no_grad():
        whole = model(x)
        for level in range(1, case.levels + 1):
            logits = anatomy.continue_from(anatomy.maps(x, level), level)
            torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(anatomy.logits(x), whole, rtol=1e-10, atol=1e-10)
    anatomy.check(x)


def test_levels_are_those_of_forward_features() -> None:
    model = shuffled(tiny(block_config=(1, 2, 1))).eval()
    x = images(2, 3, 12, 9)
    anatomy = read(model)
    with torch.no_grad():
        for level, wanted in enumerate(model.forward_features(x), start=1):
            torch.testing.assert_close(anatomy.maps(x, level), wanted, rtol=1e-12, atol=1e-12)


def test_levels_of_a_residual_network_end_before_the_size_changes() -> None:
    anatomy = read(resnet())
    sizes = [tuple(anatomy.maps(torch.zeros(1, 3, 40, 32), i).shape[1:]) for i in (1, 2, 3)]
    assert sizes == [(4, 10, 8), (6, 5, 4), (8, 3, 2)]


def test_fused_code_runs_and_does_not_step_aside(caplog: pytest.LogCaptureFixture) -> None:
    model = densely.create_model("densenet_bc_22_12", num_classes=3).eval()
    with caplog.at_level(logging.DEBUG), torch.no_grad():
        read(model).logits(torch.zeros(1, 3, 16, 16))
    assert not caplog.records
    for module in model.features.children():
        calls = module.__dict__.get("_densely_calls")
        assert calls is None or (calls.densely, calls.plain) == (1, 0)


@pytest.mark.parametrize("make", [torchvision, timm, tiny])
def test_what_follows_the_linear_layer_is_left_out(make: type[nn.Module]) -> None:
    model = make()
    channels = model.classifier.in_features
    linear = nn.Linear(channels, 7)
    model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Sequential(linear, nn.Sigmoid()))
    shuffled(model).eval()
    anatomy, x = read(model), images(2, 3, 64, 64)
    assert anatomy.classifier is linear
    anatomy.check(x)
    with torch.no_grad():
        torch.testing.assert_close(anatomy.logits(x).sigmoid(), model(x), rtol=1e-10, atol=1e-10)


def test_a_subclass_without_a_forward_of_its_own_is_known() -> None:
    class Mine(DenseNet):
        pass

    model = Mine(block_config=(1, 1), num_classes=3)
    assert read(model).levels == 2
    assert read(copy.deepcopy(model)).levels == 2


def _other_forward() -> nn.Module:
    class Mine(DenseNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    return Mine(block_config=(1, 1), num_classes=3)


def _mlp() -> nn.Module:
    model = torchvision()
    model.classifier = nn.Sequential(nn.Linear(46, 9), nn.ReLU(), nn.Linear(9, 2))
    return model


def _short_head() -> nn.Module:
    model = monai()
    model.class_layers = model.class_layers[:2]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 2), r"torch\.nn\.modules\.linear\.Linear given: heat maps need"),
        (lambda: 3, "builtins.int given: heat maps need"),
        (lambda: FCDenseNet(down_blocks=(1,), bottleneck_layers=1, up_blocks=(1,)), "FCDenseNet"),
        (lambda: tiny(num_classes=0), r"with the head Dropout\(.*Identity\(\) given: heat maps"),
        (lambda: timm(global_pool="max"), "with the pooling SelectAdaptivePool2d.*max"),
        (lambda: timm(global_pool=""), "with the pooling SelectAdaptivePool2d"),
        (lambda: timm(num_classes=0), "with the head Dropout"),
        (_other_forward, "is of type Mine with its own forward"),
        (_mlp, r"with the head Sequential\(.*ReLU.* given: heat maps need"),
        (_short_head, "with the head Sequential"),
    ],
)
def test_other_networks_and_heads_are_refused(make: type[nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(make())


def test_a_network_that_does_more_than_its_parts_is_found_out() -> None:
    model = shuffled(tiny()).eval()
    anatomy, x = read(model), images(1, 3, 9, 9)
    anatomy.check(x)
    forward = model.forward
    model.forward = lambda x: 1.001 * forward(x)
    with pytest.raises(ConfigError, match="not those of its parts in turn"):
        anatomy.check(x)


@pytest.mark.parametrize("level", [0, 3, -1])
def test_a_level_that_is_not_there_is_refused(level: int) -> None:
    anatomy = read(tiny())
    with pytest.raises(ConfigError, match=f"level={level}: must be a block from 1 to 2"):
        anatomy.maps(torch.zeros(1, 3, 9, 9), level)
    with pytest.raises(ConfigError, match=f"level={level}: must be a block from 1 to 2"):
        anatomy.continue_from(torch.zeros(1, 3, 9, 9), level)


@pytest.mark.parametrize("name", [name for name in CASES if name != "ResNet"])
def test_blocks_are_who_reads_what(name: str) -> None:
    model = CASES[name].make()
    found = blocks(model)
    modules = {module: key for key, module in model.named_modules()}
    assert len(found) == CASES[name].levels
    for b, block in enumerate(found, start=1):
        for i, layer in enumerate(block.layers, start=1):
            at = f"features.denseblock{b}.denselayer{i}."
            assert modules[layer] in (f"{at}conv1", f"{at}layers.conv1")
        last = "classifier" if hasattr(model, "classifier") else "class_layers.out"
        wanted = last if b == len(found) else f"features.transition{b}.conv"
        assert modules[block.reader] == wanted


def test_a_network_that_adds_has_no_blocks() -> None:
    with pytest.raises(ConfigError, match="a ResNet adds where a DenseNet concatenates"):
        blocks(resnet())
