"""The embedded data set: scikit-learn's `digits`, 1,797 real handwritten digits of 8x8 pixels.

From the UCI machine learning repository (Alpaydin and Kaynak, 1998). It needs no download.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from densely.data.dataset import ImageSet, Splits, stratified_split

TEST_IMAGES = 360


def load_digits(split_seed: int) -> Splits:
    """Read the digits and set 360 of them aside for testing, the classes in proportion."""
    rows = torch.from_numpy(_rows())
    grey = rows[:, None, :-1].view(-1, 1, 8, 8) / 16 * 255  # 17 shades, 0 to 16
    classes = tuple("0123456789")
    whole = ImageSet(grey.round().to(torch.uint8), rows[:, -1].to(torch.int64), classes)
    train, test = stratified_split(whole.labels, classes, TEST_IMAGES, split_seed, "test")
    return Splits("digits", whole.subset(train), whole.subset(test))


def _rows() -> np.ndarray:
    """64 shades and a label each.

    From scikit-learn's own file: importing scikit-learn for it takes longer than some epochs.
    """
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    return np.column_stack((digits.data, digits.target)).astype(np.uint8)
