"""Formats by their first bytes; whole models without their code; nothing that runs code."""

import argparse
import io
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import packages_nets as foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import densely
from densely.errors import WeightsError
from densely.fused.swap import _rebuild
from densely.weights.files import read_weights, write_weights

NEW_AND_OLD = pytest.mark.parametrize("zipped", [True, False])


def saved(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return foreign.torchvision().float()


@NEW_AND_OLD
@pytest.mark.parametrize("wrap", ["", "state_dict", "model", "model_state_dict", "net"])
def test_checkpoints(wrap: str, zipped: bool, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    inner: Any = {wrap: state, "epoch": 3, "optimizer": {"lr": [0.1]}} if wrap else state
    contents = read_weights(saved(inner, tmp_path / "x.pth.tar", zipped))
    assert contents.tensors.keys() == state.keys()
    assert all(torch.equal(contents.tensors[key], value) for key, value in state.items())
    assert contents.ignored == ({"epoch": "int", "optimizer": "dict"} if wrap else {})


@NEW_AND_OLD
@pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")
def test_whole_models_are_read_without_their_code(
    zipped: bool, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"model": model, "best": 0.5}, tmp_path / "x.pt", zipped)

    def run(self: object, state: object) -> None:
        raise AssertionError("code of the pickled class ran")

    monkeypatch.setattr(nn.Module, "__setstate__", run)
    contents = read_weights(path)
    assert contents.tensors.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(contents.tensors[key], value)
    assert contents.ignored == {"best": "float"}


@NEW_AND_OLD
@pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")
def test_accelerated_models_are_read_likewise(zipped: bool, tmp_path: Path) -> None:
    model = densely.create_model("densenet_bc_22_12", num_classes=3)
    contents = read_weights(saved(model, tmp_path / "x.pt", zipped))
    assert contents.tensors.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(contents.tensors[key], value)


@pytest.mark.parametrize("what", [{}, "text", nn.Bilinear, print, (nn.Sequential,)])
def test_nothing_but_modules_is_made_again(what: object, tmp_path: Path) -> None:
    class Rebuilt:
        def __reduce__(self) -> Any:
            return _rebuild, (what,)

    with pytest.raises(WeightsError, match=r"more than tensors|in a way that no weights need"):
        read_weights(saved({"model": Rebuilt()}, tmp_path / "x.pt"))


def test_data_parallel_and_buffers_that_are_not_kept(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("passing", torch.ones(1), persistent=False)
    path = saved(nn.DataParallel(nn.Sequential(layer)), tmp_path / "x.pt")
    assert list(read_weights(path).tensors) == [
        "module.0.weight", "module.0.bias", "module.0.kept",
    ]  # fmt: skip


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile",)


@NEW_AND_OLD
def test_code_is_not_run(
    zipped: bool, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved({"state_dict": model.state_dict(), "x": Hostile()}, tmp_path / "x.pt", zipped)
    with pytest.raises(WeightsError, match=r"holds more than tensors \(.*system\)"):
        read_weights(path)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "y.pt")
    assert not (tmp_path / "hostile").exists()


@NEW_AND_OLD
def test_what_scripts_keep_beside_the_weights_is_named(
    zipped: bool, model: nn.Module, tmp_path: Path
) -> None:
    beside = {
        "best_loss": np.float64(0.3),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "path": Path("runs/x"),
    }
    path = saved({"state_dict": model.state_dict(), **beside}, tmp_path / "x.tar", zipped)
    contents = read_weights(path)
    assert contents.tensors.keys() == model.state_dict().keys()
    assert contents.ignored.keys() == beside.keys()


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    path = saved({"model": nn.Bilinear(1, 1, 1)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Bilinear"):
        read_weights(path)


def test_names_of_files_do_not_matter(model: nn.Module, tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "x.pth")
    saved(state, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        assert read_weights(path).tensors.keys() == state.keys()


def test_a_header_of_any_length_is_a_safetensors_file(tmp_path: Path) -> None:
    """Its first bytes are a length, and may be those of another format."""
    lengths = set()
    for n in range(400):
        save_file({"x" * n: torch.ones(1)}, tmp_path / "x")
        lengths.add((tmp_path / "x").read_bytes()[0])
        assert read_weights(tmp_path / "x").tensors
    assert {0x50, 0x80} <= lengths  # as zip archives and pickles begin


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"hello world, hello world", "no file of weights"),
        (b"\x80\x02}.", "damaged"),
        (b"PK\x03\x04" + b"\0" * 40, "damaged"),
        (b"\xff" * 8 + b"{" + b" " * 40, "damaged safetensors"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "damaged"),
    ],
)
def test_what_is_no_file_of_weights(content: bytes, told: str, tmp_path: Path) -> None:
    if content.startswith(b"\x89HDF"):
        pytest.importorskip("h5py")
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_weights(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is a folder"):
        read_weights(tmp_path)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1 << 20)}, buffer)
    with (
        zipfile.ZipFile(buffer) as old,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(WeightsError, match="would unpack to"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize("value", [{}, {"a": 1}, [torch.zeros(1)], 3, {"a": {"b": {"c": 1}}}])
def test_no_weights_in_it(value: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        read_weights(saved(value, tmp_path / "x.pth"))


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    write_weights(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(WeightsError, match="No space left"):
        write_weights(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_shared_and_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    for name in ("x.safetensors", "x.pth"):
        write_weights(tmp_path / name, {"a": base.T, "b": base[:, 1], "c": base})
        read = read_weights(tmp_path / name).tensors
        assert torch.equal(read["a"], base.T)
        assert torch.equal(read["b"], base[:, 1])


def hostile(path: Path) -> Path:
    """A file that its pickle forbids: it names a class that no network has."""
    return saved({"x": bytearray(10)}, path)


def test_a_pickle_before_an_archive_is_read_by_nobody(model: nn.Module, tmp_path: Path) -> None:
    """torch.load takes what begins like a pickle for one, and zipfile finds the archive behind."""
    harmless = saved(model.state_dict(), tmp_path / "x.pth").read_bytes()
    legacy = saved({"x": bytearray(10)}, tmp_path / "y.pth", zipped=False).read_bytes()
    (tmp_path / "z.pth").write_bytes(legacy + harmless)
    with pytest.raises(WeightsError, match="bytearray"):
        read_weights(tmp_path / "z.pth")


def test_an_archive_has_one_list_of_files(model: nn.Module, tmp_path: Path) -> None:
    """Python's reader looks for it before the end, and PyTorch's where the end says."""
    harmless = bytearray(saved(model.state_dict(), tmp_path / "x.pth").read_bytes())
    other = hostile(tmp_path / "y.pth").read_bytes()
    start = int.from_bytes(other[-6:-2], "little")
    for spoilt in (
        other + harmless,  # an archive behind another
        harmless + b"\0",
        other[:-22] + harmless[int.from_bytes(harmless[-6:-2], "little") : -22] + other[-22:],
        harmless[:-6] + start.to_bytes(4, "little") + harmless[-2:],
    ):
        (tmp_path / "z.pth").write_bytes(spoilt)
        with pytest.raises(WeightsError, match=r"damaged|bytearray"):
            read_weights(tmp_path / "z.pth")


def test_archives_of_more_than_4_gib_have_another_end(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = model.state_dict()
    small, large = saved(state, tmp_path / "x.pth"), tmp_path / "y.pth"
    with zipfile.ZipFile(small) as archive, monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 1)
        with zipfile.ZipFile(large, "w") as written:
            for entry in archive.infolist():
                written.writestr(entry.filename, archive.read(entry))
    assert large.read_bytes()[-42:-38] == b"PK\6\7"
    assert read_weights(large).tensors.keys() == state.keys()


def test_what_a_program_calls_safe_is_not_made(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(model, tmp_path / "x.pt")

    def run(self: object, state: object) -> None:
        raise AssertionError("code of the pickled class ran")

    monkeypatch.setattr(nn.Module, "__setstate__", run)
    with torch.serialization.safe_globals([type(model), *map(type, model.modules())]):
        before = torch.serialization.get_safe_globals()
        assert read_weights(path).tensors.keys() == model.state_dict().keys()
        assert set(torch.serialization.get_safe_globals()) == set(before)


def test_several_threads_read(model: nn.Module, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "x.pt")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(read_weights, [path] * 24))
    assert all(one.tensors.keys() == model.state_dict().keys() for one in found)


@pytest.mark.parametrize(
    "beside",
    [
        {"params": {"lr": 0.1}},
        {"optimizer_state_dict": {"state": {}}, "epoch": 1, "model": {"depth": 3}},
    ],
)
def test_what_holds_no_tensors_is_not_taken_for_the_weights(
    beside: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    state = model.state_dict()
    for inner in ({**state, **beside}, {"weights": state, **beside}):
        assert read_weights(saved(inner, tmp_path / "x.pth")).tensors.keys() == state.keys()


def test_a_model_without_numbers_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be written"):
        write_weights(tmp_path / "x.pth", {"a": torch.zeros(2, device="meta")})
    assert not list(tmp_path.iterdir())


def test_a_whole_model_of_keras_is_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    with pytest.raises(WeightsError, match=r"save_weights\('NAME.weights.h5'\)"):
        read_weights(tmp_path / "x.keras")


def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path) -> None:
    path = saved({"features.\x1b[2Jconv0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="not printable"):
        read_weights(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is no plain file"):
        read_weights(tmp_path / "x.pth")


def test_the_pickle_is_found_by_whatever_letters(model: nn.Module, tmp_path: Path) -> None:
    with zipfile.ZipFile(hostile(tmp_path / "x.pth")) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as written:
        for name, data in entries.items():
            written.writestr(name.replace("data.pkl", "DATA.PKL"), data)
    with pytest.raises(WeightsError, match="bytearray"):
        read_weights(tmp_path / "y.pth")


@pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")
def test_a_module_within_itself_ends(tmp_path: Path) -> None:
    inner, outer = nn.Sequential(nn.Linear(1, 1)), nn.Sequential()
    outer._modules["0"], inner._modules["1"] = inner, outer
    path = saved(outer, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="without an end"):
        read_weights(path)
