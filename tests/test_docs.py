"""What the README and the pages say is so: their commands run, their figures are the files'."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
from PIL import Image

from densely import create_model, save_weights
from densely.cli import main

pytestmark = pytest.mark.usefixtures("hasty_costs")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's reader has it: the checkout's docs, and images by class."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "FOLDER" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (32, 32), shade + i).save(tmp_path / "FOLDER" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    model = create_model("densenet121", num_classes=2, in_channels=1)
    save_weights(model, "model.pth", "torchvision_legacy")
    return tmp_path


@pytest.mark.usefixtures("undrawn")
def test_every_command_of_the_readme_runs(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("densely")
    ]
    assert len(commands) >= 7
    for command in commands:
        if "d2l" in command or command[0] in (
            "bench",
            "compare",
        ):  # they take minutes: settings are enough
            command.append("--help")
        if "--resume" in command:
            command[command.index("--resume") + 1] = "runs/quickstart-001"
        if "--epochs" in command:
            command[command.index("--epochs") + 1] = "1"
        elif command == ["train"]:
            command += ["--epochs", "2", "--limit", "300"]
        try:
            code = main(command)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        assert (code, capsys.readouterr().err) == (0, ""), command


def test_the_python_of_the_readme_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.torchvision()
    names: dict[str, object] = {}
    printed = []
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    digit, replaced, loaded = printed
    assert digit.splitlines()[-1] == "7"
    assert "9 replaced" in replaced
    assert loaded.startswith("727 tensors from net.safetensors, dialect monai")


def test_the_results_page_is_made_from_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    made = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["page"]()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == made


def test_the_reference_pages_are_made_from_the_code() -> None:
    pages = runpy.run_path(str(ROOT / "benchmarks" / "reference_pages.py"))["PAGES"]
    assert pages.keys() == {"models.md", "weights.md"}
    for name, make in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make()


def test_the_python_of_the_models_page_runs() -> None:
    (code,) = blocks("python", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    with torch.device("meta"):
        exec(compile(code, "models.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_module_docstrings_tell_the_truth() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "doctest", str(ROOT / "src" / "densely" / "chapter.py")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
