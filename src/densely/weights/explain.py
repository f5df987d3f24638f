"""Why weights do not fit: every key, and the nearest explanation first."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from densely.errors import WeightsError
from densely.weights.architecture import Architecture, architecture
from densely.weights.compare import mismatch
from densely.weights.dialects import Place
from densely.weights.translate import Translated, key_of

#: Keys of each kind that a message names; an error of all 700 would be read by nobody.
SHOWN = 8


def require_fit(
    found: Translated,
    weights: Mapping[Place, Tensor],
    wanted: Mapping[Place, Tensor],
    where: str,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    hint: str = "",
) -> list[Place]:
    """Hold translated weights against a DenseNet's.

    Args:
        found: what the file holds.
        weights: those of its weights that are to fit.
        wanted: the network's, by place.
        where: the file.
        missing: keys that the network has beside a DenseNet's, and the file has not.
        unexpected: keys of the file that are no DenseNet's.
        hint: what to add to the message.

    Returns:
        The only ones that may be missing: counts of batches.

    Raises:
        WeightsError: something does not fit; see `explain`.
    """
    differing = mismatch(weights, wanted)
    missing = [key_of(place) for place in differing.missing if not place.is_count] + [*missing]
    unexpected = [*unexpected, *map(key_of, differing.unexpected)]
    if missing or unexpected or differing.wrong:
        message = explain(
            where,
            found.dialect.name,
            found.weights,
            wanted,
            missing=missing,
            wrong=[(key_of(place), value, aim) for place, value, aim in differing.wrong],
            unexpected=unexpected,
        )
        raise WeightsError(message + hint, _asked(found.weights, wanted))
    return differing.missing


def explain(
    where: str,
    dialect: str,
    given: Mapping[Place, Tensor],
    expected: Mapping[Place, Tensor],
    *,
    missing: Sequence[str],
    wrong: Sequence[tuple[str, Tensor, Tensor]],
    unexpected: Sequence[str],
) -> str:
    """A message: what does not fit, why that probably is, and what to do.

    Args:
        where: the file.
        dialect: whose names it has.
        given: weights of the file by place; empty where unknown.
        expected: weights of the model, likewise.
        missing: keys that the model has and the file has not.
        wrong: keys of another shape or kind of number, with the file's and the model's tensor.
        unexpected: keys that the file has and the model has not.
    """
    reasons = _reasons(given, expected)
    lines = [
        f"{where}: does not fit the model ({dialect} names): {len(missing)} keys missing, "
        f"{len(unexpected)} unexpected, {len(wrong)} of another shape or type; nothing was loaded"
    ]
    lines += [f"  {reason}" for reason in reasons]
    wrong_lines = [f"{key} is {_told(a)}, expected {_told(b)}" for key, a, b in wrong]
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong_lines)):
        if keys:
            more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            lines.append(f"  {title}: {', '.join(keys[:SHOWN])}{more}")
    return "\n".join(lines)


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _both(
    given: Mapping[Place, Tensor], expected: Mapping[Place, Tensor]
) -> tuple[Architecture, Architecture] | None:
    """Of the file and of the model; None if one is none that is known."""
    try:
        return architecture(given, "file"), architecture(expected, "model")
    except WeightsError:
        return None


def _asked(
    given: Mapping[Place, Tensor], expected: Mapping[Place, Tensor]
) -> dict[str, str | bool]:
    """Arguments that would give the model the file's stem and biases, if it is the same network."""
    both = _both(given, expected)
    if both is None or _blocks(both[0]) != _blocks(both[1]):
        return {}
    asked: list[dict[str, str | bool]] = [{"stem": net.stem, "bias": net.bias} for net in both]
    file, model = asked
    return {name: value for name, value in file.items() if value != model[name]}


def _reasons(given: Mapping[Place, Tensor], expected: Mapping[Place, Tensor]) -> list[str]:
    both = _both(given, expected)
    if both is None:
        return []
    file, model = both
    reasons = []
    if file.spatial_dims != model.spatial_dims:
        reasons.append(
            f"these are {file.spatial_dims}-dimensional weights: pass "
            f"spatial_dims={file.spatial_dims}"
        )
    if _blocks(file) != _blocks(model):
        name = f"a {file.name}" if file.name else "another network"
        reasons.append(
            f"this is {name}: growth_rate={file.growth_rate}, block_config={file.block_config}, "
            f"num_init_features={file.num_init_features}, bn_size={file.bn_size}, "
            f"compression={file.compression:g}"
        )
        return reasons  # the rest follows from it
    if file.stem != model.stem:
        reasons.append(f"this network has the {file.stem} stem: pass stem='{file.stem}'")
    if file.bias != model.bias:
        reasons.append(
            f"its convolutions have {'biases' if file.bias else 'no bias'}: pass bias={file.bias}"
        )
    if file.in_channels != model.in_channels:
        reasons.append(
            f"its stem takes {file.in_channels} channels, the model's {model.in_channels}: pass "
            f"in_channels={file.in_channels} or stem='adapt'"
        )
    heads = [{p for p in weights if p.kind == "head"} for weights in (given, expected)]
    if any(heads) and file.num_classes != model.num_classes:
        if not heads[0]:
            reasons.append("it has no head: pass num_classes=0 or head='skip'")
        elif not heads[1]:
            reasons.append(f"this is a {file.num_classes}-class head: pass head='skip'")
        else:
            reasons.append(
                f"this is a {file.num_classes}-class head: pass num_classes={file.num_classes} "
                "or head='skip'"
            )
    return reasons


def _blocks(net: Architecture) -> tuple[object, ...]:
    return (net.growth_rate, net.block_config, net.num_init_features, net.bn_size, net.compression)
