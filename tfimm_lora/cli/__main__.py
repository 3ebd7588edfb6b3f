"""``python -m tfimm_lora.cli`` is ``tfimm-lora``."""

from __future__ import annotations

import sys

from tfimm_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
