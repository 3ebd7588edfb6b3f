"""VeRA: shared random projections, scaled by two trained vectors. Paper: arXiv:2310.11454."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.methods.base import Method
from tfimm_lora.lora.update import Update
from tfimm_lora.weights.names import variable_value

LAMBDA_B, LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
PROJECTION_A, PROJECTION_B = "vera_projection_a", "vera_projection_b"


@dataclasses.dataclass(frozen=True)
class VeRAOptions:
    """Options of VeRA.

    Attributes:
        projection_prng_key: Seed of the projections. Defaults to 0.
        d_initial: First value of the vector between the projections. Defaults to 0.1.
        save_projection: Whether adapter files hold the projections, which the seed gives as well.
            Defaults to ``True``.

    Raises:
        ValueError: The seed is no integer of at least 0.
    """

    projection_prng_key: int = 0
    d_initial: float = 0.1
    save_projection: bool = True

    def __post_init__(self) -> None:
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
            raise ValueError(
                "lora_options: projection_prng_key has to be an integer in [0, 2**64), found "
                f"{key!r}."
            )


@functools.lru_cache(maxsize=4)
def draw_projections(
    rank: int, inputs: int, outputs: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the projections that PEFT draws, to the bit.

    Both come from one Mersenne twister, seeded as torch seeds its generator on the CPU; a uniform
    number is made of the low 24 bits of a word.

    Args:
        rank: Rank r.
        inputs: Largest number of inputs of the layers.
        outputs: Largest number of outputs of the layers.
        key: The seed.

    Returns:
        A, (rank, inputs), and B, (outputs, rank), in float32 and read-only.
    """
    state = np.random.RandomState(key & 0xFFFFFFFF)

    def draw(rows: int, columns: int) -> np.ndarray:
        words = np.frombuffer(state.bytes(4 * rows * columns), "<u4") & 0xFFFFFF
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))
        low, high = np.float32(-bound), np.float32(bound)
        uniform = words * 2.0**-24 * np.float64(high - low) + np.float64(low)
        values = uniform.astype("float32").reshape(rows, columns)
        values.flags.writeable = False
        return values

    return draw(rank, inputs), draw(outputs, rank)


@keras.saving.register_keras_serializable(package="tfimm_lora")
class VeRAProjections(keras.layers.Layer):
    """Holds the frozen projections of one adapter for all layers of a model.

    Args:
        rank: Rank r.
        inputs: Largest number of inputs of the layers.
        outputs: Largest number of outputs of the layers.
        key: Seed of the values.
        **kwargs: Passed on to ``keras.layers.Layer`` (``name``).

    Example:
        >>> projections = VeRAProjections(8, 64, 192, key=0)
    """

    built: bool

    def __init__(self, rank: int, inputs: int, outputs: int, key: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", "trainable": False, **kwargs})
        self.rank, self.inputs, self.outputs, self.key = rank, inputs, outputs, key
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Creates ``vera_projection_a``, (rank, inputs), and ``vera_projection_b``."""
        if self.built:
            return
        values = draw_projections(*self.shape, self.key)
        for name, value in zip((PROJECTION_A, PROJECTION_B), values, strict=True):

            def given(shape: Any, dtype: Any = None, value: np.ndarray = value) -> Any:
                return ops.convert_to_tensor(value, dtype=dtype)

            variable = self.add_weight(
                name=name, shape=value.shape, initializer=given, trainable=False, autocast=False
            )
            setattr(self, name, variable)
        self.built = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rank, inputs and outputs."""
        return self.rank, self.inputs, self.outputs

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"rank": self.rank, "inputs": self.inputs, "outputs": self.outputs, "key": self.key}
        return {**super().get_config(), **own}


class VeRA(Method):
    """Adds ``(x A d) B b``: A and B are random and the same in all layers, d and b are trained.

    A layer with fewer inputs or outputs than the largest uses the leading part of A and B.

    Attributes:
        shared: The projections of the model; a layer that belongs to none has its own.
    """

    Options = VeRAOptions
    peft_type = "VERA"
    peft_tensors = (LAMBDA_B, LAMBDA_D)
    peft_shared = ("vera_A", "vera_B")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared: VeRAProjections | None = None

    def build(self) -> None:
        """Creates ``vera_lambda_b`` (outputs) and ``vera_lambda_d`` (r)."""
        self._factor_shapes()
        self.add_weight(LAMBDA_B, (self.site.size,), "zeros")
        initial = keras.initializers.Constant(self.options.d_initial)
        self.add_weight(LAMBDA_D, (self.site.rank,), initial)

    def _factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.layer.operation.factor_shapes(self.layer, self.site.rank, self.site.size)

    def _sides(self) -> tuple[int, int]:
        """Rows of A and columns of B as matrices."""
        a, b = self._factor_shapes()
        return math.prod(a[:-1]), math.prod(b[1:])

    @property
    def scaling(self) -> float:
        """1: VeRA has no alpha."""
        return 1.0

    def values(self) -> dict[str, Any]:
        """The vectors, and this layer's part of the projections."""
        rows, columns = self._sides()
        if self.shared is None:
            a, b = draw_projections(self.site.rank, rows, columns, self.options.projection_prng_key)
        else:
            a, b = (getattr(self.shared, name) for name in (PROJECTION_A, PROJECTION_B))
        return {
            **super().values(),
            PROJECTION_A: ops.convert_to_tensor(a)[: self.site.rank, :rows],
            PROJECTION_B: ops.convert_to_tensor(b)[:columns, : self.site.rank],
        }

    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """Thin factors of the scaled projections."""
        a_shape, b_shape = self._factor_shapes()
        a = ops.transpose(values[PROJECTION_A]) * values[LAMBDA_D]
        b = ops.transpose(values[PROJECTION_B])[: b_shape[0]] * values[LAMBDA_B]
        return Update(a=ops.reshape(a, a_shape), b=ops.reshape(b, b_shape))

    @property
    def form(self) -> Any:
        """Nothing: the projections are taken over."""
        return None

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The vector between the projections, and these."""
        return {LAMBDA_D: (0,), PROJECTION_A: (0, 1), PROJECTION_B: (0, 1)}

    def values_like(self, other: Any) -> list[tuple[Any, np.ndarray]]:
        """The vectors, and the projections that they belong to."""
        found = super().values_like(other)
        if self.shared is None or other.shared is None:
            return found
        for name in (PROJECTION_A, PROJECTION_B):
            variable = getattr(self.shared, name)
            value = variable_value(getattr(other.shared, name))
            found.append((variable, self._padded(name, value, tuple(variable.shape))))
        return found

    def neutral(self) -> dict[str, np.ndarray]:
        """``vera_lambda_b`` = 0."""
        return {LAMBDA_B: np.zeros(self.site.size, "float32")}

    @classmethod
    def connect(cls, model: Any, name: str, updates: Sequence[Any]) -> None:
        """Gives the model projections that are large enough for all layers."""
        sides = [update._sides() for update in updates]
        rank = max(update.site.rank for update in updates)
        shape = rank, max(rows for rows, _ in sides), max(columns for _, columns in sides)
        held = getattr(model, _attribute(name), None)
        if held is None or held.shape != shape:
            cls.disconnect(model, name)
            key = updates[0].options.projection_prng_key
            held = VeRAProjections(*shape, key=key, name=_attribute(name))
            with _unlocked(model):
                setattr(model, _attribute(name), held)
        for update in updates:
            update.shared = held

    @classmethod
    def disconnect(cls, model: Any, name: str) -> None:
        """Takes the projections out of the model."""
        held = getattr(model, _attribute(name), None)
        if held is not None:
            with _unlocked(model):
                model._tracker.untrack(held)
                delattr(model, _attribute(name))

    def variable(self, name: str) -> Any:
        """The vectors, and the projections that all layers share."""
        if name in (PROJECTION_A, PROJECTION_B):
            return getattr(self.shared, name, None)
        return super().variable(name)

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Rank, dropout and the seed."""
        return {
            "lora_rank": config.get("r", 256),
            "lora_dropout": config.get("vera_dropout", 0.0),
            "lora_options": {
                "projection_prng_key": config.get("projection_prng_key", 0),
                "d_initial": config.get("d_initial", 0.1),
                "save_projection": config.get("save_projection", True),
            },
        }

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The fields of PEFT's ``VeraConfig``."""
        options = VeRAOptions(**fields.lora_options)
        bias = fields.lora_train_bias
        return {
            **dataclasses.asdict(options),
            "bias": "vera_only" if bias == "lora_only" else bias,
            "fan_in_fan_out": False,
            "init_weights": True,
            "r": fields.lora_rank,
            "vera_dropout": fields.lora_dropout,
        }

    @classmethod
    def peft_modules_config(
        cls, fields: Any, updates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Nothing: PEFT has one rank for all layers.

        Raises:
            ValueError: Layers differ in rank.
        """
        ranks = {update.site.rank: module for module, own in updates.items() for update in own}
        if len(ranks) > 1:
            text = ", ".join(f"{module} {rank}" for rank, module in ranks.items())
            raise ValueError(
                f"PEFT's VeRA has one rank for all layers, and here they differ: {text}. Leave "
                "lora_rank_pattern out, or save the model itself with model.save."
            )
        return {"r": next(iter(ranks))}

    @classmethod
    def complete_peft(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        layers: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Draws the projections where the file has none."""
        completed = dict(tensors)
        outputs = [len(v) for key, v in tensors.items() if key.endswith(f".{LAMBDA_B}")]
        if outputs and not completed.keys() & set(cls.peft_shared):
            inputs = [layer.operation.kernel_sides(layer)[0] for layer in layers.values()]
            rank, key = config.get("r", 256), config.get("projection_prng_key", 0)
            drawn = draw_projections(rank, max(inputs), max(outputs), key)
            completed |= zip(cls.peft_shared, drawn, strict=True)
        return completed

    def to_peft(self) -> dict[str, np.ndarray]:
        """``vera_lambda_b``, ``vera_lambda_d`` and, if they are to be saved, the projections."""
        tensors = self.numpy_values()
        if self.options.save_projection and self.shared is not None:
            tensors["vera_A"] = variable_value(self.shared.vera_projection_a)
            tensors["vera_B"] = variable_value(self.shared.vera_projection_b)
        return tensors

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """From the same tensors; projections of a larger set of layers are cut.

        Raises:
            ValueError: The projections are too small.
        """
        values = {name: tensors[name] for name in (LAMBDA_B, LAMBDA_D)}
        for name, key in ((PROJECTION_A, "vera_A"), (PROJECTION_B, "vera_B")):
            value = tensors.get(key)
            variable = self.variable(name)
            if value is None or variable is None:
                continue
            shape = tuple(variable.shape)
            if value.ndim != 2 or any(n < m for n, m in zip(value.shape, shape, strict=True)):
                raise ValueError(f"{key} has shape {value.shape}, at least {shape} is needed.")
            values[name] = value[: shape[0], : shape[1]]
        return values


def _attribute(name: str) -> str:
    """Name of the attribute of a model that holds an adapter's projections."""
    return "vera_projections" if name == "default" else f"vera_projections_{name}"


class _unlocked:
    """Lets a built model take or lose a layer for a moment."""

    def __init__(self, model: Any) -> None:
        self._tracker, self._locked = model._tracker, model._tracker.locked

    def __enter__(self) -> None:
        self._tracker.unlock()

    def __exit__(self, *error: Any) -> None:
        if self._locked:
            self._tracker.lock()
