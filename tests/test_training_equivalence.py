"""Training is one thing: interrupted or not, TensorFlow or JAX, compiled or eager, 32 or 16 bits.

Every run is a process of its own that is given files to start from and leaves losses and weights
behind. Processes take seconds to start, so each backend has two of them, which do all there is to
do: one that runs through, and one that goes on from what the first one saved half way.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import assert_same_bits, images, tiny_lora_model

KINDS = ("vit", "convnext")
STEPS = 20
CURVES = {"tensorflow": (False, True), "jax": (True,)}
"""Values of ``jit_compile`` that are tried; JAX without compilation is marked slow."""
SMALL = {"vit": {"embed_dim": 16}, "convnext": {"depths": (1, 1), "dims": (8, 16)}}
RANDOM = {"lora_dropout": 0.2, "drop_path_rate": 0.2, "drop_rate": 0.1}

PRELUDE = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[1])
import keras
import numpy as np
from tests.helpers import tiny_lora_model, values
from tests.test_training_equivalence import CURVES, KINDS, RANDOM, SMALL, STEPS
JIT = CURVES[keras.backend.backend()]
losses = {}

class Losses(keras.callbacks.Callback):
    def __init__(self, name):
        super().__init__()
        self.found = losses.setdefault(name, [])
    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean since the epoch began.
        mean = float(logs["loss"])
        before = sum(self.found[len(self.found) - batch:]) if batch else 0.0
        self.found.append(mean * (batch + 1) - before)

def fit(model, name, first, steps, epochs=1):
    random = np.random.default_rng(11)
    x = random.standard_normal((4 * 40, *model.cfg.input_size, 3)).astype("float32")
    y = np.arange(len(x)) % 10
    rows = slice(4 * first, 4 * (first + steps))
    model.fit(x[rows], y[rows], batch_size=4, epochs=epochs, shuffle=False, verbose=0,
              callbacks=[Losses(name)])

def create(kind, jit, **fields):
    keras.utils.set_random_seed(3)
    model = tiny_lora_model(kind, seed=0, lora_train_bias="lora_only", **SMALL[kind], **fields)
    model.compile(
        keras.optimizers.AdamW(2e-3, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    return model
"""

THROUGH = (
    PRELUDE
    + """
for kind in KINDS:
    model = create(kind, JIT[0], **RANDOM)
    fit(model, f"{kind} begin", 0, 3)
    model.save(folder / f"{kind}.keras")
    fit(model, f"{kind} next", 3, 1)
    np.savez(folder / f"{kind}_through.npz", **values(model))
    for jit in JIT:
        model = create(kind, jit)
        model.load_weights(folder.parent / f"{kind}.weights.h5")
        fit(model, f"{kind} jit={jit}", 0, STEPS)
print("LOSSES" + json.dumps(losses))
"""
)

# What takes minutes: JAX without compilation.
SLOW = (
    PRELUDE
    + """
for kind in KINDS:
    model = create(kind, False)
    model.load_weights(folder.parent / f"{kind}.weights.h5")
    fit(model, f"{kind} jit=False", 0, STEPS)
print("LOSSES" + json.dumps(losses))
"""
)

RESUMED = (
    PRELUDE
    + """
for kind in KINDS:
    model = keras.saving.load_model(folder / f"{kind}.keras")
    assert int(model.optimizer.iterations) == 3
    fit(model, f"{kind} next", 3, 1)
    np.savez(folder / f"{kind}_resumed.npz", **values(model))
print("LOSSES" + json.dumps(losses))
"""
)

BACKENDS = [b for b in ("tensorflow", "jax") if importlib.util.find_spec(b) is not None]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(b not in BACKENDS, reason=f"{b} is not installed"))
     for b in ("tensorflow", "jax")],
)  # fmt: skip


def start(code: str, folder: Path, backend: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).resolve().parents[1],
        # Compiling takes longer than running; optimising less does not change what is computed.
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(process: subprocess.Popen[str]) -> dict[str, list[float]]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-4000:]
    line = next(li for li in out.splitlines() if li.startswith("LOSSES"))
    return json.loads(line.removeprefix("LOSSES"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Losses and folder of both processes, by backend."""
    root = tmp_path_factory.mktemp("training")
    for kind in KINDS:
        model = tiny_lora_model(kind, seed=7, lora_train_bias="lora_only", **SMALL[kind])
        model.save_weights(root / f"{kind}.weights.h5")
    found: dict[str, dict[str, Any]] = {b: {"folder": root / b} for b in BACKENDS}
    for name, code in (("through", THROUGH), ("resumed", RESUMED)):
        processes = {}
        for backend in BACKENDS:
            (root / backend).mkdir(exist_ok=True)
            processes[backend] = start(code, root / backend, backend)
        for backend, process in processes.items():
            found[backend][name] = losses_of(process)
    return found


@each_kind
@each_backend
def test_a_resumed_run_is_the_run_that_never_stopped(backend: str, kind: str, runs):
    run = runs[backend]
    assert len(run["through"][f"{kind} begin"]) == 3
    assert run["resumed"][f"{kind} next"] == run["through"][f"{kind} next"]
    with (
        np.load(run["folder"] / f"{kind}_resumed.npz") as resumed,
        np.load(run["folder"] / f"{kind}_through.npz") as through,
    ):
        assert_same_bits(dict(resumed), dict(through))


@each_kind
@pytest.mark.parametrize(
    ("backend", "jit"), [(backend, jit) for backend in CURVES for jit in CURVES[backend]]
)
def test_one_loss_curve_for_all(backend: str, jit: bool, kind: str, runs):
    if backend not in runs:
        pytest.skip(f"{backend} is not installed")
    expected = np.array(runs["tensorflow"]["through"][f"{kind} jit=False"])
    curve = np.array(runs[backend]["through"][f"{kind} jit={jit}"])
    assert len(curve) == STEPS
    np.testing.assert_allclose(curve, expected, atol=1e-4)


@pytest.mark.slow
def test_jax_without_compilation_has_the_same_curve(runs):
    if "jax" not in runs:
        pytest.skip("jax is not installed")
    losses = losses_of(start(SLOW, runs["jax"]["folder"], "jax"))
    for kind in KINDS:
        expected = runs["tensorflow"]["through"][f"{kind} jit=False"]
        np.testing.assert_allclose(losses[f"{kind} jit=False"], expected, atol=1e-4)


@each_kind
def test_the_curve_is_that_of_learning(kind: str, runs):
    """A curve that does not move would be the same everywhere."""
    for run in runs.values():
        assert len(set(run["through"][f"{kind} begin"])) == 3
    assert np.std(runs["tensorflow"]["through"][f"{kind} jit=False"]) > 1e-2


@pytest.mark.parametrize(
    ("kind", "policy"), [("vit", "mixed_float16"), ("convnext", "mixed_bfloat16")]
)
def test_half_precision_learns(kind: str, policy: str):
    keras.config.set_dtype_policy(policy)
    model = tiny_lora_model(kind)
    model.compile(
        keras.optimizers.AdamW(5e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    x, y = images(model, 8), np.arange(8) % 10
    losses = model.fit(x, y, epochs=10, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert all(keras.backend.standardize_dtype(w.dtype) == "float32" for w in model.weights)
