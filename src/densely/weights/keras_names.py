"""Which layer of a DenseNet is which in Keras: by name, by number, and by place in the model.

keras.applications names its layers `conv1_conv`, `conv2_block1_0_bn`, `pool2_conv`, `bn`,
`predictions`. Keras 3 stores them by class and count instead, `conv2d_3`, in the order of the
model. A DenseNet is so regular that this order and the shapes of the kernels tell every layer:

    7x7 stem | 1x1, 3x3 of a dense layer | ... | 1x1 of a transition | 1x1, 3x3 | ...

since a transition is a 1x1 kernel that no 3x3 one follows. Nothing is guessed: each width has to
come out as the layers before it demand.

Source: keras/src/applications/densenet.py and keras/src/saving/saving_lib.py of Keras 3.15.
"""

import re
from collections.abc import Mapping, Sequence

from densely.errors import WeightsError

#: Variables of each class of layers, in the order in which Keras keeps them.
VARIABLES: dict[str, tuple[str, ...]] = {
    "conv2d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
# Keras 2 and its published files. Keras 3 has no "/" in names.
_FORMER_NAMES = {"conv1/conv": "conv1_conv", "conv1/bn": "conv1_bn", "fc1000": "predictions"}
_NAME = re.compile(
    r"(?P<stem>conv1_(conv|bn))|(?P<layer>conv\d{1,4}_block\d{1,4}_(0_bn|1_conv|1_bn|2_conv))"
    r"|(?P<transition>pool\d{1,4}_(bn|conv))|bn|(?P<head>predictions)",
    re.ASCII,
)


def layer_name(path: str) -> str:
    """The layer that the groups `path` lead to, by the name that keras.applications gives it now.

    Args:
        path: names separated by "/": the models around a layer, and last its own.
    """
    for former, name in _FORMER_NAMES.items():
        if f"/{path}".endswith(f"/{former}"):
            return name
    return path.rpartition("/")[2]


def class_and_number(stored: str) -> tuple[str, int]:
    """Keras 3's `conv2d_3` as ("conv2d", 3); the first one of a class, `conv2d`, is number 0."""
    found = re.fullmatch(r"(.+?)_([1-9]\d{0,5})", stored, re.ASCII)
    return (found[1], int(found[2])) if found else (stored, 0)


def in_order(names: Sequence[str]) -> dict[str, str]:
    """The layers of a DenseNet in the model's order, each with its class.

    Raises:
        WeightsError: a name is none of a DenseNet of keras.applications.
    """
    return {name: _class(name) for name in sorted(names, key=_position)}


def _class(name: str) -> str:
    if name == "predictions":
        return "dense"
    return "batch_normalization" if name.endswith("bn") else "conv2d"


def _position(name: str) -> tuple[float, bool, list[int], bool]:
    """Sorts layers: by block, a transition after its block's layers, and parts as they run."""
    found = _NAME.fullmatch(name)
    if not found:
        raise WeightsError(f"layer '{name}' is none of a DenseNet of keras.applications")
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    if found["stem"]:
        return 1, False, [], name.endswith("bn")
    if found["layer"]:
        return numbers[0], False, numbers[1:], name.endswith("bn")
    if found["transition"]:
        return numbers[0], True, [], name.endswith("conv")
    return float("inf"), bool(found["head"]), [], False


def names_by_number(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Names of the layers that a file of Keras 3 only numbers.

    Args:
        shapes: of each layer's first variable, by its path in the file,
            such as "layers/functional/layers/conv2d_3".

    Returns:
        The DenseNet's name of each path.

    Raises:
        WeightsError: these are not exactly the layers of a DenseNet.
    """
    convs = _numbered(shapes, "conv2d")
    norms = _numbered(shapes, "batch_normalization")
    dense = _numbered(shapes, "dense")
    if others := shapes.keys() - {*convs, *norms, *dense}:
        raise _NoDenseNet(f"'{min(others)}' is no convolution, batch norm or dense layer")
    if len({path.rpartition("/")[0] for path in (*convs, *norms)}) != 1:
        raise _NoDenseNet("the convolutions and norms are not those of one model")
    if len(dense) > 1:
        raise _NoDenseNet(f"{len(dense)} dense layers, expected one at most")

    conv_names, norm_names, width = _expected([shapes[path] for path in convs])
    if [tuple(shapes[path]) for path in norms] != [(n,) for n in norm_names.values()]:
        raise _NoDenseNet("the batch norms do not fit the convolutions")
    if any(len(shapes[path]) != 2 or shapes[path][0] != width for path in dense):
        raise _NoDenseNet(f"the dense layer does not read the {width} channels of the last block")
    named = dict(zip(convs, conv_names, strict=True)) | dict(zip(norms, norm_names, strict=True))
    return named | dict.fromkeys(dense, "predictions")


class _NoDenseNet(WeightsError):
    def __init__(self, why: str) -> None:
        super().__init__(f"not the layers of a DenseNet of keras.applications: {why}")


def _numbered(shapes: Mapping[str, Sequence[int]], wanted: str) -> list[str]:
    """Paths of the layers of one class, by number; there may be no gaps."""
    found = {}
    for path in shapes:
        class_name, number = class_and_number(path.rpartition("/")[2])
        if class_name == wanted:
            found[path] = number
    if sorted(found.values()) != list(range(len(found))):
        raise _NoDenseNet(f"the '{wanted}' are not numbered from 0 on without gaps")
    return sorted(found, key=found.__getitem__)


def _expected(kernels: Sequence[Sequence[int]]) -> tuple[list[str], dict[str, int], int]:
    """Walk through the kernels: their names, the norms' names and widths, and the last width."""
    if not kernels or any(len(kernel) != 4 for kernel in kernels):
        raise _NoDenseNet("expected kernels (h, w, in, out)")
    convs, width = ["conv1_conv"], kernels[0][3]
    norms = {"conv1_bn": width}
    block, layer, growth = 2, 0, 0
    rest = list(kernels[1:])
    while rest:
        height, kernel_width, reads, makes = rest.pop(0)
        if (height, kernel_width, reads) != (1, 1, width):
            raise _NoDenseNet(f"kernel {len(convs)}: expected 1x1, reading {width} channels")
        if rest and tuple(rest[0][:2]) == (3, 3):
            layer += 1
            name = f"conv{block}_block{layer}"
            growth = growth or rest[0][3]
            if tuple(rest.pop(0)[2:]) != (makes, growth):
                raise _NoDenseNet(f"{name}_2_conv: expected {makes} to {growth} channels")
            convs += [f"{name}_1_conv", f"{name}_2_conv"]
            norms |= {f"{name}_0_bn": width, f"{name}_1_bn": makes}
            width += growth
        elif layer == 0 or not rest:
            raise _NoDenseNet(f"block {block - 1} has no layers")
        else:
            convs.append(f"pool{block}_conv")
            norms[f"pool{block}_bn"] = width
            block, layer, width = block + 1, 0, makes
    if layer == 0:
        raise _NoDenseNet("there are no dense blocks")
    return convs, norms | {"bn": width}, width
