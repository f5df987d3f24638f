"""What instructions the CPU has, also with PyTorch 2.10, which does not list them yet."""

from typing import Any

import torch


def cpu_capabilities() -> dict[str, Any]:
    """By the names of `torch.cpu.get_capabilities`; of PyTorch 2.10 those that densely asks for."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    # What PyTorch's own kernels are chosen by: AVX2 together with FMA3, and the parts of AVX-512.
    # All such CPUs have the others too.
    level = torch.backends.cpu.get_cpu_capability()
    of_avx2 = ("avx2", "fma3", "f16c", "bmi2")
    of_avx512 = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
    return {
        **dict.fromkeys(of_avx2, level in ("AVX2", "AVX512")),
        **dict.fromkeys(of_avx512, level == "AVX512"),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
