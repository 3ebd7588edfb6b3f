"""The embedded digits, TensorFlow Datasets, and sources of a user's own."""

from __future__ import annotations

import hashlib
import json
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from tfimm_lora.data import (
    DataConfig,
    DataError,
    RandomAccessSplit,
    Resize,
    Source,
    load_dataset,
    register_source,
    validation_batches,
)
from tfimm_lora.data.digits import load_digits
from tfimm_lora.data.sources import SOURCES


def test_unknown_source_suggests_the_nearest():
    with pytest.raises(DataError, match=r"Unknown data source 'digit'. Did you mean 'digits'"):
        load_dataset(DataConfig("digit"))


def test_no_source():
    with pytest.raises(DataError, match=r"use --data.source folder:PATH"):
        load_dataset(DataConfig())


def test_digits_are_those_of_their_provenance():
    folder = resources.files("tfimm_lora.data")
    facts = json.loads(folder.joinpath("digits.json").read_text(encoding="utf-8"))
    with folder.joinpath("digits.npz").open("rb") as stream, np.load(stream) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts["sha256_of_pixels"]
    assert hashlib.sha256(labels.tobytes()).hexdigest() == facts["sha256_of_labels"]
    assert "CC BY 4.0" in facts["license"]


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is no dependency")
    original = datasets.load_digits()
    images, labels = load_digits()
    np.testing.assert_array_equal(images, np.rint(original.images * 255 / 16))
    np.testing.assert_array_equal(labels, original.target)


def test_digits_are_not_mirrored_and_divided_as_asked():
    dataset = load_dataset(
        DataConfig("digits", classes=["6", "7", "8", "9"], train_images_per_class=16)
    )
    assert not dataset.flip
    assert (len(dataset.train), len(dataset.val)) == (64, 650)
    labels = load_digits()[1]
    assert set(labels[dataset.train.indices]) == {6, 7, 8, 9}
    np.testing.assert_array_equal(labels[dataset.val.indices] - 6, dataset.val.labels)


def test_a_source_of_ones_own():
    @register_source("stripes")
    def open_stripes(config, argument):
        pictures = [Image.fromarray(np.full((4, 4), 10 * i, "uint8")) for i in range(20)]
        labels = np.arange(20) % 2
        split = RandomAccessSplit("all", labels, pictures, lambda picture: picture)
        return Source(f"stripes {argument}", ("even", "odd"), split)

    try:
        dataset = load_dataset(DataConfig("stripes:wide"))
        assert dataset.description == "stripes wide"
        batches = validation_batches(dataset.val, Resize(4, 4, 1), lambda x: x, batch_size=8)
        images, labels = next(batches.as_numpy_iterator())
        np.testing.assert_array_equal(images[:, 0, 0, 0], 10.0 * dataset.val.indices)
        np.testing.assert_array_equal(labels, dataset.val.indices % 2)
        with pytest.raises(ValueError, match=r"registered already"):
            register_source("stripes")
    finally:
        SOURCES._entries.pop("stripes", None)


# --- TensorFlow Datasets: a real small data set, prepared on disk -------------------------------


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class TinyShades(tfds.core.GeneratorBasedBuilder):
        """Grey levels; the label says in which third."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["dark", "grey", "light"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._examples(0, 30), "test": self._examples(30, 39)}

        def _examples(self, start, stop):
            for index in range(start, stop):
                label = index % 3
                shade = np.full((10, 12, 3), 40 + 80 * label + index % 7, "uint8")
                yield index, {"image": shade, "label": label}

        def _generate_examples(self):
            raise NotImplementedError("every split has its own generator")

    folder = tmp_path_factory.mktemp("tfds")
    TinyShades(data_dir=folder).download_and_prepare()
    return str(folder)


def test_tfds_images_keep_their_labels(tfds_folder):
    dataset = load_dataset(DataConfig("tfds:tiny_shades", data_dir=tfds_folder))
    assert dataset.class_names == ("dark", "grey", "light")
    assert (len(dataset.train), len(dataset.val)) == (30, 9)
    for images in dataset.images:
        batches = validation_batches(images, Resize(8, 8), lambda x: x, batch_size=16)
        pixels, labels = (
            np.concatenate(parts) for parts in zip(*batches.as_numpy_iterator(), strict=True)
        )
        assert pixels.shape[1:] == (8, 8, 3)
        np.testing.assert_array_equal(pixels.mean((1, 2, 3)).astype(int) // 80, labels)
        np.testing.assert_array_equal(labels, images.labels)


def test_tfds_split_can_be_divided_and_classes_chosen(tfds_folder):
    config = DataConfig(
        "tfds:tiny_shades", data_dir=tfds_folder, classes=["light", "dark"],
        train_split="train[:50%]", val_split="train[50%:]",
    )  # fmt: skip
    dataset = load_dataset(config)
    assert len(dataset.train) + len(dataset.val) == 20
    batches = validation_batches(dataset.val, Resize(8, 8), lambda x: x, batch_size=64)
    pixels, labels = next(batches.as_numpy_iterator())
    np.testing.assert_array_equal(pixels.mean((1, 2, 3)) < 100, labels == 1)


def test_tfds_unknown_name_and_split(tfds_folder):
    with pytest.raises(DataError, match=r"knows no 'mnits'. Did you mean 'mnist'"):
        load_dataset(DataConfig("tfds:mnits"))
    with pytest.raises(DataError, match=r"no split 'tset'.*Did you mean 'test'"):
        load_dataset(DataConfig("tfds:tiny_shades", data_dir=tfds_folder, val_split="tset"))
    with pytest.raises(DataError, match=r"No data set given"):
        load_dataset(DataConfig("tfds:"))
