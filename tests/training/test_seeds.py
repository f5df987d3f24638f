"""Seeds of a run's random numbers, and which generators get them."""

import pytest
import torch
from on_gpu import DEVICES

from densely.training.seeds import generator_seed, seed_generators


def test_seeds_differ_between_epochs_steps_and_runs() -> None:
    seeds = {generator_seed(*n) for n in [(0,), (1,), (0, 1), (1, 0), (0, 1, 2), (0, 2, 1)]}
    assert len(seeds) == 6


@pytest.mark.parametrize("name", DEVICES)
def test_a_run_draws_what_it_would_if_all_devices_were_seeded(name: str) -> None:
    device = torch.device(name)
    torch.manual_seed(generator_seed(3, 1, 4))
    expected = torch.rand(5), torch.rand(5, device=device)
    torch.rand(2, device=device)
    generator = seed_generators(device, 3, 1, 4)
    drawn = torch.rand(5, generator=generator), torch.rand(5, device=device)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0)


def test_other_devices_are_seeded_as_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or seeded(seed))
    seed_generators(torch.device("mps"), 7)
    assert seeds == [generator_seed(7)]
