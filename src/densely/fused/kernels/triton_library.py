"""The convolutions' forward through cuBLAS and cuDNN, between kernels that norm and take moments.

It writes what is normalised to memory and reads it again, which the kernels do not; the library's
products may be so much faster for a shape that it is ahead all the same. Whether they are is
measured by `densely bench --tune`, see `triton_launches`; by rule nothing goes this way.

Each time alike: cuDNN tries no algorithms, and takes none that adds up in any order. Of those for
gradients some do, so there is no backward.
"""

import torch
from torch import Tensor

from densely.fused.kernels import triton_elementwise
from densely.fused.kernels.operands import Affine, Space
from densely.fused.kernels.reference import same_padding


def pointwise(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    want_moments: bool,
    after: Affine | None,
) -> tuple[Tensor, int] | None:
    """As `triton_pointwise.forward`, but rounded before the norm `after` it too."""
    act, columns = triton_elementwise.norm_relu(x, affine), weight.t()
    made = torch.mm(act, columns) if bias is None else torch.addmm(bias, act, columns)
    if after is None:
        return _placed(made, out, want_moments)
    triton_elementwise.norm_relu(made, after, out)
    return None


def spatial(
    x: Tensor,
    affine: Affine | None,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    space: Space,
    out: Tensor,
    want_moments: bool,
) -> tuple[Tensor, int] | None:
    """As `triton_spatial.forward`, on images."""
    act = x if affine is None else triton_elementwise.norm_relu(x, affine)
    maps = space.maps(act)
    made = torch.ops.aten._convolution(
        maps, weight, bias, [1, 1], same_padding(weight, dilation), [dilation, dilation], False,
        [0, 0], 1, benchmark=False, deterministic=True, cudnn_enabled=True, allow_tf32=True,
    )  # fmt: skip
    return _placed(space.matrix(made), out, want_moments)


def _placed(made: Tensor, out: Tensor, want_moments: bool) -> tuple[Tensor, int] | None:
    if want_moments:
        return triton_elementwise.moments(made, out)
    out.copy_(made)
    return None
