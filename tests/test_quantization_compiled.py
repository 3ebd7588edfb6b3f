"""Packed kernels under XLA: compiled equals eager, and no float kernel outlives its use."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compiled_kernels import FORMATS, KERNEL_BYTES, LAYERS
from tests.helpers import answer_of

each_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a process of the backend's own has measured."""
    if request.param == "jax":
        pytest.importorskip("jax", reason="jax comes with the extra 'jax'")
    code = "from tests.compiled_kernels import main; main()"
    return answer_of(code, KERAS_BACKEND=request.param)


@pytest.mark.parametrize("name", ["float", *FORMATS])
def test_a_compiled_step_equals_an_eager_one(name: str, found):
    """Loss and the gradients of inputs and of all adapters."""
    assert found[name]["error"] <= 1e-4


@each_format
def test_no_float_kernel_outlives_its_use(name: str, found):
    """The forward pass makes each once, the backward pass once more; there are never many."""
    assert found[name]["alive"] <= 2
    assert found[name]["made"] <= 2 * LAYERS
    # Without recomputing all are there when the backward pass begins: the measure sees them.
    assert found["kept"]["alive"] >= LAYERS - 1


@each_format
@pytest.mark.parametrize("found", ["jax"], indirect=True)  # TensorFlow does not say
def test_memory_that_a_step_needs_beside_its_variables(name: str, found):
    total = LAYERS * KERNEL_BYTES
    assert found[name]["memory"] <= found["float"]["memory"] + total / 3
    assert found["kept"]["memory"] >= found["float"]["memory"] + 0.9 * total
