"""``{command-output} tfimm-lora --help``: runs a command and shows what it prints.

A command that fails makes the page fail to build.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive


class CommandOutput(Directive):
    """Shows a command and its output as one block."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command = self.arguments[0]
        words = shlex.split(command)
        # The program of the environment that builds the pages, whatever PATH says.
        program = Path(sys.executable).with_name(words[0])
        words[0] = str(program) if program.exists() else words[0]
        environment = os.environ | {"COLUMNS": "88", "NO_COLOR": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise self.error(f"{command!r} failed with {done.returncode}:\n{done.stderr}")
        # As a terminal shows it: a backspace takes back the character in front of it.
        output = re.sub(r".\x08", "", done.stdout.rstrip())
        text = f"$ {command}\n{output}"
        block = nodes.literal_block(text, text, classes=["command-output"])
        block["language"] = "text"
        return [block]


def setup(app):
    app.add_directive("command-output", CommandOutput)
    return {"parallel_read_safe": True}
