"""A training step of a stack of layers with packed kernels, compiled by XLA: what it has in memory.

Run as a program, in a process of its own for each backend: ``python -m tests.compiled_kernels``
prints a line of JSON, for each format with and without recomputing.
"""

from __future__ import annotations

import json
import re
from typing import Any

import keras
import numpy as np

from tests.helpers import numpy, randomize, relative_error
from tfimm_lora import lora
from tfimm_lora.quantization import layer as quantization_layer

LAYERS, WIDTH, BATCH = 12, 256, 8
FORMATS = ("int8", "int4", "nf4")
KERNEL_BYTES = 4 * WIDTH * WIDTH


def stack(format: str | None) -> keras.Model:
    """Dense layers one behind the other, with adapters of rank 2."""
    dense = [keras.layers.Dense(WIDTH, "selu", name=f"dense_{i}") for i in range(LAYERS)]
    base = randomize(keras.Sequential([keras.Input((WIDTH,)), *dense], name="stack"))
    size = 64 if format and format.startswith("int4") else None
    model = lora.convert_to_lora_model(
        base, lora_targets=("all",), lora_rank=2, lora_train_classifier=False,
        lora_quantization=format, lora_group_size=size,
    )  # fmt: skip
    return randomize(model, 3, only=lambda leaf: "lora" in leaf)


def alive(hlo: str) -> tuple[int, int]:
    """How many float kernels a compiled step makes, and how many are in memory at once.

    Args:
        hlo: The optimised program, in the order in which it runs.
    """
    assert "is_scheduled=true" in hlo
    lines = hlo[hlo.index("\nENTRY") :].splitlines()[2:]
    made: dict[str, int] = {}
    used: dict[str, int] = {}
    for number, line in enumerate(lines):
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if not found:
            continue
        name, shape, operation = found.groups()
        if f"f32[{WIDTH},{WIDTH}]" in shape and operation not in ("parameter", "bitcast"):
            made[name] = number
        for operand in re.findall(r"[\w.\-]+", line[found.end() :].split("metadata=")[0]):
            used[operand] = number
    spans = [(start, used.get(name, start)) for name, start in made.items()]
    peak = max((sum(a <= now <= b for a, b in spans) for now in range(len(lines))), default=0)
    return len(made), peak


def _tensorflow(model: Any, x: np.ndarray) -> tuple[Any, Any, str, int | None]:
    import tensorflow as tf

    trained = [v.value for v in model.trainable_variables]

    def step(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(model(inputs, training=True) ** 2)
        return loss, tape.gradient(loss, [inputs, *trained])

    compiled = tf.function(step, jit_compile=True)
    inputs = tf.constant(x)
    hlo = compiled.experimental_get_compiler_ir(inputs)(stage="optimized_hlo")
    return step(inputs), compiled(inputs), hlo, None


def _jax(model: Any, x: np.ndarray) -> tuple[Any, Any, str, int | None]:
    import jax

    def loss(inputs: Any, trained: Any, rest: Any) -> Any:
        outputs, _ = model.stateless_call(trained, rest, inputs, training=True)
        return (outputs**2).sum()

    step = jax.value_and_grad(loss, (0, 1))
    variables = (model.trainable_variables, model.non_trainable_variables)
    arguments = (x, *([v.value for v in some] for some in variables))
    compiled = jax.jit(step).lower(*arguments).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return step(*arguments), compiled(*arguments), compiled.as_text(), memory


def measured(format: str | None) -> dict[str, Any]:
    """A step of a stack, not compiled and compiled."""
    model = stack(format)
    x = np.random.default_rng(0).standard_normal((BATCH, WIDTH)).astype("float32")
    measure = {"tensorflow": _tensorflow, "jax": _jax}[keras.backend.backend()]
    eager, compiled, hlo, memory = measure(model, x)
    flat = [keras.tree.flatten(numpy(t)) for t in (eager, compiled)]
    errors = [relative_error(b, a) for a, b in zip(*flat, strict=True) if a.ndim]
    loss = abs(float(flat[1][0]) / float(flat[0][0]) - 1)
    made, peak = alive(hlo)
    return {"error": max(*errors, loss), "made": made, "alive": peak, "memory": memory}


def main() -> None:
    """Prints what all formats take."""
    found: dict[str, Any] = {"float": measured(None)}
    found.update({name: measured(name) for name in FORMATS})
    quantization_layer.apply_recomputed = lambda apply, x, tensors, read: apply(x, read(tensors))
    found["kept"] = measured("int4")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
