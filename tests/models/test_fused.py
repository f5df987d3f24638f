"""densely's own networks run fused by default, as a whole, and as PyTorch's tools expect."""

import copy
import os
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from nets import assert_equal, images, pull, randomized, state, tiny
from torch import Tensor, nn

from densely.fused import backend, restore
from densely.models import DenseNet, FCDenseNet

SHAPE = (4, 3, 36, 40)


def fc(fused: bool = True) -> FCDenseNet:
    return FCDenseNet(
        growth_rate=2,
        down_blocks=(2, 1),
        bottleneck_layers=1,
        up_blocks=(1, 1),
        num_init_features=3,
        num_classes=4,
        drop_rate=0.0,
        fused=fused,
    )


NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], dict[str, int]]] = {
    "large stem, bottleneck": (
        lambda fused: tiny(bn_size=2, fused=fused),
        {"stem": 1, "dense block": 3, "transition": 2, "final norm": 1},
    ),
    "small stem, plain": (
        lambda fused: tiny(bn_size=None, stem="small", fused=fused),
        {"dense block": 3, "transition": 2, "final norm": 1},
    ),
    "segmentation": (fc, {"dense block": 5}),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    pull(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_runs_fused_and_is_the_same(name: str, train: bool) -> None:
    make, expected = NETWORKS[name]
    fused, plain = randomized(make(True)).train(train), randomized(make(False)).train(train)
    x = images(*SHAPE).requires_grad_()
    before = backend.fused_calls.copy()
    output = fused(x)
    assert backend.fused_calls - before == expected
    assert_equal(output, plain(x))
    assert backend.fused_calls - before == expected  # fused=False has run none
    assert_equal(gradients(fused, x), gradients(plain, x))
    assert_equal(state(fused), state(plain))


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    first = tiny(bn_size=2, drop_rate=0.2).train()
    second = copy.deepcopy(first)
    x = images(*SHAPE).float()
    results = []
    for model in (first, second):
        torch.manual_seed(1)
        results.append((gradients(model, x), state(model)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_printed_model_shows_its_own_classes() -> None:
    assert repr(tiny(fused=True)) == repr(tiny(fused=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compiled_for_training() -> None:
    """By Inductor, which holds operators to the strides that they have promised."""

    def make() -> DenseNet:
        model = tiny(bn_size=2, block_config=(2, 1), stem="small")
        return randomized(model).train()

    eager, other = make(), make()
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True)
    x = images(2, 3, 12, 10)
    pull(compiled(x)).backward()
    grads = {name: p.grad for name, p in other.named_parameters()}
    assert_equal(grads, gradients(eager, x))
    assert_equal(state(other), state(eager))


Outcomes = dict[bool, tuple[dict[str, Tensor], dict[str, Tensor]]]


def _rank(rank: int, folder: str) -> Outcomes:
    """One of two processes, each with half of the batch: gradients and buffers in both modes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2,
        timeout=timedelta(minutes=1),
    )  # fmt: skip
    try:
        return _half(rank)
    finally:  # when the networks are gone: freed after their group they were seen to wait forever
        torch.distributed.destroy_process_group()


def _other(folder: str) -> None:
    """The second process. It ends at once: in Python's own end gloo's threads abort at times."""
    _rank(1, folder)
    os._exit(0)


def _half(rank: int) -> Outcomes:
    found = {}
    for train in (True, False):
        model = randomized(tiny(bn_size=2)).train(train)
        parallel = nn.parallel.DistributedDataParallel(model)
        before = backend.fused_calls["dense block"]
        grads = gradients(parallel, images(*SHAPE).chunk(2)[rank])
        assert backend.fused_calls["dense block"] == before + 3
        found[train] = (grads, state(model))
    return found


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What the first one has; it is this process."""
    folder = str(tmp_path_factory.mktemp("processes"))
    other = torch.multiprocessing.get_context("spawn").Process(target=_other, args=(folder,))
    other.start()
    try:
        found = _rank(0, folder)
        other.join(60)
        assert other.exitcode == 0
    finally:
        other.kill()
    return found


@pytest.mark.parametrize("train", [True, False])
def test_two_processes(of_two_processes: Outcomes, train: bool) -> None:
    """Gradients are the mean over both halves; statistics in train mode are each half's own."""
    grads, buffers = of_two_processes[train]
    plain = randomized(tiny(bn_size=2, fused=False)).train(train)
    halves = [copy.deepcopy(plain) for _ in range(2)]
    both = [gradients(net, x) for net, x in zip(halves, images(*SHAPE).chunk(2), strict=True)]
    mean = {f"module.{name}": (both[0][name] + both[1][name]) / 2 for name in both[0]}
    assert_equal(grads, mean)
    assert_equal(buffers, state(halves[0]))
    if not train:  # without statistics of a batch the halves know nothing of each other
        x = images(*SHAPE)
        plain.zero_grad()
        loss = sum((plain(half) * images(2, 1000, seed=7)).sum() for half in x.chunk(2)) / 2
        loss.backward()
        assert_equal(grads, {f"module.{n}": p.grad for n, p in plain.named_parameters()})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels", [8, 12])
def test_another_number_of_channels_is_pytorchs_error(channels: int, train: bool) -> None:
    block = randomized(tiny(bn_size=2)).features.denseblock1.train(train)
    with pytest.raises(RuntimeError, match=f"should contain {channels} elements not 10"):
        block(images(2, channels, 6, 6))


def test_statistics_of_another_dtype_are_pytorchs_error() -> None:
    model = tiny(bn_size=2).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.data = buffer.double()
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        model(images(*SHAPE).float())


def test_weights_in_any_memory_order_infer_the_same() -> None:
    fused, plain = (randomized(tiny(bn_size=2, fused=f)).float().eval() for f in (True, False))
    for model in (fused, plain):
        for name, weight in model.named_parameters():
            if name.endswith("conv1.weight"):
                weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    x = images(*SHAPE).float()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_restored_networks_are_plain() -> None:
    model = tiny(bn_size=2)
    before = backend.fused_calls.copy()
    restore(model)
    assert type(model) is DenseNet
    model(images(*SHAPE).float())
    assert backend.fused_calls == before
