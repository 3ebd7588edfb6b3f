"""The transforms: what they take, what they return, what is random and what is not."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from PIL import Image

import tfimm_lora
from tfimm_lora.data import (
    DataError,
    EvaluationTransform,
    Resize,
    TrainingTransform,
    create_mixup,
    create_transform,
    keras_augmentation,
    pillow_resample,
)
from tfimm_lora.data.geometry import resized_size
from tfimm_lora.data.training_transform import parse_rand_augment

VIT = "vit_tiny_patch16_224"


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


def dataset_of(images):
    import tensorflow as tf

    signature = tf.TensorSpec((None, None, images[0].shape[-1]), tf.uint8)
    return tf.data.Dataset.from_generator(lambda: iter(images), output_signature=signature)


# --- Geometry and resampling --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target", "crop_mode", "expected"),
    [
        ((333, 500), (224, 224), "center", (256, 384)),  # 384.38 cut, as torchvision
        ((224, 333), (224, 224), "center", (256, 380)),  # 380.57 cut too
        ((224, 333), (224, 220), "center", (256, 381)),  # but rounded where sides differ
        ((333, 500), (224, 224), "squash", (256, 256)),
        ((333, 500), (224, 224), "border", (170, 256)),
        ((2, 900), (224, 224), "border", (1, 256)),
    ],
)
def test_resized_size(size, target, crop_mode, expected):
    import tensorflow as tf

    numpy_size = resized_size(*map(np.float64, size), target, 0.875, crop_mode, np)
    assert numpy_size == expected
    tensors = [tf.constant(side, tf.float64) for side in size]
    tensor_size = resized_size(*tensors, target, 0.875, crop_mode, tf)
    assert tuple(map(float, tensor_size)) == expected


def test_border_pads_with_the_fill():
    array = Resize(20, 20, crop_mode="border", fill=(1, 2, 3))(Image.new("RGB", (40, 20), "white"))
    assert (array[:5] == (1, 2, 3)).all() and (array[15:] == (1, 2, 3)).all()
    assert (array[5:15] == 255).all()


@pytest.mark.parametrize("interpolation", pillow_resample.INTERPOLATIONS)
def test_tensors_are_resized_as_pillow_does(interpolation):
    import tensorflow as tf

    method = Image.Resampling[interpolation.upper()]
    for size, new in [
        ((30, 41), (17, 19)),
        ((13, 50), (40, 20)),
        ((80, 9), (7, 8)),
        ((1, 1), (3, 2)),
    ]:
        ours = pillow_resample.resize(pixels(*size), *map(tf.constant, new), interpolation)
        theirs = np.asarray(Image.fromarray(pixels(*size)).resize(new[::-1], method))
        assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("height_may_be_first", [False, True])
def test_order_of_the_passes_is_that_of_the_pillow_version(height_may_be_first, monkeypatch):
    """Pillow 13 begins with the height where that shrinks much more; the bytes tell which."""
    import tensorflow as tf

    monkeypatch.setattr(pillow_resample, "HEIGHT_MAY_BE_FIRST", height_may_be_first)
    picture = Image.fromarray(pixels(80, 30))
    steps = [(30, 9), (20, 9)] if height_may_be_first else [(20, 80), (20, 9)]
    expected = picture
    for size in steps:
        expected = expected.resize(size, Image.Resampling.BICUBIC)
    ours = pillow_resample.resize(np.asarray(picture), tf.constant(9), tf.constant(20), "bicubic")
    np.testing.assert_array_equal(ours, np.asarray(expected))


# --- Evaluation ---------------------------------------------------------------------------------


def test_pictures_arrays_and_tensors_give_the_same():
    transform = create_transform(VIT, input_size=(40, 48))
    array = pixels(50, 70)
    (in_graph,) = dataset_of([array]).map(transform).as_numpy_iterator()
    expected = transform(Image.fromarray(array))
    assert expected.shape == (40, 48, 3) and expected.dtype == np.float32
    np.testing.assert_array_equal(transform(array), expected)
    np.testing.assert_allclose(in_graph, expected, atol=1e-6)
    assert isinstance(expected, np.ndarray)


def test_the_shape_is_known_to_tf_data():
    dataset = dataset_of([pixels(9, 8), pixels(7, 30)])
    spec = dataset.map(create_transform(VIT, input_size=16)).batch(2).element_spec
    assert spec.shape == (None, 16, 16, 3) and spec.dtype == "float32"


def test_normalisation_is_that_of_the_checkpoint():
    transform = create_transform(VIT, input_size=8)
    np.testing.assert_array_equal(transform(np.full((8, 8, 3), 255, "uint8")), 1)
    plain = create_transform(VIT, input_size=8, normalize=False)(pixels(8, 8))
    assert plain.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels):
    transform = EvaluationTransform((channels, 16, 24), crop_mode="border", normalize=False)
    array = pixels(30, 40, channels)
    (tensor,) = dataset_of([array]).map(transform).as_numpy_iterator()
    assert transform(array).shape == (16, 24, channels)
    np.testing.assert_array_equal(tensor, transform(array))


def test_grey_images_for_a_colour_model():
    transform = create_transform(VIT, input_size=16, normalize=False)
    grey = pixels(20, 30, 1)
    (tensor,) = dataset_of([grey]).map(transform).as_numpy_iterator()
    np.testing.assert_array_equal(tensor, transform(grey))
    np.testing.assert_array_equal(tensor, transform(grey[..., 0]))


# --- Which settings -----------------------------------------------------------------------------


def test_a_name_gives_the_settings_of_its_tag():
    transform = create_transform("convnext_tiny.fb_in1k")
    facts = tfimm_lora.models.pretrained_config("convnext_tiny.fb_in1k")
    assert transform.input_size == (3, 224, 224) and transform.crop_pct == facts.crop_pct
    tested = create_transform("convnext_tiny.fb_in1k", use_test_size=True)
    assert tested.input_size == facts.test_input_size == (3, 288, 288)
    assert tested.crop_pct == facts.test_crop_pct == 1.0


def test_a_model_keeps_its_size_and_channels():
    model = tfimm_lora.create_model("test_vit", input_size=(32, 64), in_channels=1)
    for use_test_size in (False, True):
        transform = create_transform(model, use_test_size=use_test_size)
        assert transform.input_size == (1, 32, 64)
    x = transform(Image.new("RGB", (50, 50)))
    assert model(x[None]).shape == (1, model.cfg.nb_classes)


def test_overrides():
    transform = create_transform(
        VIT,
        input_size=(3, 32, 48),
        interpolation="lanczos",
        crop_pct=1.0,
        crop_mode="squash",
        mean=0.5,
        std=(0.1, 0.2, 0.3),
    )
    expected = EvaluationTransform(
        (3, 32, 48), "lanczos", 1.0, "squash", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3)
    )
    assert transform == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": (1, 2, 3, 4)}, r"input_size is a number of pixels"),
        ({"input_size": (1, 32, 32)}, "has 1 channels, and the model wants 3"),
        ({"interpolation": "bicubc"}, "Did you mean 'bicubic'"),
        ({"interpolation": "random"}, "Known: nearest"),
        ({"crop_mode": "middle"}, "Known: center, squash, border"),
        ({"crop_pct": -1.0}, "above 0"),
        ({"mean": (0.1, 0.2)}, "mean needs 1 value or 3"),
        ({"hflip": 0.5}, "is_training=True"),
        ({"hflop": 0.5}, "Did you mean 'hflip'"),
        ({"is_training": True, "crop_pct": 0.9}, "for evaluation"),
        ({"is_training": True, "hflip": 2.0}, "hflip is a probability"),
        ({"is_training": True, "scale": (0.5, 0.1)}, "scale is"),
        ({"is_training": True, "ratio": (0.0, 1.0)}, "ratio is"),
        ({"is_training": True, "re_mode": "noise"}, "Known: const, pixel"),
        ({"is_training": True, "color_jitter": (0.1, 0.2)}, "one number, or brightness"),
        ({"is_training": True, "auto_augment": "rand-m9-mstd0.5"}, "'mstd0.5' has no counterpart"),
        ({"is_training": True, "auto_augment": "augmix-m3"}, "Only RandAugment"),
        ({"is_training": True, "auto_augment": "rand-m11"}, "0 to 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        create_transform(VIT, **arguments)


def test_bad_models():
    with pytest.raises(ValueError, match="Unknown model"):
        create_transform("vit_tiny_patch16_225")
    with pytest.raises(DataError, match="takes a model of tfimm_lora or its name"):
        create_transform(keras.Sequential())


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 8, 3), "uint8"), "map it before dataset.batch"),
        (np.zeros((8, 8, 3), "float32"), "takes uint8, 0 to 255"),
        (np.zeros((8, 8, 5), "uint8"), "has 5 channels"),
        (np.zeros(8, "uint8"), r"shape \(h, w, channels\)"),
    ],
)
def test_bad_images(image, message, is_training):
    import tensorflow as tf

    transform = create_transform(VIT, is_training, input_size=8)
    with pytest.raises(DataError, match=message):
        transform(image)
    # TensorFlow wraps what is raised in a mapped function, and keeps the words.
    with pytest.raises(Exception, match=f"DataError: .*{message}"):
        tf.data.Dataset.from_tensors(image).map(transform)


def test_colour_changes_need_colours():
    with pytest.raises(DataError, match="1 channels: leave them out"):
        TrainingTransform((1, 8, 8), auto_augment="rand-m9")


# --- Training -----------------------------------------------------------------------------------

AUGMENTATIONS = {
    "plain": {},
    "rand_augment": {"auto_augment": "rand-m9-n2"},
    "jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.1), "re_prob": 0.5, "re_mode": "pixel"},
    "random": {"interpolation": "random", "re_prob": 1.0, "vflip": 0.5},
}


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_the_same_seed_gives_the_same_images(options):
    images = [pixels(20 + i, 40 - i) for i in range(4)]

    def epochs(seed):
        transform = create_transform(VIT, True, input_size=16, seed=seed, **options)
        dataset = dataset_of(images).map(transform)
        assert dataset.element_spec.shape == (16, 16, 3)
        return [np.stack(list(dataset.as_numpy_iterator())) for _ in range(2)]

    (first, second), again, other = epochs(1), epochs(1), epochs(2)
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(second, again[1])
    assert not np.array_equal(first, second) and not np.array_equal(first, other[0])
    assert first.dtype == np.float32 and np.isfinite(first).all()
    assert first.min() >= -1.001 and first.max() <= 1.001


def test_a_seed_of_ones_own_settles_the_image_whatever_the_thread():
    import tensorflow as tf

    transform = create_transform(VIT, True, input_size=16, re_prob=0.5, re_mode="pixel")
    array = pixels(30, 40)
    expected = np.stack([transform(array, (i, 7)) for i in range(8)])
    assert len({x.tobytes() for x in expected}) == 8
    indices = tf.data.Dataset.range(8)
    mapped = indices.map(
        lambda i: transform(tf.constant(array), tf.stack([i, 7])), num_parallel_calls=4
    )
    np.testing.assert_allclose(np.stack(list(mapped.as_numpy_iterator())), expected, atol=1e-6)


def test_keras_seed_settles_a_transform_without_seed():
    def one():
        keras.utils.set_random_seed(3)
        return create_transform(VIT, True, input_size=16)(pixels(30, 40))

    np.testing.assert_array_equal(one(), one())


def test_what_is_asked_for_happens():
    rules = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "normalize": False}
    array = pixels(24, 24)
    size = (3, 24, 24)
    still = TrainingTransform(size, hflip=0.0, **rules)
    np.testing.assert_array_equal(still(array), array)
    np.testing.assert_array_equal(still(Image.fromarray(array)), array)
    np.testing.assert_array_equal(
        TrainingTransform(size, hflip=1.0, **rules)(array), array[:, ::-1]
    )
    turned = TrainingTransform(size, hflip=0.0, vflip=1.0, **rules)
    np.testing.assert_array_equal(turned(array), array[::-1])
    erased = TrainingTransform(size, hflip=0.0, re_prob=1.0, **rules)(array)
    changed = (erased != array).any(-1)
    assert changed.any() and not changed.all()
    assert (np.abs(erased[changed].astype(int) - [124, 116, 104]).max(-1) <= 1).all()


def test_rand_augment_differs_between_images():
    rules = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "normalize": False, "hflip": 0.0}
    transform = TrainingTransform((3, 16, 16), auto_augment="rand-m5-n1", seed=0, **rules)
    results = list(dataset_of([pixels(16, 16)] * 30).map(transform).as_numpy_iterator())
    assert len({x.tobytes() for x in results}) > 15


def test_rand_augment_moves_no_further_than_timm(monkeypatch):
    monkeypatch.setattr(keras_augmentation, "stateless", lambda layer_class: layer_class())
    layer = keras_augmentation.rand_augment(*parse_rand_augment("rand-m5-n3"))
    assert isinstance(layer, keras.layers.RandAugment) and layer.num_ops == 3
    assert layer.factor == (0, 0.5)
    np.testing.assert_allclose(layer.random_rotation.factor, (-15 / 360, 15 / 360))
    np.testing.assert_allclose(layer.random_shear.x_factor, (-0.15, 0.15))
    np.testing.assert_allclose(layer.random_shear.y_factor, (-0.15, 0.15))
    np.testing.assert_allclose(layer.random_translation.height_factor, 0.225)
    np.testing.assert_allclose(layer.random_translation.width_factor, 0.225)
    np.testing.assert_allclose(layer.random_brightness.factor, (-0.225, 0.225))
    assert parse_rand_augment("rand") == (2, 1.0)


def test_rand_augment_computes_what_keras_does(monkeypatch):
    """Each of its operations, against the method of Keras that computes all of them."""
    import tensorflow as tf

    monkeypatch.setattr(keras_augmentation, "stateless", lambda layer_class: layer_class())
    layer = keras_augmentation.rand_augment(1, 0.5)
    names = keras.layers.RandAugment._AUGMENT_LAYERS
    images = tf.constant(pixels(12, 12)[None], tf.float32)

    @tf.function(autograph=False)
    def both(index):
        transformation = layer.get_random_transformation(images)
        transformation["layer_idxes"] = index[None]
        theirs = keras.layers.RandAugment.transform_images(layer, images, transformation)
        return layer.transform_images(images, transformation), theirs

    changed = 0
    for index in range(len(names)):
        ours, theirs = both(tf.constant(index))
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=names[index])
        changed += not np.array_equal(ours, images)
    assert changed >= 8


def test_equalization_is_that_of_keras(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(keras_augmentation, "stateless", lambda layer_class: layer_class())
    ours = keras_augmentation.rand_augment(1, 0.5).equalization
    images = (pixels(9, 11)[None] // 3 + 20).astype("float32")
    expected = keras.layers.Equalization()(images)
    made = tf.function(lambda x: ours.transform_images(x, None), autograph=False)
    if keras.backend.backend() != "tensorflow":
        ours.backend.set_backend("tensorflow")  # as the call does inside tf.data
    np.testing.assert_allclose(made(tf.constant(images)), np.asarray(expected), atol=1e-4)


# --- Mixup and CutMix ---------------------------------------------------------------------------


def batches(count=24, classes=4):
    import tensorflow as tf

    labels = np.arange(count) % classes
    images = np.broadcast_to(labels[:, None, None, None], (count, 64, 64, 3)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(8, drop_remainder=True)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_the_images_are(alphas):
    mixup = create_mixup(4, mixup_alpha=alphas[0], cutmix_alpha=alphas[1], label_smoothing=0.0)
    dataset = batches().map(mixup)
    assert dataset.element_spec[0].shape == (8, 64, 64, 3)
    mixed = 0
    for images, labels in dataset.as_numpy_iterator():
        assert images.dtype == labels.dtype == np.float32
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
        # An image's value is its class: its mean is the mean of the classes by their shares, up to
        # the fractions of pixels at the border of CutMix's box.
        expected = labels @ np.arange(4)
        tolerance = 1e-5 if not alphas[1] else 3 * (2 * 64 / 64**2)
        np.testing.assert_allclose(images.mean((1, 2, 3)), expected, atol=tolerance)
        mixed += (labels.max(1) < 0.999).sum()
    assert mixed > 4


def test_mixup_defaults_and_options():
    images, labels = next(batches().as_numpy_iterator())
    same, shares = create_mixup(4, prob=0.0)(images, labels)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_allclose(shares[0], [0.925, 0.025, 0.025, 0.025], atol=1e-6)
    _, plain = create_mixup(4, mixup_alpha=0.0, label_smoothing=0.0)(images, np.eye(4)[labels])
    np.testing.assert_array_equal(plain, np.eye(4)[labels])
    model = types.SimpleNamespace(cfg=types.SimpleNamespace(nb_classes=7))
    assert create_mixup(model, cutmix_alpha=0.5).nb_classes == 7


def test_mixup_with_a_seed():
    one, same, other = (
        [x.tobytes() for x, _ in batches().map(create_mixup(4, seed=s)).as_numpy_iterator()]
        for s in (1, 1, 2)
    )
    assert one == same != other and len(set(one)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutmix_alpha": 2.0}, "cutmix_alpha has to be within 0 to 1"),
        ({"mixup_alpha": -1.0}, "0 or more"),
        ({"prob": 1.5}, "prob has to be"),
    ],
)
def test_bad_mixup(arguments, message):
    with pytest.raises(DataError, match=message):
        create_mixup(4, **arguments)


def test_mixup_of_single_images():
    with pytest.raises(DataError, match=r"after dataset\.batch"):
        create_mixup(4)(np.zeros((8, 8, 3)), 1)
    with pytest.raises(Exception, match=r"DataError: .*after dataset\.batch"):
        batches().unbatch().map(create_mixup(4))


# --- Backends -----------------------------------------------------------------------------------

OTHER_BACKEND = """
import numpy as np, tensorflow as tf, keras
from tfimm_lora.data import create_mixup, create_transform
keras.config.set_dtype_policy("mixed_bfloat16")  # must not reach pixel values
images = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3)).astype("uint8")
dataset = tf.data.Dataset.from_tensor_slices((images, [0, 1, 2, 3]))
transform = create_transform("vit_tiny_patch16_224", True, input_size=16, seed=1, re_prob=0.5,
    color_jitter=0.4, interpolation="random")
dataset = dataset.map(lambda x, y: (transform(x), y), num_parallel_calls=1).batch(4)
x, y = next(dataset.map(create_mixup(4, cutmix_alpha=1.0, seed=1)).as_numpy_iterator())
evaluated = create_transform("vit_tiny_patch16_224", input_size=16)(images[0])
print(keras.backend.backend(), x.dtype, float(x.sum()), float(y[:, 0].sum()), evaluated.sum())
"""


def test_the_backend_makes_no_difference():
    """Keras' layers use TensorFlow inside tf.data, whatever computes the model."""
    pytest.importorskip("jax", reason="jax comes with the extra 'jax'")
    said = []
    for backend in ("tensorflow", "jax"):
        environment = os.environ | {"KERAS_BACKEND": backend}
        command = [sys.executable, "-c", OTHER_BACKEND]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        name, dtype, *numbers = run.stdout.split()[-5:]
        assert (name, dtype) == (backend, "float32")
        said.append(np.array(numbers, float))
    np.testing.assert_allclose(said[0], said[1], rtol=1e-5)


def test_evaluation_needs_no_keras():
    code = (
        "import sys, numpy as np; from tfimm_lora import create_transform; "
        "create_transform('convnext_tiny')(np.zeros((9, 9, 3), 'uint8')); "
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
