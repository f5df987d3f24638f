"""Other views of the training images: shifted and mirrored, a whole batch at once on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from densely.runtime import send

#: The paper pads images of 32 pixels by 4 on each side.
PADDED_SHARE = 1 / 8


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, and mirror half of them left to right.

    Each image is padded with zeros, which are the mean colour of standardised images, and cut out
    again at a random place.

    Args:
        images: [N, C, H, W], as the network takes them.
        generator: on the CPU, so that a seed gives the same views on every device.

    Returns:
        [N, C, H, W], channels-last in memory.

    Source: Huang et al. (2017), section 4.1, "standard data augmentation" (C10+).
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = (max(1, round(side * PADDED_SHARE)) for side in (height, width))

    # On the CPU, also for a GPU, where each of these would be a launch beside the step.
    choices = (2 * top + 1, 2 * left + 1, 2)
    down, right, mirrored = (torch.randint(n, (count, 1), generator=generator) for n in choices)
    rows = torch.arange(height) + down
    columns = torch.arange(width) + right
    columns = torch.where(mirrored == 1, columns.flip(1), columns)
    places = send(torch.cat((torch.arange(count)[:, None], rows, columns), dim=1), device)
    image, rows, columns = torch.split(places, [1, height, width], dim=1)
    padded = F.pad(images, (left, left, top, top))
    return padded[image[:, :, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
