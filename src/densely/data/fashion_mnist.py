"""Fashion-MNIST: 60,000 + 10,000 grey pictures of clothing, 28x28, from the official files.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms" (2017); files, digests and class names are those of its repository.
"""

from pathlib import Path

import torch

from densely.cache import cache_folder
from densely.data.dataset import ImageSet, Splits
from densely.data.download import digest_of, download, has_digest
from densely.data.idx import read_idx
from densely.data.locations import user_folders
from densely.errors import DataError

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
COUNT = {"train": 60_000, "t10k": 10_000}

MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
SUBFOLDER = "fashion-mnist"


def load_fashion_mnist(data_dir: Path | None = None) -> Splits:
    """Read Fashion-MNIST from where it is, else download it to the cache folder.

    Looked for in `data_dir`, the folder named by DENSELY_DATA, and the cache folder; in each of
    them directly, then under `fashion-mnist/`; gzipped as published, or unpacked.

    Raises:
        DataError: a file is missing, damaged, swapped or not the official one; it is named.
    """
    folder = _named_by_user(data_dir) or _downloaded()
    return Splits("fashion-mnist", _read(folder, "train"), _read(folder, "t10k"))


def complete_folder(top: Path) -> Path | None:
    """`top` or `top/fashion-mnist`, whichever holds all four files; their content is not read."""
    for folder in (top, top / SUBFOLDER):
        if all(_file(folder, name) for name in MD5):
            return folder
    return None


def _named_by_user(data_dir: Path | None) -> Path | None:
    for top in user_folders(data_dir):
        if folder := complete_folder(top):
            return folder
        for place in (top, top / SUBFOLDER):
            missing = [name for name in MD5 if _file(place, name) is None]
            if len(missing) < len(MD5):
                raise DataError(
                    f"{place}: Fashion-MNIST is not complete there, {', '.join(missing)} missing"
                )
    return None


def _downloaded() -> Path:
    """Folder in the cache with all four files, those missing or damaged fetched."""
    top = cache_folder()
    folder = complete_folder(top) or top / SUBFOLDER
    for name, md5 in MD5.items():
        path = _file(folder, name)
        if path is not None and (path.suffix != ".gz" or has_digest(path, f"md5:{md5}")):
            continue
        try:
            download([mirror + name for mirror in MIRRORS], folder / name, f"md5:{md5}")
        except (DataError, OSError) as error:
            problem = f"{path} is damaged" if path else "Fashion-MNIST is not here"
            raise DataError(
                f"{problem}, and {error}.\n"
                f"Put {', '.join(MD5)} into {folder}, or name their folder with --data-dir or "
                "DENSELY_DATA."
            ) from error
    return folder


def _file(folder: Path, name: str) -> Path | None:
    """Path of the published file `name` in `folder`, or else of the unpacked one."""
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.is_file():
            return path
    return None


def _read(folder: Path, part: str) -> ImageSet:
    count = COUNT[part]
    images = _values(folder, f"{part}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = _values(folder, f"{part}-labels-idx1-ubyte.gz", (count,))
    if int(labels.max()) >= len(CLASSES):
        raise DataError(
            f"{_file(folder, f'{part}-labels-idx1-ubyte.gz')}: has a label {int(labels.max())}, "
            "expected 0 to 9; is it Fashion-MNIST?"
        )
    return ImageSet(images[:, None], labels.to(torch.int64), CLASSES)


def _values(folder: Path, name: str, sizes: tuple[int, ...]) -> torch.Tensor:
    path = _file(folder, name)
    assert path is not None, name
    # The structure first: "swapped" or "truncated" says more than a digest that differs.
    values = torch.from_numpy(read_idx(path, sizes))
    if path.suffix == ".gz" and (found := digest_of(path, "md5")) != MD5[name]:
        raise DataError(
            f"{path}: not the official file (MD5 {found}, expected {MD5[name]}); fetch it "
            "again, or unpack it with gunzip if it is meant to differ"
        )
    return values
