"""Fixtures that several test files share."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from densely.cache import cache_folder

REAL_DATA = os.environ.get("DENSELY_DATA")
ONE_THREAD = ("bench", "comparison", "evaluation", "fused", "models", "weights")
# Compiled once for all tests, in the cache folder of the user, and not in that of each test.
os.environ.setdefault("DENSELY_KERNELS", str(cache_folder() / "kernels"))
os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))  # and its list of fonts

# Whether kernels run in Triton's interpreter is decided when they are defined, Triton's own when it
# is imported, and any module may import them first. Where there is no GPU they are tested there.
if find_spec("triton") is not None and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import densely.fused.kernels.triton_kernels  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core, and what it starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty cache folder, and no data but what it asks for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DENSELY_DATA", raising=False)


@pytest.fixture(autouse=True)
def _fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nets of tests run what large ones do, and on any CPU what runs on older ones."""
    monkeypatch.setattr("densely.fused.swap.LEAST", 0)
    monkeypatch.setattr("densely.fused.kernels.cpu_kernels._HAS_MASKS", False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """These folders' nets are so small that threads cost more than they do."""
    if request.path.parent.name not in ONE_THREAD:
        yield
        return
    with single_thread():
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """Run in one thread: the bits of a training go by their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For nets so small that threads cost more than they do, and for bits that are compared."""
    with single_thread():
        yield


@pytest.fixture
def fashion_mnist_dir() -> Path:
    """Folder of the real Fashion-MNIST; the test skips where it is absent."""
    if not REAL_DATA:
        pytest.skip("DENSELY_DATA is not set: it names the folder that holds fashion-mnist/")
    folder = Path(REAL_DATA).resolve() / "fashion-mnist"
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"DENSELY_DATA={REAL_DATA} holds no fashion-mnist/")
    return folder


@pytest.fixture(scope="session")
def hasty_costs() -> Iterator[None]:
    """Speeds are measured, and need not be measured well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densely.evaluation.cost.TURN_SECONDS", 0.0)
        patch.setattr("densely.evaluation.cost.ROUNDS", 1)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point stands for each diagram, whose drawing takes longer than what else is done."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("L", (1, 1)).save(data, format="PNG")
    monkeypatch.setattr("densely.drawing.png", lambda figure, metadata=None: data.getvalue())


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the quick start, two epochs long; tests must leave it as it is."""
    from densely import TrainConfig, train

    output = str(tmp_path_factory.mktemp("runs"))
    config = TrainConfig.from_values({"epochs": 2, "output": output, "device": "cpu"})
    with single_thread():
        return train(config).run


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """PNG files of the quick start's test digits, two a class, with the class of each."""
    from PIL import Image

    from densely.data import load_data

    test = load_data("digits").test
    folder = tmp_path_factory.mktemp("digits")
    files = []
    for label in range(10):
        for i in (test.labels == label).nonzero().flatten()[:2].tolist():
            path = folder / f"{label}-{i}.png"
            Image.fromarray(test.images[i, 0].numpy()).save(path)
            files.append((path, test.classes[label]))
    return files
