"""How a network shrinks its input: strides of each step, dilations, smallest input."""

from collections.abc import Sequence
from dataclasses import dataclass

from densely.models.arguments import is_whole

#: Strides of one step, an axis each.
Stride = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Strides of every step that may shrink the maps, and the dilation of each dense block.

    Args:
        spatial_dims: number of axes.
        stem: strides of the stem's convolution and pooling; empty for the small stem.
        transitions: strides of the transitions' pooling; all 1 where one does not pool.
        dilations: of the 3x3 convolutions of each block.
    """

    spatial_dims: int
    stem: tuple[Stride, ...]
    transitions: tuple[Stride, ...]
    dilations: tuple[int, ...]

    @property
    def block_strides(self) -> tuple[Stride, ...]:
        """Strides of each block's maps against the input."""
        stride = (1,) * self.spatial_dims
        for step in self.stem:
            stride = tuple(a * b for a, b in zip(stride, step, strict=True))
        strides = [stride]
        for step in self.transitions:
            strides.append(tuple(a * b for a, b in zip(strides[-1], step, strict=True)))
        return tuple(strides)

    @property
    def smallest_input(self) -> Stride:
        """Size an axis below which the last maps would be empty."""
        sizes = [1] * self.spatial_dims
        for step in reversed(self.transitions):  # pooling rounds down: size // stride
            sizes = [stride * size for stride, size in zip(step, sizes, strict=True)]
        for step in reversed(self.stem):  # padded, so rounds up: (size - 1) // stride + 1
            sizes = [stride * (size - 1) + 1 for stride, size in zip(step, sizes, strict=True)]
        return tuple(sizes)


def plan(
    spatial_dims: int,
    num_blocks: int,
    *,
    stem_steps: int,
    stem_name: str = "large",
    strides: Sequence[Sequence[int]] | None,
    output_stride: int | None,
) -> tuple[Geometry, list[str]]:
    """Resolve strides and dilations; returns what is wrong with them, in words, beside.

    Args:
        spatial_dims: number of axes.
        num_blocks: dense blocks; one transition fewer.
        stem_steps: steps of the stem that shrink: 2 for convolution and pooling, 0 for none.
        stem_name: for what is wrong.
        strides: of each step an axis, stem first; None for 2 everywhere.
        output_stride: stride of the last maps: transitions that would go beyond it do not pool,
            and the blocks after them are dilated instead (Chen et al., "DeepLab", 2017).
    """
    steps = stem_steps + num_blocks - 1
    usual = tuple((2,) * spatial_dims for _ in range(steps))
    faults = []
    chosen = usual
    if strides is not None:
        if len(strides) == steps and all(_is_stride(step, spatial_dims) for step in strides):
            chosen = tuple(tuple(map(int, step)) for step in strides)
        else:
            faults.append(
                f"strides={strides}: must be {steps} lists of {spatial_dims} whole numbers from 1 "
                f"on, one for each step that shrinks with stem='{stem_name}'"
            )
    dilations = [1] * num_blocks
    stem, transitions = chosen[:stem_steps], list(chosen[stem_steps:])
    if output_stride is not None:
        allowed = [2 ** (stem_steps + t) for t in range(num_blocks)]
        if strides is not None:
            faults.append("output_stride and strides exclude each other")
        elif output_stride not in allowed:
            faults.append(
                f"output_stride={output_stride}: must be one of {', '.join(map(str, allowed))} "
                f"with stem='{stem_name}'"
            )
        else:
            for t in range(allowed.index(output_stride), num_blocks - 1):
                transitions[t] = (1,) * spatial_dims
                dilations[t + 1] = 2 * dilations[t]
    return Geometry(spatial_dims, stem, tuple(transitions), tuple(dilations)), faults


def _is_stride(step: object, spatial_dims: int) -> bool:
    return (
        isinstance(step, Sequence)
        and len(step) == spatial_dims
        and all(is_whole(s) and s >= 1 for s in step)
    )
