"""Keras's own reading and writing is the oracle: its files hold what its layers hold."""

import importlib
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from torch import Tensor

from densely.errors import WeightsError
from densely.weights.keras_h5 import read_keras, write_keras
from densely.weights.keras_names import names_by_number

h5py = pytest.importorskip("h5py")

# Keras's own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LAYOUTS = ["x.h5", "x.weights.h5"]


def densenet(seed: int = 0, **options: Any) -> Any:
    """A small DenseNet of keras.applications, each of its variables unlike all others."""
    peers.keras()
    module = importlib.import_module("keras.src.applications.densenet")
    options = {"classes": 5, "classifier_activation": None, **options}
    model = module.DenseNet([2, 1, 1, 2], weights=None, input_shape=(32, 32, 3), **options)
    return randomised(model, seed)


def randomised(model: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    model.set_weights([random.uniform(0.5, 1.5, w.shape).astype("float32") for w in model.weights])
    return model


def held(*models: Any) -> dict[str, Tensor]:
    """What the layers of Keras models hold, by their names."""
    return {
        f"{layer.name}/{variable.name}": torch.from_numpy(variable.numpy().copy())
        for model in models
        for layer in model.layers
        for variable in layer.weights
        if not hasattr(layer, "layers")
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def save(model: Any, path: Path) -> None:
    """As Keras 3 or, for *.h5, as Keras 2 saves weights; "whole.h5" as both save models."""
    legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.name == "whole.h5":
        legacy.save_model_to_hdf5(model, str(path))
    else:
        with h5py.File(path, "w") as file:
            legacy.save_weights_to_hdf5_group(file, model)


def forget_names(path: Path) -> None:
    """What Keras before 3.6 writes: no names of layers."""
    with h5py.File(path, "r+") as file:
        groups: list[Any] = []
        file.visititems(lambda _, found: groups.append(found))
        for group in groups:
            group.attrs.pop("name", None)


@pytest.fixture(scope="module")
def model() -> Any:
    return densenet()


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    for name in [*LAYOUTS, "whole.h5"]:
        save(model, folder / name)
    return folder


@pytest.mark.parametrize("name", [*LAYOUTS, "whole.h5"])
def test_reads_what_keras_writes(model: Any, files: Path, name: str) -> None:
    read = read_keras(files / name)
    assert read["conv2_block1_1_conv/kernel"].shape == (1, 1, 64, 128)
    assert same(read, held(model))


@pytest.mark.parametrize("name", [*LAYOUTS, "whole.h5"])
@pytest.mark.parametrize("frozen", [False, True])
def test_reads_a_densenet_within_a_trained_model(tmp_path: Path, name: str, frozen: bool) -> None:
    keras = peers.keras()
    base = densenet(include_top=False)
    layers = [base, keras.layers.GlobalAveragePooling2D(), keras.layers.Dropout(0.1)]
    outer = keras.Sequential([*layers, keras.layers.Dense(3, name="mine")])
    outer.build((None, 32, 32, 3))
    base.trainable = not frozen
    outer.compile("adam", "mse")
    outer.optimizer.build(outer.trainable_variables)
    save(randomised(outer, 1), tmp_path / name)
    assert same(read_keras(tmp_path / name), held(base, outer))


@pytest.mark.parametrize("include_top", [False, True])
def test_numbered_layers_get_their_names(tmp_path: Path, include_top: bool) -> None:
    model = densenet(include_top=include_top)
    save(model, tmp_path / "x.weights.h5")
    forget_names(tmp_path / "x.weights.h5")
    assert same(read_keras(tmp_path / "x.weights.h5"), held(model))


def test_numbered_layers_within_a_model_get_their_names(tmp_path: Path) -> None:
    keras = peers.keras()
    base = densenet(include_top=False, pooling="avg")
    outer = keras.Sequential([base, keras.layers.Dense(3, name="predictions")])
    outer.build((None, 32, 32, 3))
    save(outer, tmp_path / "x.weights.h5")
    forget_names(tmp_path / "x.weights.h5")
    assert same(read_keras(tmp_path / "x.weights.h5"), held(base, outer))


def test_numbered_layers_of_another_network_are_refused(tmp_path: Path) -> None:
    layers = peers.keras().layers
    net = peers.keras().Sequential([layers.Conv2D(8, 3), layers.Conv2D(8, 3), layers.Dense(2)])
    net.build((None, 8, 8, 3))
    save(net, tmp_path / "x.weights.h5")
    forget_names(tmp_path / "x.weights.h5")
    with pytest.raises(WeightsError, match="not the layers of a DenseNet"):
        read_keras(tmp_path / "x.weights.h5")


def numbered_shapes() -> dict[str, tuple[int, ...]]:
    """Stem of 4 channels, a layer, a transition, a layer; growth 2."""
    kernels = [
        (7, 7, 3, 4), (1, 1, 4, 8), (3, 3, 8, 2), (1, 1, 6, 3), (1, 1, 3, 8), (3, 3, 8, 2),
    ]  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kernel in enumerate(kernels):
        shapes[f"layers/conv2d_{i}" if i else "layers/conv2d"] = kernel
    for i, width in enumerate([4, 4, 8, 6, 3, 8, 5]):
        shapes[f"layers/batch_normalization_{i}" if i else "layers/batch_normalization"] = (width,)
    return shapes | {"layers/dense": (5, 10)}


def test_numbers_follow_the_order_of_the_network() -> None:
    names = names_by_number(numbered_shapes())
    assert [names[f"layers/conv2d_{i}"] for i in range(1, 6)] == [
        "conv2_block1_1_conv", "conv2_block1_2_conv", "pool2_conv",
        "conv3_block1_1_conv", "conv3_block1_2_conv",
    ]  # fmt: skip
    assert [names[f"layers/batch_normalization_{i}"] for i in range(1, 7)] == [
        "conv2_block1_0_bn", "conv2_block1_1_bn", "pool2_bn",
        "conv3_block1_0_bn", "conv3_block1_1_bn", "bn",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers/conv2d_5": None}, "has no layers"),
        ({"layers/conv2d_4": None}, "without gaps"),
        ({"layers/batch_normalization_6": None}, "do not fit"),
        ({"layers/batch_normalization_3": (4,)}, "do not fit"),
        ({"layers/conv2d_3": (1, 1, 5, 3)}, "reading 6 channels"),
        ({"layers/conv2d_5": (3, 3, 8, 3)}, "expected 8 to 2"),
        ({"layers/conv2d_5": (5, 5, 8, 2)}, "has no layers"),
        ({"layers/conv2d_5": (3, 8, 2)}, "expected kernels"),
        ({"layers/dense": (6, 10)}, "does not read the 5"),
        ({"layers/dense_1": (10, 10)}, "2 dense layers"),
        ({"layers/lstm": (5, 5)}, "'layers/lstm' is no"),
        ({"other/conv2d_6": (1, 1, 5, 8)}, "not those of one model"),
        ({f"layers/conv2d_{i}": None for i in range(1, 6)}, "no dense blocks"),
    ],
)
def test_numbers_that_fit_no_densenet_are_refused(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = {**numbered_shapes(), **change}
    with pytest.raises(WeightsError, match=message):
        names_by_number({path: shape for path, shape in shapes.items() if shape is not None})


def test_reads_names_of_keras_2(tmp_path: Path) -> None:
    """TensorFlow 1 numbered scopes anew; the published files say conv1/conv and fc1000."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["layer_names"] = np.array([b"conv1/conv", b"bn", b"fc1000"])
        file["conv1/conv/conv1/conv/kernel:0"] = np.float32([1])
        file["conv1/bn/conv1/bn/gamma:0"] = np.float32([2])
        file["bn/bn_1/gamma:0"] = np.float32([3])
        file["bn/bn_1/beta:0"] = np.array([4], ">f8")
        file["fc1000/fc1000/bias:0"] = np.float16([5])
    read = read_keras(tmp_path / "x.h5")
    assert {key: (t.item(), t.dtype) for key, t in read.items()} == {
        "conv1_conv/kernel": (1, torch.float32),
        "conv1_bn/gamma": (2, torch.float32),
        "bn/gamma": (3, torch.float32),
        "bn/beta": (4, torch.float64),
        "predictions/bias": (5, torch.float16),
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("include_top", [False, True])
def test_keras_takes_what_is_written(tmp_path: Path, name: str, include_top: bool) -> None:
    ours, theirs = (densenet(seed, include_top=include_top) for seed in (2, 3))
    write_keras(tmp_path / name, dict(sorted(held(ours).items())))
    theirs.load_weights(tmp_path / name)
    assert same(held(theirs), held(ours))
    image = np.random.default_rng(0).random((1, 32, 32, 3), dtype="float32")
    assert torch.equal(theirs(image), ours(image))


def test_keras_takes_the_legacy_file_by_name(tmp_path: Path, model: Any) -> None:
    write_keras(tmp_path / "x.h5", held(model))
    theirs = densenet(4)
    theirs.load_weights(tmp_path / "x.h5", by_name=True)
    assert same(held(theirs), held(model))


@pytest.mark.parametrize("name", [*LAYOUTS, "x.hdf5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_round_trip(tmp_path: Path, model: Any, name: str, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in held(model).items()}
    write_keras(tmp_path / name, tensors)
    assert same(read_keras(tmp_path / name), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn/beta": None}, "layer 'bn' has"),
        ({"bn/beta": torch.ones(3, dtype=torch.bfloat16)}, "'bn/beta' is torch.bfloat16"),
        ({"pool2_conv/kernel": None}, "not the layers of a DenseNet"),
        ({"conv6_block1_2_conv/kernel": torch.ones(3, 3, 128, 32)}, "not the layers"),
        ({"features/weight": torch.ones(1)}, "layer 'features' is none"),
        ({"kernel": torch.ones(1)}, "layer '' is none"),
    ],
)
def test_what_is_no_densenet_is_not_written(
    tmp_path: Path, model: Any, change: dict[str, Tensor | None], message: str
) -> None:
    path = tmp_path / "x.weights.h5"
    path.write_text("before")
    tensors = {key: t for key, t in {**held(model), **change}.items() if t is not None}
    with pytest.raises(WeightsError, match=message):
        write_keras(path, tensors)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_to_write_leaves_nothing(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(WeightsError, match="cannot be written: no space left"):
        write_keras(tmp_path / "x.h5", held(model))
    with pytest.raises(WeightsError, match="cannot be written"):
        write_keras(tmp_path / "no folder" / "x.h5", held(model))
    with pytest.raises(WeightsError, match=r"expected \.weights\.h5"):
        write_keras(tmp_path / "x.keras", held(model))
    assert not list(tmp_path.iterdir())


KERNEL = "pool2_conv/pool2_conv/kernel"
BIAS = "predictions/predictions/bias"


def replaced(path: str, **how: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        shape = file[path].shape
        del file[path]
        file.create_dataset(path, **({"shape": shape, "dtype": "f4"} | how))

    return change


def linked(link: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[KERNEL]
        file[KERNEL] = link

    return change


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout(shape=(5,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(5,))
    del file[BIAS]
    file.create_virtual_dataset(BIAS, layout)


def cycle(file: Any) -> None:
    file["bn/again"] = file["bn"]


def one_array_often(file: Any) -> None:
    for i in range(3):
        file[f"copy{i}/kernel"] = file[KERNEL]


def nested(file: Any) -> None:
    file.create_group("/".join("abcdefghijklmnopqrstuvw"))


def crowded(file: Any) -> None:
    group = file.create_group("many").id
    for i in range(20_001):
        h5py.h5g.create(group, str(i).encode())


def nameless(file: Any) -> None:
    del file.attrs["layer_names"]


def unprintable(file: Any) -> None:
    file["bn/\x1b[31m"] = 1.0


def long_name(file: Any) -> None:
    file["n" * 300] = 1.0


def emptied(file: Any) -> None:
    for name in list(file):
        del file[name]


HOSTILE = {
    "external link": (linked(h5py.ExternalLink("/etc/passwd", "/x")), "links to elsewhere"),
    "soft link": (linked(h5py.SoftLink("/bn/bn/gamma")), "links to elsewhere"),
    "external data": (replaced(BIAS, external="/etc/passwd"), "not in this file"),
    "virtual": (virtual, "not in this file"),
    "chunked": (replaced(BIAS, chunks=(5,), data=np.ones(5, "f4")), "compressed, chunked"),
    "bomb": (
        replaced(BIAS, shape=(1 << 40,), chunks=(1 << 20,), compression="gzip"),
        "compressed, chunked",
    ),
    "unwritten bomb": (replaced(BIAS, shape=(1 << 40,)), "never written"),
    "strings": (replaced(BIAS, data=["a"] * 5, dtype=h5py.string_dtype()), "is object: expected"),
    "fixed strings": (replaced(BIAS, dtype="S4"), "expected float16"),
    "ragged": (replaced(BIAS, dtype=h5py.vlen_dtype("f4")), "expected float16"),
    "compound": (replaced(BIAS, dtype=[("a", "f4")]), "expected float16"),
    "integers": (replaced(BIAS, dtype="i4"), "is int32: expected float16"),
    "opaque": (replaced(BIAS, dtype="V2"), "expected float16"),
    "null": (replaced(BIAS, shape=None), "expected float16"),
    "cycle": (cycle, "contains itself"),
    "same array": (one_array_often, "is in the file twice"),
    "depth": (nested, "deep"),
    "crowd": (crowded, "more than 20,000 objects"),
    "no layer_names": (nameless, "expected 'layer_names'"),
    "unprintable": (unprintable, "not printable"),
    "long name": (long_name, "too long"),
    "type": (linked(np.dtype("f4")), "neither a group nor a dataset"),
    "loose array": (lambda file: file.create_dataset("kernel", data=[1.0]), "belongs to no layer"),
    "two of a name": (lambda file: file.copy("bn", "x/bn") or file.copy("bn", "x/y"), "two layers"),
    "no weights": (emptied, "no weights in it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(files: Path, tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    path = tmp_path / "x.h5"
    shutil.copy(files / "x.h5", path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(WeightsError, match=message) as caught:
        read_keras(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert len(text) - len(str(path)) < 300
    assert text.isprintable()


def test_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    """Each array is within the file, but forged headers make them overlap: a bomb of many."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"bn"]
        for size, name in ((1231, "gamma"), (1233, "beta"), (1237, "moving_mean")):
            file[f"bn/bn/{name}"] = np.ones(size, "f4")
    content = path.read_bytes()
    for honest, forged in ((1231, 3600), (1233, 2400)):
        for old, new in ((honest, forged), (4 * honest, 4 * forged)):
            assert old.to_bytes(8, "little") in content
            content = content.replace(old.to_bytes(8, "little"), new.to_bytes(8, "little"))
    path.write_bytes(content)
    declared = 4 * (3600 + 2400 + 1237)
    with pytest.raises(WeightsError, match=f"{declared:,} bytes of weights in {len(content):,}"):
        read_keras(path)


@pytest.mark.parametrize("attribute", [b"\xff", "n" * 300, "", 3, ["a", "b"], np.ones(3)])
def test_names_of_keras_3_are_checked(files: Path, tmp_path: Path, attribute: object) -> None:
    path = tmp_path / "x.weights.h5"
    shutil.copy(files / path.name, path)
    with h5py.File(path, "r+") as file:
        file["layers/conv2d/vars"].attrs["name"] = attribute
    with pytest.raises(WeightsError, match=r"no short text|damaged"):
        read_keras(path)


@pytest.mark.parametrize("variable", ["2", "5"])
def test_variables_of_keras_3_are_all_there(files: Path, tmp_path: Path, variable: str) -> None:
    path = tmp_path / "x.weights.h5"
    shutil.copy(files / path.name, path)
    with h5py.File(path, "r+") as file:
        file.move("layers/batch_normalization/vars/3", f"moved/{variable}")
        file["layers/batch_normalization/vars/5"] = np.float32([1.0])
    with pytest.raises(WeightsError, match=r"has the variables \[0, 1, 2, 5\]"):
        read_keras(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_truncated_files_are_refused(files: Path, tmp_path: Path, name: str) -> None:
    content = (files / name).read_bytes()
    for part in range(40):
        path = tmp_path / name
        path.write_bytes(content[: math.ceil(len(content) * part / 40)])
        with pytest.raises(WeightsError, match="damaged, or no HDF5 file"):
            read_keras(path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("weights")
    with pytest.raises(WeightsError, match="damaged, or no HDF5 file"):
        read_keras(tmp_path / "text.h5")
    for path in (tmp_path, tmp_path / "none.h5"):
        with pytest.raises(WeightsError, match="no such file"):
            read_keras(path)


def test_without_h5py_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    for use in (lambda: read_keras(tmp_path / "x.h5"), lambda: write_keras(tmp_path / "x.h5", {})):
        with pytest.raises(WeightsError, match=r'pip install "densely\[keras\]"'):
            use()
