"""The argument parser: jsonargparse's, with short errors that suggest what was meant."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import jsonargparse

from tfimm_lora.data.registry import suggest

USAGE_ERROR = 2
"""Exit code for a command that was typed wrongly."""


class Parser(jsonargparse.ArgumentParser):
    """Parser whose errors are one or two lines and name the nearest option or value.

    Example:
        >>> Parser(prog="tfimm-lora").parse_args(["--versoin"])  # exits with code 2
    """

    commands: dict[str, Parser]
    """The subcommands' parsers, known to the main parser."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with a suggestion and exits with code 2."""
        text = re.sub(r"\s*\n\s*", " ", message).strip()
        # jsonargparse puts "[options]" between the command and the subcommand.
        prog, parser = self.prog.replace(" [options]", ""), self
        for name, command in getattr(self, "commands", {}).items():
            if f"Subcommand '{name}'" in text or f"required: {name}." in text:
                prog, parser = f"{prog} {name}", command
                text = text.replace(f"Subcommand '{name}' d", "D")
                for word in re.findall(rf"\b{name}\.(\w+)", text):
                    text = text.replace(f"{name}.{word}", command._typed(word))
        options = parser._options()
        sys.stderr.write(f"{prog}: error: {_readable(text)}{_suggestion(text, options)}\n")
        sys.stderr.write(f"Try '{prog} --help'.\n")
        sys.exit(USAGE_ERROR)

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _typed(self, name: str) -> str:
        """Returns how an argument is typed: as an option, or by its place."""
        return f"--{name}" if f"--{name}" in self._options() else name.upper()


def _readable(message: str) -> str:
    message = re.sub(r"^Parser key \"([\w.]+)\":", r"--\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = message.replace("typing.Literal", "one of ").replace("a one of", "one of")
    union = re.match(r"(--[\w.]+:) Does not validate .* Subtypes: \[(.*)\] Errors: ", message)
    if union:
        found = message.rpartition("Given value: ")[2]
        expected = union[2].replace("NoneType", "null")
        return f"{union[1]} Expected {expected}. Got value: {found}"
    return message.replace("Expected a int", "Expected a whole number")


def _suggestion(message: str, options: list[str]) -> str:
    """Returns what was probably meant, or ``""``."""
    unknown = re.search(r"unrecognized arguments: (--?[\w.-]+)", message)
    if unknown:
        return "." + suggest(unknown[1], options)
    key = re.search(r"(?:Group '([\w.]+)' d|D|d)oes not accept option '([\w.]+)'", message)
    if key:
        typed = f"--{key[1]}.{key[2]}" if key[1] else f"--{key[2]}"
        return "." + suggest(typed, options).replace("'--", "'")
    choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if choice:
        return "." + suggest(choice[1], re.findall(r"[\w-]+", choice[2]))
    value = re.search(r"Literal\[(.*?)\].*?Got value: (\w+)", message)
    if value:
        return "." + suggest(value[2], re.findall(r"'([^']*)'", value[1]))
    return ""


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of a description, and drops the backticks of docstrings."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{indent}{line}" for line in text.splitlines(keepends=True))

    def _expand_help(self, action: Any) -> str:
        return super()._expand_help(action).replace("``", "")


def new_parser(**arguments: Any) -> Parser:
    """Returns a parser with the settings that every subcommand shares.

    Args:
        **arguments: Those of ``argparse.ArgumentParser``.

    Example:
        >>> new_parser(description="Trains a model.")
    """
    return Parser(formatter_class=_Formatter, allow_abbrev=False, **arguments)
