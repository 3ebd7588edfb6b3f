"""From pictures to batches: sizes, colours, normalisation, augmentation, repetition."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tfimm_lora.data import (
    DataConfig,
    DataError,
    Resize,
    load_dataset,
    training_batches,
    validation_batches,
)


def picture(height, width, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype("uint8")
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_becomes_the_shape_asked_for(mode, channels):
    source = picture(30, 50)
    source = (
        source.convert("L").convert("I").convert(mode) if mode == "I;16" else source.convert(mode)
    )
    array = Resize(16, 24, channels)(source)
    assert array.shape == (16, 24, channels)
    assert array.dtype == np.uint8


def test_transparent_is_white():
    array = Resize(8, 8)(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert (array == 255).all()


def test_sixteen_bits_keep_their_shades():
    shades = np.array([[0, 32768, 65535]], "uint16")
    array = Resize(1, 3, 1)(Image.fromarray(shades))
    np.testing.assert_array_equal(array[0, :, 0], [0, 128, 255])


def test_same_size_changes_nothing():
    source = picture(32, 32)
    np.testing.assert_array_equal(Resize(32, 32)(source), np.asarray(source))


def test_center_keeps_the_aspect_ratio_and_cuts():
    pixels = np.zeros((20, 60, 3), "uint8")
    pixels[:, 20:40] = 255
    assert (Resize(20, 20)(Image.fromarray(pixels)) == 255).all()


def test_squash_keeps_all_and_border_pads():
    white = Image.new("RGB", (40, 20), (255, 255, 255))
    assert (Resize(20, 20, crop_mode="squash")(white) == 255).all()
    padded = Resize(20, 20, crop_mode="border")(white)
    assert (padded[5:15] == 255).all()
    assert not padded[:5].any() and not padded[15:].any()


def test_crop_pct_cuts_the_rim():
    pixels = np.zeros((40, 40, 3), "uint8")
    pixels[5:35, 5:35] = 255
    array = Resize(28, 28, crop_pct=0.7, interpolation="nearest")(Image.fromarray(pixels))
    assert (array == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, "1 or 3 channels"),
        ({"interpolation": "bicubc"}, "Did you mean 'bicubic'"),
        ({"crop_mode": "middle"}, "Known: center, squash, border"),
    ],
)
def test_unknown_values(options, message):
    with pytest.raises(DataError, match=message):
        Resize(8, 8, **options)


# --- Batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig("digits", classes=["0", "1"], train_images_per_class=10))


def collect(batches):
    parts = list(batches.as_numpy_iterator())
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def batches_of(digits, **options):
    options = {"batch_size": 8, "seed": 3} | options
    return training_batches(digits.train, Resize(16, 16, 1), lambda x: x / 255, **options)


def test_an_epoch_shows_every_image_once(digits):
    batches = batches_of(digits)
    assert len(batches) == 3
    images, labels = collect(batches)
    assert images.shape == (20, 16, 16, 1)
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    assert np.bincount(labels).tolist() == [10, 10]
    plain, _ = collect(
        validation_batches(digits.train, Resize(16, 16, 1), lambda x: x / 255, batch_size=8)
    )
    assert sorted(map(bytes, images)) == sorted(map(bytes, plain))


def test_the_same_seed_gives_the_same_epochs(digits):
    options = {"shift": 0.2, "flip": True}
    one, same, other = (batches_of(digits, seed=seed, **options) for seed in (1, 1, 2))
    first, first_again, second = collect(one)[0], collect(same)[0], collect(one)[0]
    np.testing.assert_array_equal(first, first_again)
    np.testing.assert_array_equal(second, collect(same)[0])
    assert not np.array_equal(first, second), "every epoch has an order and changes of its own"
    assert not np.array_equal(first, collect(other)[0])


def test_flip_mirrors_some_and_only_when_asked(digits):
    plain, _ = collect(
        validation_batches(digits.train, Resize(16, 16, 1), lambda x: x / 255, batch_size=8)
    )
    known, mirrored = (
        set(map(bytes, plain)),
        {bytes(np.ascontiguousarray(x[:, ::-1])) for x in plain},
    )
    seen = set(map(bytes, collect(batches_of(digits, flip=True))[0]))
    assert seen <= known | mirrored
    assert seen & mirrored and seen & known


def test_shift_moves_by_no_more_than_asked(digits):
    images, _ = collect(batches_of(digits, shift=0.25))
    plain, _ = collect(batches_of(digits))
    assert images.shape == plain.shape
    shifted = set(map(bytes, images)) - set(map(bytes, plain))
    assert shifted
    # A move of at most 4 of 16 pixels keeps the middle of some original inside the result.
    windows = {np.ascontiguousarray(original[4:12, 4:12]).tobytes() for original in plain}
    for image in images:
        found = {
            np.ascontiguousarray(image[i : i + 8, j : j + 8]).tobytes()
            for i in range(9)
            for j in range(9)
        }
        assert found & windows


def test_cache_or_not_the_images_are_the_same(digits):
    kept, read_again = batches_of(digits), batches_of(digits, cache_megabytes=0)
    for _ in range(2):
        np.testing.assert_array_equal(collect(kept)[0], collect(read_again)[0])
