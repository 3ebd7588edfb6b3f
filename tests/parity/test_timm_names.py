"""Names, shapes and numbers of weights of every architecture at its full size.

Nothing is allocated: inside a ``StatelessScope`` Keras notes a variable's shape and defers its
value, so that the billion weights of the largest model cost nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any

import keras
import pytest

import tfimm_lora
from tests.parity.cases import ALL
from tests.parity.compare import timm_key


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    """timm name -> shape in Keras' layout of every weight of the model as registered."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            model = tfimm_lora.create_model(name)
    finally:
        # Keras keeps a list of what it has put off, and would make up for it in later tests.
        keras.utils.clear_session()
    variables = [v for v in model.variables if "seed_generator" not in v.path]
    shapes = {timm_key(v.path): tuple(v.shape) for v in variables}
    assert len(shapes) == len(variables), "two weights share a name"
    return shapes


@pytest.mark.parametrize("name", ALL)
def test_names_and_number_of_weights(name: str, zoo: dict[str, Any]) -> None:
    facts = zoo["archs"][name]
    shapes = full_size(name)
    assert len(shapes) == facts["tensors"]
    patterns = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", key) for key in shapes})
    assert patterns == sorted(zoo["key_schemas"][facts["keys"]])
    assert sum(math.prod(shape) for shape in shapes.values()) == facts["params"]
