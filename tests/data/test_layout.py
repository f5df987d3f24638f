"""Which folders are splits and classes, which files are images, and what is said of the others."""

import os
from pathlib import Path

import pytest
from folder_cases import save, save_classes, shades

from densely.data.folder import load_folder, load_labelled
from densely.data.layout import has_splits, images_below
from densely.errors import DataError


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_folder(folder, None, 0)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("train", ["Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["Test", "testing"])
def test_names_of_train_and_test_are_known_in_any_case(
    tmp_path: Path, train: str, test: str
) -> None:
    save_classes(tmp_path / train, each=3)
    save(tmp_path / test / "b" / "x.png", shade=77)
    splits = load_folder(tmp_path, None, 0)
    assert splits.train.classes == ("a", "b")
    assert (shades(splits.train), shades(splits.test)) == ([0, 1, 2, 3, 4, 5], [77])
    assert has_splits(tmp_path)


@pytest.mark.parametrize("name", ["valid", "Val", "validation", "VALID"])
def test_names_of_validation_are_known(tmp_path: Path, name: str) -> None:
    save_classes(tmp_path / "train")
    save_classes(tmp_path / "test")
    save(tmp_path / name / "b" / "x.png", shade=88)
    splits = load_folder(tmp_path, None, 0)
    assert splits.validation is not None
    assert shades(splits.validation) == [88]
    assert splits.notes == ()


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_as_test_split_is_noted(tmp_path: Path, name: str) -> None:
    save_classes(tmp_path / "train")
    save_classes(tmp_path / name)
    splits = load_folder(tmp_path, None, 0)
    assert splits.validation is None
    assert splits.notes == (f"there is no test folder: {name}/ is the test split",)


def test_without_a_train_folder_they_are_classes(tmp_path: Path) -> None:
    for name in ("valid", "invalid", "Test"):
        for i in range(5):
            save(tmp_path / name / f"{i}.png")
    splits = load_folder(tmp_path, None, 0)
    assert splits.train.classes == ("Test", "invalid", "valid")
    assert not has_splits(tmp_path)


@pytest.mark.parametrize("name", ["Train", "training"])
def test_without_another_split_a_train_is_a_class(tmp_path: Path, name: str) -> None:
    for vehicle in ("bus", "car", name):
        for i in range(5):
            save(tmp_path / vehicle / f"{i}.png")
    assert load_folder(tmp_path, None, 0).train.classes == tuple(sorted(("bus", "car", name)))
    assert not has_splits(tmp_path)


@pytest.mark.parametrize(("one", "other"), [("Train", "train"), ("train", "training")])
def test_two_folders_of_one_split_are_refused(tmp_path: Path, one: str, other: str) -> None:
    for part in (one, other, "test"):
        save_classes(tmp_path / part)
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("the file system does not tell Train from train")
    assert_refused(tmp_path, str(tmp_path), f"{one}/ and {other}/", "train split")


def test_messages_name_the_folder_as_it_is(tmp_path: Path) -> None:
    save_classes(tmp_path / "Training")
    (tmp_path / "Testing").mkdir()
    save_classes(tmp_path / "alone" / "train")
    assert_refused(tmp_path / "alone", "has train/ but neither test/ nor val/")
    assert_refused(tmp_path, f"{tmp_path / 'Testing'}: no class folders")


def test_a_class_without_test_images_is_noted(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", "abc")
    save_classes(tmp_path / "test", "a")
    (tmp_path / "test" / "b").mkdir()
    (note,) = load_folder(tmp_path, None, 0).notes
    assert note == "classes without test images, which cannot be judged: b, c"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")


def test_files_left_out_are_counted(tmp_path: Path) -> None:
    save_classes(tmp_path, each=5)
    touch(tmp_path, *(f"a/{i}.tif" for i in range(3)), "b/deep/x.GIF", "b/y.gif", "b/IM0001")
    assert load_folder(tmp_path, None, 0).notes == (
        "6 files left out: .tif, .gif, without ending (PNG, JPEG, BMP and WebP are read)",
    )


def test_files_left_out_of_all_splits_are_one_note(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        touch(save_classes(tmp_path / part), "a/x.dcm")
    (note,) = load_folder(tmp_path, None, 0).notes
    assert note.startswith("3 files left out: .dcm (")


def test_many_endings_are_not_all_listed(tmp_path: Path) -> None:
    touch(save_classes(tmp_path, each=5), "a/1.7", *(f"a/{i}.{i}" for i in range(9)))
    (note,) = load_folder(tmp_path, None, 0).notes
    assert note.startswith("10 files left out: .7, .0, .1, .2, .3, ... (")


@pytest.mark.parametrize("part", ["", "train"])
def test_images_of_no_class_are_noted(tmp_path: Path, part: str) -> None:
    folder = save_classes(tmp_path / part, each=5)
    (folder / "a").rename(folder / "a.png")  # still a class
    for name in ("x.png", "y.JPG", ".hidden.png"):
        save(folder / name)
    if part:
        save(tmp_path / "test" / "b" / "x.png", shade=77)
        save(tmp_path / "test" / "a.png" / "x.png", shade=78)
    splits = load_folder(tmp_path, None, 0)
    assert splits.train.classes == ("a.png", "b")
    assert len(splits.train) == (10 if part else 8)
    assert splits.notes == (f"2 images left out: in {folder.name}/, and in no class's folder",)


def test_images_without_class_folders_are_told_of(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    assert_refused(tmp_path, "no class folders with images", "1 image left out: in ")


@pytest.mark.parametrize("target", [".", "..", "../b", "../b/deep", "0.png", "../b/0.png"])
def test_a_link_to_what_is_read_anyway_is_not_followed(tmp_path: Path, target: str) -> None:
    save_classes(tmp_path, each=5)
    save(tmp_path / "b" / "deep" / "x.png", shade=99)
    (tmp_path / "a" / "before.png").symlink_to(target)
    splits = load_folder(tmp_path, None, 0)
    found = [*shades(splits.train), *shades(splits.test)]
    assert sorted(found) == [*range(10), 99]
    labels = [*splits.train.labels.tolist(), *splits.test.labels.tolist()]
    assert dict(zip(found, labels, strict=True)) == {
        **{shade: shade // 5 for shade in range(10)}, 99: 1
    }  # fmt: skip
    assert splits.notes == ("1 link left out: to what is read anyway",)
    assert len(images_below(tmp_path).images) == 11


@pytest.mark.parametrize("target", ["../..", "../../test", "../../test/a", "../../test/a/0.png"])
def test_no_link_brings_test_images_into_training(tmp_path: Path, target: str) -> None:
    save_classes(tmp_path / "train", each=2)
    save(tmp_path / "test" / "a" / "0.png", shade=88)
    (tmp_path / "train" / "b" / "up.png").symlink_to(target)
    splits = load_folder(tmp_path, None, 0)
    assert (shades(splits.train), shades(splits.test)) == ([0, 1, 2, 3], [88])
    assert "1 link left out: to what is read anyway" in splits.notes


@pytest.mark.parametrize(("link", "target"), [("train/b", "a"), ("test", "train")])
def test_a_class_or_split_that_is_a_link_to_another_is_refused(
    tmp_path: Path, link: str, target: str
) -> None:
    save_classes(tmp_path / "train", "ac")
    if link != "test":
        save_classes(tmp_path / "test", "a")
    (tmp_path / link).symlink_to(target)
    assert_refused(tmp_path, "a link to")


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    save_classes(tmp_path / "data", "b", each=5)
    save_classes(tmp_path / "elsewhere", "xa", each=5)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    save(tmp_path / "more" / "x.png", shade=99)
    (tmp_path / "data" / "b" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "a" / "y.png").symlink_to(save(tmp_path / "one" / "y.png", shade=98))
    splits = load_folder(tmp_path / "data", None, 0)
    assert len(splits.train) + len(splits.test) == 12
    assert splits.notes == ()
    (tmp_path / "data" / "a" / "z.png").symlink_to(tmp_path / "one" / "y.png")
    assert load_folder(tmp_path / "data", None, 0).notes == (
        "1 link left out: to what is read anyway",
    )


def test_folders_beside_the_splits_are_noted(tmp_path: Path) -> None:
    for part in ("train", "test", "dev", "Extra/deep", ".git", "__MACOSX"):
        save_classes(tmp_path / part)
    touch(tmp_path, "labels/a/x.txt", "masks/.x.png")
    splits = load_folder(tmp_path, None, 0)
    assert len(splits.train) == len(splits.test) == 2
    assert splits.notes == ("nothing is read from Extra/, dev/: splits are train/, test/ and val/",)


def test_what_datasets_carry_is_not_noted(tmp_path: Path) -> None:
    save_classes(tmp_path, each=5)
    touch(
        tmp_path,
        *(f"a/{name}" for name in ("x.txt", "x.csv", "x.JSON", "x.xml", "x.md")),
        *("a/Thumbs.db", "a/desktop.ini", "a/.DS_Store", "a/.x.tif", "a/.cache/x.tif", "x.tif"),
    )
    (tmp_path / "a" / "folder.tif").mkdir()
    (tmp_path / "a" / "gone.tif").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.tif")
    assert load_folder(tmp_path, None, 0).notes == ()


def test_what_archives_of_a_mac_leave_is_nothing(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", each=2)
    save_classes(tmp_path / "test")
    for place in ("", "train", "test", "train/a"):
        touch(tmp_path / place / "__MACOSX", "._0.png", "a/0.png", "x.tif")
    splits = load_folder(tmp_path, None, 0)
    assert splits.train.classes == ("a", "b")
    assert shades(splits.train) == [0, 1, 2, 3]
    assert splits.notes == ()
    assert len(load_labelled(tmp_path / "test", ("a", "b"), 8, 1)) == 2


def test_a_mac_folder_beside_classes_is_no_class(tmp_path: Path) -> None:
    touch(save_classes(tmp_path, each=5), "__MACOSX/a/._0.png")
    assert load_folder(tmp_path, None, 0).train.classes == ("a", "b")


@pytest.mark.parametrize("part", ["", "train"])
def test_a_class_without_images_is_told_what_was_left_out(tmp_path: Path, part: str) -> None:
    touch(save_classes(tmp_path / part, "a", each=5), "b/x.tif")
    if part:
        save_classes(tmp_path / "test", "a")
    assert_refused(tmp_path, "without images: b; 1 file left out: .tif (PNG, JPEG,")


def test_a_class_too_small_to_split_is_told_what_was_left_out(tmp_path: Path) -> None:
    touch(save_classes(tmp_path, "a", each=5), "b/x.tif")
    save(tmp_path / "b" / "0.png")
    assert_refused(tmp_path, "class 'b' has 1 image(s)", "for test; 1 file left out: .tif (PNG,")


def test_a_folder_of_other_files_alone_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.tif", "b/x.tif")
    assert_refused(tmp_path, "no class folders with images", "2 files left out: .tif")
    with pytest.raises(DataError, match=r"2 files left out: \.tif"):
        load_labelled(tmp_path, ("a", "b"), 8, 1)


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_classes(tmp_path, each=3)
    (tmp_path / "b" / "locked").mkdir()
    scandir = os.scandir

    def locked(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(OSError, match=r"Permission denied: .*locked"):
        images_below(tmp_path)
