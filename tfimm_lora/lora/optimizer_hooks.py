"""What adapters add to a Keras optimizer: rank allocation, and another learning rate for B.

Both have to happen inside the compiled step, on every backend, with any optimizer, and what they
remember has to be saved with the optimizer. So they are hung into the instance of the optimizer,
not made an optimizer of their own: its class and its config stay those of Keras, and a model that
is loaded from a file gets them again when it is compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from keras import ops

from tfimm_lora.lora.adalora import RankAllocator
from tfimm_lora.lora.connect import updates_of
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.adalora import AdaLoRA

_ATTRIBUTE = "_tfimm_lora_hooks"


class OptimizerHooks:
    """The hooks in one optimizer.

    Args:
        optimizer: A Keras optimizer.
        model: The model with adapters that it is going to train.

    Raises:
        ValueError: AdaLoRA is to train under ``tf.distribute`` with several replicas.

    Attributes:
        optimizer: The optimizer.
        allocators: One rank allocator for each adapter that AdaLoRA trains.
        ratios: Factor of the learning rate by the optimizer's key of a variable.
    """

    def __init__(self, optimizer: Any, model: Any) -> None:
        self.optimizer = optimizer
        self.allocators: list[RankAllocator] = []
        self.ratios: dict[Any, float] = {}
        self._model = weakref.ref(model)
        self._keras = {
            name: getattr(optimizer, name)
            for name in ("build", "apply", "update_step", "_apply_weight_decay")
        }
        for name in self._keras:
            # Past Keras' and TensorFlow's tracking of attributes.
            object.__setattr__(optimizer, name, getattr(self, name))
        object.__setattr__(optimizer, _ATTRIBUTE, self)
        if optimizer.built:
            self._prepare(optimizer._trainable_variables)

    def follow(self, model: Any) -> None:
        """Takes the adapters of another model, unless the optimizer is built."""
        self._model = weakref.ref(model)

    def build(self, variables: Sequence[Any]) -> None:
        """The optimizer's own ``build``, and the variables of the allocators."""
        if self.optimizer.built:
            return self._keras["build"](variables)
        self._keras["build"](variables)
        self._prepare(variables)
        return None

    def _prepare(self, variables: Sequence[Any]) -> None:
        model = self._model()
        trained = {id(v) for v in variables}
        for name, fields in model._adapter_state.fields.items() if model is not None else ():
            updates = [
                update
                for update in updates_of(model, name)
                if all(id(v) in trained for v in update.variables.values())
            ]
            if updates and isinstance(updates[0], AdaLoRA):
                self._check_replicas()
                self.allocators.append(RankAllocator(self.optimizer, updates))
            ratio = getattr(fields, "lora_plus_ratio", None)
            if ratio is None:
                continue
            for update in updates:
                variable = update.variables[update.factor_b]
                self.ratios[self.optimizer._var_key(variable)] = float(ratio)

    def _check_replicas(self) -> None:
        strategy = getattr(self.optimizer, "_distribution_strategy", None)
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "AdaLoRA needs the gradients of the whole batch, and under tf.distribute with "
                f"{strategy.num_replicas_in_sync} replicas each has its own. Use one replica, or "
                "keras.distribution on JAX."
            )

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """The optimizer's own ``apply``, then the allocators' step."""
        optimizer = self.optimizer
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not optimizer.built:
                # Before anything is done: the allocators are known then.
                optimizer.build(trainable_variables)
        if not self.allocators or not len(grads):
            return self._keras["apply"](grads, trainable_variables)
        gradients, counts = self._gradients(grads, trainable_variables)
        self._keras["apply"](grads, trainable_variables)
        for allocator in self.allocators:
            allocator.apply(gradients, counts)
        return None

    def _gradients(self, grads: Sequence[Any], variables: Any) -> tuple[dict[int, Any], Any]:
        """Gradients of a whole step by the variable's ``id``, and whether the step is one."""
        optimizer = self.optimizer
        variables = optimizer._trainable_variables if variables is None else variables
        found = {id(v): g for v, g in zip(variables, grads, strict=True) if g is not None}
        if optimizer.loss_scale_factor is not None:
            found = {key: g / optimizer.loss_scale_factor for key, g in found.items()}
        steps = optimizer.gradient_accumulation_steps
        if not steps:
            return found, True
        for variable in variables:
            if id(variable) in found:
                index = optimizer._get_variable_index(variable)
                so_far = optimizer._accumulated_gradients[index]
                found[id(variable)] = (found[id(variable)] + so_far) / steps
        return found, ops.equal((optimizer._iterations + 1) % steps, 0)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The optimizer's own ``update_step``, with B's learning rate."""
        ratio = self.ratios.get(self.optimizer._var_key(variable))
        if ratio is not None:
            learning_rate = ops.multiply(learning_rate, ratio)
        return self._keras["update_step"](gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """The optimizer's own, which is in proportion to the learning rate, B's as well."""
        optimizer, decay = self.optimizer, self.optimizer.weight_decay
        groups: dict[float, list[Any]] = {}
        for variable in variables if decay is not None else ():
            ratio = self.ratios.get(optimizer._var_key(variable), 1.0)
            groups.setdefault(ratio, []).append(variable)
        try:
            for ratio, group in groups.items():
                optimizer.weight_decay = decay * ratio
                self._keras["_apply_weight_decay"](group)
        finally:
            optimizer.weight_decay = decay


def needs_hooks(model: Any) -> bool:
    """Whether an adapter of a model asks for more than Keras' optimizers do."""
    return any(
        METHODS[fields.lora_method] is AdaLoRA
        or getattr(fields, "lora_plus_ratio", None) is not None
        for fields in model._adapter_state.fields.values()
    )


def hooks_of(optimizer: Any) -> OptimizerHooks | None:
    """The hooks in an optimizer, or in the one that it wraps; ``None`` if there are none."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, _ATTRIBUTE, None)


def prepare_optimizer(optimizer: Any, model: Any) -> Any:
    """Lets an optimizer do what the adapters of a model ask for: AdaLoRA and ``lora_plus_ratio``.

    ``compile`` of a LoRA model does this by itself. It is for what Keras does not compile as a LoRA
    model: a model of your own around one, or a training loop of your own. There nobody knows the
    number of steps, so AdaLoRA needs ``lora_options={"total_step": ...}``.

    Args:
        optimizer: A Keras optimizer that has no variables yet.
        model: A LoRA model.

    Returns:
        The optimizer.

    Example:
        >>> outer.compile(prepare_optimizer(keras.optimizers.AdamW(1e-3), lora_model), loss="mse")
    """
    # A LossScaleOptimizer leaves out steps; the optimizer inside takes the others.
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    hooks = hooks_of(inner)
    if hooks is not None:
        hooks.follow(model)
    elif needs_hooks(model):
        OptimizerHooks(inner, model)
    return optimizer
