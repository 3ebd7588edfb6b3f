"""``tfimm-lora models``: the table of models."""

from __future__ import annotations

import jsonargparse

from tfimm_lora.cli.parser import Parser, new_parser
from tfimm_lora.evaluation.tables import format_table

NAME = "models"
HELP = "list the models, by wildcards on their names"
DESCRIPTION = """List the models: name, number of weights in millions, input size (height × width),
classes and licence of the default checkpoint, and its tag. Quote wildcards: tfimm-lora models
"vit_*"."""


def make_parser() -> Parser:
    """Returns the subcommand's parser.

    Example:
        >>> make_parser().parse_args(["vit_*", "--pretrained"]).patterns
        ['vit_*']
    """
    parser = new_parser(description=DESCRIPTION)
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="Wildcards on names; all models by default."
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="Only models with pretrained weights."
    )
    parser.add_argument(
        "--tags", action="store_true", help="One line per checkpoint instead of one per model."
    )
    parser.add_argument("--module", type=str, default="", help="Only models of this timm module.")
    parser.add_argument("--exclude", type=str, default="", help="Wildcards to leave out.")
    return parser


def prepare(arguments: list[str]) -> list[str]:
    """Returns the arguments as they are."""
    return arguments


def execute(arguments: jsonargparse.Namespace) -> int:
    """Prints the table.

    Returns:
        0, or 1 if no model's name matches.
    """
    from tfimm_lora.data.registry import suggest
    from tfimm_lora.models.registry import find_entry, list_models, pretrained_config

    patterns = arguments.patterns or [""]
    names = list_models(
        [pattern for pattern in patterns if pattern],
        arguments.module,
        arguments.pretrained,
        arguments.exclude,
        arguments.tags,
    )
    if not names:
        plain = [pattern.strip("*?") for pattern in patterns]
        hints = "".join(suggest(pattern, list_models()) for pattern in plain)
        raise ValueError(f"No model matches {' '.join(patterns)}.{hints}")
    rows = []
    for name in names:
        facts, parameters = pretrained_config(name), find_entry(name)[0].parameters
        weights = f"{parameters / 1e6:,.1f}" if parameters else "–"
        size = " × ".join(map(str, facts.input_size[1:]))
        tag = facts.tag if facts.has_weights else ""
        licence = facts.license or "–"
        rows.append((name, weights, size, str(facts.num_classes), licence, tag or "–"))
    tag = "tag" if arguments.tags else "default tag"
    headings = ("model", "weights (M)", "input", "classes", "licence", tag)
    print(format_table(headings, rows, align="lrrrll"))
    return 0
