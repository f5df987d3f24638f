"""Choosing device, precision and layout, and what the choice does to tensors."""

import pytest
import torch

from densely.errors import ConfigError
from densely.runtime import choose_runtime, keep_freed_memory


def test_every_choice_has_a_reason() -> None:
    runtime = choose_runtime()
    assert set(runtime.reasons) == {"device", "precision", "memory_format"}
    assert all(runtime.reasons.values())


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_chosen_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    assert choose_runtime("cpu").precision == ("bfloat16" if has_bfloat16 else "float32")


def test_without_onednn_there_is_neither_bfloat16_nor_channels_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("densely.runtime._has_onednn", lambda: False)
    runtime = choose_runtime("cpu")
    assert (runtime.precision, runtime.memory_format) == ("float32", "contiguous")


def test_what_the_user_says_wins() -> None:
    runtime = choose_runtime("cpu", "float32", "contiguous")
    assert (runtime.precision, runtime.memory_format) == ("float32", "contiguous")
    assert runtime.reasons["precision"] == "as asked"


def test_layout_and_precision_are_applied() -> None:
    runtime = choose_runtime("cpu", "bfloat16", "channels_last")
    model = runtime.place(torch.nn.Conv2d(3, 4, 3))
    images = runtime.layout(torch.rand(2, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    with runtime.autocast():
        assert model(images).dtype == torch.bfloat16
    with choose_runtime("cpu", "float32").autocast():
        assert model(images).dtype == torch.float32


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", ""])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' is not here; try auto, cpu"):
        choose_runtime(name)


def test_keeping_freed_memory_takes_effect_with_glibc_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert not keep_freed_memory()
