"""Reading and writing safetensors files, tensor by tensor and without half-written files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np
import safetensors
from safetensors.numpy import save_file

from tfimm_lora.weights.aligned import aligned, empty_aligned

_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npz"}

_HALF_PRECISION = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DTYPES = {
    **_HALF_PRECISION,
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def refuse_pickle(path: Path) -> None:
    """Raises for files that can carry code.

    Raises:
        ValueError: The file's ending or its first bytes say that it is a pickle.
    """
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(9)
    # safetensors: the header's length (at most 100 MB) in 8 bytes, then "{". The length alone may
    # look like what a pickle (its protocol opcode) or torch's newer format (a zip) starts with.
    named = path.suffix in _PICKLE_SUFFIXES
    safetensors_like = head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000
    pickled = len(head) > 1 and head[0] == 0x80 and head[1] <= 5
    zipped = head[:2] == b"PK" and path.suffix != ".keras"
    if named or ((pickled or zipped) and not safetensors_like):
        raise ValueError(
            f"{path} is a pickle or an archive that can run code when it is opened, so it is not "
            "read. Use the checkpoint's .safetensors file, or convert it where it came from with "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')."
        )


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
        path: Where it is.
        shapes: Shape of every tensor by name.
        dtypes: Type of every tensor by name, as the format calls it (``F32``).
        metadata: The file's free-form strings.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self._file = file
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        self._start = 8 + size
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._tensors: dict[str, dict[str, Any]] = header
        self.shapes = {name: tuple(facts["shape"]) for name, facts in header.items()}
        self.dtypes: dict[str, str] = {name: facts["dtype"] for name, facts in header.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32 array (integers stay what they are).

        Raises:
            ValueError: The tensor's bytes cannot be read.
        """
        facts = self._tensors[name]
        dtype = _DTYPES.get(facts["dtype"])
        if dtype is None:
            raise ValueError(
                f"{self.path}: tensor {name!r} cannot be read: its type {facts['dtype']} is none "
                f"of {', '.join(sorted(_DTYPES))}."
            )
        value = empty_aligned(self.shapes[name], dtype)
        try:
            self._file.seek(self._start + facts["data_offsets"][0])
            if self._file.readinto(value.reshape(-1).view(np.uint8).data) != value.nbytes:
                raise OSError("the file ends before it")
        except OSError as error:
            raise ValueError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        return value if np.issubdtype(value.dtype, np.integer) else aligned(value, np.float32)

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """Rounds a float32 value to the precision that a tensor has in the file."""
        dtype = _HALF_PRECISION.get(self._tensors[name]["dtype"])
        return value if dtype is None else value.astype(dtype).astype(value.dtype)


@contextlib.contextmanager
def read_safetensors(path: str | os.PathLike[str]) -> Iterator[SafetensorsFile]:
    """Opens a safetensors file; tensors are read one by one when asked for.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is a pickle, truncated or otherwise no safetensors file.

    Example:
        >>> with read_safetensors("model.safetensors") as file:
        ...     kernel = file.read("head.weight")
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}.")
    refuse_pickle(path)
    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass  # it checks the header and the file's size
    except Exception as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({path.stat().st_size} bytes): {error}. "
            "It may be truncated; download or copy it again."
        ) from error
    # Read, not mapped: the pages of a mapped file would count as memory of this process.
    with path.open("rb") as file:
        yield SafetensorsFile(path, file)


def write_aside(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Writes a file so that its old content is intact until the new one is complete.

    Args:
        path: The file to replace or create.
        write: Called with the path of a new file in the same folder, which it fills.

    Returns:
        The path.

    Example:
        >>> write_aside("a.json", lambda p: p.write_text("{}"))
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keras and others look at the suffix, so it is kept.
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=path.name, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> Path:
    """Writes tensors to a safetensors file, aside first.

    Args:
        path: The file.
        tensors: Arrays by name.
        metadata: Free-form strings for the file's header.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; what was there
            before is intact.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        return write_aside(path, lambda aside: save_file(arrays, str(aside), metadata=metadata))
    except (OSError, safetensors.SafetensorError) as error:
        size = sum(value.nbytes for value in arrays.values())
        raise OSError(
            f"{path} could not be written ({size:,} bytes): {error}. What was there before is "
            "intact; make room or save elsewhere."
        ) from error


def save_safetensors(model: Any, path: str | os.PathLike[str], dtype: str = "float32") -> Path:
    """Saves a model's weights in timm's key names and layouts, so that timm can load them.

    Args:
        model: A built regular model (convert a LoRA model first).
        path: The file, ending in ``.safetensors``.
        dtype: ``float32``, ``float16`` or ``bfloat16``. Defaults to ``float32``.

    Returns:
        The path.

    Raises:
        ValueError: The model has LoRA layers, or the file's ending is another.

    Example:
        >>> save_safetensors(model, "model.safetensors")
    """
    from tfimm_lora.weights.names import is_lora_weight, named_variables

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"The file has to end in .safetensors, found {path.name!r}.")
    variables = named_variables(model)
    lora = [v.name for v in variables if is_lora_weight(v.leaf)]
    if lora:
        raise ValueError(
            f"The model has LoRA weights ({lora[0]}, ...), which timm's format cannot hold. Save "
            "lora.convert_to_regular_model(model), or use lora.save_adapter(model, folder)."
        )
    tensors = {v.name: v.to_timm().astype(dtype) for v in variables}
    return write_safetensors(path, tensors, {"format": "pt"})
