"""Faults in the arguments of DenseNet are all named at once, each by its field."""

import inspect
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import densely
from densely.errors import ConfigError
from densely.models import DenseNet, FCDenseNet, ResNet
from densely.models.densenet import DenseBlock, Transition, norm_eps
from densely.models.parts import Parts
from densely.models.registry import ModelOptions


def named_fields(error: ConfigError) -> set[str]:
    return set(re.findall(r"(?:^|; )(\w+(?:\[\d+\])?)", str(error)))


def faults_of(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        DenseNet(**options)
    return error.value


def test_all_faults_are_named_at_once() -> None:
    faulty: dict[str, Any] = {
        "growth_rate": 0,
        "num_init_features": -1,
        "bn_size": 0,
        "compression": 1.5,
        "stem": "medium",
        "in_channels": 0,
        "num_classes": -3,
        "init": "magic",
        "spatial_dims": 4,
        "output_stride": 7,
        "norm": "instance",
        "activation": "swish",
        "transition_pool": "median",
        "drop_rate": 1.0,
        "classifier_drop_rate": -0.25,
        "drop_path_rate": 1.25,
        "norm_eps": 0.0,
    }
    error = faults_of(block_config=(0, 2, -4), **faulty)
    assert named_fields(error) == {*faulty, "block_config[0]", "block_config[2]"}
    for value in (
        *("=-1", "=1.5", "medium", "=-3", "magic", "=-4", "=4", "=7", "instance", "swish"),
        *("median", "=1.0", "=-0.25", "=1.25", "=0.0"),
    ):
        assert value in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("growth_rate", -1),
        ("num_init_features", 0),
        ("bn_size", -2),
        ("in_channels", 0),
        ("num_classes", -1),
        ("block_config", ()),
        ("compression", 0.0),
        ("compression", -0.5),
        ("compression", 1.0001),
        ("compression", math.nan),
        ("stem", ""),
        ("init", "Xavier"),
        ("spatial_dims", 0),
        ("spatial_dims", -1),
        ("norm", None),
        ("norm", "Batch"),
        ("activation", None),
        ("activation", ""),
        ("transition_pool", "AVG"),
        ("drop_rate", 1),
        ("drop_rate", -1e-9),
        ("drop_rate", math.nan),
        ("classifier_drop_rate", 1.0),
        ("classifier_drop_rate", math.nan),
        ("drop_path_rate", 1.0),
        ("drop_path_rate", math.nan),
        ("norm_eps", -1e-5),
        ("norm_eps", 1),
        ("norm_eps", 1.0),
        ("norm_eps", math.inf),
        ("norm_eps", math.nan),
        ("output_stride", 0),
        ("output_stride", 2),
        ("output_stride", 64),
        ("strides", []),
        ("strides", [(2, 2)] * 4),
        ("strides", [(2, 2)] * 6),
        ("strides", [(2, 2)] * 4 + [(2,)]),
        ("strides", [(2, 2)] * 4 + [(2, 0)]),
        ("strides", [(2, 2)] * 4 + [(2, 2, 2)]),
        ("strides", [(2, 2)] * 4 + [(2, 2.5)]),
        ("strides", [2, 2, 2, 2, 2]),
        ("growth_rate", 1.5),
        ("block_config", 6),
        ("block_config", [6, 1.5]),
        ("spatial_dims", "2"),
        ("compression", "half"),
        ("norm", nn.BatchNorm2d(64)),
        ("activation", nn.ReLU()),
    ],
)
def test_one_fault_names_its_field_alone(field: str, value: object) -> None:
    error = faults_of(**{field: value})
    assert named_fields(error) == {field}
    if value != ():
        assert str(value) in str(error)


def test_numbers_may_be_numpys() -> None:
    small: Any = {"block_config": (1, np.int64(1)), "growth_rate": np.int32(2)}
    strides = [(np.int64(2), np.int64(1))] * 3
    model = DenseNet(**small, strides=strides, norm_eps=np.float32(1e-3))  # type: ignore[arg-type]
    assert model.feature_strides == ((4, 1), (8, 1))
    assert norm_eps(model) == {float(np.float32(1e-3))}


@pytest.mark.parametrize("network", [FCDenseNet, ResNet])
def test_other_networks_refuse_arguments_of_other_types_too(network: Any) -> None:
    with pytest.raises(ConfigError) as error:
        network(in_channels="3", num_classes=2.5, init=None)
    assert named_fields(error.value) == {"in_channels", "num_classes", "init"}


@pytest.mark.parametrize("spatial_dims", [0, 4])
def test_strides_of_impossible_dimensions(spatial_dims: int) -> None:
    strides = [(2,) * spatial_dims] * 5
    assert named_fields(faults_of(spatial_dims=spatial_dims, strides=strides)) == {"spatial_dims"}


@pytest.mark.parametrize(
    ("stem", "blocks", "allowed"),
    [
        ("large", 4, "4, 8, 16, 32"),
        ("deep", 3, "4, 8, 16"),
        ("small", 4, "1, 2, 4, 8"),
        ("small", 1, "1"),
    ],
)
def test_allowed_output_strides_are_named(stem: str, blocks: int, allowed: str) -> None:
    error = faults_of(stem=stem, block_config=(1,) * blocks, output_stride=3)
    assert str(error) == f"output_stride=3: must be one of {allowed} with stem='{stem}'"


def test_output_stride_and_strides_exclude_each_other() -> None:
    error = faults_of(output_stride=8, strides=[(2, 2)] * 5)
    assert str(error) == "output_stride and strides exclude each other"


def test_strides_say_how_many_of_what_are_needed() -> None:
    small = {"stem": "small", "block_config": (1, 1, 1)}
    assert "must be 5 lists of 2" in str(faults_of(strides=[(2, 2)]))
    assert "must be 2 lists of 3" in str(faults_of(strides=[(2, 2)], spatial_dims=3, **small))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"norm": nn.GroupNorm}, "norm=GroupNorm: makes no module from 96 channels: GroupNorm."),
        ({"norm": lambda channels: None}, "makes no module from 96 channels, but a NoneType"),
        ({"activation": F.relu}, "activation=relu: makes no module from nothing: relu() missing"),
        ({"activation": dict}, "activation=dict: makes no module from nothing, but a dict"),
    ],
)
def test_functions_that_make_no_modules_are_told(options: dict[str, Any], told: str) -> None:
    assert told in str(faults_of(**options))


def test_a_function_for_some_numbers_of_channels_alone_is_taken() -> None:
    options = {"block_config": (2, 2), "growth_rate": 64, "compression": 1.0, "num_classes": 2}
    net = DenseNet(norm=partial(nn.GroupNorm, 64), **options)  # type: ignore[arg-type]
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 2)


def test_trying_out_a_function_draws_no_random_numbers() -> None:
    nets = []
    for norm in ("batch", lambda channels: (torch.rand(3), nn.BatchNorm2d(channels))[1]):
        torch.manual_seed(0)
        Parts(norm=norm).faults()  # type: ignore[arg-type]
        nets.append(torch.rand(1))
    assert nets[0] == nets[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Parts(norm="instance").make_norm(8),  # type: ignore[arg-type]
        lambda: Parts(activation="tanh").make_activation(),  # type: ignore[arg-type]
        lambda: Transition(8, 4, pool="AVG"),  # type: ignore[arg-type]
        lambda: DenseBlock(-1, 8, 4, bn_size=4),
        lambda: densely.list_models(None),  # type: ignore[arg-type]
    ],
)
def test_parts_by_themselves_refuse_what_they_do_not_know(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=": must be "):
        make()


def test_numpys_numbers_and_fractions_are_taken_as_pythons() -> None:
    numbers = {"growth_rate": np.uint8(32), "block_config": [np.int64(6), 12]}
    net = DenseNet(**numbers, in_channels=np.int64(1), drop_rate=Fraction(1, 5))  # type: ignore[arg-type]
    assert net.feature_channels == (256, 512)
    assert json.dumps(net.feature_channels) == "[256, 512]"
    assert {type(value) for value in (net.in_channels, *net.feature_channels)} == {int}
    assert net(torch.zeros(2, 1, 64, 64)).shape == (2, 1000)


def test_named_networks_take_every_option() -> None:
    takes = set(inspect.signature(DenseNet).parameters)
    assert set(ModelOptions.__annotations__) == takes - {"in_channels", "num_classes"}
