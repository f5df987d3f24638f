"""The presets have the published sizes, and `build_model` fits them to the images."""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from densely import create_model
from densely.errors import ConfigError
from densely.models import (
    DenseNet,
    FCDenseNet,
    ModelFacts,
    ResNet,
    build_model,
    list_models,
    model_facts,
)
from densely.models.registry import count_macs, preset

# d2l: the chapter's net on grey images, 10 classes. ImageNet nets: 1000 classes; 10 for the rest.
PARAMETERS = {
    "d2l": 758_226,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet161": 28_681_000,
    "densenet264": 33_337_704,
    "densenet_40_12": 1_019_722,
    "densenet_100_12": 6_979_642,
    "densenet_100_24": 27_249_082,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
    "densenet_bc_22_12": 71_686,
    "d2l_resnet18": 11_178_378,
    "fc_densenet56": 1_376_795,
    "fc_densenet67": 3_463_243,
    "fc_densenet103": 9_322_091,
}
DENSENETS = [name for name in PARAMETERS if "resnet" not in name and "fc_" not in name]
IMAGENET = ["densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]


@pytest.fixture(autouse=True)
def _meta_device() -> Iterator[None]:
    """Nothing here looks at a weight: none is allocated."""
    with torch.device("meta"):
        yield


def short(name: str) -> dict[str, Any]:
    """Options that leave the network little to build, for what depends on no depth."""
    if "fc_" in name:
        return {"down_blocks": (1,) * 5, "up_blocks": (1,) * 5, "bottleneck_layers": 1}
    return {"block_config": (1, 1, 1, 1) if name in (*IMAGENET, "d2l_resnet18") else (1, 1, 1)}


@functools.cache
def facts_of(name: str) -> ModelFacts:
    return model_facts(name)


def has_large_stem(model: DenseNet) -> bool:
    """Both stems differ in their first kernel, in the norm and in the pooling."""
    size = model.state_dict()["features.conv0.weight"].shape[-1]
    parts = dict(model.features.named_children())
    assert (size, "norm0" in parts, "pool0" in parts) in [(7, True, True), (3, False, False)]
    return size == 7


def test_the_list_is_of_those_that_are_counted_here() -> None:
    assert sorted(list_models()) == sorted(PARAMETERS)
    assert len(set(list_models())) == len(list_models())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("d2l", {"d2l"}),
        ("d2l*", {"d2l", "d2l_resnet18"}),
        ("*bc_1*", {"densenet_bc_100_12", "densenet_bc_190_40"}),
        ("densenet[0-9]*", set(IMAGENET)),
        ("fc_densenet??", {"fc_densenet56", "fc_densenet67"}),
        ("*BC_1*", {"densenet_bc_100_12", "densenet_bc_190_40"}),
        ("vgg*", set()),
        ("", set()),
    ],
)
def test_list_by_pattern(pattern: str, names: set[str]) -> None:
    assert set(list_models(pattern)) == names


@pytest.mark.parametrize("name", PARAMETERS)
def test_as_published(name: str) -> None:
    model = build_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    kind = FCDenseNet if "fc_" in name else ResNet if "resnet" in name else DenseNet
    assert isinstance(model, kind)
    if isinstance(model, DenseNet):
        assert has_large_stem(model) == (name in [*IMAGENET, "d2l"])
    classes = 1000 if name in IMAGENET else 11 if kind is FCDenseNet else 10
    assert model.num_classes == classes
    assert model.in_channels == (1 if name.startswith("d2l") else 3)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("densenet_121", "densenet121"),
        ("DenseNet169", "densenet169"),
        ("d21", "d2l"),
        ("densenet_bc_100", "densenet_bc_100_12"),
    ],
)
def test_unknown_name_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(wrong)
    assert f"'{wrong}'" in str(error.value)
    assert near in str(error.value).split("did you mean ")[1].rstrip("?").split(" or ")


@pytest.mark.parametrize("name", [None, 3, ["d2l"]])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model={name!r}: must be the name of one")):
        create_model(name)


def test_name_near_to_nothing_lists_all() -> None:
    with pytest.raises(ConfigError) as error:
        build_model("?")
    assert all(name in str(error.value) for name in list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_classes_and_channels(name: str) -> None:
    model = build_model(name, num_classes=7, in_channels=2, **short(name))
    assert next(model.parameters()).shape[1] == 2  # the first convolution
    weight, bias = list(model.parameters())[-2:]
    assert weight.shape[0] == 7
    assert bias.shape == (7,)
    assert (model.num_classes, model.in_channels) == (7, 2)


@pytest.mark.parametrize("name", DENSENETS)
def test_no_classes_leave_the_features(name: str) -> None:
    model = build_model(name, num_classes=0, **short(name))
    assert isinstance(model.classifier, nn.Identity)
    assert not [key for key in model.state_dict() if "classifier" in key]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("d2l", "in_channels", 0),
        ("d2l", "num_classes", -1),
        ("d2l_resnet18", "num_classes", 0),
        ("fc_densenet56", "num_classes", 0),
        ("fc_densenet56", "in_channels", 0),
    ],
)
def test_too_few_classes_or_channels_are_refused(name: str, field: str, value: int) -> None:
    options: Any = {field: value}
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        build_model(name, **options)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_classes", "10", "num_classes='10': must be a whole number"),
        ("growth_rate", True, "growth_rate=True: must be a whole number"),
        ("bn_size", 2.5, "bn_size=2.5: must be a whole number or null"),
        ("drop_rate", "high", "drop_rate='high': must be a number"),
        ("fused", "maybe", "fused='maybe': must be true or false"),
        ("block_config", 3, "block_config=3: must be a list, each a whole number"),
        ("block_config", [1, "2"], "block_config=[1, '2']: must be a list, each a whole"),
        ("strides", 2, "strides=2: must be a list, each a list, each a whole number or null"),
        ("norm", 3, "norm=3: must be 'batch' or 'sync_batch' or 'group' or 'layer' or a function"),
        ("drop_rate", True, "drop_rate=True: must be a number"),
        ("image_size", True, "image_size=True: must be a whole number"),
        ("image_size", (32, 32), "image_size=(32, 32): must be a whole number"),
    ],
)
def test_arguments_of_other_types_are_refused(option: str, value: object, message: str) -> None:
    options: Any = {option: value}
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build_model("densenet_bc_22_12", **options)


def test_numbers_of_numpy_and_functions_are_arguments_too() -> None:
    model = build_model(
        "densenet_bc_22_12",
        growth_rate=np.int64(8),
        compression=1,
        norm=lambda c: nn.Identity(),
        image_size=np.int64(32),
        bias=np.True_,
    )  # type: ignore[call-arg]
    assert model.feature_channels[0] == 24 + 3 * 8


def test_options_replace_what_was_published() -> None:
    model = build_model(
        "densenet121",
        growth_rate=16,
        block_config=(2, 2),
        num_init_features=8,
        bn_size=None,
        compression=1.0,
        spatial_dims=3,
        norm="group",
        activation="silu",
        drop_rate=0.1,
        stem="deep",
        strides=[(1, 2, 2)] * 3,
    )
    assert isinstance(model, DenseNet)
    assert model.feature_channels == (8 + 2 * 16, 8 + 4 * 16)
    assert model.feature_strides == ((1, 4, 4), (1, 8, 8))
    kinds = {type(m) for m in model.modules()}
    assert {nn.Conv3d, nn.GroupNorm, nn.SiLU, nn.Dropout} < kinds
    assert not kinds & {nn.Conv2d, nn.BatchNorm3d, nn.ReLU}


def test_options_of_the_other_families() -> None:
    fc = build_model("fc_densenet56", spatial_dims=1, growth_rate=3, drop_rate=0.0)
    assert {nn.Conv1d, nn.ConvTranspose1d} < {type(m) for m in fc.modules()}
    resnet = build_model("d2l_resnet18", block_config=(1, 1, 1, 1))
    assert sum(type(m).__name__ == "Residual" for m in resnet.modules()) == 4


@pytest.mark.parametrize(
    ("name", "options", "near"),
    [
        ("d2l", {"growth_rat": 3}, {"growth_rat": "growth_rate"}),
        ("densenet121", {"drop": 1, "norms": 2}, {"drop": "drop_rate", "norms": "norm"}),
        ("fc_densenet56", {"up_block": 3}, {"up_block": "up_blocks"}),
        ("d2l_resnet18", {"block_cfg": 3}, {"block_cfg": "block_config"}),
    ],
)
def test_unknown_options_suggest_the_nearest(name: str, options: Any, near: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(name, **options)
    faults = str(error.value).split("; ")
    assert len([fault for fault in faults if fault.startswith("unknown")]) == len(near)
    for given, known in near.items():
        assert f"unknown option of {name} '{given}'" in str(error.value)
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("name", "option"), [("d2l_resnet18", "stem"), ("fc_densenet56", "output_stride")]
)
def test_an_option_of_another_family_is_unknown(name: str, option: str) -> None:
    options: Any = {option: None}
    with pytest.raises(ConfigError, match=f"unknown option of {name} '{option}'"):
        build_model(name, **options)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_get_the_stem_that_fits(name: str) -> None:
    large = {
        size: has_large_stem(build_model(name, image_size=size, **short(name)))
        for size in (8, 64, 65, 224)
    }
    assert large == {8: False, 64: False, 65: True, 224: True}


@pytest.mark.parametrize("size", [29, 64, 65, 96])
def test_a_stem_that_is_asked_for_is_given(size: int) -> None:
    assert has_large_stem(
        build_model("densenet121", image_size=size, stem="large", **short("densenet121"))
    )
    assert not has_large_stem(
        build_model("densenet121", image_size=size, stem="small", **short("densenet121"))
    )


@pytest.mark.parametrize("size", [29, 64, 65, 96])
def test_the_chapters_stem_is_always_large(size: int) -> None:
    assert has_large_stem(build_model("d2l", image_size=size))


@pytest.mark.parametrize("size", [4, 64, 65, 224])
def test_the_cifar_stem_is_always_small(size: int) -> None:
    assert not has_large_stem(
        build_model("densenet_bc_100_12", image_size=size, **short("densenet_bc_100_12"))
    )


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("d2l", 29),
        ("densenet121", 8),
        ("densenet_40_12", 4),
        ("d2l_resnet18", 1),
        ("fc_densenet56", 32),
    ],
)
def test_images_that_would_shrink_to_nothing_are_refused(name: str, limit: int) -> None:
    options = short(name) if name != "d2l" else {}
    assert build_model(name, image_size=limit, **options).min_image_size == limit
    for size in (limit - 1, 0, -5):
        with pytest.raises(ConfigError) as error:
            build_model(name, image_size=size, **options)
        assert f"image_size={size}:" in str(error.value)
        assert f" {limit} " in str(error.value)


# --- Facts. ---


def conv_macs(size: int, inputs: int, outputs: int, kernel: int) -> int:
    """Of a convolution that gives maps of size x size."""
    return size**2 * inputs * outputs * kernel**2


def densenet_macs(
    sizes: Sequence[int],
    blocks: Sequence[int],
    k: int,
    channels: int,
    width: int | None,
    compression: float,
) -> int:
    """Of blocks at the given sizes, and of transitions that pool before they convolve."""
    total = 0
    for b, (size, layers) in enumerate(zip(sizes, blocks, strict=True)):
        for _ in range(layers):
            if width is None:
                total += conv_macs(size, channels, k, 3)
            else:
                total += conv_macs(size, channels, width, 1) + conv_macs(size, width, k, 3)
            channels += k
        if b + 1 < len(sizes):
            kept = int(channels * compression)
            total += conv_macs(sizes[b + 1], channels, kept, 1)
            channels = kept
    return total


def resnet_macs() -> int:
    total, size, inputs = conv_macs(48, 1, 64, 7), 24, 64
    for outputs in (64, 128, 256, 512):
        if outputs > 64:
            size //= 2
            total += conv_macs(size, inputs, outputs, 1)
        total += conv_macs(size, inputs, outputs, 3) + 3 * conv_macs(size, outputs, outputs, 3)
        inputs = outputs
    return total + 512 * 10


def fc_macs(k: int, layers: int, depth: int) -> int:
    """With as many layers in every block; transposed convolutions count by their input."""
    total, size, channels, skips = conv_macs(224, 3, 48, 3), 224, 48, []
    for _ in range(depth):
        total += densenet_macs([size], [layers], k, channels, None, 1)
        channels += layers * k
        skips.append((size, channels))
        total += conv_macs(size, channels, channels, 1)
        size //= 2
    total += densenet_macs([size], [layers], k, channels, None, 1)
    new = layers * k
    while skips:
        total += conv_macs(size, new, new, 3)
        size, kept = skips.pop()
        channels = kept + new
        total += densenet_macs([size], [layers], k, channels, None, 1)
    return total + conv_macs(size, channels + new, 11, 1)


MACS = {
    "d2l": conv_macs(48, 1, 64, 7)
    + densenet_macs([24, 12, 6, 3], [4, 4, 4, 4], 32, 64, None, 0.5)
    + 248 * 10,
    "densenet121": conv_macs(112, 3, 64, 7)
    + densenet_macs([56, 28, 14, 7], [6, 12, 24, 16], 32, 64, 128, 0.5)
    + 1024 * 1000,
    "densenet_bc_100_12": conv_macs(32, 3, 24, 3)
    + densenet_macs([32, 16, 8], [16, 16, 16], 12, 24, 48, 0.5)
    + 342 * 10,
    "densenet_40_12": conv_macs(32, 3, 16, 3)
    + densenet_macs([32, 16, 8], [12, 12, 12], 12, 16, None, 1.0)
    + 448 * 10,
    "d2l_resnet18": resnet_macs(),
    "fc_densenet56": fc_macs(12, 4, 5),
}


@pytest.mark.parametrize("name", MACS)
def test_macs(name: str) -> None:
    assert facts_of(name).macs == MACS[name]


def test_a_fused_net_is_counted_too_and_does_not_complain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That its parts run their original forward, since they are watched: it is logged once."""
    monkeypatch.setattr("densely.fused.calls._logged", set())
    with torch.device("cpu"):
        macs = count_macs(build_model("densenet_bc_22_12"), torch.zeros(1, 3, 32, 32))
    assert macs == facts_of("densenet_bc_22_12").macs
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "sizes", "channels", "millions"),
    [
        ("d2l", [24, 12, 6], [192, 224, 240], 129),
        ("densenet121", [56, 28, 14], [256, 512, 1024], 2834),
        ("densenet_bc_100_12", [32, 16], [216, 300], 288),
    ],
)
def test_pooling_first_saves_three_quarters_of_the_transitions(
    name: str, sizes: list[int], channels: list[int], millions: int
) -> None:
    """The counts of others, who pool last."""
    transitions = sum(conv_macs(n, c, c // 2, 1) for n, c in zip(sizes, channels, strict=True))
    assert round((facts_of(name).macs + transitions * 3 / 4) / 1e6) == millions


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_and_tasks_as_published(name: str) -> None:
    side = 224 if name in IMAGENET or "fc_" in name else 96 if "d2l" in name else 32
    assert preset(name).image_size == side
    assert preset(name).task == ("segmentation" if "fc_" in name else "classification")


@pytest.mark.parametrize(
    ("name", "shape", "least"),
    [
        ("d2l", (1, 96, 96), 29),
        ("d2l_resnet18", (1, 96, 96), 1),
        ("densenet121", (3, 224, 224), 29),
        ("densenet_bc_100_12", (3, 32, 32), 4),
        ("fc_densenet56", (3, 224, 224), 32),
    ],
)
def test_facts(name: str, shape: tuple[int, ...], least: int) -> None:
    assert facts_of(name) == ModelFacts(
        name=name,
        parameters=PARAMETERS[name],
        macs=MACS[name],
        input_shape=shape,
        min_image_size=least,
        task=preset(name).task,
    )


def test_facts_and_preset_of_an_unknown_name() -> None:
    for call in (model_facts, preset):
        with pytest.raises(ConfigError, match="unknown model 'densenet12'; did you mean"):
            call("densenet12")
