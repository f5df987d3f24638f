"""Statistics of batch norms, averaged with fixed weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from densely import TrainConfig, create_model, train
from densely.forward import Forward
from densely.runtime import choose_runtime
from densely.training.norm_statistics import average_norm_statistics

EXACT = choose_runtime("cpu", "float32", "contiguous")


def test_they_are_the_averages_over_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double()
    batches = [torch.randn(n, 2, 6, 6, dtype=torch.float64) for n in (4, 7, 5)]
    average_norm_statistics(Forward(model, EXACT, training=True), batches)
    maps = [model[0](batch).transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([m.mean(dim=1) for m in maps]).mean(dim=0)
    var = torch.stack([m.var(dim=1, correction=1) for m in maps]).mean(dim=0)
    assert torch.allclose(model[1].running_mean, mean, rtol=1e-12)
    assert torch.allclose(model[1].running_var, var, rtol=1e-12)


def test_nothing_else_of_the_model_changes() -> None:
    model = create_model("densenet_bc_22_12", in_channels=1).eval()
    norm = model.features.norm5
    norm.num_batches_tracked.fill_(41)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    average_norm_statistics(Forward(model, EXACT, training=True), [torch.rand(4, 1, 8, 8)])
    for key, value in model.state_dict().items():
        assert ("running" in key) != torch.equal(value, before[key]), key
    assert norm.momentum == 0.1
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_does_not_notice(tmp_path: Path) -> None:
    weights = []
    for norm_batches in (0, 3):
        values = {"epochs": 2, "limit": 200, "norm_batches": norm_batches, "output": str(tmp_path)}
        run = train(TrainConfig.from_values(values)).run
        weights.append(load_file(run / "checkpoints" / "last" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert ("running" in key) != torch.equal(value, weights[1][key]), key
