"""The model card: the README.md of a run, for whoever finds it later."""

import shlex

from densely.environment import package_versions
from densely.training.checkpoint import ModelInfo
from densely.training.reporting import RunFacts, Summary
from densely.words import counted, on_one_line, printable


def model_card(facts: RunFacts, info: ModelInfo, summary: Summary) -> str:
    """Markdown that says what was trained, on what, how well, and how to use it."""
    config, prep = facts.config, info.preprocessing
    colour = "grey" if prep.channels == 1 else "RGB"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (prep.mean, prep.std))
    scaled = f"; mean {mean} subtracted, divided by {std}" if config.normalize else ""
    averaged = (
        f"; statistics of batch norms averaged over {config.norm_batches} batches"
        if config.norm_batches
        else ""
    )
    chosen = (
        f"epoch {summary.best_epoch}, chosen by the validation split"
        if facts.validation_images
        else f"epoch {summary.best_epoch}, the last one: there was no validation split"
    )
    options = "".join(f", {name} {value}" for name, value in config.options.items())
    began = f"| began with | {config.weights} |\n" if config.weights else ""
    names = ", ".join(map(on_one_line, info.classes[:20])) + ", ..." * (len(info.classes) > 20)
    names = names.replace("|", r"\|")
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return printable(f"""# {config.model} on {config.data}

![curves](curves.png)

| | |
|---|---|
| test accuracy | {summary.test.accuracy:.4f} on {facts.test_images:,} images |
| test loss | {summary.test.loss:.4f} |
| weights | {chosen} |
| network | {config.model}{options}, {facts.parameters:,} parameters |
{began}| classes | {len(info.classes)}: {names} |
| input | {colour} images, scaled to {prep.image_size}x{prep.image_size} pixels in [0, 1]\
{scaled} |
| training images | {facts.train_images:,}, and {facts.validation_images:,} for validation |
| training | {counted(config.epochs, "epoch")}, batch {config.batch_size}, SGD lr {config.lr:g} \
({config.schedule}), momentum {config.momentum:g}, weight decay {config.weight_decay:g}, \
seed {config.seed}{averaged} |
| computed on | {facts.device}, {facts.precision}, {facts.memory_format} |
| time | {summary.seconds:.0f} s in all, {summary.examples_per_s:,.0f} examples/s |
| versions | {versions} |

Use it:

    densely predict {shlex.quote(str(summary.run))} IMAGE...
    densely evaluate {shlex.quote(str(summary.run))}

or in Python:

    import densely
    densely.load({str(summary.run)!r}).predict(["IMAGE"])

Limits: it knows nothing but the classes above, and gives one of them to any picture at all. Its
probabilities are not calibrated until `densely evaluate` has done so. It was judged on one test
split of the same source as its training images; other cameras, other places and other times may
differ.
""")
