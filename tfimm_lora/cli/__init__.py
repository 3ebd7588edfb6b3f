"""The command line, ``tfimm-lora``: one file per subcommand."""

from __future__ import annotations
