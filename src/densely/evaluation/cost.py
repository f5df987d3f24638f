"""What a network costs on this machine: weights, multiplications, memory, speed."""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.bench.kept import saved_bytes
from densely.environment import device_name
from densely.evaluation.findings import Cost
from densely.models.registry import count_macs
from densely.runtime import Runtime
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
        inputs = [_images(info, batch, runtime) for _, info in networks]
        seconds: list[list[float]] = [[] for _ in networks]
        for number in range(ROUNDS + 1):
            for i, (model, _) in enumerate(networks):
                taken = _seconds_a_batch(model, inputs[i], runtime)
                if number > 0:  # the first round warms up
                    seconds[i].append(taken)
        for speed, taken_each in zip(speeds, seconds, strict=True):
            speed[batch] = batch / statistics.median(taken_each)
    return [
        Cost(
            model=info.model,
            parameters=sum(p.numel() for p in model.parameters()),
            macs=_macs(info),
            weights_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            kept_bytes=_kept_bytes(model, info, runtime),
            images_per_s=speed,
            device=device_name(runtime.device),
            precision=runtime.precision,
        )
        for (model, info), speed in zip(networks, speeds, strict=True)
    ]


def _images(info: ModelInfo, batch: int, runtime: Runtime) -> Tensor:
    size, channels = info.preprocessing.image_size, info.preprocessing.channels
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, channels, size, size, generator=generator)
    return runtime.layout(images.to(runtime.device))


def _seconds_a_batch(model: nn.Module, images: Tensor, runtime: Runtime) -> float:
    model.eval()
    batches, begin = 0, time.perf_counter()
    with torch.inference_mode(), runtime.autocast():
        while batches == 0 or time.perf_counter() - begin < TURN_SECONDS:
            model(images)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize(runtime.device)
            batches += 1
    return (time.perf_counter() - begin) / batches


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
