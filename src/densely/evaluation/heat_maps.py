"""Where a network looks: maps of how much each place of an image speaks for a class.

With A_k(p) the K maps at a level, [K, *space], P their number of places, W the classifier's
weights, and g_k(p) = d logit_c / d A_k(p):

    CAM                   M(p) = sum_k W[c,k] A_k(p) / P, so that sum_p M(p) + bias_c = logit_c
    Grad-CAM              relu(sum_k a_k A_k(p))      a_k = mean_p g_k(p)
    Grad-CAM++            relu(sum_k w_k A_k(p))      w_k = sum_p s_k(p) relu(g_k(p)),
                                                      s = g^2 / (2 g^2 + g^3 sum_q A_k(q))
    integrated gradients  x * (mean of d logit_c / d x along the straight line from 0 to x)

At the last level of a network that ends in a global average and a linear layer g_k = W[c,k] / P
everywhere, and Grad-CAM is relu(CAM), scaled by nothing: the signed CAM says more there.

What such maps can tell: which places the value of a logit comes from. What they cannot: why, or
what would happen if a place were changed. Only methods are here whose maps depend on the weights
(Adebayo et al., "Sanity Checks for Saliency Maps", 2018); the tests repeat that check.

Sources: Zhou et al., "Learning Deep Features for Discriminative Localization" (2016); Selvaraju et
al., "Grad-CAM" (2017); Chattopadhay et al., "Grad-CAM++" (2018); Sundararajan, Taly, Yan,
"Axiomatic Attribution for Deep Networks" (2017).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densely.errors import ConfigError, DataError, unknown_name
from densely.evaluation.anatomy import Anatomy, read

HeatMapMethod = Literal["cam", "gradcam", "gradcam++", "integrated_gradients"]
METHODS: tuple[HeatMapMethod, ...] = get_args(HeatMapMethod)
#: Methods whose maps have places that speak against the class, below zero.
SIGNED: tuple[HeatMapMethod, ...] = ("cam", "integrated_gradients")
CHUNK = 32  # images computed at once
STEPS = 32  # along the line of integrated gradients

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Explanation:
    """Heat maps of a batch of images, on the network's device.

    Args:
        maps: float32 [N, *space]; as large as the maps at the level, or as the network's input for
            integrated gradients. In units of the logit for CAM and integrated gradients, where
            what is below zero speaks against the class; of no unit and at least 0 for the others.
        logits: [N, K], as the network's linear layer gives them, in its dtype.
        targets: int64 [N], the class that each map is for.
        method: how the maps were made.
        level: dense block that they were made at, from 1 on; None for integrated gradients.
    """

    maps: Tensor
    logits: Tensor
    targets: Tensor
    method: HeatMapMethod
    level: int | None

    def resized(self, size: Sequence[int]) -> Tensor:
        """The maps at another size, linear between their places: float32 [N, *size]."""
        dims = self.maps.dim() - 1
        if len(size) != dims or min(size) < 1:
            raise ConfigError(f"size={tuple(size)}: must be {dims} whole numbers from 1 on")
        return F.interpolate(self.maps[:, None], tuple(size), mode=_MODES[dims])[:, 0]


def explain(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    method: HeatMapMethod = "cam",
    level: int | None = None,
) -> Explanation:
    """Heat maps of where a network sees a class.

    The network is run in eval mode, without autocast, in the dtype of its weights, `CHUNK` images
    at a time. Only what stands above the maps is differentiated, and nothing of the network
    changes: modes, gradients, running statistics and `requires_grad` are as before.

    Args:
        model: densely's DenseNet or ResNet, or a DenseNet of torchvision, timm or MONAI; plain or
            accelerated; in 1D, 2D or 3D. It is checked on the first image that it is what it seems.
        x: [N, channels, *size], as the network takes it.
        target: class for all images, or for each; None for each image's likeliest.
        method: "cam" (the classifier's weights; last level only), "gradcam", "gradcam++" or
            "integrated_gradients" (needs captum).
        level: dense block (of a ResNet: stage) whose maps are weighed, from 1 on; None for the
            last. None for integrated gradients, which are of the image itself.

    Returns:
        The maps, with the logits.

    Raises:
        ConfigError: a target, method or level out of range, or a network without a global average
            and one linear layer; what is allowed is named.
        DataError: `x` is no batch of floating-point images, or the logits are not finite.
        ShapeError: (densely's networks) as their `forward`.
    """
    anatomy = read(model)
    level = _checked_level(anatomy, method, level)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 3 or len(x) == 0:
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(
            f"x is {given}: explain takes a batch as the network does, floats [N, channels, ...] "
            "with at least one image"
        )
    targets = _checked_targets(target, len(x), anatomy.classifier)
    weight = anatomy.classifier.weight
    found = []
    with _at_rest(model, weight.device):
        for start in range(0, len(x), CHUNK):
            # Copies, which autograd takes even if x and targets were made in inference mode.
            chunk = x[start : start + CHUNK].to(weight, copy=True)
            wanted = None if targets is None else targets[start : start + CHUNK].clone()
            if start == 0:
                anatomy.check(chunk[:1])
            found.append(_explain_chunk(anatomy, chunk, wanted, method, level))
    maps, logits, chosen = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    if not logits.isfinite().all():
        first = int((~logits.isfinite()).any(dim=1).nonzero()[0])
        raise DataError(f"x[{first}]: the network's outputs are not finite: nothing to explain")
    return Explanation(maps.float(), logits, chosen, method, level)


def _explain_chunk(
    anatomy: Anatomy,
    x: Tensor,
    targets: Tensor | None,
    method: HeatMapMethod,
    level: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, logits and targets of a chunk."""
    differentiates = method in ("gradcam", "gradcam++")
    with torch.no_grad():
        maps = anatomy.maps(x, level or anatomy.levels)
    with torch.set_grad_enabled(differentiates):
        maps.requires_grad_(differentiates)
        outputs = anatomy.continue_from(maps, level or anatomy.levels)
    logits = outputs.detach()
    if targets is None:
        targets = logits.argmax(dim=1)
    if level is None:
        return _integrated_gradients(anatomy, x, targets), logits, targets
    if method == "cam":
        weights = anatomy.classifier.weight[targets].detach() / maps[0, 0].numel()
        return _weighed(weights, maps), logits, targets
    (gradient,) = torch.autograd.grad(outputs.gather(1, targets[:, None]).sum(), maps)
    if method == "gradcam":
        weights = gradient.flatten(2).mean(dim=2)
    else:
        weights = _plus_plus(maps.detach().flatten(2), gradient.flatten(2))
    return _weighed(weights, maps.detach()).relu(), logits, targets


def _weighed(weights: Tensor, maps: Tensor) -> Tensor:
    """Sum over the channels: [N, K] and [N, K, *space] to [N, *space]."""
    return torch.einsum("nk,nkp->np", weights, maps.flatten(2)).view(len(maps), *maps.shape[2:])


def _plus_plus(maps: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++'s weight of each channel: [N, K, P] both, to [N, K].

    The paper differentiates exp(logit). Its derivatives are exp(logit) times powers of the
    gradient, as the network is linear between its kinks: the exponential leaves the ratio, and as
    a factor of the whole map is left out. The ratio is divided by g^2 here, so that 0/0, which
    counts as 0, does not come up, and the cube of a small number does not vanish.
    """
    divisor = 2 + gradient * maps.sum(dim=2, keepdim=True)
    share = torch.where(divisor == 0, 0, 1 / divisor)
    return (share * gradient.relu()).sum(dim=2)


def _integrated_gradients(anatomy: Anatomy, x: Tensor, targets: Tensor) -> Tensor:
    """Summed over the channels: [N, *size]. From 0, the mean image of a standardised input."""
    attribution = (
        _captum()
        .IntegratedGradients(anatomy.logits)
        .attribute(x, baselines=0, target=targets, n_steps=STEPS, internal_batch_size=CHUNK)
    )
    return attribution.detach().sum(dim=1)  # type: ignore[no-any-return]


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise ConfigError(
            'integrated gradients need captum: pip install "densely[explain]"'
        ) from error
    return captum.attr


@contextmanager
def _at_rest(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which a network is in eval mode and frozen, at full precision."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:  # or their gradients would be computed, for nobody
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in learning:
            parameter.requires_grad_(True)


def _checked_level(anatomy: Anatomy, method: str, level: int | None) -> int | None:
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS))
    if method == "integrated_gradients":
        if level is not None:
            raise ConfigError(
                f"level={level}: integrated gradients are of the image, not of a block; leave the "
                "level out, or take gradcam"
            )
        _captum()
        return None
    level = anatomy.levels if level is None else anatomy.checked(level)
    if method == "cam" and level < anatomy.levels:
        raise ConfigError(
            f"level={level}: cam weighs the maps that the classifier reads, at level "
            f"{anatomy.levels}; take gradcam or gradcam++ for others"
        )
    return level


def _checked_targets(
    target: int | Sequence[int] | Tensor | None, images: int, classifier: nn.Linear
) -> Tensor | None:
    """Targets of all images, int64 on the network's device."""
    if target is None:
        return None
    classes, device = classifier.out_features, classifier.weight.device
    try:
        targets = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError):
        targets = torch.empty(0)
    if targets.dim() == 0:
        targets = targets.expand(images)
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not whole or targets.shape != (images,) or not ((targets >= 0) & (targets < classes)).all():
        given = " ".join(str(target).split())
        raise ConfigError(
            f"target={given}: must be a class from 0 to {classes - 1}, or a list of {images}, one "
            "for each image"
        )
    return targets.long()
