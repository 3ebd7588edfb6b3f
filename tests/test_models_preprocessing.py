"""create_preprocessing: from [0, 255] to normalised values."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfimm_lora
from tests.helpers import numpy
from tfimm_lora import models

NAME = "convnext_tiny"


def expected(x: np.ndarray, name: str = NAME) -> np.ndarray:
    facts = models.pretrained_config(name)
    channels = x.shape[-1]
    mean, std = (np.resize(v, channels).astype("float32") for v in (facts.mean, facts.std))
    return (x.astype("float32") / 255 - mean) / std


def pixels(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(3,), (8, 9, 3), (2, 8, 9, 3), (2, 3, 8, 9, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float16"])
def test_any_shape_and_type(shape: tuple[int, ...], dtype: str):
    x = pixels(*shape, dtype=dtype)
    out = numpy(tfimm_lora.create_preprocessing(NAME)(x))
    assert out.dtype == np.float32 and out.shape == shape
    np.testing.assert_allclose(out, expected(x), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_repeat_the_statistics(channels: int):
    x = pixels(2, 4, 4, channels)
    out = tfimm_lora.create_preprocessing(NAME, in_channels=channels)(x)
    np.testing.assert_allclose(numpy(out), expected(x), atol=1e-5)


def test_statistics_are_those_of_the_tag():
    names = [
        n
        for n in tfimm_lora.list_models("vit_*", include_tags=True)
        if models.pretrained_config(n).mean[0] == 0.5
    ]
    x = pixels(4, 4, 3)
    out = numpy(tfimm_lora.create_preprocessing(names[0])(x))
    np.testing.assert_allclose(out, x / 127.5 - 1, atol=1e-5)
    assert np.abs(out - expected(x)).max() > 0.1


def test_inside_tf_data_whatever_the_backend():
    import tensorflow as tf

    x = pixels(6, 4, 4, 3)
    preprocess = tfimm_lora.create_preprocessing(NAME)
    data = tf.data.Dataset.from_tensor_slices(x).map(preprocess).batch(4)
    out = np.concatenate([b.numpy() for b in data])
    np.testing.assert_allclose(out, expected(x), atol=1e-5)
    data = tf.data.Dataset.from_tensor_slices(x).batch(4).map(preprocess)
    assert [tuple(b.shape) for b in data] == [(4, 4, 4, 3), (2, 4, 4, 3)]


def test_type_of_the_result():
    x = pixels(2, 4, 4, 3)
    half = tfimm_lora.create_preprocessing(NAME, dtype="float16")(x)
    assert keras.backend.standardize_dtype(half.dtype) == "float16"
    np.testing.assert_allclose(numpy(half), expected(x), atol=2e-3)


def test_inputs_are_not_changed():
    x = pixels(2, 4, 4, 3, dtype="float32")
    before = x.copy()
    tfimm_lora.create_preprocessing(NAME)(x)
    assert np.array_equal(x, before)


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="Unknown model 'convnext_tinny'"):
        tfimm_lora.create_preprocessing("convnext_tinny")


def test_a_model_instead_of_its_name():
    """The facts are those of the checkpoint that it was created from."""
    model = tfimm_lora.create_model("vit_tiny_patch16_224", depth=1, in_channels=1)
    model.pretrained_cfg.mean, model.pretrained_cfg.std = (0.25,), (0.5,)
    found = np.asarray(tfimm_lora.create_preprocessing(model)(np.full((2, 2, 1), 255.0)))
    np.testing.assert_allclose(found, np.full((2, 2, 1), 1.5), atol=1e-6)
