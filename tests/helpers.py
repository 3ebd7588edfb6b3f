"""Small models, random weights and fresh processes for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

import tfimm_lora
from tfimm_lora import lora
from tfimm_lora.weights.names import (
    is_lora_weight,
    iterate_layers,
    named_variables,
    timm_path,
)

TINY_VIT: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "input_size": (16, 16),
    "patch_size": 8,
    "nb_classes": 10,
}
"""Overrides that make any ViT small: 5 tokens of width 32, two blocks."""

TINY_CONVNEXT: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 16, 24, 32),
    "input_size": (32, 32),
    "nb_classes": 10,
    "ls_init_value": 1.0,
}
"""Overrides that make any ConvNeXt small; the layer scale lets every block count."""

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY_VIT),
    "convnext": ("convnext_tiny", TINY_CONVNEXT),
}


def tiny_model(kind: str = "vit", seed: int | None = 0, **config: Any) -> keras.Model:
    """A small regular model with random, non-trivial weights (``seed=None``: its initial ones)."""
    name, overrides = TINY[kind]
    model = tfimm_lora.create_model(name, **{**overrides, **config})
    return model if seed is None else randomize(model, seed)


def tiny_lora_model(kind: str = "vit", seed: int | None = 0, **config: Any) -> keras.Model:
    """A small LoRA model whose updates are not zero (``seed=None``: as it was created)."""
    name, overrides = TINY[kind]
    model = lora.create_model(name, **{**overrides, **config})
    return model if seed is None else randomize(model, seed)


def randomize(
    model: keras.Model, seed: int = 0, only: str | Callable[[str], bool] = ""
) -> keras.Model:
    """Gives all weights random values that matter (of which ``only`` is part of the path, or true).

    Kernels keep the size of their outputs, gains stay near 1, variances positive; the factor B of
    an update, zero at the start, becomes small but not negligible.
    """
    generator = np.random.default_rng(seed)
    for v in named_variables(model):
        shape = tuple(v.variable.shape)
        value = generator.standard_normal(shape)
        if v.leaf in ("kernel", "embeddings") or (
            is_lora_weight(v.leaf) and v.leaf.startswith("kernel_lora_a")
        ):
            value = value / np.sqrt(max(np.prod(shape[:-1]), 1))
        elif v.leaf in ("gamma", "scale") or v.leaf.startswith(("ia3_l", "boft_s")):
            value = 1 + 0.2 * value
        elif v.leaf.startswith("oft_r"):
            value = 0.1 * value  # a larger matrix is beyond the series that makes it a rotation
        elif v.leaf == "moving_variance":
            value = 0.5 + np.abs(value)
        else:
            value = 0.3 * value
        if only in v.path if isinstance(only, str) else only(v.leaf):
            v.variable.assign(value.astype("float32"))
    return model


def images(model: Any, batch: int = 3, seed: int = 1) -> np.ndarray:
    """Random normalised images of a zoo model's size."""
    shape = (batch, *model.cfg.input_size, model.cfg.in_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def numpy(tensors: Any) -> Any:
    """Tensors, nested or not, as NumPy arrays."""
    return keras.tree.map_structure(
        lambda t: np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(t))), tensors
    )


def values(model: Any) -> dict[str, np.ndarray]:
    """All weights of a model by path."""
    return {v.path: numpy(v.variable) for v in named_variables(model)}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Weights are equal, bit for bit and name for name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


def assert_resumed(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Arrays are those that training without a break gives.

    To the bit with TensorFlow. JAX on a CPU adds in an order that is not always the same: one file
    loaded twice, and trained for a step, gives two results.
    """
    exact = keras.backend.backend() != "jax"
    for a, b in zip(found, expected, strict=True):
        a, b = numpy(a), numpy(b)
        if exact:
            assert a.tobytes() == b.tobytes()
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference over the standard deviation of what is expected."""
    found, expected = (np.asarray(numpy(t), "float64") for t in (found, expected))
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.std(expected) > 1e-4, "outputs that do not vary show nothing"
    return float(np.max(np.abs(found - expected)) / np.std(expected))


def adapted_modules(model: keras.Model) -> list[str]:
    """timm paths of the LoRA layers."""
    return [timm_path(p) for p, la in iterate_layers(model) if getattr(la, "adapters", None)]


def trained(model: keras.Model) -> set[str]:
    """Names of the weights that are trained."""
    return {v.name for v in named_variables(model) if v.variable.trainable}


def gradients(model: Any, inputs: Any, training: bool = False) -> dict[str, np.ndarray | None]:
    """Gradient of a random projection of the outputs for every weight that Keras would train.

    Returns:
        Gradients by path for all weights; ``None`` for those that get none.
    """
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    shape = numpy(model(inputs)).shape
    mix = np.random.default_rng(5).standard_normal(shape).astype("float32")

    def loss(outputs: Any) -> Any:
        return ops.mean(ops.cast(outputs, "float32") * mix)

    trained = list(model.trainable_variables)
    if keras.backend.backend() == "jax":
        import jax

        rest = [v.value for v in model.non_trainable_variables]

        def of(variables: Any) -> Any:
            return loss(model.stateless_call(variables, rest, inputs, training=training)[0])

        found = jax.grad(of)([v.value for v in trained])
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(model(inputs, training=training))
        found = tape.gradient(value, [v.value for v in trained])
    by_id = {id(v): g for v, g in zip(trained, found, strict=True)}
    return {
        v.path: None if by_id.get(id(v.variable)) is None else np.asarray(by_id[id(v.variable)])
        for v in named_variables(model)
    }


def run_python(
    code: str, *arguments: Any, timeout: float = 240, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh Python in the repository; arguments are ``sys.argv[1:]``."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or process.returncode == 0, process.stderr[-4000:]
    return process


def answer_of(code: str, *arguments: Any, **environment: str) -> Any:
    """Runs code in a fresh Python and returns what it printed last, a line of JSON."""
    return json.loads(run_python(code, *arguments, **environment).stdout.strip().splitlines()[-1])


def sequential(*layers: keras.layers.Layer, shape: tuple[int | None, ...]) -> keras.Sequential:
    """A built Sequential model, so that a layer can be tested as part of a model."""
    return keras.Sequential([keras.Input(shape), *layers], name="base")
