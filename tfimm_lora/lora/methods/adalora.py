"""AdaLoRA: W + s (A E) B with a diagonal E, of which training prunes. Paper: arXiv:2303.10512."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.adalora_options import AdaLoRAOptions
from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.methods.lora import packed_blocks
from tfimm_lora.lora.update import Update

A, B, E = "kernel_lora_a", "kernel_lora_b", "kernel_lora_e"


class AdaLoRA(Method):
    """A singular value decomposition that is learned, and pruned while it is learned.

    This class is the update alone. What prunes it, inside the compiled training step, is
    :class:`~tfimm_lora.lora.adalora.RankAllocator`.

    Attributes:
        siblings: The updates of the same adapter in the whole model, this one among them.
        total_step: Steps of the training, once they are known.
    """

    Options = AdaLoRAOptions
    factor_b = B
    scaled = (B,)
    ranks_by_group = (A, E)
    peft_type = "ADALORA"
    peft_tensors = ("lora_A", "lora_B", "lora_E")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.siblings: list[AdaLoRA] = [self]
        self.total_step: int | None = self.options.total_step

    def build(self) -> None:
        """Creates ``kernel_lora_a``, ``kernel_lora_e`` (the diagonal) and ``kernel_lora_b``."""
        rank = self.site.rank
        a_shape, b_shape = self.layer.operation.factor_shapes(self.layer, rank, self.site.size)
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.add_weight(A, a_shape, normal)
        self.add_weight(B, b_shape, normal.clone())
        self.add_weight(E, (rank,), "zeros")

    @property
    def scaling(self) -> float:
        """PEFT's factor, alpha / (r + 1e-5) with the initial rank, pruned or not."""
        return self.site.alpha / (self.site.rank + 1e-5)

    @property
    def target_rank(self) -> int:
        """Mean rank of the adapter's updates at the end."""
        return self.options.target_rank or max(self.site.rank // 2, 1)

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """The factors, the diagonal in A and the scaling in B."""
        return Update(a=values[A] * values[E], b=values[B] * self.scaling)

    @property
    def form(self) -> Any:
        """Nothing: the options concern training."""
        return None

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The last axis of A, the first of B, and E."""
        return {A: (-1,), B: (0,), E: (0,)}

    def neutral(self) -> dict[str, np.ndarray]:
        """E = 0."""
        return {E: np.zeros(self.site.rank, "float32")}

    @classmethod
    def connect(cls, model: Any, name: str, updates: Sequence[Any]) -> None:
        """Tells every update about the others: they share one budget and one penalty.

        Raises:
            ValueError: The target is above the ranks.
        """
        for update in updates:
            update.siblings = list(updates)
        target, ranks = target_budget(updates), sum(u.site.rank for u in updates)
        if target > ranks:
            raise ValueError(
                f"lora_options: target_rank={updates[0].target_rank} is above the mean rank "
                f"{ranks / len(updates):g} that training starts with. AdaLoRA prunes: use a larger "
                "lora_rank or a smaller target_rank."
            )

    def penalty(self, values: Mapping[str, Any]) -> Any:
        """How far A and B are from orthogonal, this update's share of the adapter's mean."""
        if not self.options.orth_reg_weight:
            return None
        share = self.options.orth_reg_weight / (2 * len(self.siblings))
        a = ops.reshape(values[A], (-1, values[A].shape[-1]))
        b = ops.reshape(values[B], (values[B].shape[0], -1))
        return share * (_distance(ops.transpose(a)) + _distance(b))

    def scores(self, a: Any, b: Any, e: Any) -> Any:
        """Importance of every rank, of the importance of the single weights."""
        rank = self.site.rank
        # With groups, each group of outputs has ranks of its own.
        split = ops.reshape(b, (b.shape[0], rank // b.shape[0], -1))
        of_b = ops.reshape(ops.transpose(ops.mean(split, axis=-1)), (rank,))
        return e + (ops.mean(ops.reshape(a, (-1, rank)), axis=0) + of_b)

    def kept(self) -> np.ndarray:
        """Which ranks are not pruned: where E is not zero; all of an adapter not trained yet."""
        e = self.numpy_values()[E]
        alive = any(np.any(u.numpy_values()[E]) for u in self.siblings)
        grouped = self.variables[B].shape[0] != len(e)  # B's columns are not the ranks
        return e != 0 if alive and not grouped else np.ones(len(e), bool)

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, alpha, dropout and the schedule; ``fit`` says anew how many steps there are."""
        rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
        return {
            "lora_rank": rank,
            "lora_alpha": alpha if alpha > 0 else rank,
            "lora_dropout": config.get("lora_dropout", 0.0),
            "lora_options": {
                "target_rank": min(config.get("target_r", 8), rank),
                "tinit": config.get("tinit", 0),
                "tfinal": config.get("tfinal", 0),
                "delta_t": config.get("deltaT", 1),
                "beta1": config.get("beta1", 0.85),
                "beta2": config.get("beta2", 0.85),
                "orth_reg_weight": config.get("orth_reg_weight", 0.5),
            },
        }

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``AdaLoraConfig`` that do not depend on the layers."""
        options = AdaLoRAOptions(**fields.lora_options)
        return {
            "beta1": options.beta1,
            "beta2": options.beta2,
            "deltaT": options.delta_t,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_dropout": fields.lora_dropout,
            "orth_reg_weight": options.orth_reg_weight,
            "tfinal": options.tfinal,
            "tinit": options.tinit,
        }

    @classmethod
    def peft_modules_config(
        cls, fields: Any, updates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Rank and alpha, which PEFT has once for all layers, and the ranks that are left.

        Raises:
            ValueError: Layers differ in rank or alpha.
        """
        found: dict[str, tuple[int, float]] = {}
        masks: dict[str, list[bool]] = {}
        options = AdaLoRAOptions(**fields.lora_options)
        target, total = 0, None
        for module, own in updates.items():
            packed = _are_alike(own[0].siblings) or not own[0].site.name
            for part in [own] if packed else [[update] for update in own]:
                rank = sum(update.site.rank for update in part)
                parent = module.rpartition(".")[0]
                name = module if packed else f"{parent}.{part[0].site.name}".lstrip(".")
                found[name] = rank, part[0].scaling * (rank + 1e-5)
                masks[f"{name}.lora_E"] = [bool(k) for update in part for k in update.kept()]
                target, total = sum(u.target_rank for u in part), part[0].total_step
        first, (rank, alpha) = next(iter(found.items()))
        for module, (other, other_alpha) in found.items():
            if other != rank or abs(other_alpha - alpha) > 1e-6 * alpha:
                raise ValueError(
                    "PEFT's AdaLoRA has one rank and one alpha for all layers, and here "
                    f"{first} has rank {rank} and alpha {alpha:g}, {module} rank {other} and alpha "
                    f"{other_alpha:g}. Save the model itself with model.save."
                )
        given = fields.lora_alpha if fields.lora_rank == rank else None
        return {
            "alpha_pattern": {},
            "init_r": rank,
            "lora_alpha": alpha if given is None or abs(given - alpha) > 1e-6 * alpha else given,
            "rank_pattern": {} if all(map(all, masks.values())) else masks,
            "target_r": target,
            # PEFT insists on a number.
            "total_step": total or options.tinit + options.tfinal + 1,
        }

    @classmethod
    def peft_rank(cls, config: Mapping[str, Any], module: str) -> int:
        """``init_r``; what PEFT calls ``rank_pattern`` says here which ranks are left."""
        return config.get("init_r", 12)

    @classmethod
    def peft_alpha(cls, config: Mapping[str, Any], module: str) -> float:
        """``lora_alpha``, or ``init_r`` where that is not positive."""
        alpha = config.get("lora_alpha", 8)
        return alpha if alpha > 0 else config.get("init_r", 12)

    @classmethod
    def complete_peft(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        layers: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Puts zeros where PEFT cut pruned ranks off.

        Raises:
            ValueError: ``rank_pattern`` and the tensors do not fit together.
        """
        rank, completed = config.get("init_r", 12), dict(tensors)
        pattern = config.get("rank_pattern") or {}
        masks = {key.rpartition(".lora_E")[0]: kept for key, kept in pattern.items()}
        for module, kept in masks.items():
            if len(kept) != rank:
                raise ValueError(
                    f"rank_pattern of {module} has {len(kept)} entries where init_r is {rank}."
                )
        for module in [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]:
            ends = [f"{module}.{end}" for end in cls.peft_tensors]
            if any(end not in tensors or tensors[end].ndim != 2 for end in ends):
                continue  # the names and shapes are looked at later
            found = dict(zip(cls.peft_tensors, (tensors[end] for end in ends), strict=True))
            left = len(found["lora_A"])
            if left >= rank:
                continue
            # Where the others were does not matter, so a pattern under another name will do.
            kept = masks.get(module) or next((m for m in masks.values() if sum(m) == left), [])
            counts = (sum(kept), len(found["lora_E"]), found["lora_B"].shape[1])
            if not kept or any(count != left for count in counts):
                raise ValueError(
                    f"{module}: lora_A has {left} of {rank} ranks, rank_pattern, lora_E and lora_B "
                    f"have {counts}."
                )
            mask = np.array(kept, bool)
            for end, value in found.items():
                shape = (len(value), rank) if end == "lora_B" else (rank, value.shape[1])
                full = np.zeros(shape, value.dtype)
                full[(slice(None), mask) if end == "lora_B" else mask] = value
                completed[f"{module}.{end}"] = full
        return completed

    def to_peft(self) -> dict[str, np.ndarray]:
        """``lora_A`` (r, rows), ``lora_B`` (out, r) and ``lora_E`` (r, 1), without pruned ranks."""
        return self._to_peft(self.kept())

    def _to_peft(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        values = self.numpy_values()
        a, b = self.layer.operation.factors_to_peft(self.layer, values[A], values[B])
        a, b, e = a.reshape(len(a), -1), b.reshape(len(b), -1), values[E][:, None]
        if kept.all():
            return {"lora_A": a, "lora_B": b, "lora_E": e}
        return {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": e[kept]}

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors, completed.

        Raises:
            ValueError: A tensor has another shape.
        """
        op, layer = self.layer.operation, self.layer
        own = [np.zeros(self.variables[n].shape, "float32") for n in (A, B)]
        shapes = [value.shape for value in op.factors_to_peft(layer, *own)]
        wanted = {
            "lora_A": (shapes[0][0], int(np.prod(shapes[0][1:]))),
            "lora_B": (shapes[1][0], int(np.prod(shapes[1][1:]))),
            "lora_E": (self.site.rank, 1),
        }
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{layer.path}: {name} has shape {tuple(tensors[name].shape)} in the adapter "
                    f"and {shape} in the model."
                )
        a, b = op.factors_from_peft(
            layer, tensors["lora_A"].reshape(shapes[0]), tensors["lora_B"].reshape(shapes[1])
        )
        return {A: a, B: b, E: tensors["lora_E"][:, 0]}

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float] | None:
        """One adapter of the summed rank, whose B is zero outside the slices' own blocks."""
        if not _are_alike(updates[0].siblings):
            return None
        layer, scaling = updates[0].layer, updates[0].scaling
        rank = sum(u.site.rank for u in updates)
        parts = [u._to_peft(np.ones(u.site.rank, bool)) for u in updates]
        b = np.zeros((layer.operation.outputs(layer), rank), "float32")
        for (rows, columns), update, part in zip(
            packed_blocks(updates), updates, parts, strict=True
        ):
            # One scale serves the whole layer, so a slice with another one carries the ratio.
            b[rows, columns] = part["lora_B"] * (update.scaling / scaling)
        a, e = (np.concatenate([part[n] for part in parts]) for n in ("lora_A", "lora_E"))
        kept = np.concatenate([u.kept() for u in updates])
        packed = {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": e[kept]}
        return packed, rank, scaling * (rank + 1e-5)

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """From the packed adapter, completed.

        Raises:
            ValueError: Ranks differ, or B touches other outputs.
        """
        rest, values = tensors["lora_B"].copy(), []
        blocks = packed_blocks(updates)
        if len(tensors["lora_A"]) != blocks[-1][1].stop:
            raise ValueError("The adapter is not one of the slices of this layer.")
        for (rows, columns), update in zip(blocks, updates, strict=True):
            block = tensors["lora_B"][rows, columns] / (update.scaling / updates[0].scaling)
            rest[rows, columns] = 0
            own = {n: tensors[n][columns] for n in ("lora_A", "lora_E")}
            values.append(update.from_peft({**own, "lora_B": block}))
        if np.any(rest):
            raise ValueError("The adapter is not one of the slices of this layer.")
        return values


def target_budget(updates: Sequence[Any]) -> int:
    """Number of ranks that an adapter keeps in all its updates together."""
    return sum(update.target_rank for update in updates)


def _are_alike(updates: Sequence[Any]) -> bool:
    """Whether all layers have one rank and scale, the slices of a layer taken together."""
    layers: dict[int, list[Any]] = {}
    for update in updates:
        layers.setdefault(id(update.layer), []).append(update)
    ranks = {sum(update.site.rank for update in own) for own in layers.values()}
    return len(ranks) == 1


def _distance(rows: Any) -> Any:
    """Frobenius norm of ``rows rows^T - I``."""
    gram = ops.matmul(rows, ops.transpose(rows)) - ops.eye(rows.shape[0], dtype=rows.dtype)
    # The root has no gradient at zero.
    return ops.sqrt(ops.maximum(ops.sum(ops.square(gram)), 1e-30))
