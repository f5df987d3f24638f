"""The same function as the real packages: outputs, gradients and running statistics in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packages_nets as foreign
import pytest
import torch
from torch import Tensor, nn

from densely.models import DenseNet
from densely.weights import load_weights, save_weights
from densely.weights.dialects import ALIASES, DIALECTS, OURS, candidates
from densely.weights.translate import places_of

# Keras's own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Made = Callable[[], nn.Module]
PACKAGES: dict[str, tuple[Made, str, dict[str, Any]]] = {
    "torchvision": (foreign.torchvision, "torchvision", {}),
    "timm": (foreign.timm, "torchvision", {}),
    "timm, deep stem": (lambda: foreign.timm("deep"), "torchvision", {"stem": "deep"}),
    "monai 1d": (lambda: foreign.monai(1), "monai", {"spatial_dims": 1}),
    "monai 2d": (lambda: foreign.monai(2), "monai", {}),
    "monai 3d": (lambda: foreign.monai(3), "monai", {"spatial_dims": 3}),
}


def ours(growth_rate: int = 8, num_init_features: int = 16, **options: Any) -> DenseNet:
    return DenseNet(
        growth_rate=growth_rate,
        block_config=foreign.CONFIG,
        num_init_features=num_init_features,
        num_classes=foreign.CLASSES,
        **options,
    ).double()


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits in train mode, the input's gradient, the parameters' gradients."""
    x = x.clone().requires_grad_()
    logits = model.train()(x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=x.dtype).view_as(logits)
    (logits * weights).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), x.grad, gradients


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def near(single: Tensor, double: Tensor, share: float = 1e-5) -> None:
    """Float32 within `share` of float64, as a whole: single values near zero may be off more."""
    assert (single.double() - double).norm() <= share * double.norm()


@pytest.mark.parametrize("package", PACKAGES)
def test_same_function_as_the_package(package: str, tmp_path: Path) -> None:
    make, dialect, options = PACKAGES[package]
    theirs = make()
    dims = options.get("spatial_dims", 2)
    x = foreign.images(dims, 33 if dims == 3 else 40)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = ours(**options)
    report = load_weights(model, tmp_path / "theirs.pth")
    assert report.dialect == dialect
    assert report.loaded == len(theirs.state_dict())
    assert (report.skipped, report.ignored, report.notes) == ((), (), ())
    with torch.no_grad():
        close(model.eval()(x), theirs.eval()(x))

    logits, grad, gradients = step(model, x)
    their_logits, their_grad, their_gradients = step(theirs, x)
    close(logits, their_logits)
    close(grad, their_grad)
    mine, others = model.state_dict(), theirs.state_dict()
    own, foreigners = places_of(mine), places_of(others)
    assert own is not None
    assert foreigners is not None
    assert own.keys() == foreigners.keys()
    for place, key in own.items():
        close(mine[key], others[foreigners[place]])
        if key in gradients:
            close(gradients[key], their_gradients[foreigners[place]])

    # And back: the package takes what densely writes.
    save_weights(model, tmp_path / "ours.pth", dialect)
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    with torch.no_grad():
        close(theirs.eval()(x), model.eval()(x))


@pytest.mark.parametrize("ending", [".h5", ".weights.h5"])
def test_same_function_as_keras(ending: str, tmp_path: Path) -> None:
    theirs = foreign.keras()
    x = foreign.images()
    path = tmp_path / f"theirs{ending}"
    if ending == ".h5":
        legacy = __import__("keras.src.legacy.saving.legacy_h5_format", fromlist=["x"])
        import h5py

        with h5py.File(path, "w") as file:
            legacy.save_weights_to_hdf5_group(file, theirs)
    else:
        theirs.save_weights(path)
    model = ours(growth_rate=32, num_init_features=64)
    report = load_weights(model, path)
    assert report.dialect == "keras"
    assert "epsilon of the norms set to the source's, 1.001e-05" in report.notes
    channels_last = x.float().movedim(1, -1)
    with torch.no_grad():
        near(theirs(channels_last, training=False), model.eval()(x))

    # Training: Keras moves its running statistics by 1 in 100, and by the biased variance.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, _, single = step(copy.deepcopy(model).float(), x.float())
    logits, _, gradients = step(model, x)
    their_logits = theirs(channels_last, training=True)
    near(their_logits.detach(), logits)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (their_logits * weights).sum().backward()
    places = places_of(model.state_dict())
    assert places is not None
    keras = DIALECTS["keras"]
    variables = {f"{layer.name}/{v.name}": v for layer in theirs.layers for v in layer.weights}
    side = {"stem": 20, 1: 10, 2: 5, 3: 2, 4: 1, "final": 1}
    compared = {"gradient": 0, "running_mean": 0, "running_var": 0}
    after = model.state_dict()
    for place, key in places.items():
        name = keras.name_of(place)
        if name is None:
            continue
        value = variables[name].value
        if place.variable in ("running_mean", "running_var"):
            moved = after[key] - 0.99 * before[key]
            if place.variable == "running_var":  # PyTorch's is unbiased: n / (n - 1)
                n = 3 * side[place.block or place.kind] ** 2
                moved = moved * (n - 1) / n
            near(value.detach() - 0.99 * before[key], moved, 1e-3)
            compared[place.variable] += 1
        else:
            assert value.grad is not None
            # Where terms cancel, as far off as PyTorch's float32 is, times 10.
            slack = 10 * (single[key].double() - gradients[key]).norm()
            off = keras.to_torch(place, value.grad).double() - gradients[key]
            assert off.norm() <= 1e-3 * gradients[key].norm() + slack, key
            compared["gradient"] += 1
    assert min(compared.values()) > 20

    # And back, both layouts.
    save_weights(model.float(), tmp_path / f"ours{ending}", "keras")
    theirs.load_weights(tmp_path / f"ours{ending}")
    with torch.no_grad():
        near(theirs(channels_last, training=False), model.double().eval()(x))


@pytest.mark.parametrize("dialect", [*DIALECTS, *ALIASES])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_round_trip_is_bit_identical(dialect: str, ending: str, tmp_path: Path) -> None:
    small = dialect in ("andreasveit", "bamos")  # whose nets have no norm in the stem
    model = foreign.randomised(ours(stem="small" if small else "large")).float()
    path = tmp_path / f"x{'.h5' if dialect == 'keras' else ending}"
    if dialect == "keras":
        pytest.importorskip("h5py")
    save_weights(model, path, dialect)
    again = ours(stem="small" if small else "large").float()
    report = load_weights(again, path)
    assert report.dialect == ALIASES.get(dialect, dialect)
    loaded = again.state_dict()
    for key, value in model.state_dict().items():
        if dialect == "keras" and key.endswith("num_batches_tracked"):
            assert loaded[key] == 0  # Keras counts no batches: said in the report
            continue
        assert torch.equal(loaded[key], value), key
    second = tmp_path / f"y{path.suffix}"
    save_weights(again, second, dialect)
    if ending == ".safetensors" and dialect != "keras":
        assert second.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", DIALECTS)
def test_names_and_places_are_each_others_inverse(name: str) -> None:
    dialect = DIALECTS[name]
    keys = list(ours().state_dict()) + list(ours(stem="deep").state_dict())
    named = 0
    for key in keys:
        place = OURS.place_of(key)
        assert place is not None
        theirs = dialect.name_of(place)
        if theirs is not None:
            assert dialect.place_of(theirs) == place
            named += 1
    assert named > 100


@pytest.mark.parametrize(
    "key",
    [
        "features.denseblock01.denselayer1.norm1.weight",
        "features.denseblock١.denselayer1.norm1.weight",
        "features.denseblock1.denselayer1.norm3.weight",
        "features.denseblock1.denselayer1.norm1.gamma",
        "features.conv0",
        "",
        "classifier.weight.weight",
    ],
)
def test_other_keys_name_no_place(key: str) -> None:
    assert all(dialect.place_of(key) is None for dialect in DIALECTS.values())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "densenet121.", "backbone.", "module.model.encoder."]
)
def test_prefixes_of_wrappers_are_found(prefix: str) -> None:
    model = foreign.randomised(ours())
    wrapped = {prefix + key: value for key, value in model.state_dict().items()}
    assert candidates(wrapped)[0].prefix == prefix
    again = ours()
    assert load_weights(again, wrapped).prefix == prefix
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_numpy_is_not_needed_to_be_equal() -> None:
    """Transposition of a kernel, by hand: Keras (h, w, in, out), PyTorch (out, in, h, w)."""
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    place = OURS.place_of("features.conv0.weight")
    assert place is not None
    turned = DIALECTS["keras"].to_torch(place, torch.from_numpy(kernel))
    assert np.array_equal(turned.numpy(), kernel.transpose(3, 2, 0, 1))
    assert np.array_equal(DIALECTS["keras"].from_torch(place, turned).numpy(), kernel)
    dense = torch.arange(6).view(2, 3)
    head = OURS.place_of("classifier.weight")
    assert head is not None
    assert torch.equal(DIALECTS["keras"].to_torch(head, dense), dense.T)
