"""Stage `tune`: which tiles, warps and stages are fastest on this GPU, kernel by kernel.

The launch tables at the head of the Triton files are made from what this prints. Candidates are
compiled by many processes at once, into Triton's cache, and then timed one after another by one;
"library" is the same step through cuDNN or cuBLAS between element-wise kernels. Backward of 1x1
convolutions is timed with the launch that forms the gradient before, and as "pending" without.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_check import tune_stem
from gpu_check.setting import OUT_OF_TIME, Setting, in_a_line

LIBRARY = ("library",)
PENDING = ("pending",)


@dataclass(frozen=True)
class Shape:
    """Of a step: images, side of the maps, channels read, stride of the rows, outputs."""

    name: str
    batch: int
    side: int
    channels: int
    stride: int
    outputs: int
    taps: int
    adds: bool

    @property
    def rows(self) -> int:
        return self.batch * self.side * self.side


POINTWISE = (
    Shape("121 block 1", 256, 56, 160, 256, 128, 1, True),
    Shape("121 block 2", 256, 28, 320, 512, 128, 1, True),
    Shape("bc block 1", 256, 32, 120, 216, 48, 1, True),
)
SPATIAL = (
    Shape("d2l block 1", 256, 24, 160, 192, 32, 3, True),
    Shape("121 block 1", 256, 56, 128, 128, 32, 3, False),
    Shape("bc block 1", 256, 32, 48, 48, 12, 3, False),
)
STEM = (Shape("d2l", 256, 96, 1, 1, 64, 7, False),)


def _candidates(kind: str, shape: Shape) -> Iterator[tuple[Any, ...]]:
    """As `_Launch` of the kernel has them; the first is what the table says now (None)."""
    width = max(16, 1 << (shape.outputs - 1).bit_length())
    yield ()
    yield LIBRARY
    if kind in tune_stem.KINDS:
        yield from tune_stem.candidates()
        return
    from densely.fused.kernels import triton_pointwise, triton_spatial
    from densely.fused.kernels import triton_spatial_backward as back

    if kind == "pointwise backward":
        yield PENDING
    tried: tuple[tuple[int | None, ...], ...] = {
        "pointwise forward": triton_pointwise.FORWARDS,
        "pointwise backward": triton_pointwise.BACKWARDS,
        "spatial forward": triton_spatial.FORWARDS,
        "spatial input": back.INPUTS,
        "spatial weight": back.WEIGHTS,
    }[kind]
    together = (3,) if kind.startswith("spatial") else ()
    for rows, channels, warps, stages, *rest in tried:
        yield rows, channels, width, warps, stages, *together, *rest


KINDS = {
    **dict.fromkeys(tune_stem.KINDS, STEM),
    "pointwise forward": POINTWISE,
    "pointwise backward": POINTWISE,
    "spatial forward": SPATIAL,
    "spatial input": SPATIAL,
    "spatial weight": SPATIAL,
}


class _ByRule:
    """Leaves each launch to what this stage has put in the place of its rule."""

    def choose(self, choice: Any) -> Any:
        return choice.usual


def run(setting: Setting) -> int:
    """Run the stage; 0 if all candidates had their turn, and the present tables could be timed."""
    from densely.fused.kernels.triton_launches import tuning

    with tuning(_ByRule()):
        return _timed(setting)


def _timed(setting: Setting) -> int:
    kinds = {kind: shapes for kind, shapes in KINDS.items() if kind in (setting.kinds or KINDS)}
    jobs = [
        (kind, shape, candidate)
        for kind, shapes in kinds.items()
        for shape in shapes
        for candidate in _candidates(kind, shape)
    ]
    workers = min(14, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        pool.map(_compile, [jobs[i::workers] for i in range(workers)], chunksize=1)
    rows: list[dict[str, Any]] = []
    failed = False
    torch.backends.cudnn.benchmark = True
    for kind, shapes in kinds.items():
        for shape in shapes:
            print(f"\n{kind}, {shape.name}: us", flush=True)
            for candidate in _candidates(kind, shape):
                row: dict[str, Any] = {"kind": kind, "shape": shape.name, "launch": candidate}
                rows.append(row)
                if setting.left_s() < 0:
                    row["gap"], failed = OUT_OF_TIME, True
                    continue
                try:
                    row["us"] = round(_microseconds(_work(kind, shape, candidate)), 1)
                except Exception as error:
                    row["error"] = in_a_line(error)
                    failed |= candidate == ()
                found = row.get("us") or row["error"][:90]
                print(f"  {candidate or 'the table'!s:40} {found}", flush=True)
            (setting.out / "tune.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if failed else 0


def _compile(jobs: Sequence[tuple[str, Shape, tuple[Any, ...]]]) -> None:
    from densely.fused.kernels.triton_launches import tuning

    with tuning(_ByRule()):
        _compile_each(jobs)


def _compile_each(jobs: Sequence[tuple[str, Shape, tuple[Any, ...]]]) -> None:
    for kind, shape, candidate in jobs:
        if candidate == LIBRARY:
            continue
        small = Shape(**(vars(shape) | {"batch": 2}))
        try:
            _work(kind, small, candidate, like=shape)()
            torch.cuda.synchronize()
        except Exception:
            continue  # it will fail again, and be named, when it is to be timed


def _microseconds(work: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return 1000 * float(do_bench(work, warmup=5, rep=25, return_mode="median"))


def _work(
    kind: str, shape: Shape, candidate: tuple[Any, ...], like: Shape | None = None
) -> Callable[[], object]:
    """A call of the kernel on random data, by the candidate's launch."""
    from densely.fused.kernels import triton_kernels, triton_pointwise, triton_spatial
    from densely.fused.kernels import triton_spatial_backward as back
    from densely.fused.kernels.operands import Affine, Convolution, Pending, Space
    from densely.fused.kernels.triton_tiles import window_of

    if kind in tune_stem.KINDS:
        size = (shape.batch, shape.side, shape.channels)
        return tune_stem.work(kind, *size, candidate, candidate == LIBRARY)
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    rows, channels, outputs = shape.rows, shape.channels, shape.outputs
    buffer = torch.randn(rows, shape.stride, device=device).to(dtype)
    x = buffer[:, :channels]
    scale, shift, mean, rstd = (torch.rand(channels, device=device) for _ in range(4))
    affine = Affine(scale, shift, mean, rstd, True)
    weight = torch.randn(outputs, channels, shape.taps, shape.taps, device=device).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    space = Space(shape.batch, (shape.side, shape.side))
    conv = Convolution(affine, weight, None, 1, space)
    total = torch.empty_like(buffer)[:, :channels]
    library, pending = candidate == LIBRARY, candidate == PENDING
    kernels = triton_kernels.TritonKernels()

    def set_launch(module: Any, name: str) -> None:
        original = getattr(module, f"_table_{name}", None) or getattr(module, name)
        setattr(module, f"_table_{name}", original)
        named = library or pending or not candidate
        launch = None if named else module._Launch(*candidate)

        def chosen(x: Tensor, *rest: Any) -> Any:
            if launch is not None:
                return launch
            if like is not None:  # the table goes by the number of rows
                x = x[:1].as_strided((like.rows, channels), (0, 1))
            return original(x, *rest)

        setattr(module, name, chosen)

    if kind.endswith("forward"):
        out = torch.empty(rows, 256, device=device, dtype=dtype)[:, 32 : 32 + outputs]
        of_out = torch.empty(outputs, device=device), torch.empty(outputs, device=device)
        module = triton_pointwise if shape.taps == 1 else triton_spatial
        set_launch(module, "_forward_launch")
        if library:
            return lambda: _through_library(lambda: kernels.convolve(x, conv, out, of_out))
        if shape.taps == 1:
            return lambda: triton_pointwise.forward(x, affine, weight.flatten(1), None, out, True)
        return lambda: triton_spatial.forward(x, affine, weight, None, 1, space, out, True)
    if kind == "pointwise backward":
        g, gx = (torch.randn(rows, outputs, device=device).to(dtype) for _ in range(2))
        grad = Pending(g, gx, *(torch.rand(outputs, device=device) for _ in range(4)))
        set_launch(triton_pointwise, "_backward_launch")
        if library:
            return lambda: _through_library(
                lambda: kernels._back(grad, x, conv, True, (total, None, shape.adds), None)
            )
        rest = (x, affine, weight.flatten(1), True, total, None, shape.adds)
        if pending:
            return lambda: triton_pointwise.backward(grad, *rest)
        return lambda: triton_pointwise.backward(kernels.form(grad, grad.g), *rest)
    grads = torch.randn(rows, outputs, device=device).to(dtype)
    if library:
        needs = kind == "spatial weight"
        return lambda: _through_library(
            lambda: kernels._back(grads, x, conv, needs, (total, None, shape.adds), None)
        )
    window = window_of(weight, 1, space)
    if kind == "spatial weight":
        set_launch(back, "_weight_launch")
        return lambda: back._weight_gradient(grads, x, affine, window, 1)[1]()
    set_launch(back, "_input_launch")
    return lambda: back.backward(grads, x, affine, weight, 1, space, False, total, None, shape.adds)


def _through_library(work: Callable[[], object]) -> object:
    from densely.fused.kernels import triton_kernels

    own = triton_kernels._has_product
    triton_kernels._has_product = lambda *_: False
    try:
        return work()
    finally:
        triton_kernels._has_product = own
