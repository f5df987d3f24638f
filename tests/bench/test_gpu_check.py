"""The checks for a GPU see what is wrong: tried on a CPU, with results made wrong on purpose."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_check"]:
        del sys.modules[name]


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


@pytest.mark.slow
def test_the_papers_training_runs_dry_and_is_not_begun_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "cifar10-jpg.tar.xz", "w:xz") as packed:
        for part, images in (("train", 40), ("test", 5)):
            for name, shade in (("cat", 40), ("dog", 200)):
                folder = tmp_path / "made" / part / name
                folder.mkdir(parents=True)
                for i in range(images):
                    Image.new("RGB", (32, 32), (shade, i, 90)).save(folder / f"{i}.jpg")
            packed.add(tmp_path / "made" / part, f"pictures/{part}")
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path))
    command = [sys.executable, "-m", "gpu_check", "cifar", tmp_path / "out", "--smoke"]
    for _ in range(2):
        subprocess.run(command, cwd=BENCHMARKS, capture_output=True, check=True)
        found = json.loads((tmp_path / "out" / "cifar.json").read_text())
        assert not found["resumed"]
        (row,) = found["rows"]
        assert (row["finished"], row["epochs"]) == (True, 2)
    assert len(list((tmp_path / "out" / "cifar-runs").iterdir())) == 1
