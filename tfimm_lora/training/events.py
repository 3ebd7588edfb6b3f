"""What a training process tells its parent: one JSON object per line of its standard output."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import keras

MARK = "\x1e"
"""Begins every line that is an event (ASCII's record separator); other lines are only output."""


def send(event: str, stream: TextIO | None = None, **values: Any) -> None:
    """Writes one event.

    Args:
        event: Its kind: ``started``, ``step``, ``epoch``, ``finished`` or ``error``.
        stream: Where to; standard output by default.
        **values: What it says; plain values only.

    Example:
        >>> send("epoch", epoch=1, loss=0.5)
    """
    line = MARK + json.dumps({"event": event, **values}) + "\n"
    stream = stream or sys.stdout
    stream.write(line)
    stream.flush()


def receive(line: str) -> dict[str, Any] | None:
    """Returns the event of a line, ``None`` for a line that is none.

    Example:
        >>> receive("hello") is None
        True
    """
    return json.loads(line[1:]) if line.startswith(MARK) else None


def make_callback(steps: int, send_event: Any = send) -> keras.callbacks.Callback:
    """Returns a Keras callback that sends ``step`` (some ten a second at most) and ``epoch``.

    Args:
        steps: Steps of one epoch.
        send_event: Called like :func:`send`.

    Example:
        >>> model.fit(batches, callbacks=[make_callback(len(batches))])
    """
    import keras

    class Events(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch, self.began = epoch + 1, time.perf_counter()
            self.last_sent = 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.perf_counter()
            if now - self.last_sent > 0.1:
                self.last_sent = now
                send_event("step", epoch=self.epoch, step=batch + 1, steps=steps)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seconds = time.perf_counter() - self.began
            figures = {name: float(value) for name, value in (logs or {}).items()}
            send_event("epoch", epoch=self.epoch, seconds=seconds, **figures)

    return Events()
