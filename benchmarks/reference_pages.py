"""Writes docs/models.md and docs/weights.md: `python benchmarks/reference_pages.py`.

Their tables come from the code, so that they stay true; a test holds the pages against it.
"""

from collections.abc import Callable
from pathlib import Path

from densely.models import list_models, model_facts
from densely.weights import PRETRAINED
from densely.weights.dialects import ALIASES, DIALECTS

DOCS = Path(__file__).parents[1] / "docs"

MODELS = """\
# Models

Made by `python benchmarks/reference_pages.py` from the code. `densely models` prints the same
table, `densely.list_models("*bc*")` gives the names.

| name | parameters | GMACs | at | from pixels | task |
|---|---|---|---|---|---|
{rows}

GMACs are multiplications with addition, in thousands of millions, of one image's forward pass,
convolutions and linear layers, at the size given. They are those that densely does: a transition
pools before its 1x1 convolution, which is the same function at a quarter of that convolution's
cost, so DenseNet-121 takes 2.60 where the order of the paper's table takes 2.83. "From pixels" is
the smallest image; the ImageNet networks get the small stem for images of up to 64 pixels
(`image_size=64`), and take 8 then.

## One class for the family

```python
from densely import DenseNet, create_model

DenseNet(growth_rate=12, block_config=(12, 12, 12), bn_size=None, compression=1.0)  # plain
DenseNet(growth_rate=12, block_config=(16, 16, 16), bn_size=4, compression=0.5)  # BC
create_model("densenet121", image_size=32)  # the small stem
create_model("densenet121", spatial_dims=3, in_channels=1)  # volumes
create_model("densenet121", spatial_dims=3, strides=[(1, 2, 2), (1, 2, 2), *[(2, 2, 2)] * 3])
create_model("densenet121", norm="group", activation="silu")
create_model("densenet121", transition_pool="max", init="torchvision")
create_model("densenet121", drop_rate=0.2, classifier_drop_rate=0.5, drop_path_rate=0.1)
create_model("densenet121", num_classes=0)  # pooled features: 1024 an image
create_model("densenet121", output_stride=8)  # dilated, for dense prediction
```

- **Dropout** (`drop_rate`) follows each convolution but the first, as in the paper. torchvision,
  timm and MONAI drop after the last convolution of a layer only. `classifier_drop_rate` stands
  before the classifier (timm's `drop_rate`); `drop_path_rate` is stochastic depth: whole images
  are spared what a layer adds, the deeper the more often.
- **Starts** (`init`): "fan_out" is the authors', "torchvision" (fan-in) that of torchvision, timm
  and MONAI, "xavier" the chapter's.
- **Transitions** pool by average: each hands on what all layers before it have made, and a mean
  keeps a trace of every value and gives each a gradient, where a maximum keeps one in four.
- **Features**: `model.features(x)` gives the last maps; `model.forward_features(x, levels=(1, 2,
  3, 4))` the output of each block, `feature_channels` and `feature_strides` say what to expect.
- **Segmentation**: `create_model("fc_densenet103", num_classes=11)` gives a class for each pixel.
  Parameters: 1,376,795 (56), 3,463,243 (67) and 9,322,091 (103) at 11 classes. The paper prints
  1.5, 3.5 and 9.4 million; with the norms' running statistics counted as well these are 1.40, 3.50
  and 9.43 million, so that the last two agree, and the 1.5 of the first remains unexplained.

`torch.compile(fullgraph=True)` and `torch.export` take every one of them.
"""

WEIGHTS = """\
# Weights

Made by `python benchmarks/reference_pages.py` from the code.

## Dialects

`densely.load_weights(model, source)` finds the dialect by the keys, strips what a wrapper put
before them (`module.`, `model.`, `backbone.`, ...), unpacks checkpoints (`state_dict` and others
beside), checks every shape, and loads all or nothing. `densely.save_weights(model, path, dialect)`
and `densely convert SRC DST --to NAME` write.

| dialect | whose |
|---|---|
{dialects}

{aliases}

- **Formats** show in a file's first bytes when it is read, and in its ending when it is written:
  safetensors (preferred), PyTorch's `.pt`, `.pth`, `.tar`, and Keras's `.h5` and `.weights.h5`
  (`pip install "densely[keras]"`).
- **No code runs.** PyTorch's files are read with `weights_only=True`. A whole pickled model of
  torchvision, timm, MONAI or torchxrayvision, also of before PyTorch 1.6, is read with inert
  stand-ins in place of its classes. Anything else in a pickle is refused, by name.
- **What does not fit** is named key by key, with the nearest explanation ("this is a 14-class
  head: pass num_classes=14 or head='skip'"), and nothing is loaded.
- **Numbers** stay to the bit. Other precisions are cast, and the report says so. Keras counts no
  batches: `num_batches_tracked` is 0 after loading its files.
- **Keras** differs in two things: its norms' epsilon, 1.001e-5, which `load_weights` sets and
  safetensors files remember, and the running variance, which it updates by the biased estimate.
- **Other channels**: `stem="adapt"` shares the kernels out among the new channels so that their
  sum stays: an image whose channels are all alike gives the same response as before.

## Published weights

`densely.create_model("densenet121", weights="imagenet")`, or `densely train --weights imagenet`.
Files are looked for in `weights/` below the folder that DENSELY_DATA names, then in the cache;
they are fetched once, resumed where they were cut, and verified by as much of a SHA-256 as is
published. `model.preprocessing` says what images they want.

| model | weights | from | SHA-256 | licence | accuracy as published | images |
|---|---|---|---|---|---|---|
{pretrained}

The addresses are in `densely.weights.PRETRAINED`. None of these files was at hand where densely
is tested: the loading is tested with files of the tests' own in each format and dialect. timm's
densenetblur121d is not among them, since densely has no blur pooling.
"""


def models() -> str:
    """The page of models."""
    rows = []
    for name in list_models():
        facts = model_facts(name)
        shape = "x".join(map(str, facts.input_shape))
        rows.append(
            f"| `{name}` | {facts.parameters:,} | {facts.macs / 1e9:.3f} | {shape} "
            f"| {facts.min_image_size} | {facts.task} |"
        )
    return MODELS.format(rows="\n".join(rows))


def weights() -> str:
    """The page of weights."""
    dialects = [f"| `{one.name}` | {one.about} |" for one in DIALECTS.values()]
    aliases = ", ".join(f"`{name}` is `{of}`" for name, of in ALIASES.items())
    rows = []
    for one in PRETRAINED:
        prep = one.preprocessing
        colour = "grey" if prep.channels == 1 else "RGB"
        digits = one.sha256[:12] if one.sha256 else "not given"
        rows.append(
            f"| `{one.model}` | `{one.tag}` | {one.origin} | {digits} | {one.licence} "
            f"| {one.accuracy or 'not given'} | {colour} {prep.image_size}, {prep.interpolation}, "
            f"middle {prep.crop:.1%} |"
        )
    return WEIGHTS.format(
        dialects="\n".join(dialects), aliases=f"Other names: {aliases}.", pretrained="\n".join(rows)
    )


PAGES: dict[str, Callable[[], str]] = {"models.md": models, "weights.md": weights}


if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
