"""What models with adapters add to ``compile`` and ``fit``, and the ranks over time."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from tfimm_lora.lora.connect import updates_of
from tfimm_lora.lora.optimizer_hooks import hooks_of, prepare_optimizer
from tfimm_lora.weights.names import iterate_layers, timm_path

_LOOKS_PER_EPOCH = 10


class TrainsAdapters:
    """Mixin of models with adapters: methods that need it get their part in the compiled step."""

    optimizer: Any

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Keras' ``compile``; the optimizer learns what the adapters ask for."""
        super().compile(*args, **kwargs)  # type: ignore[misc]
        if self.optimizer is not None:
            prepare_optimizer(self.optimizer, self)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a model that is loaded (Keras would not, because ``compile`` is not its own)."""
        if type(self).compile is not TrainsAdapters.compile:
            super().compile_from_config(config)  # type: ignore[misc]
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``fit``; the rank allocators of AdaLoRA learn how many steps there are."""
        hooks = hooks_of(getattr(self, "optimizer", None))
        if hooks is None:
            return super().fit(*args, **kwargs)  # type: ignore[misc]
        given = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        callback = _RankSchedule(given.arguments.get("initial_epoch", 0))
        callbacks = given.arguments.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callback.set_model(self)
            callback.set_params(callbacks.params)
            callbacks.callbacks.insert(0, callback)
        else:
            own = [] if callbacks is None else keras.tree.flatten(callbacks)
            # In front, so that a callback that restores a training has the last word.
            given.arguments["callbacks"] = [callback, *own]
        return super().fit(*given.args[1:], **given.kwargs)  # type: ignore[misc]

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``train_on_batch``.

        Raises:
            ValueError: AdaLoRA does not know how many steps there will be.
        """
        hooks = hooks_of(getattr(self, "optimizer", None))
        if hooks is not None:
            _build_optimizer(self)
            for allocator in hooks.allocators:
                if not allocator.is_planned:
                    allocator.plan(None)
        return super().train_on_batch(*args, **kwargs)  # type: ignore[misc]


def _build_optimizer(model: Any) -> None:
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


class _RankSchedule(keras.callbacks.Callback):
    """Sets the schedule of AdaLoRA and notes its ranks; what prunes is in the compiled step."""

    def __init__(self, initial_epoch: int) -> None:
        super().__init__()
        self._initial_epoch = initial_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        model, params = self.model, self.params or {}
        _build_optimizer(model)
        self._allocators = hooks_of(model.optimizer).allocators  # type: ignore[union-attr]
        batches, epochs = params.get("steps"), params.get("epochs")
        steps = None
        if batches is not None and epochs is not None:
            together = getattr(self._optimizer(), "gradient_accumulation_steps", None) or 1
            steps = (epochs - self._initial_epoch) * batches // together
        for allocator in self._allocators:
            allocator.plan(steps)
        self._batches = batches
        self._seen = 0
        self._look()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._batches and _LOOKS_PER_EPOCH * (batch + 1) // self._batches > self._seen:
            self._seen = _LOOKS_PER_EPOCH * (batch + 1) // self._batches
            self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._look()

    def _optimizer(self) -> Any:
        return getattr(self._model.optimizer, "inner_optimizer", self._model.optimizer)

    def _look(self) -> None:
        if not self._allocators:
            return
        model = self.model  # With JAX, this brings the state of the step back into the model.
        histories = model._adapter_state.rank_histories
        for allocator in self._allocators:
            history = histories.setdefault(allocator.name, {"step": [], "ranks": {}})
            if history["step"] and history["step"][-1] >= allocator.step:
                if history["step"][-1] == allocator.step:
                    continue
                # Trained from the start again.
                history = histories[allocator.name] = {"step": [], "ranks": {}}
            history["step"].append(allocator.step)
            names = _names(model, allocator.name)
            for update, rank in zip(allocator.updates, allocator.ranks(), strict=True):
                history["ranks"].setdefault(names[id(update)], []).append(rank)


def _names(model: Any, adapter: str) -> dict[int, str]:
    """Paths of the updates of an adapter, of slices too, by the update's ``id``."""
    updates = updates_of(model, adapter)
    paths = {id(layer): timm_path(path) for path, layer in iterate_layers(model)}
    found = {}
    for update in updates:
        module, name = paths[id(update.layer)], update.site.name
        parent = module.rpartition(".")[0]
        found[id(update)] = f"{parent}.{name}".lstrip(".") if name else module
    return found


def rank_history(model: Any, name: str | None = None) -> dict[str, Any]:
    """The ranks that AdaLoRA gave to the layers while ``fit`` went on.

    They are noted at the start, up to ten times in an epoch, and at its end. They belong to the
    model in memory and are not saved with it.

    Args:
        model: A LoRA model that ``fit`` has trained with ``lora_method="adalora"``.
        name: Name of the adapter. Defaults to the only one.

    Returns:
        ``step``, a list of optimizer steps, and ``ranks``, a dictionary from timm paths to lists of
        the ranks at these steps.

    Raises:
        ValueError: There is no such training.

    Example:
        >>> last = {path: ranks[-1] for path, ranks in rank_history(model)["ranks"].items()}
    """
    histories = getattr(getattr(model, "_adapter_state", None), "rank_histories", {})
    if name is None and len(histories) == 1:
        name = next(iter(histories))
    if name not in histories:
        raise ValueError(
            f"AdaLoRA has trained {', '.join(histories) or 'no adapter'} of this model, and asked "
            f"for is {name!r}. Train with lora_method='adalora' and model.fit first, and name the "
            "adapter if there are several."
        )
    found = histories[name]
    return {"step": list(found["step"]), "ranks": {k: list(v) for k, v in found["ranks"].items()}}
