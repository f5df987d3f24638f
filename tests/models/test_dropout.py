"""Dropout, dropout of the head and stochastic depth: where they are, and what they do."""

import itertools
import math
from typing import Any

import pytest
import torch
from nets import assert_equal, images, randomized, state, tiny
from torch import Tensor, nn

from densely.models import DenseNet, FCDenseNet
from densely.models.parts import DropPath, Parts

Call = tuple[str, Tensor, Tensor]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def calls(model: nn.Module, x: Tensor) -> list[Call]:
    """Name, input and output of each convolution, dropout and pooling, in the order they ran."""
    made: list[Call] = []
    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, nn.Dropout, nn.AvgPool2d, nn.MaxPool2d, nn.Linear)):
            module.register_forward_hook(
                lambda _module, args, out, name=name: made.append((name, args[0], out))
            )
    model.train()(x)
    return made


def follow(made: list[Call]) -> list[str]:
    """Convolutions whose very output the next call drops from."""
    return [
        name
        for (name, _, out), (then, given, _) in itertools.pairwise(made)
        if "drop" in then and given is out
    ]


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("bn_size", [None, 2])
@pytest.mark.parametrize("stem", ["large", "small", "deep"])
def test_dropout_follows_each_convolution_but_the_stems(
    stem: Any, bn_size: int | None, pool: Any
) -> None:
    model = tiny(stem=stem, bn_size=bn_size, drop_rate=0.25, transition_pool=pool)
    made = calls(model, images(2, 3, 33, 34).float())
    convs = [name for name, *_ in made if ".conv" in name]
    inside = [name for name in convs if "dense" in name or "transition" in name]
    assert len(inside) == (2 if bn_size else 1) * 6 + 2
    assert follow(made) == inside
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in dropouts].count(0.25) == len(inside)
    assert len(dropouts) == len(inside) + 1  # the head's, which is off
    assert model.classifier_drop.p == 0


def test_no_dropout_where_the_rate_is_zero() -> None:
    dropouts = [m for m in tiny().modules() if isinstance(m, nn.Dropout | DropPath)]
    assert [m.p for m in dropouts] == [0]


def test_fc_densenet_drops_in_blocks_and_on_the_way_down() -> None:
    model = FCDenseNet(
        growth_rate=2,
        down_blocks=(1, 2),
        bottleneck_layers=2,
        up_blocks=(2, 1),
        num_init_features=3,
    )
    made = calls(model, images(2, 3, 9, 8).float())
    convs = [name for name, *_ in made if "drop" not in name and "pool" not in name]
    expected = [name for name in convs if "denselayer" in name or name.endswith("transition.conv")]
    assert len(expected) == 1 + 2 + 2 + 2 + 1 + 2
    assert follow(made) == expected
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}


def test_dropout_of_the_head_is_before_the_classifier_alone() -> None:
    model = randomized(tiny(classifier_drop_rate=0.5, num_classes=4, activation="silu"))
    made = calls(model, images(40, 3, 29, 29))
    assert [name for name, *_ in made if "drop" in name] == ["classifier_drop"]
    (_, pooled, dropped), (name, given, _) = made[-2:]
    assert (name, given is dropped) == ("classifier", True)
    assert (pooled != 0).all()
    assert_share((dropped == 0).float(), 0.5)
    assert_equal(dropped[dropped != 0], 2 * pooled[dropped != 0])


def assert_share(hits: Tensor, share: float) -> None:
    """As many as a share says, within 5 standard errors."""
    assert abs(hits.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / hits.numel())


@pytest.mark.parametrize(
    "options",
    [{"drop_rate": 0.4}, {"classifier_drop_rate": 0.4}, {"drop_path_rate": 0.4}],
    ids=lambda options: next(iter(options)),
)
def test_in_eval_mode_nothing_is_dropped(options: dict[str, Any]) -> None:
    plain, dropping = randomized(tiny(num_classes=4)), tiny(num_classes=4, **options).double()
    dropping.load_state_dict(plain.state_dict())  # the same keys
    x = images(3, 3, 29, 31)
    assert_equal(dropping.eval()(x), plain.eval()(x))
    torch.manual_seed(0)
    first, second = dropping.train()(x), dropping(x)
    assert not torch.allclose(first, second)


def test_a_dense_layer_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = tiny(bn_size=None, drop_rate=0.3).double()
    layer = model.features.denseblock1.denselayer2
    x = images(8, 13, 20, 20)
    whole = layer.conv1(layer.relu1(layer.norm1(x)))
    y = layer.train()(x)
    assert_share((y == 0).float(), 0.3)
    assert_equal(y[y != 0], whole[y != 0] / 0.7)


# --- Stochastic depth. ---


@pytest.mark.parametrize("rate", [0.2, 0.75])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_drop_path_zeroes_whole_images_and_scales_the_others(
    size: tuple[int, ...], rate: float
) -> None:
    torch.manual_seed(0)
    x = images(4000, 2, *size)
    y = DropPath(rate).train()(x)
    dropped = (y == 0).flatten(1).all(1)
    assert_share(dropped.float(), rate)
    assert_equal(y, torch.where(dropped.reshape(-1, *[1] * (x.dim() - 1)), 0, x / (1 - rate)))


def test_drop_path_in_eval_mode_or_at_zero_hands_on_its_input() -> None:
    x = images(3, 2, 4)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_gradients_flow_through_the_images_kept() -> None:
    torch.manual_seed(0)
    x = images(50, 2, 3).requires_grad_()
    y = DropPath(0.6).train()(x)
    y.sum().backward()
    kept = (y != 0).double()
    assert 0 < kept.mean() < 1
    assert_equal(x.grad, kept / 0.4)


@pytest.mark.parametrize("bn_size", [None, 2])
@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_rates_grow_linearly_up_to_the_last_layers(bn_size: int | None, rate: float) -> None:
    model = tiny(drop_path_rate=rate, bn_size=bn_size, drop_rate=0.1)
    layers = [m for name, m in model.named_modules() if name.split(".")[-1][:10] == "denselayer"]
    assert len(layers) == 6
    last = [list(layer.children())[-1] for layer in layers]  # after dropout: the last of all
    assert all(isinstance(m, DropPath) for m in last)
    assert [m.drop_rate for m in last] == pytest.approx([rate * i / 6 for i in range(1, 7)])
    assert sum(isinstance(m, DropPath) for m in model.modules()) == 6
    assert last[-1].drop_rate == rate
    assert f"drop_rate={rate:g}" in str(last[-1])


def test_a_layer_dropped_adds_maps_of_zeros() -> None:
    torch.manual_seed(1)
    model: DenseNet = randomized(tiny(block_config=(3,), drop_path_rate=0.6, stem="small"))
    block = model.features.denseblock1
    x = images(200, 10, 3, 3)
    y = block.train()(x)
    assert torch.equal(y[:, :10], x)
    for i, rate in enumerate((0.2, 0.4, 0.6)):
        new = y[:, 10 + 3 * i : 13 + 3 * i]
        dropped = (new == 0).flatten(1).all(1)
        assert_share(dropped.float(), rate)
        assert ((new != 0).flatten(1).all(1) | dropped).all()
    # Later layers read the zeros: the running mean of the next norm is that of what they saw.
    seen = state(block)["denselayer3.norm1.running_mean"]
    fresh = randomized(tiny(block_config=(3,), stem="small"))
    start = state(fresh.features.denseblock1)["denselayer3.norm1.running_mean"]
    assert_equal(seen, 0.9 * start + 0.1 * y[:, :16].detach().mean((0, 2, 3)))


def test_parts_make_no_dropout_at_zero() -> None:
    assert Parts().make_dropout() is None
    dropout = Parts(drop_rate=0.2).make_dropout()
    assert isinstance(dropout, nn.Dropout)
    assert not dropout.inplace
