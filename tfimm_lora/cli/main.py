"""``tfimm-lora``: finds the subcommand, runs it, turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

import jsonargparse

from tfimm_lora.cli import merge, models, train
from tfimm_lora.cli.parser import USAGE_ERROR, Parser, new_parser
from tfimm_lora.training.errors import RecipeError
from tfimm_lora.version import __version__

FAILED = 1
INTERRUPTED = 130
DEBUG = "TFIMM_LORA_DEBUG"
"""Set this environment variable to 1 to see tracebacks."""

DESCRIPTION = "Adapts timm's ConvNeXt and ViT models to your images with LoRA, on Keras 3."


class Command(Protocol):
    """A subcommand: one module of this package, listed in :data:`COMMANDS`."""

    NAME: str
    HELP: str

    def make_parser(self) -> Parser:
        """Returns the subcommand's parser."""

    def prepare(self, arguments: list[str]) -> list[str]:
        """Returns what was typed behind the subcommand's name, completed."""

    def execute(self, arguments: jsonargparse.Namespace) -> int:
        """Does the work and returns the exit code."""


COMMANDS: tuple[Command, ...] = (train, models, merge)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What was typed behind ``tfimm-lora``; by default this process's arguments.

    Returns:
        The exit code: 0 done, 1 failed, 2 typed wrongly (for the
        parser as ``SystemExit``), 130 interrupted.

    Example:
        >>> main(["models", "convnext_tiny*"])
        0
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    commands = {command.NAME: command for command in COMMANDS}
    parser = new_parser(prog="tfimm-lora", description=DESCRIPTION, version=__version__)
    subcommands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    parser.commands = {name: command.make_parser() for name, command in commands.items()}
    for name, command in commands.items():
        subcommands.add_subcommand(name, parser.commands[name], help=command.HELP)
    if typed and typed[0] in commands:
        typed[1:] = commands[typed[0]].prepare(typed[1:])
    parsed = parser.parse_args(typed)
    command = commands[parsed.command]
    try:
        return command.execute(parsed[parsed.command])
    except KeyboardInterrupt:
        sys.stderr.write("\ntfimm-lora: interrupted; nothing unfinished was kept\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, 'head' say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RecipeError as error:
        sys.stderr.write(f"tfimm-lora {command.NAME}: error: {error}\n")
        return USAGE_ERROR
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        sys.stderr.write(f"tfimm-lora {command.NAME}: error: {error}\n")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
