"""Exporting models with quantised kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.helpers import images, numpy, relative_error, tiny_lora_model, tiny_model
from tfimm_lora import quantization

KINDS = {
    "packed": lambda: quantization.convert_to_quantized_model(tiny_model(), "int4"),
    "adapted": lambda: tiny_lora_model(lora_quantization={"head": None, "*": "nf4"}),
    "fake": lambda: tiny_lora_model("convnext", lora_quantization="fake-int8"),
}
JAX = """
import sys
import numpy as np
from tests.helpers import images
from tests.test_quantization_export import KINDS

for name, create in KINDS.items():
    model = create()
    x = images(model)
    np.save(f"{sys.argv[1]}/{name}.npy", np.asarray(model(x)))
    np.save(f"{sys.argv[1]}/{name}-inputs.npy", x)
    model.export(f"{sys.argv[1]}/{name}", format="tf_saved_model", verbose=False)
"""


def served(folder: Path, x: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    return numpy(model.serve(x))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="exports TensorFlow's models")
@pytest.mark.parametrize("kind", KINDS)
def test_saved_model(kind, tmp_path):
    model = KINDS[kind]()
    x = images(model)
    expected = numpy(model(x))
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    assert relative_error(served(tmp_path / "model", x), expected) <= 1e-5


@pytest.mark.skipif(not find_spec("jax"), reason="jax comes with the extra 'jax'")
def test_saved_model_of_jax(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", JAX, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in KINDS:
        expected = np.load(tmp_path / f"{kind}.npy")
        found = served(tmp_path / kind, np.load(tmp_path / f"{kind}-inputs.npy"))
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TensorFlow's converter")
def test_litert_keeps_eight_bits(tmp_path):
    import tensorflow as tf

    base = tiny_model(embed_dim=64, num_heads=2)
    small = quantization.convert_to_quantized_model(base, "int8")
    x = images(small, batch=1)
    sizes = {}
    for name, model in {"float": base, "int8": small}.items():
        model(x)
        path = tmp_path / f"{name}.tflite"
        model.export(path, format="litert", verbose=False)
        sizes[name] = path.stat().st_size
    assert sizes["int8"] < 0.5 * sizes["float"]
    interpreter = tf.lite.Interpreter(str(tmp_path / "int8.tflite"))
    run = interpreter.get_signature_runner()
    (name,) = run.get_input_details()
    (found,) = run(**{name: x}).values()
    assert relative_error(found, small(x)) <= 1e-5
