"""What a network costs on this machine: weights, multiplications, memory, speed."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.bench.kept import saved_bytes
from densely.environment import device_name
from densely.evaluation.findings import Cost
from densely.forward import Forward
from densely.models.registry import count_macs
from densely.runtime import Runtime, ran_out_of_memory
from densely.training.captured import training_step
from densely.training.checkpoint import ModelInfo
from densely.training.sgd import SGD

#: A batch that arrives alone, and one that keeps the machine busy.
BATCH_SIZES = (1, 64)
#: Of a training step, the largest that fits into memory with all networks.
TRAIN_BATCHES = (64, 16, 4)
KEPT_BATCHES = (8, 2)
ROUNDS = 3
TURN_SECONDS = 0.3


def costs(networks: Sequence[tuple[nn.Module, ModelInfo]], runtime: Runtime) -> list[Cost]:
    """Weigh networks side by side; speeds are taken in turns, and are medians over rounds.

    Args:
        networks: each on the device of `runtime`, in its layout, with what it is.
        runtime: where, and in which precision.
    """
    speeds: list[dict[int, float]] = [{} for _ in networks]
    for batch in BATCH_SIZES:
        seconds = _in_turns([_inference(*network, batch, runtime) for network in networks], runtime)
        for speed, taken in zip(speeds, seconds, strict=True):
            speed[batch] = batch / taken
    train_batch, training = _training_seconds(networks, runtime)
    return [
        Cost(
            model=info.model,
            parameters=sum(p.numel() for p in model.parameters()),
            macs=_macs(model, info),
            weights_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            kept_bytes=_kept_bytes(model, info, runtime),
            images_per_s=speed,
            train_batch=train_batch,
            train_images_per_s=train_batch / taken,
            device=device_name(runtime.device),
            precision=runtime.precision,
        )
        for (model, info), speed, taken in zip(networks, speeds, training, strict=True)
    ]


def _in_turns(works: Sequence[Callable[[], object]], runtime: Runtime) -> list[float]:
    """Seconds of each work: all have a turn before any has the next; medians over the turns."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(ROUNDS + 1):
        for work, taken in zip(works, seconds, strict=True):
            times, begin = 0, time.perf_counter()
            while times == 0 or time.perf_counter() - begin < TURN_SECONDS:
                work()
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize(runtime.device)
                times += 1
            if number > 0:  # the first round warms up
                taken.append((time.perf_counter() - begin) / times)
    return [statistics.median(taken) for taken in seconds]


def _training_seconds(
    networks: Sequence[tuple[nn.Module, ModelInfo]], runtime: Runtime
) -> tuple[int, list[float]]:
    """Images of a training step, and its seconds for each network."""
    for batch in TRAIN_BATCHES:
        try:
            steps = [_training(*network, batch, runtime) for network in networks]
            return batch, _in_turns(steps, runtime)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
    return 0, [1.0] * len(networks)


def _inference(
    model: nn.Module, info: ModelInfo, batch: int, runtime: Runtime
) -> Callable[[], object]:
    """A forward pass as `densely predict` takes it."""
    return partial(Forward(model.eval(), runtime), _images(info, batch, runtime))


def _training(
    model: nn.Module, info: ModelInfo, batch: int, runtime: Runtime
) -> Callable[[], object]:
    """A step as `densely train` takes it, of a copy that may learn what it likes."""
    learner = copy.deepcopy(model).train()
    images = _images(info, batch, runtime)
    labels = torch.arange(batch, device=runtime.device) % len(info.classes)
    optimizer = SGD(learner.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
    return partial(training_step(learner, optimizer, runtime, images, labels), images, labels)


def _images(info: ModelInfo, batch: int, runtime: Runtime) -> Tensor:
    size, channels = info.preprocessing.image_size, info.preprocessing.channels
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, channels, size, size, generator=generator)
    return runtime.layout(images.to(runtime.device))


def _macs(model: nn.Module, info: ModelInfo) -> int:
    size, channels = info.preprocessing.image_size, info.preprocessing.channels
    # Not on "meta", where PyTorch imports its compiler to find shapes: that takes longer.
    return count_macs(copy.deepcopy(model).cpu(), torch.zeros(1, channels, size, size))


def _kept_bytes(model: nn.Module, info: ModelInfo, runtime: Runtime) -> int:
    """What a training step keeps for its backward pass, an image; of a copy of the network."""
    learner = copy.deepcopy(model).train()
    for batch in KEPT_BATCHES:
        images = _images(info, batch, runtime)
        labels = torch.zeros(batch, dtype=torch.int64, device=runtime.device)

        def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            with runtime.autocast():
                return F.cross_entropy(learner(images), labels)

        try:
            there = [*learner.parameters(), *learner.buffers(), images, labels]
            return round(saved_bytes(loss, there) / batch)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error) or batch == KEPT_BATCHES[-1]:
                raise
    raise AssertionError("the last batch returns or raises")
