"""Draw the pictures of docs/chapter.md from a run of the chapter's network.

python benchmarks/chapter_pictures.py runs/d2l-001

Writes docs/pictures/heat-maps.png (the first test image of each class), connections.png, and,
where chromium is installed and the run has a report, report.png, the top of that page.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import densely
from densely import drawing
from densely.evaluation.explain_run import explain_connections
from densely.evaluation.judged import own_splits
from densely.evaluation.overlay import tile
from densely.training.run import RunDirectory

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
REPORT_SIZE = (1180, 1720)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    draw_heat_maps(run)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(explain_connections(run, folder), PICTURES / "connections.png")
    draw_report(run)


def draw_heat_maps(run: Path) -> None:
    classifier = densely.load(run)
    images = own_splits(RunDirectory.open(run), classifier, None).test
    first = [int((images.labels == label).nonzero()[0]) for label in range(10)]
    pixels = images.images[first]
    found = densely.explain(
        classifier.model, classifier.runtime.layout(classifier.preprocessing(pixels))
    )
    probabilities = classifier.probabilities(pixels)
    figure = drawing.new_figure(10, 3.3)
    for i, axes in enumerate(figure.subplots(2, 5).flat):
        axes.imshow(np.asarray(tile(pixels[i].numpy(), found.maps[i])))
        given = classifier.classes[int(found.targets[i])]
        said = f"{given}, {probabilities[i, found.targets[i]]:.3f}"
        label = classifier.classes[int(images.labels[first[i]])]
        title = said if given == label else f"{said}\n(is a {label})"
        drawing.anybodys([axes.set_title(title, fontsize=9)])
        axes.set_axis_off()
    drawing.save(figure, PICTURES / "heat-maps.png")


def draw_report(run: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    page = run / "report" / "report.html"
    if browser is None or not page.is_file():
        print("report.png is not drawn: it needs chromium, and densely evaluate before")
        return
    width, height = REPORT_SIZE
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--screenshot={PICTURES / 'report.png'}",
            f"--window-size={width},{height}",
            page.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
    )


if __name__ == "__main__":
    main()
