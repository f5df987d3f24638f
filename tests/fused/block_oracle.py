"""The steps of a DenseNet and their gradients in float64 NumPy: what fused ones must equal.

Written from the definitions, without torch and without the package: each layer normalises on its
own what it reads, each operation gives its output and a function from the gradient of that output
to the gradient of its input, derived by hand. Slow on purpose.

Norms, convolutions and steps are read by the names of their fields, as `densely.fused.plain` has
them, with arrays for tensors (`arrays` makes them so). A tensor's name is its path: "x",
"0.1.conv.weight". Dropout is not drawn here: it multiplies by arrays that the caller gives.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

#: From the gradient of an operation's output to that of its input.
Backward = Callable[[np.ndarray], np.ndarray]
#: What an operation makes.
Made = tuple[np.ndarray, Backward]
#: Multipliers of dropout, for each layer and each of its steps; None drops nothing.
Masks = Sequence[Sequence[np.ndarray | None]]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Result(NamedTuple):
    """An output, the gradients of all that has one, and the statistics after the step.

    `margin` is how near to zero an input of ReLU came that was not zero: in less than float64 one
    nearer than the rounding may fall on the other side, which moves gradients but no output.
    """

    output: np.ndarray
    grads: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    margin: float = math.inf

    def all(self) -> dict[str, np.ndarray]:
        """Every tensor of the result under a name of its own."""
        grads = {f"grad of {name}": value for name, value in self.grads.items()}
        return {"output": self.output, **grads, **self.statistics}


class Record:
    """Where operations leave the gradients of their parameters and their new statistics."""

    def __init__(self) -> None:
        self.grads: dict[str, np.ndarray] = {}
        self.statistics: dict[str, np.ndarray] = {}
        self.margin = math.inf

    def result(self, made: Made, grad: np.ndarray) -> Result:
        output, backward = made
        self.grads["x"] = backward(grad)
        return Result(output, self.grads, self.statistics, self.margin)


# Operations.


def sum_channels(x: np.ndarray) -> np.ndarray:
    """Sum over all but the channels."""
    return x.sum(axis=(0, *range(2, x.ndim)))


def spread(channels: np.ndarray, like: np.ndarray) -> np.ndarray:
    """One value a channel, to be combined with [N, C, *space]."""
    return channels.reshape(-1, *[1] * (like.ndim - 2))


def batch_norm(x: np.ndarray, norm: Any, name: str, record: Record) -> Made:
    """Batch norm by the statistics of the batch, or by the running ones."""
    count = x.size // x.shape[1]
    by_batch = norm.training or norm.running_mean is None
    if by_batch:
        mean = sum_channels(x) / count
        var = sum_channels((x - spread(mean, x)) ** 2) / count
    else:
        mean, var = norm.running_mean, norm.running_var
    if norm.running_mean is not None:
        momentum, batches = norm.momentum, norm.num_batches_tracked
        if norm.training and batches is not None:
            batches = batches + 1
        if momentum is None:
            momentum = 0.0 if batches is None else 1.0 / max(float(batches), 1.0)
        if not norm.training:
            momentum = 0.0
        unbiased = var * count / (count - 1) if by_batch else var
        new = [
            (1 - momentum) * norm.running_mean + momentum * mean,
            (1 - momentum) * norm.running_var + momentum * unbiased,
            batches,
        ]
        for key, value in zip(STATISTICS, new, strict=True):
            if value is not None:
                record.statistics[f"{name}.{key}"] = np.asarray(value, np.float64)

    std = spread(np.sqrt(var + norm.eps), x)
    normed = (x - spread(mean, x)) / std
    weight = np.ones(x.shape[1]) if norm.weight is None else norm.weight
    bias = np.zeros(x.shape[1]) if norm.bias is None else norm.bias

    def backward(grad: np.ndarray) -> np.ndarray:
        if norm.weight is not None:
            record.grads[f"{name}.weight"] = sum_channels(grad * normed)
        if norm.bias is not None:
            record.grads[f"{name}.bias"] = sum_channels(grad)
        grad = grad * spread(weight, x)
        if by_batch:  # the mean and the variance move with x too
            along_mean = spread(sum_channels(grad) / count, x)
            along_std = normed * spread(sum_channels(grad * normed) / count, x)
            grad = grad - along_mean - along_std
        return grad / std

    return normed * spread(weight, x) + spread(bias, x), backward


def relu(x: np.ndarray) -> Made:
    return np.where(x > 0, x, 0.0), lambda grad: np.where(x > 0, grad, 0.0)


def norm_relu(x: np.ndarray, norm: Any, name: str, record: Record) -> Made:
    normed, to_x = batch_norm(x, norm, name, record)
    record.margin = min(record.margin, np.abs(normed[normed != 0]).min(initial=math.inf))
    y, to_normed = relu(normed)
    return y, lambda grad: to_x(to_normed(grad))


def taps(size: Sequence[int], space: Sequence[int], step: int) -> Iterator[tuple[Any, Any]]:
    """Each position in a kernel, and the part of the padded input that it meets."""
    for at in itertools.product(*map(range, size)):
        part = (slice(i * step, i * step + n) for i, n in zip(at, space, strict=True))
        yield (..., *at), (..., *part)


def pad(x: np.ndarray, sides: Sequence[int], fill: float = 0.0) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), *((n, n) for n in sides)), constant_values=fill)


def unpad(x: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    return x[(..., *(slice(n, size - n) for n, size in zip(sides, x.shape[2:], strict=True)))]


def convolve(x: np.ndarray, conv: Any, name: str, record: Record) -> Made:
    """Convolution of stride 1 that keeps the size."""
    weight, space = conv.weight, x.shape[2:]
    size = weight.shape[2:]
    sides = [conv.dilation * (n // 2) for n in size]
    padded = pad(x, sides)
    y = np.zeros((x.shape[0], weight.shape[0], *space))
    for at, part in taps(size, space, conv.dilation):
        y += np.einsum("oi,ni...->no...", weight[at], padded[part], optimize=True)
    if conv.bias is not None:
        y = y + spread(conv.bias, y)

    def backward(grad: np.ndarray) -> np.ndarray:
        to_weight, to_padded = np.zeros_like(weight), np.zeros_like(padded)
        for at, part in taps(size, space, conv.dilation):
            one = padded[part].reshape(*x.shape[:2], -1)
            flat = grad.reshape(*grad.shape[:2], -1)
            to_weight[at] = np.einsum("nop,nip->oi", flat, one, optimize=True)
            to_padded[part] += np.einsum("oi,no...->ni...", weight[at], grad, optimize=True)
        record.grads[f"{name}.weight"] = to_weight
        if conv.bias is not None:
            record.grads[f"{name}.bias"] = sum_channels(grad)
        return unpad(to_padded, sides)

    return y, backward


def first_convolution(images: np.ndarray, conv: Any, name: str, record: Record) -> Made:
    """Convolution with steps and padding, from the windows one by one."""
    padded, (high, wide) = pad(images, conv.padding), conv.weight.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (high, wide), axis=(2, 3))
    windows = windows[:, :, :: conv.stride[0], :: conv.stride[1]]
    y = np.einsum("ocij,nchwij->nohw", conv.weight, windows, optimize=True)
    if conv.bias is not None:
        y = y + spread(conv.bias, y)

    def backward(grad: np.ndarray) -> np.ndarray:
        to_weight = np.einsum("nohw,nchwij->ocij", grad, windows, optimize=True)
        record.grads[f"{name}.weight"] = to_weight
        if conv.bias is not None:
            record.grads[f"{name}.bias"] = sum_channels(grad)
        return np.zeros_like(images)  # nobody asks for it

    return y, backward


def average_pool(x: np.ndarray, window: Sequence[int]) -> Made:
    """Mean of each whole window; what is left over at the end counts nowhere."""
    space = [n // w for n, w in zip(x.shape[2:], window, strict=True)]
    parts = [
        (..., *(slice(i, n * w, w) for i, n, w in zip(at, space, window, strict=True)))
        for at in itertools.product(*map(range, window))
    ]
    y = sum(x[part] for part in parts) / len(parts)

    def backward(grad: np.ndarray) -> np.ndarray:
        to_x = np.zeros_like(x)
        for part in parts:
            to_x[part] = grad / len(parts)
        return to_x

    return y, backward


def max_pool(x: np.ndarray, stride: Sequence[int]) -> Made:
    """Maximum of 3 an axis, padded by 1; of equal ones the first in the window counts."""
    sides = [1] * (x.ndim - 2)
    padded = pad(x, sides, -np.inf)
    space = [(n - 1) // s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    parts = [
        tuple(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(at, space, stride, strict=True))
        for at in itertools.product(range(3), repeat=len(space))
    ]
    parts = [(..., *part) for part in parts]
    candidates = np.stack([padded[part] for part in parts])
    first = candidates.argmax(axis=0)  # NumPy too gives the first of equal ones

    def backward(grad: np.ndarray) -> np.ndarray:
        to_padded = np.zeros_like(padded)
        for i, part in enumerate(parts):
            to_padded[part] += np.where(first == i, grad, 0.0)
        return unpad(to_padded, sides)

    return candidates.max(axis=0), backward


def global_mean(x: np.ndarray) -> Made:
    pixels = math.prod(x.shape[2:])

    def backward(grad: np.ndarray) -> np.ndarray:
        share = grad.reshape(*grad.shape, *[1] * (x.ndim - 2)) / pixels
        return np.broadcast_to(share, x.shape)

    return x.reshape(*x.shape[:2], -1).mean(axis=2), backward


# The steps.


def dense_layer(
    x: np.ndarray, layer: Any, masks: Sequence[np.ndarray | None], name: str, record: Record
) -> Made:
    way_back: list[Backward] = []
    for i, (step, mask) in enumerate(zip(layer, masks, strict=True)):
        x, to_input = norm_relu(x, step.norm, f"{name}.{i}.norm", record)
        x, to_active = convolve(x, step.conv, f"{name}.{i}.conv", record)
        way_back += [to_input, to_active]
        if mask is not None:
            x = x * mask
            way_back.append(lambda grad, mask=mask: grad * mask)

    def backward(grad: np.ndarray) -> np.ndarray:
        for step_back in reversed(way_back):
            grad = step_back(grad)
        return grad

    return x, backward


def dense_block(x: np.ndarray, layers: Any, masks: Masks, grad: np.ndarray) -> Result:
    record = Record()
    way_back: list[tuple[int, Backward]] = []
    for i, layer in enumerate(layers):
        new, to_input = dense_layer(x, layer, masks[i], str(i), record)
        way_back.append((x.shape[1], to_input))
        x = np.concatenate([x, new], axis=1)

    def backward(grad: np.ndarray) -> np.ndarray:
        for channels, to_input in reversed(way_back):  # each input is read twice: by H, and as is
            grad = grad[:, :channels] + to_input(grad[:, channels:])
        return grad

    return record.result((x, backward), grad)


def transition(
    x: np.ndarray, norm: Any, conv: Any, window: Sequence[int], grad: np.ndarray
) -> Result:
    record = Record()
    active, to_x = norm_relu(x, norm, "norm", record)
    pooled, to_active = average_pool(active, window)
    y, to_pooled = convolve(pooled, conv, "conv", record)
    return record.result((y, lambda grad: to_x(to_active(to_pooled(grad)))), grad)


def stem(x: np.ndarray, norm: Any, stride: Sequence[int], grad: np.ndarray) -> Result:
    record = Record()
    active, to_x = norm_relu(x, norm, "norm", record)
    y, to_active = max_pool(active, stride)
    return record.result((y, lambda grad: to_x(to_active(grad))), grad)


def image_stem(
    images: np.ndarray, conv: Any, norm: Any, stride: Sequence[int], grad: np.ndarray
) -> Result:
    record = Record()
    x, to_images = first_convolution(images, conv, "conv", record)
    active, to_x = norm_relu(x, norm, "norm", record)
    y, to_active = max_pool(active, stride)
    return record.result((y, lambda grad: to_images(to_x(to_active(grad)))), grad)


def final(x: np.ndarray, norm: Any, grad: np.ndarray) -> Result:
    record = Record()
    active, to_x = norm_relu(x, norm, "norm", record)
    y, to_active = global_mean(active)
    return record.result((y, lambda grad: to_x(to_active(grad))), grad)


# Trees: named tuples and tuples of them, with tensors or arrays as leaves.


def is_leaf(value: Any) -> bool:
    """Whether it is a tensor or an array."""
    return hasattr(value, "shape")


def change(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The same tree with each tensor or array changed."""
    if is_leaf(tree):
        return function(tree)
    if isinstance(tree, tuple):
        parts = [change(part, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def named(tree: Any, name: str = "") -> dict[str, Any]:
    """All tensors or arrays of a tree under their paths."""
    if is_leaf(tree):
        return {name: tree}
    if not isinstance(tree, tuple):
        return {}
    keys = getattr(tree, "_fields", None) or map(str, range(len(tree)))
    found: dict[str, Any] = {}
    for key, part in zip(keys, tree, strict=True):
        found |= named(part, f"{name}.{key}" if name else key)
    return found


def arrays(tree: Any) -> Any:
    """A tree of tensors as one of float64 arrays that share no memory with them."""
    return change(tree, lambda tensor: tensor.detach().double().numpy().copy())


def fresh(tree: Any) -> Any:
    """Copies of all tensors, each asking for a gradient where the original does."""
    return change(tree, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


# Comparison.


def differences(got: Result, expected: Result, tolerance: float) -> list[str]:
    """What differs from the expected by more than the tolerance relative to its scale.

    A gradient that cancels to nearly nothing is measured by the largest gradients at hand. What
    `got` has no gradient of is not compared: the caller says which there must be.
    """
    largest = max((float(np.abs(grad).max()) for grad in expected.grads.values()), default=0.0)
    theirs, found = expected.all(), []
    for name, ours in got.all().items():
        if ours.shape != theirs[name].shape:
            found.append(f"{name}: {ours.shape} for {theirs[name].shape}")
            continue
        if ours.size == 0:
            continue
        least = 1e-2 * largest if "grad" in name else 0.0
        if name.endswith("running_var"):
            least = 1e-5  # of the size of eps: a variance of zero but for rounding has no scale
        scale = max(float(np.abs(theirs[name]).max()), least)
        error = float(np.abs(ours - theirs[name]).max())
        if not error <= tolerance * scale:  # so that a NaN is a difference
            found.append(f"{name}: off by {error:.3g} at a scale of {scale:.3g}")
    return found


def distances(got: Result, expected: Result) -> dict[str, float]:
    """Euclidean distance of each tensor from the expected one."""
    theirs = expected.all()
    return {k: float(np.linalg.norm(ours - theirs[k])) for k, ours in got.all().items()}
