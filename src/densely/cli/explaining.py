"""`densely explain`."""

import json
from typing import Literal

from densely.cli.parser import Parser, add_fields, hardware_of
from densely.errors import ConfigError
from densely.training.config import HARDWARE, TrainConfig
from densely.words import on_one_line

Method = Literal["cam", "gradcam", "gradcam++", "integrated_gradients"]


def explain(parser: Parser, arguments: list[str]) -> None:
    """Show where a network looks: heat maps over images, and how its layers read each other."""
    parser.add_argument("run", type=str, metavar="RUN", help="run directory")
    images = parser.add_argument(
        "images",
        type=str,
        nargs="+",
        metavar="IMAGE",
        help="image files; with --connections none are needed",
    )
    parser.add_argument(
        "--method",
        type=Method,
        metavar="{cam,gradcam,gradcam++,integrated_gradients}",
        default="cam",
        help="how the maps are made; integrated gradients need captum",
    )
    parser.add_argument(
        "--level",
        type=int | None,
        metavar="N",
        help="dense block that gradcam looks at, from 1 on; null for the last",
    )
    parser.add_argument(
        "--target",
        type=str | None,
        metavar="CLASS",
        help="class to look for; null for each image's likeliest",
    )
    parser.add_argument(
        "--connections",
        action="store_true",
        help="draw how much each layer reads of each earlier one (figure 5 of the paper)",
    )
    parser.add_argument(
        "--output", type=str | None, metavar="FOLDER", help="of the pictures; null for RUN/explain"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    add_fields(parser, TrainConfig(), [HARDWARE])
    try:
        chosen = parser.parse_args(arguments)
    except ConfigError as error:
        if "required: images" not in str(error):
            raise
        if "--connections" not in arguments:
            raise ConfigError(
                f"no IMAGE given: name image files, or --connections (see {parser.prog} --help)"
            ) from error
        # Not before: argparse would settle for no image where a flag stands between RUN and IMAGE.
        images.nargs, images.required = "*", False
        chosen = parser.parse_args(arguments)

    given = {"--method": chosen.method != "cam", "--level": chosen.level, "--target": chosen.target}
    if not chosen.images and (flags := [flag for flag, is_given in given.items() if is_given]):
        raise ConfigError(f"{', '.join(flags)}: of heat maps, and no IMAGE is given")

    from rich.cells import cell_len, set_cell_size

    from densely.evaluation.explain_run import (
        connections_of,
        explain_connections,
        explain_images,
    )
    from densely.runtime import settle_process

    settle_process()
    # First, as it wants a DenseNet: nothing is drawn where it fails.
    matrices = connections_of(chosen.run) if chosen.connections else None
    if chosen.images:
        pictures = explain_images(
            chosen.run,
            chosen.images,
            method=chosen.method,
            level=chosen.level,
            target=chosen.target,
            output=chosen.output,
            **hardware_of(chosen),
        )
        names = [on_one_line(picture.image) for picture in pictures]
        labels = [on_one_line(picture.label) for picture in pictures]
        margin, width = max(map(cell_len, names)), max(map(cell_len, labels))
        for picture, name, label in zip(pictures, names, labels, strict=True):
            if chosen.json:
                print(json.dumps(picture.to_dict()))
                continue
            print(
                f"{set_cell_size(name, margin)}  {set_cell_size(label, width)}  "
                f"{picture.probability:6.4f}  "
                f"{on_one_line(str(picture.path))}"
            )
    if matrices is not None:
        path = str(explain_connections(chosen.run, chosen.output, matrices))
        print(json.dumps({"connections": path}) if chosen.json else path)
