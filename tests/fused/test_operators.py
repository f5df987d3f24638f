"""The fused steps as operators: what compilers may rely on, and modules that are imported again."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import block_cases as blocks
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densely.fused import backend, kernels, operators
from densely.models.registry import build_model


@pytest.fixture
def twice() -> Iterator[operators.Operator[[Tensor, Sequence[float]], list[Tensor]]]:
    def twice_for_tests(x: Tensor, factors: Sequence[float]) -> list[Tensor]:
        return [x * factor for factor in factors]

    operator = operators.Operator(twice_for_tests)
    operator.register_fake(lambda x, factors: [torch.empty_like(x) for _ in factors])
    yield operator
    operators._libraries.pop(operator.name)


def test_an_operator_is_its_function(
    twice: operators.Operator[[Tensor, Sequence[float]], list[Tensor]],
) -> None:
    x = torch.randn(3)
    assert torch.equal(twice(x, [1.0, 2.0])[1], 2 * x)
    assert twice.__name__ == "twice_for_tests"
    overload = torch.ops.densely.twice_for_tests.default
    assert str(overload._schema).endswith("(Tensor x, float[] factors) -> Tensor[]")
    torch.library.opcheck(overload, (x, [1.0, 2.0]))


def test_an_operator_may_be_defined_again(
    twice: operators.Operator[[Tensor, Sequence[float]], list[Tensor]],
) -> None:
    def twice_for_tests(x: Tensor, factors: Sequence[float]) -> list[Tensor]:
        return [x + factor for factor in factors]

    again = operators.Operator(twice_for_tests)
    assert again(torch.zeros(1), [5.0])[0] == 5
    assert torch.ops.densely.twice_for_tests(torch.zeros(1), [5.0])[0] == 5


def test_modules_may_be_imported_again() -> None:
    code = """
import importlib, sys, torch, densely.fused.block
nets = []
def use_all():
    nets.append(densely.create_model("d2l", num_classes=2, in_channels=1))
    for net in nets:
        net(torch.randn(2, 1, 32, 32)).sum().backward()
use_all()
importlib.reload(densely.fused.block)
use_all()
for name in [name for name in sys.modules if name.partition(".")[0] == "densely"]:
    del sys.modules[name]
import densely
use_all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Watched(TorchDispatchMode):
    """Counts densely's operators, and those that give what shares memory with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.ran, self.shared = set[str](), set[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.namespace == "densely":
            self.ran.add(function._schema.name)
            given = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            made = torch.utils._pytree.tree_leaves(found)
            memory = [t.untyped_storage().data_ptr() for t in made if t.numel()]
            others = {t.untyped_storage().data_ptr() for t in given}
            if len(set(memory)) < len(memory) or others & set(memory):
                self.shared.add(function._schema.name)
        return found


@pytest.mark.parametrize("name", [n for n in kernels.available() if n != "triton"])
@pytest.mark.parametrize("training", [True, False])
def test_what_operators_give_shares_no_memory(name: str, training: bool) -> None:
    """As they promise compilers: neither with what they are given nor with each other."""
    model = build_model("d2l", growth_rate=4, block_config=(1, 1), num_classes=2, in_channels=1)
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    tree = blocks.Inputs(*blocks.build(blocks.block((2, 3, 5, 4), bias=True), torch.float32))
    with kernels.use(name), Watched() as watched:
        model.train(training)(x).sum().backward()
        with torch.no_grad():
            model(x)
        out = backend.dense_block(*tree)
        grad = torch.randn_like(out)  # of which the block may not take the memory
        torch.autograd.grad(out, [tree.x, tree.layers[0][0].conv.weight], grad)
    names = ("dense_block_forward", "dense_block_backward", "reader_forward", "reader_backward")
    assert watched.ran >= {f"densely::{name}" for name in names}
    assert not watched.shared
