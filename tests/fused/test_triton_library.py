"""Forward through cuBLAS and cuDNN, as a table of launches may say: the same function."""

from typing import Any

import block_cases as blocks
import pytest
import torch
from block_cases import EVAL, StepCase, is_no_worse
from test_triton_kernels import DEVICE, few_programs, run, triton_launches

from densely.fused import backend, kernels, plain
from densely.fused.kernels import triton_library, triton_pointwise, triton_spatial

__all__ = ["few_programs"]  # a fixture of every test here too
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
LIBRARY = (triton_pointwise.LIBRARY, triton_spatial.LIBRARY)


class ByLibrary:
    """Goes through the library wherever that may be chosen."""

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.keys: list[str] = []

    def choose(self, choice: Any) -> Any:
        for other in choice.others:
            if other in LIBRARY:
                self.chosen.append(choice.step.kind)
                self.keys.append(choice.step.key)
                return other
        return choice.usual


CASES = {
    "bottleneck": blocks.block((2, 3, 5, 4), count=2),
    "plain": blocks.block((2, 3, 5, 4), width=None, count=2),
    "eval": blocks.block((2, 3, 5, 4), norm=EVAL, count=2),
    "biases": blocks.block((2, 5, 4, 3), growth=3, width=7, bias=True, count=2),
    "dilated": blocks.Case((1, 4, 6, 6), ((StepCase(4, 3, dilation=2),), (StepCase(3, 1),))),
    "1D": blocks.block((2, 3, 19)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_block_through_the_library_is_no_worse_than_plain(case: blocks.Case) -> None:
    tree = blocks.Inputs(*blocks.build(case, torch.float16))
    grad = blocks.gradient(case, torch.float16)
    theirs = run(plain.dense_block, tree, grad, "reference")
    tuner = ByLibrary()
    with triton_launches.tuning(tuner):
        got = run(backend.dense_block, tree, grad, "triton")
    assert len(tuner.chosen) == sum(len(layer) for layer in case.layers)
    assert all(kind.endswith("forward") for kind in tuner.chosen)
    exact = blocks.oracle(*blocks.build(case), blocks.gradient(case))
    assert is_no_worse(got, theirs, exact, torch.float16) == []


@pytest.mark.parametrize("name", ["bottleneck", "biases", "1D"])
def test_inference_through_the_library_is_the_kernels(name: str) -> None:
    case = CASES[name]._replace(learnt=0.0, x_learnt=False)
    norms_constant = tuple(
        tuple(step._replace(norm=EVAL) for step in layer) for layer in case.layers
    )
    x, layers = blocks.build(case._replace(layers=norms_constant), torch.float16)
    tree = blocks.change(blocks.Inputs(x, layers), lambda t: t.to(DEVICE))
    with kernels.use("triton"), torch.no_grad():
        expected = backend.dense_block(*tree)
        tuner = ByLibrary()
        with triton_launches.tuning(tuner):
            found = backend.dense_block(*tree)
    assert len(tuner.chosen) == sum(len(layer) for layer in layers)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_float32_that_may_not_be_rounded_stays_with_the_kernels() -> None:
    """cuDNN would go by its own setting, which allows tf32 unless it is changed."""
    case = CASES["bottleneck"]
    tuner = ByLibrary()
    with triton_launches.tuning(tuner):
        run(backend.dense_block, blocks.Inputs(*blocks.build(case, torch.float32)),
            blocks.gradient(case, torch.float32), "triton")  # fmt: skip
    assert not tuner.chosen


def test_training_and_inference_are_measured_apart() -> None:
    """What is faster for the one need not be for the other: moments, prologues, norms after."""
    case = CASES["bottleneck"]
    frozen = blocks.block((2, 3, 5, 4), norm=EVAL, count=2)._replace(learnt=0.0, x_learnt=False)
    keys = []
    for some in (case, frozen):
        tuner = ByLibrary()
        x, layers = blocks.build(some, torch.float16)
        tree = blocks.change(blocks.Inputs(x, layers), lambda t: t.to(DEVICE))
        with kernels.use("triton"), triton_launches.tuning(tuner):
            backend.dense_block(*tree)
        keys.append(set(tuner.keys))
    assert keys[0].isdisjoint(keys[1])


def test_the_library_is_asked_for_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms, moments and relu are the kernels'."""
    asked: list[str] = []
    for name in ("norm_relu", "moments"):
        own = getattr(triton_library.triton_elementwise, name)

        def watched(*given: Any, own: Any = own, name: str = name) -> Any:
            asked.append(name)
            return own(*given)

        monkeypatch.setattr(triton_library.triton_elementwise, name, watched)
    case = CASES["bottleneck"]
    with triton_launches.tuning(ByLibrary()):
        run(backend.dense_block, blocks.Inputs(*blocks.build(case, torch.float16)),
            blocks.gradient(case, torch.float16), "triton")  # fmt: skip
    assert asked.count("norm_relu") == 4
    assert asked.count("moments") == 1 + 4  # of the block's input too
