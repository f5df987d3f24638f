"""What is recorded, and how PyTorch is set before, meanwhile and after."""

import copy

import pytest
import torch
from on_gpu import needs_gpu

import densely
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


# PyTorch warns of these within its own capture, which an error would end.
@pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context"
)
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@needs_gpu
def test_a_loop_of_ones_own_may_use_torchs_graphed_callables() -> None:
    torch.manual_seed(0)
    net = densely.create_model("d2l", num_classes=10, in_channels=1).to(DEVICE)
    launched = copy.deepcopy(net)
    torch.cuda.make_graphed_callables(net, (torch.randn(8, 1, 96, 96, device=DEVICE),))
    images = torch.randn(8, 1, 96, 96, device=DEVICE)
    outputs = []
    for model in (launched, net):
        outputs.append(model(images))
        (outputs[-1] * torch.linspace(-1, 1, 80, device=DEVICE).view(8, 10)).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for (name, got), wanted in zip(net.named_parameters(), launched.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
