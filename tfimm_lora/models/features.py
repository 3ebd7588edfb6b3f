"""Feature extractors: models that return feature maps of several depths, for dense tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tfimm_lora.architectures.base import ImageModel
from tfimm_lora.architectures.features import FeatureInfo, take_indices


def require_features(model_cls: type) -> None:
    """Raises if a class of models cannot return feature maps.

    Args:
        model_cls: A registered class.

    Raises:
        ValueError: Says what the class lacks.
    """
    missing = [
        name
        for name in ("feature_info", "forward_intermediates", "layers_behind")
        if getattr(model_cls, name, None) in (None, getattr(ImageModel, name))
    ]
    if missing:
        raise ValueError(
            f"{model_cls.__name__} has no feature maps of several depths: it does not define "
            f"{', '.join(missing)}, see tfimm_lora.architectures.base.ImageModel."
        )


def without_classifier(fields: dict[str, Any], model_path: Any = "") -> dict[str, Any]:
    """Config fields for the backbone of an extractor: those given, with ``nb_classes=0``.

    Args:
        fields: Config fields that a user typed.
        model_path: The weights file. A ``.weights.h5`` file fits only a model with its own
            classifier, so the classifier is kept then.

    Raises:
        ValueError: The fields ask for a classifier.
    """
    classes = [fields[k] for k in ("nb_classes", "num_classes") if fields.get(k) is not None]
    if str(model_path).endswith(".weights.h5"):
        return fields
    if any(classes):
        raise ValueError(
            f"features_only=True makes a model without classifier, and nb_classes={classes[0]} "
            "asks for one. Use one of the two, or create_feature_extractor(model)."
        )
    rest = {k: v for k, v in fields.items() if k not in ("nb_classes", "num_classes")}
    return {**rest, "nb_classes": 0}


@keras.saving.register_keras_serializable(package="tfimm_lora")
class FeatureExtractor(keras.Model):
    """A model that returns feature maps of another one, its backbone.

    The backbone is not copied: its weights are this model's weights, with their paths and their
    ``trainable`` flags, low-rank factors of a LoRA model included. Layers behind the last map are
    not run.

    Args:
        backbone: A built model of the zoo or of a class that defines what
            :class:`~tfimm_lora.architectures.base.ImageModel` asks for, LoRA models included.
        out_indices: Which maps to return: an integer n for the last n; a list of numbers, negative
            ones counting from the end; ``None`` (the default) for all four stages of a ConvNeXt
            and the last three blocks of a ViT, as in timm.
        norm: Apply the final normalisation to maps that it fits: all of a ViT, the last one of a
            ConvNeXt that normalises in front of pooling. Defaults to ``False``.
        freeze_unused: Set the ``trainable`` flags of weights that no map depends on to ``False``.
            Defaults to ``False``.
        **kwargs: Passed on to ``keras.Model`` (``name``).

    Raises:
        ValueError: The backbone has no feature maps, is not built, or a number is out of range.

    Example:
        >>> extractor = FeatureExtractor(tfimm_lora.create_model("vit_tiny_patch16_224"), [5, 11])
    """

    def __init__(
        self,
        backbone: Any,
        out_indices: int | Sequence[int] | None = None,
        norm: bool = False,
        freeze_unused: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone, FeatureExtractor):
            raise ValueError("The model is a feature extractor already. Pass its .backbone.")
        require_features(type(backbone))
        if not backbone.built:
            raise ValueError(
                f"{backbone.name!r} is not built: create it with create_model, or call it once."
            )
        count = len(backbone.feature_info)
        wanted = backbone.default_out_indices if out_indices is None else out_indices
        # The backbone decides the precision: the maps come from its layers.
        kwargs = {"name": "feature_extractor", "dtype": backbone.dtype_policy, **kwargs}
        super().__init__(**kwargs)
        self.out_indices = take_indices(count, wanted, "out_indices")
        self.norm = norm
        self.freeze_unused = freeze_unused
        self.backbone = backbone
        if freeze_unused:
            for layer in backbone.layers_behind(self.out_indices[-1], norm):
                for variable in layer.variables:
                    variable.trainable = False
        self.build((None, *backbone.cfg.input_size, backbone.cfg.in_channels))

    def build(self, input_shape: Any) -> None:
        """Nothing is left to build: the backbone is."""

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, strides and names of the maps."""
        return FeatureInfo(self.backbone.feature_info, self.out_indices)

    @property
    def cfg(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.cfg

    @property
    def pretrained_cfg(self) -> Any:
        """What is known about the backbone's checkpoint, perhaps ``None``."""
        return getattr(self.backbone, "pretrained_cfg", None)

    @property
    def dummy_inputs(self) -> Any:
        """A batch of one black image, (1, height, width, channels)."""
        return self.backbone.dummy_inputs

    def call(self, inputs: Any, training: bool | None = None) -> list[Any]:
        """Runs the backbone up to the last wanted map.

        Args:
            inputs: Images, (batch, height, width, channels), already normalised.
            training: Whether dropout and stochastic depth are active.

        Returns:
            Maps, (batch, rows, columns, channels), in the backbone's order.
        """
        return self.backbone.forward_intermediates(
            inputs,
            list(self.out_indices),
            norm=self.norm,
            stop_early=True,
            intermediates_only=True,
            training=training,
        )

    def compute_output_shape(self, input_shape: Any) -> list[tuple[int | None, ...]]:
        images = keras.KerasTensor(tuple(input_shape), dtype=self.compute_dtype)
        return [tuple(maps.shape) for maps in self.compute_output_spec(images)]

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        # By tracing: only the layers know how they round.
        return keras.Operation.compute_output_spec(self, inputs, training=training)

    def replace_backbone(self, backbone: Any) -> FeatureExtractor:
        """Returns an extractor of the same maps of another model.

        Args:
            backbone: A built model with as many features.

        Example:
            >>> merged = extractor.replace_backbone(lora.convert_to_regular_model(backbone))
        """
        return FeatureExtractor(
            backbone, self.out_indices, self.norm, self.freeze_unused, name=self.name
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "out_indices": list(self.out_indices),
            "norm": self.norm,
            "freeze_unused": self.freeze_unused,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> FeatureExtractor:
        """Restores the backbone, built and with fresh weights, and the extractor around it."""
        config = dict(config)
        backbone = keras.saving.deserialize_keras_object(
            config.pop("backbone"), custom_objects=custom_objects
        )
        return cls(backbone, **config)


def create_feature_extractor(
    model: keras.Model, out_indices: int | Sequence[int] | None = None, norm: bool = False
) -> FeatureExtractor:
    """Makes a model that returns feature maps of an existing one, for example a LoRA model.

    Both share their weights: what is trained through the extractor has changed in ``model`` too.
    Weights that no map depends on, the classifier among them, get no gradient.

    Args:
        model: A built model of the zoo, with or without LoRA.
        out_indices: See :class:`~tfimm_lora.models.FeatureExtractor`.
        norm: See :class:`~tfimm_lora.models.FeatureExtractor`.

    Returns:
        The extractor; ``feature_info`` has channels and strides, ``backbone`` is ``model``.

    Raises:
        ValueError: The model has no feature maps, is not built, or a number is out of range.

    Example:
        >>> extractor = create_feature_extractor(lora_model, out_indices=[3, 7, 11], norm=True)
    """
    return FeatureExtractor(model, out_indices, norm)
