"""What instructions the CPU has, also with PyTorch 2.10, which does not list them yet."""

from typing import Any

import torch


def cpu_capabilities() -> dict[str, Any]:
    """By the names of `torch.cpu.get_capabilities`; of PyTorch 2.10 those that densely asks for."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    # No CPU has AVX2 and lacks the first three, or AVX-512 as PyTorch means it and the others.
    of_avx2 = ("fma3", "f16c", "bmi2", "avx2")
    of_avx512 = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
    return {
        **dict.fromkeys(of_avx2, torch.cpu._is_avx2_supported()),
        **dict.fromkeys(of_avx512, torch.cpu._is_avx512_supported()),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
