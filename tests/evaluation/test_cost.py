"""What a network costs, in figures that follow from a clock and from shapes."""

from collections.abc import Callable, Sequence

import pytest
import torch

from densely.bench.kept import saved_bytes
from densely.data.preprocessing import Preprocessing
from densely.evaluation import cost
from densely.models.registry import build_model
from densely.runtime import Runtime
from densely.training.checkpoint import ModelInfo

CPU = Runtime(torch.device("cpu"), "float32", "channels_last")


def test_speeds_are_images_by_seconds_and_memory_is_an_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half_a_second(works: Sequence[Callable[[], object]], runtime: Runtime) -> list[float]:
        return [0.5 for work in works if work() is not works]

    monkeypatch.setattr(cost, "_in_turns", half_a_second)
    info = ModelInfo("densenet_bc_22_12", ("a", "b"), Preprocessing.identity(8, 1), {})
    model = build_model("densenet_bc_22_12", num_classes=2, in_channels=1, image_size=8)
    (found,) = cost.costs([(model, info)], CPU)
    assert found.images_per_s == {batch: 2 * batch for batch in cost.BATCH_SIZES}
    assert found.train_images_per_s == 2 * found.train_batch == 2 * cost.TRAIN_BATCHES[0]
    # The statistics of batch norms are weights too, and stand in a file of them.
    assert found.weights_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())

    images = CPU.layout(torch.randn(32, 1, 8, 8))
    labels = torch.zeros(32, dtype=torch.int64)
    model.train()
    there = [*model.parameters(), *model.buffers(), images, labels]
    kept = saved_bytes(lambda: torch.nn.functional.cross_entropy(model(images), labels), there)
    assert found.kept_bytes == pytest.approx(kept / 32, rel=0.1)
