"""What is recorded, and how PyTorch is set before, meanwhile and after."""

import pytest
import torch
from on_gpu import needs_gpu

from densely.cuda_graphs import record_graph

DEVICE = torch.device("cuda")


@needs_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_tries_its_kernels_unless_it_is_to_be_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    tries: set[bool] = set()
    x = torch.zeros(1, device=DEVICE)

    def work() -> torch.Tensor:
        tries.add(torch.backends.cudnn.benchmark)
        return x + 1

    record_graph(work, DEVICE)
    assert tries == {not deterministic}
    assert not torch.backends.cudnn.benchmark


@needs_gpu
def test_each_replay_goes_on_from_the_random_numbers_of_its_time() -> None:
    expected = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        expected.append(torch.rand(4, device=DEVICE))
    torch.cuda.manual_seed(1)
    graph, found = record_graph(lambda: torch.rand(4, device=DEVICE), DEVICE)
    graph.replay()
    assert torch.equal(found, expected[0])
    torch.cuda.manual_seed(2)
    graph.replay()
    assert torch.equal(found, expected[1])
