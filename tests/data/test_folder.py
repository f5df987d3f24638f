from pathlib import Path

import numpy as np
import pytest
import torch
from folder_cases import save, save_classes, shades
from PIL import Image

from densely.data import parallel
from densely.data.folder import load_folder, load_labelled
from densely.errors import DataError


def shade_of(path: Path) -> int:
    with Image.open(path) as image:
        return int(np.asarray(image)[0, 0])


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_folder(folder, None, 0)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.mark.parametrize("second", ["test", "val"])
def test_two_folders_are_train_and_test(photos: Path, second: str) -> None:
    save_classes(photos / "train", each=3)
    save(photos / second / "b" / "x.png", shade=77)
    splits = load_folder(photos, None, 0)
    assert splits.name == "photos"
    assert splits.train.classes == splits.test.classes == ("a", "b")
    assert (shades(splits.train), shades(splits.test)) == ([0, 1, 2, 3, 4, 5], [77])
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.labels.tolist() == [1]
    assert splits.validation is None


def test_val_beside_test_becomes_validation(photos: Path) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "a" / "x.png", shade=77)
    save(photos / "val" / "b" / "x.png", shade=88)
    splits = load_folder(photos, None, 0)
    assert splits.validation is not None
    assert (shades(splits.test), shades(splits.validation)) == ([77], [88])
    assert splits.validation.labels.tolist() == [1]


def test_images_that_are_learnt_from_and_judged_by_are_noted(photos: Path) -> None:
    save_classes(photos / "train", each=3)
    save_classes(photos / "val", each=2)
    save_classes(photos / "test", each=2)
    assert load_folder(photos, None, 0).notes == ()
    save(photos / "val" / "b" / "again.png", shade=4)
    for name, shade in (("a/again.png", 1), ("b/again.png", 5)):
        save(photos / "test" / name, shade=shade)
    notes = load_folder(photos, None, 0).notes
    assert [note.split(":")[0] for note in notes] == [
        "of 5 validation images 1 is among the training images too",
        "of 6 test images 2 are among the training images too",
    ]


def test_one_folder_is_split_80_to_20_in_each_class(photos: Path) -> None:
    splits = load_folder(save_classes(photos, each=20), None, 0)
    assert sorted(shades(splits.train) + shades(splits.test)) == list(range(40))
    for part, each in ((splits.train, 16), (splits.test, 4)):
        assert part.labels.bincount().tolist() == [each, each]
        assert [shade // 20 for shade in shades(part)] == part.labels.tolist()


def test_the_split_follows_its_seed(photos: Path) -> None:
    save_classes(photos, each=20)
    first = shades(load_folder(photos, None, 1).test)
    assert shades(load_folder(photos, None, 1).test) == first
    assert shades(load_folder(photos, None, 2).test) != first


def test_a_rare_class_is_in_both_parts_of_a_split(photos: Path) -> None:
    save_classes(photos, "a", each=40)
    save(photos / "b" / "0.png")
    save(photos / "b" / "1.png")
    splits = load_folder(photos, None, 0)
    assert set(splits.train.labels.tolist()) == set(splits.test.labels.tolist()) == {0, 1}


def test_classes_are_sorted(photos: Path) -> None:
    splits = load_folder(save_classes(photos, "cab", each=5), None, 0)
    assert splits.train.classes == ("a", "b", "c")
    assert [shade // 5 for shade in shades(splits.train)] == [
        {"a": 1, "b": 2, "c": 0}[splits.train.classes[label]] for label in splits.train.labels
    ]


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_images_have_one_channel(photos: Path, mode: str) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "a" / "0.png", mode=mode)
    assert load_folder(photos, None, 0).train.images.shape == (2, 1, 8, 8)


def test_one_colour_training_image_makes_all_three_channels(photos: Path) -> None:
    save_classes(photos / "train")
    save(photos / "train" / "a" / "1.png", mode="RGB")
    save_classes(photos / "test")
    splits = load_folder(photos, None, 0)
    assert splits.train.images.shape == (3, 3, 8, 8)
    assert splits.test.images.shape == (2, 3, 8, 8)


def test_test_images_decide_neither_size_nor_channels(photos: Path) -> None:
    save_classes(photos / "train")
    noise = np.random.default_rng(0).integers(0, 256, (30, 8, 3), dtype=np.uint8)
    (photos / "test" / "a").mkdir(parents=True)
    Image.fromarray(noise).save(photos / "test" / "a" / "0.png")
    splits = load_folder(photos, None, 0)
    assert splits.train.images.shape == (2, 1, 8, 8)
    assert splits.test.images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
def test_channels_asked_for_win(photos: Path, mode: str, channels: int) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "a" / "0.png", shade=90, mode=mode)
    test = load_folder(photos, None, 0, channels).test
    assert test.images.equal(torch.full((1, channels, 8, 8), 90, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sizes", "asked", "side"),
    [
        pytest.param([(8, 8)], None, 8, id="shared size kept"),
        pytest.param([(96, 96)], None, 96, id="96 kept"),
        pytest.param([(97, 97)], None, 96, id="larger"),
        pytest.param([(8, 8), (9, 9)], None, 96, id="mixed"),
        pytest.param([(8, 6)], None, 96, id="not square"),
        pytest.param([(8, 8)], 5, 5, id="asked for, smaller"),
        pytest.param([(8, 8), (9, 9)], 120, 120, id="asked for, larger"),
    ],
)
def test_side_of_the_images(
    photos: Path, sizes: list[tuple[int, int]], asked: int | None, side: int
) -> None:
    for part in ("train", "test"):
        for name in "ab":
            for i, size in enumerate(sizes):
                save(photos / part / name / f"{i}.png", size=size)
    splits = load_folder(photos, asked, 0)
    assert splits.train.images.shape == (2 * len(sizes), 1, side, side)
    assert splits.test.images.shape[-2:] == (side, side)


def test_the_whole_picture_is_scaled_as_pillow_does(photos: Path) -> None:
    save_classes(photos / "train")
    noise = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    (photos / "test" / "a").mkdir(parents=True)
    Image.fromarray(noise).save(photos / "test" / "a" / "0.png")
    expected = Image.fromarray(noise).resize((12, 12), Image.Resampling.BILINEAR)
    found = load_folder(photos, 12, 0, channels=3).test.images[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.array(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["x.PNG", "x.jpg", "x.JPEG", "x.bmp", "x.webp", "deep/er/x.png"])
def test_images_are_found_by_suffix_at_any_depth(photos: Path, name: str) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "b" / name, shade=77)
    assert np.abs(shades(load_folder(photos, None, 0).test)[0] - 77) <= 1


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "a/notes.txt",
        "a/Thumbs.db",
        "a/.hidden.png",
        "a/._0.png",
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "stray.png",
        ".git/0.png",
    ],
)
def test_hidden_files_and_other_files_are_ignored(photos: Path, name: str) -> None:
    save_classes(photos / "test")
    ignored = save_classes(photos / "train") / name
    ignored.parent.mkdir(exist_ok=True)
    ignored.write_text("no image")
    splits = load_folder(photos, None, 0)
    assert splits.train.classes == ("a", "b")
    assert shades(splits.train) == [0, 1]


def test_folder_with_an_images_suffix_is_gone_into(photos: Path) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "a" / "scans.png" / "0.png", shade=77)
    assert shades(load_folder(photos, None, 0).test) == [77]


def test_missing_folder_is_named(photos: Path) -> None:
    assert_refused(photos, str(photos))


def test_empty_folder_is_named(photos: Path) -> None:
    photos.mkdir()
    assert_refused(photos, str(photos), ".png")


@pytest.mark.parametrize(
    ("present", "missing"), [("train", "test"), ("test", "train"), ("val", "train")]
)
def test_part_without_its_counterpart_is_named(photos: Path, present: str, missing: str) -> None:
    save_classes(photos / present)
    assert_refused(photos, str(photos), missing)


def test_test_folder_without_images_is_named(photos: Path) -> None:
    save_classes(photos / "train")
    (photos / "test").mkdir()
    assert_refused(photos, str(photos / "test"))


@pytest.mark.parametrize("part", ["", "train"])
def test_one_class_is_too_few(photos: Path, part: str) -> None:
    save_classes(photos / part, "a", each=5)
    if part:
        save_classes(photos / "test", "a")
    assert_refused(photos, str(photos / part), "'a'")


@pytest.mark.parametrize("part", ["", "train"])
def test_class_folder_without_images_is_named(photos: Path, part: str) -> None:
    (save_classes(photos / part, "ab", each=5) / "empty").mkdir()
    if part:
        save_classes(photos / "test", "ab")
    assert_refused(photos, str(photos / part), "empty")


def test_class_of_the_test_images_alone_is_named(photos: Path) -> None:
    save_classes(photos / "train", "ab")
    save_classes(photos / "test", "abz")
    assert_refused(photos, str(photos / "test"), "z")


@pytest.mark.parametrize("keep", [0, 20, 45])
def test_corrupt_image_is_named(photos: Path, keep: int) -> None:
    save_classes(photos, each=5)
    corrupt = photos / "b" / "3.png"
    corrupt.write_bytes(corrupt.read_bytes()[:keep])
    assert_refused(photos, str(corrupt))


@pytest.fixture
def many_kinds(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """80 pictures to train on, enough for processes, of several sizes, modes and formats."""
    monkeypatch.setattr(parallel, "LEAST_FILES", 64)
    noise = np.random.default_rng(0)
    for i in range(84):
        part = photos / ("test" if i < 4 else "train") / "ab"[i % 2]
        part.mkdir(parents=True, exist_ok=True)
        height, width = ((8, 8), (20, 33), (9, 5), (40, 12))[i // 2 % 4]
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert(("L", "RGB", "RGBA", "P")[i // 8 % 4] if i % 3 else "L")
        image.save(part / f"{i:02}.{'jpg' if image.mode in ('L', 'RGB') and i % 5 else 'png'}")
    return photos


@pytest.mark.parametrize("size", [None, 8, 20])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_processes_read_the_same_images(
    many_kinds: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, channels: int | None
) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 2)
    found = load_folder(many_kinds, size, 0, channels)
    monkeypatch.setattr(parallel, "processors", lambda: 1)
    expected = load_folder(many_kinds, size, 0, channels)
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        assert ours.images.equal(theirs.images)
        assert ours.labels.equal(theirs.labels)
    assert found.train.images.shape[:2] == (80, channels or 3)
    assert found.train.images.flatten(1).float().std(dim=1).min() > 0  # none was left out


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("processors", [1, 2])
def test_corrupt_images_are_named_in_their_order(
    many_kinds: Path, monkeypatch: pytest.MonkeyPatch, processors: int, size: int | None
) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: processors)
    paths = sorted((many_kinds / "train").rglob("*.*"))
    paths[30].write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        load_folder(many_kinds, size, 0)
    assert str(caught.value).startswith(f"{paths[30]}: not a readable")
    for path in paths[32:79:8]:
        path.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        load_folder(many_kinds, size, 0)
    first, second, *_ = str(caught.value).split("; ")
    assert first.startswith(f"7 images cannot be read: {paths[30]}: not a readable")
    assert second.startswith(f"{paths[32]}: not a readable")
    assert str(caught.value).endswith("; and 2 more")


def test_one_grey_image_in_front_does_not_decide(photos: Path) -> None:
    save_classes(photos / "train")
    save(photos / "train" / "b" / "9.png", mode="RGB")
    save_classes(photos / "test")
    assert load_folder(photos, 8, 0).train.images.shape == (3, 3, 8, 8)


def test_more_than_memory_holds_is_refused_before_it_is_taken(photos: Path) -> None:
    save_classes(photos, each=5)
    with pytest.raises(DataError, match="image-size"):
        load_folder(photos, 1_000_000, 0)


def test_labels_follow_the_classes_given(tmp_path: Path) -> None:
    images = load_labelled(save_classes(tmp_path, "ab", each=2), ("b", "absent", "a"), 5, 3)
    assert images.images.shape == (4, 3, 5, 5)
    assert images.classes == ("b", "absent", "a")
    label_of = dict(zip(shades(images), images.labels.tolist(), strict=True))
    assert label_of == {0: 2, 1: 2, 2: 0, 3: 0}


def test_classes_not_given_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="zebra") as caught:
        load_labelled(save(tmp_path / "zebra" / "0.png").parent.parent, ("a", "b"), 8, 1)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
def test_folder_to_label_needs_images(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "folder"
    if exists:
        (folder / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="folder"):
        load_labelled(folder, ("a", "b"), 8, 1)


def test_corrupt_image_to_label_is_named(tmp_path: Path) -> None:
    save_classes(tmp_path)
    (tmp_path / "b" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"b/0\.png"):
        load_labelled(tmp_path, ("a", "b"), 8, 1)


def save_deep(path: Path, highest: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.linspace(0, highest, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_of_12_bit_values_are_noted(
    photos: Path, monkeypatch: pytest.MonkeyPatch, processors: int, channels: int
) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: processors)
    monkeypatch.setattr(parallel, "LEAST_FILES", 32)
    for i in range(32):
        save_deep(photos / "train" / "ab"[i % 2] / f"{i}.png", highest=4095 if i == 20 else 2000)
    save_deep(photos / "test" / "a" / "0.png", highest=65535)
    save_classes(photos / "test")
    save(photos / "train" / "a" / "8-bit.png", shade=200)
    assert load_folder(photos, None, 0, channels).notes == (
        "16-bit images use at most 17 of 256 grey levels: scale their values to 0..65535 first",
    )


@pytest.mark.parametrize("highest", [4600, 65535])
def test_16_bit_images_that_use_their_range_are_not_noted(photos: Path, highest: int) -> None:
    save_classes(photos / "test")
    save_classes(photos / "train")
    save_deep(photos / "train" / "a" / "dark.png", highest=1000)
    save_deep(photos / "train" / "a" / "light.png", highest=highest)
    assert load_folder(photos, None, 0).notes == ()


def test_dark_8_bit_images_are_not_noted(photos: Path) -> None:
    save_classes(photos / "test")
    assert load_folder(save_classes(photos / "train").parent, None, 0).notes == ()


def test_the_overview_says_what_was_found_and_made_of_it(photos: Path) -> None:
    save_classes(photos / "train", each=2)
    save_classes(photos / "test")
    save(photos / "val" / "a" / "0.png")
    counts = "4 training, 1 validation, 2 test images; 2 classes; images of"
    assert load_folder(photos, None, 0).overview() == f"{counts} 8x8 pixels"
    assert load_folder(photos, 5, 0).overview() == f"{counts} 8x8 pixels, scaled to 5x5"
    for name, size in (("0", (40, 30)), ("1", (12, 50))):
        save(photos / "train" / "b" / f"{name}.png", size=size)
    assert load_folder(photos, None, 0).overview() == (
        f"{counts} 8x8 to 40x30 pixels, scaled to 96x96"
    )
    save_classes(photos.parent / "whole", each=5)
    assert load_folder(photos.parent / "whole", None, 0).overview() == (
        "8 training, 2 test images; 2 classes; images of 8x8 pixels"
    )


def test_each_image_knows_its_file(photos: Path) -> None:
    save_classes(photos, each=5)
    save(photos / "b" / "2024" / "x.png", shade=99)
    splits = load_folder(photos, None, 0)
    for part in (splits.train, splits.test, load_labelled(photos, ("a", "b"), 8, 1)):
        assert part.names is not None
        for name, shade in zip(part.names, shades(part), strict=True):
            assert shade_of(photos / name) == shade
            assert not Path(name).is_absolute()
    assert "b/2024/x.png" in (*(splits.train.names or ()), *(splits.test.names or ()))


def test_files_of_a_split_begin_with_its_folder(photos: Path) -> None:
    save_classes(photos / "train")
    save(photos / "test" / "a" / "x.png")
    assert load_folder(photos, None, 0).test.names == ("test/a/x.png",)


def test_more_than_memory_holds_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_classes(photos / "train", each=5)
    save_classes(photos / "test", each=5)
    needed = 2 * 20 * 8 * 8  # twice, since splits are copies
    pages = {"SC_PAGE_SIZE": 1}
    monkeypatch.setattr("os.sysconf", lambda name: pages.get(name, int(needed / 0.7)))
    assert_refused(photos, "20 images of 8x8 take", "choose a smaller --image-size")
    pages["SC_PHYS_PAGES"] = int(needed / 0.7) + 1
    load_folder(photos, None, 0)
