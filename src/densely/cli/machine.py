"""`densely bench` and `densely doctor`."""

import dataclasses
import json

from densely.cli.parser import Parser, add_fields


def bench(parser: Parser, arguments: list[str]) -> None:
    """Measure speed and memory beside other DenseNets, in turns; leave tables and pictures.

    Begin with `densely bench --quick`, a look in a minute or two. Without options all is measured,
    in a quarter of an hour on two cores; `--net d2l --mode train` measures a part. Written to
    --output: bench-DEVICE.json with every figure, machine, versions and commit; bench-DEVICE.png,
    bars of speed and memory; bench-DEVICE-depth.png, memory against depth.

    Each network runs as densely and as its peers run it: torchvision, timm and MONAI, or a plain
    PyTorch net, as shipped and tuned. All have one turn before any has the next; ratios are taken
    round by round. A peer that is not installed is a named gap. Run nothing beside it.

    `--tune` is for GPUs other than an H100, which the kernels' launches were made for: it measures
    others in place, in a step of each --net and --mode, and keeps the fastest.
    """
    from densely.bench.config import BenchConfig

    # Read first, so that --help shows the defaults that will hold.
    add_fields(parser, BenchConfig.starting_from(quick="--quick" in arguments))
    chosen = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(BenchConfig)]
    config = BenchConfig(**{name: getattr(chosen, name) for name in names})

    if config.tune:
        from densely.bench.tune import run_tune

        run_tune(config)
        return

    from densely.bench.run import run_bench

    run_bench(config)


def doctor(parser: Parser, arguments: list[str]) -> None:
    """Print what a bug report needs: versions, hardware, what was chosen and why, data folders."""
    parser.add_argument("--device", metavar="TEXT", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args(arguments)

    from densely.doctor import diagnosis
    from densely.runtime import settle_process

    settle_process()  # as the commands that compute do
    facts = diagnosis(chosen.device)
    if chosen.json:
        print(json.dumps(facts))
        return
    reasons = facts.pop("reasons")
    assert isinstance(reasons, dict)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {text}" for name, text in value.items())
        lines = value if isinstance(value, list) else [value]
        because = f" ({reasons[key]})" if key in reasons else ""
        print(f"{key.replace('_', ' ') + ':':26}{lines[0]}{because}")
        for line in lines[1:]:
            print(f"{'':26}{line}")
