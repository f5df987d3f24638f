"""What the Triton convolutions share: how a tile is normalised, masked, summed up, and its layout.

A tile of x is read once, normalised in registers and rounded to the dtype of the maps: forward and
backward call the same function, so that backward's mask is exactly where forward's relu was zero.
Nothing is summed by atomics: each program writes its part, and the order of all sums is fixed.

Widths of vector accesses follow from what the compiler knows of strides and bounds. It asks only
whether an integer divides by 16, so strides come in units: `stride // unit`, with the unit known.
"""

# Kernels are written in Triton's language, which has no types that mypy could follow.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densely.fused.kernels.operands import Pending, Space
from densely.processors import processors


@triton.jit
def wide(tile):
    """A number of a loop in 64 bits, for addresses of whole tiles; those within need 32."""
    return tl.full((), 1, tl.int64) * tile


@triton.jit
def upright(matrix, first, index, row, cols):
    """Addresses [channels, rows] of the rows from `first`, of 64 bits, on by `index`."""
    return matrix + first * row + (index[None, :] * row + cols[:, None])


@triton.jit
def normalised(x, scale, shift):
    """relu(x * scale + shift), rounded to x's dtype; NaN stays NaN, as in torch.

    The vectors come with an axis of 1 beside them.
    """
    x32 = x.to(tl.float32)
    y = tl.fma(x32, tl.broadcast_to(scale, x32.shape), tl.broadcast_to(shift, x32.shape))
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@triton.jit
def divide(number, divisor):
    """The quotient of numbers below a million, rounded down, for a fraction of the price."""
    return ((number.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


@triton.jit
def place_of(first, offset, height, width):
    """Image, line and place in the line of the rows first + offset.

    `first` may be below zero; of rows below zero only the place says something.
    """
    w = first % width + offset
    line = first // width
    lines = divide(w, width)
    h = line % height + lines
    images = divide(h, height)
    return line // height + images, h - images * height, w - lines * width


@triton.jit
def formed(g, gx, scale, mean, a, b, first, index, row_mask, g_row, gx_row, cols, col_mask):
    """A tile of a gradient, see `reference.Pending`: g * scale - a - (x - mean) * b, rounded to g.

    `gx`, `mean`, `a` and `b` come together or are None; so may `scale`. Zero outside of the masks.
    """
    mask = row_mask[:, None] & col_mask[None, :]
    value = tl.load(g + first * g_row + (index[:, None] * g_row + cols[None, :]), mask=mask,
                    other=0.0)  # fmt: skip
    dtype = value.dtype
    if scale is not None:
        value = value.to(tl.float32) * tl.load(scale + cols, mask=col_mask, other=0.0)[None, :]
    if b is not None:
        dtype = gx.dtype.element_ty
        x = tl.load(gx + first * gx_row + (index[:, None] * gx_row + cols[None, :]), mask=mask,
                    other=0.0)  # fmt: skip
        means = tl.load(mean + cols, mask=col_mask, other=0.0)[None, :]
        slope = tl.load(b + cols, mask=col_mask, other=0.0)[None, :]
        level = tl.load(a + cols, mask=col_mask, other=0.0)[None, :]
        value = value.to(tl.float32) - level - (x.to(tl.float32) - means) * slope
        value = tl.where(mask, value, 0.0)
    return value.to(dtype)


@triton.jit
def loaded_total(total, base, first, index, total_row, base_row, cols, mask, ADD: tl.constexpr):
    """The tile [channels, rows] that `masked_back` adds to; it is asked for early."""
    before = None
    if ADD:
        if base is not None:
            at = upright(base, first, index, base_row, cols)
        else:
            at = upright(total, first, index, total_row, cols)
        before = tl.load(at, mask=mask, other=0.0)
    return before


@triton.jit
def masked_back(
    back, x, scale, shift, mean, before, total, first, index, total_row, cols, mask,
    ADD: tl.constexpr,
):  # fmt: skip
    """What follows the product in backward, on tiles [channels, rows].

    Masks `back` where relu was zero, and stores total = before + scale * back, or back.
    Returns the normalised x, and the sums over rows of back and of back * (x - mean).

    Tiles stand upright because then a thread of the tensor cores holds a few channels and many
    rows: the vectors take few registers, and sums over rows few exchanges between threads.
    """
    act = normalised(x, scale[:, None], shift[:, None])
    back = tl.where(act <= 0, 0.0, back)
    result = back
    if ADD:
        result = before.to(tl.float32) + back * scale[:, None]
    at = upright(total, first, index, total_row, cols)
    tl.store(at, result.to(total.dtype.element_ty), mask=mask)
    apart = x.to(tl.float32) - mean[:, None]
    return act, tl.sum(back, axis=1), tl.sum(back * apart, axis=1)


@triton.jit
def store_moments(values, row_mask, count, parts, tile, cols, width, col_mask):
    """Mean and M2 of the columns of a tile, to parts[tile, :, cols]; `count` rows are valid."""
    mean = tl.sum(tl.where(row_mask[:, None], values, 0.0), axis=0) / count
    apart = tl.where(row_mask[:, None], values - mean[None, :], 0.0)
    at = parts + tile.to(tl.int64) * 2 * width + cols
    tl.store(at, mean, mask=col_mask)
    tl.store(at + width, tl.sum(apart * apart, axis=0), mask=col_mask)


class Columns(NamedTuple):
    """How the columns of x and of what has its shape are read."""

    #: Of C: a bound that may be read, a multiple of `read_unit` and at least C.
    read: int
    read_unit: int
    #: Largest of 8, 4, 2, 1 that divides C, and that divides all row strides.
    unit: int
    row_unit: int


def columns(x: Tensor, *others: Tensor | None) -> Columns:
    """How to read x [rows, C], and others of its shape.

    Rows are read up to a multiple of 8 columns where the memory behind x has them: what
    is beyond C is thrown away, but lets the loads be 16 bytes wide.
    """
    rows, channels = x.shape
    stride = x.stride(0)
    unit = unit_of(channels)
    row_unit = unit_of(stride, *(t.stride(0) for t in others if t is not None))
    if unit == 8 or stride % 8:
        return Columns(channels, unit, unit, row_unit)
    read = channels + -channels % 8
    last = x.storage_offset() + (rows - 1) * stride + read
    inside = last * x.element_size() <= x.untyped_storage().nbytes()
    return Columns(read, 8, unit, row_unit) if inside else Columns(channels, unit, unit, row_unit)


def unit_of(*numbers: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all: more than 16 bytes help nobody."""
    lowest_bits = 8
    for number in numbers:
        lowest_bits |= number
    return lowest_bits & -lowest_bits


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own, which works in kernels too, takes 2 us."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is no less than the number, which is 1 at least."""
    return 1 << (number - 1).bit_length()


class Arriving(NamedTuple):
    """Arguments of `formed` for a gradient: None where a vector adds nothing."""

    g: Tensor
    gx: Tensor | None
    scale: Tensor | None
    mean: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @property
    def rows(self) -> tuple[int, int]:
        """Row strides of `g` and `gx`."""
        return self.g.stride(0), 0 if self.gx is None else self.gx.stride(0)


def arriving(grad: Tensor | Pending) -> Arriving:
    """The gradient, formed where it is read."""
    if isinstance(grad, Tensor):
        return Arriving(grad, None, None, None, None, None)
    if grad.mean is None or grad.a is None or grad.b is None:
        return Arriving(grad.g, None, grad.scale, None, None, None)
    return Arriving(*grad)


def precision(x: Tensor) -> str:
    """How a product of float32 is made; the others have one way only.

    These products stand for convolutions and are none of cuDNN's: both settings must allow tf32.
    """
    if x.dtype != torch.float32:
        return "ieee"
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    return "tf32" if all(s.fp32_precision == "tf32" for s in settings) else "ieee"


def exact(x: Tensor) -> bool:
    """Whether products run outside of the tensor cores, which takes smaller tiles."""
    return x.dtype == torch.float32 and precision(x) == "ieee"


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on x's device."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            launch(kernel, grid, x, *args, **options)
    elif _compiling_ahead.get():
        kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **options)  # Triton's default until 3.10


#: Whether this Triton can compile many kernels at once; those before 3.5 cannot.
COMPILES_AHEAD = hasattr(triton, "AsyncCompileMode")
_compiling_ahead: ContextVar[bool] = ContextVar("compiling_ahead", default=False)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Compile the kernels that would be launched within, as many at once as there are processors.

    Nothing is launched, so what they would have written holds anything. Compilers leave Python's
    lock alone for most of the time, so threads are enough. What fails to compile fails
    again when it is to be launched.
    """
    workers = ThreadPoolExecutor(processors())
    mode = triton.AsyncCompileMode(workers, ignore_errors=True)
    # Backward too in this thread, which is the one that Triton asks how to compile.
    with workers, torch.autograd.set_multithreading_enabled(False), mode:
        token = _compiling_ahead.set(True)
        try:
            yield
        finally:
            _compiling_ahead.reset(token)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors, which grids are sized for; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may take; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def splits_for(x: Tensor, tiles: int, columns_of_programs: int, programs: int) -> int:
    """Into how many parts the row tiles of x go, for so many programs on each multiprocessor."""
    wanted = multiprocessors(x.device) * programs // columns_of_programs
    return max(1, min(tiles, wanted))


class Window(NamedTuple):
    """A convolution's window and the images it moves over; signals are images one pixel high."""

    #: [O, kh, kw, C], contiguous.
    weight: Tensor
    kh: int
    kw: int
    height: int
    width: int
    #: Of how many rows to each side of its own an output needs the products, within an image row.
    rim: int


def window_of(weight: Tensor, dilation: int, space: Space) -> Window:
    """The window of weights [O, C, kh, kw] or [O, C, kw]."""
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    height, width = space.size if len(space.size) == 2 else (1, *space.size)
    kh, kw = weight.shape[2:]
    taps = weight.permute(0, 2, 3, 1).contiguous()
    return Window(taps, kh, kw, height, width, dilation * (kw // 2))
