"""Shifted and mirrored views: each is a window of the padded image, drawn evenly."""

import pytest
import torch

from densely.data.augmentation import crop_and_flip


def views(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return crop_and_flip(images, torch.Generator().manual_seed(seed))


def all_windows(image: torch.Tensor, padding: int) -> list[torch.Tensor]:
    """Every view that there can be, cut out one by one."""
    channels, height, width = image.shape
    canvas = image.new_zeros(channels, height + 2 * padding, width + 2 * padding)
    canvas[:, padding : padding + height, padding : padding + width] = image
    shifts = range(2 * padding + 1)
    windows = [canvas[:, y : y + height, x : x + width] for y in shifts for x in shifts]
    return [*windows, *(window.flip(2) for window in windows)]


def test_each_view_is_a_window_of_the_padded_image_and_all_of_them_come() -> None:
    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    made = views(image.expand(2000, 3, 8, 8))
    windows = torch.stack(all_windows(image, 1))
    same = (made[:, None] == windows).flatten(2).all(2)
    assert same.any(1).all()
    assert len(windows) == 18
    share = same.double().mean(0)  # of 1/18 each
    assert (share - 1 / 18).abs().max() < 5 * (1 / 18 * 17 / 18 / 2000) ** 0.5


@pytest.mark.parametrize("side", [28, 32])
def test_images_of_28_and_32_pixels_are_padded_by_4(side: int) -> None:
    image = torch.ones(1, side, side)
    made = views(image.expand(500, 1, side, side))
    rows = made.amax(dim=(1, 3)).sum(1)  # rows that still show something
    assert (rows.min(), rows.max()) == (side - 4, side)


def test_views_are_the_seeds_and_differ_within_a_batch() -> None:
    image = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(1))
    made = views(image.expand(64, 1, 16, 12), seed=3)
    assert torch.equal(made, views(image.expand(64, 1, 16, 12), seed=3))
    assert not torch.equal(made, views(image.expand(64, 1, 16, 12), seed=4))
    assert not torch.equal(made[0], made[1]) or not torch.equal(made[0], made[2])
    assert made.is_contiguous(memory_format=torch.channels_last)
