"""Folders of small images for the tests of how they are found and read."""

from pathlib import Path

from PIL import Image

from densely.data import ImageSet


def save(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    """A picture of one shade, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).convert(mode).save(path)
    return path


def save_classes(part: Path, classes: str = "ab", each: int = 1) -> Path:
    """Each image of another shade; a split to judge by has none of those to learn from."""
    first = 100 * (part.name.lower() in ("test", "val", "valid", "validation"))
    for i, name in enumerate(classes):
        for j in range(each):
            save(part / name / f"{j}.png", shade=first + i * each + j)
    return part


def shades(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()
