"""A naive DenseNet in float64 NumPy: what the tests hold the PyTorch networks against.

Written from the paper (Huang et al., 2017, https://arxiv.org/abs/1608.06993) and the layout of
torchvision's state_dict, without the package and without torch, so that it shares nothing with
what it checks. Slow on purpose: one function an operation, each as its definition reads.
Dropout is not covered.

Shapes: images (n, c, h, w); convolution weights (o, c, k, k).
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

EPS = 1e-5
MOMENTUM = 0.1

Arrays = Mapping[str, np.ndarray]


def windows(x: np.ndarray, size: int, stride: int, pad: int, fill: float) -> np.ndarray:
    """All windows of the padded image: (n, c, h_out, w_out, size, size)."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]


def conv(x: np.ndarray, net: Arrays, name: str, stride: int = 1) -> np.ndarray:
    """Convolution that pads by (k - 1) / 2 zeros on each side."""
    weight = net[f"{name}.weight"]
    size = weight.shape[-1]
    taps = windows(x, size, stride, pad=(size - 1) // 2, fill=0.0)
    out = np.einsum("nchwij,ocij->nohw", taps, weight, optimize=True)
    bias = net.get(f"{name}.bias")
    return out if bias is None else out + bias[:, None, None]


def max_pool(x: np.ndarray) -> np.ndarray:
    """Maximum over 3 x 3, stride 2, padded by 1 with what never wins."""
    return windows(x, 3, stride=2, pad=1, fill=-np.inf).max(axis=(4, 5))


def avg_pool(x: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2, stride 2; an odd last row or column is dropped."""
    return windows(x, 2, stride=2, pad=0, fill=0.0).mean(axis=(4, 5))


def norm(x: np.ndarray, net: Arrays, name: str, train: bool, running: dict) -> np.ndarray:
    """Batch norm; in train mode leaves the updated running statistics in `running`."""
    mean, var = net[f"{name}.running_mean"], net[f"{name}.running_var"]
    if train:
        count = x.size / x.shape[1]
        batch_mean, batch_var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
        unbiased = batch_var * count / (count - 1)
        running[f"{name}.running_mean"] = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
        running[f"{name}.running_var"] = (1 - MOMENTUM) * var + MOMENTUM * unbiased
        mean, var = batch_mean, batch_var
    scale = net[f"{name}.weight"] / np.sqrt(var + EPS)
    return (x - mean[:, None, None]) * scale[:, None, None] + net[f"{name}.bias"][:, None, None]


def densenet(net: Arrays, x: np.ndarray, train: bool = False) -> tuple[np.ndarray, dict]:
    """Logits, and in train mode the running statistics after this batch.

    Args:
        net: arrays under torchvision's state_dict keys; which of them are there says whether
            the network has the large stem (norm0), bottlenecks (conv2) and biases.
        x: images (n, c, h, w).
        train: normalise by the statistics of the batch instead of the running ones.
    """
    net = {key: np.asarray(value, np.float64) for key, value in net.items()}
    running: dict[str, np.ndarray] = {}

    def norm_relu(x: np.ndarray, name: str) -> np.ndarray:
        return np.maximum(norm(x, net, name, train, running), 0.0)

    large_stem = "features.norm0.weight" in net
    x = conv(np.asarray(x, np.float64), net, "features.conv0", stride=2 if large_stem else 1)
    if large_stem:
        x = max_pool(norm_relu(x, "features.norm0"))
    for b in itertools.count(1):
        for i in itertools.count(1):
            layer = f"features.denseblock{b}.denselayer{i}"
            if f"{layer}.conv1.weight" not in net:
                break
            new = conv(norm_relu(x, f"{layer}.norm1"), net, f"{layer}.conv1")
            if f"{layer}.conv2.weight" in net:
                new = conv(norm_relu(new, f"{layer}.norm2"), net, f"{layer}.conv2")
            x = np.concatenate([x, new], axis=1)
        transition = f"features.transition{b}"
        if f"{transition}.conv.weight" not in net:
            break
        x = avg_pool(conv(norm_relu(x, f"{transition}.norm"), net, f"{transition}.conv"))
    pooled = norm_relu(x, "features.norm5").mean(axis=(2, 3))
    return pooled @ net["classifier.weight"].T + net["classifier.bias"], running


def directional_derivative(
    loss: Callable[[Arrays], float], at: Arrays, direction: Arrays, step: float = 1e-6
) -> float:
    """Central difference of `loss` at `at`, along `direction` (over the keys it has)."""

    def moved(t: float) -> dict[str, np.ndarray]:
        return {**at, **{key: at[key] + t * d for key, d in direction.items()}}

    return (loss(moved(step)) - loss(moved(-step))) / (2 * step)
