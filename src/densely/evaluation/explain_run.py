"""Where the network of a run looks, as pictures: heat maps over images, and its connections."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from densely.data.images import decode, open_image
from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError, RunError, unknown_name
from densely.evaluation.calibration import Calibration
from densely.evaluation.classifier import load
from densely.evaluation.connections import Matrix, connections, draw_connections
from densely.evaluation.heat_maps import SIGNED, HeatMapMethod, explain
from densely.runtime import MemoryFormat, Precision
from densely.training.scoring import BATCH_SIZE
from densely.whole_file import whole_file

PathLike = str | os.PathLike[str]

_SOURCE = "densely source"  # key of a picture's own text
_TITLES: dict[HeatMapMethod, str] = {
    "cam": "CAM",
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "integrated_gradients": "integrated gradients",
}


@dataclass(frozen=True)
class Picture:
    """A heat map of an image, drawn into a file.

    Args:
        image: path of the image, as given.
        label: class that the map is for.
        probability: the network's probability of it, in [0, 1]; calibrated where the run is.
        method: how the map was made.
        level: dense block that it was made at, from 1 on; None for integrated gradients.
        path: of the picture.
    """

    image: str
    label: str
    probability: float
    method: HeatMapMethod
    level: int | None
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        return values | {"path": os.fspath(values["path"])}


def explain_images(
    run: PathLike,
    images: Iterable[PathLike],
    *,
    method: HeatMapMethod = "cam",
    level: int | None = None,
    target: str | None = None,
    output: PathLike | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    memory_format: MemoryFormat = "auto",
) -> list[Picture]:
    """Draw where the network of a run sees a class, in each image.

    Nothing is written before all images are read and all maps are computed.

    Args:
        run: a run directory.
        images: paths of PNG, JPEG, BMP or WebP files, of any size and mode; at least one.
        method: "cam", "gradcam", "gradcam++" or "integrated_gradients" (needs captum).
        level: dense block from 1 on; None for the last, and for integrated gradients.
        target: name of the class that is looked for; None for each image's likeliest.
        output: folder of the pictures; None for explain/ in the run directory. They are named
            STEM-METHOD.png, with -levelN and -CLASS before the dot where these were given, and
            -2, -3 for further images of one stem. An older picture of the same image, class and
            run is replaced, and nothing else.
        device: "auto", "cpu", "cuda", ...
        precision: as for `load`; heat maps and their probabilities are float32 with any.
        memory_format: "auto", "contiguous" or "channels_last".

    Returns:
        One picture an image, in their order.

    Raises:
        ConfigError: no image, an unknown class or method, or a level that is not there.
        DataError: an image cannot be read; it is named.
        RunError: no run, no checkpoint in it yet, or a damaged one; the folder cannot be made.
    """
    from densely.evaluation.overlay import LARGEST, overlay, shrunk

    paths = [os.fspath(image) for image in images]
    if not paths:
        raise ConfigError("no image given: name at least one image file")
    classifier = load(run, device=device, precision=precision, memory_format=memory_format)
    classes, preprocessing = classifier.classes, classifier.preprocessing
    calibration = classifier.calibration or Calibration.none(len(classes))
    if target is not None and target not in classes:
        raise ConfigError(unknown_name("class", target, classes))
    wanted = None if target is None else classes.index(target)

    # Each is read here and once more to be drawn: a thousand photographs would fill the memory.
    fitted = torch.stack([preprocessing.fit(_read(path, preprocessing)[None])[0] for path in paths])
    found: list[tuple[Tensor, float, int]] = []
    for batch in torch.split(fitted, BATCH_SIZE):
        scaled = preprocessing.scale(batch.to(classifier.runtime.device))
        done = explain(classifier.model, classifier.runtime.layout(scaled), wanted, method, level)
        targets = done.targets.cpu()
        calibrated = calibration.probabilities(done.logits.cpu())
        probabilities = calibrated.gather(1, targets[:, None])[:, 0]
        found += zip(done.maps.cpu(), probabilities.tolist(), targets.tolist(), strict=True)
        made_at = done.level

    title = _TITLES[method] + ("" if level is None else f", block {level}")
    folder = _made(Path(run) / "explain" if output is None else Path(output))
    shown_by = "" if output is None else os.path.realpath(run)  # within a run it is told by where
    sources = [_digest(os.path.realpath(path), target or "", shown_by) for path in paths]
    files = _files(folder, paths, sources, _ending(method, level, target))
    _spare(paths, files)
    pictures = []
    for path, source, file, (heat_map, probability, chosen) in zip(
        paths, sources, files, found, strict=True
    ):
        # Scaled down at once: a map over each pixel of a large image would take gigabytes.
        pixels = shrunk(_read(path, preprocessing), LARGEST)
        drawn = overlay(
            pixels,
            place(heat_map, preprocessing, *pixels.shape[1:]),
            title=f"{classes[chosen]}, {probability:.3f}: {title}",
            signed=method in SIGNED,
        )
        with whole_file(file) as beside:
            drawn.save(beside, format="PNG", pnginfo=_note(source))
        pictures.append(Picture(path, classes[chosen], probability, method, made_at, file))
    return pictures


def connections_of(run: PathLike) -> list[Matrix]:
    """What `explain_connections` draws; raises what that does, before anything is drawn."""
    return connections(load(run, device="cpu").model)


def explain_connections(
    run: PathLike, output: PathLike | None = None, matrices: list[Matrix] | None = None
) -> Path:
    """Draw how much each layer reads of each earlier one: figure 5 of the DenseNet paper.

    Args:
        run: a run directory.
        output: folder of the picture, connections.png, or connections-2.png and so on where that
            is another picture than this one from before; None for explain/ in the run directory.
        matrices: as `connections_of` the run gave them; None to ask it.

    Raises:
        ConfigError: the run's network is no DenseNet.
        RunError: no run, no checkpoint in it yet, or a damaged one; the folder cannot be made.
    """
    matrices = connections_of(run) if matrices is None else matrices
    folder = _made(Path(run) / "explain" if output is None else Path(output))
    source = _digest("" if output is None else os.path.realpath(run))
    (path,) = _files(folder, ["connections"], [source], "")
    title = f"{Path(run).resolve().name}: how much each layer reads of each earlier one"
    draw_connections(matrices, path, title, {_SOURCE: source})
    return path


def place(heat_map: Tensor, preprocessing: Preprocessing, height: int, width: int) -> Tensor:
    """A map of what the network saw, over the image that this was made of: float32 [H, W].

    NaN where the preprocessing has cut the image off. The network's view is that of
    `Preprocessing.fit`, to within a pixel.
    """
    from densely.evaluation.overlay import stretch

    if preprocessing.crop is None:
        return stretch(heat_map, height, width)
    size = preprocessing.image_size
    short = max(size, int(size / preprocessing.crop))
    placed = torch.full((height, width), torch.nan)
    spans = []
    for side, other in ((height, width), (width, height)):
        scaled = int(short * side / other) if side > other else short
        first = round((scaled - size) / 2)
        begin, end = (round(at * side / scaled) for at in (first, first + size))
        spans.append(slice(min(begin, side - 1), max(end, begin + 1)))
    view = placed[spans[0], spans[1]]
    view.copy_(stretch(heat_map, *view.shape))
    return placed


def _read(path: str, preprocessing: Preprocessing) -> Tensor:
    with open_image(Path(path)) as opened:
        return decode(opened, preprocessing.channels, path)


def _ending(method: str, level: int | None, target: str | None) -> str:
    """What follows an image's name in that of its picture."""
    ending = f"-{method}"
    if level is not None:
        ending += f"-level{level}"
    if target is not None:
        ending += "-" + re.sub(r"[^\w.+-]+", "-", target)  # "T-shirt/top" is no file
    return ending


def _files(folder: Path, paths: Sequence[str], sources: Sequence[str], ending: str) -> list[Path]:
    """Where the pictures go: nowhere that one of another image is, now or from before."""
    taken: set[str] = set()
    files = []
    for path, source in zip(paths, sources, strict=True):
        stem = _shortened(Path(path).stem)
        for number in count(1):
            file = folder / f"{stem}{ending}{f'-{number}' if number > 1 else ''}.png"
            name = file.name.casefold()  # some file systems do not tell A from a
            if name not in taken and (not file.exists() or _source_of(file) == source):
                break
        taken.add(name)
        files.append(file)
    return files


def _shortened(stem: str) -> str:
    """A name with room for an ending: file systems take 255 bytes."""
    name = os.fsencode(stem)
    return stem if len(name) <= 150 else name[:150].decode("utf-8", "ignore")


def _digest(*what: str) -> str:
    """Stands in a picture for what it shows, and need not tell where that was."""
    return hashlib.blake2b("\0".join(what).encode(errors="replace"), digest_size=16).hexdigest()


def _note(source: str) -> PngInfo:
    note = PngInfo()
    note.add_text(_SOURCE, source)
    return note


def _source_of(file: Path) -> str | None:
    """What a picture was drawn of; None if it is no picture that says so."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get(_SOURCE)
    except (OSError, Image.DecompressionBombError):
        return None


def _spare(paths: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse to draw over one of the images."""
    given = {Path(path).resolve() for path in paths}
    for file in files:
        if file.resolve() in given:
            raise ConfigError(
                f"{file} is one of the images and would be replaced: name another folder with "
                "--output"
            )


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output {folder}: cannot be written: {error.strerror}") from error
    return folder
