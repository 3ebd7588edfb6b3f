"""A recipe: everything that decides a run, as dataclasses.

The command line, the YAML files and :func:`tfimm_lora.training.run` all use these.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tfimm_lora.data import DataConfig
from tfimm_lora.training.errors import RecipeError

Method = Literal["linear_probe", "lora", "full"]

EMBEDDED_MODEL = "vit_digits"
"""The model that comes with the package; :mod:`tfimm_lora.training.digits_model` registers it."""

LABELS = {"linear_probe": "linear probe", "lora": "LoRA", "full": "full fine-tuning"}
"""Names of the methods for a reader."""

DEFAULT_LEARNING_RATES: dict[str, float] = {"linear_probe": 1e-2, "lora": 1e-3, "full": 1e-4}
"""Learning rates for AdamW where the recipe names none."""


@dataclass(frozen=True)
class ModelSection:
    """Which model is adapted.

    Args:
        name: timm's name, with a tag if wanted: ``vit_small_patch14_dinov2.lvd142m``.
        pretrained: ``true`` for the default checkpoint, a tag, ``hf-hub:org/repo[@revision]``, a
            local folder with config.json and model.safetensors, or ``false``.
        path: Weights to start from instead: ``.safetensors`` in timm's key names,
            ``.weights.h5``, ``.keras``, or what tfimm has saved.
        input_size: Side of the images in pixels, or [height, width]; the checkpoint's own by
            default.
        in_channels: 3 for colour, 1 for grey; the checkpoint's own by default.
        options: Any other field of the model's configuration, ``--model.options.drop_path_rate
            0.1`` say.

    Example:
        >>> ModelSection(name="convnext_tiny", input_size=160)
    """

    name: str | None = None
    pretrained: bool | str = True
    path: str | None = None
    input_size: int | tuple[int, int] | None = None
    in_channels: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for ``tfimm_lora.create_model``, the name left out."""
        arguments = dict(self.options)
        arguments["pretrained"] = False if self.path else self.pretrained
        if self.path:
            arguments["model_path"] = self.path
        if self.input_size is not None:
            size = self.input_size
            arguments["input_size"] = (size, size) if isinstance(size, int) else tuple(size)
        if self.in_channels is not None:
            arguments["in_channels"] = self.in_channels
        return arguments


@dataclass(frozen=True)
class LoraSection:
    """How the model is adapted.

    Args:
        rank: Rank r of the update A B.
        alpha: The update is scaled by alpha / r; r itself by default.
        method: ``lora``, ``rslora``, ``dora``, ``loha``, ``lokr``, ``adalora``, ``vera``, ``ia3``,
            ``oft``, ``boft``, ``ln_tuning``, ``bitfit``, ...: see the pages of the methods.
        targets: Layers to adapt; by default as the architecture says. Names, wildcards or a regex
            on timm's paths, or ``attention``, ``mlp``, ``all``; ``attn.q`` ``attn.k`` ``attn.v``
            reach into a fused qkv.
        rank_pattern: Rank of single layers, path to rank.
        alpha_pattern: Alpha of single layers, path to alpha.
        dropout: Dropout on the input of the low-rank path, in training only.
        init: How A and B start; the method's own way by default.
        options: The method's own options, ``{block_size: 8}`` for ``oft``, say.
        plus_ratio: LoRA+: how much faster B learns than A; alike by default.
        train_bias: Which biases are trained: ``none``, those of adapted layers, or ``all``.
        train_classifier: Whether the head is trained; by default if it is new.
        modules_to_save: timm's paths of further layers that are trained in full and saved with the
            adapter.
        adapter_name: Name of the adapter in the model.
        quantization: Format of the frozen kernels: ``fake-int8``, ``fake-int4``, ``int8``, ``int4``
            or ``nf4``; or a format (or null) by pattern on timm's paths, of which the first that
            matches counts. Float by default.
        group_size: Input rows of a kernel that share a scale; by default one scale per output
            channel (``nf4``: 64 rows).
        quantize_merged: With a fake format, round the kernel together with the update in training,
            so that the merged model can be quantised without loss.

    Example:
        >>> LoraSection(rank=8, targets=["attn.q", "attn.v"])
    """

    rank: int = 4
    alpha: float | None = None
    method: str = "lora"
    targets: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plus_ratio: float | None = None
    train_bias: Literal["none", "lora_only", "all"] = "none"
    train_classifier: bool | None = None
    modules_to_save: list[str] = field(default_factory=list)
    adapter_name: str = "default"
    quantization: str | dict[str, str | None] | None = None
    group_size: int | None = None
    quantize_merged: bool = False

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments for ``tfimm_lora.lora.create_model``."""
        return {f"lora_{k}": v for k, v in asdict(self).items() if v not in (None, {}, [])}


@dataclass(frozen=True)
class TrainSection:
    """How long and how fast is trained.

    Args:
        methods: What to run: ``lora``, ``full`` (fine-tune every weight), ``linear_probe`` (train
            the head only), or several of them for a comparison, ``[linear_probe,lora,full]``.
        task: What is learned.
        epochs: Passes over the training images.
        batch_size: Images per step.
        validate_every: Epochs from one validation to the next; the last epoch is always validated.
        learning_rate: Peak rate of AdamW, or one per method, ``{lora: 1e-3, full: 1e-4}``. By
            default 1e-2 for linear_probe, 1e-3 for lora, 1e-4 for full.
        weight_decay: AdamW's, on matrices only (no biases, no normalisation weights).
        warmup: Share of the steps in which the rate rises to its peak, before it falls to 0 along
            a cosine.
        seed: Seed of the new weights, of the order of the images and of their augmentation.
        precision: Keras' dtype policy.
        jit_compile: Compile the training step with XLA: ``true``, ``false`` or Keras' ``auto``.
        save_models: Write the trained models, and not only the adapter and the figures.

    Raises:
        RecipeError: A value makes no sense.

    Example:
        >>> TrainSection(methods=["lora", "full"], epochs=5)
    """

    methods: Method | list[Method] = "lora"
    task: str = "classification"
    epochs: int = 10
    batch_size: int = 32
    validate_every: int = 1
    learning_rate: float | dict[str, float] | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    jit_compile: bool | Literal["auto"] = "auto"
    save_models: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"train.{name} has to be 1 or more, found {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise RecipeError(
                f"train.warmup is a share of the steps, at least 0 and below 1, found "
                f"{self.warmup}."
            )
        if not self.method_names:
            raise RecipeError("train.methods names no method; use lora, full or linear_probe.")
        for name in self.method_names:
            if not self.rate(name) > 0:
                raise RecipeError(
                    f"train.learning_rate has to be above 0, found {self.rate(name)} for {name}."
                )
        if isinstance(self.learning_rate, dict):
            unknown = sorted(set(self.learning_rate) - set(DEFAULT_LEARNING_RATES))
            if unknown:
                raise RecipeError(
                    f"train.learning_rate names {', '.join(unknown)}; "
                    f"known: {', '.join(DEFAULT_LEARNING_RATES)}."
                )

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to run, each once, in their order."""
        methods = [self.methods] if isinstance(self.methods, str) else self.methods
        return tuple(dict.fromkeys(methods))

    def rate(self, method: str) -> float:
        """Returns the peak learning rate of a method."""
        if isinstance(self.learning_rate, dict):
            return self.learning_rate.get(method, DEFAULT_LEARNING_RATES[method])
        return self.learning_rate or DEFAULT_LEARNING_RATES[method]


@dataclass(frozen=True)
class RunConfig:
    """A recipe.

    Args:
        model: Which model is adapted.
        data: Which images it is adapted to.
        lora: How it is adapted.
        train: How long and how fast is trained.
        output: Folder of the results; by default runs/MODEL-DATE-TIME.

    Example:
        >>> RunConfig(
        ...     model=ModelSection("vit_tiny_patch16_224"), data=DataConfig("folder:flowers")
        ... )
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    train: TrainSection = field(default_factory=TrainSection)
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dictionaries of plain values, as YAML and JSON know them."""
        values = asdict(self)
        if isinstance(self.model.input_size, tuple):
            values["model"]["input_size"] = list(self.model.input_size)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Makes a recipe of what :meth:`to_dict` gave.

        Raises:
            RecipeError: There is a key that no section has; the nearest ones are suggested.
        """
        sections: dict[str, Any] = {
            "model": ModelSection,
            "data": DataConfig,
            "lora": LoraSection,
            "train": TrainSection,
        }
        _require_known(values, [*sections, "output"], "A recipe")
        made: dict[str, Any] = {"output": values.get("output")}
        for name, section in sections.items():
            given = dict(values.get(name) or {})
            _require_known(given, section.__dataclass_fields__, f"The section {name!r}")
            if isinstance(given.get("input_size"), list):
                given["input_size"] = tuple(given["input_size"])
            made[name] = section(**given)
        return cls(**made)


def _require_known(given: dict[str, Any], known: Any, owner: str) -> None:
    from tfimm_lora.data.registry import suggest

    for key in given:
        if key not in known:
            raise RecipeError(
                f"{owner} has no key {key!r}.{suggest(key, known)} Known: {', '.join(known)}."
            )
