"""What a bug report needs: versions, hardware, what was chosen on it and why, where data are."""

import os
import sys
from pathlib import Path

import torch

from densely.cache import cache_folder
from densely.data.fashion_mnist import complete_folder
from densely.data.locations import VARIABLE
from densely.environment import environment
from densely.fused.kernels import missing
from densely.runtime import can_keep_freed_memory, choose_runtime
from densely.words import on_one_line


def diagnosis(device: str = "auto") -> dict[str, object]:
    """Facts about this installation, in the order in which they are printed."""
    runtime = choose_runtime(device)
    facts = environment(runtime)
    facts.pop("command")
    facts["python"] = f"{facts['python']} ({sys.executable})"
    facts["keeps freed memory"] = (
        "yes, in the commands that compute (glibc)" if can_keep_freed_memory() else "no (not glibc)"
    )
    facts["dense blocks"] = _block_code(runtime.device)
    facts["data is looked for in"] = [
        "--data-dir, if given",
        f"{VARIABLE}: {_state(os.environ.get(VARIABLE))}",
        f"cache: {_state(str(cache_folder()))}",
    ]
    return facts


def _block_code(device: torch.device) -> str:
    why = missing(device)
    if why:
        return f"plain PyTorch kernels: {why}"
    if device.type == "cuda":
        return f"fused, with Triton kernels, launched {_launches(device)}"
    return "fused, with kernels compiled for this CPU"


def _launches(gpu: torch.device) -> str:
    from densely.fused.kernels.triton_launches import table_of, table_path

    if known := len(table_of(gpu)):
        path = table_path(torch.cuda.get_device_name(gpu))
        return f"as measured for {known} steps: {path}"
    return "by rule (densely bench --tune)"


def _state(folder: str | None) -> str:
    """A folder, and whether Fashion-MNIST is in it."""
    if not folder:
        return "not set"
    top = Path(folder)
    try:
        there = top.is_dir()
    except OSError:  # as of a name that is too long
        there = False
    what = "not there"
    if there:
        what = "Fashion-MNIST is there" if complete_folder(top) else "without Fashion-MNIST"
    return f"{on_one_line(folder)} ({what})"
