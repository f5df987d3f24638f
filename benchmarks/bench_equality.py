"""The fused code is the same function: how far it is from float64, and whether training notices.

    python benchmarks/bench_equality.py distance
    python benchmarks/bench_equality.py train d2l --data fashion-mnist --data-dir FOLDER
    python benchmarks/bench_equality.py train densenet_bc_100_12 --data FOLDER_OF_CIFAR10

Distances: outputs, gradients and running statistics of whole networks after one step, fused and
plain, from plain PyTorch in float64 (which the tests hold against a NumPy DenseNet). Training: 200
steps on real images, fused and plain from the same start with the same batches; a third run is
plain with its sums in another order (NCHW convolutions), since two curves can only be asked to lie
as near to each other as plain PyTorch lies to itself. Writes `results/equality-*.json`.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check.clearance import clear_norms
from torch import Tensor, nn

import densely
from densely.data import ImageSet, Preprocessing, limited, load_data
from densely.environment import environment
from densely.fused import backend
from densely.runtime import choose_runtime, keep_freed_memory

RESULTS = Path(__file__).parent / "results"
#: Model, images of a step, their shape and the number of classes.
NETS = {
    "densenet121": (4, (3, 224, 224), 1000),
    "d2l": (16, (1, 96, 96), 10),
    "densenet_bc_100_12": (16, (3, 32, 32), 10),
}
RUNS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "plain": {"fused": False},
    "plain, other order": {"fused": False, "memory_format": torch.contiguous_format},
}


def make(
    name: str,
    seed: int,
    fused: bool,
    memory_format: torch.memory_format = torch.channels_last,
    **options: Any,
) -> nn.Module:
    torch.manual_seed(seed)
    model = densely.create_model(name, fused=fused, **options)
    return model.to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]


def step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """Outputs, gradients and statistics of one training step, in float64."""
    model.train().zero_grad()
    images = images.clone().requires_grad_()
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype, enabled=low):
        outputs = model(images)
    # A loss with a gradient of the size of 1 a logit, whatever the precision.
    F.cross_entropy(outputs.to(torch.float64), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [b for name, b in model.named_buffers() if "running" in name]
    assert images.grad is not None
    parts = {
        "outputs": [outputs],
        "gradient of the weights": gradients,
        "gradient of the images": [images.grad],
        "running statistics": buffers,
    }
    return {name: [t.detach().double() for t in tensors] for name, tensors in parts.items()}


def distance(got: list[Tensor], exact: list[Tensor]) -> float:
    """Relative; without gradients that are zero but for rounding, as of biases before a norm."""
    least = 1e-9 * max(float(tensor.norm()) for tensor in exact)
    pairs = [(a, b) for a, b in zip(got, exact, strict=True) if float(b.norm()) > least]
    return math.hypot(*(float((a - b).norm()) for a, b in pairs)) / math.hypot(
        *(float(b.norm()) for _, b in pairs)
    )


def distances(device: torch.device, draws: int) -> Iterator[dict[str, Any]]:
    for name, (batch, shape, classes) in NETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            found: dict[str, dict[str, list[float]]] = {}
            for draw in range(draws):
                generator = torch.Generator().manual_seed(draw)
                images = torch.randn((batch, *shape), generator=generator).to(device)
                labels = torch.randint(classes, (batch,), generator=generator).to(device)
                images = images.contiguous(memory_format=torch.channels_last)
                start = make(name, draw, False).to(device)
                if dtype == torch.float32:  # or a handful of ReLUs would be all that is seen
                    clear_norms(start, images)
                weights = copy.deepcopy(start.state_dict())
                exact = step(start.double(), images.double(), labels, torch.float64)
                for run in ("fused", "plain"):
                    model = make(name, draw, run == "fused").to(device)
                    model.load_state_dict(weights)
                    before = backend.fused_calls.total()
                    got = step(model, images, labels, dtype)
                    assert (backend.fused_calls.total() > before) == (run == "fused")
                    for part, value in got.items():
                        by_run = found.setdefault(part, {})
                        by_run.setdefault(run, []).append(distance(value, exact[part]))
            row = {
                "net": name,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "draws": draws,
                "distance": {
                    part: {run: statistics.median(values) for run, values in by_run.items()}
                    for part, by_run in found.items()
                },
                "ratio": {
                    part: statistics.median(
                        f / p for f, p in zip(by["fused"], by["plain"], strict=True)
                    )
                    for part, by in found.items()
                },
            }
            print(json.dumps(row), flush=True)
            yield row


def train(
    model: nn.Module, batches: list[Tensor], data: ImageSet, prepare: Callable[[Tensor], Tensor]
) -> list[float]:
    """Loss of each step: SGD with Nesterov momentum 0.9 and weight decay 1e-4 at rate 0.1."""
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(prepare(data.images[batch])), data.labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageSet, prepare: Callable[[Tensor], Tensor]) -> float:
    model.eval()
    right = 0
    for at in torch.split(torch.arange(len(data)), 100):
        right += int((model(prepare(data.images[at])).argmax(1) == data.labels[at]).sum())
    return right / len(data)


def trainings(
    name: str, data: str, data_dir: str | None, device: torch.device, steps: int, batch: int,
    seeds: int, test_images: int, other_orders: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    size = NETS[name][1][-1]
    splits = load_data(data, data_dir=data_dir)
    train_set = splits.train.to(device)
    test_set = limited(splits.test, test_images, 0).to(device)
    how = Preprocessing.standardizing(splits.train, size)
    channels = train_set.images.shape[1]
    for seed in range(seeds):
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(seed))
        batches = list(torch.split(order, batch)[:steps])
        for run, options in RUNS.items():
            if run == "plain, other order" and seed >= other_orders:
                continue
            memory_format = options.get("memory_format", torch.channels_last)
            model = make(name, seed, in_channels=channels, num_classes=10, **options).to(device)

            def prepare(images: Tensor, layout: torch.memory_format = memory_format) -> Tensor:
                return how(images).contiguous(memory_format=layout)

            losses = train(model, batches, train_set, prepare)
            row = {
                "seed": seed,
                "run": run,
                "losses": [round(loss, 6) for loss in losses],
                "test_accuracy": accuracy(model, test_set, prepare),
            }
            print(seed, run, f"last losses {losses[-1]:.4f}", row["test_accuracy"], flush=True)
            yield row


def _without_paths(word: str) -> str:
    return "FOLDER" if "/" in word else word


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["distance", "train"])
    parser.add_argument("net", nargs="?", choices=["d2l", "densenet_bc_100_12"], default="d2l")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--other-orders", type=int, help="seeds with the third run; all of them")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    keep_freed_memory()
    runtime = choose_runtime(device=given.device, precision="float32")
    name = given.what if given.what == "distance" else f"train-{given.net}"
    path = given.output / f"equality-{name}-{runtime.device.type}.json"
    kernels = "cpu" if runtime.device.type == "cpu" else "triton"
    result: dict[str, Any] = {
        "command": "python benchmarks/bench_equality.py "
        + " ".join(map(_without_paths, sys.argv[1:])),
        "environment": environment(runtime) | {"command": None},
        "kernels": kernels,
        "settings": {
            key: value for key, value in vars(given).items() if key not in ("output", "data_dir")
        }
        | {"data": Path(given.data).name},
        "rows": [],
    }
    rows = (
        distances(runtime.device, given.draws)
        if given.what == "distance"
        else trainings(
            given.net,
            given.data,
            given.data_dir,
            runtime.device,
            given.steps,
            given.batch,
            given.seeds,
            given.test_images,
            given.seeds if given.other_orders is None else given.other_orders,
        )
    )
    for row in rows:
        result["rows"].append(row)
        write(path, result)


if __name__ == "__main__":
    main()
