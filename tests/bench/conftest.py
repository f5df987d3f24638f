"""What the tests of benchmarks/gpu_check share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that it can be imported, by each test anew."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_check"]:
        del sys.modules[name]


@pytest.fixture
def setting(gpu_check: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a dry run of small nets."""
    from gpu_check.setting import NETS, Setting

    def make(*nets: str, **options: Any) -> Any:
        usual: dict[str, Any] = {
            "out": tmp_path, "nets": tuple(NETS[net] for net in nets or ("bc",)),
            "dtypes": (torch.float32,), "kernels": "auto", "compile_modes": (),
            "modes": ("train",), "variants": (), "kinds": (), "budget_s": 600.0, "smoke": True,
        }  # fmt: skip
        return Setting(**usual | options)

    changed = [(torch.backends.cuda.matmul, "allow_tf32")]
    changed += [(torch.backends.cudnn, n) for n in ("allow_tf32", "deterministic", "benchmark")]
    before = [getattr(*switch) for switch in changed]
    yield make
    for switch, value in zip(changed, before, strict=True):
        setattr(*switch, value)
