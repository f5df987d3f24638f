"""The house: who may import whom, what the public names are, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

from PIL import Image

import densely

SOURCE = Path(densely.__file__).parent

#: From the ground up; a part may import what stands on a line above it, and itself.
LAYERS = [
    {"errors", "cache", "whole_file", "words", "processors", "cpu_features"},
    {"drawing"},
    {"runtime", "fused"},
    {"models", "cuda_graphs"},
    {"forward"},
    {"data", "chapter", "environment"},
    {"weights"},
    {"training"},
    {"bench"},
    {"evaluation", "doctor"},
    {"comparison"},
    {"cli"},
    {"__main__"},
]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "densely"


def imports(path: Path) -> set[str]:
    """Parts of densely that a file imports at its top level, for types only left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("densely."):
            found.add(part_of(node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.startswith("densely.")}
    return found


def test_arrows_point_one_way() -> None:
    level = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    seen = 0
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part == "__init__":  # hands on public names of all parts
            continue
        for other in imports(path) - {part}:
            assert level[other] < level[part], f"{path} imports densely.{other}, which stands above"
            seen += 1
    assert seen > 20


def test_help_on_a_command_waits_for_no_other() -> None:
    code = (
        "import sys, contextlib, densely.cli\n"
        "with contextlib.suppress(SystemExit): densely.cli.main(['train', '--help'])\n"
        "print(*(name for name in sys.modules if name.startswith('densely.cli.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stderr.split()) == {"densely.cli.parser", "densely.cli.training"}


def test_importing_densely_and_its_config_is_light() -> None:
    code = (
        "import sys, densely, densely.cli, densely.training.config;"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_and_predicting_import_what_they_need(tmp_path: Path) -> None:
    """Neither PyTorch's compiler nor scikit-learn: a second or two of each command."""
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    run = tmp_path / "runs" / "quickstart-001"
    commands = (
        ["train", "--epochs", "1", "--limit", "100", "--output", str(tmp_path / "runs"), "--json"],
        ["predict", str(run), str(tmp_path / "digit.png")],
    )
    code = (
        "import sys, densely.cli\n"
        f"code = sum(densely.cli.main(command) for command in {commands})\n"
        "heavy = {'torch._dynamo', 'sklearn', 'scipy', 'sympy', 'torchvision'}\n"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_these_and_exist() -> None:
    assert densely.__all__ == [
        "Acceleration",
        "Classifier",
        "Comparison",
        "DenseNet",
        "DenselyError",
        "Explanation",
        "FCDenseNet",
        "LoadReport",
        "Prediction",
        "Report",
        "TrainConfig",
        "accelerate",
        "compare",
        "convert_weights",
        "create_model",
        "evaluate",
        "explain",
        "list_models",
        "load",
        "load_weights",
        "model_facts",
        "multilabel_scores",
        "report",
        "restore",
        "save_weights",
        "train",
    ]
    assert all(callable(getattr(densely, name)) for name in densely.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(densely, "nonsense")


def test_no_file_has_outgrown_its_subject() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
