"""Work that is put aside: nobody reads what it makes too early, or changes what it reads."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import block_cases as blocks
import pytest
import torch
from test_triton_kernels import BLOCKS, few_programs, run

from densely.fused import backend
from densely.fused.kernels import triton_aside

__all__ = ["few_programs"]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


class _Last(triton_aside.Aside):
    """Runs all at the last moment, as a second stream may."""

    def __init__(self, opened: list["_Last"], device: torch.device) -> None:
        super().__init__(device)
        self.most = 0
        opened.append(self)

    def run(self, work: Callable[[], None]) -> None:
        self._works.append(work)
        self.most = max(self.most, len(self._works))

    def wait(self) -> None:
        for work in self._works:
            work()
        self._works.clear()


@pytest.mark.parametrize("name", ["bottleneck", "plain", "biases", "both modes", "partly frozen"])
def test_gradients_are_the_same_when_weights_come_last(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BLOCKS[name]
    x, layers = blocks.build(case, torch.float32)
    grad = blocks.gradient(case, torch.float32)
    expected = run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton").grads

    opened: list[_Last] = []
    monkeypatch.setattr(triton_aside, "Aside", partial(_Last, opened))
    monkeypatch.setattr(triton_aside, "_is_recorded", lambda x: True)
    got = run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton").grads

    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] == value).all(), key
    # The gradient of one convolution, and the end of its sum: no more memory is held at a time.
    assert [aside.most for aside in opened] == [2]


def test_streams_come_together_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            waits.append((self.name, other.name))

    def fails() -> None:
        raise torch.OutOfMemoryError

    waits: list[tuple[str, str]] = []
    chain, second = Stream("chain"), Stream("second")
    monkeypatch.setattr(triton_aside, "_second_stream", lambda device: second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: chain)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(triton_aside, "_is_recorded", lambda x: True)

    def backward() -> None:
        with triton_aside.aside(torch.empty(0)):
            opened = triton_aside.current()
            assert opened is not None
            opened.run(fails)

    with pytest.raises(torch.OutOfMemoryError):
        backward()
    assert waits == [("second", "chain"), ("chain", "second")]
    assert triton_aside.current() is None
