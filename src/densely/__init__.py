"""densely: DenseNets for PyTorch, to learn, train, explain and serve them.

>>> import densely
>>> model = densely.create_model("d2l")
>>> summary = densely.train(densely.TrainConfig.from_values({"recipe": "quickstart"}))
>>> densely.load(summary.run).predict(["digit.png"])
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densely.errors import DenselyError as DenselyError
    from densely.evaluation.classifier import Classifier as Classifier
    from densely.evaluation.classifier import Prediction as Prediction
    from densely.evaluation.classifier import load as load
    from densely.evaluation.evaluate import evaluate as evaluate
    from densely.fused.accelerate import accelerate as accelerate
    from densely.fused.accelerate import restore as restore
    from densely.fused.report import Acceleration as Acceleration
    from densely.models.densenet import DenseNet as DenseNet
    from densely.models.fc_densenet import FCDenseNet as FCDenseNet
    from densely.models.registry import list_models as list_models
    from densely.models.registry import model_facts as model_facts
    from densely.training.config import TrainConfig as TrainConfig
    from densely.training.loop import train as train
    from densely.weights.convert import convert_weights as convert_weights
    from densely.weights.create import create_model as create_model
    from densely.weights.load import LoadReport as LoadReport
    from densely.weights.load import load_weights as load_weights
    from densely.weights.save import save_weights as save_weights

__version__ = "0.1.0"

# Where each public name lives; its module is imported when it is first used, so that
# `import densely` and `densely --help` stay quick: torch alone takes a second.
_PLACES = {
    "Acceleration": "densely.fused.report",
    "Classifier": "densely.evaluation.classifier",
    "DenseNet": "densely.models.densenet",
    "DenselyError": "densely.errors",
    "FCDenseNet": "densely.models.fc_densenet",
    "LoadReport": "densely.weights.load",
    "Prediction": "densely.evaluation.classifier",
    "TrainConfig": "densely.training.config",
    "accelerate": "densely.fused.accelerate",
    "convert_weights": "densely.weights.convert",
    "create_model": "densely.weights.create",
    "evaluate": "densely.evaluation.evaluate",
    "list_models": "densely.models.registry",
    "load": "densely.evaluation.classifier",
    "load_weights": "densely.weights.load",
    "model_facts": "densely.models.registry",
    "restore": "densely.fused.accelerate",
    "save_weights": "densely.weights.save",
    "train": "densely.training.loop",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
