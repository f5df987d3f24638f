"""Kernels are compiled ahead where a step is to be recorded: many at once, and none is launched."""

import inspect
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from densely import cuda_graphs

pytest.importorskip("triton", reason="needs Triton")
import triton

from densely.fused.kernels import triton_tiles

pytestmark = pytest.mark.skipif(
    not triton_tiles.COMPILES_AHEAD, reason="this Triton compiles one after another"
)


class Kernel:
    """Stands for a kernel on a GPU; compiles as Triton does, through the mode that is active."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.launched = fails, 0
        self.compiling = threading.Barrier(2)  # only two at once get through

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> None:
            self.launched += 1

        return run

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        mode = triton.runtime._async_compile.active_mode.get()
        assert mode is not None
        _key, _compile, *ends = inspect.signature(mode.submit).parameters  # of 3.9 two
        then = [lambda _: None] * len(ends)
        mode.submit((id(self), options["BM"]), self._compile, *then)

    def _compile(self) -> str:
        self.compiling.wait(20)
        if self.fails:
            raise RuntimeError("out of registers")
        return "machine code"


class Twice(torch.autograd.Function):
    """A launch on each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        triton_tiles.launch(kernel, (1,), x, x, BM=1)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        triton_tiles.launch(ctx.kernel, (1,), grad, grad, BM=2)
        return grad, None


def step(kernel: Kernel) -> None:
    x = torch.ones(2, requires_grad=True)
    Twice.apply(x, kernel).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("fails", [False, True])
def test_both_ways_are_compiled_at_once_and_not_launched(fails: bool) -> None:
    kernel = Kernel(fails)
    with triton_tiles.compiled_ahead():
        step(kernel)
    assert kernel.launched == 0
    assert not kernel.compiling.broken
    step(kernel)
    assert kernel.launched == 2


def test_what_others_launch_meanwhile_is_launched() -> None:
    ours, theirs = Kernel(), Kernel()
    with triton_tiles.compiled_ahead():
        other = threading.Thread(target=step, args=(theirs,))
        other.start()
        other.join()
        step(ours)
    assert (ours.launched, theirs.launched) == (0, 2)


def test_work_that_fails_on_what_kernels_have_not_written_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "compiling_ahead", triton_tiles.compiled_ahead)
    kernel = Kernel()

    def work() -> None:
        step(kernel)
        raise ValueError("not a number")

    cuda_graphs.compile_kernels_of(work)
    assert kernel.launched == 0
    step(kernel)
    assert kernel.launched == 2


def test_where_there_are_no_kernels_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "compiling_ahead", lambda: None)
    cuda_graphs.compile_kernels_of(lambda: pytest.fail("ran"))
