"""The four steps of a DenseNet in plain PyTorch: what every faster backend must equal.

    stem        max pool(relu(norm(x)))                     3^d windows, stride 2, padding 1
    dense block x, then for each layer: x = [x, H(x)]
    transition  conv(average pool(relu(norm(x))))           2^d windows, 1x1 convolution
    final       global average(relu(norm(x)))

Each takes its input [N, C, *space] with one, two or three dimensions of space, and the tensors
of its modules as `Norm`, `Conv` and `Layer`. These are gathered at each call and never kept, so
that `functional_call`, `.to()` and weights that are swapped for their average are seen.

A step changes nothing but the running statistics of its norms, and those as nn.BatchNorm does.
ReLU works in place on the norm's output, which nobody else sees and no backward reads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A batch norm as its module holds it at this call.

    Statistics that the module must not touch now (train mode, not tracked) are None here.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    training: bool


class Conv(NamedTuple):
    """A convolution of stride 1 that keeps the size."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """`H` of one dense layer: norm-ReLU-1x1, norm-ReLU-3x3, dropout.

    `drop_rate` is 0 outside of train mode; `drop_maps` says that whole maps drop, not pixels.
    """

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    drop_rate: float
    drop_maps: bool


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def norm_relu(x: Tensor, norm: Norm) -> Tensor:
    """relu(batch_norm(x)), with the running statistics updated where nn.BatchNorm updates them."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean over all batches so far
            momentum = 1.0 / float(norm.num_batches_tracked)
    y = F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum,
        norm.eps,
    )
    return F.relu(y, inplace=True)


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """Convolution of stride 1, padded to keep the size."""
    return _CONV[x.dim() - 2](x, conv.weight, conv.bias, padding=conv.weight.shape[2] // 2)


def dense_layer(x: Tensor, layer: Layer) -> Tensor:
    """The new features of one layer: [N, C, *space] to [N, growth_rate, *space]."""
    y = convolve(norm_relu(x, layer.norm1), layer.conv1)
    y = convolve(norm_relu(y, layer.norm2), layer.conv2)
    if layer.drop_rate == 0:
        return y
    drop = torch.feature_dropout if layer.drop_maps else F.dropout
    return drop(y, layer.drop_rate, True)


def dense_block(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """Layers that each read all before them: [N, C, *space] to [N, C + sum of new, *space]."""
    for layer in layers:
        x = torch.cat((x, dense_layer(x, layer)), dim=1)
    return x


def transition(x: Tensor, norm: Norm, conv: Conv) -> Tensor:
    """Fewer channels, half the size.

    Pools before the 1x1 convolution: both are linear and the convolution works on each pixel
    alone, so the function is the same, with 2^d times less to convolve. That holds with a bias
    too, as each window averages as many pixels as it has.
    """
    return convolve(_AVG_POOL[x.dim() - 2](norm_relu(x, norm), 2), conv)


def stem(x: Tensor, norm: Norm) -> Tensor:
    """From the first convolution's output to the first block's input."""
    return _MAX_POOL[x.dim() - 2](norm_relu(x, norm), 3, stride=2, padding=1)


def final(x: Tensor, norm: Norm) -> Tensor:
    """From the last block's output to the classifier's input: [N, C, *space] to [N, C]."""
    return norm_relu(x, norm).mean(dim=tuple(range(2, x.dim())))
