"""Where and how tensors are computed: device, precision, memory layout, and why these.

A DenseNet is fastest in bfloat16 and channels-last wherever the hardware has both; nobody should
need to know that. `choose_runtime` takes what the user said, fills in the rest, and keeps a
reason for each choice, which `densely doctor` prints.
"""

import ctypes
import platform
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from densely.cpu_features import cpu_capabilities
from densely.errors import ConfigError
from densely.processors import processors

M = TypeVar("M", bound=nn.Module)
Precision = Literal["auto", "float32", "bfloat16"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]


@dataclass(frozen=True)
class Runtime:
    """A resolved choice; `reasons` says why, by field name."""

    device: torch.device
    precision: Literal["float32", "bfloat16"]
    memory_format: Literal["contiguous", "channels_last"]
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[object]:
        """Context in which convolutions and matrix products run in `precision`.

        With `cache`, copies of weights in that precision may serve several times within it.
        """
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=cache,
        )

    def place(self, model: M) -> M:
        """Move `model` to the device and into the memory layout, in place."""
        model.to(self.device)
        return model.to(memory_format=self._torch_format)  # type: ignore[call-overload,no-any-return]

    def layout(self, images: Tensor) -> Tensor:
        """Put [N, C, H, W] images into the memory layout."""
        images = images.contiguous(memory_format=self._torch_format)
        if self.memory_format == "channels_last" and images.shape[1] == 1:
            # Grey images are in both orders at once, and convolutions take them for NCHW and answer
            # in it, unless their strides say otherwise.
            height, width = images.shape[2:]
            return images.as_strided(images.shape, (height * width, 1, width, 1))
        return images

    @property
    def _torch_format(self) -> torch.memory_format:
        if self.memory_format == "channels_last":
            return torch.channels_last
        return torch.contiguous_format


def choose_runtime(
    device: str = "auto", precision: Precision = "auto", memory_format: MemoryFormat = "auto"
) -> Runtime:
    """Resolve "auto" by the hardware at hand.

    Raises:
        ConfigError: the device does not exist here.
    """
    reasons = {}
    if device == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reasons["device"] = "a CUDA GPU is here" if chosen.type == "cuda" else "no CUDA GPU is here"
    else:
        chosen = _existing_device(device)
        reasons["device"] = "as asked"

    has_bfloat16, why = _bfloat16_is_fast(chosen)
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16 else "float32"
        reasons["precision"] = why
    else:
        reasons["precision"] = "as asked"

    if memory_format == "auto":
        fast = chosen.type == "cuda" or (chosen.type == "cpu" and _has_onednn())
        memory_format = "channels_last" if fast else "contiguous"
        library = "cuDNN" if chosen.type == "cuda" else "oneDNN"
        reasons["memory_format"] = (
            f"{library}'s convolutions are fastest so" if fast else "PyTorch's own layout"
        )
    else:
        reasons["memory_format"] = "as asked"
    return Runtime(chosen, precision, memory_format, reasons)


def _existing_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise NotImplementedError(device.type)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ConfigError(f"device '{name}' is not here; try auto, {', '.join(here)}") from error
    return device


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _bfloat16_is_fast(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "the GPU computes in bfloat16"
        return False, "the GPU has no bfloat16"
    if device.type == "cpu":
        has = cpu_capabilities()
        for key in ("avx512_bf16", "amx_bf16", "bf16"):
            if has.get(key) and _has_onednn():
                return True, f"the CPU has {key}"
        return False, "the CPU has no bfloat16 instructions"
    return False, f"bfloat16 is not tried on {device.type}"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; neither it nor what runs there is waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small, on whichever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )


def settle_process() -> None:
    """Settle what is the whole process's, to compute on a CPU: memory that it keeps, threads.

    Called by the commands that compute, never on import. Threads are no more than PyTorch would
    take, and no more than may run at a time.
    """
    keep_freed_memory()
    allowed = processors()
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)


def can_keep_freed_memory() -> bool:
    """Whether `keep_freed_memory` has a way to do so here: on Linux with glibc."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, for the next ones.

    A training step frees and takes the same hundreds of megabytes again and again. glibc gives
    large pieces back to the system at once, which then clears each page anew: on 2 CPU cores that
    cost as much as the arithmetic.

    Returns:
        Whether it took effect (Linux with glibc).
    """
    if not can_keep_freed_memory():
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    trim_threshold, mmap_max = -1, -4  # names and numbers of glibc's malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))
