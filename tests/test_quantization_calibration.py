"""What layers read from calibration data: rows, sums, samples, passes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from tests.quantized import capture
from tfimm_lora.quantization import calibration
from tfimm_lora.quantization.kernel_matrix import to_matrix

LAYERS = {
    "dense": (lambda: keras.layers.Dense(5), (3, 4, 6)),
    "einsum heads": (lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (3, 4, 6)),
    "einsum merge": (lambda: keras.layers.EinsumDense("...abc,cdb->...ad", (4, 5)), (3, 4, 2, 6)),
    "pointwise": (lambda: keras.layers.Conv2D(5, 1, strides=2), (2, 7, 6, 4)),
    "patches": (lambda: keras.layers.Conv2D(5, 4, strides=4), (2, 9, 8, 3)),
    "same": (lambda: keras.layers.Conv2D(5, (3, 4), strides=(2, 3), padding="same"), (2, 9, 8, 3)),
    "same, odd": (lambda: keras.layers.Conv2D(5, 2, strides=1, padding="same"), (2, 5, 4, 3)),
    "dilated": (
        lambda: keras.layers.Conv2D(5, (3, 2), dilation_rate=(2, 3), padding="same"),
        (2, 9, 8, 3),
    ),
    "dilated, valid": (lambda: keras.layers.Conv2D(5, 3, dilation_rate=2), (2, 9, 8, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrix_are_the_outputs(name, monkeypatch):
    # Convolutions image by image.
    monkeypatch.setattr(calibration, "_PATCH_BYTES", 1)
    make, shape = LAYERS[name]
    layer = make()
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")
    outputs = ops.convert_to_numpy(layer(inputs))
    assert calibration.unserved_reason(layer) == ""
    rows = np.concatenate(list(calibration.input_rows(layer, inputs)))
    product = rows @ ops.convert_to_numpy(to_matrix(layer, ops.convert_to_tensor(layer.kernel)))
    np.testing.assert_allclose(product, outputs.reshape(product.shape), rtol=1e-5, atol=1e-5)


def test_rows_of_channels_first():
    first = keras.layers.Conv2D(5, 3, strides=2, padding="same", data_format="channels_first")
    last = keras.layers.Conv2D(5, 3, strides=2, padding="same", data_format="channels_last")
    inputs = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype("float32")
    first.build((None, 4, 7, 6))
    last.build((None, 7, 6, 4))
    (expected,) = calibration.input_rows(last, inputs)
    (rows,) = calibration.input_rows(first, np.moveaxis(inputs, -1, 1))
    np.testing.assert_array_equal(rows, expected)


class Small(keras.Model):
    """A convolution, a normalisation with moving statistics, two dense layers, one read twice."""

    def __init__(self):
        super().__init__(name="small")
        self.stem = keras.layers.Conv2D(4, 2, strides=2, name="stem")
        self.norm = keras.layers.BatchNormalization(name="norm")
        self.drop = keras.layers.Dropout(0.5, name="drop")
        self.mix = keras.layers.Dense(4, name="mix")
        self.head = keras.layers.Dense(3, name="head")
        self.unused = keras.layers.Dense(3, name="unused")

    def build(self, input_shape):
        self.unused.build((None, 4))
        self.call(keras.KerasTensor(input_shape))

    def call(self, inputs, training=False):
        x = self.drop(self.norm(self.stem(inputs), training=training), training=training)
        return self.head(self.mix(inputs=self.mix(x)))


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    model = Small()
    model.build((None, 6, 6, 3))
    return model


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(40, 6, 6, 3)).astype("float32")


def test_capture_sums_up_what_layers_read(model, images):
    layers = [model.stem, model.mix, model.head]
    found = capture(model, layers, images, sample_size=50)
    patches = np.concatenate(list(calibration.input_rows(model.stem, images)))
    between = model.norm(model.stem(images))
    once = ops.convert_to_numpy(between).reshape(-1, 4)
    twice = ops.convert_to_numpy(model.mix(between)).reshape(-1, 4)
    read = {
        "stem": patches,
        "mix": np.concatenate([once, twice]),
        "head": ops.convert_to_numpy(model.mix(model.mix(between))).reshape(-1, 4),
    }
    assert set(found) == {id(layer) for layer in layers}
    for layer in layers:
        expected, statistics = read[layer.name], found[id(layer)]
        assert statistics.count == len(expected)
        np.testing.assert_allclose(statistics.mean_abs, np.abs(expected).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(
            statistics.hessian, expected.T.astype("float64") @ expected, rtol=1e-4, atol=1e-3
        )
        assert statistics.sample.shape == (50, expected.shape[1])
        for row in statistics.sample[:5]:
            assert np.abs(expected - row).max(axis=1).min() < 1e-5


def test_samples_are_even_and_the_same_each_time(model, images):
    first, second = (
        capture(model, [model.stem], images, hessian=False, sample_size=90) for _ in range(2)
    )
    sample = first[id(model.stem)].sample
    assert first[id(model.stem)].hessian is None
    np.testing.assert_array_equal(sample, second[id(model.stem)].sample)
    patches = np.concatenate(list(calibration.input_rows(model.stem, images)))
    places = [int(np.abs(patches - row).max(axis=1).argmin()) for row in sample]
    assert len(set(places)) == 90
    # 360 patches in two batches, of 32 and 8 images: a fifth is from the second.
    assert 8 <= sum(place >= 32 * 9 for place in places) <= 30


def test_passes_give_the_same_and_see_changed_kernels(model, images):
    layers = [model.stem, model.mix, model.head]
    whole = capture(model, layers, images)
    batches = [(images[:20], None), (images[20:], None)]
    parts = list(calibration.capture_in_passes(model, layers, batches, max_bytes=8 * 2 * 16))
    # The stem, of 12 rows, needs more than that, and is alone.
    assert [set(part) for part in parts] == [{id(model.stem)}, {id(model.mix), id(model.head)}]
    for key, statistics in (item for part in parts for item in part.items()):
        np.testing.assert_allclose(statistics.hessian, whole[key].hessian, rtol=1e-4, atol=1e-3)
    passes = calibration.capture_in_passes(model, layers, images, max_bytes=1)
    next(passes)
    model.stem.kernel.assign(2 * model.stem.kernel)
    changed = next(passes)[id(model.mix)]
    assert np.abs(changed.mean_abs - whole[id(model.mix)].mean_abs).max() > 0.1


def test_capture_leaves_the_model_as_it_was(model, images):
    layers = [model.stem, model.mix, model.head]
    before = [ops.convert_to_numpy(v) for v in model.variables]
    outputs = ops.convert_to_numpy(model(images))
    calls = [layer.call for layer in layers]
    tracked = [set(vars(layer)) for layer in layers]
    capture(model, layers, images)
    with pytest.raises(ValueError, match="small/mix reads values that are not finite"):
        capture(model, [model.mix, model.head], np.where(images > 3, np.nan, images))
    with pytest.raises(Exception, match=r".*"):  # The backend's, for images of another shape.
        capture(model, layers, images[..., :2])
    assert [layer.call for layer in layers] == calls
    assert [set(vars(layer)) for layer in layers] == tracked
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(images)), outputs)
    # A call that was somebody else's before is theirs again.
    other = model.mix.call
    model.mix.call = lambda *args, **kwargs: other(*args, **kwargs)
    theirs = model.mix.call
    capture(model, [model.mix], images)
    assert model.mix.call is theirs


def test_bad_calibration_data(model, images):
    for none in ([], images[:0], iter(())):
        with pytest.raises(ValueError, match="no calibration data"):
            capture(model, [model.head], none)
    with pytest.raises(ValueError, match="small/unused got no input"):
        capture(model, [model.head, model.unused], images)
    with pytest.raises(ValueError, match=r"take 2 passes .* iterator can be read once"):
        capture(model, [model.stem, model.head], iter([images]), max_bytes=1)
    # AWQ needs no Hessians, so one pass is enough.
    capture(model, [model.stem, model.head], iter([images]), max_bytes=1, hessian=False)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (keras.layers.DepthwiseConv2D(3), (None, 6, 6, 4), "depthwise .* channel of its own"),
        (keras.layers.Conv2D(4, 3, groups=2), (None, 6, 6, 4), "group .* channels of its own"),
        (keras.layers.EinsumDense("abc,bcd->abd", (4, 5)), (None, 4, 6), "no matrix"),
        (keras.layers.LayerNormalization(), (None, 4), "LayerNormalization has no kernel"),
    ],
)
def test_layers_that_are_not_served(model, images, layer, shape, reason):
    layer.build(shape)
    with pytest.raises(ValueError, match=f"{reason}.* rounding to nearest"):
        capture(model, [layer], images)


def test_layers_that_are_not_built(model, images):
    with pytest.raises(ValueError, match="not built"):
        capture(model, [keras.layers.Dense(3)], images)
