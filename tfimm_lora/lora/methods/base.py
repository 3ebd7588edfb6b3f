"""What a method has to define."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any


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


class Method(abc.ABC):
    """An update of one kernel, or of one slice of its outputs.

    An instance lives in one adapted layer. It asks the layer's operation for shapes and for the
    application of factors, so that a method is the same for dense layers and convolutions.

    Attributes:
        layer: The adapted layer.
        site: Where in the layer.
    """

    def __init__(self, layer: Any, site: Site) -> None:
        self.layer = layer
        self.site = site

    @abc.abstractmethod
    def build(self) -> None:
        """Creates the method's variables in the layer."""

    @property
    @abc.abstractmethod
    def weights(self) -> list[Any]:
        """The method's variables."""

    @property
    @abc.abstractmethod
    def scaling(self) -> float:
        """Factor of the update."""

    @abc.abstractmethod
    def apply(self, inputs: Any, outputs: Any) -> Any:
        """Adapts the kernel's outputs.

        Args:
            inputs: Inputs of the layer, dropout applied.
            outputs: What the frozen kernel (or its slice) made of the undropped inputs, no bias.

        Returns:
            The adapted outputs, of the same shape.
        """

    @abc.abstractmethod
    def delta(self) -> Any:
        """The update as a kernel (or slice of it), scaling included."""

    @abc.abstractmethod
    def neutral(self) -> dict[str, Any]:
        """Values, by variable name, with which the update vanishes."""
