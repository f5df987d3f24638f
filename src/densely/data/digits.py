"""The embedded data set: scikit-learn's `digits`, 1,797 real handwritten digits of 8x8 pixels.

From the UCI machine learning repository (Alpaydin and Kaynak, 1998). It needs no download.
"""

import torch

from densely.data.dataset import ImageSet, Splits, stratified_split

TEST_IMAGES = 360


def load_digits(split_seed: int) -> Splits:
    """Read the digits and set 360 of them aside for testing, equal shares of each class."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = torch.from_numpy(digits.images)[:, None] / 16 * 255  # 17 shades, 0 to 16
    classes = tuple(str(name) for name in digits.target_names)
    whole = ImageSet(
        grey.round().to(torch.uint8), torch.from_numpy(digits.target).to(torch.int64), classes
    )
    train, test = stratified_split(whole.labels, classes, TEST_IMAGES, split_seed, "test")
    return Splits("digits", whole.subset(train), whole.subset(test))
