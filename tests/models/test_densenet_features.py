"""What a DenseNet gives besides logits: the last maps, maps of several scales, embeddings."""

from collections.abc import Sequence
from typing import Any

import pytest
import references
import torch
from nets import assert_equal, images, pull, randomized, state, step, tiny
from torch import Tensor, nn

from densely.errors import ConfigError, ShapeError
from densely.models import DenseNet

USUAL = [(2, 2)] * 4
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, ...]], tuple[int, ...]]] = {
    "large": ({}, USUAL, (37, 44)),
    "small": ({"stem": "small", "bn_size": None}, USUAL[2:], (9, 12)),
    "deep": ({"stem": "deep"}, USUAL, (33, 30)),
    "1D": ({"spatial_dims": 1}, [(2,)] * 4, (47,)),
    "3D": (
        {"spatial_dims": 3, "strides": [(1, 2, 2)] * 4},
        [(1, 2, 2)] * 4,
        (3, 30, 23),
    ),
    "max": ({"transition_pool": "max"}, USUAL, (37, 44)),
}


def expected_parts(
    model: DenseNet, x: Tensor, strides: Sequence[Sequence[int]], train: bool, **options: Any
) -> dict[str, Tensor]:
    net = state(model)
    norm = references.batch_norm(net, train, {})
    return references.densenet(net, x, norm, strides=strides, **options)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("options", "strides", "size"), CASES.values(), ids=CASES)
def test_maps_of_every_block(
    options: dict[str, Any], strides: list[tuple[int, ...]], size: tuple[int, ...], train: bool
) -> None:
    """The blocks' own, bare, with nothing of what later parts do to them; the last activated."""
    model = randomized(tiny(num_classes=4, **options)).train(train)
    x = images(2, 3, *size)
    more = {key: value for key, value in options.items() if key == "transition_pool"}
    parts = expected_parts(model, x, strides, train, **more)
    maps = model.forward_features(x)
    assert_equal(maps, [parts["denseblock1"], parts["denseblock2"], parts["activated"]])
    assert (maps[0] < 0).any()
    assert (maps[1] < 0).any()

    stem, growth = 10, 3
    first = stem + 2 * growth
    second = first // 2 + 3 * growth
    third = second // 2 + growth
    assert model.feature_channels == (first, second, third)
    assert tuple(y.shape[1] for y in maps) == model.feature_channels
    for y, stride in zip(maps, model.feature_strides, strict=True):
        # A multiple of the stride is met exactly; any other size to within a pixel.
        for n, s, m in zip(size, stride, y.shape[2:], strict=True):
            assert abs(m - n / s) < 1


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_without_a_norm_no_activation_overwrites_the_maps(activation: Any) -> None:
    """ReLU in place would leave the logits as they are, since every reader takes it again."""
    model = randomized(tiny(norm=lambda _channels: nn.Identity(), activation=activation))
    x = images(2, 3, 37, 44)
    expected = references.densenet(
        state(model),
        x,
        lambda maps, _name: maps,
        strides=USUAL,
        activation=references.ACTIVATIONS[activation],
    )
    maps = model.forward_features(x)
    assert_equal(maps[:2], [expected["denseblock1"], expected["denseblock2"]])
    assert_equal(maps[2], expected["activated"])
    assert_equal(model.features(x), expected["norm5"])
    assert (maps[0] < 0).any()


def test_feature_channels_and_strides_of_densenet121() -> None:
    with torch.device("meta"):
        model = DenseNet()
    assert model.feature_channels == (256, 512, 1024, 1024)
    assert model.feature_strides == ((4, 4), (8, 8), (16, 16), (32, 32))


@pytest.mark.parametrize("levels", [(1,), (2,), (3,), (1, 3), (3, 1), (2, 1), [2, 2], (3, 2, 1)])
def test_levels_come_in_the_order_asked_for(levels: Sequence[int]) -> None:
    model, x = randomized(tiny()).eval(), images(2, 3, 33, 29)
    everything = model.forward_features(x)
    found = model.forward_features(x, levels)
    torch.testing.assert_close(found, [everything[level - 1] for level in levels], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("levels", "ran", "not_ran"),
    [
        ((1,), "denseblock1", "transition1"),
        ((2, 1), "denseblock2", "transition2"),
        ((1, 3), "norm5", None),
    ],
)
def test_nothing_runs_beyond_the_last_level_wanted(
    levels: tuple[int, ...], ran: str, not_ran: str | None
) -> None:
    model = tiny()
    seen: list[str] = []
    for name, part in model.features.named_children():
        part.register_forward_hook(lambda _module, _args, _out, name=name: seen.append(name))
    model.forward_features(torch.zeros(1, 3, 32, 32), levels)
    names = [name for name, _ in model.features.named_children()]
    assert seen == names[: names.index(ran) + 1]
    assert not_ran not in seen


@pytest.mark.parametrize("levels", [(), (0,), (4,), (1, -1), (3, 4), 2, (1.5,), (True,), "12"])
def test_levels_that_do_not_exist(levels: Any) -> None:
    with pytest.raises(ConfigError) as error:
        tiny().forward_features(torch.zeros(1, 3, 32, 32), levels)
    assert str(error.value) == f"levels={levels!r}: must be a list of blocks from 1 to 3"


@pytest.mark.parametrize("shape", [(1, 3, 32), (1, 1, 32, 32), (1, 3, 4, 32)])
def test_forward_features_refuses_what_forward_refuses(shape: tuple[int, ...]) -> None:
    messages = set()
    model = tiny()
    for call in (model, model.forward_features):
        with pytest.raises(ShapeError) as error:
            call(torch.zeros(shape))
        messages.add(str(error.value))
    assert len(messages) == 1


def test_a_single_block_has_a_single_level() -> None:
    model = randomized(tiny(block_config=(2,), stem="small")).eval()
    x = images(2, 3, 5, 6)
    parts = expected_parts(model, x, [], False)
    assert_equal(model.forward_features(x), [parts["activated"]])


@pytest.mark.parametrize("activation", ["relu", "elu", "silu", "mish"])
def test_gradients_of_the_maps(activation: Any) -> None:
    """An activation in place on maps that someone still needs would spoil these."""
    model = randomized(tiny(activation=activation)).eval()
    net = {k: v.requires_grad_() for k, v in state(model).items() if v.is_floating_point()}
    x = images(2, 3, 33, 30)
    leaf = x.clone().requires_grad_()
    parts = references.densenet(
        net,
        leaf,
        references.batch_norm(net, False, {}),
        strides=USUAL,
        activation=references.ACTIVATIONS[activation],
    )
    pull([parts["denseblock1"], parts["denseblock2"], parts["activated"]]).backward()
    x.requires_grad_()
    pull(model.forward_features(x)).backward()
    assert_equal(x.grad, leaf.grad)
    for key, value in model.named_parameters():
        if not key.startswith("classifier"):
            assert_equal(value.grad, net[key].grad, key)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_features_are_the_last_norms_output(train: bool) -> None:
    model, x = randomized(tiny()).train(train), images(2, 3, 37, 44)
    parts = expected_parts(model, x, USUAL, train)
    assert_equal(model.features(x), parts["norm5"])
    assert (parts["norm5"] < 0).any()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_without_a_classifier_the_pooled_features_come_out(train: bool) -> None:
    model, x = randomized(tiny(num_classes=0)), images(3, 3, 37, 44)
    assert not [key for key in model.state_dict() if not key.startswith("features.")]
    assert isinstance(model.classifier, nn.Identity)
    parts = expected_parts(model, x, USUAL, train)
    y, gradients, _ = step(model, x, train)
    assert_equal(y, parts["pooled"])
    assert y.shape == (3, model.feature_channels[-1])
    assert gradients["x"].isfinite().all()


def test_embeddings_are_what_the_classifier_reads() -> None:
    model, bare = randomized(tiny(num_classes=5)).eval(), tiny(num_classes=0).double().eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "features" in k})
    x = images(2, 3, 32, 32)
    assert_equal(model.classifier(bare(x)), model(x))
