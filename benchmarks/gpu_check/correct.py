"""Stage `correct`: every step and every whole network against float64, beside plain eager PyTorch.

Each is run twice from memory full of NaN, and must give the same bits; the fused code must be what
ran. Then what is captured in CUDA graphs against the same thing launched kernel by kernel.

Values that fall on the other side of ReLU than in float64, or another of two values that are
nearly the maximum of a window, move gradients further than rounding does, here or in plain PyTorch.
In 16 bits there are so many that they are what is compared. In float32 there would be a handful, so
norms get biases there which leave no value near zero, and few images. Where the bound is broken all
the same, numbers are drawn anew: what is wrong is so in every draw, and their count is kept.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.forward import Forward
from densely.fused import backend, kernels, restore
from densely.fused.plain import Conv, FirstConv, Norm
from densely.runtime import Runtime
from gpu_check import pictures, steps
from gpu_check.clearance import batch_norms, clear_norms, clear_of_zero
from gpu_check.distance import FACTOR, Distance, compare
from gpu_check.setting import CheckedNet, Findings, Setting, in_a_line
from gpu_check.steps import Outcome, StepCase
from gpu_check.training import batch_for, step_for

T = TypeVar("T")

BATCH = 32
#: Of the maps of a step in 16 bits: of fewer a handful on ReLU's other side would decide.
LEAST_ROWS = 4096
#: In float32: of few rows libraries add up products in parts, which is nearer than one sum is.
LEAST_ROWS_FLOAT32 = 2048
#: Images of a step and of a whole network in float32.
BATCH_FLOAT32, BATCH_FLOAT32_NET = 2, 8
DRAWS = 4
MODES = ("train", "eval")
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "f64"}
HEADING = f"{'case':18} {'dtype':5} {'mode':5} {'fused':>8} {'plain':>8}  ok   worst result"


def run(setting: Setting) -> int:
    """Run the stage; 0 if all is right."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    dtypes = [d for d in setting.dtypes if d != torch.float16 or not setting.smoke]
    with setting.turns.among_others(), setting.forced_kernels() as name:
        findings = Findings(setting, "correct", kernels=name, bound="1.5 times plain eager")
        print(f"correct: kernels {name}; {findings.facts['environment']['device_name']}")
        table = setting.out / "correct.txt"
        table.write_text(HEADING + "\n", encoding="utf-8")
        todo: list[Callable[[], dict[str, Any]]] = []
        for dtype in dtypes:
            for net in setting.nets:
                todo += [
                    _bound_step(setting, case, dtype, mode)
                    for case in steps.cases(net)
                    for mode in MODES
                ]
            todo += [_bound_net(setting, net, dtype) for net in setting.nets]
            if dtype == dtypes[0]:
                todo += [_bound_capture(setting, net) for net in setting.nets]
                todo += [_bound_forward(setting, net, m) for net in setting.nets for m in MODES]
        for i, work in enumerate(todo):
            if setting.left_s() < 0:
                findings.facts["left_out"] = len(todo) - i
                print(f"out of time: {len(todo) - i} of {len(todo)} checks left out")
                break
            findings.add(work())
            line = _line(findings.rows[-1])
            with table.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if not findings.rows[-1]["ok"]:
                print(line, flush=True)
        findings.flush()
    _print_summary(findings.rows)
    where = f"{findings.facts['environment']['device_name']}: distance from float64"
    pictures.draw(pictures.draw_distances, findings.rows, setting.out / "correct.png", where)
    wrong = [row for row in findings.rows if not row["ok"]]
    return 1 if wrong or "left_out" in findings.facts else 0


def _bound_step(
    setting: Setting, case: StepCase, dtype: torch.dtype, mode: str
) -> Callable[[], dict[str, Any]]:
    what = {"case": case.name, "dtype": SHORT[dtype], "mode": mode}
    check = partial(_check_step, setting, case, dtype, mode == "train")
    return lambda: _checked(what, _drawn(check))


def _bound_net(
    setting: Setting, net: CheckedNet, dtype: torch.dtype
) -> Callable[[], dict[str, Any]]:
    what = {"case": f"{net.name} whole net", "dtype": SHORT[dtype], "mode": "train"}
    return lambda: _checked(what, _drawn(partial(_check_net, setting, net, dtype)))


def _drawn(check: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """A check of random numbers, again with others where they break a bound."""

    def check_some() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for draw in range(DRAWS):
            found = check() | {"draws": draw + 1}
            if found["ok"] or not found["same_bits"] or "problem" in found:
                break
        return found

    return check_some


def _bound_capture(setting: Setting, net: CheckedNet) -> Callable[[], dict[str, Any]]:
    what = {"case": f"{net.name} captured", "dtype": "bf16", "mode": "train"}
    return lambda: _checked(what, lambda: _check_capture(setting, net))


def _bound_forward(setting: Setting, net: CheckedNet, mode: str) -> Callable[[], dict[str, Any]]:
    what = {"case": f"{net.name} forward", "dtype": "bf16", "mode": mode}
    return lambda: _checked(what, lambda: _check_forward(setting, net, mode == "train"))


def _checked(what: dict[str, Any], check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of the findings; an exception is one, and stops no other check."""
    begin = time.monotonic()
    try:
        found = check()
    except Exception as error:
        found = {"ok": False, "error": in_a_line(error)}
    return what | found | {"seconds": round(time.monotonic() - begin, 2)}


def _check_step(
    setting: Setting, case: StepCase, dtype: torch.dtype, training: bool
) -> dict[str, Any]:
    device, batch = setting.device, max(BATCH, -(-LEAST_ROWS // case.size**2))
    if dtype == torch.float32:
        batch = max(BATCH_FLOAT32, -(-LEAST_ROWS_FLOAT32 // case.size**2))
    if setting.smoke:
        batch = 4
    generator = torch.Generator(device)
    generator.seed()  # other numbers each time
    operands = case.make(generator, training)
    x = steps.images_like(case, batch, generator).to(dtype)
    if dtype == torch.float32:
        _clear(case, x, operands)
    with torch.no_grad(), _autocast(device, dtype):
        like = case.plain(x, *steps.mapped(operands, torch.clone))
    upstream = torch.empty_like(like, dtype=dtype).normal_(generator=generator)

    counted = case.kind
    if case.reads_images and not kernels.makes_image_stem(x, dtype, operands[0].weight):
        counted = "stem"  # the convolution by itself
    before = backend.fused_calls[counted]
    given, how = (x, operands, upstream), (not case.reads_images, training)
    runs = []
    for _ in range(2):
        _poison(device)
        runs.append(steps.outcome(case.fused, *given, _autocast(device, dtype), *how))
    ran_fused = backend.fused_calls[counted] == before + (2 if training else 4)
    plain = steps.outcome(case.plain, *given, _autocast(device, dtype), *how)
    exact = steps.outcome(
        case.plain,
        x.double(),
        steps.mapped(operands, _double),
        upstream.double(),
        _autocast(device, torch.float64),
        *how,
    )
    problem = None
    if not ran_fused:
        with _autocast(device, dtype):
            convs = _of(Conv, operands) + _of(FirstConv, operands)
            why = backend.obstacle(x, _of(Norm, operands), convs)
        problem = f"ran plain: {why}"
    return _verdict(compare(runs[0], plain, exact, whole_kinds=False), _same_bits(*runs), problem)


def _clear(case: StepCase, x: Tensor, operands: tuple[Any, ...]) -> None:
    """Move the biases of a step's norms so that no value is near zero behind them."""
    exact = steps.mapped(operands, lambda tensor: _double(tensor).clone())
    with clear_of_zero():
        case.plain(x.double(), *exact)
    for (name, tensor), (_, moved) in zip(steps.named(operands), steps.named(exact), strict=True):
        if name.endswith("norm.bias"):
            tensor.copy_(moved)


def _check_net(setting: Setting, net: CheckedNet, dtype: torch.dtype) -> dict[str, Any]:
    device, batch = setting.device, BATCH_FLOAT32_NET if dtype == torch.float32 else BATCH
    if setting.smoke:
        batch = 4
    runtime = Runtime(device, "float32", "channels_last")
    fused = runtime.place(net.build()).train()
    torch.seed()
    with torch.no_grad():
        for norm in batch_norms(fused):
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.1)
    shape = (batch, net.in_channels, net.image_size, net.image_size)
    images = runtime.layout(torch.randn(shape, device=device))
    labels = torch.randint(0, net.num_classes, (batch,), device=device)
    if dtype == torch.float32:
        clear_norms(fused, images)
    plain = copy.deepcopy(fused)
    restore(plain)

    before = backend.fused_calls.copy()
    runs = []
    for _ in range(2):
        _poison(device)
        runs.append(_net_outcome(copy.deepcopy(fused), images, labels, _autocast(device, dtype)))
    grown = backend.fused_calls - before
    expected = {case.kind for case in steps.cases(net)}
    first: Any = next(iter(fused.features.children()))  # type: ignore[union-attr]
    made_again = kernels.makes_image_stem(images, dtype, first.weight)
    expected.discard("stem" if made_again else "image stem")
    plain_found = _net_outcome(copy.deepcopy(plain), images, labels, _autocast(device, dtype))
    exact = _net_outcome(plain.double(), images.double(), labels, _autocast(device, torch.float64))
    return _verdict(
        compare(runs[0], plain_found, exact, whole_kinds=True),
        _same_bits(*runs),
        f"ran plain: {', '.join(expected - set(grown))}" if expected - set(grown) else None,
    ) | {"fused_calls": dict(grown)}


def _net_outcome(
    model: nn.Module, images: Tensor, labels: Tensor, autocast: AbstractContextManager[object]
) -> Outcome:
    with autocast:
        logits = model(images)
    wide = logits.double() if images.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide, labels) * 256  # so that float16 has gradients at all
    loss.backward()  # type: ignore[no-untyped-call]
    found = {"output": logits.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[f"gradient of {name}"] = parameter.grad
    return found | dict(model.named_buffers())


def _check_capture(setting: Setting, net: CheckedNet) -> dict[str, Any]:
    """Learn some steps by a graph and without: how far apart they end, over how far they went."""
    runtime, count = setting.runtime, 4 if setting.smoke else BATCH
    batches = [batch_for(net, runtime, count) for _ in range(4)]
    ends, captured = [], False
    for capture in (True, False):
        model = runtime.place(net.build()).train()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        step = step_for(model, runtime, *batches[0], captured=capture, lr=1 / 64)
        captured |= step.captured
        for rate, batch in zip((1 / 64, 1 / 64, 1 / 128, 1 / 32), batches, strict=True):
            step.optimizer.param_groups[0]["lr"] = rate
            step(*batch)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
        statistics = torch.cat([b.flatten().float() for b in model.buffers()])
        ends.append(
            torch.cat([statistics, step.loss_sum.float()[None], step.correct.float()[None]])
        )
    distances = [
        Distance(kind, kind, float((graph - eager).norm() / eager.norm()), 0.0, 0.05)
        for kind, graph, eager in (("weights", ends[0], ends[2]), ("statistics", ends[1], ends[3]))
    ]
    why = None if captured or setting.smoke else "was not captured: see the log"
    return _verdict(distances, torch.equal(ends[0], ends[2]), why, needs_same_bits=False)


def _check_forward(setting: Setting, net: CheckedNet, training: bool) -> dict[str, Any]:
    """Batches of several sizes by `Forward` and by the model itself, which share their weights."""
    runtime, batch = setting.runtime, 4 if setting.smoke else BATCH
    model = runtime.place(net.build())
    forward = Forward(model, runtime, training=training)
    distances, same = [], True
    for turn, count in enumerate((batch, batch - 1, batch, 2, 2, batch)):
        shape = (count, net.in_channels, net.image_size, net.image_size)
        images = runtime.layout(torch.randn(shape, device=runtime.device))
        found = forward(images)
        with torch.no_grad(), runtime.autocast():
            expected = model.train(training)(images).float()
        kind = f"output {turn}"
        distance = float((found - expected).norm() / expected.norm())
        distances.append(Distance(kind, f"{count} images", distance, 0.0, 0.05))
        same = same and torch.equal(found, expected)
    replayed = forward.records and forward.recorded_sizes
    why = None if replayed or setting.smoke else "was not recorded: see the log"
    return _verdict(distances, same, why, needs_same_bits=False)


def _verdict(
    distances: list[Distance], same_bits: bool, problem: str | None, needs_same_bits: bool = True
) -> dict[str, Any]:
    worst = max(distances, key=lambda distance: distance.share)
    found: dict[str, Any] = {
        "ok": all(d.ok for d in distances)
        and problem is None
        and (same_bits or not needs_same_bits),
        "same_bits": same_bits,
        "worst": {"kind": worst.kind} | worst.to_dict(),
        "kinds": {distance.kind: distance.to_dict() for distance in distances},
    }
    return found if problem is None else found | {"problem": problem}


def _of(kind: type[T], value: Any) -> list[T]:
    """All parts of that type in a nest of tuples."""
    if isinstance(value, kind):
        return [value]
    return [x for part in value for x in _of(kind, part)] if isinstance(value, tuple) else []


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)


def _same_bits(one: Outcome, other: Outcome) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def _poison(device: torch.device) -> None:
    """Fill the memory that the next allocations will get with NaN: what nobody writes shows."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    large = torch.full((2**30,), float("nan"), device=device)
    small = [torch.full((2**16,), float("nan"), device=device) for _ in range(64)]
    del large, small


def _line(row: dict[str, Any]) -> str:
    start = f"{row['case']:18} {row['dtype']:5} {row['mode']:5}"
    if "error" in row:
        return f"{start} FAILED {row['error']}"
    worst = row["worst"]
    notes = [f"{worst['kind']} ({worst['worst']})"]
    notes += [] if row["same_bits"] else ["other bits the second time"]
    notes += [row["problem"]] if "problem" in row else []
    ok = "ok " if row["ok"] else "BAD"
    return f"{start} {worst['fused']:8.2g} {worst['plain']:8.2g}  {ok}  {'; '.join(notes)}"


def _print_summary(rows: list[dict[str, Any]]) -> None:
    """A line a case: fused over plain distance at the worst result, each dtype and mode."""
    columns = list(dict.fromkeys(f"{row['dtype']} {row['mode']}" for row in rows))
    print(f"\nfused distance over plain distance, at the result nearest to its bound, {FACTOR}")
    print("(~: both no further from the exact result than rounding, 5e-7 in float32)")
    print(f"{'case':18}" + "".join(f"{column:>12}" for column in columns))
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {f"{row['dtype']} {row['mode']}": _cell(row) for row in rows if row["case"] == case}
        print(f"{case:18}" + "".join(f"{cells.get(column, ''):>12}" for column in columns))
    wrong = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} checks, {wrong} failed" if wrong else f"{len(rows)} checks, all ok")


def _cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "error"
    worst = row["worst"]
    ratio = f"{worst['fused'] / worst['plain']:.2f}" if worst["plain"] else f"{worst['fused']:.0e}"
    by_rounding = row["ok"] and worst["fused"] > FACTOR * worst["plain"] > 0
    return ratio + ("~" if by_rounding else "" if row["ok"] else " BAD")
