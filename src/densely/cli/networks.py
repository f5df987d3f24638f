"""`densely models` and `densely convert`."""

import dataclasses
import json

from densely.cli.parser import Parser
from densely.errors import ConfigError


def convert(parser: Parser, arguments: list[str]) -> None:
    """Rewrite weights of one package for another: torchvision, timm, MONAI, Keras, ...

    The dialect of SRC is found by its keys, every shape is checked, and DST is written whole or
    not at all. The format of SRC shows in its first bytes, that of DST in its ending:
    .safetensors, .pth, .pt, .tar, .bin; .h5 and .weights.h5 for Keras (pip install
    "densely[keras]").
    """
    parser.add_argument("source", type=str, metavar="SRC", help="file of weights")
    parser.add_argument("target", type=str, metavar="DST", help="file to write")
    parser.add_argument(
        "--to",
        type=str,
        metavar="NAME",
        default="densely",
        help="densely, torchvision, torchvision_legacy, timm, monai, keras, efficient, "
        "andreasveit or bamos",
    )
    parser.add_argument(
        "--from", dest="dialect", type=str, metavar="NAME", default="auto", help="dialect of SRC"
    )
    parser.add_argument(
        "--prefix",
        type=str | None,
        metavar="TEXT",
        help="what stands before the network's keys, such as encoder.; others are left out",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run both files on the same input, by the package itself where it is installed, and "
        "print the largest difference of logits",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args(arguments)

    from densely.weights.convert import convert_weights

    done = convert_weights(
        chosen.source,
        chosen.target,
        to=chosen.to,
        dialect=chosen.dialect,
        prefix=chosen.prefix,
        check=chosen.check,
    )
    if chosen.json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    print(f"{done.source}: {done.network}, {done.tensors} tensors, {done.dialect} names")
    if done.ignored:
        print(f"left out: {', '.join(done.ignored)}")
    for note in done.notes:
        print(note)
    for by, difference in done.differences.items():
        if difference is None:
            print(f"not checked by {by}")
        else:
            print(
                f"largest difference of logits, {by}: {difference:.3g} (logits up to "
                f"{done.scale:.3g})"
            )
    print(f"written: {done.target}, {done.to} names")


def models(parser: Parser, arguments: list[str]) -> None:
    """List the networks: parameters, multiplications of one image, smallest image."""
    parser.add_argument(
        "pattern", type=str, nargs="?", metavar="PATTERN", default="*", help='such as "*bc*"'
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    chosen = parser.parse_args(arguments)

    from densely.models.registry import list_models, model_facts

    names = list_models(chosen.pattern) or list_models(f"*{chosen.pattern}*")
    if not names:
        raise ConfigError(
            f"no network is called like {chosen.pattern}; known: {', '.join(list_models())}"
        )
    rows = [model_facts(name) for name in names]
    if chosen.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return
    print(f"{'name':20}{'parameters':>12}{'GMACs':>8}  {'at':12}{'from pixels':>11}  task")
    for row in rows:
        print(
            f"{row.name:20}{row.parameters:12,}{row.macs / 1e9:8.3f}  "
            f"{'x'.join(map(str, row.input_shape)):12}{row.min_image_size:11}  {row.task}"
        )
