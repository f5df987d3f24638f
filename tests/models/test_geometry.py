"""Strides, dilations and the smallest input, against closed forms and a network without modules."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import references
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import assert_equal, images, pull, randomized, state, step, tiny
from torch import Tensor, nn

from densely.errors import ShapeError
from densely.models import DenseNet
from densely.models.geometry import plan

Strides = Sequence[Sequence[int]]
THICK_SLICES = [(1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 3, 2)]


def sizes(n: int, stem: Sequence[int], transitions: Sequence[int]) -> list[int]:
    """An axis of each block's maps: padded steps of the stem round up, pooling rounds down."""
    for s in stem:
        n = (n - 1) // s + 1 if n > 0 else 0
    found = [n]
    for s in transitions:
        n //= s
        found.append(n)
    return found


def block_shapes(model: DenseNet, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the blocks' outputs, seen by hooks."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        part.register_forward_hook(lambda _module, _args, out: shapes.append(tuple(out.shape[2:])))
        for name, part in model.features.named_children()
        if name.startswith("denseblock")
    ]
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
    for hook in hooks:
        hook.remove()
    return shapes


@st.composite
def geometries(draw: st.DrawFn) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    """Arguments of a network, and an axis each the strides of its stem and its transitions."""
    d, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    stem = draw(st.sampled_from(["large", "small", "deep"]))
    first = 0 if stem == "small" else 2
    steps = first + blocks - 1
    options: dict[str, Any] = {"spatial_dims": d, "stem": stem, "block_config": (1,) * blocks}
    kind = draw(st.sampled_from(["strides", "output_stride", "usual"]))
    strides = [(2,) * d] * steps
    if kind == "strides":
        most = 4 if d == 1 else 3
        one = st.tuples(*[st.integers(1, most)] * d)
        strides = draw(st.lists(one, min_size=steps, max_size=steps))
        options["strides"] = strides
    elif kind == "output_stride":
        pooling = draw(st.integers(0, blocks - 1))
        options["output_stride"] = 2 ** (first + pooling)
        strides = [(2,) * d] * (first + pooling) + [(1,) * d] * (blocks - 1 - pooling)
    axes = [[step[axis] for step in strides] for axis in range(d)]
    return options, [axis[:first] for axis in axes], [axis[first:] for axis in axes]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(geometry=geometries(), more=st.tuples(*[st.integers(0, 5)] * 3))
def test_any_geometry(
    geometry: tuple[dict[str, Any], list[list[int]], list[list[int]]], more: tuple[int, ...]
) -> None:
    options, stems, transitions = geometry
    model = DenseNet(
        growth_rate=1, num_init_features=1, bn_size=None, in_channels=1, num_classes=1, **options
    )
    axes = list(zip(stems, transitions, strict=True))
    products = [
        [math.prod([*stem, *steps[:b]]) for b in range(len(steps) + 1)] for stem, steps in axes
    ]
    assert model.feature_strides == tuple(zip(*products, strict=True))

    # By search: the first size whose last maps are not empty.
    least = tuple(next(n for n in itertools.count(1) if sizes(n, *axis)[-1]) for axis in axes)
    assert model.min_input == least
    assert model.min_image_size == max(least)
    assume(math.prod(least) < 20_000)
    for size in (least, tuple(n + m for n, m in zip(least, more, strict=False))):
        expected = [sizes(n, *axis) for n, axis in zip(size, axes, strict=True)]
        found = block_shapes(model, torch.zeros(1, 1, *size))
        assert found == list(zip(*expected, strict=True))
    for axis in range(len(least)):
        below = [n - (i == axis) for i, n in enumerate(least)]
        with pytest.raises(ShapeError) as error:
            model(torch.zeros(1, 1, *below))
        assert "x".join(map(str, below)) in str(error.value)
        assert "x".join(map(str, least)) in str(error.value)
        with pytest.raises(ShapeError):
            model.forward_features(torch.zeros(1, 1, *below))


@pytest.mark.parametrize(
    ("options", "strides", "size"),
    [
        ({}, THICK_SLICES, (5, 41, 30)),
        ({"stem": "deep", "bias": True}, THICK_SLICES, (4, 38, 27)),
        ({"stem": "small", "bn_size": None}, [(1, 2, 2), (3, 1, 2)], (7, 6, 9)),
        ({"transition_pool": "max"}, [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)], (5, 4, 6)),
    ],
    ids=["large", "deep", "small", "max"],
)
def test_volumes_with_a_stride_for_each_axis(
    options: dict[str, Any], strides: Strides, size: tuple[int, ...]
) -> None:
    model = randomized(
        tiny(spatial_dims=3, in_channels=2, num_classes=4, strides=strides, **options)
    )
    assert_like_reference(model, images(2, 2, *size), strides, options.get("transition_pool"))


@pytest.mark.parametrize("step", [(1.5, 2), (2, True), (2, 0), (2,), "22", 2])
def test_a_step_that_is_no_whole_numbers_from_1_on_is_a_fault(step: Any) -> None:
    _, faults = plan(2, 2, stem_steps=0, strides=[step], output_stride=None)
    assert len(faults) == 1
    assert faults[0].startswith(f"strides={[step]}: ")


@pytest.mark.parametrize(("strides", "size"), [([(4,), (1,), (3,), (2,)], 50), (None, 47)])
def test_signals(strides: Strides | None, size: int) -> None:
    model = randomized(tiny(spatial_dims=1, strides=strides, num_classes=4))
    assert_like_reference(model, images(3, 3, size), strides or [(2,)] * 4)


def assert_like_reference(
    model: DenseNet,
    x: Tensor,
    strides: Strides,
    transition_pool: str | None = None,
    dilations: Sequence[int] | None = None,
) -> None:
    """The same logits, gradients and running statistics, in both modes."""
    for train in (False, True):
        net = {key: value.requires_grad_() for key, value in floats(state(model)).items()}
        leaf, running = x.clone().requires_grad_(), {}
        expected = references.densenet(
            net,
            leaf,
            references.batch_norm(net, train, running),
            strides=strides,
            dilations=dilations,
            transition_pool=transition_pool or "avg",
        )["logits"]
        pull(expected).backward()
        y, gradients, after = step(model, x, train)
        assert_equal(y, expected.detach())
        wanted = {key: value.grad for key, value in net.items() if "running" not in key}
        assert_equal(gradients, wanted | {"x": leaf.grad})
        assert_equal(floats(after), {key: value.detach() for key, value in net.items()} | running)


def floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if value.is_floating_point()}


LARGE = {
    4: ([4, 4, 4, 4], [1, 2, 4, 8]),
    8: ([4, 8, 8, 8], [1, 1, 2, 4]),
    16: ([4, 8, 16, 16], [1, 1, 1, 2]),
    32: ([4, 8, 16, 32], [1, 1, 1, 1]),
    None: ([4, 8, 16, 32], [1, 1, 1, 1]),
}
SMALL = {
    1: ([1, 1, 1, 1], [1, 2, 4, 8]),
    2: ([1, 2, 2, 2], [1, 1, 2, 4]),
    4: ([1, 2, 4, 4], [1, 1, 1, 2]),
    8: ([1, 2, 4, 8], [1, 1, 1, 1]),
}
CASES = [
    *[("large", 2, *case) for case in LARGE.items()],
    *[("deep", 1, *case) for case in LARGE.items() if case[0] == 8],
    *[("small", 2, *case) for case in SMALL.items()],
    *[("small", 3, *case) for case in SMALL.items() if case[0] == 2],
]


@pytest.mark.parametrize(("stem", "spatial_dims", "output_stride", "expected"), CASES)
@pytest.mark.parametrize("bn_size", [None, 2])
def test_output_stride(
    stem: Any,
    spatial_dims: int,
    output_stride: int | None,
    expected: tuple[list[int], list[int]],
    bn_size: int | None,
) -> None:
    strides, dilations = expected
    options: dict[str, Any] = {
        "spatial_dims": spatial_dims,
        "stem": stem,
        "block_config": (1, 2, 1, 1),
        "bn_size": bn_size,
        "num_classes": 3,
    }
    model = tiny(output_stride=output_stride, **options)
    assert model.feature_strides == tuple((s,) * spatial_dims for s in strides)
    for b, dilation in enumerate(dilations, start=1):
        convs = [m for m in layers(model, f"denseblock{b}") if m.kernel_size[0] == 3]
        assert {m.dilation for m in convs} == {(dilation,) * spatial_dims}

    n = 64 if stem != "small" else 16
    side = n if spatial_dims < 3 else 8
    shapes = block_shapes(model, torch.zeros(1, 3, *(side,) * spatial_dims))
    assert shapes == [(side // s,) * spatial_dims for s in strides]

    usual = tiny(**options)
    layout = {key: value.shape for key, value in usual.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == layout

    first = [] if stem == "small" else [2, 2]
    steps = first + [b // a for a, b in itertools.pairwise(strides)]
    x = images(2, 3, *(side // 2 + 3, side // 2, 9)[:spatial_dims])
    assert_like_reference(
        randomized(model), x, [(s,) * spatial_dims for s in steps], dilations=dilations
    )


def layers(model: DenseNet, block: str) -> list[Any]:
    found = [
        m
        for m in model.features.get_submodule(block).modules()
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    assert found
    return found


def test_output_stride_none_starts_with_the_same_weights() -> None:
    weights = []
    for options in ({}, {"output_stride": None}, {"output_stride": 4}, {"strides": [(2, 2)] * 4}):
        torch.manual_seed(0)
        weights.append(state(tiny(**options)))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_dilation_reaches_as_far_as_the_pooling_did() -> None:
    """One pixel moves only what lies a dilation away, and that up to the maps' border."""
    model = tiny(
        stem="small", block_config=(1, 1, 1), output_stride=1, bn_size=None, in_channels=1
    ).double()
    last = randomized(model).eval().features.denseblock3.denselayer1
    x = images(1, last.conv1.in_channels, 13, 13).requires_grad_()
    last(x)[0, :, 6, 6].sum().backward()
    reached = x.grad[0].abs().amax(0).nonzero().tolist()
    assert all(i in (2, 6, 10) and j in (2, 6, 10) for i, j in reached)
    assert len(reached) == 9
