"""LoRA: W + (alpha / r) A B. Paper: arXiv:2106.09685."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import Method, kernel_value
from tfimm_lora.lora.methods.initialization import (
    INITIALIZATIONS,
    check_matrix,
    factors_of_residual,
    initialization,
    keeps_first_factors,
)
from tfimm_lora.lora.operations.channel_mixing import (
    groups_of,
    mixes,
    mixing_from_peft,
    mixing_shapes,
    mixing_to_peft,
)
from tfimm_lora.lora.update import Update


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """Options of LoRA.

    Attributes:
        bias: Whether B has a bias (PEFT's ``lora_bias``). Defaults to ``False``.
        mix_channels: Whether updates of convolutions with groups mix the channels of all groups,
            as PEFT's do; they cannot be merged then. Defaults to ``False``.
    """

    bias: bool = False
    mix_channels: bool = False


class LoRA(Method):
    """Adds the product of two thin factors, applied as ``(x A) B``.

    The factored form keeps autodiff from forming a gradient of the size of the kernel.
    """

    Options: ClassVar[type] = LoRAOptions
    factor_b = "kernel_lora_b"
    initializations = tuple(INITIALIZATIONS)
    scaled = ("kernel_lora_b", "kernel_lora_b0", "lora_bias")
    ranks_by_group: ClassVar[tuple[str, ...]] = ("kernel_lora_a",)
    peft_type = "LORA"
    peft_tensors: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_B.bias")

    def build(self) -> None:
        """Creates ``kernel_lora_a`` and ``kernel_lora_b`` (with ``_q`` and so on for slices)."""
        layer, site = self.layer, self.site
        self._of_residual: dict[str, np.ndarray] = {}
        if self.mixes_channels:
            a_shape, b_shape = mixing_shapes(layer, site.rank)
        else:
            a_shape, b_shape = layer.operation.factor_shapes(layer, site.rank, site.size)
        first = initialization(self.init)
        a_initializer, b_initializer = first.factors(site.rank)
        self.add_weight("kernel_lora_a", a_shape, a_initializer)
        self.add_weight("kernel_lora_b", b_shape, b_initializer or "zeros")
        if first.one_matrix:
            check_matrix(layer, self.init, site.rank, self._matrix_sides())
        if first.of_kernel is not None:
            self.add_weight("kernel_lora_a0", a_shape, "zeros", trainable=False)
            self.add_weight("kernel_lora_b0", b_shape, "zeros", trainable=False)
        if getattr(self.options, "bias", False):
            if layer.bias is None:
                raise ValueError(
                    f"Layer {layer.name!r} has no bias, so its update can have none. Leave "
                    "lora_options={'bias': True} out."
                )
            if math.prod(layer.bias.shape) != layer.operation.outputs(layer):
                raise ValueError(
                    f"Layer {layer.name!r} has a bias of shape {tuple(layer.bias.shape)} for "
                    f"{layer.operation.outputs(layer)} outputs, so its update can have none of its "
                    "own. Leave lora_options={'bias': True} out."
                )
            self.add_weight("lora_bias", (site.size,), "zeros")

    @property
    def mixes_channels(self) -> bool:
        """Whether the update mixes the channels of different groups."""
        return getattr(self.options, "mix_channels", False) and groups_of(self.layer) > 1

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The factors, B scaled; perhaps without the first ones."""
        bias = values.get("lora_bias")
        a, b = values["kernel_lora_a"], values["kernel_lora_b"]
        if self.mixes_channels:
            return Update(
                mixing=(a, b * self.scaling),
                bias_term=None if bias is None else bias * self.scaling,
            )
        if "kernel_lora_a0" in values:
            a = ops.concatenate([a, values["kernel_lora_a0"]], axis=-1)
            b = ops.concatenate([b, -values["kernel_lora_b0"]], axis=0)
        return Update(
            a=a,
            b=b * self.scaling,
            bias_term=None if bias is None else bias * self.scaling,
        )

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The last axis of A and the first of B."""
        return {f"kernel_lora_{n}": (-1 if n[0] == "a" else 0,) for n in ("a", "b", "a0", "b0")}

    @property
    def rank_groups(self) -> int:
        """The groups of the layer, channels of a depthwise one that are mixed included."""
        return groups_of(self.layer) if self.mixes_channels else super().rank_groups

    def aligned(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With first factors of zeros, or with first factors as part of A and B."""
        found = dict(values)
        if "kernel_lora_a0" in self.variables:
            for name in ("kernel_lora_a0", "kernel_lora_b0"):
                found.setdefault(name, np.zeros(self.variables[name].shape, "float32"))
        elif "kernel_lora_a0" in found:
            a, b = ("kernel_lora_a", "kernel_lora_b")
            found[a] = np.concatenate([found[a], found[f"{a}0"]], axis=-1)
            found[b] = np.concatenate([found[b], -found[f"{b}0"]], axis=0)
        return found

    def neutral(self) -> dict[str, np.ndarray]:
        """B = 0."""
        zeros = ("kernel_lora_b", "kernel_lora_b0", "lora_bias")
        zero = {n: v for n, v in self.variables.items() if n in zeros}
        return {name: np.zeros(v.shape, "float32") for name, v in zero.items()}

    @property
    def initializes(self) -> bool:
        """Whether the first factors are made of the kernel."""
        return "kernel_lora_a0" in self.variables or self._residual_steps > 0

    @property
    def _residual_steps(self) -> int:
        return initialization(self.init).residual_steps if self.init else 0

    @property
    def acts(self) -> bool:
        """Whether A B is something else than at the start."""
        values = self.numpy_values()
        if "kernel_lora_a0" in values:
            pairs = [(values[f"kernel_lora_{n}"], values[f"kernel_lora_{n}0"]) for n in "ab"]
            return not all(np.array_equal(x, x0) for x, x0 in pairs)
        if self.init != "orthogonal":
            return super().acts
        # Neither factor is zero at the start, but their product is.
        a, b = (values[f"kernel_lora_{n}"] for n in "ab")
        product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
        return bool(np.abs(product).max() > 1e-6 * np.abs(a).max() * np.abs(b).max())

    def before_quantization(
        self, kernel: np.ndarray, stored: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """With LoftQ's start, the kernel less the factors that :meth:`initialize` will set."""
        steps = self._residual_steps
        if not steps or not self.variables or np.any(self.numpy_values()["kernel_lora_b"]):
            return kernel
        operation, layer, site = self.layer.operation, self.layer, self.site
        matrix = np.array(ops.convert_to_numpy(operation.to_matrix(layer, kernel)), "float32")
        columns = slice(site.start, site.start + site.size)

        def of_slice(part: np.ndarray) -> np.ndarray:
            whole = matrix.copy()
            whole[:, columns] = part
            whole = stored(ops.convert_to_numpy(operation.from_matrix(layer, whole)))
            return np.asarray(ops.convert_to_numpy(operation.to_matrix(layer, whole)))[:, columns]

        matrix[:, columns], a, b = factors_of_residual(
            matrix[:, columns], of_slice, steps, site.rank, self.scaling
        )
        a, b = operation.factors(layer, a, b)
        self._of_residual = {
            "kernel_lora_a": np.asarray(ops.convert_to_numpy(a), "float32"),
            "kernel_lora_b": np.asarray(ops.convert_to_numpy(b), "float32"),
        }
        return np.asarray(ops.convert_to_numpy(operation.from_matrix(layer, matrix)))

    def initialize(self, kernel: np.ndarray) -> None:
        """Makes the first factors of the kernel, unless there are trained ones."""
        values = self.numpy_values()
        if "kernel_lora_a0" not in values:
            found, self._of_residual = self._of_residual, {}
            if not np.any(values["kernel_lora_b"]):
                self.assign(found)
            return
        if np.any(values["kernel_lora_b"]) or np.any(values["kernel_lora_b0"]):
            return
        first = self._first_factors(kernel)
        self.assign(first | {n.removesuffix("0"): v for n, v in first.items()})

    def _first_factors(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        operation, of_kernel = self.layer.operation, initialization(self.init).of_kernel
        assert of_kernel is not None
        matrix = ops.convert_to_numpy(operation.to_matrix(self.layer, kernel)).astype("float32")
        a, b = of_kernel(matrix, self.site.rank, self.scaling)
        a, b = operation.factors(self.layer, a, b)
        return {
            "kernel_lora_a0": np.asarray(ops.convert_to_numpy(a), "float32"),
            "kernel_lora_b0": np.asarray(ops.convert_to_numpy(b), "float32"),
        }

    def _matrix_sides(self) -> tuple[int, int]:
        rows, columns = self.layer.operation.kernel_sides(self.layer)
        return rows, self.site.size if self.site.name else columns

    @property
    def stored_rank(self) -> int:
        """Rank of the update in PEFT's files, where first factors count."""
        return self.site.rank * (2 if "kernel_lora_a0" in self.variables else 1)

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """LORA without the flags of its relatives."""
        flags = ("use_rslora", "use_dora", "use_qalora")
        return super().matches_peft(config) and not any(config.get(f) for f in flags)

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, alpha, dropout and the bias of B."""
        return {
            "lora_rank": config.get("r", 8),
            "lora_alpha": config.get("lora_alpha", 8),
            "lora_dropout": config.get("lora_dropout", 0.0),
            "lora_options": {"bias": True} if config.get("lora_bias") else {},
        }

    @classmethod
    def refine_fields(
        cls,
        fields: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        layers: Mapping[str, Any],
    ) -> dict[str, Any]:
        """``mix_channels`` where a factor reads the channels of several groups."""
        if "mix_channels" not in {field.name for field in dataclasses.fields(cls.Options)}:
            return dict(fields)
        grouped = {f"{m}.lora_A.weight": la for m, la in layers.items() if groups_of(la) > 1}
        if not any(k in tensors and mixes(la, tensors[k]) for k, la in grouped.items()):
            return dict(fields)
        return {**fields, "lora_options": {**fields["lora_options"], "mix_channels": True}}

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``LoraConfig``."""
        return {
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": fields.lora_rank if fields.lora_alpha is None else fields.lora_alpha,
            "lora_bias": bool(fields.lora_options.get("bias")),
            "lora_dropout": fields.lora_dropout,
            "r": fields.lora_rank,
            "use_dora": False,
            "use_rslora": False,
        }

    @classmethod
    def peft_modules_config(
        cls, fields: Any, updates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Ranks and alphas with those of the first factors, where there are any."""
        if not keeps_first_factors(fields.lora_init):
            return {}
        sites = {}
        for module, found in updates.items():
            rank = sum(update.stored_rank for update in found)
            sites["^" + re.escape(module)] = rank, cls.alpha_for(found[0].scaling, rank)
        rank, alpha = next(iter(sites.values()))
        return {
            "alpha_pattern": {m: a for m, (_, a) in sites.items() if a != alpha},
            "lora_alpha": alpha,
            "r": rank,
            "rank_pattern": {m: r for m, (r, _) in sites.items() if r != rank},
        }

    def to_peft(self) -> dict[str, np.ndarray]:
        """``lora_A.weight`` and ``lora_B.weight``, perhaps ``lora_B.bias``."""
        values = self.numpy_values()
        a, b = values["kernel_lora_a"], values["kernel_lora_b"]
        if self.mixes_channels:
            a, b = mixing_to_peft(a, b)
        else:
            a, b = self.layer.operation.factors_to_peft(self.layer, a, b)
        if "kernel_lora_a0" in values:
            # PEFT's form of what stays as it is in the kernel: the first factors as further ranks.
            a0, b0 = self.layer.operation.factors_to_peft(
                self.layer, values["kernel_lora_a0"], values["kernel_lora_b0"]
            )
            a, b = np.concatenate([a, a0]), np.concatenate([b, -b0], axis=1)
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
        if "lora_bias" in values:
            tensors["lora_B.bias"] = values["lora_bias"]
        return tensors

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors.

        The first factors are the second half of the ranks. An adapter of PEFT whose base model was
        rewritten has not got them: they are made of the kernel as PEFT makes them.
        """
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        rank, first = self.site.rank, {}
        if "kernel_lora_a0" in self.variables:
            if a.shape[0] == rank:
                first = self._first_factors(kernel_value(self.layer, self.site))
            else:
                a0, b0 = self.layer.operation.factors_from_peft(self.layer, a[rank:], -b[:, rank:])
                first = {"kernel_lora_a0": a0, "kernel_lora_b0": b0}
                a, b = a[:rank], b[:, :rank]
        if self.mixes_channels:
            a, b = mixing_from_peft(a, b)
        else:
            a, b = self.layer.operation.factors_from_peft(self.layer, a, b)
        values = {"kernel_lora_a": a, "kernel_lora_b": b, **first}
        if "lora_bias" in self.variables:
            values["lora_bias"] = tensors["lora_B.bias"]
        return values

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float]:
        """One adapter of the summed rank, whose B is zero outside the slices' own blocks."""
        layer, scaling = updates[0].layer, updates[0].scaling
        parts = [update.to_peft() for update in updates]
        a = np.concatenate([part["lora_A.weight"] for part in parts])
        rank = a.shape[0]
        b = np.zeros((layer.operation.outputs(layer), rank), a.dtype)
        for (rows, columns), update, part in zip(
            packed_blocks(updates), updates, parts, strict=True
        ):
            # One scale serves the whole layer, so a slice with another one carries the ratio.
            b[rows, columns] = part["lora_B.weight"] * (update.scaling / scaling)
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
        if "lora_B.bias" in parts[0]:
            bias = np.zeros(len(b), a.dtype)
            for (rows, _), update, part in zip(packed_blocks(updates), updates, parts, strict=True):
                bias[rows] = part["lora_B.bias"] * (update.scaling / scaling)
            tensors["lora_B.bias"] = bias
        return tensors, rank, cls.alpha_for(scaling, rank)

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """From the packed adapter.

        Raises:
            ValueError: Ranks differ, or B touches other outputs.
        """
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        rest, scaling, values = b.copy(), updates[0].scaling, []
        blocks = packed_blocks(updates)
        for (rows, columns), update in zip(blocks, updates, strict=True):
            block = b[rows, columns] / (update.scaling / scaling)
            rest[rows, columns] = 0
            own = {"lora_A.weight": a[columns], "lora_B.weight": block}
            if "lora_B.bias" in tensors:
                own["lora_B.bias"] = tensors["lora_B.bias"][rows] / (update.scaling / scaling)
            values.append(update.from_peft(own))
        if blocks[-1][1].stop != a.shape[0] or np.any(rest):
            raise ValueError("The adapter is not one of the slices of this layer.")
        return values

    @classmethod
    def alpha_for(cls, scaling: float, rank: int) -> float:
        """The alpha with which a rank gives a scaling."""
        return scaling * rank


def packed_blocks(updates: Sequence[Any]) -> list[tuple[slice, slice]]:
    """Outputs and ranks of the slices in the factors of one packed update."""
    blocks, first = [], 0
    for update in updates:
        site = update.site
        rows = slice(site.start, site.start + site.size)
        blocks.append((rows, slice(first, first + update.stored_rank)))
        first += update.stored_rank
    return blocks
