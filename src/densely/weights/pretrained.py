"""Published weights: where they are, whose they are, how good, and what images they want.

A name stands for weights of one network: `imagenet` are torchvision's (the authors' own, ported),
`ra_in1k` and `tv_in1k` timm's, `xray_...` torchxrayvision's. A file is looked for in the folder
DENSELY_DATA under `weights/`, then in the cache folder; it is fetched there when it is not.
Fetching goes on where it was cut, and a digest, as far as its publisher gives one, decides whether
the file is the right one.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from densely.cache import cache_folder
from densely.data.download import download, has_digest
from densely.data.locations import user_folders
from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError, DataError, WeightsError, unknown_name

SUBFOLDER = "weights"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCHVISION = Preprocessing(224, 3, _MEAN, _STD, crop=0.875)
_TIMM = Preprocessing(224, 3, _MEAN, _STD, crop=0.875, interpolation="bicubic")
# Pixels from -1024 to 1024, of the square in the middle.
_XRAY = Preprocessing(224, 1, (0.5,), (1 / 2048,), crop=1.0)


@dataclass(frozen=True)
class Pretrained:
    """Published weights of a network.

    Args:
        model: name of the network.
        tag: name of the weights.
        origin: who published them.
        url: their address.
        sha256: as many digits of it as the publisher gives; None where there are none.
        licence: of the weights, as published.
        accuracy: as published, in words; None where the publisher gives none.
        preprocessing: of the images that they want.
        num_classes: outputs of the head.
        labels: what the outputs stand for, where that is not ImageNet's 1000 classes; empty for
            one that was not trained.
    """

    model: str
    tag: str
    origin: str
    url: str
    sha256: str | None
    licence: str
    accuracy: str | None
    preprocessing: Preprocessing
    num_classes: int = 1000
    labels: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Name of the file in the cache: its publisher's, made unique where it is not."""
        name = self.url.rpartition("/")[2]
        return f"{self.model}.{self.tag}.safetensors" if name == "model.safetensors" else name

    @property
    def digest(self) -> str | None:
        """The digest, as `densely.data.download.has_digest` takes it."""
        return None if self.sha256 is None else f"sha256:{self.sha256}"


def _torchvision(model: str, sha256: str, top1: float, top5: float) -> Pretrained:
    return Pretrained(
        model,
        "imagenet",
        "torchvision",
        f"https://download.pytorch.org/models/{model}-{sha256}.pth",
        sha256,
        "BSD-3-Clause",
        f"ImageNet top-1 {top1}, top-5 {top5}",
        _TORCHVISION,
    )


def _timm(model: str, tag: str, revision: str, sha256: str | None) -> Pretrained:
    return Pretrained(
        model,
        tag,
        "timm",
        f"https://huggingface.co/timm/{model}.{tag}/resolve/{revision}/model.safetensors",
        sha256,
        "Apache-2.0",
        None,
        _TIMM,
    )


_XRAY_LABELS = (
    "Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema",
    "Fibrosis", "Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass",
    "Hernia", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum",
)  # fmt: skip


#: What CheXpert and MIMIC have no labels of.
_NOT_IN_REPORTS = {
    "Infiltration", "Emphysema", "Fibrosis", "Pleural_Thickening", "Nodule", "Mass", "Hernia",
}  # fmt: skip


def _xray(tag: str, data: str, untrained: Collection[str] = ()) -> Pretrained:
    """Files of torchxrayvision 1.x: whole pickled models, read without running what is in them.

    `untrained` are the labels that their data lack: the outputs are there and mean nothing.
    Source: the operating points of torchxrayvision's models, which have none for these.
    """
    return Pretrained(
        "densenet121",
        f"xray_{tag}",
        "torchxrayvision",
        "https://github.com/mlmed/torchxrayvision/releases/download/v1/"
        f"{data}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        None,
        "Apache-2.0",
        None,
        _XRAY,
        num_classes=18,
        labels=tuple("" if name in untrained else name for name in _XRAY_LABELS),
    )


PRETRAINED: tuple[Pretrained, ...] = (
    _torchvision("densenet121", "a639ec97", 74.434, 91.972),
    _torchvision("densenet161", "8d451a50", 77.138, 93.560),
    _torchvision("densenet169", "b2777c0a", 75.600, 92.806),
    _torchvision("densenet201", "c1103571", 76.896, 93.370),
    _timm("densenet121", "ra_in1k", "e65bed9f92a2e438879b179438d22ed719be26d6", None),
    # The authors' weights as above, without pickle.
    _timm(
        "densenet121",
        "tv_in1k",
        "main",
        "c894c6d9caa317a8ca1942986dee7a16a86c77734a4d691d2abe05389cfef358",
    ),
    _timm("densenet161", "tv_in1k", "359c7ecf29a2da61381f4725fe59889ca80ad29b", None),
    _timm("densenet169", "tv_in1k", "8c033a1f91d746e37e23229bf0445fff2125c89e", None),
    _timm("densenet201", "tv_in1k", "main", None),
    _xray("all", "nih-pc-chex-mimic_ch-google-openi-kaggle"),
    _xray("nih", "nih", _XRAY_LABELS[14:]),
    _xray("pc", "pc", {"Lung Lesion", "Lung Opacity", "Enlarged Cardiomediastinum"}),
    _xray("chex", "chex", _NOT_IN_REPORTS),
    _xray("rsna", "kaggle", set(_XRAY_LABELS) - {"Pneumonia", "Lung Opacity"}),
    _xray("mimic_nb", "mimic_nb", _NOT_IN_REPORTS),
    _xray("mimic_ch", "mimic_ch", _NOT_IN_REPORTS),
)


def find_pretrained(model: str, tag: str) -> Pretrained:
    """The published weights of a network by their tag.

    Raises:
        ConfigError: there are none; the nearest tags are named.
    """
    tags = {one.tag: one for one in PRETRAINED if one.model == model}
    tag = {"IMAGENET1K_V1": "imagenet", "DEFAULT": "imagenet"}.get(tag, tag)  # torchvision's names
    if tag in tags:
        return tags[tag]
    if not tags:
        models = ", ".join(sorted({one.model for one in PRETRAINED}))
        raise ConfigError(f"weights='{tag}': {model} has no published weights; {models} have")
    raise ConfigError(
        f"{unknown_name(f'weights of {model}', tag, tags)} (a file of weights may be named as well)"
    )


def fetch(entry: Pretrained) -> Path:
    """The file of published weights, fetched where it is not at hand.

    Raises:
        DataError: it is not here and cannot be fetched; file and folder are named.
        WeightsError: a file of its name is here, and it is another one.
    """
    places = [folder / SUBFOLDER for folder in user_folders(None)]
    cached = cache_folder() / SUBFOLDER
    for folder in (*places, cached):
        path = folder / entry.file_name
        if path.is_file():
            if entry.digest is None or has_digest(path, entry.digest):
                return path
            if folder != cached:
                raise WeightsError(
                    f"{path}: not the published file: its SHA-256 does not begin with "
                    f"{entry.sha256}; remove it, or put the right one there"
                )
    try:
        download([entry.url], cached / entry.file_name, entry.digest)
    except (DataError, OSError) as error:
        digits = f" (SHA-256 begins with {entry.sha256})" if entry.sha256 else ""
        raise DataError(
            f"{error}.\nPut {entry.file_name}{digits} into {cached}, or into weights/ in the "
            "folder that DENSELY_DATA names."
        ) from error
    return cached / entry.file_name
