"""What PyTorch itself does with modules: copies, files, transforms, compilers, many processes."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from graphs import KeepsGraphs, operators
from torch import Tensor, nn

from densely.fused import accelerate, report, restore

SHAPE = (2, 3, 64, 48)
NAMES = ["torchvision", "timm", "MONAI 2D"]


def pair(
    name: str = "torchvision", *, train: bool = False, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    original, accelerated = foreign.pair(foreign.CASES[name].make(**kwargs))
    return original.train(train), accelerated.train(train)


def paths(model: nn.Module) -> set[tuple[int, int]]:
    """All different pairs of counts: calls of densely's step, calls of the original forward."""
    return {(n.densely, n.plain) for n in report(model).calls().values()}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file]
)
def test_copies_are_accelerated_and_count_anew(
    copied: Callable[[nn.Module], nn.Module], name: str
) -> None:
    original, accelerated = pair(name)
    x = foreign.images(SHAPE)
    foreign.step(accelerated, x)
    twin = copied(accelerated)
    assert [type(m) for m in twin.modules()] == [type(m) for m in accelerated.modules()]
    assert paths(twin) == {(0, 0)}
    assert not {p.data_ptr() for p in twin.parameters()} & {
        p.data_ptr() for p in accelerated.parameters()
    }
    foreign.step(original, x)
    foreign.assert_same(foreign.step(twin, x), foreign.step(original, x))
    assert paths(twin) == paths(accelerated) == {(1, 0)}
    restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in original.modules()]


def test_a_pickle_names_no_class_of_denselys() -> None:
    _, accelerated = pair()
    names = pickle.dumps(accelerated)
    assert b"Accelerated" not in names
    assert b"torchvision.models.densenet" in names


def test_a_model_may_keep_its_report() -> None:
    net = foreign.torchvision()
    net.report = accelerate(net)
    assert len(net.report.calls()) == 9
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.report == net.report
        assert twin.report.calls() == {}


def test_a_pickle_opens_in_another_process(tmp_path: Path) -> None:
    original, accelerated = pair("MONAI 2D")
    x = foreign.images(SHAPE)
    torch.save({"net": accelerated, "x": x, "y": original(x)}, tmp_path / "net.pt")
    code = (
        "import sys, torch; kept = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(kept['net'](kept['x']), kept['y'], rtol=1e-10, atol=1e-10);"
        "from densely.fused import report; calls = report(kept['net']).calls().values();"
        "assert {(n.densely, n.plain) for n in calls} == {(1, 0)} and len(calls) == 5"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "net.pt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_distributed_data_parallel(tmp_path: Path) -> None:
    original, accelerated = pair(train=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        x = foreign.images(SHAPE)
        outside = nn.parallel.DistributedDataParallel(accelerated)
        results = [foreign.step(outside, x) for _ in range(2)]
        inside = nn.parallel.DistributedDataParallel(copy.deepcopy(original))
        assert len(accelerate(inside).replaced) == 4
        again = [foreign.step(inside, x) for _ in range(2)]
    finally:
        torch.distributed.destroy_process_group()
    for got, more in zip(results, again, strict=True):
        wanted = foreign.step(original, x)
        for result in (got, more):
            close(result.output, wanted.output)
            assert {n.removeprefix("module.") for n in result.grads} == set(wanted.grads)
            for name, grad in result.grads.items():
                close(grad, wanted.grads[name.removeprefix("module.")])
    assert paths(accelerated) == {(2, 0)}


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_uses_the_weights_it_is_given(name: str) -> None:
    original, accelerated = pair(name)
    other = dict(foreign.shuffle(foreign.CASES[name].make(), seed=5).state_dict())
    x = foreign.images(SHAPE)
    wanted = torch.func.functional_call(original, other, (x,))
    close(torch.func.functional_call(accelerated, other, (x,)), wanted)
    assert (wanted - original(x)).abs().max() > 1e-3
    assert paths(accelerated) == {(1, 0)}


def test_transforms_of_functions() -> None:
    original, accelerated = pair()
    x = foreign.images(SHAPE)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (images[None],)).square().sum()

        parameters = {n: p.detach() for n, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    wanted = gradients(original)
    got = gradients(accelerated)
    assert got.keys() == wanted.keys()
    for name in wanted:
        close(got[name], wanted[name])
    assert paths(accelerated) == {(0, 1)}  # transforms go through plain operators only


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself calls it
def test_double_backward_and_forward_mode() -> None:
    original, accelerated = pair()
    x = foreign.images(SHAPE).requires_grad_()
    seconds = []
    for net in (original, accelerated):
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    close(seconds[1], seconds[0])
    tangents = [
        torch.func.jvp(net, (x,), (torch.ones_like(x),))[1] for net in (original, accelerated)
    ]
    close(tangents[1], tangents[0])
    assert paths(accelerated) == {(1, 1)}  # forward mode goes through plain operators only


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_many_gradients_at_once(train: bool) -> None:
    original, accelerated = pair()
    x = foreign.images(SHAPE).requires_grad_()
    found = []
    for net in (original, accelerated):
        output = net.train(train)(x)
        many = torch.linspace(-1, 1, 3 * output.numel(), dtype=output.dtype)
        found.append(
            torch.autograd.grad(
                output, [x, *net.parameters()], many.view(3, *output.shape), is_grads_batched=True
            )
        )
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)
    assert paths(accelerated) == {(1, 0)}


SHORT = {"blocks": (2, 1)}  # tracing takes its time, layer by layer


@pytest.mark.parametrize(
    ("name", "train", "options"),
    [
        ("torchvision", True, SHORT),
        ("timm", False, SHORT),
        pytest.param("MONAI 2D", True, {}, marks=pytest.mark.slow),
    ],
)
def test_compiling_gives_one_graph(name: str, train: bool, options: dict[str, Any]) -> None:
    original, accelerated = pair(name, train=train, **options)
    x = foreign.images(SHAPE)
    kept = KeepsGraphs()
    compiled = torch.compile(accelerated, fullgraph=True, backend=kept)
    wanted = foreign.step(original, x, train=None)
    got = foreign.step(compiled, x, train=None)
    close(got.output, wanted.output)
    for name, buffer in wanted.buffers.items():
        close(got.buffers[f"_orig_mod.{name}"], buffer)
    assert paths(accelerated) == {(0, 0)}  # what is compiled is not counted
    (graph,) = kept.graphs
    assert {"densely::dense_block_forward", "densely::reader_forward"} <= operators(graph)


def test_a_compiled_model_can_be_accelerated() -> None:
    original, _ = pair(**SHORT)
    x = foreign.images(SHAPE)
    wanted = original(x)
    compiled = torch.compile(original, fullgraph=True, backend="eager")
    close(compiled(x), wanted)
    assert len(accelerate(compiled).replaced) == 4  # stem, block, transition, head
    close(compiled(x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    original, accelerated = pair(name)
    x = foreign.images(SHAPE)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(accelerated, (x,), dynamic_shapes={"x": {0: batch}})
    x = foreign.images((5, *SHAPE[1:]))
    close(exported.module()(x), original(x))


def test_tracing_by_fx_and_jit() -> None:
    original, accelerated = pair()
    x = foreign.images(SHAPE)
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["features.denseblock2.denselayer1.conv1", "features.transition1.pool"]
    for got, wanted in zip(
        *(create_feature_extractor(net, nodes)(x).values() for net in (accelerated, original)),
        strict=True,
    ):
        close(got, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(accelerated, (x,))
    close(traced(x), original(x))


def test_moving_to_another_dtype_keeps_the_path() -> None:
    _, accelerated = pair()
    accelerated.half()
    assert accelerated(foreign.images(SHAPE).half()).dtype == torch.float16
    accelerated.float()
    assert accelerated(foreign.images(SHAPE).float()).dtype == torch.float32
    assert paths(accelerated) == {(2, 0)}


def test_a_call_with_keywords_or_a_wrong_shape_is_the_originals_business() -> None:
    original, accelerated = pair()
    x = foreign.images(SHAPE)
    close(accelerated(x=x), original(x))
    for wrong in (x[0], x[None]):
        errors = []
        for net in (original, accelerated):
            with pytest.raises((ValueError, RuntimeError)) as error:
                net.features.denseblock1(wrong)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
