"""The fused dense block: what it keeps for backward, and what becomes of that."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_cases import (
    EVAL,
    SHAPED,
    Case,
    Inputs,
    assert_same,
    block,
    build,
    every_kind,
    fused,
    gradient,
    oracle,
    outcome,
    run,
    storages,
)
from block_oracle import fresh, named
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densely.fused import backend, kernels, plain

# What is kept for backward.


KEPT = {
    **SHAPED,
    "eval": block(norm=EVAL),
    "dropout": block(drop_rate=0.3),
    "dropped maps": block(drop_rate=0.3, drop_maps=True),
    "plain with dropout": block(width=None, drop_rate=0.3),
    "bias": block(bias=True),
}


@pytest.fixture
def new_tensors() -> Iterator[Callable[[], Iterator[Tensor]]]:
    """Gives the tensors that came since the test began and that Python objects hold."""
    gc.collect()
    gc.freeze()
    yield lambda: (one for one in gc.get_objects() if issubclass(type(one), Tensor))
    gc.unfreeze()


@every_kind
@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_what_is_saved_for_backward_is_small(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    case = case._replace(shape=(4, 16, 12, 12))
    tree = Inputs(*build(case, dtype))
    pixels, size, steps = 4 * 12 * 12, dtype.itemsize, [s for layer in case.layers for s in layer]
    channels = 16 + sum(layer[-1].out for layer in case.layers)
    widths = sum(layer[0].out for layer in case.layers if len(layer) == 2)
    masks = sum(s.out * pixels for s in steps if s.drop_rate)  # a byte each
    vectors = 10 * len(steps) * channels

    packed: list[Tensor] = []
    with (
        kernels.use(name),
        torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none),
    ):
        backend.dense_block(*tree)
    owned = storages(named(tree.layers).values())
    saved = [size for at, size in storages(packed).items() if at not in owned]
    assert sum(saved) <= size * (pixels * (channels + widths) + vectors) + masks


@every_kind
def test_nothing_large_is_kept_but_what_is_saved(
    dtype: torch.dtype, name: str, near: float, new_tensors: Any
) -> None:
    tree = Inputs(*build(KEPT["dropout"]._replace(shape=(4, 16, 12, 12)), dtype))
    packed: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda none: none)
    with kernels.use(name), hooks:
        out = backend.dense_block(*tree)
    assert packed
    known = storages([*packed, *named(tree).values(), out])
    kept = storages(new_tensors())
    assert [size for at, size in kept.items() if at not in known and size > 2000] == []


@every_kind
@pytest.mark.parametrize("case", [KEPT["dropout"], KEPT["plain"]], ids=["dropout", "plain"])
def test_gradients_from_what_was_moved_away_and_back(
    dtype: torch.dtype, name: str, near: float, case: Case
) -> None:
    x, layers = build(case, dtype)
    grad = gradient(case, dtype)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone), fused(name):
        got = run(backend, x, layers, grad)
    assert_same(got, oracle(x, layers, grad), near)


def test_a_weight_that_steps_share_may_come_back_as_two() -> None:
    """Its copies of another dtype are kept by their places, not by the weight's identity."""
    case = SHAPED["bottleneck"]
    found = []
    for module in (plain, backend):
        tree = fresh(Inputs(*build(case, torch.float32)))
        first, *others = tree.layers
        shared = first[1].conv.weight
        layers = (first, *((a, b._replace(conv=b.conv._replace(weight=shared))) for a, b in others))
        with (
            torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone),
            torch.autocast("cpu", torch.bfloat16),
        ):
            out = module.dense_block(tree.x.bfloat16(), layers)
        (out.float() * gradient(case, torch.float32)).sum().backward()
        found.append(shared.grad)
    expected, got = found
    assert got is not None
    assert torch.linalg.vector_norm(got - expected) < 0.02 * torch.linalg.vector_norm(expected)


@every_kind
def test_checkpointed_as_plain(dtype: torch.dtype, name: str, near: float) -> None:
    case = KEPT["dropout"]
    found = []
    for module in (plain, backend):
        tree = fresh(Inputs(*build(case, dtype)))
        torch.manual_seed(0)
        with kernels.use(name):
            out = checkpoint(module.dense_block, *tree, use_reentrant=False)
            found.append(outcome(out, tree, gradient(case, dtype)))
    # Whether the second forward comes as far as the statistics is the checkpoint's affair.
    assert_same(*(one._replace(statistics={}) for one in reversed(found)), near)
