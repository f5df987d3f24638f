"""The stem that begins with the images, in plain PyTorch kernels, and where it is chosen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from block_cases import EVAL, NormCase, assert_same, outcome, storages
from block_oracle import fresh, named
from image_stem_cases import CASES, Case, build, call, gradient, oracle, run
from torch import Tensor, nn

from densely.fused import backend, image_stem, kernels, plain, restore
from densely.models.registry import build_model

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_equals_the_oracle_as_plain_does(case: Case) -> None:
    tree, grad = build(case), gradient(case)
    expected = oracle(case, tree, grad)
    assert_same(run(plain, case, tree, grad), expected)
    assert_same(run(image_stem, case, tree, grad), expected)


def test_equals_the_oracle_in_any_layout() -> None:
    case = CASES["colour"]
    tree, grad = build(case), gradient(case)
    expected = oracle(case, tree, grad)
    wide = torch.stack((tree.x, tree.x + 1), dim=-1)
    for images in (tree.x.to(memory_format=torch.channels_last), wide[..., 0]):
        assert_same(run(image_stem, case, tree._replace(x=images), grad), expected)


@pytest.mark.parametrize(
    ("shape", "norm", "has"),
    [
        ((2, 1, 7, 7), NormCase(), True), ((1, 1, 7, 7), NormCase(), False),
        ((1, 1, 7, 7), EVAL, True), ((1, 1, 8, 7), NormCase(), False),
        ((1, 1, 9, 7), NormCase(), True), ((2, 1, 6, 7), EVAL, False),
    ],
)  # fmt: skip
def test_places_and_images_together_are_the_batch(
    shape: tuple[int, ...], norm: NormCase, has: bool
) -> None:
    """A window of 7 by 7 with stride 2 and no padding; one value a channel is no batch."""
    tree = build(Case(shape, pad=(0, 0), norm=norm))
    assert backend._one_or_more(tree.x, tree.layers.conv, tree.layers.norm) is has


@pytest.mark.parametrize("name", ["grey", "eval"])
def test_without_gradients_the_output_is_the_same(name: str) -> None:
    case = CASES[name]
    tree = build(case)
    expected = call(image_stem, case, fresh(tree))
    with torch.no_grad():
        assert torch.equal(call(image_stem, case, fresh(tree)), expected)


@pytest.mark.parametrize("name", ["bias", "eval"])
def test_gradients_of_gradients_equal_those_of_plain(name: str) -> None:
    case = CASES[name]
    found = []
    for module in (plain, image_stem):
        tree, grad = fresh(build(case)), gradient(case)
        learnt = [t for t in named(tree).values() if t.requires_grad]
        first = torch.autograd.grad(call(module, case, tree), learnt, grad, create_graph=True)
        of_them = sum((g * torch.linspace(1, 2, g.numel()).view_as(g)).sum() for g in first)
        found.append(torch.autograd.grad(of_them, learnt, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_is_kept_is_the_images_and_little_more() -> None:
    """Plain PyTorch keeps what the convolution makes, here 16 times the images, and more."""
    case = Case((4, 1, 64, 64), out=64)
    tree = build(case, torch.float32)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none):
        call(image_stem, case, tree)
    owned = storages(named(tree.layers).values())
    kept = sum(size for at, size in storages(packed).items() if at not in owned)
    assert kept <= 4 * (4 * 70 * 70 + 4 * 64) + 4 * 64 * 16 * 16  # where each maximum was


def test_compiles_to_the_same() -> None:
    torch._dynamo.reset()
    case = CASES["bias"]
    tree, grad = build(case, torch.float32), gradient(case, torch.float32)
    compiled = torch.compile(
        lambda tree: call(image_stem, case, tree), fullgraph=True, backend="aot_eager"
    )
    copy = fresh(tree)
    got = outcome(compiled(copy), copy, grad)
    assert_same(got, run(image_stem, case, tree, grad), 1e-5)


# Where it is chosen.


@contextmanager
def willing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As if the kernels made the first convolution again, as on GPUs; which stems ran, by name."""
    ran: list[str] = []

    def noted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object) -> object:
            ran.append(name)
            return function(*args)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(backend, "makes_image_stem", lambda *_: True)
        patch.setattr(backend, "fused_image_stem", noted("whole", image_stem.image_stem))
        patch.setattr(backend.companions, "stem", noted("stem", backend.companions.stem))
        yield ran


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return build_model("d2l", num_classes=3, in_channels=1, block_config=(1, 1)).features  # type: ignore[return-value]


def images(requires_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 1, 32, 32, requires_grad=requires_grad)


def test_a_net_runs_it_where_the_kernels_are_willing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = net()
    expected = features(images())
    with willing(monkeypatch) as ran:
        got = features(images())
        with torch.autocast("cpu", torch.bfloat16):
            assert features(images()).dtype == torch.bfloat16
    assert ran == ["whole", "whole"]
    assert torch.allclose(got, expected, atol=1e-5)


def test_only_16_bits_on_gpus_are_made_again() -> None:
    class OnGpu(NamedTuple):
        device: torch.device = torch.device("cuda")

    weights = {"grey": (64, 1, 7, 7), "colour": (64, 3, 7, 7), "3D": (64, 1, 3, 3, 3)}
    found = [
        (kind, dtype)
        for kind, shape in weights.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        if kernels.makes_image_stem(OnGpu(), dtype, torch.ones(shape))  # type: ignore[arg-type]
    ]
    assert found == [("grey", torch.bfloat16), ("grey", torch.float16)]
    assert not kernels.makes_image_stem(images(), torch.bfloat16, torch.ones(64, 1, 7, 7))


@pytest.mark.parametrize(
    ("size", "pad", "error"), [(2, 3, ValueError), (5, 0, RuntimeError), (3, 0, RuntimeError)]
)
def test_what_plain_refuses_is_refused(
    monkeypatch: pytest.MonkeyPatch, size: int, pad: int, error: type[Exception]
) -> None:
    """One value a channel for a norm of the batch; images smaller than the window."""
    case = Case((1, 1, size, size), pad=(pad, pad))
    tree = build(case, torch.float32)
    with willing(monkeypatch) as ran:
        for module in (plain, backend):
            with pytest.raises(error) as raised:
                call(module, case, tree)
            assert "zero" not in str(raised.value)
    assert "whole" not in ran


def test_images_that_ask_for_a_gradient_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, asking = net(), images(requires_grad=True)
    with willing(monkeypatch) as ran:
        features(asking).sum().backward()
    assert ran == ["stem"]
    assert asking.grad is not None


def test_a_watched_or_unusual_convolution_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    features = net()
    seen: list[torch.Size] = []
    handle = features.conv0.register_forward_hook(lambda *args: seen.append(args[2].shape))  # type: ignore[union-attr,operator]
    with willing(monkeypatch) as ran:
        features(images())
        handle.remove()
        features.conv0.padding_mode = "circular"
        features(images())
    assert ran == ["stem", "stem"]
    assert seen == [(2, 64, 16, 16)]


def test_running_statistics_are_those_of_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bias of the convolution in the mean, and N / (N - 1) of what it makes."""
    ours, theirs = net(), net()
    restore(theirs)
    with willing(monkeypatch) as ran:
        ours(images())
    theirs(images())
    assert ran == ["whole"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(ours.norm0, name), getattr(theirs.norm0, name), atol=1e-6)


def test_bias_before_the_norm_of_a_batch_has_no_gradient() -> None:
    for norm, zero in ((CASES["bias"].norm, True), (EVAL, False)):
        case = Case(bias=True, norm=norm)
        found = run(image_stem, case, build(case), gradient(case)).grads["conv.bias"]
        assert np.any(found) != zero
