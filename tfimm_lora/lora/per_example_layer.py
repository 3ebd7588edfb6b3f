"""One layer, another adapter for every example of the batch.

Every adapter's update of the layer is made, the updates are stacked, and every example gets its own
by a gather, as S-LoRA (arXiv:2311.03285) and Punica (arXiv:2310.18547) do. Which adapters there are
and which example has which is in a context, set by the model for the time of a call.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from tfimm_lora.lora.forward import additive, by_site, scaled
from tfimm_lora.lora.operations import Conv2DOperation, Operation
from tfimm_lora.lora.update import Update
from tfimm_lora.quantization.layer import kernel_tensor

_current: contextvars.ContextVar[PerExample | None] = contextvars.ContextVar(
    "tfimm_lora_per_example", default=None
)
# The parts of an update that are stacked as they are; whatever else there is becomes a delta.
_BATCHED = ("a", "b", "kron", "delta", "input_gain", "rotation", "gain")
_OF_BIAS = ("bias_gain", "bias_term")


@dataclasses.dataclass
class PerExample:
    """Which adapter every example of a batch has.

    Attributes:
        names: The adapters; ids count in this order.
        ids: Adapter of each example, (batch,), with ``len(names)`` for the base model.
        own: By layer (its id) and leaf: the values that the adapters, and at the end the base
            model, have for a weight of the model itself. Only weights that differ are here.
    """

    names: tuple[str, ...]
    ids: Any
    own: dict[int, dict[str, list[Any]]]

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Makes the layers that are called inside look at this."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def values(self, layer: Any, leaf: str) -> list[Any] | None:
        """The values that the adapters and the base have for a weight; ``None`` if all are one."""
        return self.own.get(id(layer), {}).get(leaf)

    def concerns(self, layer: Any) -> bool:
        """Whether the adapters differ in a layer."""
        return bool(id(layer) in self.own or getattr(layer, "adapters", None))


def current(layer: Any) -> PerExample | None:
    """The context, if the adapters differ in this layer; else ``None``."""
    found = _current.get()
    return found if found is not None and found.concerns(layer) else None


@dataclasses.dataclass
class _Row:
    """What one adapter makes of the layer: its kernel and bias, and the updates of its sites."""

    kernel: Any
    bias: Any
    found: list[Any]


def call_layer(
    batch: PerExample, layer: Any, operation: Operation, inputs: Any, activation: Any
) -> Any:
    """Applies a layer to a batch whose examples have adapters of their own.

    Args:
        batch: Which adapter every example has.
        layer: The layer.
        operation: How it uses its kernel.
        inputs: Its inputs; the first axis is that of the examples, or has size 1.
        activation: Its activation, or ``None``.

    Raises:
        ValueError: The layer's adapters are merged, or its first axis is another one.
    """
    if getattr(layer, "merged", False):
        raise ValueError(
            f"The LoRA weights of {layer.path} are merged, so examples cannot have adapters of "
            "their own. Call lora.unmerge_lora_weights(model) first."
        )
    _check_first_axis(layer, inputs, batch.ids)
    rows, table = _rows(batch, layer)
    index = ops.take(ops.convert_to_tensor(np.asarray(table, "int32")), batch.ids, axis=0)
    form = operation.as_matmul(layer, inputs)
    if form is not None:
        tokens, restore = form
        parts = _matrix_parts(layer, operation, rows)
        outputs = restore(_multiply(tokens, rows, parts, index, operation, layer))
    elif _is_thin(layer, operation, rows):
        outputs = _apply_thin(layer, operation, inputs, rows, index)
    else:
        outputs = _apply_all(layer, operation, inputs, rows, index)
    outputs = _add_bias(layer, operation, outputs, rows, index)
    return outputs if activation is None else activation(outputs)


def _check_first_axis(layer: Any, inputs: Any, ids: Any) -> None:
    first, examples = inputs.shape[0], ids.shape[0]
    if first not in (None, 1, examples):
        raise ValueError(
            f"{layer.path}: the first axis of its inputs has size {first} and the batch "
            f"{examples if examples is not None else 'another one'}, so it cannot be told which "
            "example has which adapter. Leave the layer out of lora_targets, or serve the adapters "
            "one after the other."
        )


def _rows(batch: PerExample, layer: Any) -> tuple[list[_Row], list[int]]:
    """The different things done in a layer, the base's last, and each adapter's number in them."""
    shared, shared_bias = kernel_tensor(layer), None
    if layer.bias is not None:
        shared_bias = ops.convert_to_tensor(layer.bias)
    kernels = _cast(batch.values(layer, "kernel"), shared)
    biases = _cast(batch.values(layer, "bias"), shared_bias)
    rows: list[_Row] = []
    table: list[int] = []
    for i, name in enumerate((*batch.names, "")):
        kernel = shared if kernels is None else kernels[i]
        bias = shared_bias if biases is None else biases[i]
        adapter = getattr(layer, "adapters", {}).get(name)
        table.append(len(rows))
        if name and adapter is None and _like_base(kernels, i) and _like_base(biases, i):
            table[-1] = -1
            continue
        rows.append(_Row(kernel, bias, [] if adapter is None else adapter.parts(kernel)))
    return rows, [len(rows) - 1 if number < 0 else number for number in table]


def _like_base(values: list[Any] | None, i: int) -> bool:
    return values is None or values[i] is values[-1]


def _cast(values: list[Any] | None, like: Any) -> list[Any] | None:
    """Casts values; what was one object stays one."""
    if values is None:
        return None
    cast = {id(value): ops.cast(value, like.dtype) for value in values}
    return [cast[id(value)] for value in values]


def _own_kernels(rows: Sequence[_Row]) -> bool:
    return any(row.kernel is not rows[-1].kernel for row in rows)


# --- Layers that are a product with a matrix ---


def _matrix_parts(layer: Any, operation: Operation, rows: Sequence[_Row]) -> dict[str, list[Any]]:
    """The updates' parts by name, one for each row or ``None``, for the kernel's matrix."""
    updates = [_as_one(layer, operation, row) for row in rows]
    for field in ("kron", "rotation"):
        shapes = {_shapes(getattr(u, field)) for u in updates if getattr(u, field) is not None}
        if len(shapes) > 1:
            updates = [
                u if getattr(u, field) is None else _densified(layer, operation, row)
                for u, row in zip(updates, rows, strict=True)
            ]
    return {field: [getattr(u, field) for u in updates] for field in _BATCHED}


def _shapes(part: Any) -> Any:
    return tuple(tuple(t.shape) for t in part) if isinstance(part, tuple) else tuple(part.shape)


def _as_one(layer: Any, operation: Operation, row: _Row) -> Update:
    """One update for the kernel's matrix of the updates of all sites."""
    found = row.found
    if not found:
        return Update()
    known = all(
        getattr(u, f.name) is None or f.name in (*_BATCHED, *_OF_BIAS, "gain_tangent")
        for _, u in found
        for f in dataclasses.fields(u)
    )
    if known and not found[0][0].name:
        u = found[0][1]
        kernel_rows, columns = operation.kernel_sides(layer)
        return Update(
            a=None if u.a is None else ops.reshape(u.a, (kernel_rows, -1)),
            b=None if u.b is None else ops.reshape(u.b, (-1, columns)),
            kron=u.kron if u.kron is None or len(u.kron[1].shape) == 2 else _flat_kron(u.kron),
            delta=None if u.delta is None else operation.to_matrix(layer, u.delta),
            input_gain=None if u.input_gain is None else ops.reshape(u.input_gain, (-1,)),
            rotation=u.rotation,
            gain=None if u.gain is None else ops.reshape(u.gain, (-1,)),
        )
    thin = all(not u.changes_inputs and u.kron is None and u.delta is None for _, u in found)
    if not known or not thin:
        return _densified(layer, operation, row)
    outputs = operation.outputs(layer)
    a = [u.a for _, u in found if u.a is not None]
    b = [
        ops.pad(u.b, ((0, 0), (s.start, outputs - s.start - s.size)))
        for s, u in found
        if u.b is not None
    ]
    gain = None
    if any(u.gain is not None for _, u in found):
        ones = ops.ones((outputs,), "float32")
        gain = by_site(found, ones, lambda v, u: v if u.gain is None else v * u.gain)
    return Update(
        a=ops.concatenate(a, axis=-1) if a else None,
        b=ops.concatenate(b, axis=0) if b else None,
        gain=gain,
    )


def _flat_kron(kron: tuple[Any, Any]) -> tuple[Any, Any]:
    """The right factor of a 1x1 convolution without its spatial axes."""
    left, right = kron
    return left, ops.reshape(right, right.shape[-2:])


def _densified(layer: Any, operation: Operation, row: _Row) -> Update:
    """Everything that an adapter does to the kernel, as a delta."""
    term = additive(layer, row.found)
    delta = _scaled(layer, row) - row.kernel
    delta = delta if term is None else ops.cast(delta, term.dtype) + term
    return Update(delta=operation.to_matrix(layer, delta))


def _scaled(layer: Any, row: _Row) -> Any:
    if not row.found:
        return row.kernel
    return scaled(layer, row.kernel, row.found)


def _multiply(
    tokens: Any,
    rows: Sequence[_Row],
    parts: dict[str, list[Any]],
    index: Any,
    operation: Operation,
    layer: Any,
) -> Any:
    """(batch, n, rows) to (batch, n, outputs): kernel and updates, every example its own."""
    dtype = tokens.dtype

    def stack(values: list[Any], neutral: Callable[[Any], Any]) -> Any:
        like = next(v for v in values if v is not None)
        filled = [neutral(like) if v is None else v for v in values]
        return ops.take(ops.stack([ops.cast(v, dtype) for v in filled]), index, axis=0)

    def has(field: str) -> bool:
        return any(v is not None for v in parts[field])

    source = tokens
    if has("input_gain"):
        source = source * stack(parts["input_gain"], ops.ones_like)[:, None]
    if has("rotation"):
        blocks = stack(parts["rotation"], _identity)
        _, count, size, _ = blocks.shape
        split = ops.reshape(source, (*ops.shape(source)[:2], count, size))
        rotated = ops.einsum("btgi,bgij->btgj", split, blocks)
        source = ops.reshape(rotated, (*ops.shape(rotated)[:2], count * size))
    if _own_kernels(rows):
        own = [operation.to_matrix(layer, row.kernel) for row in rows]
        outputs = ops.matmul(source, stack(own, ops.zeros_like))
    else:
        outputs = ops.matmul(source, operation.to_matrix(layer, rows[-1].kernel))
    if has("gain"):
        outputs = outputs * stack(parts["gain"], ops.ones_like)[:, None]
    if has("a"):
        rank = max(a.shape[-1] for a in parts["a"] if a is not None)
        a = [a if a is None else ops.pad(a, ((0, 0), (0, rank - a.shape[-1]))) for a in parts["a"]]
        b = [b if b is None else ops.pad(b, ((0, rank - b.shape[0]), (0, 0))) for b in parts["b"]]
        low = ops.matmul(tokens, stack(a, ops.zeros_like))
        outputs = outputs + ops.matmul(low, stack(b, ops.zeros_like))
    if has("kron"):
        left = stack([k and k[0] for k in parts["kron"]], ops.zeros_like)
        right = stack([k and k[1] for k in parts["kron"]], ops.zeros_like)
        split = ops.reshape(tokens, (*ops.shape(tokens)[:2], left.shape[1], right.shape[1]))
        # The right factor first: it is the larger one, and makes the activation smaller or not.
        out = ops.einsum("btmk,bml->btlk", ops.einsum("btmn,bnk->btmk", split, right), left)
        outputs = outputs + ops.reshape(out, (*ops.shape(out)[:2], -1))
    if has("delta"):
        outputs = outputs + ops.matmul(tokens, stack(parts["delta"], ops.zeros_like))
    return outputs


def _identity(rotation: Any) -> Any:
    blocks, size, _ = rotation.shape
    return ops.tile(ops.eye(size, dtype="float32")[None], (blocks, 1, 1))


# --- Other convolutions ------------------------------------------------------------------------


def _is_thin(layer: Any, operation: Operation, rows: Sequence[_Row]) -> bool:
    """Whether all updates of a convolution are nothing but thin factors."""
    plain = isinstance(operation, Conv2DOperation) and layer.groups == 1
    allowed = ("a", "b", *_OF_BIAS)
    return (
        plain
        and layer.data_format == "channels_last"
        and not _own_kernels(rows)
        and all(
            not site.name
            and all(getattr(u, f.name) is None or f.name in allowed for f in dataclasses.fields(u))
            for row in rows
            for site, u in row.found
        )
    )


def _apply_thin(
    layer: Any, operation: Operation, inputs: Any, rows: Sequence[_Row], index: Any
) -> Any:
    """One convolution with the A of all adapters; then every example its own part and B."""
    dtype = inputs.dtype
    outputs = operation.apply_kernel(layer, inputs, rows[-1].kernel)
    updates = [row.found[0][1] if row.found else Update() for row in rows]
    factors = [u.a for u in updates if u.a is not None]
    if not factors:
        return outputs
    rank = max(a.shape[-1] for a in factors)
    low = operation.down(layer, inputs, ops.cast(ops.concatenate(factors, axis=-1), dtype))
    pieces, first = [], 0
    zero = ops.zeros_like(low[..., :1])
    for update in updates:
        own = 0 if update.a is None else update.a.shape[-1]
        piece = low[..., first : first + own]
        first += own
        pieces.append(ops.concatenate([piece, *[zero] * (rank - own)], axis=-1))
    none = ops.zeros((rank, layer.filters))
    b = [none if u.b is None else ops.pad(u.b, ((0, rank - u.b.shape[0]), (0, 0))) for u in updates]
    chosen = _choose(pieces, index)
    own_b = ops.take(ops.stack([ops.cast(v, dtype) for v in b]), index, axis=0)
    return outputs + ops.einsum("bhwr,bro->bhwo", chosen, own_b)


def _apply_all(
    layer: Any, operation: Operation, inputs: Any, rows: Sequence[_Row], index: Any
) -> Any:
    """Every adapter's kernel for all examples, of which each takes its own."""
    kernels = [_scaled(layer, row) for row in rows]
    same = all(kernel is rows[-1].kernel for kernel in kernels)
    kernels = kernels[-1:] if same else kernels
    outputs = [operation.apply_kernel(layer, inputs, k) for k in kernels]
    result = outputs[0] if same else _choose(outputs, index)
    terms = [additive(layer, row.found) if row.found else None for row in rows]
    if any(term is not None for term in terms):
        added = [
            ops.zeros_like(result)
            if term is None
            else operation.apply_kernel(layer, inputs, ops.cast(term, inputs.dtype))
            for term in terms
        ]
        result = result + _choose(added, index)
    return result


def _choose(pieces: Sequence[Any], index: Any) -> Any:
    """For every example the piece of its adapter; what the others made of it has no say."""
    shape = (-1, *[1] * (len(pieces[-1].shape) - 1))
    chosen = pieces[-1]
    for number, piece in enumerate(pieces[:-1]):
        chosen = ops.where(ops.reshape(ops.equal(index, number), shape), piece, chosen)
    return chosen


def _add_bias(
    layer: Any, operation: Operation, outputs: Any, rows: Sequence[_Row], index: Any
) -> Any:
    if layer.bias is None:
        return outputs
    base = rows[-1].bias
    biases = [
        by_site(row.found, row.bias, operation.adapted_bias) if row.found else row.bias
        for row in rows
    ]
    if all(bias is base for bias in biases):
        return operation.add_bias(layer, outputs, base)
    stacked = ops.stack([ops.cast(bias, outputs.dtype) for bias in biases])
    own = ops.take(stacked, index, axis=0)
    if getattr(layer, "data_format", "") == "channels_first":
        return outputs + own[:, :, None, None]
    between = len(outputs.shape) - len(own.shape)
    shape = (ops.shape(own)[0], *[1] * between, *own.shape[1:])
    return outputs + ops.reshape(own, shape)
