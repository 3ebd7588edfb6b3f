"""Exchanging the values of an adapter while compiled functions go on running."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np

from tfimm_lora.architectures.config import make_config
from tfimm_lora.lora.adapter_state import AdapterState
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.peft.adapter_file import AdapterFile
from tfimm_lora.lora.peft.filling import check_classes, fill_adapter
from tfimm_lora.lora.peft.reading import read_adapter
from tfimm_lora.lora.several import model_and_state


def swap_adapter(
    model: keras.Model,
    folder_or_hub_id: str | os.PathLike[str],
    name: str | None = None,
    *,
    check_base: bool = True,
) -> None:
    """Gives an adapter of a model the values of a saved one, without any new trace.

    Compiled functions, the optimizer and its state stay as they are; only values change. The saved
    adapter has the method of the one in the model and at most its rank, layer by layer; a lower
    rank is padded with zeros, and another scaling becomes part of the values. Layers that only the
    model's adapter has get an update that does nothing, and a classifier or biases that only it
    has those of the base model. To serve adapters of different ranks, create the model with the
    largest. Rank, alpha, dropout and what is trained remain those of the model's adapter.

    Args:
        model: A LoRA model, or a feature extractor of one; compiled or not.
        folder_or_hub_id: See :func:`~tfimm_lora.lora.load_adapter`.
        name: Adapter of the model whose values are replaced. Defaults to the active one.
        check_base: See :func:`~tfimm_lora.lora.load_adapter`.

    Raises:
        FileNotFoundError: There is no such folder or file.
        OSError: The hub cannot be reached.
        ValueError: The saved adapter has another method, other options or a higher rank, adapts or
            trains what the model's does not, belongs to another base model or to other weights, or
            adapters are switched off or merged. The model is as before.

    Example:
        >>> swap_adapter(model, "birds_adapter")
    """
    backbone, state = model_and_state(model)
    state.check_open(backbone)
    if name is None:
        if len(state.active) != 1:
            raise ValueError(
                f"{len(state.active)} adapters are active ({', '.join(state.active)}). Say which "
                "one gets other values: lora.swap_adapter(model, folder, name)."
            )
        name = state.active[0]
    state.check_known(name)
    adapter = read_adapter(folder_or_hub_id, "default", backbone)
    check_classes(backbone, adapter)
    method = state.fields[name].lora_method
    if adapter.fields["lora_method"] != method:
        raise ValueError(
            f"{adapter.source}: the saved adapter is {adapter.fields['lora_method']!r}, {name!r} "
            f"is {method!r}. Load it beside the others: lora.load_adapter(model, folder, name=...)."
        )
    given = {**adapter.fields, "lora_adapter_name": name}
    with state.guest(backbone, make_config(LoRAConfig, {}, given)) as guest:
        fill_adapter(backbone, guest, adapter, check_base)
        values = _layer_values(backbone, name, guest, adapter)
        own = _own_values(backbone, state, name, guest, adapter)
    for variable, value in values:
        variable.assign(value)
    if name not in state.active:
        state.kept[name] = {key: value for key, (_, value) in own.items()}
        return
    for variable, value in own.values():
        variable.assign(value)


def _layer_values(
    model: Any, name: str, guest: str, adapter: AdapterFile
) -> list[tuple[Any, np.ndarray]]:
    """Pairs of the adapter's variables and the values that make it do what the guest does."""
    found: list[tuple[Any, np.ndarray]] = []
    for layer in model._flatten_layers():
        if not isinstance(layer, LoRALayer) or not {name, guest} & set(layer.adapters):
            continue
        mine, theirs = (
            {u.site.name: u for u in layer.adapters[n].updates} if n in layer.adapters else {}
            for n in (name, guest)
        )
        surplus = [site for site in theirs if site not in mine]
        if surplus:
            what = f" ({surplus[0] or 'as a whole'})" if mine else ""
            raise ValueError(
                f"{adapter.source}: the saved adapter adapts {layer.path}{what}, which {name!r} "
                "does not. Load it beside the others: lora.load_adapter(model, folder, name=...)."
            )
        for site, update in mine.items():
            if site in theirs:
                found += update.values_like(theirs[site])
            else:
                found += [(update.variables[n], v) for n, v in update.neutral().items()]
    return found


def _own_values(
    model: Any, state: AdapterState, name: str, guest: str, adapter: AdapterFile
) -> dict[str, tuple[Any, np.ndarray]]:
    """Weights of the model itself that the adapter trains, with the guest's values."""
    theirs = {v.name: state.value_of(guest, v) for v in state.own_weights(model, guest)}
    mine = {v.name: v for v in state.own_weights(model, name)}
    surplus = [key for key in theirs if key not in mine]
    if surplus:
        raise ValueError(
            f"{adapter.source}: the saved adapter has its own {surplus[0]}, which {name!r} does "
            "not train. Load it beside the others: lora.load_adapter(model, folder, name=...)."
        )
    unknown = [k for k in mine if k not in theirs and name in state.active]
    if any(k not in state.kept[""] for k in unknown):
        raise ValueError(
            f"{adapter.source}: the saved adapter has no {unknown[0]}, and no copy of the base "
            "model's is kept."
        )
    return {k: (v.variable, theirs.get(k, state.value_of("", v))) for k, v in mine.items()}
