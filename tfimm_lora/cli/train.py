"""``tfimm-lora train``: adapts a model to images and compares ways to do so."""

from __future__ import annotations

import jsonargparse

from tfimm_lora.cli.parser import Parser, new_parser
from tfimm_lora.data import DataConfig
from tfimm_lora.training.config import LoraSection, ModelSection, RunConfig, TrainSection
from tfimm_lora.training.recipes import recipe_path

NAME = "train"
HELP = "adapt a model to images; without arguments a small example of about a minute"
DESCRIPTION = """\
Adapts a pretrained model to images with LoRA and writes a run folder: the recipe, the figures,
the adapter, the merged model and a plot.

Without a model, images or recipe of yours it runs the embedded example, about a minute on two
CPU cores: a small ViT that learned the digits 0 to 5 is adapted to 6 to 9, by a linear probe, by
LoRA and by full fine-tuning. With a model and images of yours it runs LoRA alone;
--train.methods [linear_probe,lora,full] compares the three.

  tfimm-lora train
  tfimm-lora train --model.name vit_tiny_patch16_224 --data.source folder:flowers
  tfimm-lora train --config recipe.yaml --lora.rank 8 --output runs/rank8
"""
OWN = ("--config", "--model", "--model.name", "--model.path", "--data", "--data.source")
"""Options by which a user brings a model, images or a recipe of their own."""


def make_parser() -> Parser:
    """Returns the subcommand's parser: the recipe's dataclasses, as options.

    Example:
        >>> make_parser().parse_args(["--lora.rank", "8"]).lora.rank
        8
    """
    parser = new_parser(description=DESCRIPTION, usage="tfimm-lora train [OPTIONS]")
    parser.add_argument(
        "--config", action="config", help="A recipe in YAML; options behind it override it."
    )
    parser.add_argument(
        "--output", type=str | None, help="Folder of the results; by default runs/MODEL-DATE-TIME."
    )
    for section, name in (
        (ModelSection, "model"),
        (DataConfig, "data"),
        (LoraSection, "lora"),
        (TrainSection, "train"),
    ):
        parser.add_class_arguments(section, name)
    return parser


def prepare(arguments: list[str]) -> list[str]:
    """Puts the embedded recipe in front, unless a model, images or recipe are given."""
    if any(argument.partition("=")[0] in OWN for argument in arguments):
        return arguments
    return ["--config", str(recipe_path("digits")), *arguments]


def execute(arguments: jsonargparse.Namespace) -> int:
    """Runs the recipe and prints the table.

    Args:
        arguments: What the parser made.

    Returns:
        0, or 1 if a method failed.
    """
    from tfimm_lora.evaluation import comparison_table, plot_run
    from tfimm_lora.training import Console, run

    sections = make_parser().instantiate(arguments)
    config = RunConfig(
        sections.model, sections.data, sections.lora, sections.train, sections.output
    )
    console = Console()
    folder, metrics = run(config, console=console, reports=[plot_run])
    console.say()
    console.say(comparison_table(metrics))
    console.say()
    console.say(f"{metrics['seconds_in_all']:.0f} s in all; written to {folder}")
    return int(any("failed" in figures for figures in metrics["methods"].values()))
