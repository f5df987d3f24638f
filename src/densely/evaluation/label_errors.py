"""Images whose label may be wrong.

cleanlab is the library for this; its licence (AGPL) does not fit this package's.
"""

import numpy as np
from torch import Tensor


def likely_label_errors(probabilities: Tensor, labels: Tensor) -> list[int]:
    """Images that confidently belong to another class than their label says.

    The threshold of a class is the mean of its probability over the images labelled so. An image
    belongs to the likeliest of the classes whose probability reaches their threshold. It is listed
    where that class is not its label, unless its label is likelier than any other class all the
    same, as where the threshold of a rare class is low; the smaller p[label] - max of the others,
    the likelier its label is wrong.

    Args:
        probabilities: float [N, K], given by a network that did not learn from these images.
        labels: int64 [N].

    Returns:
        Indices of images, those first whose label is likeliest to be wrong.

    Source: Northcutt, Jiang, Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset
    Labels": equations 1 and 2 (off the diagonal of the confident joint), ranked by the normalised
    margin.
    """
    given = probabilities.detach().cpu().double().numpy()
    truth = labels.cpu().numpy()
    images, classes = given.shape
    own = given[np.arange(images), truth]
    supports = np.bincount(truth, minlength=classes)
    thresholds = np.bincount(truth, weights=own, minlength=classes) / np.maximum(supports, 1)
    thresholds[supports == 0] = np.inf  # nothing tells how sure the network is of such a class
    # The mean of equal numbers may lie above them by a rounding.
    confident = np.where(given >= thresholds - 1e-9, given, -np.inf)
    is_label = np.arange(classes) == truth[:, None]
    elsewhere = np.where(is_label, -np.inf, confident).max(axis=1)
    as_labelled = np.where(is_label, confident, -np.inf).max(axis=1)
    margin = own - np.where(is_label, -np.inf, given).max(axis=1)
    listed = ((elsewhere > as_labelled) & (margin < 0)).nonzero()[0]
    order: list[int] = listed[np.argsort(margin[listed], kind="stable")].tolist()
    return order
