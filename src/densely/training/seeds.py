"""A run's random numbers go by (seed, epoch, step): where it was stopped makes no difference."""

import numpy as np
import torch


def generator_seed(*numbers: int) -> int:
    """A 64-bit seed from (seed, epoch, step, ...): different for different numbers."""
    # With their count before them, since a SeedSequence takes (1,) and (1, 0) for the same.
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def seed_generators(device: torch.device, *numbers: int) -> torch.Generator:
    """Seed what a run draws from, the device's generator and the CPU's; gives that of the CPU.

    `torch.manual_seed` asks for all kinds of devices there might be, 0.1 ms each time.
    """
    seed = generator_seed(*numbers)
    if device.type == "cuda":
        here = torch.cuda.current_device()  # before which there are no generators
        index = here if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type != "cpu":
        return torch.manual_seed(seed)
    return torch.default_generator.manual_seed(seed)
