"""The rank allocator of AdaLoRA (arXiv:2303.10512), which works inside the compiled step.

Every step updates how important each weight of A, B and E has been, |weight x gradient| smoothed
over time and weighted with its uncertainty. At certain steps the ranks of all layers are compared,
and as many of the least important ones as the budget says are switched off by a zero in E. The
budget falls with the cube of the time that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.adalora import A, B, E, target_budget
from tfimm_lora.lora.methods.adalora_options import AdaLoRAOptions, check_total_step
from tfimm_lora.weights.names import variable_value

NEVER = 2**31 - 1
"""A step that does not come."""


def budget_at(step: int, first: int, target: int, options: AdaLoRAOptions, total: int) -> int:
    """How many ranks are kept at a step.

    Args:
        step: The step, from 1 on.
        first: Number of ranks at the start.
        target: Number of ranks at the end.
        options: The adapter's options.
        total: Number of steps of the training.

    Example:
        >>> budget_at(10, 36, 18, AdaLoRAOptions(tinit=2, tfinal=4), 20)
        19
    """
    if step <= options.tinit:
        return first
    if step > total - options.tfinal:
        return target
    # In these operations, so that rounding is PEFT's.
    left = 1 - (step - options.tinit) / (total - options.tfinal - options.tinit)
    return int((first - target) * (left**3) + target)


def budget_steps(first: int, target: int, options: AdaLoRAOptions, total: int) -> np.ndarray:
    """The steps at which the budget falls, one for every rank that is lost.

    A compiled step, which has no double precision on every backend, then only has to count.

    Args:
        first: See :func:`budget_at`.
        target: See :func:`budget_at`.
        options: See :func:`budget_at`.
        total: See :func:`budget_at`.

    Returns:
        (first - target,) integers in ascending order.
    """
    steps = []
    low = options.tinit + 1
    for budget in range(first - 1, target - 1, -1):
        high = total - options.tfinal
        while low < high:
            middle = (low + high) // 2
            if budget_at(middle, first, target, options, total) <= budget:
                high = middle
            else:
                low = middle + 1
        steps.append(low)
    return np.array(steps, "int32")


class _Given(keras.initializers.Initializer):
    """Given values."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return ops.convert_to_tensor(self.value, dtype=dtype)


class RankAllocator:
    """Prunes the ranks of one adapter; its state consists of variables of the optimizer.

    Args:
        optimizer: The optimizer, which is built.
        updates: The adapter's updates, all of whose variables the optimizer trains.

    Attributes:
        name: Name of the adapter.
        updates: The updates.
        options: Their options.
        first: Number of ranks at the start.
        target: Number of ranks at the end.
    """

    def __init__(self, optimizer: Any, updates: Sequence[Any]) -> None:
        self.name = updates[0].adapter
        self.updates = list(updates)
        self.options: AdaLoRAOptions = updates[0].options
        self.first = sum(update.site.rank for update in updates)
        self.target = target_budget(updates)
        # Initialisers, not assignments: this may be inside a function that is traced.
        last, budget_falls = self._schedule(self.options.total_step)
        add = optimizer.add_variable
        self._step = add((), dtype="int32", name="adalora_step")
        self._last = add((), _Given(last), "int32", name="adalora_last_allocation")
        self._budget_steps = add(
            budget_falls.shape, _Given(budget_falls), "int32", name="adalora_budget_steps"
        )
        self._masks = []
        self._slots: list[dict[str, tuple[Any, Any]]] = []
        for update in updates:
            self._masks.append(
                add((update.site.rank,), initializer="ones", dtype="float32", name="adalora_mask")
            )
            self._slots.append(
                {
                    name: (
                        optimizer.add_variable_from_reference(variable, "adalora_importance"),
                        optimizer.add_variable_from_reference(variable, "adalora_uncertainty"),
                    )
                    for name, variable in update.variables.items()
                }
            )

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return int(variable_value(self._step))

    @property
    def is_planned(self) -> bool:
        """Whether the number of steps of the training is known."""
        return int(variable_value(self._last)) != NEVER

    def plan(self, steps: int | None) -> None:
        """Sets the schedule to the steps that are to come.

        A schedule that is complete stays so: further training keeps the ranks. So does one that
        ``total_step`` fixed.

        Args:
            steps: Steps that are to come; ``None`` if nobody knows.

        Raises:
            ValueError: They are not known, or too few.
        """
        if self.options.total_step is not None:
            return
        if self.is_planned and self.step >= int(variable_value(self._last)):
            return
        if steps is None:
            raise ValueError(
                "AdaLoRA has to know how many steps the training has, and the data do not say how "
                "many batches there are. Pass steps_per_epoch to fit, or create the model with "
                "lora_options={'total_step': ...}."
            )
        last, budget_falls = self._schedule(self.step + steps)
        self._last.assign(last)
        self._budget_steps.assign(budget_falls)
        for update in self.updates:
            update.total_step = self.step + steps

    def _schedule(self, total: int | None) -> tuple[int, np.ndarray]:
        """The step of the last allocation, and those at which the budget falls."""
        # One entry more, which never counts, so that there is always one.
        if total is None:
            return NEVER, np.full(self.first - self.target + 1, NEVER, "int32")
        check_total_step(self.options, total)
        falls = budget_steps(self.first, self.target, self.options, total)
        return total - self.options.tfinal, np.append(falls, NEVER).astype("int32")

    def masks(self) -> list[np.ndarray]:
        """Which ranks of the updates were kept at the last allocation, as booleans."""
        return [variable_value(mask) != 0 for mask in self._masks]

    def ranks(self) -> list[int]:
        """Ranks of the updates since the last allocation."""
        return [int(mask.sum()) for mask in self.masks()]

    def apply(self, gradients: Mapping[int, Any], counts: Any) -> None:
        """Takes a step: to be called in the compiled step, when the optimizer has taken its own.

        Args:
            gradients: Gradients by the ``id`` of the variable.
            counts: Whether the optimizer's step changed weights (with gradient accumulation not
                every one does), ``True`` or a tensor.
        """
        options = self.options
        counts = ops.cast(counts, "bool")
        step = _value(self._step) + ops.cast(counts, "int32")
        last = _value(self._last)
        self._step.assign(step)
        measured = ops.logical_and(counts, step < last)
        scores = [
            self._score(update, slots, gradients, measured)
            for update, slots in zip(self.updates, self._slots, strict=True)
        ]
        # The budget says how many of the lowest scores go.
        lost = ops.sum(ops.cast(step >= _value(self._budget_steps), "int32"))
        ordered = ops.sort(ops.concatenate(scores))
        threshold = ops.where(lost > 0, ops.take(ordered, ops.maximum(lost - 1, 0)), -1.0)
        due = ops.logical_and(ops.equal(step % options.delta_t, 0), step < last)
        due = ops.logical_or(due, ops.equal(step, last))
        due = ops.logical_and(counts, ops.logical_and(due, step > options.tinit))
        held = ops.logical_and(counts, step > last)
        for update, mask, score in zip(self.updates, self._masks, scores, strict=True):
            kept = ops.where(due, ops.cast(score > threshold, "float32"), _value(mask))
            mask.assign(kept)
            diagonal = update.variables[E]
            pruned = ops.logical_and(ops.logical_or(due, held), kept == 0)
            diagonal.assign(ops.where(pruned, 0.0, _value(diagonal)))

    def _score(
        self, update: Any, slots: Mapping[str, Any], gradients: Mapping[int, Any], measured: Any
    ) -> Any:
        """Updates the importance of the weights of an update, and returns that of its ranks."""
        beta1, beta2 = self.options.beta1, self.options.beta2
        found = {}
        for name, (importance, uncertainty) in slots.items():
            weight, before, spread_before = map(
                _value, (update.variables[name], importance, uncertainty)
            )
            gradient = gradients.get(id(update.variables[name]))
            gradient = ops.zeros_like(weight) if gradient is None else gradient
            now = ops.abs(weight * ops.cast(gradient, weight.dtype))
            smooth = beta1 * before + (1 - beta1) * now
            spread = beta2 * spread_before + (1 - beta2) * ops.abs(now - smooth)
            smooth = ops.where(measured, smooth, before)
            spread = ops.where(measured, spread, spread_before)
            importance.assign(smooth)
            uncertainty.assign(spread)
            found[name] = smooth * spread
        return update.scores(found[A], found[B], found[E])


def _value(variable: Any) -> Any:
    return ops.convert_to_tensor(variable)
