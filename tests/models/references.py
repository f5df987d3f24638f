"""DenseNet and FC-DenseNet in plain tensor algebra: any dimensions, strides, norm, activation.

Written from the papers and the layout of the state_dicts, without the package and without
modules. Where PyTorch has an option that the package uses, this does it by hand: dilation by
zeros between the taps of the kernel, pooling by windows, norms by their formulas. `oracles.py`
next door has the plain 2D network once more, without torch.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor, str], Tensor]

CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
TRANSPOSED_CONVS = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

ACTIVATIONS: dict[str, Activation] = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.clamp(max=0).exp() - 1),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + (-x).exp()),
    "mish": lambda x: x * (1 + x.exp()).log().tanh(),
}


def channels(values: Tensor, x: Tensor) -> Tensor:
    """One value a channel, in a shape that meets [N, C, ...]."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def conv(x: Tensor, net: Weights, name: str, stride: Sequence[int], dilation: int = 1) -> Tensor:
    """Convolution that pads with zeros so that stride 1 keeps the size."""
    weight = net[f"{name}.weight"]
    for axis in range(2, x.dim()):
        size = weight.shape[axis]
        spread = weight.new_zeros(
            *weight.shape[:axis], dilation * (size - 1) + 1, *weight.shape[axis + 1 :]
        )
        weight = spread.index_copy(axis, torch.arange(size) * dilation, weight)
    for axis in range(2, x.dim()):
        pad = weight.shape[axis] // 2
        zeros = x.new_zeros(*x.shape[:axis], pad, *x.shape[axis + 1 :])
        x = torch.cat([zeros, x, zeros], dim=axis)
    return CONVS[x.dim()](x, weight, net.get(f"{name}.bias"), tuple(stride))


def pool(x: Tensor, kind: str, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Mean or maximum of each whole window."""
    for axis, (k, s) in enumerate(zip(size, stride, strict=True), start=2):
        windows = x.unfold(axis, k, s)
        x = windows.mean(-1) if kind == "avg" else windows.amax(-1)
    return x


def stem_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Maximum over 3 an axis, padded by 1 with what never wins."""
    x = F.pad(x, (1, 1) * (x.dim() - 2), value=-torch.inf)
    return pool(x, "max", (3,) * (x.dim() - 2), stride)


def batch_norm(net: Weights, train: bool, running: dict[str, Tensor], eps: float = 1e-5) -> Norm:
    """Batch norm; in train mode leaves the updated running statistics in `running`."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = net[f"{name}.running_mean"], net[f"{name}.running_var"]
        if train:
            rows = x.transpose(0, 1).flatten(1)
            old = mean, var
            mean = rows.mean(1)
            var = (rows - mean[:, None]).square().mean(1)
            n = rows.shape[1]
            for key, before, now in [
                ("mean", old[0], mean),
                ("var", old[1], var * n / (n - 1)),
            ]:
                running[f"{name}.running_{key}"] = (0.9 * before + 0.1 * now).detach()
        y = (x - channels(mean, x)) / channels((var + eps).sqrt(), x)
        return y * channels(net[f"{name}.weight"], x) + channels(net[f"{name}.bias"], x)

    return norm


def group_norm(net: Weights, groups: Callable[[int], int], eps: float = 1e-5) -> Norm:
    """Each image's mean and variance over the channels of a group and all positions."""

    def norm(x: Tensor, name: str) -> Tensor:
        rows = x.reshape(x.shape[0], groups(x.shape[1]), -1)
        rows = rows - rows.mean(2, keepdim=True)
        y = (rows / (rows.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
        return y * channels(net[f"{name}.weight"], x) + channels(net[f"{name}.bias"], x)

    return norm


def layer_norm(net: Weights, eps: float = 1e-5) -> Norm:
    """Each position's mean and variance over the channels."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        return y * channels(net[f"{name}.weight"], x) + channels(net[f"{name}.bias"], x)

    return norm


def dense_block(
    x: Tensor, net: Weights, name: str, norm: Norm, activation: Activation, dilation: int = 1
) -> Tensor:
    """Input and new maps of the block, concatenated."""
    once = (1,) * (x.dim() - 2)
    for i in itertools.count(1):
        layer = f"{name}.denselayer{i}"
        if f"{layer}.conv1.weight" not in net:
            return x
        bottleneck = f"{layer}.conv2.weight" in net
        new = activation(norm(x, f"{layer}.norm1"))
        new = conv(new, net, f"{layer}.conv1", once, 1 if bottleneck else dilation)
        if bottleneck:
            new = activation(norm(new, f"{layer}.norm2"))
            new = conv(new, net, f"{layer}.conv2", once, dilation)
        x = torch.cat([x, new], dim=1)


def densenet(
    net: Weights,
    x: Tensor,
    norm: Norm,
    *,
    strides: Sequence[Sequence[int]],
    activation: Activation = ACTIVATIONS["relu"],
    dilations: Sequence[int] | None = None,
    transition_pool: str = "avg",
) -> dict[str, Tensor]:
    """What each part of a DenseNet makes, by the part's name.

    Args:
        net: by torchvision's keys; which are there says whether layers have bottlenecks.
        x: [N, C, ...].
        norm: of maps, with the weights of the given name.
        strides: of the steps that shrink: two of the stem, if it is not the small one, and one
            for each transition.
        activation: after each norm.
        dilations: of each block's 3x3 convolutions.
        transition_pool: "avg" or "max"; comes after the convolution, as in the paper.
    """
    once = (1,) * (x.dim() - 2)
    blocks = {key.split(".")[1] for key in net if key.startswith("features.denseblock")}
    dilations = dilations or (1,) * len(blocks)
    parts: dict[str, Tensor] = {}
    small = len(strides) == len(blocks) - 1
    if small:
        x = conv(x, net, "features.conv0", once)
    else:
        for i in itertools.count():
            if f"features.conv{i}.weight" not in net:
                break
            x = conv(x, net, f"features.conv{i}", strides[0] if i == 0 else once)
            x = activation(norm(x, f"features.norm{i}"))
        x = stem_pool(x, strides[1])
    parts["stem"] = x
    steps = strides if small else strides[2:]
    for b, dilation in enumerate(dilations, start=1):
        x = dense_block(x, net, f"features.denseblock{b}", norm, activation, dilation)
        parts[f"denseblock{b}"] = x
        if b <= len(steps):
            name = f"features.transition{b}"
            x = conv(activation(norm(x, f"{name}.norm")), net, f"{name}.conv", once)
            x = pool(x, transition_pool, steps[b - 1], steps[b - 1])
            parts[f"transition{b}"] = x
    parts["norm5"] = norm(x, "features.norm5")
    parts["activated"] = activation(parts["norm5"])
    parts["pooled"] = parts["activated"].flatten(2).mean(2)
    if "classifier.weight" in net:
        parts["logits"] = parts["pooled"] @ net["classifier.weight"].T + net["classifier.bias"]
    return parts


def fc_densenet(net: Weights, x: Tensor, norm: Norm) -> Tensor:
    """FC-DenseNet without dropout: Jégou et al. (2017), figure 1 and table 1."""
    relu = ACTIVATIONS["relu"]
    dims = x.dim() - 2
    once, twice = (1,) * dims, (2,) * dims
    steps = len({key.split(".")[1] for key in net if key.startswith("down.")})
    x = conv(x, net, "conv0", once)
    skips = []
    for i in range(steps):
        x = dense_block(x, net, f"down.{i}.denseblock", norm, relu)
        skips.append(x)
        name = f"down.{i}.transition"
        x = conv(relu(norm(x, f"{name}.norm")), net, f"{name}.conv", once)
        x = pool(x, "max", twice, twice)
    new = dense_block(x, net, "bottleneck", norm, relu)[:, x.shape[1] :]
    for i in range(steps):
        name = f"up.{i}.transition"
        up = TRANSPOSED_CONVS[2 + dims](
            new, net[f"{name}.weight"], net[f"{name}.bias"], stride=twice
        )
        skip = skips.pop()
        for axis in range(
            2, 2 + dims
        ):  # the middle: rows before it are as many as after, or one fewer
            before = (up.shape[axis] - skip.shape[axis]) // 2
            up = up.index_select(axis, torch.arange(skip.shape[axis]) + before)
        x = torch.cat([up, skip], dim=1)
        joined = dense_block(x, net, f"up.{i}.denseblock", norm, relu)
        new = joined[:, x.shape[1] :]
    return conv(joined, net, "classifier", once)
