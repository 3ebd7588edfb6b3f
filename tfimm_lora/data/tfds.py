"""Images of TensorFlow Datasets: any data set with the features ``image`` and ``label``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tfimm_lora.data.config import DataConfig
from tfimm_lora.data.errors import DataError
from tfimm_lora.data.registry import suggest
from tfimm_lora.data.sources import register_source
from tfimm_lora.data.split import Prepare, Source, Split

if TYPE_CHECKING:
    import tensorflow as tf

VAL_NAMES = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class TfdsSplit(Split):
    """A split that is read in its stored order.

    Attributes:
        builder: The data set's builder.
    """

    builder: Any

    def pictures(self, indices: np.ndarray, prepare: Prepare) -> tf.data.Dataset:
        """Returns a dataset of (prepared picture, label); see :class:`Split`."""
        import tensorflow as tf

        wanted = np.zeros(len(self.labels), bool)
        wanted[indices] = True

        def read(pixels: np.ndarray) -> np.ndarray:
            # Grey images come as (height, width, 1), which Pillow wants without the last axis.
            return prepare(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))

        dataset = _stored_order(self.builder, self.name).enumerate()
        dataset = dataset.filter(lambda index, _: tf.constant(wanted)[index])
        return dataset.map(
            lambda _, example: (
                tf.numpy_function(read, [example["image"]], tf.uint8),
                example["label"],
            ),
            num_parallel_calls=tf.data.AUTOTUNE,
        )


@register_source("tfds")
def open_tfds(config: DataConfig, argument: str) -> Source:
    """Opens a data set of TensorFlow Datasets, downloading and preparing it if need be.

    Args:
        config: The ``data`` section of a recipe; ``data_dir``, ``train_split`` and ``val_split``
            are used.
        argument: The data set's name, with ``/config`` and ``:version`` if wanted.

    Raises:
        DataError: There is no such data set or split, it has no images with one label each, or
            it could not be downloaded.

    Example:
        >>> open_tfds(DataConfig(), "beans").class_names
        ('angular_leaf_spot', 'bean_rust', 'healthy')
    """
    builder = _builder(config, argument)
    features = builder.info.features
    missing = [name for name in ("image", "label") if name not in (features or {})]
    if missing:
        raise DataError(
            f"The data set {argument!r} has no feature {' and '.join(missing)}; expected an "
            f"'image' and one 'label' each, found {', '.join(features or ['nothing'])}."
        )
    splits = builder.info.splits
    train_name = config.train_split or "train"
    val_name = config.val_split or next((name for name in VAL_NAMES if name in splits), None)
    for name in filter(None, (train_name, val_name)):
        if name.partition("[")[0] not in splits:
            raise DataError(
                f"The data set {argument!r} has no split {name!r}.{suggest(name, splits)} "
                f"Its splits: {', '.join(splits)}."
            )
    return Source(
        description=f"TensorFlow Datasets {builder.info.full_name}",
        class_names=tuple(features["label"].names),
        train=_make_split(builder, train_name),
        val=_make_split(builder, val_name) if val_name else None,
    )


def _builder(config: DataConfig, name: str) -> Any:
    if not name:
        raise DataError("No data set given: type --data.source tfds:NAME, tfds:beans say.")
    import importlib_resources  # noqa: F401  (tensorflow-datasets needs it and does not say so)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        raise DataError(
            f"TensorFlow Datasets knows no {name!r}.{suggest(name, tfds.list_builders())} "
            "A data set of your own has to be in --data.data_dir."
        ) from None
    try:
        builder.download_and_prepare()
    except Exception as error:  # download errors come from many libraries
        raise DataError(
            f"The data set {name!r} is not in {builder.data_dir} and could not be prepared: {error}"
        ) from error
    return builder


def _stored_order(builder: Any, split: str, **options: Any) -> tf.data.Dataset:
    import tensorflow_datasets as tfds

    # Interleaving several files keeps one order only if it is asked for.
    reading = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    return builder.as_dataset(split=split, shuffle_files=False, read_config=reading, **options)


def _make_split(builder: Any, name: str) -> TfdsSplit:
    import tensorflow_datasets as tfds

    undecoded = _stored_order(builder, name, decoders={"image": tfds.decode.SkipDecoding()})
    labels = [int(example["label"]) for example in undecoded.as_numpy_iterator()]
    return TfdsSplit(name, np.array(labels, np.int64), builder)
