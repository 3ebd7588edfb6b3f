"""What a method has to define."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from keras import ops

from tfimm_lora.lora.methods.peft_hooks import PeftHooks
from tfimm_lora.lora.update import Update
from tfimm_lora.weights.names import NamedVariable


@dataclasses.dataclass(frozen=True)
class Site:
    """Where in a layer an update goes.

    Attributes:
        name: ``""`` for the whole kernel, else the name of a slice of its outputs (``q``).
        start: First output of the slice.
        size: Number of outputs.
        rank: Rank of the update.
        alpha: Alpha of the update.
    """

    name: str
    start: int
    size: int
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """For methods that have no options of their own."""


class Method(PeftHooks, abc.ABC):
    """An adapter's part in one kernel, or in one slice of its outputs.

    An instance lives in one adapted layer, creates its variables there, and turns their values
    into an :class:`~tfimm_lora.lora.update.Update`. It asks the layer's operation for shapes, so
    that a method is the same for dense layers and convolutions.

    Attributes:
        Options: Dataclass of the method's own options (``lora_options`` of the config); its
            ``__post_init__`` raises for bad values.
        combines: How several active adapters of one layer act together: ``sum``, ``product`` or
            ``None`` (one alone).
        in_place: Whether the method trains weights of the model itself and adapts no layer.
        keeps_base: Whether the base values of what is trained in place are kept, so that the
            adapter can be switched off.
        initializations: Values of ``lora_init``; the first is the default.
        takes_dropout: Whether the update has an input of its own, which can be dropped.
        takes_slices: Whether a slice of the outputs can be adapted.
        takes_targets: Whether ``lora_targets`` mean something to the method.
        trains_classifier: Whether the method trains the classifier, fresh or not.
        factor_b: Plain name of the variable that is LoRA's B, for ``lora_plus_ratio``; ``None`` if
            the method has none.
        scaled: Plain names of variables in which the update is linear, which take up another
            scaling when an adapter is swapped.
        ranks_by_group: Plain names of variables whose last axis are the ranks, group after group
            where the layer has groups.
        layer: The adapted layer.
        site: Where in the layer.
        adapter: Name of the adapter.
        options: An instance of ``Options``.
        variables: The method's variables by their plain name.
    """

    Options: ClassVar[type] = NoOptions
    combines: ClassVar[str | None] = "sum"
    in_place: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = True
    initializations: ClassVar[tuple[str, ...]] = ()
    takes_dropout: ClassVar[bool] = True
    takes_slices: ClassVar[bool] = True
    takes_targets: ClassVar[bool] = True
    trains_classifier: ClassVar[bool] = False
    factor_b: ClassVar[str | None] = None
    scaled: ClassVar[tuple[str, ...]] = ()
    ranks_by_group: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        layer: Any,
        site: Site,
        adapter: str = "default",
        init: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer = layer
        self.site = site
        self.adapter = adapter
        self.init = init or next(iter(self.initializations), "")
        self.options = self.Options(**(options or {}))
        self.variables: dict[str, Any] = {}

    def add_weight(
        self, name: str, shape: tuple[int, ...], initializer: Any, trainable: bool = True
    ) -> None:
        """Creates a variable in the layer; it stays in float32 in mixed precision.

        Args:
            name: Plain name. The slice's name and, for other adapters than ``default``, the
                adapter's name are appended.
            shape: Shape in Keras' layout.
            initializer: Keras initialiser or its name.
            trainable: Whether it is ever trained. Defaults to ``True``.
        """
        slice_name = f"_{self.site.name}" if self.site.name else ""
        adapter = "" if self.adapter == "default" else f".{self.adapter}"
        variable = self.layer.add_weight(
            name=f"{name}{slice_name}{adapter}",
            shape=shape,
            initializer=initializer,
            trainable=trainable,
            autocast=False,
        )
        self.variables[name] = variable
        # tfimm's layers have the factors as attributes.
        if not adapter:
            setattr(self.layer, variable.name, variable)

    @abc.abstractmethod
    def build(self) -> None:
        """Creates the method's variables with :meth:`add_weight`."""

    @abc.abstractmethod
    def update(self, kernel: Any, values: Mapping[str, Any]) -> Update:
        """Makes the update of the variables' values; a pure function in ``keras.ops``.

        Args:
            kernel: The frozen kernel, or its slice.
            values: float32 tensors by the variables' plain names.
        """

    @abc.abstractmethod
    def neutral(self) -> dict[str, np.ndarray]:
        """Values, by plain name, with which the update vanishes. Others may stay."""

    def before_quantization(
        self, kernel: np.ndarray, stored: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """What is quantised of a float kernel; what is not may become part of the first values.

        Args:
            kernel: The whole float kernel.
            stored: Quantises and dequantises a kernel.
        """
        return kernel

    @property
    def initializes(self) -> bool:
        """Whether :meth:`initialize` has something to do."""
        return False

    def initialize(self, kernel: np.ndarray) -> None:
        """Gives variables first values that depend on the kernel. By default there are none.

        Called when the base weights have been loaded; must leave trained values alone.

        Args:
            kernel: The frozen kernel, or its slice.
        """

    @classmethod
    def kernel_format(
        cls, name: str | None, group_size: int | None, options: Mapping[str, Any]
    ) -> tuple[str | None, int | None]:
        """Format and group size of the kernels that the method adapts.

        Args:
            name: Name of the format wanted; ``None`` for float.
            group_size: Group size wanted; ``None`` for the format's default.
            options: The method's options.

        Returns:
            Both, changed where the method needs others.

        Raises:
            ValueError: The method cannot work on such a kernel.
        """
        return name, group_size

    def grouped(self, group_size: int) -> np.ndarray | None:
        """The update of the kernel's matrix, one row for each group of rows.

        Args:
            group_size: Rows of a group.

        Returns:
            (groups, outputs), or ``None`` if the update is not the same for all rows of a group.
        """
        return None

    @classmethod
    def connect(cls, model: Any, name: str, updates: Sequence[Any]) -> None:
        """Lets the updates of an adapter share what belongs to the whole model.

        Called when all layers are built, and perhaps again.

        Args:
            model: The model.
            name: Name of the adapter.
            updates: The method's instances in all layers.

        Raises:
            ValueError: The options do not fit the model.
        """

    @classmethod
    def disconnect(cls, model: Any, name: str) -> None:
        """Takes out of the model what :meth:`connect` has put there for an adapter."""

    def penalty(self, values: Mapping[str, Any]) -> Any:
        """A scalar that is added to the loss in training, or ``None``.

        Args:
            values: float32 tensors by the variables' plain names.
        """
        return None

    @classmethod
    def options_by_layer(
        cls, options: Mapping[str, Any], modules: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Turns the options of a model into those of its adapted layers.

        Args:
            options: ``lora_options`` of the config.
            modules: timm paths of the adapted layers.

        Raises:
            ValueError: An option names a layer that is not adapted.
        """
        return {module: dict(options) for module in modules}

    @classmethod
    def check_model(cls, model: Any, fields: Any) -> None:
        """Raises if a method that works in place finds nothing to train in a model.

        Args:
            model: The model; its layers may be unbuilt.
            fields: A :class:`~tfimm_lora.lora.LoRAConfig`.

        Raises:
            ValueError: Says what is missing.
        """

    @classmethod
    def trains(cls, variable: NamedVariable, fields: Any) -> bool:
        """Whether a method that works in place trains a weight of the model.

        Args:
            variable: The weight with its place in the model.
            fields: A :class:`~tfimm_lora.lora.LoRAConfig`.
        """
        return False

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.site.alpha / self.site.rank

    def variable(self, name: str) -> Any:
        """The variable that :meth:`from_peft` has a value for; ``None`` if there is none."""
        return self.variables.get(name)

    @property
    def stored_rank(self) -> int:
        """Rank of the update in PEFT's files."""
        return self.site.rank

    def values(self) -> dict[str, Any]:
        """The variables' values as tensors."""
        return {n: ops.convert_to_tensor(v) for n, v in self.variables.items()}

    def numpy_values(self) -> dict[str, np.ndarray]:
        """The variables' values in unmerged state as arrays."""
        return {n: self.layer.unmerged_value(v) for n, v in self.variables.items()}

    @property
    def acts(self) -> bool:
        """Whether the update adds anything to the layer at the moment."""
        values = self.numpy_values()
        return any(not np.array_equal(values[name], v) for name, v in self.neutral().items())

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        """Assigns values by plain name."""
        for name, value in values.items():
            self.variables[name].assign(value)

    @property
    def form(self) -> Any:
        """What two updates must have in common for one to take the other's values."""
        return self.options

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Axes of the variables, by plain name, that are ranks and can be padded with zeros."""
        return {}

    @property
    def rank_groups(self) -> int:
        """Number of groups that the ranks belong to."""
        return getattr(self.layer, "groups", 1)

    def values_like(self, other: Method) -> list[tuple[Any, np.ndarray]]:
        """Values with which this update does what another one in its place does.

        The other may have a lower rank: it is padded with zeros; the ratio of the scalings becomes
        part of the values.

        Args:
            other: An update of the same method, whose variables have values.

        Returns:
            Pairs of a variable and its value.

        Raises:
            ValueError: The other has another form or a higher rank.
        """
        if type(other) is not type(self) or other.form != self.form:
            raise ValueError(
                f"{self.layer.path}: the adapter's options are {other.form}, the model's "
                f"{self.form}."
            )
        values, ratio = self.aligned(other.numpy_values()), other.scaling / self.scaling
        found = []
        for name, variable in self.variables.items():
            if name not in values:
                raise ValueError(f"{self.layer.path}: the adapter has no {name}.")
            value = self._padded(name, values[name], tuple(variable.shape))
            found.append((variable, value * np.float32(ratio) if name in self.scaled else value))
        return found

    def aligned(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of an update whose variables may be others than this one's, as this one's."""
        return values

    def _padded(self, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        axes = {axis % max(len(shape), 1) for axis in self.rank_axes.get(name, ())}
        fits = len(value.shape) == len(shape) and all(
            have == want or (axis in axes and have < want)
            for axis, (have, want) in enumerate(zip(value.shape, shape, strict=False))
        )
        if not fits:
            raise ValueError(
                f"{self.layer.path}: {name} has shape {value.shape} in the adapter and {shape} in "
                "the model, whose rank has to be at least the adapter's."
            )
        groups = self.rank_groups if name in self.ranks_by_group else 1
        if groups > 1:
            value = value.reshape(*value.shape[:-1], groups, -1)
            shape = (*shape[:-1], groups, shape[-1] // groups)
        padding = [(0, want - have) for have, want in zip(value.shape, shape, strict=True)]
        return np.pad(value, padding).reshape(
            (*shape[:-2], shape[-2] * shape[-1]) if groups > 1 else shape
        )


def kernel_value(layer: Any, site: Site) -> np.ndarray:
    """The frozen kernel of a layer, or a slice of it, as an array."""
    merged = layer.merged
    kernel = layer.unmerged_value(layer.kernel) if merged else layer.kernel_tensor()
    kernel = np.array(ops.convert_to_numpy(kernel))
    return kernel[..., site.start : site.start + site.size] if site.name else kernel
