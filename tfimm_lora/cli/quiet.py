"""Importing TensorFlow without the lines that its C++ part prints."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_errors() -> Iterator[None]:
    """Holds back what is written to the error stream; it is shown only if the block fails.

    TensorFlow's libraries write there before any setting of theirs can stop them.

    Example:
        >>> with quiet_errors():
        ...     import keras
    """
    sys.stderr.flush()
    try:
        stream = sys.stderr.fileno()
    except (OSError, ValueError):  # not a real stream, in a notebook say
        yield
        return
    kept = os.dup(stream)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), stream)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, stream)
            os.close(kept)
