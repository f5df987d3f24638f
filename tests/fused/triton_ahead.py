"""Compile what a call would launch, without a GPU: registers, spills, shared memory.

Run as a program it prints a line for each kernel of typical calls, see `CALLS`, whose name has the
first argument in it; the second is the compute capability: 80 for an A100, 89 for an RTX 4090, else
90 for an H100. It needs a process in which Triton was imported without its interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from densely.fused.kernels import triton_pointwise, triton_spatial
from densely.fused.kernels.operands import Affine, Convolution, Pending, Space
from densely.fused.kernels.triton_kernels import TritonKernels

#: Shared memory of a program in bytes, and multiprocessors, by compute capability.
CHIPS = {80: (166_912, 108), 89: (101_376, 128), 90: (232_448, 132)}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Compiled(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    programs: int
    asm: dict[str, Any]


def compiled(call: Callable[[], object], chip: int = 90) -> Iterator[Compiled]:
    """Compile the kernels that `call` would launch on a chip, with the arguments that it passes."""
    launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], _x: Tensor, *args: Any, **options: Any) -> None:
        launches.append((kernel, grid, args, options))

    modules = [m for n, m in sys.modules.items() if n.startswith("densely.fused.kernels.triton_")]
    memory, processors = CHIPS[chip]
    stand_ins = {
        "launch": record,
        "shared_memory": lambda device: memory,
        "multiprocessors": lambda device: processors,
    }
    for module in modules:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                mock.patch.object(module, name, stand_in).start()
    try:
        call()
    finally:
        mock.patch.stopall()
    for kernel, grid, args, options in launches:
        yield _compile(kernel, grid, args, options, chip)


def _compile(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any], chip: int
) -> Compiled:
    chosen = {n: options[n] for n in ("num_warps", "num_stages", "maxnreg") if n in options}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name not in chosen}
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name], number = TYPES[value.dtype], value.data_ptr()
        elif isinstance(value, int) and not kernel.params[i].is_constexpr:
            signature[name], number = "i32", value
        else:
            signature[name], constants[name], number = "constexpr", value, 1
        if number % 16 == 0 and not kernel.params[i].do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", chip, 32)
    result = triton.compile(
        ASTSource(kernel, signature, constants, attrs), target=target, options=chosen
    )
    registers, local = _usage(result.asm["cubin"])
    programs = 1
    for size in grid:
        programs *= size
    return Compiled(
        kernel.__name__, registers, local, result.metadata.shared, chosen["num_warps"], programs,
        result.asm,
    )  # fmt: skip


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what is spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _affine(channels: int) -> Affine:
    return Affine(*(torch.empty(channels) for _ in range(4)), True)


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Without memory behind it that anybody touches."""
    return torch.empty(rows, columns, dtype=dtype)


def pointwise(rows: int, channels: int, width: int, outputs: int, dtype: torch.dtype) -> None:
    """Forward and backward of the first step of a layer, as a block calls them."""
    x = _empty(rows, width, dtype)[:, :channels]
    out, weight = _empty(rows, outputs, dtype), _empty(outputs, channels, dtype)
    triton_pointwise.forward(x, _affine(channels), weight, None, out, True)
    vectors = [torch.empty(outputs) for _ in range(4)]
    grad, whole = Pending(out, out, *vectors), _empty(rows, width, dtype)[:, :channels]
    triton_pointwise.backward(grad, x, _affine(channels), weight, True, whole, None, True)
    base = _empty(rows, width, dtype)[:, :channels]
    triton_pointwise.backward(grad, x, _affine(channels), weight, True, whole, base, True)


def spatial(
    batch: int,
    size: int,
    channels: int,
    width: int,
    outputs: int,
    add: bool,
    dtype: torch.dtype,
    dilation: int = 1,
) -> None:
    """Forward and backward of a 3x3 convolution; `add` as the first step of a layer."""
    rows, space = batch * size * size, Space(batch, (size, size))
    x, affine = _empty(rows, width, dtype)[:, :channels], _affine(channels)
    weight = torch.empty(outputs, channels, 3, 3, dtype=dtype)
    out = _empty(rows, width + outputs, dtype)[:, width:]
    triton_spatial.forward(x, affine, weight, None, dilation, space, out, True)
    grad = _empty(rows, outputs, dtype)
    total = _empty(rows, width, dtype)[:, :channels]
    triton_spatial.backward(grad, x, affine, weight, dilation, space, True, total, None, add)


def inference(batch: int, size: int, channels: int, width: int, made: tuple[int, int]) -> None:
    """Both convolutions of a bottleneck, where nothing is kept."""
    rows, space = batch * size * size, Space(batch, (size, size))
    x = _empty(rows, width, BF16)[:, :channels]
    first = torch.empty(made[0], channels, 1, 1, dtype=BF16)
    second = torch.empty(made[1], made[0], 3, 3, dtype=BF16)
    TritonKernels().convolve_twice(
        x,
        Convolution(_affine(channels), first, None, 1, space),
        Convolution(_affine(made[0]), second, None, 1, space),
        _empty(rows, width + made[1], BF16)[:, width:],
    )


def tf32(call: Callable[[], object]) -> Callable[[], object]:
    """The call where products of float32 may be rounded to tf32."""

    def allowed() -> None:
        before = torch.backends.cuda.matmul.allow_tf32  # cuDNN allows it anyway
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return allowed


BF16, F32 = torch.bfloat16, torch.float32
#: Calls of nets that people train, by name.
CALLS: dict[str, Callable[[], object]] = {
    "densenet121 block 1": lambda: pointwise(64 * 56 * 56, 224, 256, 128, BF16),
    "densenet121 block 1, first": lambda: pointwise(64 * 56 * 56, 64, 256, 128, BF16),
    "densenet121 block 1, second": lambda: pointwise(64 * 56 * 56, 96, 256, 128, BF16),
    "densenet121 block 3": lambda: pointwise(256 * 14 * 14, 512, 1024, 128, BF16),
    "densenet121 block 4": lambda: pointwise(256 * 7 * 7, 992, 1024, 128, BF16),
    "bc_100_12 block 1": lambda: pointwise(64 * 1024, 180, 216, 48, BF16),
    "float32": lambda: pointwise(256 * 14 * 14, 512, 1024, 128, F32),
    "densenet121 3x3, block 1": lambda: spatial(64, 56, 128, 128, 32, False, BF16),
    "densenet121 3x3, block 4": lambda: spatial(256, 7, 128, 128, 32, False, BF16),
    "d2l block 1": lambda: spatial(256, 24, 160, 192, 32, True, BF16),
    "d2l block 1, first": lambda: spatial(256, 24, 64, 192, 32, True, BF16),
    "d2l block 4": lambda: spatial(256, 3, 160, 256, 32, True, BF16),
    "bc_100_12 3x3": lambda: spatial(64, 32, 48, 48, 12, False, BF16),
    "densenet161 3x3": lambda: spatial(64, 28, 192, 192, 48, False, BF16),
    "float32 3x3": lambda: spatial(64, 14, 128, 128, 32, False, F32),
    "bc_100_12 block 3": lambda: pointwise(256 * 64, 162, 342, 48, BF16),
    "plain k 12": lambda: spatial(64, 32, 136, 160, 12, True, BF16),
    "plain k 12, odd": lambda: spatial(64, 32, 137, 161, 13, True, BF16),
    "dilated 3x3": lambda: spatial(64, 28, 128, 128, 32, False, BF16, dilation=20),
    "tf32": tf32(lambda: pointwise(256 * 14 * 14, 512, 1024, 128, F32)),
    "tf32 wide": tf32(lambda: pointwise(256 * 14 * 14, 512, 1024, 192, F32)),
    "tf32 3x3": tf32(lambda: spatial(64, 14, 128, 128, 32, False, F32)),
    "tf32 3x3 wide": tf32(lambda: spatial(64, 14, 128, 128, 48, True, F32)),
    "densenet121 inference, block 1": lambda: inference(64, 56, 160, 256, (128, 32)),
    "densenet121 inference, block 3": lambda: inference(8, 14, 512, 1024, (128, 32)),
    "bc_100_12 inference": lambda: inference(256, 32, 120, 216, (48, 12)),
    "densenet161": lambda: pointwise(256 * 14 * 14, 512, 1024, 192, BF16),
}


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    of = int(sys.argv[2]) if len(sys.argv) > 2 else 90
    for title, function in CALLS.items():
        if wanted in title:
            for item in compiled(function, of):
                print(json.dumps({"call": title} | dict(list(item._asdict().items())[:-1])))
