from pathlib import Path

import pytest

from densely.cache import cache_folder
from densely.data.locations import user_folders
from densely.errors import DataError


def test_cache_folder_lies_in_xdg_cache_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere" / "densely"


@pytest.mark.parametrize("unset", [True, False])
def test_cache_folder_lies_in_the_home_folder_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unset: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if unset:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "densely"


def test_asking_for_the_cache_folder_makes_none() -> None:
    assert not cache_folder().exists()


def test_no_folder_is_looked_in_where_none_is_named() -> None:
    assert list(user_folders(None)) == []


def test_data_dir_comes_before_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "flag").mkdir()
    (tmp_path / "variable").mkdir()
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path / "variable"))
    assert list(user_folders(tmp_path / "flag")) == [tmp_path / "flag", tmp_path / "variable"]
    assert list(user_folders(None)) == [tmp_path / "variable"]


def test_missing_data_dir_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data-dir.*/nowhere"):
        list(user_folders(tmp_path / "nowhere"))


def test_missing_folder_of_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"DENSELY_DATA.*/nowhere"):
        list(user_folders(None))
