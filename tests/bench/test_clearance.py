"""Float32 is compared where no ReLU's input is near zero: the operands that see to it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.fused import restore

pytestmark = pytest.mark.usefixtures("gpu_check")


def test_zero_comes_into_the_widest_gap_nearby() -> None:
    from gpu_check.clearance import shift_to_gap

    values = [
        [0.07, -0.05, 0.01, 0.0, 5.0, -9.0],  # from 0.01 to 0.07
        [3.0, 1.0, 1.0, 9.0, 8.0, 2.0],  # zero is far from all
        [0.0, 0.0, 0.0, 0.0, 2.0, 2.0],  # up from 0, or down
        [-3.0, -2.0, -1.0, -0.04, -0.04, -5.0],  # up from -0.04
    ]
    shift = shift_to_gap(torch.tensor(values).double())
    assert shift[[0, 1, 3]].tolist() == pytest.approx([-0.04, 0.0, -0.06])
    assert abs(float(shift[2])) == pytest.approx(0.1)
    many = torch.randn(20, 5000, dtype=torch.float64)
    shift = shift_to_gap(many)
    assert shift.abs().max() <= 0.1
    assert (many + shift[:, None]).abs().amin(dim=1).min() > 1e-4
    assert many.abs().amin(dim=1).min() < 1e-4


def test_no_norm_of_a_network_gives_values_near_zero() -> None:
    from gpu_check.clearance import clear_of_zero

    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.ReLU(), convs[1], nn.BatchNorm2d(8))
    images = torch.randn(16, 3, 12, 12)
    near: list[float] = []

    def note(_module: nn.Module, _given: object, y: Tensor) -> None:
        near.append(float(y.detach().abs().amin()))

    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(note)
    model.double()
    model(images.double())
    batch_norm = F.batch_norm
    with clear_of_zero():
        made = model(images.double())
    assert F.batch_norm is batch_norm
    model.float()
    again = model(images)
    before, during, after = near[:2], near[2:4], near[4:]
    assert max(before) < 2e-4 < 1e-3 < min(during)
    assert after == pytest.approx(during, abs=1e-5)
    torch.testing.assert_close(again.double(), made, rtol=0, atol=1e-5)


def test_a_networks_own_biases_are_moved() -> None:
    from gpu_check.clearance import batch_norms, clear_norms
    from gpu_check.setting import NETS

    model = NETS["bc"].shrunk().build().train()
    images = torch.randn(4, 3, 16, 16)
    near: list[float] = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clear_norms(model, images)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {name for name in before if name.endswith("bias")}
    assert len(changed) == len(batch_norms(model))
    plain = copy.deepcopy(model)
    restore(plain)
    for norm in batch_norms(plain):
        norm.register_forward_hook(lambda _m, _x, y: near.append(float(y.detach().abs().amin())))
    plain(images)
    assert len(near) == len(batch_norms(model))
    assert min(near) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_moves_them_in_float32_alone(
    dtype: torch.dtype, setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import correct, steps

    given = setting("bc")
    (net,) = given.nets
    moved: list[str] = []
    monkeypatch.setattr(correct, "_clear", lambda case, *_: moved.append(case.name))
    monkeypatch.setattr(correct, "clear_norms", lambda *_: moved.append("net"))
    case = next(iter(steps.cases(net)))
    correct._check_step(given, case, dtype, True)
    correct._check_net(given, net, dtype)
    assert moved == ([case.name, "net"] if dtype == torch.float32 else [])


def test_what_breaks_a_bound_is_drawn_anew() -> None:
    from gpu_check.correct import DRAWS, _drawn

    def check(*found: dict[str, object]) -> tuple[bool, int]:
        left = [{"ok": False, "same_bits": True} | one for one in found]
        result = _drawn(lambda: left.pop(0))()
        return result["ok"], result["draws"]

    assert check({"ok": True}) == (True, 1)
    assert check({}, {}, {"ok": True}) == (True, 3)
    assert check(*[{}] * (DRAWS + 1)) == (False, DRAWS)
    assert check({"same_bits": False}, {"ok": True}) == (False, 1)
    assert check({"problem": "ran plain"}, {"ok": True}) == (False, 1)


def test_float32_gradients_are_compared_to_the_last_digits() -> None:
    """Without it a value in some thousands opens another ReLU, which takes 1e-3 of a gradient."""
    from gpu_check import correct, steps
    from gpu_check.distance import compare
    from gpu_check.setting import NETS

    case = next(case for case in steps.cases(NETS["bc"]) if case.name == "bc block 2")
    context = torch.autocast("cpu", enabled=False)
    far = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        operands = case.make(generator, True)
        x = steps.images_like(case, 2, generator)
        correct._clear(case, x, operands)
        upstream = torch.randn(2, case.channels + 16 * 12, case.size, case.size)
        plain = steps.outcome(case.plain, x, operands, upstream, context, True, True)
        exact = steps.outcome(
            case.plain,
            x.double(),
            steps.mapped(operands, correct._double),
            upstream.double(),
            context,
            True,
            True,
        )
        far += [d.fused for d in compare(plain, plain, exact, whole_kinds=False)]
    assert max(far) < 2e-5
