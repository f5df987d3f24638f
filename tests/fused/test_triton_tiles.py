"""What the Triton kernels share: the precision of products, and offsets."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from product_cases import F16, precisions, small_chip

from densely.fused.kernels import triton_tiles

__all__ = ["precisions", "small_chip"]  # fixtures


@pytest.mark.parametrize("convolutions", ["tf32", "ieee"])
@pytest.mark.parametrize("products", ["tf32", "ieee"])
def test_float32_is_rounded_to_tf32_where_both_settings_allow_it(
    precisions: Any, products: str, convolutions: str
) -> None:
    for setting, value in zip(precisions, (products, convolutions), strict=True):
        setting.fp32_precision = value
    allowed = (products, convolutions) == ("tf32", "tf32")
    assert triton_tiles.precision(torch.empty(1)) == ("tf32" if allowed else "ieee")
    assert triton_tiles.exact(torch.empty(1)) != allowed
    assert triton_tiles.precision(torch.empty(1, dtype=F16)) == "ieee"


@pytest.mark.parametrize(("room", "read"), [(0, 5), (2, 5), (3, 8)])
def test_rows_are_read_beyond_their_end_as_far_as_there_is_memory(room: int, read: int) -> None:
    x = torch.empty(8 * 3 + 5 + room).as_strided((4, 5), (8, 1))
    assert triton_tiles.columns(x).read == read


def test_rows_may_lie_beyond_two_to_the_31() -> None:
    """In a process of its own, which offsets of 32 bits end with a fault."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "far_rows.py"], capture_output=True, text=True
    )
    if done.stderr.startswith("no room"):
        pytest.skip("the system lends no 24 GB of addresses")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
