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
    from densely.models.densenet import DenseNet as DenseNet
    from densely.models.registry import create_model as create_model
    from densely.models.registry import model_names as model_names
    from densely.training.config import TrainConfig as TrainConfig
    from densely.training.loop import train as train

__version__ = "0.1.0"

# Where each public name lives; its module is imported when it is first used, so that
# `import densely` and `densely --help` stay quick: torch alone takes a second.
_PLACES = {
    "Classifier": "densely.evaluation.classifier",
    "DenseNet": "densely.models.densenet",
    "DenselyError": "densely.errors",
    "Prediction": "densely.evaluation.classifier",
    "TrainConfig": "densely.training.config",
    "create_model": "densely.models.registry",
    "evaluate": "densely.evaluation.evaluate",
    "load": "densely.evaluation.classifier",
    "model_names": "densely.models.registry",
    "train": "densely.training.loop",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
