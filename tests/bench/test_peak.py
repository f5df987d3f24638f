"""The peak of a process of its own: what its steps add, and what it says when it fails."""

import json

import pytest
import torch
from tiny_nets import NET, entrants

from densely.bench import child, peak
from densely.bench.peak import ChildTask, peak_in_fresh_process, peak_resident_bytes
from densely.errors import TrainingError

TASK = ChildTask("bc_100_12", "plain net", "train", 1, "cpu", 1, "system")


def test_the_peak_of_a_fresh_process_is_that_of_its_steps() -> None:
    held = torch.ones(100_000_000)  # 400 MB, which the child must not begin with
    found = peak_in_fresh_process(TASK)
    assert 35e6 < found < 300e6  # 35 MB are kept for the backward pass of one image
    assert peak_resident_bytes() > held.nbytes


def test_the_child_prints_one_json_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "find", lambda *_: entrants([])[1])
    monkeypatch.setitem(child.NETS, "bc_100_12", NET)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr(child.sys, "argv", ["", json.dumps(vars(TASK))])
    child.main()
    assert json.loads(capsys.readouterr().out)["peak_bytes"] >= 0


def test_the_last_words_of_a_failed_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak.sys, "executable", "false")
    with pytest.raises(TrainingError, match="exit code 1"):
        peak_in_fresh_process(TASK)
