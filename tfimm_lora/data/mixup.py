"""Mixup and CutMix on batches, from Keras' layers, with timm's arguments."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from tfimm_lora.data.errors import DataError
from tfimm_lora.data.image_input import is_tensorflow
from tfimm_lora.data.keras_augmentation import seed_generator, stateless


@dataclasses.dataclass(frozen=True, eq=False)
class Mixup:
    """Mixes the images of a batch and their labels; made by :func:`create_mixup`.

    Every batch gets mixup, CutMix or nothing; within a batch every image has a share and a partner
    of its own (``keras.layers.MixUp``, ``keras.layers.CutMix``), where timm by default has one
    share for a batch.

    Args:
        nb_classes: Number of classes.
        mixup_alpha: Shares are drawn from Beta(alpha, alpha); 0 is no mixup.
        cutmix_alpha: The same for CutMix, at most 1; 0 is no CutMix.
        prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix for a batch that is mixed, if both are on.
        label_smoothing: Share of a label that is spread over all classes.
        seed: Where the sequence begins. ``None`` takes one from Python's ``random``, which
            ``keras.utils.set_random_seed`` settles.

    Returns:
        The call takes images (batch, height, width, channels) and labels, integers (batch,) or
        shares (batch, classes), and returns images and labels, float32, labels of shape (batch,
        classes). As a third argument it takes an integer tensor of shape (2,) that settles what
        happens to the batch.

    Raises:
        DataError: A value is out of range, or single images are given.

    Example:
        >>> batches = dataset.batch(32).map(Mixup(nb_classes=10, cutmix_alpha=1.0))
    """

    nb_classes: int
    mixup_alpha: float = 1.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.nb_classes < 1:
            raise DataError(f"nb_classes is the number of classes, not {self.nb_classes}.")
        for name in ("prob", "switch_prob", "label_smoothing", "cutmix_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} has to be within 0 to 1, not {getattr(self, name)}.")
        if self.mixup_alpha < 0:
            raise DataError(f"mixup_alpha has to be 0 or more, not {self.mixup_alpha}.")

    def __call__(self, images: Any, labels: Any, seed: Any = None) -> tuple[Any, Any]:
        """Returns the mixed images and labels; see the class."""
        import tensorflow as tf

        seed = self._generator.make_seeds(1)[:, 0] if seed is None else tf.cast(seed, tf.int64)
        if is_tensorflow(images) and not tf.executing_eagerly():
            return tf.autograph.experimental.do_not_convert(self._mix)(images, labels, seed)
        mixed = self._compiled(tf.convert_to_tensor(images), tf.convert_to_tensor(labels), seed)
        return mixed if is_tensorflow(images) else tuple(x.numpy() for x in mixed)

    def _mix(self, images: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        if images.shape.rank not in (None, 4):
            raise DataError(
                f"Images of shape {tuple(images.shape)} are no batch: map this after dataset.batch."
            )
        images, labels = tf.cast(images, tf.float32), self._shares(labels)
        seed = tf.ensure_shape(seed, (2,))
        own, whether, which = (
            tf.random.experimental.stateless_fold_in(seed, index) for index in range(3)
        )

        def mixed(layer: Any) -> tuple[Any, Any]:
            found = layer({"images": images, "labels": labels}, own)
            return (
                tf.ensure_shape(found["images"], images.shape),
                tf.ensure_shape(tf.cast(found["labels"], tf.float32), labels.shape),
            )

        def some() -> tuple[Any, Any]:
            if len(self._layers) == 1:
                return mixed(self._layers[0])
            mixup, cutmix = self._layers
            is_cutmix = tf.random.stateless_uniform((), which) < self.switch_prob
            return tf.cond(is_cutmix, lambda: mixed(cutmix), lambda: mixed(mixup))

        if not self._layers:
            return images, labels
        is_mixed = tf.random.stateless_uniform((), whether) < self.prob
        return tf.cond(is_mixed, some, lambda: (images, labels))

    def _shares(self, labels: Any) -> Any:
        """Labels as shares of the classes, smoothed as timm does."""
        import tensorflow as tf

        if labels.shape.rank == 1:
            labels = tf.one_hot(labels, self.nb_classes)
        labels = tf.ensure_shape(tf.cast(labels, tf.float32), (None, self.nb_classes))
        return labels * (1 - self.label_smoothing) + self.label_smoothing / self.nb_classes

    @cached_property
    def _layers(self) -> list[Any]:
        import keras
        import tensorflow as tf

        layers = []
        with tf.init_scope():  # made once, outside of the graph that first needs them
            if self.mixup_alpha:
                layers.append(stateless(keras.layers.MixUp, alpha=self.mixup_alpha))
            if self.cutmix_alpha:
                # Keras draws alpha between these two.
                factor = (self.cutmix_alpha, self.cutmix_alpha)
                layers.append(stateless(keras.layers.CutMix, factor=factor))
        return layers

    @cached_property
    def _generator(self) -> Any:
        return seed_generator(self.seed)

    @cached_property
    def _compiled(self) -> Any:
        import tensorflow as tf

        return tf.function(self._mix, autograph=False)


def create_mixup(model_or_nb_classes: Any, **options: Any) -> Mixup:
    """Creates mixup and CutMix for batches of images, with timm's arguments.

    Args:
        model_or_nb_classes: A model of the zoo, or the number of classes.
        options: The arguments of :class:`Mixup`: ``mixup_alpha`` (1.0), ``cutmix_alpha`` (0.0),
            ``prob`` (1.0), ``switch_prob`` (0.5), ``label_smoothing`` (0.1), ``seed``.

    Returns:
        A function of images and labels, to be mapped over a dataset of batches. The labels become
        shares of the classes: train with ``keras.losses.CategoricalCrossentropy``.

    Raises:
        DataError: A value is out of range.

    Example:
        >>> batches = batches.map(create_mixup(model, mixup_alpha=0.8, cutmix_alpha=1.0))
    """
    cfg = getattr(model_or_nb_classes, "cfg", None)
    return Mixup(int(model_or_nb_classes if cfg is None else cfg.nb_classes), **options)
