"""Heat maps: known sums, oracles by others' code and by hand, and the sanity checks of Adebayo."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from explained_nets import CASES, images, resnet, shuffled, timm, tiny, torchvision
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

import densely
from densely.data import load_data
from densely.errors import ConfigError, DataError, ShapeError
from densely.evaluation import heat_maps
from densely.evaluation.anatomy import read
from densely.evaluation.heat_maps import CHUNK, METHODS, explain

EVERYWHERE = [("cam", None), ("gradcam", 1), ("gradcam++", 1), ("integrated_gradients", None)]


def of_target(found: Tensor, targets: Tensor) -> Tensor:
    return found.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_a_cam_and_the_bias_sum_up_to_the_logit(name: str) -> None:
    case = CASES[name]
    model = shuffled(case.make())
    found = explain(model, images(3, *case.shape), method="cam")
    classifier = read(model).classifier
    sums = found.maps.double().flatten(1).sum(dim=1) + classifier.bias[found.targets]
    torch.testing.assert_close(sums, of_target(found.logits, found.targets), rtol=1e-6, atol=1e-6)
    assert found.maps.dtype == torch.float32
    assert torch.equal(found.targets, found.logits.argmax(dim=1))
    torch.testing.assert_close(found.logits, read(model.eval()).logits(images(3, *case.shape)))


@pytest.mark.parametrize("name", CASES)
def test_gradcam_at_the_last_level_is_the_positive_part_of_cam(name: str) -> None:
    case = CASES[name]
    model, x = shuffled(case.make()), images(3, *case.shape)
    cam = explain(model, x, [4, 0, 2], "cam")
    gradcam = explain(model, x, [4, 0, 2], "gradcam", case.levels)
    torch.testing.assert_close(gradcam.maps, cam.maps.relu(), rtol=1e-6, atol=1e-7)
    assert cam.maps.max() > 0
    assert name == "ResNet" or cam.maps.min() < 0


def gradient_by_differences(model: nn.Module, maps: Tensor, level: int, target: int) -> NDArray:
    """d logit / d maps of one image, two runs of the network above for each value."""
    anatomy, step = read(model), 1e-6
    steps = step * torch.eye(maps.numel(), dtype=torch.float64).view(-1, *maps.shape)
    with torch.no_grad():
        up, down = (anatomy.continue_from(maps + s, level)[:, target] for s in (steps, -steps))
    return ((up - down) / (2 * step)).view(maps.shape).numpy()


def plus_plus_by_hand(maps: NDArray, gradient: NDArray) -> NDArray:
    """Chattopadhay et al., as the paper writes it, one channel after the other."""
    heat = np.zeros(maps.shape[1:])
    for a, g in zip(maps, gradient, strict=True):
        divisor = 2 * g**2 + a.sum() * g**3
        alpha = np.divide(g**2, divisor, out=np.zeros_like(g), where=divisor != 0)
        heat += (alpha * np.maximum(g, 0)).sum() * a
    return np.maximum(heat, 0)


@pytest.mark.parametrize("level", [1, 2])
def test_both_gradcams_follow_the_papers_with_gradients_by_differences(level: int) -> None:
    model = shuffled(tiny(activation="gelu" if level == 1 else "relu"), seed=4).eval()
    x, targets = images(1, 3, 8, 6).expand(5, -1, -1, -1), range(5)
    with torch.no_grad():
        maps = read(model).maps(x[:1], level)[0]
    ours, plus = (explain(model, x, targets, m, level).maps.numpy() for m in METHODS[1:3])
    drawn = 0
    for target in targets:
        gradient = gradient_by_differences(model, maps, level, target)
        weights = gradient.mean(axis=(1, 2))
        wanted = np.maximum(np.einsum("k,khw->hw", weights, maps.numpy()), 0)
        wanted_plus = plus_plus_by_hand(maps.numpy(), gradient)
        for heat, found in ((wanted, ours[target]), (wanted_plus, plus[target])):
            np.testing.assert_allclose(found, heat, rtol=0, atol=1e-5 * heat.max() + 1e-9)
            drawn += heat.max() > 1e-4
    assert drawn >= 7  # of 10: few are zero everywhere


def test_the_fused_blocks_are_differentiated_as_captum_does_the_plain_ones() -> None:
    attr = pytest.importorskip("captum.attr")
    model = shuffled(tiny(block_config=(2, 2, 2))).eval()
    plain = copy.deepcopy(model)
    densely.restore(plain)
    x, targets = images(8, 3, 16, 12), torch.arange(8) % 5
    block = model.features.denseblock3
    before = block._densely_calls.densely
    for level in (1, 2):
        layer = plain.features.get_submodule(f"denseblock{level}")
        oracle = attr.LayerGradCam(plain, layer).attribute(x, targets, relu_attributions=True)
        wanted = oracle[:, 0].detach()
        found = explain(model, x, targets, "gradcam", level)
        for ours, captums in zip(found.maps.double(), wanted, strict=True):
            assert (ours - captums).abs().max() <= 1e-6 * captums.max()
        assert ((wanted > 0).flatten(1).any(dim=1)).sum() >= 5
    # The fused code in all calls: twice to check the network, once with a gradient.
    assert (block._densely_calls.densely - before, block._densely_calls.plain) == (6, 0)


def test_integrated_gradients_sum_up_to_what_the_image_adds(digits_run: Path) -> None:
    pytest.importorskip("captum")
    classifier = densely.load(digits_run, precision="float32")
    x = classifier.preprocessing(load_data("digits").test.images[:40])
    found = explain(classifier.model, x, method="integrated_gradients")
    assert found.maps.shape == (40, 8, 8)
    assert found.level is None
    nothing = explain(classifier.model, torch.zeros_like(x)).logits
    added = of_target(found.logits, found.targets) - of_target(nothing, found.targets)
    missing = found.maps.flatten(1).sum(dim=1) - added
    assert missing.abs().sum() < 0.03 * added.abs().sum()
    assert added.abs().mean() > 1


@pytest.mark.parametrize(("method", "level"), EVERYWHERE)
def test_nothing_of_the_network_changes(method: str, level: int | None) -> None:
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    model = tiny()
    model.features.denseblock1.eval()  # a mixture, as where a part is frozen
    model.features.conv0.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    state = copy.deepcopy(model.state_dict())
    before = [(m.training, len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
    learning = [p.requires_grad for p in model.parameters()]
    x = torch.randn(2, 3, 9, 9)
    given = x.clone()
    found = explain(model, x, 1, method, level)
    after = [(m.training, len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
    assert after == before
    assert [p.requires_grad for p in model.parameters()] == learning
    assert {key for key, p in model.named_parameters() if p.grad is not None} == {
        "classifier.weight"
    }
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert x.grad is None
    assert not any(t.requires_grad for t in (found.maps, found.logits, found.targets))


def test_modes_are_put_back_after_an_error() -> None:
    model = tiny().train()
    with pytest.raises(ShapeError, match="expected"):
        explain(model, torch.zeros(1, 4, 9, 9))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("method", "level"), EVERYWHERE)
def test_where_it_is_called_from_makes_no_difference(method: str, level: int | None) -> None:
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    model, x = tiny().eval(), torch.randn(2, 3, 9, 9)
    wanted = explain(model, x, 1, method, level)
    with torch.inference_mode():
        inside = explain(model, x.clone(), 1, method, level).maps
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(explain(model, x, 1, method, level).maps, wanted.maps)
    assert torch.equal(inside, wanted.maps)
    assert torch.equal(explain(model, x.double(), 1, method, level).logits, wanted.logits)


@pytest.mark.parametrize("make", [torchvision, timm])
@pytest.mark.parametrize(("method", "level"), EVERYWHERE[1:])
def test_checkpointed_layers_are_differentiated(
    make: type[nn.Module], method: str, level: int | None
) -> None:
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    model, frugal = (shuffled(make(memory_efficient=flag)) for flag in (False, True))
    x = images(1, 3, 64, 64).expand(5, -1, -1, -1)
    maps = [explain(m, x, range(5), method, level).maps for m in (model, frugal)]
    assert torch.equal(*maps)
    assert maps[0].abs().max() > 0


def test_large_batches_are_computed_in_chunks() -> None:
    model = shuffled(tiny(block_config=(1, 1)))
    x = images(CHUNK + 3, 3, 6, 6)
    targets = torch.arange(CHUNK + 3) % 5
    sizes = []

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(len(inputs[0]))

    together = explain(model, x, targets, "gradcam++", 1)
    with model.features.transition1.register_forward_pre_hook(record):
        explain(model, x, targets, "gradcam++", 1)
    assert max(sizes) == CHUNK
    for i in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        alone = explain(model, x[i : i + 1], int(targets[i]), "gradcam++", 1)
        torch.testing.assert_close(together.maps[i : i + 1], alone.maps)
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits)
    assert torch.equal(together.targets, targets)


@pytest.mark.parametrize("shape", [(3, 14), (3, 12, 10), (3, 6, 8, 7)])
def test_maps_are_resized_in_any_dimensions(shape: tuple[int, ...]) -> None:
    model = shuffled(tiny(spatial_dims=len(shape) - 1))
    found = explain(model, images(2, *shape))
    assert torch.equal(found.resized(found.maps.shape[1:]), found.maps)
    larger = found.resized(shape[1:])
    assert larger.shape == (2, *shape[1:])
    twice = found.resized([2 * size for size in found.maps.shape[1:]])
    for axis in range(len(shape) - 1, 0, -1):  # the mean of two neighbours is the place itself...
        twice = twice.unflatten(axis, (-1, 2)).mean(dim=axis + 1)
    inner = (slice(None), *[slice(1, -1)] * (len(shape) - 1))
    smooth = found.maps
    for axis in range(1, len(shape)):  # ... with an eighth of each neighbour
        rolled = [smooth.roll(s, axis) for s in (-1, 1)]
        smooth = 0.75 * smooth + 0.125 * (rolled[0] + rolled[1])
    torch.testing.assert_close(twice[inner], smooth[inner])
    with pytest.raises(ConfigError, match=f"must be {len(shape) - 1} whole numbers"):
        found.resized([2] * len(shape))


def randomized(model: nn.Module, *parts: str) -> nn.Module:
    """The network with the weights of some of its parts put in another order."""
    generator = torch.Generator().manual_seed(3)
    copied = copy.deepcopy(model)
    for key, value in copied.named_parameters():
        if key.startswith(parts):
            shuffled = value.data.flatten()[torch.randperm(value.numel(), generator=generator)]
            value.data.copy_(shuffled.view_as(value))
    return copied


def mean_rank_correlation(first: Tensor, second: Tensor) -> float:
    found = []
    for a, b in zip(first.flatten(1).numpy(), second.flatten(1).numpy(), strict=True):
        if np.ptp(a) > 0:  # else there is nothing to rank
            found.append(spearmanr(a, b).statistic if np.ptp(b) > 0 else 0.0)
    assert len(found) > len(first) / 2
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("method", "level"),
    [("cam", 3), ("gradcam", 3), ("gradcam", 1), ("gradcam++", 1), ("integrated_gradients", None)],
)
def test_maps_depend_on_the_weights(digits_run: Path, method: str, level: int | None) -> None:
    """Cascading randomisation from the top down: Adebayo et al. (2018), section 3."""
    if method == "integrated_gradients":
        pytest.importorskip("captum")
    classifier = densely.load(digits_run, precision="float32")
    model = classifier.model
    x = classifier.preprocessing(load_data("digits").test.images[: 30 if level else 15])
    trained = explain(model, x, None, method, level)

    def correlation(*parts: str) -> float:
        other = explain(randomized(model, *parts), x, trained.targets, method, level)
        return mean_rank_correlation(trained.maps, other.maps)

    assert correlation("nothing") == pytest.approx(1)
    assert abs(correlation("classifier")) < 0.4
    assert abs(correlation("")) < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 5}, r"target=5: must be a class from 0 to 4"),
        ({"target": -1}, r"target=-1: must be a class from 0 to 4"),
        ({"target": [0, 5]}, r"target=\[0, 5\]: must be a class from 0 to 4"),
        ({"target": [0, 1, 2]}, r"or a list of 2, one for each image"),
        ({"target": torch.tensor([[0, 1]])}, r"or a list of 2"),
        ({"target": 1.5}, r"target=1\.5: must be a class"),
        ({"target": True}, r"target=True: must be a class"),
        ({"target": "boot"}, r"target=boot: must be a class"),
        ({"method": "grad-cam"}, "unknown method 'grad-cam'; did you mean gradcam"),
        ({"level": 1}, "level=1: cam weighs .* at level 2; take gradcam"),
        ({"method": "gradcam", "level": 3}, "level=3: must be a block from 1 to 2"),
        ({"method": "gradcam", "level": 0}, "level=0: must be a block from 1 to 2"),
        ({"method": "integrated_gradients", "level": 2}, "level=2: integrated gradients are of"),
    ],
)
def test_what_is_out_of_range_is_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(tiny(), torch.zeros(2, 3, 9, 9), **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), r"x is torch\.uint8 \[2, 3, 9, 9\]: explain"),
        (torch.zeros(0, 3, 9, 9), "at least one image"),
        (torch.zeros(3, 9), "explain takes a batch"),
        (np.zeros((2, 3, 9, 9)), "x is ndarray"),
    ],
)
def test_what_is_no_batch_is_refused(x: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        explain(tiny(), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_an_error(value: float) -> None:
    x = torch.zeros(3, 3, 9, 9)
    x[1, 0, 4, 4] = value
    for start in (0, 1):  # whether the first image, on which the network is checked, is well or not
        with pytest.raises(DataError, match=rf"x\[{1 - start}\]: the network's outputs are not"):
            explain(tiny(), x[start:], method="gradcam")


def test_captum_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r'need captum: pip install "densely\[explain\]"'):
        explain(tiny(), torch.zeros(1, 3, 9, 9), method="integrated_gradients")


def test_a_network_that_is_not_what_it_seems_is_refused() -> None:
    model = resnet()
    model.forward = lambda x: torch.zeros(len(x), 5) + x.mean()
    with pytest.raises(ConfigError, match="not those of its parts in turn"):
        explain(model, torch.ones(1, 3, 40, 32))


def test_a_divisor_of_zero_counts_as_no_weight() -> None:
    """Where the gradient times the sum of the map is -2 the paper's ratio is without a value."""
    maps = torch.tensor([[[1.0, 1.0]]])
    gradient = torch.tensor([[[-1.0, 3.0]]])
    assert heat_maps._plus_plus(maps, gradient).tolist() == [[pytest.approx(3 / 8)]]
