"""A stem for other channels answers a grey picture as before."""

import pytest
import torch
import torch.nn.functional as F

from densely.weights import adapt_stem


@pytest.mark.parametrize("old", [1, 2, 3, 5])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 12])
def test_response_to_a_picture_with_like_channels_is_kept(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(4, old, 3, 3, dtype=torch.float64, generator=generator)
    grey = torch.randn(2, 1, 9, 9, dtype=torch.float64, generator=generator)
    adapted = adapt_stem(kernel, new)
    assert adapted.shape == (4, new, 3, 3)
    expected = F.conv2d(grey.expand(-1, old, -1, -1), kernel, padding=1)
    torch.testing.assert_close(F.conv2d(grey.expand(-1, new, -1, -1), adapted, padding=1), expected)


def test_every_old_channel_has_its_part() -> None:
    kernel = torch.tensor([[[1.0], [2.0], [4.0]]])
    assert adapt_stem(kernel, 1).flatten().tolist() == [7.0]
    assert adapt_stem(kernel, 2).flatten().tolist() == [5.0, 2.0]
    assert adapt_stem(kernel, 3) is kernel
    assert adapt_stem(kernel, 4).flatten().tolist() == [0.5, 2.0, 4.0, 0.5]
    assert adapt_stem(kernel, 6).flatten().tolist() == [0.5, 1.0, 2.0, 0.5, 1.0, 2.0]
