"""Choosing device, precision and layout, what the choice does to tensors, and their memory."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from densely.errors import ConfigError
from densely.runtime import choose_runtime, keep_freed_memory, ran_out_of_memory


def test_every_choice_has_a_reason() -> None:
    runtime = choose_runtime()
    assert set(runtime.reasons) == {"device", "precision", "memory_format"}
    assert all(runtime.reasons.values())


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_chosen_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool
) -> None:
    monkeypatch.setattr("densely.runtime.cpu_capabilities", lambda: {"avx512_bf16": has_bfloat16})
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


def test_grey_images_are_channels_last_by_their_strides_too() -> None:
    images = torch.rand(4, 1, 6, 5)
    found = choose_runtime("cpu", "float32", "channels_last").layout(images)
    assert found.stride() == (30, 1, 5, 1)
    assert torch.equal(found, images)
    assert choose_runtime("cpu", "float32", "contiguous").layout(images).stride() == (30, 30, 5, 1)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", ""])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' is not here; try auto, cpu"):
        choose_runtime(name)


def test_keeping_freed_memory_takes_effect_with_glibc_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert not keep_freed_memory()


@pytest.mark.parametrize("refused", [None, -1, -4])
def test_freed_memory_is_kept_once_glibc_neither_maps_nor_trims(
    monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    settings: dict[int, int] = {}

    def mallopt(parameter: int, value: int) -> int:
        settings[parameter] = value
        return int(parameter != refused)

    monkeypatch.setattr("densely.runtime.can_keep_freed_memory", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() == (refused is None)
    if refused is None:  # M_MMAP_MAX and M_TRIM_THRESHOLD
        assert settings == {-4: 0, -1: 2**31 - 1}


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    assert ran_out_of_memory(cpu.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
