"""Stage `speed`: densely beside plain PyTorch as it comes, tuned, captured and compiled.

Each variant is measured as soon as it is ready, the most wanted first; then all take turns. What
takes minutes to compile comes last, when the others have had theirs. Processes that share a GPU
wait for one another's compilers before a turn: give such variants a run of their own there.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from densely.bench import peers, plain_nets
from densely.bench.kept import kept_bytes
from densely.bench.trial import Trial
from densely.fused import backend
from densely.runtime import Runtime
from gpu_check import pictures
from gpu_check.setting import NETS, OUT_OF_TIME, CheckedNet, Findings, Setting, in_a_line
from gpu_check.training import batch_for, step_for

BATCH = 256
ROUNDS = 5
ROUND_S = 0.2
#: Modes of torch.compile that leave it to the caller to capture a whole step.
NO_GRAPHS = ("default", "max-autotune-no-cudagraphs")
#: What a variant's first measurement and turns may take; where less is left, none is begun.
RESERVE_S = 5.0
COMPILE_RESERVE_S = 75.0
#: Of what ran, and only while others may have been on the GPU.
NO_TURN = "ready, and had no turn"


@dataclass(frozen=True)
class Variant:
    """A way to run a network.

    Args:
        name: in tables.
        build: makes the network.
        memory_format: of images and weights.
        precision: of convolutions and products.
        ours: whether densely's fused code must be what runs.
        captured: as one CUDA graph.
        graphed: forward and backward a graph each, by `torch.cuda.make_graphed_callables`.
        compiled: mode of torch.compile; None for none.
        tuned: cuDNN tries its algorithms, and SGD is one kernel. Else PyTorch as it comes.
        kept: count what is kept for the backward pass.
    """

    name: str
    build: Callable[[], nn.Module]
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    ours: bool = False
    captured: bool = False
    graphed: bool = False
    compiled: str | None = None
    tuned: bool = True
    kept: bool = False


@dataclass
class Entrant:
    """A variant that is ready: its step, and the row of its figures."""

    variant: Variant
    row: dict[str, Any]
    step: Callable[[], object]
    steps: int = 1
    ms: list[float] = field(default_factory=list)


def run(setting: Setting) -> int:
    """Run the stage; 0 if nothing was left for want of time, and densely ran fused and captured."""
    with setting.forced_kernels() as kernels:
        whose = {net.name: peer_of(net).name for net in setting.nets}
        findings = Findings(setting, "speed", kernels=kernels, batch=batch_of(setting), peers=whose)
        print(f"speed: kernels {kernels}; {findings.facts['environment']['device_name']}")
        for mode, net, variants in _groups(setting):
            _compare(setting, findings, net, mode, variants)
            if net is setting.nets[-1]:
                _tell(setting, findings)  # what comes may be cut off
    if not findings.rows:
        print("nothing measured: none of --variants is one of these --modes and --compile")
        return 1
    wrong = any(row["ours"] and "error" in row for row in findings.rows)
    return (
        1 if wrong or any(row.get("gap") in (OUT_OF_TIME, NO_TURN) for row in findings.rows) else 0
    )


def _groups(setting: Setting) -> Iterator[tuple[str, CheckedNet, Sequence[Variant]]]:
    """What is measured in turns: each kind apart, or all of a net that are asked for by name."""
    for mode in setting.modes:
        compiled = setting.compile_modes if mode == "train" else ()
        kinds: list[Callable[[CheckedNet], Iterator[Variant]]] = [
            partial(_variants, mode=mode),
            *(partial(_compiled, mode=each) for each in compiled),
        ]
        if setting.variants:
            for net in setting.nets:
                every = {v.name: v for kind in kinds for v in kind(net)}
                yield mode, net, [v for name, v in every.items() if name in setting.variants]
            continue
        for kind in kinds:
            for net in setting.nets:
                yield mode, net, list(kind(net))


def _variants(net: CheckedNet, mode: str) -> Iterator[Variant]:
    """The most wanted first."""
    plain = peer_of(net).build
    yield Variant("densely captured", net.build, ours=True, captured=True)
    yield Variant("eager NHWC", plain, kept=True)
    if mode == "train":
        yield Variant("eager NCHW", plain, memory_format="contiguous")
    yield Variant("captured NHWC", plain, captured=True)
    yield Variant("densely eager", net.build, ours=True, kept=True)
    if mode == "train":
        # What a loop of one's own may do with a line.
        yield Variant("densely graphed callable", net.build, ours=True, graphed=True)
        yield Variant("checkpointed NHWC", _checkpointed(net), kept=True)
    yield Variant(
        "as shipped fp32 NCHW", plain, memory_format="contiguous", precision="float32", tuned=False
    )
    if net.name == "121":  # other packages have no other of these networks
        yield Variant("timm eager NHWC", peers.timm_densenet121)
        yield Variant("MONAI eager NHWC", peers.monai_densenet121)


def _compiled(net: CheckedNet, mode: str) -> Iterator[Variant]:
    """torch.compile of the best, beside the best of the others, which are there for the ratios."""
    plain = peer_of(net).build
    yield Variant("densely captured", net.build, ours=True, captured=True)
    yield Variant("captured NHWC", plain, captured=True)
    yield Variant(f"densely compiled {mode}", net.build, ours=True, compiled=mode)
    yield Variant(f"compiled {mode}", plain, compiled=mode)
    if mode in NO_GRAPHS:
        yield Variant(f"compiled {mode} captured", plain, compiled=mode, captured=True)


def names(compile_modes: Sequence[str]) -> list[str]:
    """Of all variants."""
    net = NETS["121"]
    compiled = [v for mode in compile_modes if mode for v in _compiled(net, mode)]
    return list(dict.fromkeys(v.name for v in [*_variants(net, "train"), *compiled]))


class Peer(NamedTuple):
    """Somebody else's network: whose, and what makes it."""

    name: str
    build: Callable[[], nn.Module]


def peer_of(net: CheckedNet) -> Peer:
    """The network of torchvision where it has it, else plain modules in a row."""
    if net.name == "d2l":
        return Peer("plain PyTorch", plain_nets.chapter_net)
    if net.name == "bc":
        return Peer("plain PyTorch", partial(plain_nets.bc_net, 4 + 6 * net.blocks[0]))
    try:
        peers.torchvision_module()
    except ImportError:
        missing = "densely with fused=False, as torchvision is missing"
        return Peer(missing, partial(net.build, fused=False))
    return Peer(f"torchvision {version('torchvision')}", peers.torchvision_densenet121)


def _checkpointed(net: CheckedNet) -> Callable[[], nn.Module]:
    if net.name == "d2l":
        return lambda: plain_nets.chapter_net(checkpointed=True)
    if net.name == "bc":
        return lambda: plain_nets.bc_net(4 + 6 * net.blocks[0], checkpointed=True)
    return lambda: peers.torchvision_densenet121(memory_efficient=True)


def _compare(
    setting: Setting, findings: Findings, net: CheckedNet, mode: str, variants: Sequence[Variant]
) -> None:
    """Measure each as soon as it is ready, then all in turns: those to be compiled join later."""
    entrants: list[Entrant] = []
    group = ", ".join(v.compiled for v in variants if v.compiled) or "eager"
    for compiled in (False, True):
        joining = [v for v in variants if (v.compiled is not None) is compiled]
        if not joining:
            continue
        with setting.turns.among_others():
            entrants += _prepared(setting, findings, net, mode, joining, group)
        if "ceilings" not in findings.facts and not setting.smoke:
            with setting.turns.alone():
                findings.facts["ceilings"] = ceilings(setting.device)
                _free(setting)
        for _ in range(1 if setting.smoke else ROUNDS):
            if setting.left_s() < RESERVE_S:
                break
            with setting.turns.alone():
                if setting.left_s() < RESERVE_S:  # others took it
                    break
                _round(setting, entrants)
            findings.flush()
    entrants.clear()
    if any(variant.compiled for variant in variants):
        torch.compiler.reset()
    _free(setting)


def _prepared(
    setting: Setting,
    findings: Findings,
    net: CheckedNet,
    mode: str,
    variants: Sequence[Variant],
    group: str,
) -> list[Entrant]:
    """Those of the variants that run, each with a first time."""
    entrants: list[Entrant] = []
    for variant in variants:
        row: dict[str, Any] = {
            "net": net.name,
            "mode": mode,
            "variant": variant.name,
            "ours": variant.ours,
            "group": group,
        }
        findings.add(row)
        compiles = variant.compiled and all(
            variant.compiled != entrant.variant.compiled for entrant in entrants
        )
        if setting.left_s() < (COMPILE_RESERVE_S if compiles else RESERVE_S):
            row["gap"] = OUT_OF_TIME
            findings.flush()
            continue
        begin = time.monotonic()
        try:
            entrants.append(_ready(setting, net, mode, variant, row))
            _turn(setting, entrants[-1])
        except Exception as error:  # one that fails must not stop the others
            if isinstance(error, ModuleNotFoundError) and not variant.ours:
                row["gap"] = f"{error.name} is not installed"
            else:
                row["error"] = in_a_line(error)
            entrants = [entrant for entrant in entrants if entrant.row is not row]
        row["ready_s"] = round(time.monotonic() - begin, 1)
        findings.flush()
        print(_progress(row), flush=True)
        _free(setting)
    return entrants


def _round(setting: Setting, entrants: list[Entrant]) -> None:
    """A turn of each; who fails takes part no more."""
    for entrant in list(entrants):
        try:
            _turn(setting, entrant)
        except Exception as error:  # as of memory, which they share
            entrant.row["error"] = in_a_line(error)
            entrants.remove(entrant)


def _ready(
    setting: Setting, net: CheckedNet, mode: str, variant: Variant, row: dict[str, Any]
) -> Entrant:
    """Build, take the memory figures, and warm up."""
    precision = "float32" if setting.smoke else variant.precision
    runtime = Runtime(setting.device, precision, variant.memory_format)
    torch.manual_seed(0)
    model = runtime.place(variant.build()).train(mode == "train")
    images, labels = batch_for(net, runtime, batch_of(setting))
    if variant.kept and mode == "train":
        kept = kept_bytes(Trial(model, runtime, images, labels))
        row["kept_mb_per_image"] = round(kept / len(images) / 1e6, 3)
    before = backend.fused_calls.total()
    runs: nn.Module = model
    if variant.compiled is not None:
        runs = torch.compile(model, mode=variant.compiled)  # type: ignore[assignment]
    if variant.graphed and setting.device.type == "cuda":
        with runtime.autocast(cache=False):
            torch.cuda.make_graphed_callables(model, (images,))  # changes its forward

    torch.backends.cudnn.benchmark = variant.tuned
    start = _memory_mark(setting)
    step: Callable[[], object]
    if mode == "train":
        training = step_for(
            runs, runtime, images, labels, captured=variant.captured, one_kernel=variant.tuned
        )
        row["captured"] = training.captured
        step = partial(training, images, labels)
    else:
        row["captured"] = variant.captured and runtime.device.type == "cuda"
        step = Trial(runs, runtime, images, labels, None, row["captured"], variant.tuned).step
    compiled_plain = variant.ours and variant.compiled and not _runs_our_operators(step)
    for _ in range(3):
        step()
    if start is not None:
        peak = torch.cuda.max_memory_allocated() - start
        row["peak_gb"] = round(peak / 1e9, 3)
    if variant.captured and not row["captured"] and not setting.smoke:
        row["error"] = "was not captured: see the log"
    not_counted = variant.ours and not variant.compiled and backend.fused_calls.total() == before
    if compiled_plain or not_counted:
        row["error"] = "densely ran plain PyTorch: see `correct`"
    seconds = _seconds(setting, step, 1)
    steps = 1 if setting.smoke else max(1, min(200, round(ROUND_S / seconds)))
    return Entrant(variant, row, step, steps)


def _runs_our_operators(step: Callable[[], object]) -> bool:
    """Whether a second step calls some, as compiled code does that is not counted.

    The first compiles, which is much to look through; a third may replay what the second records.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return any(event.key.startswith("densely::") for event in seen.key_averages())


def _turn(setting: Setting, entrant: Entrant) -> None:
    """Some steps in a row, timed as a whole; the row's figures are renewed."""
    torch.backends.cudnn.benchmark = entrant.variant.tuned
    entrant.ms.append(1000 * _seconds(setting, entrant.step, entrant.steps) / entrant.steps)
    if setting.turns.shared and len(entrant.ms) == 1:
        entrant.row |= {"gap": NO_TURN, "ms_beside_others": round(entrant.ms[0], 4)}
        return
    entrant.row.pop("gap", None)
    # Without the first, which was none of a round; the last ones beside all that take part.
    median = statistics.median(entrant.ms[1:][-ROUNDS:] or entrant.ms)
    entrant.row["step_ms"] = round(median, 4)
    entrant.row["images_per_s"] = round(1000 * batch_of(setting) / median, 1)
    entrant.row["step_ms_by_round"] = [round(ms, 4) for ms in entrant.ms]


def _seconds(setting: Setting, step: Callable[[], object], steps: int) -> float:
    if setting.smoke:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - begin
    return _seconds_on_gpu(step, steps)


def _seconds_on_gpu(work: Callable[[], object], times: int) -> float:
    """Between two events, so that the launches' own gaps count and Python's lead does not."""
    start, end = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _memory_mark(setting: Setting) -> int | None:
    if setting.smoke:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def ceilings(device: torch.device) -> dict[str, float]:
    """What this card reaches: bytes copied and bf16 products a second."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = {}
    for name, work, count in (
        ("copy_tb_per_s", lambda: target.copy_(source), 2 * source.nbytes / 1e12),
        ("bf16_tflop_per_s", lambda: torch.mm(a, b), 2 * 8192**3 / 1e12),
    ):
        seconds = [_seconds_on_gpu(work, 1) for _ in range(8)]
        found[name] = round(count / statistics.median(seconds[2:]), 2)
    return found


def batch_of(setting: Setting) -> int:
    """Images of a step."""
    return 4 if setting.smoke else BATCH


def _free(setting: Setting) -> None:
    gc.collect()
    if not setting.smoke:
        torch.cuda.empty_cache()


def _progress(row: dict[str, Any]) -> str:
    found = row.get("error") or row.get("gap") or f"{row['images_per_s']:,.0f} images/s"
    ready = f"(ready in {row['ready_s']} s)"
    return f"{row['net']:4} {row['mode']:9} {row['variant']:26} {found} {ready}"


def _tell(setting: Setting, findings: Findings) -> None:
    """All rows as a table, printed and kept, and as a picture."""
    table = _table(setting, findings.rows)
    print(f"\n{table}")
    (setting.out / "speed.txt").write_text(table + "\n", encoding="utf-8")
    where = f"{findings.facts['environment']['device_name']}, batch {batch_of(setting)}"
    pictures.draw(pictures.draw_speed, findings.rows, setting.out / "speed.png", where)


def _table(setting: Setting, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"batch {batch_of(setting)}; ratios are of images/s",
        f"{'net':4} {'mode':9} {'variant':26} {'ms/step':>8} {'images/s':>9} {'/eager':>6} "
        f"{'/captd':>6} {'/compd':>6} {'peak GB':>7} {'kept MB':>7}",
    ]
    for row in rows:
        head = f"{row['net']:4} {row['mode']:9} {row['variant']:26}"
        if "images_per_s" not in row:
            lines.append(f"{head} {row.get('error') or row.get('gap')}")
            continue
        ratios = "".join(
            f" {_ratio(row, _best(rows, row, kind)):>6}"
            for kind in ("eager", "captured", "compiled")
        )
        peak, kept = (str(row.get(name, "")) for name in ("peak_gb", "kept_mb_per_image"))
        lines.append(
            f"{head} {row['step_ms']:8.3f} {row['images_per_s']:9,.0f}{ratios} {peak:>7} {kept:>7}"
            + (f"  {row['error']}" if "error" in row else "")
        )
    return "\n".join(lines)


def _best(rows: Sequence[dict[str, Any]], row: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The fastest of the others of a kind: measured in turns with the row, if there is one."""
    others = [
        other
        for other in rows
        if not other["ours"]
        and (other["net"], other["mode"]) == (row["net"], row["mode"])
        and _kind(other) == kind
        and "images_per_s" in other
    ]
    beside = [other for other in others if other["group"] == row["group"]]
    return max(beside or others, key=lambda other: other["images_per_s"], default=None)


def _kind(row: dict[str, Any]) -> str:
    if row["variant"].startswith("compiled"):
        return "compiled"
    return "captured" if row["variant"].startswith("captured") else "eager"


def _ratio(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{row['images_per_s'] / other['images_per_s']:.2f}"
