"""``tfimm-lora merge``: an adapter and its base model become one regular model."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import jsonargparse

from tfimm_lora.cli.parser import Parser, new_parser
from tfimm_lora.cli.quiet import quiet_errors
from tfimm_lora.training.config import ModelSection
from tfimm_lora.training.errors import RecipeError

NAME = "merge"
HELP = "merge an adapter into its base model"
DESCRIPTION = """\
Merges an adapter into the model that it was trained on and writes a regular model: a .safetensors
file in timm's key names, or a .keras file. The adapter knows its model's name; say how the model
was changed for the training, --model.input_size or --model.path.

  tfimm-lora merge runs/first/lora/adapter --output merged.safetensors
  tfimm-lora merge adapter --model.path dinov2.safetensors --model.input_size 224 \\
      --output merged.keras
"""
SUFFIXES = (".safetensors", ".keras")


def make_parser() -> Parser:
    """Returns the subcommand's parser.

    Example:
        >>> make_parser().parse_args(["adapter", "--output", "merged.keras"]).adapter
        'adapter'
    """
    parser = new_parser(
        description=DESCRIPTION, usage="tfimm-lora merge ADAPTER --output FILE [OPTIONS]"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="The adapter's folder.")
    parser.add_argument(
        "--output", type=str, required=True, help="The file to write: .safetensors or .keras."
    )
    parser.add_argument(
        "--keep-quantized",
        action="store_true",
        help="Keep the kernels packed, if the adapter was trained on quantised ones; .keras only.",
    )
    parser.add_class_arguments(ModelSection, "model")
    return parser


def prepare(arguments: list[str]) -> list[str]:
    """Returns the arguments as they are."""
    return arguments


def execute(arguments: jsonargparse.Namespace) -> int:
    """Writes the merged model and says how far its logits are from the adapted model's.

    Args:
        arguments: What the parser made.

    Returns:
        0.

    Raises:
        RecipeError: The output has another ending.
        FileNotFoundError: There is no such adapter.
        ValueError: Adapter and model do not fit.
    """
    output, adapter = Path(arguments.output), Path(arguments.adapter)
    if output.suffix not in SUFFIXES:
        raise RecipeError(f"--output has to end in {' or '.join(SUFFIXES)}, found {output.name!r}.")
    packed = arguments.keep_quantized
    if packed and output.suffix != ".keras":
        raise RecipeError(f"--keep-quantized writes a .keras file, found {output.name!r}.")
    section = make_parser().instantiate(arguments).model
    difference, name = merge(adapter, section, output, packed)
    print(f"{name} with {adapter} merged into {output}")
    print(f"largest difference of logits before and after: {difference:.1e} of their deviation")
    return 0


def merge(
    adapter: Path, section: ModelSection, output: Path, keep_quantized: bool = False
) -> tuple[float, str]:
    """Merges an adapter into its base model.

    Args:
        adapter: The adapter's folder.
        section: The base model; without a name the adapter's own.
        output: The file to write.
        keep_quantized: Keep packed kernels packed, even if rounding them again changes outputs.
            Defaults to ``False``.

    Returns:
        Largest difference of logits before and after merging, relative to their standard
        deviation, on random images; and the base model's name.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: Adapter and model do not fit.
        RuntimeError: The merged model differs from the adapted one.

    Example:
        >>> merge(Path("adapter"), ModelSection(), Path("merged.safetensors"))
    """
    config = adapter / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no adapter in {adapter}: no adapter_config.json there.")
    name = section.name or json.loads(config.read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not name:
        raise ValueError(f"{config} does not name its model; give it with --model.name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import numpy as np

    with quiet_errors():
        import tfimm_lora.training.digits_model  # registers the embedded model
    from tfimm_lora import lora
    from tfimm_lora.models import save_safetensors
    from tfimm_lora.training.results import checked_difference, logits
    from tfimm_lora.weights.safetensors_file import write_aside

    options = replace(section, name=name).arguments()
    classes = _classes(adapter, name)
    if classes is not None:
        options.setdefault("nb_classes", classes)
    adapted = lora.load_adapter(tfimm_lora.create_model(name, **options), adapter)
    with warnings.catch_warnings():
        # What the warning says about rounding is printed as the difference.
        warnings.simplefilter("ignore" if keep_quantized else "default")
        regular = lora.convert_to_regular_model(adapted, keep_quantized)
    shape = (2, *adapted.cfg.input_size, adapted.cfg.in_channels)
    images = np.random.default_rng(0).normal(size=shape).astype("float32")
    before, after = logits(adapted, images), logits(regular, images)
    if keep_quantized:
        difference = float(np.abs(after - before).max() / before.std())
    else:
        difference = checked_difference(before, after)
    if output.suffix == ".keras":
        write_aside(output, regular.save)
    else:
        save_safetensors(regular, output)
    return difference, name


def _classes(adapter: Path, name: str) -> int | None:
    """Returns the number of classes of the adapter's own head, None if it has none."""
    from tfimm_lora.architectures.config import classifier_paths
    from tfimm_lora.models import pretrained_config
    from tfimm_lora.weights.safetensors_file import read_safetensors

    classifier = classifier_paths(pretrained_config(name))
    with read_safetensors(adapter / "adapter_model.safetensors") as file:
        for key, shape in file.shapes.items():
            if key.endswith(tuple(f".{path}.weight" for path in classifier)):
                return shape[0]
    return None
