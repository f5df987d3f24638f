"""A training step, captured and not: the same function, and the same interface."""

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_gpu import needs_gpu
from torch import Tensor, nn

from densely.forward import Forward
from densely.models.registry import build_model
from densely.runtime import Runtime, choose_runtime
from densely.training import captured
from densely.training.captured import TrainingStep, training_step
from densely.training.sgd import SGD

CPU = choose_runtime("cpu", "float32")
RATES = (1 / 8, 1 / 8, 1 / 16, 1 / 32, 1 / 4)  # exact in float32


def small_net(drop_rate: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return build_model("densenet_bc_22_12", num_classes=10, in_channels=1, drop_rate=drop_rate)


def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 1, 12, 12, generator=generator),
        torch.randint(0, 10, (size,), generator=generator),
    )


def sgd(model: nn.Module, lr: float = 0.1, **settings: float | bool) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, **settings)


def run(step: TrainingStep, sizes: tuple[int, ...] = (8, 8, 8, 3, 8)) -> list[Tensor]:
    """Steps under a schedule; all that they have changed."""
    for i, (rate, size) in enumerate(zip(RATES, sizes, strict=True)):
        for group in step.optimizer.param_groups:
            group["lr"] = rate
        images, labels = batch(size, seed=i)
        with step.preparing():
            device = step.runtime.device
            images, labels = step.runtime.layout(images.to(device)), labels.to(device)
        step(images, labels)
    momentum = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    return [*step.model.state_dict().values(), *momentum, step.loss_sum, step.correct]


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The same steps, written down plainly."""
    loss_sum, correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for i, (rate, size) in enumerate(zip(RATES, (8, 8, 8, 3, 8), strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        images, labels = batch(size, seed=i)
        optimizer.zero_grad()
        logits = model(CPU.layout(images))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * size
        correct += (logits.argmax(1) == labels).sum()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [*model.state_dict().values(), *momentum, loss_sum, correct]


def test_without_a_gpu_it_is_the_plain_step(caplog: pytest.LogCaptureFixture) -> None:
    model, other = CPU.place(small_net()), CPU.place(small_net())
    with caplog.at_level(logging.INFO, captured.__name__):
        step = training_step(model, sgd(model), CPU, *batch(8, 0))
    assert not step.captured
    assert "without a CUDA graph: it runs on cpu" in caplog.text
    for mine, expected in zip(run(step), plain_loop(other, sgd(other)), strict=True):
        torch.testing.assert_close(mine, expected)


def test_sums_begin_anew() -> None:
    model = small_net()
    step = training_step(model, sgd(model), CPU, *batch(8, 0))
    step(*batch(8, 0))
    assert step.loss_sum > 0
    step.reset()
    assert step.loss_sum == 0
    assert step.correct == 0


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (lambda p: torch.optim.AdamW(p), "the optimizer is AdamW"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1), "dampening"),
        (lambda p: torch.optim.SGD(p), None),
        (lambda p: SGD(p, momentum=0.9), None),
    ],
)
def test_what_cannot_be_captured_is_told(optimizer, why: str | None) -> None:  # type: ignore[no-untyped-def]
    model = nn.Linear(2, 2)
    gpu = Runtime(torch.device("cuda"), "bfloat16", "channels_last")
    found = captured._obstacle(model, optimizer(model.parameters()), gpu)
    assert (found is None) if why is None else (why in str(found))


def test_norms_that_average_over_all_batches_are_not_captured() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=None))
    gpu = Runtime(torch.device("cuda"), "bfloat16", "channels_last")
    why = captured._obstacle(model, torch.optim.SGD(model.parameters()), gpu)
    assert "0 averages over all batches" in str(why)


def test_a_capture_that_fails_leaves_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(captured, "_obstacle", lambda *_: None)
    monkeypatch.setattr(captured, "_CapturedStep", fails)
    model = small_net()
    step = training_step(model, sgd(model), CPU, *batch(8, 0))
    assert not step.captured
    assert caplog.messages == [
        "training runs without a CUDA graph, slower than it could: "
        "operation not permitted when stream is capturing"
    ]
    step(*batch(8, 0))


class GraphOfPython:
    """Stands in for a CUDA graph: a replay runs what was recorded again, by the same tensors."""

    def __init__(self, work: Callable[[], None], optimizer: torch.optim.Optimizer) -> None:
        self.work, self.groups = work, optimizer.param_groups
        self.rates = [group["lr"] for group in self.groups]
        work()

    def replay(self) -> None:
        before = [group["lr"] for group in self.groups]
        self.set(self.rates)
        self.work()
        self.set(before)

    def set(self, rates: list[Any]) -> None:
        for group, rate in zip(self.groups, rates, strict=True):
            group["lr"] = rate


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., captured._CapturedStep]:
    """Makes a captured step, with stand-ins for what a GPU has."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(captured, "compile_kernels_of", lambda work: work())

    def make(
        model: nn.Module,
        *sizes: int,
        beside: tuple[Callable[[], object], ...] = (),
        lr: float = 0.1,
    ) -> captured._CapturedStep:
        optimizer = sgd(model, lr)
        pools = set()

        def record(
            work: Callable[[], None],
            device: torch.device,
            pool: object,
            before: Callable[[], None] | None = None,
            is_warm: bool = False,
        ) -> tuple[GraphOfPython, None]:
            assert is_warm == (pool in pools)
            pools.add(pool)
            assert len(pools - {None}) == len(pools) == 1
            if before:
                before()
            return GraphOfPython(work, optimizer), None

        monkeypatch.setattr(captured, "record_graph", record)
        return captured._CapturedStep(
            model, optimizer, CPU, F.cross_entropy, *batch(8, seed=99), sizes, beside
        )

    return make


@pytest.mark.parametrize(
    ("other_sizes", "rate", "frozen"),
    [((), 0.1, False), ((3,), RATES[0], False), ((2, 3), 0.1, True)],
)
def test_a_recorded_step_takes_new_images_labels_and_rates(
    other_sizes: tuple[int, ...],
    rate: float,
    frozen: bool,
    recorded: Callable[..., captured._CapturedStep],
) -> None:
    model, other = CPU.place(small_net()), CPU.place(small_net())
    for net in (model, other):
        net.features[0].requires_grad_(not frozen)  # type: ignore[index]
    step = recorded(model, *other_sizes, lr=rate)
    for mine, expected in zip(run(step), plain_loop(other, sgd(other)), strict=True):
        torch.testing.assert_close(mine, expected)
    assert sorted(step._graphs) == sorted((8, *other_sizes))


def test_batches_of_sizes_that_were_told_are_replayed(
    recorded: Callable[..., captured._CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = recorded(CPU.place(small_net()), 3)
    replayed = [size for size in (8, 3) if not _launches(step, batch(size, 1), monkeypatch)]
    assert replayed == [8, 3]
    assert _launches(step, batch(5, 1), monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        lambda images, labels: (images[..., :1], labels),
        lambda images, labels: (images.double(), labels),
        lambda images, labels: (images, labels[:1]),
        lambda images, labels: (images, labels.int()),
    ],
    ids=["shape of images", "dtype of images", "shape of labels", "dtype of labels"],
)
def test_batches_of_another_shape_or_dtype_are_not_pressed_into_the_graph(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    recorded: Callable[..., captured._CapturedStep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = recorded(CPU.place(small_net()))
    assert _launches(step, change(*batch(8, 1)), monkeypatch)


@pytest.mark.parametrize("failing", [2, 5], ids=["warmed up", "recorded"])
def test_a_size_whose_graph_cannot_be_made_is_launched(
    failing: int,
    recorded: Callable[..., captured._CapturedStep],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, runs = CPU.place(small_net()), list[int]()

    def fail(_: nn.Module, given: tuple[Tensor]) -> None:
        if len(given[0]) == 3:
            runs.append(3)
            if len(runs) == failing:
                raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(fail)
    step = recorded(model, 3)
    assert caplog.messages == ["batches of 3 train without a CUDA graph: no room"]
    launched = [size for size in (8, 3) if _launches(step, batch(size, 1), monkeypatch)]
    assert launched == [3]


class Stream:
    """Stands in for a stream, and writes down who waits for whom."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize(("size", "runs"), [(8, "replay"), (5, "launched")])
def test_a_batch_is_made_beside_the_step_before(
    size: int,
    runs: str,
    recorded: Callable[..., captured._CapturedStep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, said = recorded(CPU.place(small_net())), list[str]()
    step._preparing = Stream("the next batch", said)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("the step", said))
    step._graphs[8] = SimpleNamespace(replay=lambda: said.append("replay"))  # type: ignore[assignment]
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: said.append("launched"))
    step(*batch(size, seed=1))
    # What is replayed has a copy of the batch; what is launched reads the batch itself.
    assert said.pop(0) == "the step waits for the next batch"
    copied = ["the next batch waits for the step", "replay"]
    assert said == (copied if runs == "replay" else ["launched", copied[0]])


def test_sums_are_made_beside_backward_and_after_the_loss(
    recorded: Callable[..., captured._CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        said.append("loss")
        return F.cross_entropy(logits, labels)

    step, said = recorded(CPU.place(small_net())), list[str]()
    step.loss = loss
    step._counting = Stream("counting", said)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("the step", said))
    monkeypatch.setattr(TrainingStep, "_count", lambda *_: said.append("sums"))
    step._one_run(8)
    waits = "counting waits for the step"
    assert said == [waits, "loss", waits, "sums", "the step waits for counting"]


def test_the_first_batch_is_made_after_all_that_was_run_for_the_capture(
    recorded: Callable[..., captured._CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, names = list[str](), iter(("one", "other"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names), said))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("the step", said))
    step = recorded(CPU.place(small_net()))
    assert said[-1] == f"{step._preparing.name} waits for the step"  # type: ignore[attr-defined]


def test_streams_come_together_after_an_error(
    recorded: Callable[..., captured._CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    step, said = recorded(CPU.place(small_net())), list[str]()
    step.loss = fails
    step._counting = Stream("counting", said)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("the step", said))
    with pytest.raises(torch.OutOfMemoryError):
        step._one_run(8)
    assert said == ["counting waits for the step", "the step waits for counting"]


def _launches(
    step: captured._CapturedStep, given: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether this batch runs kernel after kernel."""
    called: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", lambda self, images, labels: called.append(images))
        step(*given)
    return bool(called)


def test_nothing_is_learnt_while_a_step_is_recorded_and_kernels_of_every_size_are_compiled(
    recorded: Callable[..., captured._CapturedStep],
) -> None:
    model = CPU.place(small_net())
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    start = copy.deepcopy(model.state_dict())
    by_batch = Forward(model, CPU, training=True)
    evaluation = partial(by_batch.launched, batch(5, seed=1)[0])
    step = recorded(model, 3, beside=(evaluation,))
    # Compiled, and what goes beside them; run, to have memory and the fastest kernels; recorded.
    assert sizes == [8, 3, 5, 3, 3, 3, 8, 3]
    assert same(model.state_dict(), start)
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert momenta
    assert not any(momentum.any() for momentum in momenta)
    assert (step.loss_sum, step.correct) == (0, 0)
    assert step.optimizer.param_groups[0]["lr"] == 0.1


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_learning_rates_are_numbers_again_after_the_capture() -> None:
    optimizer = sgd(nn.Linear(2, 2))
    rates = [torch.tensor(0.1)]
    with captured._RatesOnDevice(optimizer, rates):
        assert optimizer.param_groups[0]["lr"] is rates[0]
        assert optimizer.param_groups[0]["fused"]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["foreach"]) == (0.1, None, None)


@needs_gpu
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graph_and_plain_step_agree_under_a_schedule(
    precision: str, drop_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runtime = choose_runtime("cuda", precision)  # type: ignore[arg-type]
    found = []
    for capture in (True, False):
        model = runtime.place(small_net(drop_rate)).train()
        optimizer = sgd(model, weight_decay=1e-4, fused=True)
        torch.manual_seed(1)
        if capture:
            images, labels = batch(8, seed=99)
            step = training_step(
                model, optimizer, runtime, runtime.layout(images.cuda()), labels.cuda(),
                other_sizes=[3],
            )  # fmt: skip
            assert isinstance(step, captured._CapturedStep)
            assert sorted(step._graphs) == [3, 8]
            assert all(p.grad is not None for p in model.parameters())
        else:
            step = TrainingStep(model, optimizer, runtime)
        found.append(run(step))
    bound = 1e-3 if precision == "float32" else 5e-2
    for graph, plain in zip(*found, strict=True):
        distance = (graph.double() - plain.double()).norm()
        assert distance <= bound * plain.double().norm() + 1e-6
