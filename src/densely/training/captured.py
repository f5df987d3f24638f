"""A training step as one CUDA graph; the same step, kernel after kernel, where there is none.

A DenseNet's step is hundreds of short kernels, and a fast GPU runs them in less time than Python
takes to launch them. Captured once, the whole step is a single launch: forward pass, loss, backward
pass, optimizer, and the sums that the metrics are made of.

A replay repeats what was captured on the same addresses. So images and labels are copied into
buffers that stay, each learning rate is a number on the GPU, the gradients live in the graph's own
memory (no step clears or adds to them: each writes them anew), and autocast may not hand out
copies of weights that an earlier step has made. Random numbers go on as they would without a graph:
PyTorch hands seed and offset to each replay.

Source: PyTorch's notes on CUDA semantics, "Whole-network capture".
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.cuda_graphs import compile_kernels_of, record_graph, warm_up
from densely.errors import first_line
from densely.runtime import Runtime
from densely.training.sgd import SGD

_log = logging.getLogger(__name__)

#: (logits [N, K] in float32, labels [N]) to the mean loss of the batch.
Loss = Callable[[Tensor, Tensor], Tensor]


class TrainingStep:
    """One gradient step a call, and sums over the calls, which stay on the device.

    Learning rates are those of `optimizer.param_groups` at each call, as schedules set them.

    Args:
        model: on the runtime's device, in its layout.
        optimizer: of the model's parameters.
        runtime: device and precision.
        loss: of a batch.

    Attributes:
        loss_sum: of all images since `reset`, float64 [].
        correct: images whose likeliest class was right since then, int64 [].
    """

    captured = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        loss: Loss = F.cross_entropy,
    ) -> None:
        self.model, self.optimizer, self.runtime, self.loss = model, optimizer, runtime, loss
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=runtime.device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take one step on images [N, C, H, W] and labels [N], both on the device."""
        self._run(images, labels, self.runtime.autocast())

    def preparing(self) -> AbstractContextManager[object]:
        """Where to make the batches that the step is called with: beside the step before."""
        return nullcontext()

    def reset(self, loss_sum: float = 0.0, correct: int = 0) -> None:
        """Begin the sums anew, or from where an interrupted epoch had left them."""
        self.loss_sum.fill_(loss_sum)
        self.correct.fill_(correct)

    def _run(
        self, images: Tensor, labels: Tensor, autocast: AbstractContextManager[object]
    ) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast:
            logits = self.model(images)
        logits = logits.float()
        loss = self.loss(logits, labels)
        self._count(logits.detach(), loss.detach(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _count(self, logits: Tensor, loss: Tensor, labels: Tensor) -> None:
        self.loss_sum += loss.double() * len(labels)
        self.correct += (logits.argmax(dim=1) == labels).sum()


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    images: Tensor,
    labels: Tensor,
    loss: Loss = F.cross_entropy,
    other_sizes: Iterable[int] = (),
    beside: Iterable[Callable[[], object]] = (),
) -> TrainingStep:
    """The fastest training step there is here: captured on a GPU, else one kernel after another.

    Nothing has been learnt when it returns: weights, statistics, momentum and the state of the
    random numbers are as they were.

    Args:
        model: on the runtime's device, in its layout, in train mode. Its tensors may change their
            values afterwards, but must remain the same tensors.
        optimizer: `torch.optim.SGD` without dampening is captured, others are not. Let it load
            its state before. Other settings than the learning rate are fixed by the capture.
        runtime: device and precision.
        images: a batch [N, C, H, W] as the steps will get them.
        labels: of these images, [N].
        loss: of a batch; may wait for no number to be read from the GPU.
        other_sizes: of batches that will come too, such as the last of an epoch, below this one's:
            they are captured as well. Batches of yet other shapes run one kernel after another.
        beside: work of the same model that will come too, such as an evaluation, whose kernels are
            compiled with them; what it changes of model and optimizer is put back.

    Returns:
        The step; `captured` says which one, and a line in the log says why it is not.
    """
    why = _obstacle(model, optimizer, runtime)
    if why is None:
        try:
            return _CapturedStep(
                model, optimizer, runtime, loss, images, labels, other_sizes, beside
            )
        except Exception as error:  # CUDA, cuDNN, the allocator and Triton raise different ones
            why = first_line(error)
            _log.warning("training runs without a CUDA graph, slower than it could: %s", why)
    else:
        _log.info("training runs without a CUDA graph: %s", why)
    return TrainingStep(model, optimizer, runtime, loss)


def _obstacle(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> str | None:
    """Why a step cannot be captured; None if it may be."""
    if runtime.device.type != "cuda":
        return f"it runs on {runtime.device.type}"
    if type(optimizer) not in (torch.optim.SGD, SGD):
        return f"the optimizer is {type(optimizer).__name__}, and SGD can be captured"
    if any(group["momentum"] and group["dampening"] for group in optimizer.param_groups):
        return "momentum has dampening, which treats the first step apart"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"{name} averages over all batches, whose number Python must know"
    return None


class _CapturedStep(TrainingStep):
    """The step as a graph for each size of batch; they are captured when this is made."""

    captured = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        loss: Loss,
        images: Tensor,
        labels: Tensor,
        other_sizes: Iterable[int],
        beside: Iterable[Callable[[], object]],
    ) -> None:
        super().__init__(model, optimizer, runtime, loss)
        self._images, self._labels = images.clone(), labels.clone()
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._device_rates = [
            torch.tensor(rate, dtype=torch.float32, device=runtime.device) for rate in self._rates
        ]
        self._counting = torch.cuda.Stream(runtime.device)  # type: ignore[no-untyped-call]
        self._preparing = torch.cuda.Stream(runtime.device)  # type: ignore[no-untyped-call]
        self._add_momentum()
        # Detached: a graph of autograd that lives on would tie the weights to this stream.
        kept = [(tensor, tensor.detach().clone()) for tensor in self._changed_by_steps()]

        def put_back() -> None:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
            self.reset()

        sizes = (len(images), *sorted(other_sizes, reverse=True))

        def all_work() -> None:
            for size in sizes:
                self._one_run(size)
            for work in beside:
                work()

        def compile_kernels() -> None:
            compile_kernels_of(all_work)
            put_back()

        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        try:
            with _RatesOnDevice(optimizer, self._device_rates):
                self._record(sizes, compile_kernels)
        finally:
            put_back()
        self._preparing.wait_stream(torch.cuda.current_stream(runtime.device))

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        here = torch.cuda.current_stream(self.runtime.device)
        here.wait_stream(self._preparing)
        size = len(images)
        into = self._images[:size], self._labels[:size]
        if size not in self._graphs or any(
            (new.shape, new.dtype) != (old.shape, old.dtype)
            for new, old in zip((images, labels), into, strict=True)
        ):
            super().__call__(images, labels)
            self._preparing.wait_stream(here)
            return
        into[0].copy_(images)
        into[1].copy_(labels)
        # The next batch may take the memory of this one, and need not wait for the step.
        self._preparing.wait_stream(here)
        for i, group in enumerate(self.optimizer.param_groups):
            if self._rates[i] != group["lr"]:
                self._rates[i] = float(group["lr"])
                self._device_rates[i].fill_(self._rates[i])
        self._graphs[size].replay()

    def preparing(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._preparing)

    def _record(self, sizes: tuple[int, ...], compile_kernels: Callable[[], None]) -> None:
        """Make a graph for each size; those after the first may fail."""
        # One memory for all: what a step leaves behind, the gradients, is nothing to the next.
        device, pool = self.runtime.device, torch.cuda.graph_pool_handle()
        first, *others = sizes

        def before() -> None:
            compile_kernels()
            # Now, since what runs for real cannot take the memory of a graph.
            for size in list(others):
                with self._or_launched(size, others):
                    warm_up(partial(self._one_run, size))

        self._graphs[first], _ = record_graph(partial(self._one_run, first), device, pool, before)
        for size in list(others):
            with self._or_launched(size, others):
                self._graphs[size], _ = record_graph(
                    partial(self._one_run, size), device, pool, is_warm=True
                )

    @contextmanager
    def _or_launched(self, size: int, sizes: list[int]) -> Iterator[None]:
        """Leave a size out of `sizes` where its graph cannot be prepared or recorded."""
        try:
            yield
        except Exception as error:
            sizes.remove(size)
            _log.warning("batches of %d train without a CUDA graph: %s", size, first_line(error))

    def _one_run(self, size: int) -> None:
        # Gradients are set to None first, so those of the last run are made by the graph. Without
        # the cache: a copy of a weight made before the capture would be replayed stale.
        images, labels = self._images[:size], self._labels[:size]
        self._run(images, labels, self.runtime.autocast(cache=False))

    def _run(
        self, images: Tensor, labels: Tensor, autocast: AbstractContextManager[object]
    ) -> None:
        here = torch.cuda.current_stream(self.runtime.device)
        self._counting.wait_stream(here)
        try:
            super()._run(images, labels, autocast)
        finally:  # a recording that fails cannot even be ended before streams have come together
            here.wait_stream(self._counting)

    def _count(self, logits: Tensor, loss: Tensor, labels: Tensor) -> None:
        # Some small launches, for which backward need not wait.
        self._counting.wait_stream(torch.cuda.current_stream(self.runtime.device))
        with torch.cuda.stream(self._counting):
            super()._count(logits, loss, labels)

    def _add_momentum(self) -> None:
        """Make the momentum that the first step would make, so that the graph's is no first one.

        Zeros, which the first step turns into the gradient, as PyTorch's first step does.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not group["momentum"] or not parameter.requires_grad:
                    continue
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _changed_by_steps(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class _RatesOnDevice:
    """While capturing, the optimizer reads its learning rates from the device.

    Its fused kernel alone can. Schedules and checkpoints see plain numbers before and after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> None:
        self._groups, self._rates = optimizer.param_groups, rates

    def __enter__(self) -> None:
        names = ("lr", "fused", "foreach")
        self._before = [{name: group[name] for name in names} for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group.update(lr=rate, fused=True, foreach=False)

    def __exit__(self, *_: object) -> None:
        for group, before in zip(self._groups, self._before, strict=True):
            group.update(before)
