"""What the CPU has, as PyTorch lists it, and as asked for one by one where it does not."""

from types import SimpleNamespace

import pytest
import torch

from densely import cpu_features
from densely.cpu_features import cpu_capabilities
from densely.fused.kernels.build import LEVELS

QUESTIONS = ("_is_avx2_supported", "_is_avx512_supported", "_is_avx512_bf16_supported")


def test_without_a_list_each_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = cpu_capabilities()
    names = {"avx512_bf16", *(name for names in LEVELS.values() for name in names)}
    cpu = SimpleNamespace(**{name: getattr(torch.cpu, name) for name in QUESTIONS})
    monkeypatch.setattr(cpu_features, "torch", SimpleNamespace(cpu=cpu))
    assert cpu_capabilities() == {name: bool(listed.get(name)) for name in names}
