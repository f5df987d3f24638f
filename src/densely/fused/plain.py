"""The steps of a DenseNet in plain PyTorch: what every faster backend must equal.

    stem        max pool(relu(norm(x)))                     3^d windows, padding 1
    dense block x, then for each layer: x = [x, H(x)]
    transition  conv(average pool(relu(norm(x))))           1x1 convolution
    final       global average(relu(norm(x)))

Each takes its input [N, C, *space] with one, two or three dimensions of space, and the tensors
of its modules as `Norm`, `Conv` and `Step`. These are gathered at each call and never kept, so
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


# Functions and no properties, which PyTorch 2.10's compiler does not know of such tuples.
def takes_batch(norm: Norm) -> bool:
    """Whether it normalises by the statistics of the batch: it may have no others."""
    return len(own_statistics(norm)) == 0  # not `not`, which compilers cannot trace


def own_statistics(norm: Norm) -> tuple[Tensor, ...]:
    """Mean and variance that it normalises by, whatever the batch; empty if by the batch's."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return ()
    return norm.running_mean, norm.running_var


class Conv(NamedTuple):
    """A convolution of stride 1, padded by zeros so that it keeps the size."""

    weight: Tensor
    bias: Tensor | None
    dilation: int = 1


class FirstConv(NamedTuple):
    """The convolution that reads the images; stride and padding are an axis each."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class Step(NamedTuple):
    """Norm - ReLU - convolution - dropout.

    `drop_rate` is 0 outside of train mode; `drop_maps` says that whole maps drop, not pixels.
    """

    norm: Norm
    conv: Conv
    drop_rate: float = 0.0
    drop_maps: bool = False


#: `H` of one dense layer: a step with a 3x3 convolution, or one with a 1x1 before it (bottleneck).
Layer = tuple[Step, ...]


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
        takes_batch(norm),
        momentum,
        norm.eps,
    )
    return F.relu(y, inplace=True)


def convolve(x: Tensor, conv: Conv) -> Tensor:
    """Convolution of stride 1, padded to keep the size."""
    padding = conv.dilation * (conv.weight.shape[2] // 2)
    return _CONV[x.dim() - 2](x, conv.weight, conv.bias, padding=padding, dilation=conv.dilation)


def dropout(x: Tensor, rate: float, maps: bool) -> Tensor:
    """Drop single values, or whole maps; the rest grows so that the mean stays."""
    return torch.feature_dropout(x, rate, True) if maps else F.dropout(x, rate, True)


def dense_layer(x: Tensor, layer: Layer) -> Tensor:
    """The new features of one layer: [N, C, *space] to [N, growth_rate, *space]."""
    for step in layer:
        x = convolve(norm_relu(x, step.norm), step.conv)
        if step.drop_rate > 0:
            x = dropout(x, step.drop_rate, step.drop_maps)
    return x


def dense_block(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """Layers that each read all before them: [N, C, *space] to [N, C + sum of new, *space]."""
    for layer in layers:
        x = torch.cat((x, dense_layer(x, layer)), dim=1)
    return x


def transition(x: Tensor, norm: Norm, conv: Conv, window: tuple[int, ...]) -> Tensor:
    """Fewer channels, smaller by `window`, an axis each.

    Pools before the 1x1 convolution: both are linear and the convolution works on each pixel
    alone, so the function is the same, with as many times less to convolve. That holds with a bias
    too, as each window averages as many pixels as it has.
    """
    x = norm_relu(x, norm)
    if max(window) > 1:
        x = _AVG_POOL[x.dim() - 2](x, window)
    return convolve(x, conv)


def stem(x: Tensor, norm: Norm, stride: tuple[int, ...]) -> Tensor:
    """From the first convolution's output to the first block's input."""
    return _MAX_POOL[x.dim() - 2](norm_relu(x, norm), 3, stride=stride, padding=1)


def first_convolution(images: Tensor, conv: FirstConv) -> Tensor:
    """[N, C, *space] to [N, O, *smaller]."""
    return _CONV[images.dim() - 2](images, conv.weight, conv.bias, conv.stride, conv.padding)


def image_stem(images: Tensor, conv: FirstConv, norm: Norm, stride: tuple[int, ...]) -> Tensor:
    """From the images to the first block's input: the first convolution, and `stem`."""
    return stem(first_convolution(images, conv), norm, stride)


def final(x: Tensor, norm: Norm) -> Tensor:
    """From the last block's output to the classifier's input: [N, C, *space] to [N, C]."""
    return norm_relu(x, norm).mean(dim=tuple(range(2, x.dim())))
