"""Batch norms as vectors: what they do to maps at a call, and what they learn from it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from densely.fused.kernels.reference import Affine
from densely.fused.plain import Norm


def affine(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool
) -> Affine:
    """X * scale + shift = weight * (x - mean) / sqrt(var + eps) + bias.

    `mean` and `var` are of the accumulation dtype, or running statistics in any.
    """
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (v.to(dtype).contiguous() for v in (weight, bias, mean, var))
    rstd = (var + eps).rsqrt()
    scale = weight * rstd
    return Affine(scale, bias - mean * scale, mean, rstd, training)


def parameters(norm: Norm, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias [channels] of a norm on maps like x; 1 and 0 where it has none."""
    weight, bias = norm.weight, norm.bias
    return (
        x.new_ones(channels) if weight is None else weight,
        x.new_zeros(channels) if bias is None else bias,
    )


def update_running_statistics(norms: Iterable[tuple[Norm, Tensor, Tensor]], rows: int) -> None:
    """Let norms in train mode learn batch means and biased variances, as nn.BatchNorm does."""
    with torch.no_grad():
        for norm, mean, var in norms:
            if not norm.training or norm.running_mean is None or norm.running_var is None:
                continue
            momentum = 0.0 if norm.momentum is None else norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if norm.momentum is None:  # the mean over all batches so far
                    momentum = 1.0 / float(norm.num_batches_tracked)
            unbiased = var * (rows / (rows - 1))
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
