"""What the CPU has, as PyTorch lists it, and as asked for one by one where it does not."""

from types import SimpleNamespace

import pytest
import torch

from densely import cpu_features
from densely.cpu_features import cpu_capabilities
from densely.fused.kernels.build import LEVELS


def without_a_list(monkeypatch: pytest.MonkeyPatch, level: str, bfloat16: bool) -> None:
    cpu = SimpleNamespace(_is_avx512_bf16_supported=lambda: bfloat16)
    backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: level))
    monkeypatch.setattr(cpu_features, "torch", SimpleNamespace(cpu=cpu, backends=backends))


@pytest.mark.parametrize(
    ("level", "bfloat16", "levels"),
    [
        ("AVX512", True, ["x86-64-v4", "x86-64-v3"]), ("AVX512", False, ["x86-64-v4", "x86-64-v3"]),
        ("AVX2", False, ["x86-64-v3"]), ("DEFAULT", False, []), ("SVE256", False, []),
    ],
)  # fmt: skip
def test_without_a_list_pytorchs_own_level_tells(
    monkeypatch: pytest.MonkeyPatch, level: str, bfloat16: bool, levels: list[str]
) -> None:
    without_a_list(monkeypatch, level, bfloat16)
    has = cpu_capabilities()
    assert has["avx512_bf16"] is bfloat16
    assert [name for name, needs in LEVELS.items() if all(has[need] for need in needs)] == levels


def test_of_this_cpu_both_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, level = cpu_capabilities(), torch.backends.cpu.get_cpu_capability()
    without_a_list(monkeypatch, level, bool(listed.get("avx512_bf16")))
    for name, has in cpu_capabilities().items():
        assert has == bool(listed.get(name)), name
