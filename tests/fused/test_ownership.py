"""A gradient's memory is taken where nobody else would see it, and whoever holds it keeps it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from block_cases import (
    EVAL,
    Inputs,
    Maker,
    NormCase,
    StepCase,
    assert_same,
    every_kind,
    fused,
    gradient,
    oracle,
    outcome,
)
from block_cases import block as block_of
from block_cases import build as build_block
from block_oracle import fresh
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.utils.dlpack import from_dlpack, to_dlpack

from densely.fused import backend, block, kernels, ownership, plain
from densely.fused.kernels.operands import Space
from densely.fused.ownership import sole_owners

CASES = {
    "bottleneck": block_of(),
    "plain": block_of(width=None),
    "bias": block_of(bias=True),
    "eval": block_of(norm=EVAL, bias=True),
}

#: What a hook on the block's output keeps of the gradient.
KEEPS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda grad: grad,
    "a view": lambda grad: grad[0],
    "detached": lambda grad: grad.detach(),
    "its memory": lambda grad: (grad.untyped_storage(), grad.shape, grad.stride()),
    "an array": lambda grad: grad.numpy(),
    "a capsule": to_dlpack,
}


class Net:
    """Block and transition, in float32, whose gradient of the block is the transition's alone."""

    def __init__(self) -> None:
        make = Maker(5, dtype=torch.float32)
        step = StepCase(3, 3)
        self.x = make.normal(2, 4, 6, 6).requires_grad_()
        self.layers = tuple((make.step(step, 4 + 3 * i, 2),) for i in range(2))
        self.norm, self.conv = make.norm(NormCase(), 10), make.conv(5, 10, (1, 1), True, 1)

    def run(self, module: Any) -> tuple[Tensor, Tensor]:
        """The block's output, and what is made of it."""
        middle = module.dense_block(self.x, self.layers)
        return middle, module.transition(middle, self.norm, self.conv, (2, 2)).square().sum()


@pytest.fixture
def no_counts_yet() -> Iterator[None]:
    """Owners are counted within the test, and anew after it."""
    ownership._sole_owners.cache_clear()
    yield
    ownership._sole_owners.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each backward of a block may have the gradient's memory."""
    found: list[bool] = []
    run = block._backward

    def noted(*args: Any, may_write: bool) -> list[Tensor]:
        found.append(may_write)
        return run(*args, may_write=may_write)

    monkeypatch.setattr(block, "_backward", noted)
    return found


def of_plain() -> tuple[Tensor, Tensor]:
    """Gradients of the block's output and of x."""
    net = Net()
    middle, end = net.run(plain)
    found = torch.autograd.grad(end, [middle, net.x])
    return found[0], found[1]


def as_plain(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_that_nobody_else_holds_is_taken(taken: list[bool]) -> None:
    net = Net()
    net.run(backend)[1].backward()  # type: ignore[no-untyped-call]
    assert taken == [True]
    assert net.x.grad is not None
    assert as_plain(net.x.grad, of_plain()[1])


@pytest.mark.parametrize("kind", KEEPS)
def test_a_hook_keeps_what_it_has_seen(taken: list[bool], kind: str) -> None:
    net, kept = Net(), []
    middle, end = net.run(backend)
    middle.register_hook(lambda grad: kept.append(KEEPS[kind](grad)))  # type: ignore[no-untyped-call]
    end.backward()  # type: ignore[no-untyped-call]
    assert taken == [False]
    expected, of_x = of_plain()
    assert net.x.grad is not None
    assert as_plain(net.x.grad, of_x)
    (found,) = kept
    if kind == "its memory":
        memory, shape, strides = found
        found = torch.empty(0).set_(memory, 0, shape, strides)
    elif kind == "a capsule":
        found = from_dlpack(found)
    assert as_plain(torch.as_tensor(found), expected[0] if kind == "a view" else expected)


def test_a_hook_that_has_let_go_keeps_nothing(taken: list[bool]) -> None:
    net = Net()
    middle, end = net.run(backend)
    middle.register_hook(lambda grad: grad.sum() and None)  # type: ignore[no-untyped-call]
    end.backward()  # type: ignore[no-untyped-call]
    assert taken == [True]


def seen_by_a_compiler(net: Net) -> tuple[Tensor, Tensor]:
    """`net.run` past the compiler's limit, where it still sees each call and compiles none."""
    made: list[tuple[Tensor, Tensor]] = []

    def step(x: Tensor, turn: int) -> Tensor:
        if turn == 1:
            made.append(net.run(backend))
        return x + turn

    compiled = torch.compile(step, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for turn in range(2):
            compiled(torch.ones(1), turn)
    return made[0]


@pytest.mark.usefixtures("no_counts_yet")
def test_memory_is_taken_where_a_compiler_has_seen_the_forward(taken: list[bool]) -> None:
    _, end = seen_by_a_compiler(Net())
    end.backward()  # type: ignore[no-untyped-call]
    assert taken == [True]


@pytest.mark.usefixtures("no_counts_yet")
def test_a_hook_keeps_its_gradient_where_a_compiler_has_seen_the_forward(
    taken: list[bool],
) -> None:
    """While a compiler sees them, calls hold one more, and so does whoever holds the node."""
    kept: list[Tensor] = []
    middle, end = seen_by_a_compiler(Net())
    node: Any = middle.grad_fn
    node.register_prehook(lambda grads: kept.append(grads[0]))
    end.backward()  # type: ignore[no-untyped-call]
    assert taken == [False]
    assert as_plain(kept[0], of_plain()[0])


def test_where_calls_hold_another_number_memory_is_left_alone(
    taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, end = Net().run(backend)
    monkeypatch.setattr(ownership, "_held_by_a_call", lambda _: 1)
    end.backward()  # type: ignore[no-untyped-call]
    assert taken == [False]


@pytest.mark.usefixtures("no_counts_yet")
def test_owners_are_counted_anew_where_calls_hold_more(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sole_owners()
    monkeypatch.setattr(ownership, "_held_by_a_call", lambda _: 99)
    assert [found.of_call for found in sole_owners() if found] == [99, 99]
    monkeypatch.undo()
    assert sole_owners() == before


def test_the_compiler_sees_calls_again_afterwards() -> None:
    before = eval_frame.set_eval_frame(False)  # runs what it has compiled, and compiles nothing
    try:
        sole_owners()
        assert eval_frame.get_eval_frame_callback() is False
    finally:
        eval_frame.set_eval_frame(before)


def test_threads_that_begin_at_once_count_for_themselves() -> None:
    here = sole_owners()
    with ThreadPoolExecutor(4) as workers:
        for _ in range(20):
            ownership._sole_owners.cache_clear()
            assert {*workers.map(lambda _: sole_owners(), range(8))} == {here}


def test_what_is_asked_for_is_returned_unchanged(taken: list[bool]) -> None:
    net = Net()
    middle, end = net.run(backend)
    found = torch.autograd.grad(end, [middle, net.x])
    assert taken == [False]
    assert all(map(as_plain, found, of_plain()))


class FromArray(torch.autograd.Function):
    """A gradient in the memory of a NumPy array, whose owners nobody counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, array: np.ndarray) -> Tensor:
        ctx.array = array
        return (x * torch.from_numpy(array)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.array), None


def test_memory_that_is_not_pytorchs_own_is_left_alone(taken: list[bool]) -> None:
    net = Net()
    middle, _ = net.run(backend)
    array = np.ones(middle.movedim(1, -1).shape, np.float32)
    FromArray.apply(middle.movedim(1, -1), array).backward()  # type: ignore[no-untyped-call]
    assert taken == [False]
    assert (array == 1).all()


def test_a_gradient_may_be_changed_in_place() -> None:
    net = Net()
    step = net.layers[0][0]
    _, end = net.run(backend)
    found = torch.autograd.grad(end, [net.x, step.conv.weight, step.norm.weight, net.conv.weight])
    for grad in found:
        grad.add_(torch.ones_like(grad, requires_grad=True)).sum().backward()


@every_kind
@pytest.mark.parametrize("kind", CASES)
def test_what_is_added_to_the_gradient_itself_is_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str, near: float, kind: str
) -> None:
    monkeypatch.setattr(block, "owners", lambda _: block.sole_owners()[0])
    tree = fresh(Inputs(*build_block(CASES[kind], dtype)))
    grad = gradient(CASES[kind], dtype)
    expected = oracle(*tree, grad)
    with fused(name):
        out = backend.dense_block(*tree)
        space = Space(out.shape[0], tuple(out.shape[2:]))
        room = kernels.chosen(out).matrix(space.rows, out.shape[1], out, out.dtype)
        given = space.maps(room.copy_(space.matrix(grad)))
        found = outcome(out, tree, given)
    assert_same(found, expected, near)
    if kernels.chosen(out).total_dtype(out) == dtype:
        assert not torch.equal(given, grad), "it has not been added to"


def test_a_retained_gradient_is_unchanged(taken: list[bool]) -> None:
    net = Net()
    middle, end = net.run(backend)
    middle.retain_grad()
    end.backward()  # type: ignore[no-untyped-call]
    assert middle.grad is not None
    assert as_plain(middle.grad, of_plain()[0])


def test_a_gradient_that_the_caller_gives_is_unchanged(taken: list[bool]) -> None:
    net = Net()
    middle, _ = net.run(backend)
    given = torch.ones_like(middle)
    middle.backward(given)  # type: ignore[no-untyped-call]
    middle, _ = net.run(backend)
    middle.sum().backward()  # type: ignore[no-untyped-call]
    assert taken == [False, False]
    assert (given == 1).all()
