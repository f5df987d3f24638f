"""The checks for a GPU see what is wrong: tried on a CPU, with results made wrong on purpose."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


pytestmark = pytest.mark.usefixtures("gpu_check")


def outcomes(change: float) -> list[dict[str, torch.Tensor]]:
    """Results of float32 with errors of 1e-4, ours off by `change` in one gradient, and exact."""
    generator = torch.Generator().manual_seed(0)
    names = ("output", "gradient of 0.norm.weight", "gradient of 1.norm.weight", "0.running_mean")
    exact = {name: torch.randn(200, generator=generator, dtype=torch.float64) for name in names}
    plain, ours = (
        {
            name: (value + 1e-4 * torch.randn(200, generator=generator)).float()
            for name, value in exact.items()
        }
        for _ in range(2)
    )
    ours["gradient of 1.norm.weight"][7] += change
    return [ours, plain, exact]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("change", "passes"), [(0.0, True), (0.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_one_wrong_number_is_seen(change: float, passes: bool, whole: bool) -> None:
    from gpu_check.distance import compare

    found = {distance.kind: distance for distance in compare(*outcomes(change), whole)}
    assert set(found) == {"output", "grad norm.weight", "running_mean"}
    assert found["grad norm.weight"].ok is passes
    assert found["output"].ok
    assert found["running_mean"].ok
    if not passes:
        assert found["grad norm.weight"].worst == "gradient of 1.norm.weight"


def test_a_nan_of_the_plain_code_makes_no_bound() -> None:
    from gpu_check.distance import compare

    ours, plain, exact = outcomes(0.0)
    plain["output"][0] = float("nan")
    assert not next(d for d in compare(ours, plain, exact, False) if d.kind == "output").ok


def test_what_ncu_prints_is_read() -> None:
    from gpu_check.traffic import bytes_by_kernel

    table = """==PROF== Connected to process 7
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","_forward_kernel","dram__bytes_read.sum","Mbyte","1,234.5"
"0","_forward_kernel","dram__bytes_write.sum","Kbyte","500"
"0","_forward_kernel","gpu__time_duration.sum","us","12"
"1","_affine","dram__bytes_read.sum","byte","4,096"
"""
    assert bytes_by_kernel(table) == {"forward_kernel": 1_235_000_000, "affine": 4096}
    assert not bytes_by_kernel("==ERROR== no permission")


def test_the_caller_may_say_which_commit_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_check.__main__ import main

    monkeypatch.setenv("COMMIT", "abc1234")
    command = ["gpu_check", "traffic", str(tmp_path), "--smoke", "--nets", "d2l"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    found = json.loads((tmp_path / "traffic-account.json").read_text())
    assert found["environment"]["commit"] == "abc1234"
    assert found["rows"][0]["mb_per_image"] > 1


def test_peers_are_named() -> None:
    from gpu_check.setting import NETS
    from gpu_check.speed import peer_of

    assert peer_of(NETS["d2l"]).name == "plain PyTorch"
    assert re.fullmatch(
        r"torchvision \d.*|densely with fused=False, as .* missing", peer_of(NETS["121"]).name
    )


def test_the_shapes_are_those_of_the_networks() -> None:
    from gpu_check import steps
    from gpu_check.setting import NETS

    generator = torch.Generator().manual_seed(0)
    for net in NETS.values():
        model = net.build(fused=False)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        made = [
            (name.rpartition(".")[2], tuple(tensor.shape))
            for case in steps.cases(net)
            if case.kind != "stem"  # with its convolution it is there a second time
            for name, tensor in steps.named(case.make(generator, True))
        ]
        assert [shape for name, shape in made if name == "running_mean"] == [
            tuple(norm.running_mean.shape) for norm in norms
        ]
        convs = [
            tuple(p.shape) for n, p in model.named_parameters() if ".conv" in n and p.dim() > 1
        ]
        checked = convs if net.pooled_stem else convs[1:]
        assert [s for name, s in made if name == "weight" and len(s) > 1] == checked
        first = next(iter(model.features.children()))  # type: ignore[operator, union-attr]
        assert first.out_channels == net.stem_channels


def test_the_script_says_what_it_takes(tmp_path: Path) -> None:
    script = str(BENCHMARKS / "gpu_check.sh")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "OUTDIR correct" in done.stderr
    done = subprocess.run([script, tmp_path, "mnist"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    environment = {key: text for key, text in os.environ.items() if key != "DENSELY_DATA"}
    done = subprocess.run(
        [script, tmp_path, "cifar"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert "DENSELY_DATA: set it to the folder" in done.stderr


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["cifar"], 525),
        (["cifar", "--budget", "583.5", "--smoke"], 628),
        (["cifar", "--smoke", "--budget=60"], 105),
        (["tune"], 525),
    ],
)
def test_a_stage_that_hangs_is_stopped_after_its_budget(
    words: list[str], seconds: int, tmp_path: Path
) -> None:
    stand_in = tmp_path / "timeout"
    stand_in.write_text('#!/bin/sh\necho "$3"\n')  # after --kill-after 10
    stand_in.chmod(0o755)
    done = subprocess.run(
        [BENCHMARKS / "gpu_check.sh", tmp_path / "out", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DENSELY_DATA": str(tmp_path)},
    )
    assert done.stdout.split() == [str(seconds)], done.stderr


def test_a_stage_runs_dry_and_keeps_what_it_found(tmp_path: Path) -> None:
    words = ["correct", tmp_path, "--smoke", "--nets", "bc", "--dtypes", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "gpu_check", *words],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = json.loads((tmp_path / "correct.json").read_text())["rows"]
    assert len(rows) == 16, done.stderr
    # Not that all are near enough: the numbers are others each time.
    assert all(row["same_bits"] and "problem" not in row for row in rows)
    steps = [row for row in rows if row["mode"] == "eval" and "forward" not in row["case"]]
    assert len(steps) == 6
    assert all("output at inference" in row["kinds"] for row in steps)
    assert len((tmp_path / "correct.txt").read_text().splitlines()) == 17
    assert "16 checks" in done.stdout


@pytest.fixture
def packed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage `cifar` unpacks."""
    with tarfile.open(tmp_path / "cifar10-jpg.tar.xz", "w:xz") as packed:
        for part, images in (("train", 40), ("test", 5)):
            for name, shade in (("cat", 40), ("dog", 200)):
                folder = tmp_path / "made" / part / name
                folder.mkdir(parents=True)
                for i in range(images):
                    Image.new("RGB", (32, 32), (shade, i, 90)).save(folder / f"{i}.jpg")
            packed.add(tmp_path / "made" / part, f"pictures/{part}")
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("packed_images")
def test_the_papers_training_runs_dry_and_is_not_begun_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_check", "cifar", tmp_path / "out", "--smoke"]
    for _ in range(2):
        subprocess.run(command, cwd=BENCHMARKS, capture_output=True, check=True)
        found = json.loads((tmp_path / "out" / "cifar.json").read_text())
        assert not found["resumed"]
        (row,) = found["rows"]
        assert (row["finished"], row["epochs"]) == (True, 2)
    assert len(list((tmp_path / "out" / "cifar-runs").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("packed_images")
def test_a_training_that_is_cut_off_leaves_its_row_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_check", "cifar", tmp_path / "out", "--smoke"]
    command += ["--train", "--epochs 400 --evaluate-every 300"]
    for resumed in (False, True):
        with subprocess.Popen(
            command, cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if '"epoch"' in line[:25])
            process.terminate()
            process.stdout.read()
        assert process.returncode == 1
        found = json.loads((tmp_path / "out" / "cifar.json").read_text())
        assert found["resumed"] == resumed
        (row,) = found["rows"]
        assert not row["finished"]
        assert 1 <= row["epochs"] < 300
        assert row["test_accuracy"] is None
    assert len(list((tmp_path / "out" / "cifar-runs").iterdir())) == 1


def test_speeds_are_a_table_a_picture_and_rows(setting: Any, tmp_path: Path) -> None:
    from gpu_check import speed

    some = ("densely captured", "eager NHWC")
    assert speed.run(setting(variants=some)) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(some)
    assert all(row["images_per_s"] > 0 for row in rows)
    own, peer = (row["images_per_s"] for row in rows)
    line = (tmp_path / "speed.txt").read_text().splitlines()[2]
    assert line.split()[:4] == ["bc", "train", "densely", "captured"]
    assert f"{own / peer:.2f}" in line
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 1000


def test_a_peer_that_is_missing_or_fails_stops_nobody(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import speed

    def missing() -> torch.nn.Module:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    def failing() -> torch.nn.Module:
        raise ValueError("of another version")

    monkeypatch.setattr(speed.peers, "timm_densenet121", missing)
    monkeypatch.setattr(speed.peers, "monai_densenet121", failing)
    some = ("timm eager NHWC", "MONAI eager NHWC", "densely captured")
    given = setting("121", variants=some)
    assert speed.run(given) == 0
    rows = {
        row["variant"]: row for row in json.loads((given.out / "speed.json").read_text())["rows"]
    }
    assert rows["timm eager NHWC"]["gap"] == "timm is not installed"
    assert "ValueError: of another version" in rows["MONAI eager NHWC"]["error"]
    assert rows["densely captured"]["images_per_s"] > 0


def test_plain_code_is_not_taken_for_densely(
    setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_check import correct, speed

    monkeypatch.setattr("densely.fused.backend.obstacle", lambda *_: "a reason")
    assert speed.run(setting(variants=("densely captured",))) == 1
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["error"] == "densely ran plain PyTorch: see `correct`"
    assert correct.run(setting()) == 1
    rows = json.loads((tmp_path / "correct.json").read_text())["rows"]
    steps = [row for row in rows if row["case"].split()[1] in ("block", "transition", "final")]
    assert len(steps) == 12
    assert {row["problem"] for row in steps} == {"ran plain: a reason"}
    assert not any(row["ok"] for row in steps)


def test_what_learns_nothing_is_wrong(
    setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_check import correct

    monkeypatch.setattr("densely.fused.block.update_running_statistics", lambda *_: None)
    assert correct.run(setting()) == 1
    wrong = [row for row in json.loads((tmp_path / "correct.json").read_text())["rows"]
             if not row["ok"] and row["mode"] == "train" and "block" in row["case"]]  # fmt: skip
    assert len(wrong) == 3
    for row in wrong:
        assert not row["kinds"]["running_mean"]["ok"]
        assert row["kinds"]["output"]["ok"]
        assert row["draws"] == 4  # each of them wrong
    with Image.open(tmp_path / "correct.png") as picture:
        assert picture.width > 900


def test_kernels_are_timed_one_by_one(
    setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_check import each_kernel, launches
    from gpu_check.setting import Setting

    @contextmanager
    def on_cpu(do: Any, _: bool) -> Iterator[None]:
        with launches.each_launch(lambda one: do(one._replace(run=lambda: None)), anywhere=True):
            yield

    calls, until = itertools.count(), math.inf
    monkeypatch.setattr(each_kernel, "each_launch", on_cpu)
    monkeypatch.setattr(each_kernel, "_clock", lambda: lambda run: 2.0)
    monkeypatch.setattr(Setting, "left_s", lambda _: until - next(calls))
    monkeypatch.setattr(each_kernel, "ceilings", lambda device: {"copy_tb_per_s": 3.0})
    monkeypatch.setattr(each_kernel, "batch_of", lambda _: 4)
    dry = setting()
    timed = dataclasses.replace(dry, smoke=False, nets=dry.nets)

    assert each_kernel.run(timed) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert all(row["us"] == 2.0 * row["calls"] and row["mb"] > 0 for row in rows)
    for name in ("pointwise forward", "spatial forward", "pointwise backward"):
        layers = {row["rows"]: row["calls"] for row in rows if row["kernel"] == f"{name}_kernel"}
        assert layers == {4 * 16 * 16: 2, 4 * 8 * 8: 2, 4 * 4 * 4: 2}  # rows of the maps, layers
    assert {"elementwise form", "vectors affine"} <= {row["kernel"] for row in rows}
    every = sum(row["calls"] for row in rows)

    calls, until = itertools.count(), 30  # launches
    assert each_kernel.run(timed) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert 0 < sum(row["calls"] for row in rows) < every
    assert all(row.get("us", 0.0) == 2.0 * row["calls"] for row in rows)
    late = [row for row in rows if row.get("gap") == "out of time"]
    assert len(late) > 5
    assert all(each_kernel._line(row, 3.0).endswith(" out of time") for row in late)


def test_patched_launches_are_put_back_in_files_that_were_imported_meanwhile() -> None:
    code = """
import sys
from gpu_check.launches import each_launch
names = []
with each_launch(lambda launch: names.append(launch.kernel), anywhere=True):
    pass
from densely.fused.kernels import triton_pointwise, triton_tiles
sys.exit(triton_pointwise.launch is not triton_tiles.launch)
"""
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


def test_without_kernels_none_is_timed(
    setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu_check import each_kernel

    monkeypatch.setattr("densely.fused.backend.obstacle", lambda *_: "a reason")
    assert each_kernel.run(setting()) == 1
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert "densely ran plain PyTorch" in row["error"]


@pytest.mark.parametrize("stage", ["correct", "speed", "profile"])
def test_a_stage_without_time_says_what_it_left(
    setting: Any, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_check.__main__ import STAGES

    assert STAGES[stage](setting(budget_s=-1.0)) == 1
    if stage == "correct":
        assert json.loads((tmp_path / "correct.json").read_text())["left_out"] == 16
        assert "16 of 16 checks left out" in capsys.readouterr().out
    elif stage == "speed":
        rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
        assert {row["gap"] for row in rows} == {"out of time"}
        assert not (tmp_path / "speed.png").exists()  # of nothing
    else:
        text = (tmp_path / "profile-bc.txt").read_text()
        assert text.count("out of time") == 3


def test_what_cannot_be_drawn_stops_nothing(
    setting: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gpu_check import pictures

    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda _: None)
    pictures.draw(pictures.draw_speed, [], tmp_path / "speed.png", "")
    assert "matplotlib is not installed" in capsys.readouterr().out
    monkeypatch.undo()
    pictures.draw(pictures.draw_speed, [{"images_per_s": 1}], tmp_path / "speed.png", "")
    assert "speed.png is not drawn: KeyError" in capsys.readouterr().out
    beside_launched = {"output 0": {"plain": 0.0, "fused": 1e-4, "ok": True}}
    nothing = [{"dtype": "bf16", "kinds": beside_launched}]
    pictures.draw(pictures.draw_distances, nothing, tmp_path / "correct.png", "")
    assert not (tmp_path / "correct.png").exists()
    nan = {"dtype": "fp32", "kinds": {"output": {"plain": 1e-7, "fused": math.nan, "ok": False}}}
    pictures.draw(pictures.draw_distances, [nan], tmp_path / "correct.png", "")
    assert (tmp_path / "correct.png").exists()
