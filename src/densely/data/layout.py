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
        repeated: number of links that were not followed, to what is read anyway.
    """

    path: Path
    files: dict[str, list[Path]]
    left_out: Counter[str]
    beside: int = 0
    repeated: int = 0

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
    roots = [os.path.realpath(path) for path in paths.values()]
    if len(set(roots)) < len(roots):
        names = " and ".join(f"{path.name}/" for path in paths.values())
        raise DataError(f"{folder}: of {names} one is a link to another")
    return {split: list_part(path, roots) for split, path in paths.items()}


def has_splits(folder: Path) -> bool:
    """Whether a folder is laid out by splits, and not by classes.

    "Train" and "training" may be classes among others, if nothing beside them is another split.
    """
    train = _folders_of(folder, "train")
    beside = _folders_of(folder, "test") or _folders_of(folder, "val")
    return any(path.name == "train" for path in train) or bool(train and beside)


def list_part(path: Path, roots: list[str] | None = None) -> Part:
    """List the image files below each class's folder.

    Args:
        path: the folder of the classes.
        roots: real paths that images are read from, of all splits, to which links are not
            followed; what links lead to is added. None for `path` alone.

    Raises:
        DataError: the folder of a class is a link to one of them.
    """
    walk = _Walk([os.path.realpath(path)] if roots is None else roots)
    entries = sorted(entry for entry in path.iterdir() if not _is_hidden(entry.name))
    beside = sum(entry.name.lower().endswith(SUFFIXES) and entry.is_file() for entry in entries)
    folders = [entry for entry in entries if entry.is_dir()]
    for folder in folders:
        if folder.is_symlink() and not walk.follow(str(folder)):
            raise DataError(f"{folder}: is a link to {folder.resolve()}, which is read anyway")
    files = {folder.name: sorted(walk.image_files(folder)) for folder in folders}
    return Part(path, files, walk.left_out, beside, walk.repeated)


def images_below(folder: Path) -> Part:
    """All image files of a folder, at any depth and of no class, in a fixed order.

    Raises:
        DataError: there are none.
    """
    walk = _Walk([os.path.realpath(folder)])
    part = Part(folder, {"": sorted(walk.image_files(folder))}, walk.left_out, 0, walk.repeated)
    if not part.images:
        raise part.error(f"no images in it ({', '.join(SUFFIXES)})")
    return part


def left_out_notes(parts: Iterable[Part]) -> tuple[str, ...]:
    """What was left out of these: images of no class, and one note on all other files."""
    parts = list(parts)
    notes = [
        f"{counted(part.beside, 'image')} left out: in {part.path.name}/, and in no class's folder"
        for part in parts
        if part.beside
    ]
    if repeated := sum(part.repeated for part in parts):
        notes.append(f"{counted(repeated, 'link')} left out: to what is read anyway")
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
    unread = [
        f"{entry.name}/" for entry in beside if not _is_hidden(entry.name) and _holds_images(entry)
    ]
    if not unread:
        return ()
    return (f"nothing is read from {', '.join(unread)}: splits are train/, test/ and val/",)


def _holds_images(folder: Path) -> bool:
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
    """Looks for images at any depth, and follows no link to what is read anyway.

    Such a link would make images count twice, under two classes or in two splits, or lead back to
    where it lies.

    Args:
        roots: real paths of folders that are read; what links to folders lead to is added.

    Attributes:
        left_out: numbers of other files, by the ending of their names.
        repeated: number of links that were not followed.
    """

    def __init__(self, roots: list[str]) -> None:
        self.left_out: Counter[str] = Counter()
        self.repeated = 0
        self._roots = roots
        self._files: set[str] = set()  # what links to files lead to

    def follow(self, link: str) -> bool:
        """Take up what a link leads to, unless that is read otherwise; say whether it was."""
        real = os.path.realpath(link)
        inside = any(f"{real}/".startswith(f"{root}/") for root in self._roots)
        above = any(f"{root}/".startswith(f"{real}/") for root in self._roots)
        if inside or above or real in self._files:
            return False
        if os.path.isdir(real):
            self._roots.append(real)
        else:
            self._files.add(real)
        return True

    def image_files(self, folder: Path) -> list[Path]:
        """Images below a folder."""

        def fail(error: OSError) -> None:
            raise error  # a folder that cannot be read must not be left out without a word

        images = []
        for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            visible = sorted(name for name in folders if not _is_hidden(name))
            folders[:] = [name for name in visible if self._is_read(os.path.join(top, name))]
            for name in names:
                if name.startswith("."):
                    continue
                lower = name.lower()
                if lower.endswith(SUFFIXES):
                    if self._is_read(os.path.join(top, name)):
                        images.append(Path(top, name))
                elif (
                    not lower.endswith(_CARRIED_SUFFIXES)
                    and lower not in _CARRIED_NAMES
                    and os.path.isfile(os.path.join(top, name))
                ):
                    self.left_out[Path(lower).suffix] += 1
        return images

    def _is_read(self, path: str) -> bool:
        if not os.path.islink(path) or not os.path.exists(path):  # a broken one is named later
            return True
        taken = self.follow(path)
        self.repeated += not taken
        return taken
