"""The whole story of a run: what is fitted on what, what is stored, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import densely
from densely.cli import main
from densely.errors import ConfigError, DataError, RunError
from densely.evaluation import judged
from densely.evaluation.calibration import cross_fitted
from densely.evaluation.scores import scores_of
from densely.evaluation.selective import risk_coverage, threshold_for
from densely.training.run import RunDirectory

DIGITS = tuple("0123456789")

pytestmark = pytest.mark.usefixtures("hasty_costs", "undrawn")


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A run of one's own to write into."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def reported(
    digits_run: Path, tmp_path_factory: pytest.TempPathFactory, hasty_costs: None
) -> tuple[Path, densely.Report]:
    """A copy of the run with its report, all drawn; tests must leave it as it is."""
    path = Path(shutil.copytree(digits_run, tmp_path_factory.mktemp("reported") / "run"))
    return path, densely.report(path)


def folder_of(top: Path, *names: str, first: int = 0) -> Path:
    """Test digits as files, FOLDER/CLASS/*.png."""
    from densely.data import load_data

    test = load_data("digits").test
    for name in names:
        (top / name).mkdir(parents=True)
        for i in (test.labels == int(name)).nonzero().flatten()[first : first + 4].tolist():
            Image.fromarray(test.images[i, 0].numpy()).save(top / name / f"{i}.png")
    return top


def test_what_is_written(reported: tuple[Path, densely.Report]) -> None:
    path, report = reported
    assert {file.name for file in (path / "report").iterdir()} == {"metrics.json", "report.html"}
    assert report.page == (path / "report" / "report.html").resolve()
    written = json.loads((path / "report" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(report.findings.to_dict()))
    assert written["scores"]["accuracy"]["value"] == densely.evaluate(path).accuracy
    page = report.page.read_text(encoding="utf-8")
    diagrams = re.findall(r'src="data:image/png;base64,[^"]{10000,}"', page)
    assert len(diagrams) == 5


def test_figures_agree_with_each_other(reported: tuple[Path, densely.Report]) -> None:
    _, report = reported
    found, evaluation = report.findings, report.evaluation
    assert found.scores.accuracy.value == evaluation.accuracy
    assert (found.scores.confusion == evaluation.confusion).all()
    assert found.calibration[0].nll == pytest.approx(evaluation.loss, rel=1e-5)
    assert [score.method for score in found.calibration] == ["none", "temperature", "vector"]
    assert found.selective.risk[-1] == pytest.approx(1 - evaluation.accuracy)
    assert found.cost.parameters > 70_000
    wrong = round(evaluation.images * (1 - evaluation.accuracy))
    assert len(found.mistakes) == min(24, wrong)
    assert all(example.label != example.given for example in found.mistakes)
    confidences = [example.confidence for example in found.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert all(example.label == example.given for example in found.unsure)
    assert len(found.unsure) == 24
    confidences = [example.confidence for example in found.unsure]
    assert confidences == sorted(confidences)


def test_examples_show_the_very_images_with_the_maps_of_the_class_given(
    reported: tuple[Path, densely.Report],
) -> None:
    from densely.data import load_data

    path, report = reported
    test = load_data("digits").test
    classifier = densely.load(path)
    for example in (report.findings.unsure[0], report.findings.unsure[-1]):
        pixels = test.images[example.index]
        assert (example.pixels == pixels.numpy()).all()
        assert test.classes[int(test.labels[example.index])] == example.label
        target = classifier.classes.index(example.given)
        x = classifier.preprocessing(pixels[None])
        expected = densely.explain(classifier.model, x, target).maps[0]
        torch.testing.assert_close(torch.tensor(example.heat_map), expected, rtol=1e-3, atol=1e-4)
        probability = classifier.probabilities(pixels[None])[0, target].item()
        assert probability == pytest.approx(example.confidence, rel=1e-3)


def test_a_likely_label_error_has_a_heat_map_where_no_other_sheet_shows_it(
    run: Path, reported: tuple[Path, densely.Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reported[1].findings
    index = min(set(range(360)) - {example.index for example in (*found.mistakes, *found.unsure)})
    monkeypatch.setattr("densely.evaluation.report.likely_label_errors", lambda *_: [index])
    (example,) = densely.report(run).findings.label_errors
    assert example.index == index
    assert example.heat_map is not None


def test_examples_of_a_folder_name_their_files(run: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "others", "3", "5")
    found = densely.report(run, str(folder)).findings
    for example in (*found.mistakes, *found.unsure):
        with Image.open(folder / str(example.file)) as image:
            assert (np.asarray(image) == example.pixels[0]).all()


def test_calibration_is_stored_and_applied(
    reported: tuple[Path, densely.Report], digit_files: list[tuple[Path, str]]
) -> None:
    path, _ = reported
    stored = densely.load(path).calibration
    assert stored is not None
    assert (stored.method, stored.wanted_error) == ("temperature", 0.05)
    assert stored.fitted_on == "validation split, 144 images"
    files = [file for file, _ in digit_files[:4]]
    bare = densely.load(path, calibrated=False).predict(files)
    calibrated = densely.load(path).predict(files)
    for one, other in zip(bare, calibrated, strict=True):
        assert one.label == other.label
        logits = torch.tensor(list(one.probabilities.values())).log()
        expected = (logits * stored.scale[0]).softmax(0)
        assert list(other.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-3)
        assert one.sure is None
        wanted = None if stored.threshold is None else other.probability >= stored.threshold
        assert other.sure is wanted


def test_the_figures_are_of_calibrated_probabilities(run: Path) -> None:
    """By vector scaling, which moves answers too: the network is made to give a class too often."""
    weights = run / "checkpoints" / "best" / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"][3] += 4
    save_file(tensors, weights, metadata={"format": "pt"})
    found = densely.report(run, calibration="vector").findings
    stored = densely.load(run).calibration
    assert stored is not None
    own = {split: judged.judge(run, split=split) for split in ("test", "validation")}
    logits, labels = stored.apply(own["test"].logits), own["test"].labels
    assert found.scores.accuracy == scores_of(logits, labels, DIGITS).accuracy
    assert found.scores.accuracy != scores_of(own["test"].logits, labels, DIGITS).accuracy
    fitting, truth = own["validation"].logits, own["validation"].labels
    as_new = cross_fitted(stored, fitting, truth)
    choices = [(choice.wanted_error, choice.threshold) for choice in found.selective.choices]
    assert choices == [(error, threshold_for(as_new, truth, error)) for error, _ in choices]
    assert found.selective == risk_coverage(logits, labels, choices)
    shares = logits.double().softmax(dim=1)
    for example in found.mistakes:
        label, given = DIGITS.index(example.label), DIGITS.index(example.given)
        probabilities = shares[example.index]
        assert example.confidence == pytest.approx(probabilities[given].item(), rel=1e-5)
        assert example.label_probability == pytest.approx(probabilities[label].item(), rel=1e-5)
    moved = (logits.argmax(dim=1) != own["test"].logits.argmax(dim=1)).nonzero().flatten().tolist()
    classifier, pixels = densely.load(run), own["test"].images.images
    shown = [example for example in (*found.mistakes, *found.unsure) if example.index in moved]
    assert shown
    for example in shown:  # the map is of the class that is given in the end
        x, given = classifier.preprocessing(pixels[[example.index]]), DIGITS.index(example.given)
        expected = densely.explain(classifier.model, x, given).maps[0].cpu()
        torch.testing.assert_close(torch.tensor(example.heat_map), expected, rtol=1e-3, atol=1e-4)


def test_a_later_report_keeps_what_was_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    densely.report(run, calibration="vector", wanted_error=0.4)
    others = str(folder_of(tmp_path / "others", "3", "5"))
    found = densely.report(run, others, output=tmp_path / "page").findings
    assert (found.method, found.wanted_error) == ("vector", 0.4)
    assert main(["evaluate", str(run), "--wanted-error", "0.2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["calibration"]["method"], told["threshold"]["wanted_error"]) == ("vector", 0.2)
    assert told["calibration"]["fitted_on"] == "validation split, 144 images"
    assert any("fitted on 144 images only" in warning for warning in told["warnings"])
    stored = densely.load(run).calibration
    assert stored is not None
    assert (stored.method, stored.wanted_error) == ("vector", 0.2)


def test_calibration_never_sees_what_is_judged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = judged.seen

    def spy(classifier: densely.Classifier, images: judged.ImageSet) -> object:
        seen.append(len(images))
        return original(classifier, images)

    monkeypatch.setattr("densely.evaluation.report.seen", spy)
    densely.report(run)
    first = densely.load(run).calibration
    densely.report(run, str(folder_of(tmp_path / "others", "3", "5")))
    assert densely.load(run).calibration == first
    assert seen == [144, 144]  # the validation split, whatever is judged


def test_other_weights_make_a_stored_calibration_void(run: Path) -> None:
    densely.report(run)
    weights = run / "checkpoints" / "best" / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert densely.load(run).calibration is None


def test_without_a_validation_split_training_images_stand_in_with_a_warning(
    tmp_path: Path,
) -> None:
    config = densely.TrainConfig.from_values(
        {"epochs": 1, "limit": 100, "validation": 0.0, "output": str(tmp_path)}
    )
    summary = densely.train(config)
    report = densely.report(summary.run, calibration="none")
    assert report.findings.calibrated_on == "part of the training split, 10 images"
    (warning,) = report.findings.warnings
    assert "no validation split" in warning
    assert "10 of the images that it learned from" in warning
    assert report.findings.method == "none"
    fitted = densely.report(summary.run, calibration="temperature").findings
    assert "is fitted on 10 images only" in fitted.warnings[1]


@pytest.mark.parametrize(("split", "said"), [("train", "learned from"), ("validation", "very im")])
def test_a_split_that_flatters_is_warned_of(run: Path, split: str, said: str) -> None:
    report = densely.report(run, split=split)  # type: ignore[arg-type]
    assert any(said in warning for warning in report.findings.warnings)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_images_are_no_split_of_the_run_whatever_is_asked_for(
    run: Path, tmp_path: Path, split: str
) -> None:
    others = str(folder_of(tmp_path / "others", "3", "5"))
    found = densely.report(run, others, split=split)  # type: ignore[arg-type]
    missing, few = found.findings.warnings
    assert missing.startswith("None of these images is of ")
    assert few.startswith("Calibration is fitted on 144 images only: ")


def test_a_calibration_on_just_enough_images_is_not_warned_of(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("densely.evaluation.report.FEW_IMAGES", 144)
    found = densely.report(run).findings
    assert found.calibrated_on == "validation split, 144 images"
    assert found.warnings == ()


def test_classes_without_images_are_named_and_do_not_count(run: Path, tmp_path: Path) -> None:
    found = densely.report(run, str(folder_of(tmp_path / "others", "3", "5"))).findings
    assert found.warnings[0].startswith(
        "None of these images is of '0', '1', '2', '4', '6' and 3 more: "
    )
    scores = found.scores.classes
    assert [score.name for score in scores if score.f1 is not None] == ["3", "5"]
    assert found.scores.macro_f1.value == pytest.approx(sum(s.f1 or 0 for s in scores) / 2)
    assert not any("None of these" in text for text in densely.report(run).findings.warnings)


def test_the_page_may_go_elsewhere_and_spares_what_is_there(run: Path, tmp_path: Path) -> None:
    report = densely.report(run, output=tmp_path / "page")
    assert report.page.parent == (tmp_path / "page").resolve()
    assert not (run / "report").exists()
    (tmp_path / "page" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        densely.report(run, output=tmp_path / "page")


def test_a_folder_under_a_files_name_is_told_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "page" / "metrics.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.json in it is a folder"):
        densely.report(run, output=tmp_path / "page")
    assert not (run / "checkpoints" / "best" / "calibration.json").exists()


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: png[:-20], lambda png: b"x" * 99])
def test_curves_that_cannot_be_read_are_left_out(
    run: Path, damage: Callable[[bytes], bytes]
) -> None:
    Image.new("RGB", (60, 40)).save(run / "curves.png")
    pages = []
    for change in (bytes, damage):
        (run / "curves.png").write_bytes(change((run / "curves.png").read_bytes()))
        pages.append(densely.report(run).page.read_text(encoding="utf-8"))
    assert ["Loss and accuracies of the run" in page for page in pages] == [True, False]


def test_sure_mistakes_are_in_their_order(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though in float32 all of them have a probability of 1."""
    judge = judged.judge

    def sure(*args: object, **options: object) -> judged.Judged:
        found = judge(*args, **options)  # type: ignore[arg-type]
        wrong = (found.logits.argmax(1) != found.labels).nonzero().flatten()
        for place, index in enumerate(wrong[:5].tolist()):
            found.logits[index] = 0
            found.logits[index, (found.labels[index] + 1) % 10] = 22.0 + 2 * place
        order.extend(wrong[:5].tolist())
        return found

    order: list[int] = []
    monkeypatch.setattr("densely.evaluation.report.judge", sure)
    mistakes = densely.report(run, calibration="none").findings.mistakes
    assert [example.index for example in mistakes[:5]] == order[::-1]


def test_a_run_that_cannot_be_written_is_reported_on_elsewhere(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("densely.evaluation.calibration.write_whole", fail)  # root may all
    page = tmp_path / "page"
    assert main(["evaluate", str(run), "--output", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("accuracy ")
    assert f"not kept, as {run} cannot be written (Permission denied)" in out
    assert "stored with the model" not in (page / "report.html").read_text(encoding="utf-8")
    assert not json.loads((page / "metrics.json").read_text())["is_stored"]
    assert main(["evaluate", str(run)]) == 2
    assert "calibration.json: cannot be written: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("is_kept", [True, False])
def test_where_no_page_can_be_written_it_is_said_whether_the_calibration_was_kept(
    run: Path, tmp_path: Path, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    if not is_kept:
        monkeypatch.setattr("densely.evaluation.calibration.write_whole", fail)
    monkeypatch.setattr("densely.evaluation.report_page.whole_file", fail)
    with pytest.raises(RunError, match="page: cannot be written: Permission denied") as error:
        densely.report(run, output=tmp_path / "page")
    assert ("its calibration is stored with the model" in str(error.value)) == is_kept
    assert (densely.load(run).calibration is not None) == is_kept


def test_a_run_whose_data_are_gone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", "0", "1")
    config = densely.TrainConfig.from_values(
        {"data": str(folder), "epochs": 1, "batch_size": 4, "output": str(tmp_path / "runs")}
        | {"validation": 0.34}
    )
    run = densely.train(config).run
    others = folder_of(tmp_path / "others", "0", "1", first=4)
    densely.report(run, str(others))
    before = densely.load(run).calibration
    folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="nor is there a folder"):
        densely.report(run)
    moved = densely.report(run, str(tmp_path / "moved"))
    assert moved.findings.scores.images == 2  # the test split, as before it was moved
    assert densely.load(run).calibration == before
    report = densely.report(run, str(others), wanted_error=0.3)
    (warning,) = [text for text in report.findings.warnings if "data cannot be read" in text]
    assert "is shown, whatever method or error is asked for" in warning
    assert densely.load(run).calibration == before


def test_nan_is_refused(run: Path) -> None:
    weights = run / "checkpoints" / "best" / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for judge in (densely.report, densely.evaluate):
        with pytest.raises(DataError, match="NaN or infinity for 360 of 360 images"):
            judge(run)
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ONE_CLASS", "one class only, '3'"),
        ("EMPTY", "no class folders with images"),
        ("nowhere", "nor is there a folder nowhere"),
        ("OTHERS --wanted-error 0", "wanted_error=0.0: must be above 0"),
        ("OTHERS --calibration platt", "expected one of 'none', 'temperature', 'vector'"),
        ("OTHERS --output RUN/config.yaml", "config.yaml"),
    ],
)
def test_a_mistake_ends_in_a_line_and_leaves_nothing(
    run: Path,
    tmp_path: Path,
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "ONE_CLASS": folder_of(tmp_path / "one", "3"),
        "OTHERS": folder_of(tmp_path / "others", "3", "5"),
        "EMPTY": tmp_path / "empty",
        "RUN": run,
    }
    places["EMPTY"].mkdir()
    for word, place in places.items():
        arguments = arguments.replace(word, str(place))
    before = sorted(run.rglob("*"))
    assert main(["evaluate", str(run), "--data", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert sorted(run.rglob("*")) == before


def test_the_command_tells_and_writes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--calibration", "vector"]) == 0
    out = capsys.readouterr().out
    found = json.loads((run / "report" / "metrics.json").read_text())
    plain, _, vector = found["calibration"]
    assert f", loss {plain['nll']:.4f} on 360 images" in out.splitlines()[0]
    accuracy = found["scores"]["accuracy"]["value"]
    assert f"\ncalibrated: accuracy {accuracy:.4f}, loss {vector['nll']:.4f}\n" in out
    assert "confusions: rows are the true class" in out
    assert "with vector scaling (fitted on validation split, 144 images)" in out
    assert out.endswith(f"report:  {(run / 'report' / 'report.html').resolve()}\n")
    assert RunDirectory.open(run).weights().name == "best"
    assert main(["evaluate", str(run), "--json", "--no-report"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 360


def test_predict_says_where_it_is_unsure(
    run: Path, digit_files: list[tuple[Path, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "best" / "calibration.json"
    densely.report(run)
    values = json.loads(path.read_text())
    values["calibration"]["threshold"] = 1.0
    path.write_text(json.dumps(values))
    assert main(["predict", str(run), str(digit_files[0][0])]) == 0
    assert "(unsure)" in capsys.readouterr().out
    assert main(["predict", str(run), str(digit_files[0][0]), "--no-calibrated"]) == 0
    assert "(unsure)" not in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(RunError, match=r"calibration\.json: damaged"):
        densely.load(run)
