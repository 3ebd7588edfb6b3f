"""Many adapters in one batch: ``model.predict({"image": x, "adapter": ids})``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.architectures.config import nearest_names
from tfimm_lora.layers import GlobalResponseNorm, LayerScale
from tfimm_lora.layers.norm import NORMALIZATION_LAYERS
from tfimm_lora.lora.layer import LoRALayer
from tfimm_lora.lora.operations import OPERATIONS
from tfimm_lora.lora.per_example_layer import PerExample, call_layer, current
from tfimm_lora.weights.names import NamedVariable

IMAGE, ADAPTER = "image", "adapter"
# What multiplies a normalised input and what is added to it.
_GAIN, _TERM = ("gamma", "scale"), ("beta",)
_replacing = threading.RLock()
_NO_TRAINING = (
    "A batch whose examples have adapters of their own is for prediction, not for training. Train "
    "the adapters one after the other (lora.set_adapter)."
)


def adapter_ids(model: keras.Model, names: Iterable[str | None]) -> np.ndarray:
    """The ids of adapters, for batches whose examples have adapters of their own.

    Args:
        model: A LoRA model.
        names: A name for each example; ``None`` is the base model without an adapter.

    Returns:
        Places in the order in which the adapters were added, -1 for ``None``; int32.

    Raises:
        ValueError: The model has no such adapter.

    Example:
        >>> ids = adapter_ids(model, ["cats", "dogs", None])
        >>> logits = model.predict({"image": images, "adapter": ids})
    """
    state = getattr(model, "_adapter_state", None)
    if state is None:
        raise ValueError(
            f"{model.name!r} is no LoRA model. Use lora.convert_to_lora_model(model) first."
        )
    known = list(state.fields)
    found = []
    for name in names:
        if name is not None and name not in known:
            raise ValueError(
                f"The model has no adapter {name!r}.{nearest_names(str(name), known)} It has "
                f"{', '.join(known)}."
            )
        found.append(-1 if name is None else known.index(name))
    return np.asarray(found, "int32")


class TakesAdapterIds:
    """Mixin of models that take ``{"image": images, "adapter": ids}`` in place of the images.

    Example ``i`` of the batch is then computed with the adapter of number ``ids[i]``, in the order
    of :func:`adapter_ids`, and with the base model where it is -1, whichever adapters are active.
    """

    _adapter_state: Any
    _traced: Any = None

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, on images or on images with adapter ids."""
        if not _has_ids(inputs):
            return super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]
        training = kwargs.get("training", args[0] if args else None)
        with _serving(self, inputs, training) as (images, valid):
            return _only(valid, super().__call__(images, *args, **kwargs))  # type: ignore[misc]

    def stateless_call(self, trained: Any, others: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras' call with variables given as values, on images or images with adapter ids."""
        call = super().stateless_call  # type: ignore[misc]
        if not args or not _has_ids(args[0]):
            return call(trained, others, *args, **kwargs)
        variables = [*self.trainable_variables, *self.non_trainable_variables]  # type: ignore
        scope = keras.StatelessScope(
            state_mapping=list(zip(variables, [*trained, *others], strict=True))
        )
        training = kwargs.get("training", args[1] if len(args) > 1 else None)
        # The values that the adapters have are read here, so these have to be the given ones.
        with scope, _serving(self, args[0], training) as (images, valid):
            outputs, *rest = call(trained, others, images, *args[1:], **kwargs)
        return (_only(valid, outputs), *rest)

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``fit``, which takes no adapter ids."""
        if _has_ids(x):
            raise ValueError(_NO_TRAINING)
        return super().fit(x, *args, **kwargs)  # type: ignore[misc]

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``predict``, which takes adapter ids as well.

        Raises:
            ValueError: An id in an array is none of an adapter. In a data set such examples get
                NaN.
        """
        _check_ids(self, x)
        return super().predict(x, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Keras' ``evaluate``, which takes adapter ids as well; see :meth:`predict`."""
        _check_ids(self, x)
        return super().evaluate(x, *args, **kwargs)  # type: ignore[misc]

    def make_predict_function(self, force: bool = False) -> Any:
        """Compiles ``predict``, again if values of adapters have become others since."""
        return super().make_predict_function(force or self._outdated())  # type: ignore[misc]

    def make_test_function(self, force: bool = False) -> Any:
        """Compiles ``evaluate``, again if values of adapters have become others since."""
        return super().make_test_function(force or self._outdated())  # type: ignore[misc]

    def _outdated(self) -> bool:
        """Whether constants of a compiled function are values that adapters have no more."""
        if self._traced is None or _same(self._traced.content, _content(self)):
            return False
        self._traced = None
        self._adapter_state.functions.clear()
        self.predict_function = self.test_function = None
        return True


class _Hidden:
    """Keeps Keras from tracking what it holds."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _content(model: Any) -> tuple[Any, ...]:
    """What a compiled function takes as it is: names, kept arrays, adapters of the layers."""
    state = model._adapter_state
    kept = {(n, key): value for n, values in state.kept.items() for key, value in values.items()}
    adapters = {
        (id(layer), name): adapter
        for layer in model._flatten_layers()
        if isinstance(layer, LoRALayer)
        for name, adapter in layer.adapters.items()
    }
    return tuple(state.fields), tuple(state.active), kept, adapters


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return first[:2] == second[:2] and all(
        a.keys() == b.keys() and all(a[key] is b[key] for key in a)
        for a, b in zip(first[2:], second[2:], strict=True)
    )


def _has_ids(inputs: Any) -> bool:
    return isinstance(inputs, dict) and ADAPTER in inputs


def _check_ids(model: Any, inputs: Any) -> None:
    """Raises for ids that are there as numbers and none of an adapter."""
    if not _has_ids(inputs) or not isinstance(inputs[ADAPTER], (np.ndarray, list, tuple)):
        return
    ids = np.asarray(inputs[ADAPTER])
    names = list(model._adapter_state.fields)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{ADAPTER!r} takes integers, found {ids.dtype}. Use lora.adapter_ids(model, names)."
        )
    wrong = ids[(ids < -1) | (ids >= len(names))]
    if wrong.size:
        raise ValueError(
            f"{ADAPTER!r}: there is no adapter {int(wrong.flat[0])}. The model has {len(names)} "
            f"({', '.join(names)}), counted from 0; -1 is the base model."
        )


@contextlib.contextmanager
def _serving(model: Any, inputs: dict[str, Any], training: Any) -> Iterator[tuple[Any, Any]]:
    """Makes the layers look at the ids; gives the images and which ids are valid."""
    state = model._adapter_state
    surplus = set(inputs) - {IMAGE, ADAPTER}
    if IMAGE not in inputs or surplus:
        raise ValueError(
            f"A batch with adapters is {{{IMAGE!r}: images, {ADAPTER!r}: ids}}, found "
            f"{sorted(inputs)}."
        )
    if training:
        raise ValueError(_NO_TRAINING)
    _check_ids(model, inputs)
    if any(isinstance(tensor, keras.KerasTensor) for tensor in inputs.values()):
        raise ValueError("A batch with adapters cannot be symbolic; call the model on tensors.")
    ids = ops.convert_to_tensor(inputs[ADAPTER])
    if "int" not in keras.backend.standardize_dtype(ids.dtype):
        raise ValueError(
            f"{ADAPTER!r} takes integers, found {ids.dtype}. Use lora.adapter_ids(model, names)."
        )
    if len(ids.shape) == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if len(ids.shape) != 1:
        raise ValueError(f"{ADAPTER!r} takes one id an example, (batch,), found {ids.shape}.")
    ids, count = ops.cast(ids, "int32"), len(state.fields)
    valid = ops.logical_and(ops.greater_equal(ids, -1), ops.less(ids, count))
    base = ops.full_like(ids, count)
    ids = ops.where(ops.logical_and(valid, ops.greater_equal(ids, 0)), ids, base)
    own, layers = _own_values(model)
    batch = PerExample(tuple(state.fields), ids, own)
    model._traced = _Hidden(_content(model))
    with batch.acting(), _replaced_calls(layers):
        yield inputs[IMAGE], valid


def _only(valid: Any, outputs: Any) -> Any:
    """NaN where an id was none: a wrong one must not give another adapter's answer."""

    def mask(tensor: Any) -> Any:
        shape = (-1, *[1] * (len(tensor.shape) - 1))
        return ops.where(ops.reshape(valid, shape), tensor, ops.cast(np.nan, tensor.dtype))

    return keras.tree.map_structure(mask, outputs)


# --- Weights of the model itself ---------------------------------------------------------------


def _own_values(model: Any) -> tuple[dict[int, dict[str, list[Any]]], list[Any]]:
    """Values that adapters have for weights of the model itself, and the layers these are in.

    Raises:
        ValueError: A weight cannot differ from example to example, or its base value is not kept.
    """
    state = model._adapter_state
    stored = {n: state.own_weights(model, n) for n in state.fields}
    owners: dict[str, set[str]] = {}
    weights: dict[str, NamedVariable] = {}
    for name, found in stored.items():
        for v in found:
            owners.setdefault(v.name, set()).add(name)
            weights[v.name] = v
    own: dict[int, dict[str, list[Any]]] = {}
    layers: dict[int, Any] = {}
    for key, v in weights.items():
        live = [n for n in owners[key] if n in state.active]
        kept = {n: state.kept.get(n, {}).get(key) for n in owners[key] if n not in live}
        kept = {n: value for n, value in kept.items() if value is not None}
        if not live and not kept:
            continue
        now = ops.convert_to_tensor(v.variable.value)
        base = now
        if live:
            base = state.kept[""].get(key)
            if base is None:
                raise ValueError(
                    f"The adapter {live[0]!r} trains {key} of the model itself, and no copy of the "
                    "base model's is kept, so the others cannot act beside it."
                )
        values = [now if n in live else kept.get(n, base) for n in state.fields]
        _check_weight(v, min(owners[key]))
        own.setdefault(id(v.layer), {})[v.leaf] = [*values, base]
        layers[id(v.layer)] = v.layer
    return own, list(layers.values())


def _check_weight(v: NamedVariable, adapter: str) -> None:
    operation = type(v.layer) in OPERATIONS or isinstance(v.layer, LoRALayer)
    if operation and v.leaf in ("kernel", "bias"):
        return
    affine = (*NORMALIZATION_LAYERS, LayerScale)
    if isinstance(v.layer, affine) and v.leaf in (*_GAIN, *_TERM):
        return
    raise ValueError(
        f"The adapter {adapter!r} has a value of its own for {v.name} ({type(v.layer).__name__}). "
        "In one batch adapters can differ in kernels, biases and normalisations only. Activate "
        "this adapter alone."
    )


@contextlib.contextmanager
def _replaced_calls(layers: list[Any]) -> Iterator[None]:
    """Lets layers that are no LoRA layers have weights that differ from example to example.

    For the time of a call their own ``call`` is another one, which asks for the context first, so
    that other threads are not concerned.
    """
    layers = [layer for layer in layers if not isinstance(layer, LoRALayer)]
    if not layers:
        yield
        return
    with _replacing:
        for layer in layers:
            object.__setattr__(layer, "call", _call_of(layer, layer.call))
        try:
            yield
        finally:
            for layer in layers:
                object.__delattr__(layer, "call")


def _call_of(layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = current(layer)
        if batch is None:
            return original(inputs, *args, **kwargs)
        operation = OPERATIONS.get(type(layer))
        if operation is not None:
            return call_layer(batch, layer, operation, inputs, layer.activation)
        return _normalize(batch, layer, original, inputs)

    return call


def _normalize(batch: PerExample, layer: Any, original: Callable[..., Any], inputs: Any) -> Any:
    """A layer that scales and shifts, with the scale and the shift of each example."""
    gains = [v for v in layer.variables if v.name in _GAIN]
    terms = [v for v in layer.variables if v.name in _TERM]

    def of(variables: list[Any]) -> Any:
        if not variables:
            return None
        values = batch.values(layer, variables[0].name)
        if values is None:
            return ops.convert_to_tensor(variables[0])
        stacked = ops.stack([ops.cast(v, "float32") for v in values])
        own = ops.take(stacked, batch.ids, axis=0)
        return ops.reshape(own, (ops.shape(own)[0], *[1] * (len(inputs.shape) - 2), own.shape[-1]))

    gain, term = of(gains), of(terms)
    # Other variables, such as moving statistics, keep the values they have here.
    values = {v.name: ops.convert_to_tensor(v.value) for v in layer.variables}
    values |= {v.name: ops.ones_like(values[v.name]) for v in gains}
    values |= {v.name: ops.zeros_like(values[v.name]) for v in terms}
    with keras.StatelessScope(state_mapping=[(v, values[v.name]) for v in layer.variables]):
        outputs = original(inputs)
    residual = None
    if isinstance(layer, GlobalResponseNorm):
        residual, outputs = inputs, outputs - inputs
    if gain is not None:
        outputs = outputs * ops.cast(gain, outputs.dtype)
    if term is not None:
        outputs = outputs + ops.cast(term, outputs.dtype)
    return outputs if residual is None else residual + outputs
