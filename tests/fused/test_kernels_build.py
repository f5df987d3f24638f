"""The CPU kernels are built once, found where they are, and done without where they cannot be."""

import logging
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from densely.fused import kernels
from densely.fused.kernels import build


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for libraries, and none that came with the package."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv(build.VARIABLE, str(folder))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    return folder


def compiler(folder: Path, script: str) -> str:
    """A stand-in for a C++ compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_compiler(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler is here \(CXX, c\+\+"):
        build.find_or_build()
    assert not empty.exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo common.h:3: error: no such thing; exit 1"))
    with pytest.raises(build.BuildError, match=r"failed with: common\.h:3: error: no such thing"):
        build.find_or_build()
    assert list(empty.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 0"))
    empty.write_text("a file")
    with pytest.raises(build.BuildError, match="cannot be built in"):
        build.find_or_build()


def test_what_has_been_built_is_found(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Writes whatever the option -o names.
    script = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with caplog.at_level(logging.WARNING):
        path = build.find_or_build()
    assert path.parent == empty
    assert path.read_text() == "built\n"
    assert caplog.messages == ["building densely's CPU kernels, once: some ten seconds"]
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    assert build.find_or_build() == path


def test_a_wheels_library_comes_first(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level, needs = next(iter(build.LEVELS.items()))
    build.PREBUILT.mkdir()
    shipped = build.PREBUILT / build.file_name(level)
    shipped.touch()
    monkeypatch.setattr(
        "densely.fused.kernels.build.cpu_capabilities", lambda: dict.fromkeys(needs, True)
    )
    assert build.find_or_build() == shipped
    monkeypatch.setattr(
        "densely.fused.kernels.build.cpu_capabilities", lambda: dict.fromkeys(needs[1:], True)
    )
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError):  # this CPU lacks one of the instructions
        build.find_or_build()


def test_without_kernels_the_result_is_the_same_and_doctor_says_so(tmp_path: Path) -> None:
    """In a process of its own, since the choice is made once."""
    program = """
import torch
from densely.fused import backend, kernels, restore
from densely.models import DenseNet

torch.manual_seed(0)
net = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8).double().eval()
x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
fused = net(x)
assert backend.fused_calls["dense block"] == 2
restore(net)
torch.testing.assert_close(fused, net(x), rtol=1e-10, atol=1e-10)
assert kernels.available() == ("reference",)
print(kernels.missing())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": str(tmp_path), build.VARIABLE: str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler is here" in done.stdout
    assert "slower than they could: no C++ compiler" in done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_this_machine_has_its_own() -> None:
    assert kernels.available()[:2] == ("reference", "cpu")
    assert kernels.missing() is None
