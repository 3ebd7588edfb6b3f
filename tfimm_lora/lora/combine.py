"""Making one adapter of several, by the rules of PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.config import make_config
from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.combination_rules import (
    MAJORITIES,
    PRUNING,
    combine_tensors,
    concatenate_ranks,
    low_rank_factors,
    signed_roots,
)
from tfimm_lora.lora.config import LoRAConfig, check_choice, check_rank
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.lora import LoRA
from tfimm_lora.lora.several import model_and_state
from tfimm_lora.lora.trainable import classifier_of, fully_trained_layers
from tfimm_lora.weights.names import iterate_layers, timm_path

COMBINATIONS = ("linear", "cat", "svd", *PRUNING, *(f"{rule}_svd" for rule in PRUNING))
# Methods whose factors can be combined one by one.
_FACTORED = ("lora", "rslora")


@dataclasses.dataclass
class _Place:
    """One layer, or one slice of it, with the updates that are combined there."""

    path: str
    layer: Any
    site: str
    updates: dict[str, list[Any]]


def combine_adapters(
    model: keras.Model,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str = "linear",
    density: float | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str = "total",
    svd_clamp: float | None = None,
    seed: int = 0,
) -> None:
    """Adds an adapter that is a weighted combination of others. It is not active yet.

    ``cat`` is the weighted sum of the updates exactly, its rank the sum of the ranks. ``svd`` is
    the best approximation of that sum by a lower rank. ``linear`` adds the factors A and B, each
    with the root of the weight: as cheap as one adapter, but not the sum of the updates. ``ties``,
    ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` prune first, by magnitude or at random;
    ``ties`` then leaves out what has not the sign of the majority. With ``_svd`` they work on the
    whole updates instead of the factors. Weights that the methods' scalings contain count as part
    of the update, for rsLoRA too, and the new adapter's scaling is 1.

    LoRA and rsLoRA take all types; IA³ takes ``linear``, the weighted sum of the gains; ``svd``
    and its relatives take any method whose update is added to the kernel, and make LoRA of it.
    A classifier or other layer that one of the adapters trains in full becomes the new one's,
    unweighted.

    Args:
        model: A LoRA model, or a feature extractor of one.
        names: Adapters to combine.
        weights: A weight for each, of any sign.
        name: Name of the new adapter.
        combination_type: ``linear``, ``cat``, ``svd``, ``ties``, ``dare_linear``, ``dare_ties``,
            ``magnitude_prune``, or one of the last four with ``_svd``. One adapter alone is always
            combined by ``linear``. Defaults to ``linear``.
        density: Share of the values that pruning leaves, in (0, 1].
        svd_rank: Rank of the new adapter with ``svd``. Defaults to the largest of the ranks.
        majority_sign_method: How ``ties`` elects signs: by ``total`` or by ``frequency``. Defaults
            to ``total``.
        svd_clamp: Quantile at which the factors of ``svd`` are cut off. Defaults to ``None``.
        seed: Seed of ``dare``. Defaults to 0.

    Raises:
        ValueError: A name is unknown or taken, methods differ or cannot be combined, ranks differ
            where they have to be equal, two adapters have their own values for a weight of the
            model, an argument is out of range, or adapters are switched off or merged. The model
            is as before.

    Example:
        >>> combine_adapters(model, ["cats", "dogs"], [0.5, 0.5], "pets", "cat")
    """
    backbone, state = model_and_state(model)
    state.check_open(backbone)
    _check_arguments(state, names, weights, combination_type, density, majority_sign_method)
    if svd_rank is not None:
        check_rank("svd_rank", svd_rank)
    if svd_clamp is not None and not 0 < svd_clamp <= 1:
        raise ValueError(f"svd_clamp has to be in (0, 1], found {svd_clamp!r}.")
    kind = "linear" if len(names) == 1 else combination_type
    method = _common_method(state, names, kind)
    by_svd = kind.endswith("svd")
    owner = _owner(backbone, state, names)
    places = _places(backbone, names, merge_slices=by_svd)
    rule = (kind.removesuffix("svd").rstrip("_") or "linear") if by_svd else kind
    generator = np.random.default_rng(seed)
    by_name = dict(zip(names, map(float, weights), strict=True))

    values: dict[str, dict[str, np.ndarray]] = {}
    ranks: dict[str, int] = {}
    largest = max(u.site.rank for p in places for own in p.updates.values() for u in own)
    for place in places:
        own_weights = [by_name[n] for n in place.updates]

        def combined(tensors: Any, factors: Any = own_weights) -> np.ndarray:
            return combine_tensors(rule, tensors, factors, density, majority_sign_method, generator)

        if by_svd:
            rank = _whole_groups(svd_rank or largest, place.layer)
            matrix = combined([_matrix(place, own) for own in place.updates.values()])
            a, b = low_rank_factors(matrix, rank, _groups(place.layer), svd_clamp)
            values[place.path] = _factors(place.layer, a, b)
        elif method == "ia3":
            rank = 1
            gains = {n: own[0].numpy_values()["ia3_l"] for n, own in place.updates.items()}
            ones = np.ones_like(next(iter(gains.values())))
            # Where an adapter has no gain, it leaves things as they are.
            every = [gains.get(n, ones) for n in names]
            values[place.path] = {"ia3_l": combined(every, list(by_name.values()))}
        else:
            a, b = _combined_factors(place, own_weights, kind, combined)
            rank = a.shape[-1]
            values[place.path] = {"kernel_lora_a": a, "kernel_lora_b": b}
        bias = _combined_bias(place, own_weights)
        if bias is not None:
            values[place.path]["lora_bias"] = bias
        ranks[place.path] = rank
    result = "lora" if by_svd and method not in _FACTORED else method
    fields = _fields(backbone, state, names, owner, result, ranks)
    state.add(backbone, name, make_config(LoRAConfig, {}, {**fields, "lora_adapter_name": name}))
    _assign(backbone, name, values)
    if owner is not None:
        state.kept[name] = {
            v.name: state.value_of(owner, v) for v in state.own_weights(backbone, name)
        }


def _check_arguments(
    state: AdapterState,
    names: Sequence[str],
    weights: Sequence[float],
    kind: str,
    density: float | None,
    majority: str,
) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"names has to be a list of one adapter or more, found {names!r}.")
    for name in names:
        state.check_known(name)
    if len(set(names)) < len(names):
        raise ValueError(f"An adapter is named twice: {', '.join(names)}.")
    if len(weights) != len(names) or not np.all(np.isfinite(np.asarray(weights, "float64"))):
        raise ValueError(f"Every adapter needs a weight: found {len(names)} names and {weights!r}.")
    check_choice("combination_type", kind, COMBINATIONS)
    check_choice("majority_sign_method", majority, MAJORITIES)
    prunes = kind.removesuffix("_svd") in PRUNING
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"{kind} needs a density in (0, 1], found {density!r}.")
    if not prunes and density is not None:
        raise ValueError(f"{kind} prunes nothing. Leave density out.")


def _common_method(state: AdapterState, names: Sequence[str], kind: str) -> str:
    """The method of all adapters, which has to be able to do the combination."""
    methods = {n: state.fields[n].lora_method for n in names}
    listed = ", ".join(f"{n} ({m})" for n, m in methods.items())
    if len(set(methods.values())) > 1:
        raise ValueError(
            f"Adapters of different methods cannot be combined: {listed}. Activate them together "
            "with lora.set_adapter, if they can act so."
        )
    method = next(iter(methods.values()))
    takes = {"ia3": kind == "linear"}.get(method, method in _FACTORED or kind.endswith("svd"))
    if METHODS[method].in_place or METHODS[method].combines is None or not takes:
        raise ValueError(
            f"combination_type {kind!r} cannot combine {listed}. 'linear', 'cat', 'ties', 'dare_*' "
            "and 'magnitude_prune' take lora and rslora, 'linear' also ia3; 'svd' and '*_svd' take "
            "every method whose update is added to the kernel."
        )
    options = [state.fields[n].lora_options for n in names]
    if any(o != options[0] for o in options) and not kind.endswith("svd"):
        raise ValueError(f"lora_options of the adapters differ ({listed}): {options}.")
    return method


def _owner(model: Any, state: AdapterState, names: Sequence[str]) -> str | None:
    """The adapter that has layers of its own, trained in full; at most one may."""
    own = {n: [v.name for v in state.own_weights(model, n)] for n in names}
    owners = [n for n, found in own.items() if found]
    biased = [n for n in owners if state.fields[n].lora_train_bias != "none"]
    if len(owners) > 1 or biased:
        who = owners[0] if not biased else biased[0]
        raise ValueError(
            f"{' and '.join(map(repr, owners))} train weights of the model itself "
            f"({own[who][0]}, ...), and these cannot be combined. Combine adapters of which one at "
            "most trains a classifier and none biases (lora_train_classifier=False, "
            "lora_train_bias='none')."
        )
    return owners[0] if owners else None


def _places(model: Any, names: Sequence[str], merge_slices: bool) -> list[_Place]:
    places = []
    for keras_path, layer in iterate_layers(model):
        if not isinstance(layer, LoRALayer):
            continue
        found = {n: layer.adapters[n].updates for n in names if n in layer.adapters}
        sites = {u.site.name for own in found.values() for u in own}
        module = timm_path(keras_path)
        mixed = "" in sites and len(sites) > 1
        if mixed and not merge_slices:
            raise ValueError(
                f"{module} is adapted as a whole by one adapter and in slices by another. Use "
                "combination_type='svd'."
            )
        for site in sorted({""} if mixed else sites):
            parent = module.rpartition(".")[0]
            path = f"{parent}.{site}".lstrip(".") if site else module
            own = {n: [u for u in us if mixed or u.site.name == site] for n, us in found.items()}
            places.append(_Place(path, layer, site, {n: us for n, us in own.items() if us}))
    return places


def _groups(layer: Any) -> int:
    return getattr(layer, "groups", 1) if isinstance(layer, keras.layers.Conv2D) else 1


def _whole_groups(rank: int, layer: Any) -> int:
    return -(-rank // _groups(layer)) * _groups(layer)


def _matrix(place: _Place, updates: Sequence[Any]) -> np.ndarray:
    """An adapter's whole update as (rows, outputs), scaling included."""
    layer, operation = place.layer, place.layer.operation
    rows, outputs = operation.kernel_sides(layer)
    whole = not place.site
    matrix = np.zeros((rows, outputs if whole else updates[0].site.size), "float32")
    for update in updates:
        change = _change(layer, update)
        term = operation.additive_kernel(layer, change)
        if term is None or change.changes_inputs or change.gain is not None:
            raise ValueError(
                f"{place.path}: the update is not one that is added to the kernel, so it cannot "
                "be combined."
            )
        value = np.asarray(ops.convert_to_numpy(operation.to_matrix(layer, term)), "float32")
        start = update.site.start if whole else 0
        matrix[:, start : start + value.shape[1]] = value
    return matrix


def _change(layer: Any, update: Any) -> Any:
    """What an update does now."""
    kernel = layer.kernel_tensor()
    if update.site.name:
        kernel = kernel[..., update.site.start : update.site.start + update.site.size]
    return update.update(kernel, update.values())


def _factors(layer: Any, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Matrices (rows, rank) and (rank / groups, outputs) as LoRA's variables."""
    if isinstance(layer, keras.layers.Conv2D):
        a = ops.convert_to_numpy(layer.operation.from_matrix(layer, a))
    else:
        shapes = layer.operation.factor_shapes(layer, a.shape[-1], b.shape[-1])
        a, b = a.reshape(shapes[0]), b.reshape(shapes[1])
    return {"kernel_lora_a": a, "kernel_lora_b": b}


def _combined_factors(
    place: _Place, weights: Sequence[float], kind: str, combined: Any
) -> tuple[np.ndarray, np.ndarray]:
    updates = [own[0] for own in place.updates.values()]
    scaled = [w * u.scaling for w, u in zip(weights, updates, strict=True)]
    factors = [_unscaled(place.layer, update) for update in updates]
    if kind == "cat":
        weighted = [(a * w, b) for (a, b), w in zip(factors, scaled, strict=True)]
        return concatenate_ranks(weighted, updates[0].rank_groups)
    ranks = {n: a.shape[-1] for n, (a, _) in zip(place.updates, factors, strict=True)}
    if len(set(ranks.values())) > 1:
        raise ValueError(
            f"{kind!r} adds factors of the same rank, and in {place.path} the ranks are {ranks}. "
            "Use combination_type='cat' or 'svd'."
        )
    roots_a, roots_b = signed_roots(scaled)
    return (
        combined([a for a, _ in factors], roots_a),
        combined([b for _, b in factors], roots_b),
    )


def _unscaled(layer: Any, update: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and B, those that an update starts from included."""
    change = _change(layer, update)
    a, b = (change.a, change.b) if change.a is not None else change.mixing
    return np.asarray(ops.convert_to_numpy(a)), np.asarray(ops.convert_to_numpy(b)) / update.scaling


def _combined_bias(place: _Place, weights: Sequence[float]) -> np.ndarray | None:
    """The weighted sum of the biases of B (LoRA's option ``bias``)."""
    total: np.ndarray | None = None
    for own, weight in zip(place.updates.values(), weights, strict=True):
        for update in own:
            bias = update.numpy_values().get("lora_bias")
            if bias is not None:
                term = weight * update.scaling * bias
                total = term if total is None else total + term
    return total


def _fields(
    model: Any,
    state: AdapterState,
    names: Sequence[str],
    owner: str | None,
    method: str,
    ranks: dict[str, int],
) -> dict[str, Any]:
    first = state.fields[names[0]]
    exact = {path: f"^{re.escape(path)}$" for path in ranks}
    rank = max(ranks.values())
    same = first.lora_method == method
    fields = {
        "lora_method": method,
        "lora_rank": rank,
        "lora_targets": tuple(exact.values()),
        "lora_rank_pattern": {exact[p]: r for p, r in ranks.items() if r != rank},
        "lora_dropout": first.lora_dropout if same else 0.0,
        "lora_options": dict(first.lora_options) if same else {},
        "lora_train_classifier": False,
    }
    cls = METHODS[method]
    if issubclass(cls, LoRA):
        # A scaling of 1.
        fields["lora_alpha"] = cls.alpha_for(1.0, rank)
        fields["lora_alpha_pattern"] = {
            exact[p]: cls.alpha_for(1.0, r) for p, r in ranks.items() if r != rank
        }
    if owner is not None:
        modules = fully_trained_layers(model, owner, state.fields[owner])
        classifiers = classifier_of(model)
        fields["lora_train_classifier"] = any(m in classifiers for m in modules)
        fields["lora_modules_to_save"] = tuple(m for m in modules if m not in classifiers)
    return fields


def _assign(model: Any, name: str, values: dict[str, dict[str, np.ndarray]]) -> None:
    for place in _places(model, [name], merge_slices=False):
        place.updates[name][0].assign(values[place.path])
