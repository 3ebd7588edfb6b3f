"""One adapter's part in one layer: its arguments, its methods, its dropout."""

from __future__ import annotations

import math
import warnings
from typing import Any

from tfimm_lora.layers import Dropout
from tfimm_lora.lora.config import check_choice, check_rank
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.base import Method, Site
from tfimm_lora.lora.update import Update

LORA_ARGUMENTS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": None,
    "lora_method": "lora",
    "lora_dropout": 0.0,
    "lora_init": None,
    "lora_options": None,
    "lora_train_bias": "none",
    "lora_slices": None,
}

KERNEL_ARGUMENTS: dict[str, Any] = {
    "lora_quantization": None,
    "lora_group_size": None,
    "lora_quantize_merged": False,
}
"""Arguments of a layer that are its kernel's, not an adapter's."""


class LayerAdapter:
    """One adapter in one layer.

    Attributes:
        name: Its name.
        arguments: Its ``lora_`` arguments.
        method: Its method.
        updates: One instance of the method per adapted slice (one for the whole kernel).
        dropout: Dropout on the inputs of the update, if there is any.
    """

    def __init__(self, name: str, arguments: dict[str, Any], dtype_policy: Any) -> None:
        self.name = name
        self.arguments = {**LORA_ARGUMENTS, **arguments}
        check_rank("lora_rank", self.arguments["lora_rank"])
        check_choice("lora_method", self.arguments["lora_method"], METHODS)
        self.method: type[Method] = METHODS[self.arguments["lora_method"]]
        self.updates: list[Method] = []
        rate = self.arguments["lora_dropout"]
        suffix = "" if name == "default" else f".{name}"
        self.dropout = (
            Dropout(rate, name=f"lora_dropout_layer{suffix}", dtype=dtype_policy) if rate else None
        )

    @property
    def variables(self) -> list[Any]:
        """The variables of all updates."""
        return [v for update in self.updates for v in update.variables.values()]

    @property
    def scaling(self) -> float:
        """Factor of the (first) update."""
        return (self.updates or [self._method(None, Site("", 0, 0, *self._rank_and_alpha()))])[
            0
        ].scaling

    def _rank_and_alpha(self) -> tuple[int, float]:
        rank, alpha = self.arguments["lora_rank"], self.arguments["lora_alpha"]
        return rank, rank if alpha is None else alpha

    def _method(self, layer: Any, site: Site) -> Method:
        init, options = self.arguments["lora_init"], self.arguments["lora_options"]
        return self.method(layer, site, self.name, init, options)

    def build(self, layer: Any) -> None:
        """Creates the variables in a built layer."""
        for site in self._sites(layer.operation.outputs(layer)):
            update = self._method(layer, site)
            self.updates.append(update)
            update.build()
            self._warn_if_large(layer, update)

    def _sites(self, outputs: int) -> list[Site]:
        rank, alpha = self._rank_and_alpha()
        slices = self.arguments["lora_slices"]
        if not slices:
            return [Site("", 0, outputs, rank, alpha)]
        sites = []
        for name, facts in slices.items():
            size = outputs // facts["of"]
            own = facts.get("rank") or rank
            own_alpha = facts.get("alpha") or self.arguments["lora_alpha"] or own
            sites.append(Site(name, facts["index"] * size, size, own, own_alpha))
        return sorted(sites, key=lambda site: site.start)

    def _warn_if_large(self, layer: Any, update: Method) -> None:
        rows, columns = layer.operation.kernel_sides(layer)
        columns = columns * update.site.size // layer.operation.outputs(layer)
        size = sum(math.prod(v.shape) for v in update.variables.values())
        if size > rows * columns:
            where = layer.path + (f" ({update.site.name})" if update.site.name else "")
            warnings.warn(
                f"{where}: the adapter has {size:,} weights where the kernel ({rows} x {columns}) "
                f"has {rows * columns:,}. Use a lower rank, for this layer alone through "
                "lora_rank_pattern, or lora_method='full'.",
                stacklevel=2,
            )

    def parts(self, kernel: Any) -> list[tuple[Site, Update]]:
        """What the adapter does to a kernel, slice by slice."""
        found = []
        for update in self.updates:
            site = update.site
            own = kernel[..., site.start : site.start + site.size] if site.name else kernel
            found.append((site, update.update(own, update.values())))
        return found

    def penalties(self) -> list[Any]:
        """Scalars that are added to the loss in training."""
        found = [update.penalty(update.values()) for update in self.updates]
        return [penalty for penalty in found if penalty is not None]

    def dropped(self, inputs: Any, training: bool | None) -> Any:
        """The inputs of the update."""
        return inputs if self.dropout is None else self.dropout(inputs, training=training)
