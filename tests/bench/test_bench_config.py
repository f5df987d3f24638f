"""What is asked for: faults, defaults, and the command that asks for it again."""

import pytest

from densely.bench.config import BenchConfig
from densely.errors import ConfigError


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        BenchConfig(net="d3l", batch=0, rounds=0, output="")  # type: ignore[arg-type]
    for part in ("net='d3l': must be one of all, densenet121", "batch=0", "rounds=0", "output="):
        assert part in str(found.value)


def test_more_threads_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert BenchConfig(threads=4).threads == 4
    with pytest.raises(ConfigError, match="threads=5: must be at most 4, the processors here"):
        BenchConfig(threads=5)


def test_a_look_has_other_defaults_and_other_files() -> None:
    look = BenchConfig.starting_from(quick=True)
    assert (look.rounds, look.steps, look.batch, look.peak_memory) == (1, 1, 2, False)
    assert look.file_stem("cpu") != BenchConfig().file_stem("cpu")


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (BenchConfig(), "densely bench"),
        (
            BenchConfig(net="d2l", rounds=3, depth=False, output="/tmp/x"),
            "densely bench --net d2l --no-depth --rounds 3",
        ),
        (BenchConfig.starting_from(quick=True), "densely bench --quick"),
    ],
)
def test_the_command_says_what_differs_from_the_defaults(config: BenchConfig, command: str) -> None:
    assert config.command() == command
