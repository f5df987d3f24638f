"""`densely explain`: the right map over the right image, in files of the right names."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import densely
from densely.cli import explaining
from densely.cli.parser import Parser
from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError, DataError, RunError
from densely.evaluation import explain_run
from densely.evaluation.calibration import Calibration, save_calibration
from densely.evaluation.explain_run import explain_connections, explain_images, place
from densely.evaluation.heat_maps import METHODS, explain
from densely.evaluation.overlay import overlay

Digits = list[tuple[Path, str]]


@pytest.fixture
def images(digit_files: Digits) -> list[Path]:
    return [path for path, _ in digit_files[::5]]


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which may be written to."""
    return shutil.copytree(digits_run, tmp_path / "run")


def command(*arguments: object) -> None:
    explaining.explain(Parser(prog="densely explain"), [str(argument) for argument in arguments])


def test_each_image_gets_its_own_class_and_map(
    digits_run: Path, images: list[Path], tmp_path: Path
) -> None:
    found = explain_images(digits_run, images, output=tmp_path / "out")
    classifier = densely.load(digits_run, precision="float32")
    assert [picture.image for picture in found] == list(map(str, images))
    for picture, image, said in zip(found, images, classifier.predict(images), strict=True):
        assert picture.label == said.label
        assert picture.probability == pytest.approx(said.probability, abs=1e-5)
        assert (picture.method, picture.level) == ("cam", 3)
        assert picture.path == tmp_path / "out" / f"{image.stem}-cam.png"
        with Image.open(image) as opened:
            pixels = torch.from_numpy(np.array(opened))[None]
        heat_map = explain(classifier.model, classifier.preprocessing(pixels[None])).maps[0]
        title = f"{picture.label}, {picture.probability:.3f}: CAM"
        wanted = np.asarray(overlay(pixels, heat_map, title=title, signed=True)).astype(int)
        with Image.open(picture.path) as drawn:
            assert drawn.format == "PNG"
            assert np.abs(np.asarray(drawn) - wanted).max() <= 3  # an image alone rounds otherwise
    assert len({p.path for p in found}) == len(found) == len(list((tmp_path / "out").iterdir()))


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"method": "gradcam"}, "-gradcam"),
        ({"method": "gradcam", "level": 1}, "-gradcam-level1"),
        ({"method": "gradcam++", "target": "7"}, "-gradcam++-7"),
        ({"method": "gradcam", "level": 2, "target": "3"}, "-gradcam-level2-3"),
    ],
)
def test_pictures_are_named_by_what_they_show(
    digits_run: Path, images: list[Path], tmp_path: Path, options: dict[str, object], ending: str
) -> None:
    (found,) = explain_images(digits_run, images[:1], output=tmp_path, **options)
    assert found.path.name == f"{images[0].stem}{ending}.png"
    assert found.label == options.get("target", found.label)
    assert found.level == options.get("level", 3)


def test_a_class_that_is_no_likely_one_has_its_own_probability(
    digits_run: Path, images: list[Path], tmp_path: Path
) -> None:
    said = densely.load(digits_run, precision="float32").predict(images[0])[0]
    for label in ("0", "5", "9"):
        (found,) = explain_images(digits_run, images[:1], target=label, output=tmp_path)
        assert found.probability == pytest.approx(said.probabilities[label], abs=1e-5)


def test_integrated_gradients_are_drawn(
    digits_run: Path, images: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("captum")
    (found,) = explain_images(
        digits_run, images[:1], method="integrated_gradients", output=tmp_path
    )
    assert found.level is None
    assert found.path.is_file()


def test_images_of_one_stem_get_numbers(
    digits_run: Path, images: list[Path], tmp_path: Path
) -> None:
    copies = []
    for name in ("a/x.png", "b/x.png", "c/X.png", "c/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copies.append(shutil.copy(images[0], tmp_path / name))
    found = explain_images(digits_run, copies, output=tmp_path / "out")
    names = ["x-cam.png", "x-cam-2.png", "X-cam-3.png", "y-cam.png"]
    assert [picture.path.name for picture in found] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    # Later ones spare those of other images, and replace their own.
    again = explain_images(digits_run, copies[3:0:-2], output=tmp_path / "out")
    assert [picture.path.name for picture in again] == ["y-cam.png", "x-cam-2.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


def test_class_names_need_be_no_file_names(run: Path, images: list[Path]) -> None:
    for path in run.glob("checkpoints/*/model.json"):
        values = json.loads(path.read_text())
        values["classes"][3] = "T恤/ ../top"
        path.write_text(json.dumps(values))
    (found,) = explain_images(run, images[:1], target="T恤/ ../top")
    assert found.path == run / "explain" / f"{images[0].stem}-cam-T恤-..-top.png"
    assert found.path.is_file()


def test_pictures_go_beside_the_run_by_default_and_are_replaced(
    run: Path, images: list[Path]
) -> None:
    (first,) = explain_images(run, images[:1])
    before = first.path.read_bytes()
    (second,) = explain_images(run, images[:1])
    assert second == first
    assert second.path.read_bytes() == before
    assert [path.name for path in (run / "explain").iterdir()] == [first.path.name]


def test_pictures_of_any_mode_and_size_are_explained(digits_run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8)
    paths = [tmp_path / f"{mode}.png" for mode in ("RGB", "L", "P", "RGBA", "1")]
    for path in paths:
        Image.fromarray(pixels).convert(path.stem).save(path)
    for picture in explain_images(digits_run, paths, output=tmp_path / "out"):
        with Image.open(picture.path) as drawn:
            assert drawn.width > 2 * 4 * 70


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": []}, ConfigError, "no image given: name at least one image file"),
        ({"target": "77"}, ConfigError, "unknown class '77'; did you mean 7?"),
        ({"method": "camera"}, ConfigError, "unknown method 'camera'; did you mean cam?"),
        ({"level": 9, "method": "gradcam"}, ConfigError, "level=9: must be a block from 1 to 3"),
        ({"run": "nowhere"}, RunError, "nowhere: no run directory"),
        ({"broken": True}, DataError, r"broken\.png: not a readable"),
        ({"missing": True}, DataError, r"there is no image file .*missing\.png"),
    ],
)
def test_nothing_is_written_when_something_is_wrong(
    digits_run: Path,
    images: list[Path],
    tmp_path: Path,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    for name in ("broken", "missing"):
        if options.pop(name, False):
            options["images"] = [*images, tmp_path / f"{name}.png"]
            if name == "broken":
                (tmp_path / "broken.png").write_bytes(b"no image")
    given = {"run": digits_run, "images": images, "output": tmp_path / "out"} | options
    with pytest.raises(error, match=message):
        explain_images(given.pop("run"), given.pop("images"), **given)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told(
    digits_run: Path, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--output .*file: cannot be written: File exists"):
        explain_images(digits_run, images, output=tmp_path / "file")


def test_an_image_is_never_replaced(digits_run: Path, images: list[Path], tmp_path: Path) -> None:
    shutil.copy(images[0], tmp_path / "x.png")
    (first,) = explain_images(digits_run, [tmp_path / "x.png"], output=tmp_path)
    before = first.path.read_bytes()
    with pytest.raises(ConfigError, match=r"x-cam\.png is one of the images"):
        explain_images(digits_run, [tmp_path / "x.png", first.path], output=tmp_path)
    assert first.path.read_bytes() == before
    assert len(list(tmp_path.glob("*.png*"))) == 2


def test_only_a_picture_of_the_same_is_replaced(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    """Of the same image, run and class: nothing of others, nor what is no picture of ours."""
    out, other = tmp_path / "out", Path(shutil.copytree(run, tmp_path / "other"))
    out.mkdir()
    shutil.copy(images[0], out / f"{images[0].stem}-cam.png")
    shutil.copy(images[0], out / "connections.png")
    mine = {path: path.read_bytes() for path in out.iterdir()}
    paths = [
        explain_images(which, images[:1], output=out, target=target)[0].path
        for which in (run, other, run)
        for target in (None, "3", "5")
    ]
    assert paths[:3] == paths[6:]
    assert len(set(paths)) == 6
    drawn = [explain_connections(which, out) for which in (run, other, run)]
    assert [path.name for path in drawn] == [f"connections-{n}.png" for n in (2, 3, 2)]
    assert all(path.read_bytes() == kept for path, kept in mine.items())


def test_classes_of_one_file_name_have_a_picture_each(run: Path, images: list[Path]) -> None:
    for path in run.glob("checkpoints/*/model.json"):
        values = json.loads(path.read_text())
        values["classes"][:2] = "a/b", "a b"
        path.write_text(json.dumps(values))
    names = [
        explain_images(run, images[:1], target=target)[0].path.name
        for target in ("a/b", "a b", "a/b")
    ]
    stem = f"{images[0].stem}-cam-a-b"
    assert names == [f"{stem}.png", f"{stem}-2.png", f"{stem}.png"]


def test_probabilities_are_calibrated_where_the_run_is(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    classifier = densely.load(run)
    flat = Calibration("temperature", (0.01,) * 10, (0.0,) * 10, "made up", 100)
    save_calibration(run / "checkpoints" / "best", flat, classifier.weights_digest)
    (picture,) = explain_images(run, images[:1], output=tmp_path / "out")
    assert picture.probability < 0.2


@pytest.mark.parametrize("crop", [0.875, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(120, 200), (233, 90), (64, 64), (33, 40)])
def test_a_map_lies_where_the_network_looked(height: int, width: int, crop: float) -> None:
    """A picture whose pixels tell their place goes through the preprocessing itself."""
    preprocessing = Preprocessing(64, 1, (0.0,), (1.0,), crop)
    placed = place(torch.zeros(2, 2), preprocessing, height, width)
    assert placed.shape == (height, width)
    seen = (~placed.isnan()).nonzero()
    first, last = seen.min(dim=0).values, seen.max(dim=0).values
    assert len(seen) == (last - first + 1).prod()
    for axis, side in enumerate((height, width)):
        ramp = torch.arange(side, dtype=torch.uint8)
        image = ramp.view(-1, 1).expand(height, width) if axis == 0 else ramp.expand(height, width)
        shown = preprocessing.fit(image[None, None].contiguous())[0, 0].movedim(axis, 0)[:, 32]
        half = side / 64  # half a pixel of the network's, and rounding
        assert first[axis] == pytest.approx(shown[0].item(), abs=half + 1)
        assert last[axis] == pytest.approx(shown[-1].item(), abs=half + 1)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("size", "crop", "short"), [(32, 0.875, 36), (33, 0.875, 37), (32, 0.95, 33), (37, 0.95, 38)]
)
@pytest.mark.parametrize("beyond", [0, 13, 15, 16])
def test_a_map_of_an_image_that_is_cropped_alone_lies_exactly_there(
    size: int, crop: float, short: int, beyond: int, times: int
) -> None:
    """And that of an image of twice the size at twice the place."""
    preprocessing = Preprocessing(size, 1, (0.0,), (1.0,), crop)
    for sides in ((short, short + beyond), (short + beyond, short)):
        numbers = torch.arange(sides[0] * sides[1]).view(1, 1, *sides)
        parts = (numbers % 100, numbers // 100)  # a pixel holds no more than 255
        rest, hundreds = (preprocessing.fit(part.to(torch.uint8)) for part in parts)
        seen = torch.isin(numbers[0, 0], 100 * hundreds.long() + rest)
        placed = place(torch.zeros(2, 2), preprocessing, *(times * side for side in sides))
        wanted = seen.repeat_interleave(times, dim=0).repeat_interleave(times, dim=1)
        assert torch.equal(~placed.isnan(), wanted)


def test_a_map_ends_at_the_nearest_pixels_of_an_image_that_is_scaled() -> None:
    placed = place(torch.zeros(2, 2), Preprocessing(32, 1, (0.0,), (1.0,), 0.875), 100, 100)
    rows, columns = (~placed.isnan()).nonzero().unbind(dim=1)
    for seen in (rows, columns):  # 2 to 34 of 36 pixels: 5.56 to 94.44 of 100
        assert (seen.min(), seen.max()) == (6, 93)


def test_the_map_of_a_very_large_image_is_no_larger_than_its_picture(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def watched(heat_map: Tensor, preprocessing: Preprocessing, *size: int) -> Tensor:
        sizes.append(size)
        return place(heat_map, preprocessing, *size)

    monkeypatch.setattr(explain_run, "place", watched)
    Image.new("L", (200, 20000)).save(tmp_path / "long.png")
    (found,) = explain_images(digits_run, [tmp_path / "long.png"], output=tmp_path / "out")
    assert sizes == [(2000, 20)]
    with Image.open(found.path) as picture:
        assert picture.height < 2100


def test_a_map_of_the_whole_image_covers_it_all() -> None:
    heat_map = torch.tensor([[0.0, 4.0]])
    placed = place(heat_map, Preprocessing.identity(8, 1), 1, 4)
    assert placed.tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_the_connections_of_a_run_are_drawn(run: Path) -> None:
    assert explain_connections(run) == run / "explain" / "connections.png"
    with Image.open(run / "explain" / "connections.png") as picture:
        assert picture.width > 3 * picture.height / 2


def test_the_command_prints_a_line_an_image(
    digits_run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(digits_run, "--method", "gradcam", *images, "--output", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(images)
    found = explain_images(digits_run, images, method="gradcam", output=tmp_path)
    for line, picture in zip(lines, found, strict=True):
        assert line.split() == [
            picture.image, picture.label, f"{picture.probability:.4f}", str(picture.path),
        ]  # fmt: skip


def test_the_command_prints_json(
    digits_run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(
        digits_run, images[0], "--json", "--target", "3", "--level", "3", "--connections",
        "--output", tmp_path,
    )  # fmt: skip
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["image"] == str(images[0])
    assert (first["label"], first["method"], first["level"]) == ("3", "cam", 3)
    assert Path(first["path"]).is_file()
    assert second == {"connections": str(tmp_path / "connections.png")}


def test_no_connections_are_drawn_where_an_image_is_missing(
    digits_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="there is no image file"):
        command(digits_run, tmp_path / "x.png", "--connections", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("letters", ["a" * 249, "中" * 80])
def test_a_long_name_is_shortened(
    digits_run: Path, images: list[Path], tmp_path: Path, letters: str
) -> None:
    names = [tmp_path / f"{letters}{i}.png" for i in range(2)]
    for name in names:
        shutil.copy(images[0], name)
    found = explain_images(digits_run, names, output=tmp_path / "out")
    assert [picture.path.name for picture in found] == [
        f"{letters[: 150 // len(letters[0].encode())]}-cam{end}.png" for end in ("", "-2")
    ]


def test_a_line_is_a_line_whatever_the_name(
    digits_run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "two\nlines.png"
    shutil.copy(images[0], odd)
    command(digits_run, odd, images[1], "--output", tmp_path / "out")
    first, second = capsys.readouterr().out.splitlines()
    assert r"two\nlines.png" in first
    assert second.startswith(str(images[1]))


def test_connections_alone_need_no_image(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(digits_run, "--connections", "--output", tmp_path)
    assert capsys.readouterr().out.strip() == str(tmp_path / "connections.png")


def test_images_may_stand_behind_flags(
    digits_run: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(digits_run, "--connections", "--output", tmp_path, *images[:2])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "no IMAGE given: name image files, or --connections"),
        (["RUN", "--output", "x"], "no IMAGE given"),
        ([], "required: run, images"),
        (["RUN", "a.png", "--method", "grad"], "--method: expected one of 'cam', 'gradcam'"),
        (["RUN", "a.png", "--level", "x"], "--level: expected int or null, got 'x'"),
        (["RUN", "a.png", "--levels", "1"], "unknown flag '--levels'; did you mean --level"),
    ],
)
def test_what_is_wrong_with_a_command_is_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command(*arguments)


def test_the_command_knows_all_methods() -> None:
    assert get_args(explaining.Method) == METHODS
