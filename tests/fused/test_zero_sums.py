"""Biases before norms of a batch: no gradient where that is known, the right one elsewhere."""

import pytest
import torch
from block_cases import Maker, NormCase, StepCase
from torch import Tensor

from densely.fused import backend, plain
from densely.fused.zero_sums import is_marked, mark

TRAIN, EVAL = NormCase(), NormCase("eval")


class Net:
    """Block - transition - block - final norm, with biases, in float64.

    `second` is the norm of the second block's last layer, `last` the final one.
    """

    def __init__(self, last: NormCase = TRAIN, second: NormCase = TRAIN) -> None:
        make = Maker(3)
        self.x = make.normal(3, 4, 6, 6).requires_grad_()
        self.blocks = [
            tuple(
                (make.step(StepCase(3, 3, norm, bias=True), channels + 3 * i, 2),)
                for i, norm in enumerate((TRAIN, of_last_layer))
            )
            for channels, of_last_layer in ((4, TRAIN), (5, second))
        ]
        self.norms = [make.norm(TRAIN, 10), make.norm(last, 11)]
        self.conv = make.conv(5, 10, (1, 1), True, 1)

    def run(self, module: object) -> tuple[Tensor, Tensor]:
        """The output, and that of the first block."""
        first = module.dense_block(self.x, self.blocks[0])  # type: ignore[attr-defined]
        y = module.transition(first, self.norms[0], self.conv, (2, 2))  # type: ignore[attr-defined]
        y = module.dense_block(y, self.blocks[1])  # type: ignore[attr-defined]
        return module.final(y, self.norms[1]), first  # type: ignore[attr-defined]

    def biases(self) -> list[Tensor]:
        found = [step.conv.bias for block in self.blocks for (step,) in block]
        return [*found, self.conv.bias]  # type: ignore[list-item]

    def gradients(self, module: object, second_reader: float = 0.0) -> list[Tensor]:
        """Of the biases and of x; the first block's output may have another reader."""
        y, first = self.run(module)
        weights = torch.linspace(1, 2, y.numel()).view_as(y)
        total = (y * weights).sum()
        if second_reader:
            total = total + second_reader * first.square().sum()
        return list(torch.autograd.grad(total, [*self.biases(), self.x]))


def test_nothing_is_added_up_where_all_goes_through_norms_of_the_batch() -> None:
    net = Net()
    *found, to_x = net.gradients(backend)
    assert all(not grad.any() for grad in found)
    *expected, expected_to_x = net.gradients(plain)
    assert max(float(grad.abs().max()) for grad in expected) < 1e-12
    assert torch.allclose(to_x, expected_to_x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("last", "second", "reader"),
    [(EVAL, TRAIN, 0.0), (TRAIN, TRAIN, 0.5), (EVAL, TRAIN, 0.5), (TRAIN, EVAL, 0.0)],
)
def test_biases_have_their_gradients_where_something_else_reads(
    last: NormCase, second: NormCase, reader: float
) -> None:
    net = Net(last, second)
    found, expected = net.gradients(backend, reader), net.gradients(plain, reader)
    assert any(grad.abs().max() > 1e-3 for grad in expected[:-1])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_hook_that_changes_the_gradient_is_seen() -> None:
    found = []
    for module in (backend, plain):
        net = Net()
        y, first = net.run(module)
        first.register_hook(lambda grad: grad + 1)
        (y * torch.linspace(1, 2, y.numel()).view_as(y)).sum().backward()
        found.append([bias.grad for bias in net.biases()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert any(grad.abs().max() > 1 for grad in found[1])


def test_gradients_without_a_version_are_taken_as_they_come() -> None:
    net = Net()
    first = backend.dense_block(net.x, net.blocks[0])
    with torch.inference_mode():
        grad = torch.ones(first.shape, dtype=first.dtype)
        mark(grad)
        assert not is_marked(grad)
    first.backward(grad)
    assert net.blocks[0][0][0].conv.bias.grad.any()  # type: ignore[union-attr]


def test_a_mark_is_void_once_the_gradient_changes() -> None:
    grad = torch.zeros(2, 3)
    assert not is_marked(grad)
    mark(grad)
    assert is_marked(grad)
    assert not is_marked(grad + 0)
    grad += 1
    assert not is_marked(grad)
