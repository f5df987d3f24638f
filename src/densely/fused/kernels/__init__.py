"""Which kernels run the fused steps: one set a device, and `reference` for all.

A set is a subclass of `reference.Kernels` and overrides what it does faster. The choice is made by
the input of a step, at each call. Triton is imported when the first step on a GPU asks for it.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from densely.errors import ConfigError, first_line
from densely.fused.kernels.build import BuildError, find_or_build
from densely.fused.kernels.cpu_kernels import CpuKernels
from densely.fused.kernels.operands import NormVectors
from densely.fused.kernels.reference import Kernels, filled_taps

_log = logging.getLogger(__name__)
_HAS_TRITON = find_spec("triton") is not None
_REFERENCE = Kernels()
_MOST_TAPS = 64  # with filled lines
_forced: list[Kernels] = []


def available() -> tuple[str, ...]:
    """Names of the sets that run on this machine, the readable one first."""
    return tuple(_sets())


def chosen(x: Tensor) -> Kernels:
    """The set for steps on x."""
    if _forced:
        return _forced[-1]
    found = _of_device(x.device)
    return _REFERENCE if isinstance(found, str) else found


def makes_image_stem(images: Tensor, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether to make the first convolution again where it is read, rather than keep it.

    `dtype` is the one to compute in. So on GPUs, along two axes and in 16 bits, in which products
    cost less than the memory's traffic, if a window has few taps: with the 147 of colour images to
    make it again took longer on an H100 than to read it. Code being compiled may ask, as it may ask
    what is `missing`.
    """
    triton = images.device.type == "cuda" and missing(images.device) is None
    if _forced:
        triton = _forced[-1].name == "triton"
    planar = weight.dim() == 4
    return triton and planar and dtype.itemsize == 2 and filled_taps(weight) <= _MOST_TAPS


def missing(device: str | torch.device = "cpu") -> str | None:
    """Why a device, such as "cpu" or "cuda:1", has no kernels of its own here; None if it has.

    Code being compiled may ask; it does not go into Triton then.
    """
    device = torch.device(device)
    if device.type == "cuda" and not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda" and torch.compiler.is_compiling():
        return None
    found = _of_device(device)
    return found if isinstance(found, str) else None


def compiling_ahead() -> AbstractContextManager[None] | None:
    """Within it the kernels for GPUs are compiled, many at once, and none is launched.

    None where there are none, or where they can only be compiled one after another.
    """
    if missing("cuda") is not None:
        return None
    from densely.fused.kernels import triton_tiles

    return triton_tiles.compiled_ahead() if triton_tiles.COMPILES_AHEAD else None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run all fused steps by the set of this name, for tests and comparisons.

    Raises:
        ConfigError: there is no such set on this machine.
    """
    sets = _sets()
    if name not in sets:
        raise ConfigError(f"kernels '{name}': this machine has {', '.join(sets)}")
    _forced.append(sets[name])
    try:
        yield
    finally:
        _forced.pop()


def _sets() -> dict[str, Kernels]:
    """Triton's interpreter runs the kernels for GPUs on a machine without one, for tests."""
    found: list[Kernels | str] = [_REFERENCE, _cpu()]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        found.append(_of_device(torch.device("cuda")))
    return {kernels.name: kernels for kernels in found if isinstance(kernels, Kernels)}


def _of_device(device: torch.device) -> Kernels | str:
    """The device's own kernels, or why there are none."""
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda":
        return f"there are none for {device.type}"
    gpu = device.index
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.current_device()
    try:
        return _triton(gpu)
    except torch.OutOfMemoryError as error:  # which says nothing of what the GPU can do
        return first_line(error)


@functools.cache
def _cpu() -> Kernels | str:
    try:
        return CpuKernels(find_or_build())
    except (BuildError, OSError) as error:
        _log.warning("DenseNets run without compiled kernels, slower than they could: %s", error)
        return str(error)


@functools.cache
def _triton(gpu: int | None) -> Kernels | str:
    """The kernels for a GPU of this number; None for those that Triton's interpreter runs.

    Raises:
        torch.OutOfMemoryError: the GPU is too full for a trial.
    """
    try:
        from densely.fused.kernels.triton_kernels import TritonKernels

        kernels = TritonKernels()
        if gpu is not None:
            _try(kernels, gpu)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as of a compiler that Triton does not find
        reason = first_line(error)
        where = "GPUs" if gpu is None else f"cuda:{gpu}"
        _log.warning(
            "DenseNets run on %s as plain PyTorch, slower than they could: %s", where, reason
        )
        return reason
    return kernels


def _try(kernels: Kernels, gpu: int) -> None:
    """Run the smallest kernel once: a machine may have Triton and not what it needs."""
    major, minor = torch.cuda.get_device_capability(gpu)
    if major < 8:
        raise ConfigError(
            f"{torch.cuda.get_device_name(gpu)} has compute capability {major}.{minor}; "
            "the Triton kernels need 8.0 (Ampere) or later"
        )
    # A compiler asks for the kernels among tensors that have no memory: here it has to be there.
    with _disable_current_modes():
        if not torch.cuda.is_current_stream_capturing():
            ones = torch.ones(8, device=torch.device("cuda", gpu))
            kernels.affine(NormVectors(ones, ones, ones, ones, 1e-5, True))
