"""What has little to do runs as plain PyTorch: done before densely's step would have begun."""

import logging

import foreign
import pytest
import torch
from torch import Tensor

from densely.fused import report, swap
from densely.fused.kernels import cpu_kernels, reference
from densely.fused.kernels.operands import Affine, Convolution, Space


def test_inference_on_a_few_numbers_is_plain_and_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("densely.fused.calls._logged", set())
    original, net = foreign.pair(foreign.torchvision())
    x = foreign.images((2, 3, 64, 32))
    maps = 16 * 2 * 64 * 32  # of the stem, about
    for least, path in ((maps + 1, (0, 1)), (maps, (1, 1))):
        monkeypatch.setattr(swap, "LEAST", least)
        with torch.no_grad(), caplog.at_level(logging.INFO):
            wanted, got = original.eval()(x), net.eval()(x)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        for name in ("", "features"):
            calls = report(net).calls()[name]
            assert (calls.densely, calls.plain) == path, name
    assert not caplog.records
    assert "has little to do" in str(report(net))


def test_a_block_goes_by_the_numbers_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = foreign.pair(foreign.torchvision())
    block, x = net.features.denseblock1.eval(), foreign.images((2, 16, 8, 8))
    monkeypatch.setattr(swap, "LEAST", x.numel())
    with torch.inference_mode():
        block(x)
        block(x[:1])
    assert (report(block).calls()[""].densely, report(block).calls()[""].plain) == (1, 1)


@pytest.mark.parametrize("train", [True, False])
def test_with_gradients_all_is_fused(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "LEAST", 1 << 20)
    _, net = foreign.pair(foreign.torchvision())
    net.train(train)(foreign.images((2, 3, 64, 32)))
    assert {(c.densely, c.plain) for c in report(net).calls().values()} == {(1, 0)}


def test_onednn_convolves_any_width_where_it_can_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    convolve = reference.Kernels.convolve

    def watched(self: reference.Kernels, x: Tensor, conv: Convolution, *args: Tensor) -> None:
        ran.append(conv.weight.shape[0])
        convolve(self, x, conv, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference.Kernels, "convolve", watched)
    x, vectors = torch.randn(40, 8), torch.ones(4, 8)
    for masks in (False, True):
        monkeypatch.setattr(cpu_kernels, "_HAS_MASKS", masks)
        for width in (12, 16):
            conv = Convolution(
                Affine(*vectors.unbind(), False), torch.randn(width, 8, 3, 3), None, 1,
                Space(1, (8, 5)),
            )  # fmt: skip
            cpu().convolve(x, conv, torch.empty(40, width), None)
    assert ran == [16, 12, 16]


def cpu() -> cpu_kernels.CpuKernels:
    from densely.fused.kernels import chosen, use

    with use("cpu"):
        kernels = chosen(torch.empty(1))
    assert isinstance(kernels, cpu_kernels.CpuKernels)
    return kernels
