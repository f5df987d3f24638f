"""Keras's files of weights, read without Keras, and written so that Keras takes them.

Three layouts, all HDF5:

    legacy     Keras 2's `save_weights("x.h5")`: /LAYER/LAYER/VARIABLE:0, and the order of the
               layers in the attribute `layer_names`
    whole      `model.save("x.h5")`: the same below /model_weights, beside the optimizer's state
    Keras 3    `x.weights.h5`: /layers/CLASS_NUMBER/vars/0, with the layer's true name in the
               attribute `name` of `vars` since Keras 3.6 (for older files see `keras_names`)

Names alone tell what a tensor is, so `layer_names` is not read: an attribute of strings of any
length has no bound that could be checked beforehand.

HDF5 can do far more than Keras asks of it, and each such thing is a way to harm a reader: links to
other files, data in other files, compression that hides a terabyte, groups that contain
themselves, filters that load code. Keras writes plain groups and uncompressed arrays of floats;
everything else is refused.

Not covered: `.keras` archives, bfloat16, models of Keras 1, files of damaged inner structure on
which the HDF5 library itself would crash.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densely.errors import WeightsError, first_line
from densely.weights.keras_names import (
    VARIABLES,
    class_and_number,
    in_order,
    layer_name,
    names_by_number,
)
from densely.whole_file import whole_file

# Keras's largest DenseNet, with its optimizer's state, has a fifth of these.
_MAX_OBJECTS = 20_000
_MAX_DEPTH = 16
_MAX_NAME = 200
_FAULTS = (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError, MemoryError)
_STORED = re.compile(
    r"(?P<layer>(?:.*/)?(?:layers|_layer_checkpoint_dependencies)/[^/]+)/vars/"
    r"(?P<number>0|[1-9]\d{0,2})",
    re.ASCII,
)


def read_keras(path: Path) -> dict[str, Tensor]:
    """Read the weights of a Keras file of any of the three layouts.

    Args:
        path: an HDF5 file, which may come from anyone.

    Returns:
        Tensors as Keras stores them, kernels (h, w, in, out), by "LAYER/VARIABLE": `bn/gamma`,
        `conv2_block1_1_conv/kernel`. Layers of a model within the model are called by their own
        name. A layer that is no convolution, norm or dense layer has its variables by number in
        Keras 3's files.

    Raises:
        WeightsError: h5py is missing; or the file is damaged, unsafe, no file of Keras weights,
            or numbers its layers and is no DenseNet.
    """
    h5py = _h5py()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            datasets = dict(_walk(file))
            whole = "model_weights" in file
            if _is_legacy(file["model_weights"] if whole else file):
                named = _legacy(datasets, "model_weights/" if whole else "")
            else:
                named = _keras_3(file, datasets)
            if not named:
                raise WeightsError("no weights in it")
            _check_data(named, path.stat().st_size)
            return {key: _tensor(dataset) for key, dataset in named.items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except _FAULTS as error:
        raise WeightsError(f"{path}: damaged, or no HDF5 file: {first_line(error)}") from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise WeightsError(
            'Keras\'s .h5 files need h5py, which is not installed: pip install "densely[keras]"'
        ) from None
    return h5py


def _walk(file: Any) -> Iterator[tuple[str, Any]]:
    """All datasets by path, with every link and name on the way checked."""
    h5py = _h5py()
    root = file["/"]
    seen, waiting, objects = {root}, [("", root)], 0
    while waiting:
        prefix, group = waiting.pop()
        objects += len(group)
        if objects > _MAX_OBJECTS:
            raise WeightsError(f"more than {_MAX_OBJECTS:,} objects: no file of a DenseNet")
        for name in group:
            if not _is_sane(name):
                raise WeightsError(f"a name in '/{prefix}' is too long or not printable")
            path = prefix + name
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise WeightsError(f"'{path}' links to elsewhere, which densely does not follow")
            found = group[name]
            if found in seen:
                raise WeightsError(f"'{path}' is in the file twice, or contains itself")
            seen.add(found)
            if isinstance(found, h5py.Dataset):
                yield path, found
            elif not isinstance(found, h5py.Group):
                raise WeightsError(f"'{path}' is neither a group nor a dataset")
            elif path.count("/") >= _MAX_DEPTH:
                raise WeightsError(f"groups are nested more than {_MAX_DEPTH} deep")
            else:
                waiting.append((path + "/", found))


def _is_sane(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _MAX_NAME and name.isprintable()


def _is_legacy(group: Any) -> bool:
    # Names beyond 64 KiB are cut into layer_names0, layer_names1, ...
    return "layer_names" in group.attrs or "layer_names0" in group.attrs


def _legacy(datasets: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Name the datasets of a legacy file.

    A layer's group is called as the layer is, whatever TensorFlow made of its variables' names
    (`conv1_conv/conv1_conv_1/kernel:0`); one with several groups of variables is a model, and
    they are called as its layers are.
    """
    paths = [path.removeprefix(root) for path in datasets if path.startswith(root)]
    parents: dict[str, set[str]] = {}
    for path in paths:
        parents.setdefault(path.partition("/")[0], set()).add(path.rpartition("/")[0])
    named: dict[str, Any] = {}
    for path in paths:
        parent, _, variable = path.rpartition("/")
        top = path.partition("/")[0]
        layer = layer_name(top if len(parents[top]) == 1 and parent else parent)
        _add(named, layer, variable.removesuffix(":0"), datasets[root + path])
    return named


def _keras_3(file: Any, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Name the datasets of Keras 3's layout; what belongs to no layer is left out."""
    layers: dict[str, dict[int, Any]] = {}
    for path, dataset in datasets.items():
        if found := _STORED.fullmatch(path):
            layers.setdefault(found["layer"], {})[int(found["number"])] = dataset
    if not layers:
        raise WeightsError(
            "no weights of Keras: expected 'layer_names' (legacy) or 'layers/.../vars' (Keras 3)"
        )
    names = {path: _name_attribute(file[f"{path}/vars"]) for path in layers}
    if not any(names.values()):
        names |= names_by_number({path: layers[path][min(layers[path])].shape for path in layers})
    named: dict[str, Any] = {}
    for path, stored in layers.items():
        class_name, _ = class_and_number(path.rpartition("/")[2])
        variables = VARIABLES.get(class_name) or [str(number) for number in stored]
        fewest = 4 if class_name == "batch_normalization" else 1
        if sorted(stored) != list(range(len(stored))) or not (
            fewest <= len(stored) <= len(variables)
        ):
            raise WeightsError(f"'{path}' has the variables {sorted(stored)}: cannot be named")
        for number, dataset in stored.items():
            layer = layer_name(names[path] or path)
            _add(named, layer, variables[number], dataset)
    return named


def _name_attribute(group: Any) -> str | None:
    if "name" not in group.attrs:
        return None
    if group.attrs.get_id("name").shape != () or not _is_sane(name := group.attrs["name"]):
        raise WeightsError(f"the name of the layer '{group.name}' is no short text")
    return str(name)


def _add(named: dict[str, Any], layer: str, variable: str, dataset: Any) -> None:
    if not layer or not variable:
        raise WeightsError(f"dataset '{dataset.name}' belongs to no layer")
    if named.setdefault(f"{layer}/{variable}", dataset) is not dataset:
        raise WeightsError(f"two layers are called '{layer}': cannot tell the DenseNet's")


def _check_data(named: Mapping[str, Any], file_bytes: int) -> None:
    """See that the data are plain floats within the file, before memory is spent on them."""
    h5d = _h5py().h5d
    declared_bytes = 0
    for key, dataset in named.items():
        dtype, layout = dataset.dtype, dataset.id.get_create_plist()
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or dataset.shape is None:
            raise WeightsError(f"'{key}' is {dtype}: expected float16, float32 or float64")
        if (
            layout.get_layout() not in (h5d.CONTIGUOUS, h5d.COMPACT)
            or layout.get_external_count() > 0
        ):
            raise WeightsError(
                f"'{key}' is compressed, chunked or not in this file: expected plain data as "
                "Keras writes them; save it with Keras anew"
            )
        size = math.prod(dataset.shape) * dtype.itemsize
        if size != dataset.id.get_storage_size():
            raise WeightsError(f"'{key}' is damaged: it was never written, or not in full")
        declared_bytes += size
    if declared_bytes > file_bytes:
        raise WeightsError(f"damaged: {declared_bytes:,} bytes of weights in {file_bytes:,}")


def _tensor(dataset: Any) -> Tensor:
    array = dataset[...]
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def write_keras(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights of a DenseNet for `model.load_weights(path)`; whole or not at all.

    Keras takes weights by the order of the layers; it follows from their names.

    Args:
        path: `*.weights.h5` for Keras 3's layout, other `*.h5` and `*.hdf5` for the legacy one.
        tensors: as `read_keras` gives them, with all layers of the network.

    Raises:
        WeightsError: h5py is missing; an ending that stands for neither; not exactly the tensors
            of a DenseNet as keras.applications builds it; or the file cannot be written.
    """
    h5py = _h5py()
    if path.suffix not in (".h5", ".hdf5"):
        raise WeightsError(f"{path}: expected .weights.h5 (Keras 3) or .h5 (legacy), for Keras")
    try:
        layers = _layers(tensors)
        stored = _numbered(layers)
        firsts = {number: next(iter(layers[name].values())) for number, name in stored.items()}
        if names_by_number({number: first.shape for number, first in firsts.items()}) != stored:
            raise WeightsError("the names of the layers do not fit their shapes")
        with whole_file(path) as part, h5py.File(part, "w") as file:
            if path.name.endswith(".weights.h5"):
                _write_keras_3(file, layers, stored)
            else:
                _write_legacy(file, layers)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except _FAULTS as error:
        raise WeightsError(f"{path}: cannot be written: {first_line(error)}") from error


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and variable, both in Keras's order."""
    given: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, variable = key.rpartition("/")
        if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            raise WeightsError(f"'{key}' is {tensor.dtype}: expected float16, float32 or float64")
        given.setdefault(layer, {})[variable] = tensor.detach().cpu()
    layers = {}
    for name, class_name in in_order(list(given)).items():
        variables = VARIABLES[class_name]
        required = set(variables) - ({"bias"} if class_name == "conv2d" else set())
        if not required <= given[name].keys() <= set(variables):
            raise WeightsError(f"layer '{name}' has {sorted(given[name])}, expected {variables}")
        layers[name] = {v: given[name][v] for v in variables if v in given[name]}
    return layers


def _numbered(layers: Mapping[str, object]) -> dict[str, str]:
    """Keras 3's `conv2d_3` for each layer, with the layer's name."""
    counts: dict[str, int] = {}
    stored = {}
    for name, class_name in in_order(list(layers)).items():
        number = counts.setdefault(class_name, 0)
        stored[f"{class_name}_{number}" if number else class_name] = name
        counts[class_name] += 1
    return stored


def _write_keras_3(
    file: Any, layers: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, str]
) -> None:
    for number, name in stored.items():
        group = file.create_group(f"layers/{number}/vars")
        group.attrs["name"] = name
        for i, tensor in enumerate(layers[name].values()):
            group[str(i)] = tensor.numpy()


def _write_legacy(file: Any, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    # Without these two Keras 2 takes a file for Keras 1's or Theano's and turns its kernels round.
    file.attrs["keras_version"] = b"2.15.0"
    file.attrs["backend"] = b"tensorflow"
    file.attrs["layer_names"] = [name.encode() for name in layers]
    for name, variables in layers.items():
        group = file.create_group(name)
        group.attrs["weight_names"] = [f"{name}/{variable}:0".encode() for variable in variables]
        for variable, tensor in variables.items():
            group[f"{name}/{variable}:0"] = tensor.numpy()
