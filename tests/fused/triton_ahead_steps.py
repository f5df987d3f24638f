"""Compile the kernels around blocks' convolutions, as `triton_ahead` does those.

The argument is the compute capability.
"""

import json
import sys

import torch
from torch import Tensor
from triton_ahead import TYPES, compiled

from densely.fused.kernels import (
    triton_elementwise,
    triton_image_stem,
    triton_pooling,
    triton_pooling_backward,
    triton_vectors,
)
from densely.fused.kernels.operands import (
    Affine,
    FirstConvolution,
    NormVectors,
    Pending,
    Pooling,
    Space,
    Unfinished,
)

TYPES[torch.uint8] = "*u8"
BF16 = torch.bfloat16


def steps(batch: int, size: int, channels: int, width: int) -> None:
    """Every function of the three modules, on the first channels of a buffer in bfloat16."""
    space = Space(batch, (size, size))

    def empty(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype)

    x, own = empty(space.rows, width)[:, :channels], empty(space.rows, channels)
    total = empty(space.rows, width, torch.float32)[:, :channels]
    vectors = [torch.empty(channels) for _ in range(4)]
    affine = Affine(*vectors, True)
    scale, _, mean, _ = vectors

    norm = NormVectors(*vectors, 1e-5, True)
    for number in (300, 3000):
        partials = torch.empty(number, 2, 32)
        after = Unfinished(partials, 64, space.rows, mean[-32:], vectors[3][-32:])
        triton_vectors.affine(norm, after)
    triton_vectors.affine(norm)
    triton_vectors.finish_moments(*triton_elementwise.moments(x), space.rows, *vectors[:2])
    weights = torch.empty(132, 128, channels)
    triton_vectors.finish_norm(torch.empty(3000, 2, channels), affine, space.rows, None, weights)
    triton_elementwise.norm_relu(x, affine, own)
    for base in (None, own):
        partials = triton_elementwise.norm_relu_backward(own, x, affine, total, base, True)
        triton_vectors.finish_norm(partials, affine, space.rows, (scale, mean))
    triton_elementwise.norm_relu_backward(own, x, affine, own, None, False)
    triton_elementwise.form(Pending(total, x, None, mean, *vectors[:2]), own)
    triton_elementwise.form(Pending(own, x, scale, mean, *vectors[:2]), own)
    for pooling in (
        Pooling("average", (2, 2)),
        Pooling("average", (size, size)),
        Pooling("max", (2, 2)),
    ):
        rows = pooling.pooled(space).rows
        out, choice = empty(rows, channels), empty(rows, channels, torch.uint8)
        largest = pooling.kind == "max"
        triton_pooling.pool(x, affine, pooling, space, out, choice if largest else None)
        for how in (affine, affine._replace(training=False)):
            triton_pooling_backward.pool_backward(out, choice, x, how, pooling, space, own)


def image_stem() -> None:
    """The stem of the chapter's net, the images padded, in bfloat16."""
    conv = FirstConvolution(torch.empty(64, 1, 7, 7, dtype=BF16), (2, 2), Space(256, (102, 102)))
    images = torch.empty(conv.space.rows, 1, dtype=BF16)
    affine, pooling = Affine(*(torch.empty(64) for _ in range(4)), True), Pooling("max", (2, 2))
    out = torch.empty(pooling.pooled(conv.made).rows, 64, dtype=BF16)
    choice = torch.empty(out.shape, dtype=torch.uint8)
    sums = torch.empty(65, 49)
    triton_image_stem.moments(images, conv, (affine.mean, affine.rstd), sums)
    triton_image_stem.pool(images, conv, affine, pooling, out, choice)
    triton_image_stem.backward(out, choice, sums, images, conv, affine, pooling)


if __name__ == "__main__":
    seen = set()
    for call in (lambda: steps(64, 14, 512, 1024), image_stem):
        for item in compiled(call, int(sys.argv[1])):
            found = json.dumps(dict(list(item._asdict().items())[:-1]))
            if found not in seen:
                seen.add(found)
                print(found)
