"""DenseNet against the naive NumPy network, torchvision's keys, and inputs that do not fit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import images, randomized, tiny
from torch import Tensor

from densely.errors import ShapeError
from densely.models import DenseNet, build_model

# Each case has a different mix of stem, layer, bias, compression, growth rate and odd sizes.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "plain, small stem": (
        {"growth_rate": 7, "bn_size": None, "stem": "small", "compression": 0.37, "bias": False},
        (15, 21),
    ),
    "plain, small stem, bias": (
        {"growth_rate": 12, "bn_size": None, "stem": "small", "compression": 1.0, "bias": True},
        (13, 8),
    ),
    "plain, large stem, bias": (
        {"growth_rate": 12, "bn_size": None, "stem": "large", "compression": 0.5, "bias": True},
        (37, 45),
    ),
    "bottleneck, large stem": (
        {"growth_rate": 7, "bn_size": 4, "stem": "large", "compression": 0.37, "bias": False},
        (37, 45),
    ),
    "bottleneck, large stem, bias": (
        {"growth_rate": 12, "bn_size": 2, "stem": "large", "compression": 1.0, "bias": True},
        (38, 29),
    ),
    "bottleneck, small stem": (
        {"growth_rate": 12, "bn_size": 4, "stem": "small", "compression": 0.5, "bias": False},
        (17, 11),
    ),
}


def arrays(model: DenseNet) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False, err_msg=what
    )


def assert_matches_oracle(model: DenseNet, x: Tensor, train: bool) -> None:
    before = arrays(model)
    expected, running = oracles.densenet(before, x.numpy(), train=train)
    with torch.no_grad():
        logits = model.train(train)(x.clone())
    assert_close(logits.numpy(), expected, 1e-10, "logits")

    after = arrays(model)
    for key, value in before.items():  # everything but running statistics stays as it was
        tracked = train and key.endswith("num_batches_tracked")
        wanted = running.get(key, value + 1 if tracked else value)
        assert_close(after[key], wanted, 1e-12, key)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("options", "size"), CASES.values(), ids=CASES)
def test_oracle(options: dict[str, Any], size: tuple[int, int], train: bool) -> None:
    model = randomized(tiny(num_classes=5, **options))
    assert_matches_oracle(model, images(2, 3, *size), train)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(
        {
            "growth_rate": st.integers(1, 9),
            "block_config": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
            "num_init_features": st.integers(1, 9),
            "bn_size": st.none() | st.integers(1, 4),
            "compression": st.sampled_from([0.1, 0.37, 0.5, 1.0]),
            "stem": st.sampled_from(["small", "large"]),
            "bias": st.booleans(),
            "in_channels": st.integers(1, 3),
            "num_classes": st.integers(1, 4),
        }
    ),
    batch=st.integers(2, 3),
    height=st.integers(13, 22),
    width=st.integers(13, 22),
    train=st.booleans(),
)
def test_oracle_on_any_small_network(
    options: dict[str, Any], batch: int, height: int, width: int, train: bool
) -> None:
    x = images(batch, options["in_channels"], height, width)
    assert_matches_oracle(randomized(DenseNet(**options)), x, train)


def test_running_statistics_are_updated_once_per_forward_in_train_mode_only() -> None:
    model = randomized(tiny(growth_rate=3, stem="small"))
    expected = arrays(model)
    for seed in (1, 2):
        x = images(3, 3, 9, 9, seed=seed)
        model.train()(x)
        expected |= oracles.densenet(expected, x.numpy(), train=True)[1]
    model.eval()(x)
    for key, value in arrays(model).items():
        wanted = 2 if key.endswith("num_batches_tracked") else expected[key]
        assert_close(value, wanted, 1e-12, key)


@pytest.mark.parametrize(
    "options",
    [
        {"bn_size": None, "stem": "small", "bias": False, "compression": 0.5},
        {"bn_size": 2, "stem": "large", "bias": True, "compression": 0.37},
    ],
    ids=["plain, small stem", "bottleneck, large stem, bias"],
)
def test_gradients_are_the_differences_of_the_oracle(options: dict[str, Any]) -> None:
    model = randomized(
        DenseNet(growth_rate=3, block_config=(2, 1), num_init_features=4, num_classes=3, **options)
    )
    x = images(2, 3, 11, 14).requires_grad_()
    weights = images(2, 3, seed=2)
    at = arrays(model) | {"x": x.detach().numpy()}

    def loss(point: oracles.Arrays) -> float:
        net = {key: value for key, value in point.items() if key != "x"}
        logits, _ = oracles.densenet(net, point["x"], train=True)
        return float((logits * weights.numpy()).sum())

    (model.train()(x) * weights).sum().backward()
    inputs = dict(model.named_parameters()) | {"x": x}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        direction = {key: rng.normal(size=tuple(value.shape)) for key, value in inputs.items()}
        slope = sum(float((inputs[k].grad.numpy() * d).sum()) for k, d in direction.items())
        expected = oracles.directional_derivative(loss, at, direction)
        assert slope == pytest.approx(expected, rel=1e-6)


def channels_last(model: DenseNet, x: Tensor) -> Tensor:
    return model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))


def bf16_autocast(model: DenseNet, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    return logits.float()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("forward", "tolerance"),
    [(channels_last, 1e-5), (bf16_autocast, 0.03)],
    ids=["channels_last", "bf16"],
)
def test_other_layouts_and_precisions_are_near(
    forward: Callable[[DenseNet, Tensor], Tensor], tolerance: float, train: bool
) -> None:
    model = randomized(tiny(growth_rate=8, num_classes=7)).float().train(train)
    x = images(4, 3, 45, 37).float()
    expected, running = oracles.densenet(arrays(model), x.numpy(), train)
    with torch.no_grad():
        logits = forward(model, x).numpy()
    assert np.linalg.norm(logits - expected) < tolerance * np.linalg.norm(expected)
    after = arrays(model)
    for key, value in running.items():
        assert np.linalg.norm(after[key] - value) < tolerance * np.linalg.norm(value), key


def densenet121_layout() -> list[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of torchvision's densenet121, by the rule that makes them."""
    entries: list[tuple[str, tuple[int, ...]]] = []

    def add_conv(name: str, o: int, c: int, k: int) -> None:
        entries.append((f"features.{name}.weight", (o, c, k, k)))

    def add_norm(name: str, c: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            entries.append((f"features.{name}.{part}", (c,)))
        entries.append((f"features.{name}.num_batches_tracked", ()))

    add_conv("conv0", 64, 3, 7)
    add_norm("norm0", 64)
    c = 64
    for b, layers in enumerate([6, 12, 24, 16], 1):
        for i in range(1, layers + 1):
            layer = f"denseblock{b}.denselayer{i}"
            add_norm(f"{layer}.norm1", c)
            add_conv(f"{layer}.conv1", 128, c, 1)
            add_norm(f"{layer}.norm2", 128)
            add_conv(f"{layer}.conv2", 32, 128, 3)
            c += 32
        if b < 4:
            add_norm(f"transition{b}.norm", c)
            add_conv(f"transition{b}.conv", c // 2, c, 1)
            c //= 2
    add_norm("norm5", c)
    return [*entries, ("classifier.weight", (1000, 1024)), ("classifier.bias", (1000,))]


def test_state_dict_is_torchvisions() -> None:
    with torch.device("meta"):
        state = build_model("densenet121").state_dict()
    layout = [(key, tuple(value.shape)) for key, value in state.items()]
    assert layout == densenet121_layout()
    assert len(layout) == 727


@pytest.mark.parametrize(
    ("compression", "kept"),
    [(1.0, (24, 45)), (0.5, (12, 16)), (0.37, (8, 10)), (0.01, (1, 1))],
)
def test_transitions_keep_a_share_of_the_channels_rounded_down(
    compression: float, kept: tuple[int, int]
) -> None:
    # 10 + 2*7 = 24 channels, then kept + 3*7; at least one is kept.
    model = tiny(growth_rate=7, compression=compression)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert (
        shapes["features.transition1.conv.weight"][0],
        shapes["features.transition2.conv.weight"][0],
    ) == kept


LIMITS = [("large", 1, 1), ("large", 2, 5), ("large", 4, 29), ("small", 3, 4), ("small", 4, 8)]


@pytest.mark.parametrize(("stem", "blocks", "limit"), LIMITS)
def test_smallest_image(stem: Any, blocks: int, limit: int) -> None:
    model = DenseNet(growth_rate=2, block_config=(1,) * blocks, num_init_features=2, stem=stem)
    model.eval()
    assert (model.min_image_size, model.min_input) == (limit, (limit, limit))
    assert model(torch.zeros(1, 3, limit, limit)).isfinite().all()
    for height, width in [(limit - 1, limit + 9), (limit + 9, limit - 1)]:
        with pytest.raises(ShapeError) as error:
            model(torch.zeros(1, 3, height, width))
        assert f"{height}x{width}" in str(error.value)
        assert f"{limit}x{limit}" in str(error.value)


@pytest.mark.parametrize(
    "shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (32, 3, 32), (2, 3, 4, 32, 32), (3,)]
)
def test_input_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as error:
        tiny()(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert "[N, 3, H, W]" in str(error.value)


@pytest.mark.parametrize(
    ("spatial_dims", "shape", "expected"),
    [
        (1, (2, 3, 32, 32), "[N, 2, L]"),
        (1, (2, 3, 32), "[N, 2, L]"),
        (3, (2, 2, 32, 32), "[N, 2, D, H, W]"),
        (3, (2, 3, 16, 16, 16), "[N, 2, D, H, W]"),
    ],
)
def test_input_of_another_shape_in_other_dimensions(
    spatial_dims: int, shape: tuple[int, ...], expected: str
) -> None:
    model = tiny(spatial_dims=spatial_dims, in_channels=2)
    with pytest.raises(ShapeError) as error:
        model(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("eps", [1e-3, 1.001e-5, 0.5])
def test_norm_eps(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(tiny(norm_eps=eps, num_classes=5))
    monkeypatch.setattr(oracles, "EPS", eps)
    for train in (False, True):
        assert_matches_oracle(model, images(2, 3, 33, 30), train)
