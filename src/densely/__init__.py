"""densely: DenseNets for PyTorch, to learn, train, explain and convert them.

>>> import densely
>>> model = densely.create_model("d2l")
>>> summary = densely.train(densely.TrainConfig.from_values({"recipe": "quickstart"}))
>>> densely.load(summary.run).predict(["digit.png"])
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densely.comparison.compare import Comparison as Comparison
    from densely.comparison.compare import compare as compare
    from densely.errors import DenselyError as DenselyError
    from densely.evaluation.classifier import Classifier as Classifier
    from densely.evaluation.classifier import Prediction as Prediction
    from densely.evaluation.classifier import load as load
    from densely.evaluation.evaluate import evaluate as evaluate
    from densely.evaluation.heat_maps import Explanation as Explanation
    from densely.evaluation.heat_maps import explain as explain
    from densely.evaluation.report import Report as Report
    from densely.evaluation.report import report as report
    from densely.evaluation.scores import multilabel_scores as multilabel_scores
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
    "Comparison": "densely.comparison.compare",
    "DenseNet": "densely.models.densenet",
    "DenselyError": "densely.errors",
    "Explanation": "densely.evaluation.heat_maps",
    "FCDenseNet": "densely.models.fc_densenet",
    "LoadReport": "densely.weights.load",
    "Prediction": "densely.evaluation.classifier",
    "Report": "densely.evaluation.report",
    "TrainConfig": "densely.training.config",
    "accelerate": "densely.fused.accelerate",
    "compare": "densely.comparison.compare",
    "convert_weights": "densely.weights.convert",
    "create_model": "densely.weights.create",
    "evaluate": "densely.evaluation.evaluate",
    "explain": "densely.evaluation.heat_maps",
    "list_models": "densely.models.registry",
    "load": "densely.evaluation.classifier",
    "load_weights": "densely.weights.load",
    "model_facts": "densely.models.registry",
    "multilabel_scores": "densely.evaluation.scores",
    "report": "densely.evaluation.report",
    "restore": "densely.fused.accelerate",
    "save_weights": "densely.weights.save",
    "train": "densely.training.loop",
}
__all__ = sorted(_PLACES)
#: Modules that are named in the documentation, and need no import of their own.
_MODULES = ("chapter", "weights")


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in _MODULES:
        return import_module(f"densely.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
