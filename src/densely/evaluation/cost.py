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
from densely.models.registry import count_macs
from densely.runtime import Runtime
from densely.training.captured import training_step
from densely.training.checkpoint import ModelInfo

#: A batch that arrives alone, and one that keeps the machine busy.
BATCH_SIZES = (1, 64)
KEPT_BATCH = 8  # small, since what is kept grows with it, and only its share an image counts
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
    batch = max(BATCH_SIZES)
    training = _in_turns([_training(*network, batch, runtime) for network in networks], runtime)
    return [
        Cost(
            model=info.model,
            parameters=sum(p.numel() for p in model.parameters()),
            macs=_macs(info),
            weights_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            kept_bytes=_kept_bytes(model, info, runtime),
            images_per_s=speed,
            train_images_per_s=batch / taken,
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


def _inference(
    model: nn.Module, info: ModelInfo, batch: int, runtime: Runtime
) -> Callable[[], object]:
    images = _images(info, batch, runtime)

    def work() -> object:
        with torch.inference_mode(), runtime.autocast():
            return model.eval()(images)

    return work


def _training(
    model: nn.Module, info: ModelInfo, batch: int, runtime: Runtime
) -> Callable[[], object]:
    """A step as `densely train` takes it, of a copy that may learn what it likes."""
    learner = copy.deepcopy(model).train()
    images = _images(info, batch, runtime)
    labels = torch.arange(batch, device=runtime.device) % len(info.classes)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
    return partial(training_step(learner, optimizer, runtime, images, labels), images, labels)


def _images(info: ModelInfo, batch: int, runtime: Runtime) -> Tensor:
    size, channels = info.preprocessing.image_size, info.preprocessing.channels
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, channels, size, size, generator=generator)
    return runtime.layout(images.to(runtime.device))


def _macs(info: ModelInfo) -> int:
    with torch.device("meta"):
        model = info.build()
    size, channels = info.preprocessing.image_size, info.preprocessing.channels
    return count_macs(model, (channels, size, size))


def _kept_bytes(model: nn.Module, info: ModelInfo, runtime: Runtime) -> int:
    """What a training step keeps for its backward pass, an image; the network stays as it is."""
    images = _images(info, KEPT_BATCH, runtime)
    labels = torch.zeros(KEPT_BATCH, dtype=torch.int64, device=runtime.device)
    buffers = {key: value.clone() for key, value in model.state_dict().items()}

    def loss() -> Tensor:
        with runtime.autocast():
            return F.cross_entropy(model(images), labels)

    try:
        kept = saved_bytes(loss, [*model.train().parameters(), *model.buffers(), images, labels])
    finally:
        model.load_state_dict(buffers)
        model.eval()
    return round(kept / KEPT_BATCH)
