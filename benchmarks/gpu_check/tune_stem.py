"""The stem's kernels for `tune`; "library" is cuDNN, and kernels on the map that it makes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

KINDS = ("stem moments", "stem pool", "stem backward")


def candidates() -> Iterator[tuple[int, int, int, int]]:
    """Rows, outputs, warps, programs."""
    for rows, warps, programs in (
        (32, 4, 3), (32, 4, 4), (16, 4, 5), (64, 4, 2), (64, 8, 2), (128, 8, 1),
    ):  # fmt: skip
        yield rows, 64, warps, programs


def work(
    kind: str, batch: int, side: int, channels: int, candidate: tuple[Any, ...], library: bool
) -> Callable[[], object]:
    """A call of the kernel on random images, by the candidate's launch; empty for the table's."""
    from densely.fused.kernels import triton_image_stem, triton_kernels
    from densely.fused.kernels.operands import Affine, FirstConvolution, Pooling, Space

    device, dtype, outputs = torch.device("cuda"), torch.bfloat16, 64
    torch.manual_seed(0)
    space = Space(batch, (side + 6, side + 6))  # padded
    weight = torch.randn(outputs, channels, 7, 7, device=device).to(dtype)
    conv = FirstConvolution(weight, (2, 2), space)
    images = torch.rand(space.rows, channels, device=device).to(dtype)
    scale, shift, mean, rstd = (torch.rand(outputs, device=device) for _ in range(4))
    affine, pooling = Affine(scale, shift, mean, rstd, True), Pooling("max", (2, 2))
    kernels = triton_kernels.TritonKernels()
    sums = kernels.image_sums(images, conv)
    _, choice = kernels.image_pool(images, conv, affine, pooling)
    grad = torch.randn(choice.shape, device=device).to(dtype)

    table = getattr(triton_image_stem, "_table", None) or triton_image_stem._launch
    triton_image_stem._table = table  # type: ignore[attr-defined]
    launch = triton_image_stem._Launch(*candidate) if candidate and not library else None
    triton_image_stem._launch = lambda *given: launch or table(*given)
    if not library:
        return {
            "stem moments": lambda: kernels.image_moments(images, conv, (mean, rstd), sums),
            "stem pool": lambda: kernels.image_pool(images, conv, affine, pooling),
            "stem backward": lambda: kernels.image_backward(
                grad, choice, sums, images, conv, affine, pooling
            ),
        }[kind]
    maps = space.maps(images)
    made = conv.made.matrix(F.conv2d(maps, weight, None, (2, 2)))

    def convolved() -> None:
        again = conv.made.matrix(F.conv2d(maps, weight, None, (2, 2)))
        kernels.finish(kernels.moments(again, (mean, rstd)))

    def back() -> object:
        g, norm = kernels.pool_backward(grad, choice, made, affine, pooling, conv.made)
        return norm, torch.ops.aten.convolution_backward(
            conv.made.maps(g), maps, weight, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1,
            [False, True, False],
        )  # fmt: skip

    return {
        "stem moments": convolved,
        "stem pool": lambda: kernels.pool(made, affine, pooling, conv.made),
        "stem backward": back,
    }[kind]
