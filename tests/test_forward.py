"""The forward pass: the model's own function, whatever is recorded and replayed."""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from on_gpu import exact_convolutions, needs_gpu
from torch import Tensor, nn

from densely import forward as module
from densely.forward import Forward
from densely.models.registry import build_model
from densely.runtime import Runtime, choose_runtime

CPU = choose_runtime("cpu", "float32")


class Graph:
    """Stands for a CUDA graph: a replay computes anew what was recorded, into the same tensors."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self.work, self.outputs, self.replays = work, work().clone(), 0

    def replay(self) -> None:
        self.replays += 1
        self.outputs.copy_(self.work())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are recorded; what runs on the CPU passes for work on a GPU."""
    made: list[Graph] = []

    def record(work: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Graph, Tensor]:
        made.append(Graph(work))
        return made[-1], made[-1].outputs

    monkeypatch.setattr(module, "record_graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return made


def recording(model: nn.Module, *, training: bool = False) -> Forward:
    forward = Forward(model, CPU, training=training)
    forward.records = True
    return forward


def small_net() -> nn.Module:
    torch.manual_seed(0)
    model = CPU.place(build_model("densenet_bc_22_12", num_classes=10, in_channels=1))
    with torch.no_grad():
        model(images(16))  # running statistics that tell
    return model.eval()


def running_means(model: nn.Module) -> Tensor:
    return torch.cat([b for name, b in model.named_buffers() if name.endswith("running_mean")])


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return CPU.layout(torch.randn(count, 1, 12, 12, generator=generator))


@pytest.mark.parametrize("training", [False, True])
def test_kernels_are_compiled_before_the_first_batch_of_a_size(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """But not by a run in train mode, from which the norms would learn."""
    compiled: list[int] = []

    def dry_run(work: Callable[[], Tensor]) -> None:
        compiled.append(len(work()))

    monkeypatch.setattr(module, "compile_kernels_of", dry_run)
    forward = recording(small_net(), training=training)
    for count in (4, 4, 3, 6):
        forward(images(count))
    assert compiled == ([] if training else [4, 6])


def test_on_a_cpu_it_is_the_model() -> None:
    model = small_net().train()
    outputs = Forward(model, CPU)(images(3))
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.eval()(images(3)), rtol=0, atol=0)
    assert not outputs.requires_grad


def test_parts_keep_their_own_modes() -> None:
    model = small_net().train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    Forward(model, CPU)(images(3))
    assert [module for module in model.modules() if not module.training] == [frozen]


def test_a_part_in_train_mode_is_no_part_of_inference() -> None:
    model = nn.Sequential(small_net(), nn.Dropout(0.5)).eval()
    model[1].train()
    forward = Forward(model, CPU)
    assert torch.equal(forward(images(8)), forward(images(8)))
    assert [part.training for part in model] == [False, True]


@pytest.mark.parametrize("records", [False, True])
def test_outputs_are_tensors_like_others(graphs: list[Graph], records: bool) -> None:
    forward = Forward(small_net(), CPU)
    forward.records = records
    for _ in range(3):
        found = forward(images(4))
        assert not found.is_inference()
        found += 1


def test_threads_get_their_own_answers(graphs: list[Graph]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    forward = recording(model)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        mine = images(4, seed)
        with torch.no_grad():
            expected = model(mine)
        for _ in range(500):
            if not torch.allclose(forward(mine), expected, atol=1e-6):
                wrong.append(seed)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(ask, range(3)))
    assert not wrong
    assert len(graphs) == 1


def test_every_size_gives_the_models_outputs(graphs: list[Graph]) -> None:
    model = small_net()
    forward = recording(model)
    for turn, count in enumerate([5, 8, 6, 7, 1, 1, 1, 8, 3, 4, 17, 32, 19]):
        found = forward(images(count, turn))
        with torch.no_grad():
            torch.testing.assert_close(found, model(images(count, turn)), rtol=1e-5, atol=1e-6)
        assert found.dtype == torch.float32
    # 5 and 3 came first of their size, and 17; the second of each was recorded.
    assert [graph.replays for graph in graphs] == [4, 2, 1, 2]


def test_outputs_are_not_overwritten_by_the_next_batch(graphs: list[Graph]) -> None:
    forward = recording(small_net())
    forward(images(4))
    first = forward(images(4, 1))
    kept = first.clone()
    forward(images(4, 2))
    assert len(graphs) == 1
    assert torch.equal(first, kept)


def test_weights_that_change_are_seen(graphs: list[Graph]) -> None:
    model = small_net()
    forward = recording(model)
    for _ in range(2):
        before = forward(images(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = forward(images(4))
    assert len(graphs) == 1
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(images(4)))


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_change_within_an_autocast_are_seen(training: bool) -> None:
    """It keeps copies of weights until its end, and they would be stale."""
    runtime = choose_runtime("cpu", "bfloat16")
    model = nn.Linear(3, 2).train(training)
    forward, inputs = Forward(model, runtime, training=training), torch.rand(4, 3)
    with runtime.autocast():
        outputs = [model(inputs).float(), forward(inputs)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        outputs.append(forward(inputs))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], 2 * outputs[0])


def test_shapes_and_dtypes_have_graphs_of_their_own(graphs: list[Graph]) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    forward = recording(model)
    for side, dtype in [(4, torch.float32), (6, torch.float32), (4, torch.float64)] * 2:
        pixels = torch.rand(2, 3, side, side, dtype=dtype)
        torch.testing.assert_close(forward(pixels), model(pixels).float())
    assert len(graphs) == 3


def test_in_train_mode_batches_are_as_they_come(graphs: list[Graph]) -> None:
    model = small_net()
    forward = recording(model, training=True)
    for count in (5, 6, 5, 6):
        found = forward(images(count))
        with torch.no_grad():
            torch.testing.assert_close(found, model.train()(images(count)))
        model.eval()
    assert [len(graph.outputs) for graph in graphs] == [5, 6]
    assert not model.training


def test_norms_that_go_by_the_batch_are_not_given_a_larger_one(graphs: list[Graph]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)).eval()
    forward = recording(model)
    for _ in range(3):
        torch.testing.assert_close(forward(images(5)), model(images(5)))
    assert [len(graph.outputs) for graph in graphs] == [5]


def test_what_cannot_be_recorded_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def fails(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(module, "record_graph", fails)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    model = small_net()
    forward = recording(model)
    with caplog.at_level(logging.WARNING, module.__name__), torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(forward(images(3)), model(images(3)))
    assert len(attempts) == 1
    assert caplog.messages == [
        "inference runs without a CUDA graph, slower than it could: "
        "operation not permitted when stream is capturing"
    ]


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_graphs_agree_with_the_model_on_a_gpu(precision: str, training: bool) -> None:
    runtime: Runtime = choose_runtime("cuda", precision)  # type: ignore[arg-type]
    model = runtime.place(small_net())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # in training the running statistics are then the batch's
    plain = copy.deepcopy(model).train(training)
    forward = Forward(model, runtime, training=training)
    bound = 1e-3 if precision == "float32" else 5e-2
    for turn, count in enumerate([5, 8, 6, 6, 1, 8, 32, 17, 32, 4]):
        batch = runtime.layout(images(count, turn).cuda())
        with exact_convolutions():
            found = forward(batch)
            with torch.no_grad(), runtime.autocast():
                expected = plain(batch).float()
        assert (found - expected).norm() <= bound * expected.norm()
        means, aims = (running_means(net) for net in (model, plain))
        assert (means - aims).norm() <= bound * aims.norm()
    assert sorted(forward.recorded_sizes) == ([6, 8, 32] if training else [8, 32])
    assert forward.records
