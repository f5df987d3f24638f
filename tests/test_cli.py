"""The commands as people use them: help, output, exit codes, and no traceback for a mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from densely.cli import main

pytestmark = pytest.mark.usefixtures("hasty_costs", "undrawn")
COMMANDS = ["train", "evaluate", "predict", "explain", "compare", "bench", "doctor"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as leaving:  # how argparse ends --help
        code = int(leaving.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_answers_within_300_ms(arguments: list[str]) -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "densely", *arguments], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: densely")
    assert min(seconds) < 0.3


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "train", "--recipe", "d2l", "--help")
    assert "(default: 256)" in text
    assert "(default: fashion-mnist)" in text
    assert "fresh ones (default: null)" in " ".join(text.split())


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys)
    assert code == 0
    assert all(f"  {name}" in text for name in COMMANDS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import densely

    assert run(capsys, "--version")[1] == f"densely {densely.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("train --recipe d3l", "unknown recipe 'd3l'; did you mean d2l?"),
        ("train --model densnet121", "unknown model 'densnet121'; did you mean densenet121"),
        ("train --data fashionmnist", "did you mean fashion-mnist?"),
        ("train --data ./nowhere", "nor is there a folder ./nowhere"),
        ("train --epochs -1", "epochs=-1: must be at least 1"),
        ("train --epochs x", "--epochs: expected int, got 'x'"),
        ("train --limit x", "--limit: expected int or null, got 'x'"),
        ("train --precision half", "expected one of 'auto', 'float32', 'bfloat16', got 'half'"),
        ("train --batch 3", "unknown flag '--batch'; did you mean --batch-size"),
        ("train --lr", "expected one argument"),
        ("train --recipe", "expected one argument"),
        ("train digits", "unrecognized arguments: digits"),
        ("train --data " + 300 * "x", "unknown data set" if os.name == "nt" else "name too long"),
        ("train --device meta", "device 'meta' is not here"),
        ("train --device cuda:7", "device 'cuda:7' is not here"),
        ("train --config nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("train --resume nowhere", "nowhere: no run directory"),
        ("train --resume runs --recipe d2l", "leave them out"),
        ("train --quiet --json", "exclude each other"),
        ("train --recipe d2l --data digits --image-size 20", "needs images of at least 29"),
        ("train --data digits --limit 5", "too few"),
        ("train --data-dir nowhere --data fashion-mnist", "--data-dir: there is no folder"),
        ("evaluate", "required: run"),
        ("evaluate nowhere", "nowhere: no run directory"),
        ("predict nowhere a.png", "nowhere: no run directory"),
        ("predict nowhere", "required: images"),
        ("explain nowhere a.png", "nowhere: no run directory"),
        ("explain nowhere", "no IMAGE given"),
        ("explain nowhere --connections --level 1 --target 3", "--level, --target: of heat maps"),
        ("compare nowhere elsewhere", "nowhere: no run directory"),
        ("bench --net d3l", "expected one of 'all', 'densenet121', 'd2l', 'bc_100_12', got 'd3l'"),
        ("bench --rounds 0 --batch 0", "batch=0: must be at least 1; rounds=0"),
        ("bench --device x", "device 'x' is not here"),
        ("bench --output pyproject.toml/x --rounds", "expected one argument"),
        ("doctor --device x", "device 'x' is not here"),
    ],
)
def test_a_mistake_ends_in_one_or_two_lines_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments.split())
    assert code == 2
    assert message.lower() in err.lower()
    assert err.startswith("densely")
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in err + out
    assert list(tmp_path.iterdir()) == []  # nothing half done is left


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "free some, or give fewer or smaller images"),
        (MemoryError("a.png: 9x9 pixels"), "a.png: 9x9 pixels"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe #0"), "9 bytes"),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("densely.cli.judging.predict", full)
    code, out, err = run(capsys, "predict", "run", "a.png")
    assert (code, out) == (1, "")
    assert err.startswith("densely predict: not enough memory: ")
    assert err.endswith(f"{said}\n")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_exif_is_not_spoken_of(digits_run: Path, tmp_path: Path, suffix: str) -> None:
    image = tmp_path / f"image{suffix}"
    cut_off = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"
    Image.new("L", (8, 8)).save(image, exif=cut_off)
    done = subprocess.run(
        [sys.executable, "-m", "densely", "predict", digits_run, image],
        capture_output=True,
        text=True,
        env=of_one_thread(),
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_other_faults_keep_their_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("densely.cli.judging.predict", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(capsys, "predict", "run", "a.png")


def test_a_wrong_key_in_a_config_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("epoch: 3\nlearning_rate: 1\n")
    code, _, err = run(capsys, "train", "--config", tmp_path / "mine.yaml")
    assert code == 2
    assert "unknown field 'epoch'; did you mean epochs" in err
    assert "'learning_rate'" in err


@pytest.mark.parametrize("content", ["lr: 2024-13-45", "lr: " + 400 * "9", 'output: "x\\0y"'])
def test_an_impossible_value_in_a_config_file_is_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    code, _, err = run(capsys, "train", "--config", tmp_path / "mine.yaml")
    assert code == 2
    assert err.startswith("densely train: ")


def test_an_empty_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--epochs: expected int, got ''" in run(capsys, "train", "--epochs", "")[2]
    assert "data=: must be text that is not empty" in run(capsys, "train", "--data", "")[2]


def of_one_thread() -> dict[str, str]:
    """The environment of a process beside others that compute."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_training_goes_on_when_its_reader_has_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "densely", "train", "--output", str(tmp_path)]
    command += ["--epochs", "3", "--limit", "100"]
    buffered = {key: text for key, text in of_one_thread().items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "quickstart-001" / "README.md").is_file()


def test_flags_win_over_the_file_and_the_file_over_the_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"epochs: 1\nlimit: 100\nlr: 0.03\noutput: {tmp_path}\n")
    flags = ["--lr", "0.02", "--config", tmp_path / "mine.yaml", "--no-normalize"]
    code, out, _ = run(capsys, "train", *flags, "--json")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert {"event": "note", "text": "reading digits ..."} in events
    (config,) = (event["config"] for event in events if event["event"] == "start")
    assert (config["lr"], config["epochs"], config["batch_size"]) == (0.02, 1, 64)
    assert config["normalize"] is False


@pytest.mark.usefixtures("one_thread")
def test_a_runs_own_config_file_gives_the_same_network(
    capsys: pytest.CaptureFixture[str], digits_run: Path, tmp_path: Path
) -> None:
    config = digits_run / "config.yaml"
    run(capsys, "train", "--config", config, "--output", tmp_path, "--quiet")
    weights = "checkpoints/last/model.safetensors"
    again = tmp_path / digits_run.name / weights
    assert again.read_bytes() == (digits_run / weights).read_bytes()


def test_resume_may_change_where_and_how_long_but_not_what(
    capsys: pytest.CaptureFixture[str], digits_run: Path
) -> None:
    code, _, err = run(capsys, "train", "--resume", digits_run, "--lr", "1", "--seed", "5")
    assert code == 2
    assert "--lr, --seed: fixed by the run" in err


def test_train_evaluate_and_predict_from_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, digit_files: list[tuple[Path, str]]
) -> None:
    code, out, _ = run(capsys, "train", "--epochs", "3", "--output", tmp_path)
    assert code == 0
    assert out.count("epoch  ") == 3
    assert f"curves:    {tmp_path}/quickstart-001/curves.png" in out
    path = tmp_path / "quickstart-001"

    code, table, _ = run(capsys, "evaluate", path, "--no-report")
    assert code == 0
    assert table.startswith("accuracy 0.9")
    assert len(table.splitlines()) == 14  # summary, blank, title, header, ten classes
    code, out, _ = run(capsys, "evaluate", path)
    assert code == 0
    assert out.splitlines()[:14] == table.splitlines()  # the loss that train gave, too
    assert (path / "report" / "report.html").is_file()

    image, label = digit_files[0]
    code, out, _ = run(capsys, "predict", path, image)
    assert code == 0
    assert out.split() == [str(image), out.split()[1], label]
    assert 0 < float(out.split()[1]) <= 1

    code, out, _ = run(capsys, "predict", path, image, image, "--top", "3")
    assert len(out.splitlines()) == 6

    code, out, _ = run(capsys, "predict", path, image, "--json")
    assert json.loads(out)["label"] == label
    code, out, _ = run(capsys, "evaluate", path, "--json")
    assert json.loads(out)["images"] == 360


def test_an_unreadable_image_is_named(
    capsys: pytest.CaptureFixture[str], digits_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    code, _, err = run(capsys, "predict", digits_run, tmp_path / "text.png")
    assert code == 2
    assert "text.png: not a readable" in err


def test_images_beside_an_unreadable_one_are_named(
    capsys: pytest.CaptureFixture[str],
    digits_run: Path,
    digit_files: list[tuple[Path, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "text.png").write_text("no image")
    image = digit_files[0][0]
    code, out, err = run(capsys, "predict", digits_run, image, tmp_path / "text.png", image)
    assert code == 2
    assert len(out.splitlines()) == 2
    assert "text.png: not a readable" in err
    assert err.splitlines()[-1] == "densely predict: 1 of 3 images could not be read"


def test_all_images_of_a_folder_are_named(
    capsys: pytest.CaptureFixture[str],
    digits_run: Path,
    digit_files: list[tuple[Path, str]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new"
    code, _, err = run(capsys, "predict", digits_run, tmp_path)
    assert (code, "no images in it" in err) == (2, True)
    for i, name in enumerate(("b.png", "a/x.PNG", "a/.hidden.png", "a/notes.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(digit_files[i][0].read_bytes())
    code, out, _ = run(capsys, "predict", digits_run, folder, digit_files[3][0], "--json")
    assert code == 0
    images = [json.loads(line)["image"] for line in out.splitlines()]
    assert images == [str(folder / "a/x.PNG"), str(folder / "b.png"), str(digit_files[3][0])]


def test_what_predict_leaves_out_is_told_and_names_keep_their_line(
    capsys: pytest.CaptureFixture[str],
    digits_run: Path,
    digit_files: list[tuple[Path, str]],
    tmp_path: Path,
) -> None:
    for name in ("数字.png", "two\nlines.png", "scan.tif"):
        (tmp_path / name).write_bytes(digit_files[0][0].read_bytes())
    code, out, err = run(capsys, "predict", digits_run, tmp_path)
    assert code == 0
    note = "1 file left out: .tif (PNG, JPEG, BMP and WebP are read)"
    assert err == f"densely predict: {tmp_path}: {note}\n"
    escaped, wide = out.splitlines()
    assert escaped.startswith(rf"{tmp_path}/two\nlines.png  ")
    assert wide.startswith(f"{tmp_path}/数字.png      ")  # as wide on a terminal: 4 and 4 more
    assert len(wide) == len(escaped) - 2


def test_many_classes_show_their_worst_confusions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for i in range(25):
        for part, n in (("train", 2), ("test", 1)):
            folder = tmp_path / "data" / part / f"c{i:02}"
            folder.mkdir(parents=True)
            for j in range(n):
                Image.new("L", (8, 8), 10 * i + j).save(folder / f"{j}.png")
    flags = ["--epochs", "1", "--validation", "0", "--output", tmp_path, "--quiet"]
    code, _, err = run(capsys, "train", "--data", tmp_path / "data", *flags)
    assert (code, err) == (0, "")
    _, out, _ = run(capsys, "evaluate", tmp_path / "quickstart-001")
    assert "most frequent confusions" in out
    assert "taken for" in out


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (errno.EACCES, "locked", 2),
        (errno.EACCES, None, 1),
        (errno.ENOSPC, "full", 1),
        (errno.ENOSPC, None, 1),
    ],
)
def test_an_error_of_the_system_is_a_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    name: str | None,
    code: int,
) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr("densely.cli._command", lambda command: failing)
    where = f"{name}: " if name else ""
    assert run(capsys, "doctor") == (code, "", f"densely doctor: {where}{os.strerror(number)}\n")


def test_a_closed_output_is_no_mistake(tmp_path: Path) -> None:
    words = f"-m densely train --epochs 1 --limit 60 --output {tmp_path}"
    command = f"exec {sys.executable} {words} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env=of_one_thread())
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "quickstart-001" / "README.md").is_file()


ENDLESS = ["train", "--epochs", "100000", "--limit", "100", "--output"]


def test_a_signal_ends_the_command_which_saves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "densely", *ENDLESS, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=of_one_thread(),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert f"go on with: densely train --resume {tmp_path}/quickstart-001" in err
    assert "Traceback" not in err
    assert (tmp_path / "quickstart-001" / "checkpoints" / "last").is_dir()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, number: int, code: int
) -> None:
    run_folder = tmp_path / "quickstart-001"
    rows = run_folder / "metrics.csv"
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored

    def send() -> None:
        while not (rows.exists() and rows.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        ended, _, err = run(capsys, *ENDLESS, tmp_path)
    finally:
        signal.signal(number, before)
    sender.join(10)
    assert ended == code
    assert f"go on with: densely train --resume {run_folder}" in err
    assert "Traceback" not in err
    epochs = len(rows.read_text().splitlines())  # and one more
    assert run(capsys, "train", "--resume", run_folder, "--epochs", epochs, "--quiet")[0] == 0


def test_a_process_that_ends_is_not_searched_for_garbage() -> None:
    code = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # runs after what is registered later
from densely.cli import main
sys.argv = ["densely", "--version"]
main()
print(gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["0", "True"]


def test_interrupting_before_training_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("densely.training.loop.splits_of", interrupted)
    code, _, err = run(capsys, "train")
    assert (code, err) == (130, "densely train: interrupted\n")


def test_doctor_tells_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for part in ("torch", "device", "precision", "memory format", "dense blocks", "DENSELY_DATA"):
        assert part in out
    facts = json.loads(run(capsys, "doctor", "--json")[1])
    assert set(facts["reasons"]) == {"device", "precision", "memory_format"}


@pytest.mark.parametrize("folder", ["x" * 5000, "two\nlines"])
def test_doctor_tells_of_folders_that_cannot_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("DENSELY_DATA", folder)
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if "DENSELY_DATA" in line)
    assert line.endswith(f"{folder} (not there)".replace("\n", r"\n"))


def test_doctor_sees_where_fashion_mnist_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fashion_mnist_dir: Path
) -> None:
    monkeypatch.setenv("DENSELY_DATA", str(fashion_mnist_dir.parent))
    assert "(Fashion-MNIST is there)" in run(capsys, "doctor")[1]
