"""The fields of ``adapter_config.json``: what may be there, and what they are here."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tfimm_lora.lora.methods import METHODS, Method
from tfimm_lora.lora.methods.in_place import FOREIGN_TYPE
from tfimm_lora.weights.regex import check_regex

# A rank beyond this is a mistake or an attack on the memory.
MAX_RANK = 100_000


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RANK


def _is_rank(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list(value)


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_indices(value: Any) -> bool:
    return value is None or _is_count(value) or (
        isinstance(value, list) and all(_is_count(v) for v in value)
    )  # fmt: skip


def _is_ranks(value: Any) -> bool:
    return not value or (isinstance(value, dict) and all(map(_is_rank, value.values())))


def _is_alphas(value: Any) -> bool:
    return not value or (
        isinstance(value, dict) and all(_is_number(v) and v > 0 for v in value.values())
    )


def _is_masks(value: Any) -> bool:
    return not value or (
        isinstance(value, dict)
        and all(
            isinstance(mask, list) and all(isinstance(m, bool) for m in mask)
            for mask in value.values()
        )
    )


_ANY: tuple[Callable[[Any], bool], str] = (lambda value: True, "anything")
_COUNT = (_is_count, f"an integer from 0 to {MAX_RANK}")
_RANK = (_is_rank, f"an integer from 1 to {MAX_RANK}")
_POSITIVE = (lambda v: _is_number(v) and v > 0, "a positive number")
_NUMBER, _RATE = (_is_number, "a number"), (_is_rate, "a number from 0 to below 1")
_FLAG, _TEXT = (_is_flag, "true or false"), (_is_text, "a text")
_NAMES, _LIST = (_is_names, "a text or a list of texts"), (_is_list, "a list of texts")
_BIAS = (lambda v: v in ("none", "all", "lora_only"), "one of none, all, lora_only")
_VERA_BIAS = (lambda v: v in ("none", "all", "vera_only"), "one of none, all, vera_only")
_OFT_BIAS = (lambda v: v in ("none", "all", "oft_only"), "one of none, all, oft_only")
_BOFT_BIAS = (lambda v: v in ("none", "all", "boft_only"), "one of none, all, boft_only")

_COMMON = {
    "auto_mapping": _ANY,
    "base_model_name_or_path": _TEXT,
    "inference_mode": _FLAG,
    "modules_to_save": _LIST,
    "peft_type": _TEXT,
    "peft_version": _TEXT,
    "revision": _TEXT,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "task_type": _TEXT,
    "fan_in_fan_out": _FLAG,
    "init_weights": _ANY,
}
_LAYERS = {
    "layers_to_transform": (_is_indices, "an integer or a list of integers"),
    "layers_pattern": _NAMES,
}
_PATTERNS = {
    "rank_pattern": (_is_ranks, "an object with ranks (integers from 1) as values"),
    "alpha_pattern": (_is_alphas, "an object with positive numbers as values"),
}
# Only of interest for the first values, or for how the model runs.
_STARTING = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config",
             "megatron_core", "ensure_weight_tying")  # fmt: skip
_LORA = {
    **_LAYERS, **_PATTERNS, **dict.fromkeys(_STARTING, _ANY),
    "r": _RANK, "lora_alpha": _POSITIVE, "lora_dropout": _RATE, "bias": _BIAS,
    "use_rslora": _FLAG, "use_dora": _FLAG, "use_qalora": _FLAG, "qalora_group_size": _COUNT,
    "lora_bias": _FLAG,
    "init_lora_weights": (lambda v: isinstance(v, (bool, str)), "true, false or a text"),
}  # fmt: skip
_LYCORIS = {
    **_LAYERS, **_PATTERNS, "r": _RANK, "alpha": _POSITIVE, "rank_dropout": _RATE,
    "module_dropout": _RATE, "use_effective_conv2d": _FLAG,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "LORA": _LORA,
    "ADALORA": {
        **_LORA, "lora_alpha": _NUMBER, "target_r": _RANK, "init_r": _RANK, "tinit": _ANY,
        "tfinal": _ANY, "deltaT": _ANY, "beta1": _ANY, "beta2": _ANY, "orth_reg_weight": _ANY,
        "total_step": _ANY,
        "rank_pattern": (_is_masks, "an object with lists of true and false as values"),
    },
    "LOHA": _LYCORIS,
    "LOKR": {
        **_LYCORIS, "decompose_both": _FLAG, "rank_dropout_scale": _FLAG,
        "r": (lambda v: _is_number(v) and v >= 1 and isinstance(v, int), "an integer from 1"),
        "decompose_factor": (lambda v: v == -1 or _is_rank(v), "-1 or an integer from 1"),
    },
    "VERA": {
        **_LAYERS, "r": _RANK, "bias": _VERA_BIAS, "vera_dropout": _RATE, "d_initial": _NUMBER,
        "projection_prng_key": (lambda v: isinstance(v, int), "an integer"),
        "save_projection": _FLAG,
    },
    "IA3": {"feedforward_modules": _NAMES, "init_ia3_weights": _FLAG},
    "OFT": {
        **_LAYERS, "r": _COUNT, "oft_block_size": _COUNT, "module_dropout": _RATE,
        "bias": _OFT_BIAS, "coft": _FLAG, "eps": _NUMBER, "block_share": _FLAG,
        "use_cayley_neumann": _FLAG,
        "num_cayley_neumann_terms": _RANK,
    },
    "BOFT": {
        **_LAYERS, "boft_block_size": _COUNT, "boft_block_num": _COUNT, "bias": _BOFT_BIAS,
        "boft_n_butterfly_factor": _COUNT, "boft_dropout": _RATE,
    },
    "LN_TUNING": {},
}  # fmt: skip
"""Fields of PEFT's configs by ``peft_type``, beside those that all have, with their types."""

# Fields that make another model of the same tensors. So do flags and configs that are unknown.
_CHANGING = ("use_", "target_", "layer_replication", "trainable_", "alora_", "lora_")
_CHANGING_ENDS = ("_config", "_tokens", "_indices", "_replication", "_parameters", "_factor")
# Initialisations that change the frozen weights, so that A and B alone do not say the model.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raises for a field of the wrong type, and for an unknown one that changes the model.

    Args:
        config: Content of ``adapter_config.json``.
        source: Where it is from, for messages.

    Raises:
        ValueError: Names the field.
    """
    kind = str(config.get("peft_type"))
    known = {**_COMMON, **KNOWN.get(kind, {})}
    if kind == FOREIGN_TYPE:
        known |= {"method": _TEXT, "bias": _BIAS}
    unread = []
    for key, value in config.items():
        if key in known:
            test, wanted = known[key]
            if not test(value):
                raise ValueError(f"{source}: {key} has to be {wanted}, found {_short(value)}.")
        elif value and (key.startswith(_CHANGING) or key.endswith(_CHANGING_ENDS)):
            raise ValueError(
                f"{source}: {key} is {_short(value)}, which changes what the adapter does and "
                "cannot be read."
            )
        elif value:
            unread.append(key)
    if unread:
        warnings.warn(
            f"{source}: {', '.join(map(_short, unread))} is unknown and ignored.", stacklevel=2
        )
    for field in ("rank_dropout", "module_dropout"):
        if config.get(field):
            warnings.warn(
                f"{source}: {field} is not taken over; it acts in training only.", stacklevel=2
            )
    try:
        check_patterns(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_patterns(config: Mapping[str, Any]) -> None:
    """Raises unless all regular expressions of a config can be matched in bounded time.

    Raises:
        ValueError: Says which not.
    """
    texts = [config.get(f) for f in ("target_modules", "exclude_modules", "feedforward_modules")]
    patterns: list[Any] = [t for t in texts if isinstance(t, str)]
    patterns += config.get("modules_to_save") or []
    layers = config.get("layers_pattern") or []
    patterns += [layers] if isinstance(layers, str) else layers
    if config.get("peft_type") != "ADALORA":
        patterns += [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    for pattern in patterns:
        check_regex(pattern)


def method_of(config: Mapping[str, Any], source: str) -> str:
    """Returns the method of an adapter by its ``adapter_config.json``.

    Raises:
        ValueError: There is none.
    """
    found = [name for name, method in METHODS.items() if method.matches_peft(config)]
    if config.get("peft_type") == FOREIGN_TYPE and config.get("method") in METHODS:
        found = [config["method"]]
    if not found:
        known = sorted({m.peft_type for m in METHODS.values() if m.peft_type})
        flags = [k for k in config if k.startswith("use_") and config[k]]
        raise ValueError(
            f"{source}: peft_type is {_short(config.get('peft_type'))}"
            f"{' with ' + ', '.join(flags) if flags else ''}, which cannot be read. Known: "
            f"{', '.join(known)}."
        )
    return found[0]


def on_rewritten_base(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config of an adapter as it is for the base model that its initialisation left.

    Raises:
        ValueError: The adapter is of the base model as it was.
    """
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, str) or not initial.lower().startswith(_REWRITING):
        raise ValueError(
            f"{source}: rewritten_base=True, but init_lora_weights is {initial!r}, which does not "
            "change the base model's weights. Leave rewritten_base out."
        )
    return {**config, "init_lora_weights": True}


def initial_fields(config: Mapping[str, Any], method: type[Method], source: str) -> dict[str, Any]:
    """``lora_init`` where an initialisation has changed the frozen weights.

    Raises:
        ValueError: Nobody can say how, because it was random or needed data.
    """
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, str) or not initial.lower().startswith(_REWRITING):
        return {}
    if initial.lower() in ("pissa", "olora") and initial.lower() in method.initializations:
        return {"lora_init": initial.lower()}
    raise ValueError(
        f"{source}: init_lora_weights is {initial!r}, which changed the base model's weights "
        "before training in a way that the adapter does not record, so it does not fit the "
        "original ones. Convert it in PEFT first: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...). If the model has the "
        "base weights that PEFT changed, pass rewritten_base=True."
    )


def make_config(
    model_name: str,
    fields: Any,
    targets: Iterable[str],
    sites: Mapping[str, tuple[int, float]],
    updates: Mapping[str, list[Method]],
    modules: list[str],
) -> dict[str, Any]:
    """Builds the content of ``adapter_config.json``.

    Args:
        model_name: Name of the base model.
        fields: The adapter's :class:`~tfimm_lora.lora.LoRAConfig`.
        targets: Modules that it adapts, by PEFT's names.
        sites: Rank and alpha of each of them.
        updates: The method's instances in each of them.
        modules: Layers that are saved in full.
    """
    method = METHODS[fields.lora_method]
    config: dict[str, Any] = {
        "base_model_name_or_path": model_name,
        "inference_mode": True,
        "modules_to_save": modules or None,
        "peft_type": method.peft_type or FOREIGN_TYPE,
        "target_modules": method.peft_targets(sorted(targets)),
        "task_type": None,
    }
    known = KNOWN.get(str(method.peft_type), {})
    if "bias" in known or fields.lora_train_bias != "none":
        config["bias"] = fields.lora_train_bias
    if "alpha_pattern" in known:
        alpha = fields.lora_rank if fields.lora_alpha is None else fields.lora_alpha
        # PEFT reads patterns as regular expressions from a dot on.
        names = {m: "^" + re.escape(m) for m in sites}
        config["rank_pattern"] = {
            names[m]: r for m, (r, _) in sites.items() if r != fields.lora_rank
        }
        config["alpha_pattern"] = {
            names[m]: a for m, (_, a) in sites.items() if not math.isclose(a, alpha)
        }
    if method.peft_type is None:
        return {**config, "method": fields.lora_method}
    return {**config, **method.peft_config(fields), **method.peft_modules_config(fields, updates)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
