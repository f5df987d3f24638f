"""Files are written whole or not at all."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from densely.whole_file import whole_file, write_whole


def test_the_new_one_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    write_whole(path, "n\u00e9w\n")
    assert path.read_bytes() == b"n\xc3\xa9w\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with whole_file(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as caught, whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` raises it
    assert caught.value.filename == str(path)


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(OSError, match="disk full"), whole_file(path) as beside:  # noqa: PT012
        beside.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    """Not what has a name that a temporary file might have; not what a link leads to there."""
    (tmp_path / "a.txt.new").write_text("mine")
    (tmp_path / "b.txt.new").symlink_to(tmp_path / "a.txt.new")
    for name in ("a.txt", "b.txt"):
        write_whole(tmp_path / name, "ours")
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "a.txt.new").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


def test_many_may_write_the_same_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_whole(path, text), texts * 4))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "disk" / "b.txt")
    write_whole(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "b.txt").read_text() == "text"


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_the_mode_is_the_old_ones_or_the_usual_one(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    path, usual = tmp_path / "a.txt", tmp_path / "usual"
    usual.touch()
    with whole_file(path) as beside:  # as safetensors does
        beside.unlink()
        beside.touch(0o600)
    assert mode(path) == mode(usual)
    path.chmod(0o640)
    write_whole(path, "text")
    assert mode(path) == 0o640


def test_a_name_as_long_as_may_be(tmp_path: Path) -> None:
    write_whole(tmp_path / ("a" * 251 + ".txt"), "text")


def test_an_error_names_the_file_and_not_the_one_beside(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(path, "text")
    assert caught.value.filename == str(path)
    folder = tmp_path / "folder"
    (folder / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="folder") as caught:
        write_whole(folder, "text")
    assert caught.value.filename == str(folder)
