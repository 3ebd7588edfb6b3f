"""The one form in which every method hands its weights to an operation."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter does to one kernel W, or to one slice of its outputs.

    The adapted layer is ``y = gain * (rotate(input_gain * x) W) + (x a) b + x kron + x delta`` and
    its bias ``bias_gain * bias + bias_term``. Every part is optional; with none of them the layer
    is the base layer. Scalings are part of the tensors. Methods make updates of their weights,
    operations apply them, and neither knows the other: merging, several adapters at once and an
    adapter for each example of a batch are then the same for all methods.

    Attributes:
        a: Thin factor on the input side, of the operation's shape (a dense layer's: (in, r)).
        b: Thin factor on the output side (a dense layer's: (r, out)).
        kron: Two tensors (m, l) and (*spatial, n, k) whose Kronecker product is an update: input
            m * n + j reads row m of the first and row j of the second, outputs likewise.
        delta: Update in the kernel's shape.
        mixing: A (h, w, in, r) and B (r / groups, out) of an update that mixes the channels of a
            grouped convolution; it acts beside the kernel and cannot be merged.
        input_gain: Factor of every input feature, (inputs,).
        rotation: Square blocks (blocks, size, size) that the rows of the kernel, in torch's order
            (channel, height, width), are multiplied with: ``W' = rotation W``.
        gain: Factor of every output, (outputs,).
        gain_tangent: Zeros, (outputs,), that have the gradient of log(gain). With them ``gain`` is
            a constant, which scales the kernel instead of all outputs: a step is then cheaper.
        bias_gain: Factor of the bias, (outputs,).
        bias_term: Addition to the bias, (outputs,).
    """

    a: Any = None
    b: Any = None
    kron: tuple[Any, Any] | None = None
    delta: Any = None
    mixing: tuple[Any, Any] | None = None
    input_gain: Any = None
    rotation: Any = None
    gain: Any = None
    gain_tangent: Any = None
    bias_gain: Any = None
    bias_term: Any = None

    @property
    def changes_inputs(self) -> bool:
        """Whether the kernel itself is applied to something else than the layer's inputs."""
        return self.input_gain is not None or self.rotation is not None
