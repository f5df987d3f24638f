"""What a run says: lines, JSON, or next to nothing."""

import dataclasses
import io
import json
from pathlib import Path

from densely.training.config import RECIPES
from densely.training.reporting import (
    JsonReporter,
    PlainReporter,
    Reporter,
    RunFacts,
    Summary,
)
from densely.training.run import EpochMetrics
from densely.training.scoring import Score

FACTS = RunFacts(
    run=Path("runs/d2l-001"), config=RECIPES["d2l"], parameters=758_226, train_images=60_000,
    validation_images=0, test_images=10_000, image_size=96, device="cpu", precision="float32",
    memory_format="contiguous", first_epoch=0,
)  # fmt: skip
ROW = EpochMetrics(1, 0.1, 0.144, 0.947, None, None, 0.3, 0.881, 5505.0, 12.0)
SUMMARY = Summary(Path("runs/d2l-001"), 10, 10, Score(0.3, 0.881), 120.0, 5000.0, Path("c.png"))


def spoken(kind: type[Reporter]) -> list[str]:
    out = io.StringIO()
    reporter = kind(out)
    reporter.started(FACTS)
    reporter.step(1, 1, 2, 0.5, 0.5)
    reporter.epoch(ROW)
    reporter.stopped()
    reporter.finished(SUMMARY)
    return out.getvalue().splitlines()


def test_plain_lines_tell_what_the_chapter_tells() -> None:
    text = "\n".join(spoken(PlainReporter))
    for part in ("758,226", "96x96", "train loss 0.1440", "train acc 0.9470", "test acc 0.8810",
                 "5,505 examples/s", "c.png", "densely predict"):  # fmt: skip
        assert part in text


def test_an_epoch_that_was_not_evaluated_tells_of_training_alone() -> None:
    out = io.StringIO()
    PlainReporter(out).epoch(dataclasses.replace(ROW, test_loss=None, test_accuracy=None))
    line = " ".join(out.getvalue().split())
    assert line == "epoch 1 train loss 0.1440 train acc 0.9470 5,505 examples/s"


def test_json_is_one_object_a_line() -> None:
    events = [json.loads(line) for line in spoken(JsonReporter)]
    assert [event["event"] for event in events] == ["start", "epoch", "end"]
    assert events[1]["test_accuracy"] == 0.881
    assert events[2]["test"] == {"loss": 0.3, "accuracy": 0.881}


def test_quiet_says_where_the_run_is_and_no_more() -> None:
    assert spoken(Reporter) == ["runs/d2l-001"]
