"""The fields that adaptation adds to a model's configuration."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tfimm_lora.architectures.config import ModelConfig, nearest_names
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.methods.initialization import family
from tfimm_lora.quantization.format import FakeFormat
from tfimm_lora.quantization.group_size import check_group_size
from tfimm_lora.quantization.registry import kernel_format, split_group_size

LORA_PREFIX = "lora_"
TRAIN_BIAS = ("none", "lora_only", "all")


@dataclasses.dataclass
class LoRAConfig(ModelConfig):
    """Adaptation fields, to be mixed into the config of an architecture.

    All start with ``lora_``; without them the base config is back.

    Attributes:
        lora_rank: Rank r of the updates. Defaults to 4.
        lora_alpha: Scaling is alpha / r (rsLoRA: alpha / sqrt r); ``None`` means r.
        lora_method: One word per method: ``lora`` (arXiv:2106.09685), ``rslora``
            (arXiv:2312.03732), ...; see the pages of the methods.
        lora_targets: What is adapted; ``None`` takes the architecture's choice. Names, wildcards
            or regular expressions on the timm path, or ``attention``, ``mlp``, ``all``.
        lora_rank_pattern: Rank of the layers that match a pattern.
        lora_alpha_pattern: Alpha of the layers that match a pattern.
        lora_dropout: Dropout on the input of the low-rank path, in training.
        lora_init: ``kaiming_uniform`` (PEFT's default), ``gaussian``, ...; ``None`` is the
            method's.
        lora_options: The method's own options, such as ``{"bias": True}``.
        lora_plus_ratio: How much larger the learning rate of B is than that of all other weights
            (LoRA+, arXiv:2402.12354); ``None`` for the same.
        lora_train_bias: ``none``, ``lora_only`` (biases of adapted layers) or ``all``.
        lora_train_classifier: ``None`` trains the classifier exactly when it is fresh.
        lora_modules_to_save: timm paths of further layers that are trained in full and saved with
            the adapter (PEFT's term).
        lora_adapter_name: Name of the model's first adapter. Defaults to ``default``.
        lora_quantization: Format of the frozen kernels: ``fake-int8`` and ``fake-int4`` (stored in
            float, rounded in each step), ``int8``, ``int4`` or ``nf4`` (packed), each integer one
            also ``-symmetric`` or ``-asymmetric``; ``int8-row-scaled`` and ``int4-row-scaled``
            have a factor for each row, which AWQ chooses (see :func:`~tfimm_lora.lora.quantize`);
            or a dictionary from patterns (as for targets, or what a layer is below) to formats or
            ``None``, of which the first that matches counts. ``None`` for float. Kernels that are
            trained in full stay in float. A format may carry its own group size: ``int4/64``.
        lora_group_size: Input rows that share a scale; where they do not divide a kernel's rows,
            the nearest divisor is taken. ``None`` for one scale per output channel (``nf4``:
            64).
        lora_quantize_merged: With a fake format, round the kernel together with the update in
            training, so that the merged model can be quantised without loss.

    Raises:
        ValueError: A value is out of range or unknown.

    Example:
        >>> LoRAViTConfig(lora_rank=8, lora_targets=("attn.q", "attn.v"))
    """

    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_method: str = "lora"
    lora_targets: tuple[str, ...] | str | None = None
    lora_rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    lora_alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    lora_dropout: float = 0.0
    lora_init: str | None = None
    lora_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora_plus_ratio: float | None = None
    lora_train_bias: str = "none"
    lora_train_classifier: bool | None = None
    lora_modules_to_save: tuple[str, ...] = ()
    lora_adapter_name: str = "default"
    lora_quantization: str | dict[str, str | None] | None = None
    lora_group_size: int | None = None
    lora_quantize_merged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("lora_rank", self.lora_rank)
        for pattern, rank in self.lora_rank_pattern.items():
            check_rank(f"lora_rank_pattern[{pattern!r}]", rank)
        alphas = {"lora_alpha": self.lora_alpha} | {
            f"lora_alpha_pattern[{p!r}]": a for p, a in self.lora_alpha_pattern.items()
        }
        for field, alpha in alphas.items():
            if alpha is not None and not alpha > 0:
                raise ValueError(f"{field} has to be positive, found {alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout has to be in [0, 1), found {self.lora_dropout!r}.")
        check_choice("lora_method", self.lora_method, METHODS)
        check_choice("lora_train_bias", self.lora_train_bias, TRAIN_BIAS)
        check_adapter_name(self.lora_adapter_name)
        if (self.lora_init or "").startswith("loftq") and self.lora_quantization is None:
            raise ValueError(
                f"lora_init={self.lora_init!r} makes up for what quantisation takes from the "
                "kernels, and they are float. Name a format, such as lora_quantization='nf4'."
            )
        self._check_method(METHODS[self.lora_method])
        self._check_quantization(METHODS[self.lora_method])
        if self.lora_train_classifier not in (None, True, False):
            raise ValueError(
                "lora_train_classifier has to be None, True or False, found "
                f"{self.lora_train_classifier!r}."
            )

    def _check_quantization(self, method: Any) -> None:
        """Raises for formats that are unknown, or that the method cannot work on."""
        check_group_size(self.lora_group_size, "lora_group_size")
        wanted = self.lora_quantization
        formats: list[str | None] = [wanted]  # type: ignore[list-item]
        if isinstance(wanted, dict):
            formats = list(wanted.values())
        for name in formats:
            found, size = split_group_size(name, self.lora_group_size, "lora_quantization")
            method.kernel_format(found, size, self.lora_options)
        if self.lora_group_size is not None and not any(formats):
            raise ValueError(
                f"lora_group_size={self.lora_group_size} without lora_quantization. Name a format, "
                "such as lora_quantization='int4'."
            )
        if self.lora_quantize_merged:
            named = [name for name in formats if name is not None]
            for name in named or formats:
                check_quantize_merged(True, split_group_size(name)[0])
            if self.lora_dropout:
                raise ValueError(
                    "lora_quantize_merged=True rounds the update as part of the kernel, so that "
                    "its inputs cannot be dropped. Use lora_dropout=0."
                )

    def _check_method(self, method: Any) -> None:
        """Raises for what the method cannot do."""
        if self.lora_init is not None:
            if not method.initializations:
                raise ValueError(
                    f"lora_init={self.lora_init!r}: {self.lora_method} has no choice of initial "
                    "values. Leave lora_init out."
                )
            if family(self.lora_init) not in method.initializations:
                check_choice("lora_init", self.lora_init, method.initializations)
        if self.lora_targets is not None and not method.takes_targets:
            raise ValueError(
                f"lora_targets={self.lora_targets!r}: what {self.lora_method} trains is always the "
                "same. Leave lora_targets out."
            )
        if self.lora_train_classifier is False and method.trains_classifier:
            raise ValueError(
                f"lora_train_classifier=False: {self.lora_method} trains the classifier. Leave "
                "lora_train_classifier out."
            )
        if self.lora_plus_ratio is not None:
            if not self.lora_plus_ratio > 0:
                raise ValueError(
                    f"lora_plus_ratio has to be positive, found {self.lora_plus_ratio!r}."
                )
            if method.factor_b is None:
                raise ValueError(
                    f"lora_plus_ratio={self.lora_plus_ratio!r}: {self.lora_method} has no factor B "
                    "that could have a learning rate of its own. Leave lora_plus_ratio out."
                )
        if self.lora_dropout and not method.takes_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r}: {self.lora_method} has no path of its own "
                "whose inputs could be dropped. Leave lora_dropout out."
            )
        known = [field.name for field in dataclasses.fields(method.Options)]
        for option in self.lora_options:
            check_choice(f"option of {self.lora_method} in lora_options", option, known)
        method.Options(**self.lora_options)


def check_quantize_merged(wanted: bool, format: str | None) -> None:
    """Raises if kernels are to be rounded together with updates, but their format rounds nothing.

    Raises:
        ValueError: Says what to type instead.
    """
    if wanted and not isinstance(kernel_format(format), FakeFormat):
        raise ValueError(
            f"lora_quantize_merged=True rounds kernels in each step, and {format!r} does not. Use "
            "lora_quantization='fake-int8' or 'fake-int4'."
        )


def check_rank(field: str, rank: Any) -> None:
    """Raises unless a rank is a positive integer.

    Raises:
        ValueError: It is not.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{field} has to be an integer of at least 1, found {rank!r}.")


def check_choice(field: str, value: str, known: Any) -> None:
    """Raises unless a value is one of those known.

    Raises:
        ValueError: It is not.
    """
    if value not in known:
        raise ValueError(
            f"Unknown {field} {value!r}.{nearest_names(str(value), known)} Use one of "
            f"{', '.join(known) or 'none: it takes none'}."
        )


def check_adapter_name(name: str) -> None:
    """Raises unless a name can be that of an adapter, of a folder and of a part of a variable.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"An adapter's name is made of letters, digits, '_' and '-', found {name!r}."
        )


def split_lora_values(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into those that start with ``lora_`` and all others."""
    lora = {k: v for k, v in values.items() if k.startswith(LORA_PREFIX)}
    return lora, {k: v for k, v in values.items() if k not in lora}
