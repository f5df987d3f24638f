"""Whole steps through the Triton kernels, on a GPU or in its interpreter; how they are chosen."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import block_cases as blocks
import companion_cases as companions
import numpy as np
import pytest
import torch
from block_cases import EVAL, TRAIN, NormCase, StepCase, assert_same, is_no_worse, tensors
from block_oracle import Result, arrays, change
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densely.errors import ConfigError
from densely.fused import backend, block, kernels, plain
from densely.fused.kernels.operands import Affine, Convolution, NormVectors, Pending, Space
from densely.fused.kernels.reference import Kernels

pytest.importorskip("triton", reason="needs Triton")
from densely.fused.kernels import (
    triton_kernels,
    triton_launches,
    triton_pointwise,
    triton_spatial,
    triton_spatial_backward,
    triton_tiles,
)

#: The interpreter computes what is masked out too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on a small chip: fewer programs, which take several turns each; float32 is exact."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_tiles, "multiprocessors", lambda device: 2)


def run(call: Callable[..., Tensor], tree: Any, grad: Tensor, name: str, seed: int = 0) -> Result:
    """One step with the kernels of this name on copies of its inputs; results as arrays."""
    tree = change(tree, lambda t: t.detach().clone().to(DEVICE).requires_grad_(t.requires_grad))
    torch.manual_seed(seed)
    with kernels.use(name):
        out = call(*tree)
        learnt = {name: t for name, t in tensors(tree).items() if t.requires_grad}
        found = torch.autograd.grad(out, tuple(learnt.values()), grad.to(DEVICE)) if learnt else ()
    for value, of in zip(found, learnt.values(), strict=True):
        assert (value.shape, value.dtype) == (of.shape, of.dtype)
    statistics = {
        n: t for n, t in tensors(tree).items() if n.endswith(blocks.block_oracle.STATISTICS)
    }
    return Result(
        arrays(out.cpu()),
        {name: arrays(g.cpu()) for name, g in zip(learnt, found, strict=True)},
        {name: arrays(t.cpu()) for name, t in statistics.items()},
    )


# Dense blocks.

LAYER = (StepCase(6, 1), StepCase(4, 3))
BLOCKS = {
    "bottleneck": blocks.block((2, 3, 5, 4), count=2),
    "plain": blocks.block((2, 3, 5, 4), width=None, count=2),
    "eval": blocks.block((2, 3, 5, 4), norm=EVAL, count=2),
    "biases": blocks.block((2, 5, 4, 3), growth=3, width=7, bias=True, count=2),
    "both modes": blocks.Case(
        (3, 9, 4, 4),
        ((StepCase(8, 1, EVAL), StepCase(5, 3, TRAIN, bias=True)), (StepCase(3, 3, EVAL),), LAYER),
    ),
    "dilated": blocks.block((1, 4, 6, 6), count=2, dilation=1)._replace(
        layers=((StepCase(4, 3, dilation=2),), (StepCase(5, 1), StepCase(3, 3, dilation=2)))
    ),
    "partly frozen": blocks.block((2, 4, 4, 5))._replace(learnt=0.5, x_learnt=False),
    "frozen but x": blocks.block((2, 4, 4, 5), count=1)._replace(learnt=0.0),
    "frozen but the end": blocks.block((2, 4, 4, 5))._replace(learnt=0.1, x_learnt=False, seed=4),
    "wide": blocks.block((1, 70, 4, 5), growth=12, width=48, count=1),
    "formed first": blocks.Case((2, 390, 1, 2), ((StepCase(6, 1), StepCase(3, 1)),)),
    "1D": blocks.block((2, 3, 19)),
    "3D": blocks.block((2, 3, 3, 2, 4)),
}
every_block = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS)


@every_block
def test_block_equals_the_oracle(case: blocks.Case) -> None:
    x, layers = blocks.build(case, torch.float32)
    grad = blocks.gradient(case, torch.float32)
    expected = blocks.oracle(x, layers, grad)
    before = backend.fused_calls["dense block"]
    got = run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton")
    assert backend.fused_calls["dense block"] == before + 1, "did not run fused"
    assert expected.margin > 1e-6, "an input of relu may fall on either side"
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("name", ["bottleneck", "plain", "eval", "wide", "3D"])
def test_block_in_float16_is_no_further_from_float64_than_plain(name: str) -> None:
    case = BLOCKS[name]
    x, layers = blocks.build(case, torch.float16)
    grad = blocks.gradient(case, torch.float16)
    expected = blocks.oracle(x, layers, grad)
    theirs = run(plain.dense_block, blocks.Inputs(x, layers), grad, "reference")
    got = run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton")
    assert is_no_worse(got, theirs, expected, torch.float16, 2.0) == []


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_dropout_drops_the_same(name: str) -> None:
    x, layers = blocks.build(blocks.MIXED, torch.float32)
    grad = blocks.gradient(blocks.MIXED, torch.float32)
    tree = blocks.Inputs(x, layers)
    expected = run(plain.dense_block, tree, grad, "reference", seed=3)
    assert_same(run(backend.dense_block, tree, grad, name, seed=3), expected, 1e-4)


def test_float64_is_left_to_the_reference() -> None:
    x, layers = blocks.build(BLOCKS["bottleneck"])
    grad = blocks.gradient(BLOCKS["bottleneck"])
    got = run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton")
    assert_same(got, blocks.oracle(x, layers, grad))


class LaterOnes:
    """A tuner to which each launch that is tried seems the fastest: the one of that number."""

    def __init__(self, number: int) -> None:
        self.number, self.kinds = number, set[str]()

    def choose(self, choice: Any) -> Any:
        self.kinds.add(choice.step.kind)
        found = list(choice.others)
        return found[min(self.number, len(found) - 1)]


TRIED = (
    *(triton_pointwise.FORWARDS, triton_pointwise.BACKWARDS, triton_spatial.FORWARDS),
    *(triton_spatial_backward.INPUTS, triton_spatial_backward.WEIGHTS),
)
MOST = max(map(len, TRIED)) + 1  # the library


@pytest.mark.parametrize(
    ("kind", "number"), [("plain", 0), ("plain", 5), *(("bottleneck", i) for i in range(MOST))]
)
def test_what_may_be_tried_in_place_of_the_usual_launches_is_right(kind: str, number: int) -> None:
    case = BLOCKS[kind]
    case = case._replace(layers=case.layers[:1])
    tree = blocks.Inputs(*blocks.build(case, torch.float16))
    grad = blocks.gradient(case, torch.float16)
    theirs = run(plain.dense_block, tree, grad, "reference")
    tuner = LaterOnes(number)
    with triton_launches.tuning(tuner):
        got = run(backend.dense_block, tree, grad, "triton")
    steps = {"spatial forward", "spatial input", "spatial weight"}
    steps |= {"pointwise forward", "pointwise backward"} if kind == "bottleneck" else set()
    assert tuner.kinds == steps
    exact = blocks.oracle(*blocks.build(case), blocks.gradient(case))
    assert is_no_worse(got, theirs, exact, torch.float16) == []


@pytest.mark.parametrize("kind", ["plain", "eval", "biases"])
def test_the_gradients_own_memory_may_be_added_to(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With rows as far apart as in what a transition hands back."""
    case = BLOCKS[kind]
    tree = blocks.Inputs(*blocks.build(case, torch.float32))
    grad = blocks.gradient(case, torch.float32)
    space = Space(grad.shape[0], tuple(grad.shape[2:]))
    room = triton_kernels.TritonKernels().matrix(space.rows, grad.shape[1], grad, grad.dtype)
    given = space.maps(room.to(DEVICE).copy_(space.matrix(grad)))
    monkeypatch.setattr(block, "owners", lambda _: block.sole_owners()[0])
    got = run(backend.dense_block, tree, given, "triton")
    assert_same(got, blocks.oracle(*tree, grad), 1e-4)
    assert not torch.equal(given.cpu(), grad), "it has not been added to"


def test_a_gradient_that_others_read_is_not_formed_in_its_own_memory() -> None:
    make = blocks.Maker(0, dtype=torch.float32)
    x, mean, a, b = (make.normal(*shape).to(DEVICE) for shape in ((6, 390), (7,), (7,), (7,)))
    vectors = [make.uniform(390).to(DEVICE) for _ in range(4)]
    weight, space = make.normal(7, 390, 1, 1).to(DEVICE), Space(1, (2, 3))
    conv = Convolution(Affine(*vectors, True), weight, None, 1, space)
    assert triton_pointwise.wants_formed(x, 7)
    grad = Pending(*(make.normal(6, 7).to(DEVICE) for _ in range(2)), None, mean, a, b)
    kept = grad.g.clone()
    found, expected = (
        kernel_set.convolve_backward(grad, x, conv, True)
        for kernel_set in (triton_kernels.TritonKernels(), Kernels())
    )
    assert torch.equal(grad.g, kept)
    assert found[0] is not None
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)


def test_an_affine_goes_to_the_memory_it_is_given() -> None:
    make = blocks.Maker(0, dtype=torch.float32)
    vectors = [make.normal(7).to(DEVICE) for _ in range(3)]
    norm = NormVectors(*vectors, make.uniform(7).to(DEVICE), 1e-5, True)
    room = torch.full((3, 12), -1.0, device=DEVICE)
    kernel_set = triton_kernels.TritonKernels()
    alone, found = kernel_set.affine(norm), kernel_set.affine(norm, out=room[:, 4:11])
    for ours, theirs in zip(found[:4], alone[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(room[:, 4:11], torch.stack((alone.scale, alone.shift, alone.rstd)))
    assert (room[:, [0, 1, 2, 3, 11]] == -1).all()


def test_rows_of_a_block_lie_multiples_of_8_values_apart() -> None:
    case = BLOCKS["biases"]
    x, layers = blocks.build(case, torch.float32)
    with kernels.use("triton"):
        out = backend.dense_block(x.to(DEVICE), change(layers, lambda t: t.to(DEVICE)))
    assert out.shape[1] % 8 != 0
    assert out.stride(3) % 8 == 0
    assert out.stride(3) - out.shape[1] < 8


# Their companions.

STEPS = {
    **{f"{name} in 2D": case for name, case in companions.some(space=(5, 6)).items()},
    **{f"{name} in eval": case for name, case in companions.some(EVAL).items()},
    **{f"{name} in 1D": case for name, case in companions.some(space=(9,)).items()},
    **{f"{name} in 3D": case for name, case in companions.some(space=(3, 2, 5)).items()},
    "large final": companions.Case("final", (2, 35, 7, 7), NormCase(eps=1e-3)),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_companion_equals_the_oracle(case: companions.Case) -> None:
    tree, grad = companions.build(case, torch.float32), companions.gradient(case, torch.float32)
    expected = companions.oracle(case, tree, grad)
    got = run(lambda *tree: case.call(backend, *tree), tree, grad, "triton")
    assert expected.margin > 1e-6, "an input of relu may fall on either side"
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("unit", ["transition", "stem", "final"])
def test_companion_in_float16_is_no_further_from_float64_than_plain(unit: str) -> None:
    case = companions.SOME[unit]
    tree, grad = companions.build(case, torch.float16), companions.gradient(case, torch.float16)
    theirs, got = (
        run(lambda *tree, module=module: case.call(module, *tree), tree, grad, name)
        for module, name in ((plain, "reference"), (backend, "triton"))
    )
    assert is_no_worse(got, theirs, companions.oracle(case, tree, grad), torch.float16, 2.0) == []


def test_two_runs_give_the_same_bits() -> None:
    case = blocks.block((2, 3, 5, 4), count=1)
    x, layers = blocks.build(case, torch.float32)
    grad = blocks.gradient(case, torch.float32)
    first, second = (
        run(backend.dense_block, blocks.Inputs(x, layers), grad, "triton").all() for _ in range(2)
    )
    for key, value in first.items():
        assert np.array_equal(value, second[key]), key


# How kernels are chosen.


@pytest.fixture
def trials() -> Iterator[None]:
    """GPUs are tried anew, and what is found of them is forgotten."""
    kernels._triton.cache_clear()
    yield
    kernels._triton.cache_clear()


def test_triton_is_one_of_the_sets_here() -> None:
    assert kernels.available()[-1] == "triton"
    assert kernels.missing("cuda") is None
    assert kernels.missing("mps") == "there are none for mps"
    with kernels.use("triton"):
        assert isinstance(kernels.chosen(torch.zeros(1)), triton_kernels.TritonKernels)
    assert kernels.chosen(torch.zeros(1)).name in ("cpu", "reference")
    assert kernels.chosen(torch.zeros(1, device="meta")).name == "reference"
    with pytest.raises(ConfigError, match="triton"), kernels.use("tritn"):
        pass


def test_without_triton_gpus_run_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(kernels, "_HAS_TRITON", False)
    monkeypatch.setattr(kernels, "_triton", lambda gpu: "not there")
    assert kernels.missing("cuda") == "Triton is not installed"
    assert "triton" not in kernels.available()
    x = torch.zeros(1).as_subclass(OnGpu)
    assert type(kernels.chosen(x)) is Kernels
    assert "runs on cuda" in str(backend.obstacle(x, [], []))


@pytest.mark.parametrize(
    ("capability", "error", "reason"),
    [
        ((7, 5), None, "compute capability 7.5; the Triton kernels need 8.0"),
        ((9, 0), RuntimeError("Failed to find C compiler\nmore"), "Failed to find C compiler"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_runs_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trials: None,
    capability: tuple[int, int],
    error: Exception | None,
    reason: str,
) -> None:
    def fails(*_: object) -> None:
        assert error is not None, "was tried"
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability if i else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old One")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(triton_kernels.TritonKernels, "affine", fails)
    found = kernels.missing("cuda:1")
    assert found is not None
    assert reason in found
    assert "\n" not in found
    assert found in caplog.text
    monkeypatch.setattr(triton_kernels.TritonKernels, "affine", lambda *_: None)
    assert kernels.missing("cuda:1") == found  # asked once
    assert kernels.missing("cuda:0") is None  # each by itself


def test_a_gpu_that_is_full_is_asked_again(monkeypatch: pytest.MonkeyPatch, trials: None) -> None:
    asked: list[torch.device] = []

    def ones(_: int, *, device: torch.device) -> Tensor:
        asked.append(device)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.full((8,), 1.0, device=DEVICE)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "ones", ones)
    assert "out of memory" in str(kernels.missing("cuda:1"))
    assert kernels.missing("cuda:1") is None
    assert asked == [torch.device("cuda:1")] * 2


def test_the_trial_runs_among_tensors_without_memory(
    monkeypatch: pytest.MonkeyPatch, trials: None
) -> None:
    """A compiler's stand-ins ask for the kernels first; what they find stays for the process."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda n, **_: torch.full((n,), 1.0, device=DEVICE))
    with FakeTensorMode():
        assert kernels.missing("cuda:0") is None


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python as it is without the interpreter of Triton."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=env,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )


def test_a_step_on_a_cpu_does_not_import_the_kernels_for_gpus() -> None:
    code = """
import sys, torch, block_cases as blocks
from densely.fused import backend
out = backend.dense_block(*blocks.build(blocks.block(), torch.float32))
out.sum().backward()
assert backend.fused_calls["dense block"] == 1
assert not [name for name in sys.modules if name.startswith("densely.fused.kernels.triton")]
"""
    done = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chip", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_around_convolutions_compile_and_spill_no_registers(chip: int) -> None:
    found = compiled_ahead("triton_ahead_steps.py", str(chip))
    assert len({kernel["name"] for kernel in found}) == 19
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= 168, kernel


@pytest.mark.parametrize(
    ("calls", "chip"),
    [
        ("bc_100_12 ", 80),
        pytest.param("", 80, marks=pytest.mark.slow),
        pytest.param("", 90, marks=pytest.mark.slow),
    ],
)
def test_convolutions_compile_and_find_room(calls: str, chip: int) -> None:
    """On an H100 they hardly spill.

    Backward's tile a few values, forward's two, to let two programs share a processor, and they are
    the fastest there all the same (docs/log.md).
    """
    found = compiled_ahead("triton_ahead.py", calls, str(chip))
    names = {kernel["name"] for kernel in found}
    assert {"_forward_kernel", "_backward_kernel", "_resident_kernel", "_weight_kernel"} <= names
    for kernel in found:
        assert kernel["shared"] <= (166_912 if chip == 80 else 232_448), kernel
        if chip == 90 and "odd" not in kernel["call"]:  # rows that lie askew cost addresses
            assert kernel["spilled"] <= (96 if "backward" in kernel["name"] else 8), kernel


@pytest.mark.parametrize("calls", ["121 3x3, block 4", pytest.param("", marks=pytest.mark.slow)])
def test_convolutions_find_room_where_a_program_has_less_memory(calls: str) -> None:
    found = compiled_ahead("triton_ahead.py", calls, "89")
    assert {"_forward_kernel", "_weight_kernel"} <= {kernel["name"] for kernel in found}
    for kernel in found:
        assert kernel["shared"] <= 101_376, kernel


def compiled_ahead(*command: str) -> list[dict[str, Any]]:
    done = in_a_process(*command)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
