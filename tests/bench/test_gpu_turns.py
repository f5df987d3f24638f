"""Processes that share a GPU take turns on it, and the stage that starts them."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


TWO = (torch.bfloat16, torch.float32)

pytestmark = pytest.mark.usefixtures("gpu_check")


def waits(lock: Any) -> tuple[threading.Thread, threading.Event]:
    """A thread that asks for a turn, and whether it has had one."""
    had = threading.Event()

    def ask() -> None:
        with lock():
            had.set()

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, had


def test_who_measures_is_alone(tmp_path: Path) -> None:
    from gpu_check.turns import Turns

    first, second, third = (Turns(tmp_path / "turns") for _ in range(3))
    with first.among_others():
        thread, had = waits(second.among_others)
        assert had.wait(10)  # at the same time
        thread, had = waits(third.alone)
        assert not had.wait(0.2)
    thread.join(10)
    assert had.is_set()
    for lock in (second.alone, second.among_others):
        with first.alone():
            thread, had = waits(lock)
            assert not had.wait(0.2)
        thread.join(10)
        assert had.is_set()


def test_who_names_no_file_waits_for_nobody() -> None:
    from gpu_check.turns import Turns

    with Turns().alone(), Turns().alone(), Turns().among_others():
        pass


def test_all_is_each_precision_and_each_network_then_bytes_and_kernels(
    setting: Callable[[], Any],
) -> None:
    from gpu_check import at_once, speed

    groups = [
        [job.folder for job in group] for group in at_once.jobs(setting("d2l", "bc", dtypes=TWO))
    ]
    assert groups == [
        ["correct-bfloat16", "correct-float32", "speed-d2l", "speed-bc"],
        ["compiled-d2l", "compiled-bc"], ["traffic"], ["kernels"],
    ]  # fmt: skip
    assert set(at_once.VARIANTS) <= set(speed.names(["default"]))


def test_the_variants_that_wait_for_a_gpu_are_there() -> None:
    from gpu_check import speed
    from results_gpu import WAITING

    known = speed.names(["max-autotune-no-cudagraphs", "reduce-overhead"])
    for stage in WAITING.values():
        _, _, words = stage.partition('--variants "')
        assert set(words.strip('"').split(",")) <= set(known)


@pytest.mark.parametrize("fails", ["", "speed-bc"])
def test_what_one_says_is_kept_and_what_fails_fails_all(
    fails: str,
    setting: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gpu_check import at_once

    popen, commands = subprocess.Popen, []

    def stand_in(command: list[str], **how: Any) -> Any:
        commands.append(command)
        code = int(Path(command[4]).name == fails)
        return popen([sys.executable, "-c", f"print('found'); raise SystemExit({code})"], **how)

    monkeypatch.setattr(at_once.subprocess, "Popen", stand_in)
    assert at_once.run(setting("d2l", "bc", dtypes=TWO)) == int(bool(fails))
    assert len(commands) == 8
    for command in commands:
        assert command[:3] == [sys.executable, "-m", "gpu_check"]
        assert "--smoke" in command
        assert command[command.index("--turns") + 1] == str(tmp_path / "turns")
        assert (Path(command[4]) / "log.txt").read_text() == "found\n"
    assert capsys.readouterr().out.count("found") == 8


def test_variants_are_made_ready_among_others_and_measured_alone(
    setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import speed

    given, now, seen = setting("d2l"), [""], []

    @contextmanager
    def turn(kind: str) -> Iterator[None]:
        now[0] = kind
        yield
        now[0] = ""

    monkeypatch.setattr(given.turns, "among_others", lambda: turn("among others"))
    monkeypatch.setattr(given.turns, "alone", lambda: turn("alone"))
    for name in ("_ready", "_turn"):
        real = getattr(speed, name)

        def noted(*args: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            seen.append((name, now[0]))
            return real(*args)

        monkeypatch.setattr(speed, name, noted)
    given.variants = ("densely captured", "eager NHWC")
    assert speed.run(given) == 0
    ready = [("_ready", "among others"), ("_turn", "among others")]
    assert seen == [*ready, *ready, ("_turn", "alone"), ("_turn", "alone")]


def test_what_is_compiled_joins_the_others_when_they_have_had_their_turns(
    setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import speed

    given, turns = setting("d2l", compile_modes=("default",)), []
    given.variants = ("densely captured", "compiled default", "captured NHWC")
    monkeypatch.setattr(torch, "compile", lambda model, mode: turns.append("compiler") or model)
    real = speed._round

    def noted(given: Any, entrants: list[Any]) -> None:
        turns.append([entrant.variant.name for entrant in entrants])
        real(given, entrants)

    monkeypatch.setattr(speed, "_round", noted)
    assert speed.run(given) == 0
    quick = ["densely captured", "captured NHWC"]
    assert turns == [quick, "compiler", [*quick, "compiled default"]]
    rows = json.loads((given.out / "speed.json").read_text())["rows"]
    assert [len(row["step_ms_by_round"]) for row in rows] == [3, 3, 2]  # a first time, and turns


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_code_without_the_fused_steps_is_seen(
    fused: bool, setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import speed
    from gpu_check.setting import CheckedNet

    given = setting("d2l", compile_modes=("default",), variants=("densely compiled default",))
    build = CheckedNet.build
    monkeypatch.setattr(CheckedNet, "build", lambda net: build(net, fused=fused))
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    assert speed.run(given) == int(not fused)
    (row,) = json.loads((given.out / "speed.json").read_text())["rows"]
    assert ("error" in row) is not fused


def test_who_had_no_turn_says_so(
    setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured beside others is no result."""
    from gpu_check import speed
    from gpu_check.turns import Turns

    shared = Turns(tmp_path / "turns")
    given = setting("d2l", variants=("densely captured",), turns=shared, budget_s=3.0)
    monkeypatch.setattr(speed, "RESERVE_S", 0.5)
    with Turns(tmp_path / "turns").among_others():
        thread = threading.Thread(target=lambda: codes.append(speed.run(given)))
        codes: list[int] = []
        thread.start()
        while given.left_s() > 0.2:
            time.sleep(0.1)
    thread.join(30)
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["gap"] == speed.NO_TURN
    assert row["ms_beside_others"] > 0
    assert "images_per_s" not in row
    assert codes == [1]


def test_correctness_is_checked_among_others(
    setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import correct

    given, kinds = setting(budget_s=-1.0), []

    @contextmanager
    def turn() -> Iterator[None]:
        kinds.append("in")
        yield
        kinds.append("out")

    monkeypatch.setattr(given.turns, "among_others", turn)
    monkeypatch.setattr(correct, "_checked", lambda *_: pytest.fail("out of time"))
    assert correct.run(given) == 1
    assert kinds == ["in", "out"]


def test_what_still_runs_is_ended_with_the_stage(
    setting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import at_once

    popen, made = subprocess.Popen, []

    def stand_in(_command: list[str], **how: Any) -> Any:
        seconds = 60 if made else 0
        made.append(popen([sys.executable, "-c", f"import time; time.sleep({seconds})"], **how))
        return made[-1]

    def interrupted(*_: object) -> None:
        raise RuntimeError("as by Ctrl-C")

    monkeypatch.setattr(at_once.subprocess, "Popen", stand_in)
    monkeypatch.setattr(at_once, "_tell", interrupted)
    with pytest.raises(RuntimeError):
        at_once.run(setting("d2l", "bc", dtypes=TWO))
    assert [process.wait(10) for process in made] == [0, -15, -15, -15]


@pytest.mark.slow
def test_all_runs_dry(tmp_path: Path) -> None:
    words = ["all", tmp_path, "--smoke", "--nets", "d2l", "--dtypes", "float32"]
    subprocess.run([sys.executable, "-m", "gpu_check", *words], cwd=BENCHMARKS, check=False)
    for folder in ("speed-d2l", "compiled-d2l"):
        rows = json.loads((tmp_path / folder / "speed.json").read_text())["rows"]
        assert len(rows) == 3
        assert all(row["step_ms"] > 0 for row in rows)
    rows = json.loads((tmp_path / "correct-float32" / "correct.json").read_text())["rows"]
    assert all(row["ok"] for row in rows)
    for name in ("traffic/traffic-account", "kernels/kernels"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
