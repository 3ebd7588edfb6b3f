"""Progress for a person: one live line per method on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

from tfimm_lora.training.config import LABELS

BESIDE_BAR = 73
"""Columns that a live line needs beside its bar."""


class Console:
    """Shows what training processes report.

    Args:
        stream: Where to write; standard output by default.
        quiet: Write nothing. Defaults to False.

    Example:
        >>> Console().say("data  digits")
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.live = self.stream.isatty() and not quiet
        self._method = ""
        self._epochs = 0
        self._last: dict[str, Any] = {}
        self._began = 0.0

    def say(self, text: str = "") -> None:
        """Writes a line of its own."""
        if not self.quiet:
            self._erase()
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def begin(self, method: str) -> None:
        """A method's process has been started."""
        self._method, self._last, self._began = method, {}, time.monotonic()
        self._show("starting")

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of a training process."""
        kind = event["event"]
        if kind == "started":
            self._epochs = event["epochs"]
            self._show(f"{event['trainable']:,} of {event['weights']:,} weights, building the step")
        elif kind == "step" and self.live:
            done = event["epoch"] - 1 + event["step"] / event["steps"]
            self._show(self._bar(done) + self._progress(done, self._last))
        elif kind == "epoch":
            self._last |= event  # not every epoch is validated; the last figures stay on show
            if self.live:
                done = event["epoch"]
                self._show(self._bar(done) + self._progress(done, self._last))
            elif self._is_told(event["epoch"]):
                self.say(self._line(self._progress(event["epoch"], event)))
        elif kind == "saving":
            self._show("saving")

    def end(self, text: str) -> None:
        """Replaces the live line by a lasting one."""
        self.say(self._line(text))

    def _bar(self, done: float) -> str:
        width = max(4, min(20, shutil.get_terminal_size().columns - BESIDE_BAR))
        filled = int(width * done / self._epochs)
        return "━" * filled + "╌" * (width - filled) + "  "

    def _progress(self, done: float, figures: dict[str, Any]) -> str:
        width = len(str(self._epochs))
        text = f"epoch {int(done):>{width}}/{self._epochs}"
        for key, label in (("loss", "loss"), ("accuracy", "train"), ("val_accuracy", "val")):
            if key in figures:
                text += f"  {label} {figures[key]:.3f}"
        return text

    def _is_told(self, epoch: int) -> bool:
        """On a pipe or in a log, some five epochs of each method are enough."""
        every = max(1, round(self._epochs / 5))
        return epoch % every == 0 or epoch == self._epochs

    def _line(self, text: str) -> str:
        return f"{LABELS.get(self._method, self._method):<17} {text}"

    def _show(self, text: str) -> None:
        if not self.live:
            return
        line = f"{self._line(text)}  {time.monotonic() - self._began:.0f} s"
        columns = shutil.get_terminal_size().columns - 1
        self._erase()
        self.stream.write(line[:columns])
        self.stream.flush()

    def _erase(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[2K")
