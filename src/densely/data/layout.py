"""Which folders of a data set are splits and classes, and which of their files are images.

    FOLDER/train/CLASS/*.png    with FOLDER/test/CLASS/*.png or FOLDER/val/CLASS/*.png or both
    FOLDER/CLASS/*.png

Splits may also be called training, testing, valid and validation, in any case.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from densely.data.images import SUFFIXES
from densely.errors import DataError
from densely.words import counted

EXPECTED = "expected FOLDER/train/CLASS/*.png with test/, or FOLDER/CLASS/*.png"

_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
#: What lies beside the images of many data sets, and nobody would take for one of them.
_CARRIED_SUFFIXES = (".txt", ".csv", ".json", ".xml", ".md")
_CARRIED_NAMES = ("thumbs.db", "desktop.ini")
_MOST_ENDINGS = 5  # that a note lists: names of DICOM files may each end in another number


@dataclass(frozen=True)
class Part:
    """What one split, or a data set that has none, holds.

    Args:
        path: its folder.
        files: the image files of each class, in a fixed order.
        left_out: numbers of files that look like none of these, by the ending of their names.
        beside: number of image files beside the classes' folders, which belong to no class.
        again: number of links to folders that are read anyway.
    """

    path: Path
    files: dict[str, list[Path]]
    left_out: Counter[str]
    beside: int = 0
    again: int = 0

    @property
    def images(self) -> list[Path]:
        """All image files, class by class."""
        return [path for paths in self.files.values() for path in paths]

    def error(self, message: str) -> DataError:
        """Make an error about this folder, which also says what was left out of it."""
        return DataError("; ".join((f"{self.path}: {message}", *left_out_notes([self]))))


def find_parts(folder: Path) -> dict[str, Part]:
    """Find the splits: "train" with "test" or "val" or both; or "train" alone for a whole data set.

    Raises:
        DataError: a split lacks its counterpart, or has two folders.
    """
    found = {split: _folders_of(folder, split) for split in _SPLITS}
    if not has_splits(folder):
        # Only the plain names: "valid" and "invalid" may be two classes.
        if alone := [name for name in ("test", "val") if (folder / name).is_dir()]:
            raise DataError(f"{folder}: has {', '.join(alone)} but no train/")
        return {"train": list_part(folder)}
    for split, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(f"{path.name}/" for path in folders)
            raise DataError(f"{folder}: {names} are both the {split} split; one is needed")
    paths = {split: folders[0] for split, folders in found.items() if folders}
    if len(paths) == 1:
        raise DataError(f"{folder}: has {paths['train'].name}/ but neither test/ nor val/")
    return {split: list_part(path) for split, path in paths.items()}


def has_splits(folder: Path) -> bool:
    """Whether a folder is laid out by splits, and not by classes.

    "Train" and "training" may be classes among others, if nothing beside them is another split.
    """
    train = _folders_of(folder, "train")
    beside = _folders_of(folder, "test") or _folders_of(folder, "val")
    return any(path.name == "train" for path in train) or bool(train and beside)


def list_part(path: Path) -> Part:
    """List the image files below each class's folder."""
    entries = sorted(entry for entry in path.iterdir() if not _is_hidden(entry.name))
    beside = sum(entry.name.lower().endswith(SUFFIXES) and entry.is_file() for entry in entries)
    folders = [entry for entry in entries if entry.is_dir()]
    walk = _Walk([path, *folders])
    files = {folder.name: sorted(walk.image_files(folder)) for folder in folders}
    return Part(path, files, walk.left_out, beside, walk.again)


def images_below(folder: Path) -> list[Path]:
    """All image files of a folder, at any depth, in a fixed order.

    Raises:
        DataError: there are none.
    """
    walk = _Walk([folder])
    images = sorted(walk.image_files(folder))
    if not images:
        raise Part(folder, {}, walk.left_out).error(f"no images in it ({', '.join(SUFFIXES)})")
    return images


def left_out_notes(parts: Iterable[Part]) -> tuple[str, ...]:
    """What was left out of these: images of no class, and one note on all other files."""
    parts = list(parts)
    notes = [
        f"{counted(part.beside, 'image')} left out: in {part.path.name}/, and in no class's folder"
        for part in parts
        if part.beside
    ]
    if again := sum(part.again for part in parts):
        notes.append(f"{counted(again, 'link')} left out: to folders that are read anyway")
    endings = sum((part.left_out for part in parts), Counter())
    if endings:
        by_number = sorted(endings, key=lambda ending: (-endings[ending], ending))
        listed = [ending or "without ending" for ending in by_number[:_MOST_ENDINGS]]
        if len(endings) > _MOST_ENDINGS:
            listed.append("...")
        files = counted(endings.total(), "file")
        notes.append(f"{files} left out: {', '.join(listed)} (PNG, JPEG, BMP and WebP are read)")
    return tuple(notes)


def unread_note(folder: Path, parts: Iterable[Part]) -> tuple[str, ...]:
    """A note on folders of images beside the splits, which nothing is read from; or none."""
    read = {part.path for part in parts}
    if folder in read:
        return ()
    beside = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry not in read]
    unread = [f"{entry.name}/" for entry in beside if not _is_hidden(entry.name) and _any(entry)]
    if not unread:
        return ()
    return (f"nothing is read from {', '.join(unread)}: splits are train/, test/ and val/",)


def _any(folder: Path) -> bool:
    """Whether there is an image at any depth; what cannot be looked into holds none."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return any(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in names)


def _folders_of(folder: Path, split: str) -> list[Path]:
    """Folders that are called as a split is."""
    named = (path for path in folder.iterdir() if path.name.lower() in _SPLITS[split])
    return sorted(path for path in named if path.is_dir())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # which archives made on a Mac leave


class _Walk:
    """Looks for images at any depth, in no folder twice: a link may lead back to where it lies.

    Args:
        tops: folders that will be looked into, and others that nothing is wanted from.

    Attributes:
        left_out: numbers of other files, by the ending of their names.
        again: number of links that were not followed, since their folder is walked anyway.
    """

    def __init__(self, tops: Iterable[Path]) -> None:
        self.left_out: Counter[str] = Counter()
        self.again = 0
        self._walked = {os.path.realpath(top) for top in tops}

    def image_files(self, folder: Path) -> list[Path]:
        """Images below one of the folders."""

        def fail(error: OSError) -> None:
            raise error  # a folder that cannot be read must not be left out without a word

        images = []
        for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            visible = (os.path.join(top, name) for name in folders if not _is_hidden(name))
            by_links = sorted(visible, key=lambda path: (os.path.islink(path), path))
            folders[:] = [os.path.basename(path) for path in by_links if self._is_new(path)]
            for name in names:
                if name.startswith("."):
                    continue
                lower = name.lower()
                if lower.endswith(SUFFIXES):
                    images.append(Path(top, name))
                elif (
                    not lower.endswith(_CARRIED_SUFFIXES)
                    and lower not in _CARRIED_NAMES
                    and os.path.isfile(os.path.join(top, name))
                ):
                    self.left_out[Path(lower).suffix] += 1
        return images

    def _is_new(self, path: str) -> bool:
        real = os.path.realpath(path)
        self.again += real in self._walked
        if real in self._walked:
            return False
        self._walked.add(real)
        return True
