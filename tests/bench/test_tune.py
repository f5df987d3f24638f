"""`densely bench --tune`: what is faster is chosen, what is wrong is not, and tables are kept."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from densely.bench import tune
from densely.bench.nets import NETS
from densely.bench.progress import Progress
from densely.bench.trial import Trial
from densely.bench.tune import Tuner
from densely.cli import main
from densely.fused import kernels
from densely.models.registry import build_model
from densely.runtime import choose_runtime

pytest.importorskip("triton", reason="needs Triton")
from densely.fused.kernels import triton_launches as launches
from densely.fused.kernels import (
    triton_pointwise,
    triton_spatial,
    triton_spatial_backward,
    triton_tiles,
)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


class Launch(NamedTuple):
    rows: int
    warps: int


Choice = launches.Choice
STEP = launches.Step("a kernel", torch.empty(100, 7), 5, (3, 3))


def of_milliseconds(times: dict[int, float], ran: list[int]) -> Callable[[Any], float]:
    """A clock that knows the launches of so many rows."""

    def measure(work: Callable[[], object]) -> float:
        work()
        return times[ran[-1]]

    return measure


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({64: 2.0, 32: 1.0, 16: 0.5, 8: 0.1}, 32),  # 16 is wrong, 8 does not fit
        ({64: 2.0, 32: 1.99, 16: 0.5, 8: 0.1}, 64),  # within noise
    ],
)
def test_the_fastest_that_is_right_is_chosen(times: dict[int, float], chosen: int) -> None:
    ran: list[int] = []
    total = torch.full((100, 7), 5.0)

    def run(launch: Launch) -> Tensor:
        if launch.rows == 8:
            raise RuntimeError("out of resources: shared memory")
        ran.append(launch.rows)
        total.add_(2 if launch.rows == 16 else 1)
        return total

    names: list[str] = []
    tuner = Tuner(of_milliseconds(times, ran), names.append)
    others = [Launch(rows, 4) for rows in (64, 32, 16, 8)]
    for _ in range(2):
        found = tuner.choose(
            Choice(STEP, Launch(64, 4), iter(others), run, lambda made: [made], total)
        )
        assert found == Launch(chosen, 4)
    assert (total == 5).all(), "what is added to was not put back"
    assert names == [STEP.key]
    assert tuner.gains[STEP.key] == (2.0, times[chosen])
    assert tuner.launches == ({} if chosen == 64 else {STEP.key: [32, 4]})
    known: dict[str, list[int | None]] = {STEP.key: [16, 1], "another step": [2]}
    kept = {"another step": [2]}
    assert tuner.added_to(known) == kept | tuner.launches, "an earlier choice outlives its time"


def test_a_disturbed_first_measurement_makes_no_other_launch_look_fast() -> None:
    taken = iter([9.0, 3.0, 2.0])

    def measure(work: Callable[[], object]) -> float:
        work()
        return next(taken)

    tuner, made = Tuner(measure, lambda _name: None), torch.ones(3)
    found = tuner.choose(
        Choice(STEP, Launch(64, 4), [Launch(32, 4)], lambda _: made, lambda made: [made])
    )
    assert found == Launch(64, 4)
    assert tuner.gains[STEP.key] == (2.0, 2.0)


def test_steps_are_told_apart_and_batches_that_differ_little_are_not() -> None:
    x = torch.empty(1000, 24)[:, :12]
    step = launches.Step("spatial input", x, 5, (3, 3, 1))
    assert step.key == "spatial input float32 1024 12 even 5 3 3 1"
    assert step._replace(x=torch.empty(1024, 24)[:, :12]).key == step.key
    others = [
        step._replace(kind="spatial weight"),
        step._replace(x=torch.empty(1025, 24)[:, :12]),
        step._replace(x=x[:, :11]),
        step._replace(x=torch.empty(1000, 12)),
        step._replace(x=x.half()),
        step._replace(outputs=6),
        step._replace(more=(3, 3, 2)),
    ]
    assert len({step.key, *(other.key for other in others)}) == len(others) + 1


def on_gpu() -> launches.Step:
    x = torch.empty(64, 8)
    stand_in = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 0), shape=x.shape, stride=x.stride, dtype=x.dtype
    )
    return launches.Step("a kernel", stand_in, 5)  # type: ignore[arg-type]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where that of this process's GPU would be."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    launches.table_of.cache_clear()
    path = launches.table_path("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    return path


def chosen() -> Launch:
    usual, step = Launch(64, 4), on_gpu()
    return launches.fastest(
        step.x, usual, lambda: Choice(step, usual, [], lambda _: None, lambda _: [])
    )


def test_a_table_is_gone_by_from_the_next_launch_on(table: Path) -> None:
    assert chosen() == Launch(64, 4)
    launches.write_table(table, {on_gpu().key: [32, 8], "another step": [1]})
    assert chosen() == Launch(32, 8)
    launches.write_table(table, {on_gpu().key: [32, 8, 3]})  # of a kernel with other numbers
    assert chosen() == Launch(64, 4)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"launches": {}}',
        json.dumps({"kernels": "others", "launches": {on_gpu().key: [32, 8]}}),
        json.dumps({"kernels": launches.fingerprint(), "launches": {on_gpu().key: [10**9, 8]}}),
        json.dumps({"kernels": launches.fingerprint(), "launches": {on_gpu().key: "32"}}),
        json.dumps({"kernels": launches.fingerprint(), "launches": [on_gpu().key]}),
    ],
)
def test_a_table_of_no_use_is_left_out_with_a_word(
    table: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    table.parent.mkdir(parents=True)
    table.write_text(text)
    with caplog.at_level(logging.INFO, "densely"):
        assert chosen() == Launch(64, 4)
    assert "is left out" in caplog.text


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("train", ["pointwise backward", "pointwise forward", "spatial forward", "spatial input",
                   "spatial weight"]),
        ("inference", ["pointwise forward", "spatial forward"]),
    ],
)  # fmt: skip
def test_each_step_of_a_net_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, mode: str, kinds: list[str]
) -> None:
    """In Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_tiles, "multiprocessors", lambda device: 2)
    for module, names in (
        (triton_pointwise, ("FORWARDS", "BACKWARDS")),
        (triton_spatial, ("FORWARDS",)),
        (triton_spatial_backward, ("INPUTS", "WEIGHTS")),
    ):
        for name in names:  # all of them are tried in tests/fused/test_triton_kernels.py
            monkeypatch.setattr(module, name, getattr(module, name)[:2])
    runtime = choose_runtime("cpu", "float32")
    model = build_model(
        "densenet_bc_100_12",
        growth_rate=4,
        block_config=(1,),
        bn_size=1,
        in_channels=3,
        num_classes=5,
    )
    model.train(mode == "train")
    before = [parameter.clone() for parameter in model.parameters()]
    trial = Trial(model, runtime, torch.rand(2, 3, 4, 4), torch.tensor([1, 2]))
    monkeypatch.setattr(tune, "_trial", lambda *_: trial)
    measured: list[float] = []

    def measure(work: Callable[[], object]) -> float:
        measured.append(1.0)
        return 1.0

    with kernels.use("triton"), Progress() as progress:
        tuner = tune.tune_net(NETS["bc_100_12"], mode, "cpu", 2, measure, progress)
    assert sorted(key.split(" float32")[0] for key in tuner.gains) == kinds
    assert len(measured) > 2 * len(kinds), "others were not measured"
    assert all(map(torch.equal, before, model.parameters())), "it has learnt"
    assert not tuner.launches


def test_every_net_and_mode_is_measured_and_kept(
    monkeypatch: pytest.MonkeyPatch, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(tune, "choose_runtime", lambda _: gpu)
    monkeypatch.setattr(tune, "missing", lambda _: None)
    asked: list[tuple[str, ...]] = []

    def measured(net: Any, mode: str, device: str, batch: int, *_: Any) -> Tuner:
        asked.append((net.name, mode, str(batch)))
        tuner = Tuner(lambda work: 1.0, lambda name: None)
        key = f"{net.name} {mode}"
        tuner.gains[key], tuner.launches[key] = tune.Gain(2.0, 1.5), [32, 4]
        return tuner

    def whole(net: Any, mode: str, *_: Any) -> float:
        asked.append((net.name, mode))
        return 10.0

    monkeypatch.setattr(tune, "tune_net", measured)
    monkeypatch.setattr(tune, "_whole_ms", whole)
    assert main(["bench", "--tune", "--net", "d2l", "--batch", "32"]) == 0
    one = [("d2l", "train"), ("d2l", "train", "32"), ("d2l", "train")]
    two = [("d2l", "inference"), ("d2l", "inference", "32"), ("d2l", "inference")]
    assert asked == [*one, *two]
    assert launches.read_table(table) == {"d2l train": [32, 4], "d2l inference": [32, 4]}
    assert "2.00 -> 1.50" in capsys.readouterr().out
    asked.clear()
    assert main(["bench", "--tune", "--net", "bc_100_12", "--mode", "inference"]) == 0
    assert {row[:2] for row in asked} == {("bc_100_12", "inference")}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tune"]) == 2
    assert "--tune: it is for GPUs" in capsys.readouterr().err
