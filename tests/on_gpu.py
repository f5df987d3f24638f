"""What tests that need a GPU share, and tests that run on each device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

_NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=_NEEDS_GPU)]


def needs_gpu(test: Any) -> Any:
    """Mark a test: left out where there is no GPU, and chosen by `-m gpu`."""
    for mark in _NEEDS_GPU:
        test = mark(test)
    return test


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Make cuDNN's convolutions of float32 as exact as a CPU's, which by default they are not."""
    setting: Any = torch.backends.cudnn
    before = setting.conv.fp32_precision
    setting.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.conv.fp32_precision = before
