"""Label errors: confident learning, written out image by image, and errors that were planted."""

import torch
from torch import Tensor

from densely.evaluation.label_errors import likely_label_errors


def by_the_paper(probabilities: list[list[float]], labels: list[int]) -> list[int]:
    """Equations 1 and 2 but for labels that are likeliest themselves; the order of the margins."""
    classes = range(len(probabilities[0]))
    thresholds = {}
    for k in set(labels):
        own = [p[k] for p, label in zip(probabilities, labels, strict=True) if label == k]
        thresholds[k] = sum(own) / len(own)
    margins = {}
    for i, (p, label) in enumerate(zip(probabilities, labels, strict=True)):
        reached = [k for k in classes if k in thresholds and p[k] >= thresholds[k]]
        if reached and max(reached, key=lambda k: p[k]) != label:
            margins[i] = p[label] - max(p[k] for k in classes if k != label)
    return sorted((i for i in margins if margins[i] < 0), key=lambda i: margins[i])


def world(images: int, classes: int, seed: int, sureness: float = 4) -> tuple[Tensor, Tensor]:
    """Probabilities of a fair network, and the true classes."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(images), truth] += sureness
    return logits.softmax(dim=1), truth


def test_it_finds_what_the_paper_says() -> None:
    for seed in range(5):
        probabilities, labels = world(120, 5, seed)
        generator = torch.Generator().manual_seed(seed)
        labels = labels.where(torch.rand(120, generator=generator) > 0.3, (labels * 2) % 4)
        assert 4 in labels
        found = likely_label_errors(probabilities, labels)
        assert found == by_the_paper(probabilities.tolist(), labels.tolist())
        assert len(found) > 10
        labels = labels.clamp(max=3)  # a class without images
        found = likely_label_errors(probabilities, labels)
        assert found == by_the_paper(probabilities.tolist(), labels.tolist())


def test_most_planted_errors_are_found() -> None:
    probabilities, truth = world(2000, 10, seed=7, sureness=6)
    planted = torch.randperm(2000, generator=torch.Generator().manual_seed(8))[:100]
    labels = truth.clone()
    labels[planted] = (labels[planted] + 3) % 10
    found = likely_label_errors(probabilities, labels)
    assert all(type(i) is int for i in found)
    assert len(found) > 75
    assert len(set(found) & set(planted.tolist())) > 0.95 * len(found)


def test_none_is_found_where_the_network_agrees() -> None:
    probabilities, _ = world(500, 6, seed=1)
    assert likely_label_errors(probabilities, probabilities.argmax(dim=1)) == []
    assert likely_label_errors(torch.eye(3), torch.arange(3)) == []


def test_the_likeliest_comes_first() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.02, 0.98], [0.3, 0.7]])
    # Thresholds: (0.9 + 0.2 + 0.02) / 3 = 0.37 and (0.45 + 0.7) / 2 = 0.575.
    assert likely_label_errors(probabilities, torch.tensor([0, 0, 1, 0, 1])) == [3, 1, 2]


def test_a_label_that_is_the_likeliest_is_in_no_doubt() -> None:
    """Though a rare class, of which little is expected, reaches its threshold too."""
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.9, 0.1]])
    # Thresholds: (0.9 + 0.8 + 0.6) / 3 = 0.77 and 0.1, so that image 2 belongs to the second class.
    assert likely_label_errors(probabilities, torch.tensor([0, 0, 0, 1])) == [3]


def test_the_likeliest_class_does_not_count_below_its_threshold() -> None:
    """Image 4 is called b by a hair; whoever is b is called so far more surely."""
    probabilities = torch.tensor(
        [[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.1, 0.9], [0.45, 0.55]], dtype=torch.float64
    )
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert likely_label_errors(probabilities, labels) == []


def test_equal_probabilities_reach_their_own_mean() -> None:
    """The mean of three times 0.8 is above 0.8 in floating point."""
    assert sum([0.8] * 3) / 3 > 0.8
    probabilities = torch.tensor([[0.8, 0.2]] * 4 + [[0.0, 1.0]], dtype=torch.float64)
    assert likely_label_errors(probabilities, torch.tensor([0, 0, 0, 1, 1])) == [3]


def test_a_tie_with_the_label_is_no_error() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert likely_label_errors(probabilities, torch.tensor([0, 1])) == []
