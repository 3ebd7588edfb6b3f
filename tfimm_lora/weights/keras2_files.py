"""Weights that Keras 2 has saved under the variables' names: HDF5 and TensorFlow checkpoints.

``model.save_weights("x.h5")`` writes HDF5 whose groups list the names of their weights;
``model.save_weights("x.ckpt")`` and ``model.save("folder")`` write TensorFlow checkpoints, whose
object graph has every variable's name. Keras 2.12 and later write ``.keras`` and ``.weights.h5`` in
a third layout that knows positions only; it is recognised and not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# What a variable of a compiled or trained model hangs on besides the model's layers.
_NOT_THE_MODEL = {"optimizer", "keras_api", "save_counter", "loss", "signatures"}


@dataclasses.dataclass(frozen=True)
class StoredVariable:
    """A variable in a file.

    Attributes:
        shape: Its shape.
        dtype: Its type in the file.
        read: Reads its value.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]


def checkpoint_prefix(path: Path) -> Path | None:
    """Returns the prefix of a TensorFlow checkpoint's files, ``None`` if there is none.

    Args:
        path: A prefix, the ``.index`` file, a SavedModel folder, or a folder with the
            ``checkpoint`` file of a ``tf.train.CheckpointManager`` (the newest is taken).
    """
    if path.is_dir():
        if (path / "variables" / "variables.index").is_file():
            return path / "variables" / "variables"
        if (path / "checkpoint").is_file():
            import tensorflow as tf

            with contextlib.suppress(ValueError):  # what it holds is no list of checkpoints
                newest = tf.train.latest_checkpoint(str(path))
                return Path(newest) if newest else None
        return None
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    return path if path.with_name(path.name + ".index").is_file() else None


def layout_of(path: Path) -> str:
    """Says which of Keras' layouts a file has.

    Args:
        path: A file, a folder, or the prefix of a checkpoint.

    Returns:
        ``names`` (HDF5 by Keras 2 with names), ``checkpoint`` (TensorFlow's), ``positions``
        (Keras 2.12 and later, without names), ``keras3`` (HDF5 of a whole model by Keras 3),
        ``broken`` (HDF5 that cannot be opened), or ``""`` for anything else.
    """
    if checkpoint_prefix(path) is not None:
        return "checkpoint"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(8)
    if head == _HDF5_SIGNATURE:
        return _hdf5_layout(path)
    if path.suffix == ".keras" and head[:2] == b"PK":
        return "positions" if _zip_version(path).startswith("2.") else ""
    return ""


def _hdf5_layout(path: Path) -> str:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            version = file.attrs.get("keras_version", "2")
            named = "model_weights" in file or _attributes(file, "layer_names")
            # tfimm's attributes; a file of this package has patch_embed/proj and head/fc.
            positions = "stem_conv" in file or "patch_embed/projection" in file
    except OSError:
        return "broken"
    if named:
        version = version.decode() if isinstance(version, bytes) else str(version)
        return "names" if version.startswith("2") else "keras3"
    return "positions" if positions else ""


def _zip_version(path: Path) -> str:
    """Version of Keras that wrote a ``.keras`` file, ``""`` if it does not say so."""
    try:
        with zipfile.ZipFile(path) as archive:
            return str(json.loads(archive.read("metadata.json"))["keras_version"])
    except (zipfile.BadZipFile, KeyError, ValueError):
        return ""


def _attributes(group: Any, name: str) -> list[str]:
    """A list of strings in a group's attributes, which Keras cuts up where HDF5 needs it."""
    parts = [name] if name in group.attrs else []
    while not parts or parts[0] != name:
        chunk = f"{name}{len(parts)}"
        if chunk not in group.attrs:
            break
        parts.append(chunk)
    values = [value for part in parts for value in group.attrs[part]]
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def _is_own(file: Any, data: Any) -> bool:
    """Whether something is an array of numbers within the file: HDF5 can point to any other."""
    import h5py

    return (
        isinstance(data, h5py.Dataset)
        and data.dtype.kind in "fiu"
        and data.file.filename == file.filename
        and data.external is None
        and not data.is_virtual
    )


@contextlib.contextmanager
def named_hdf5_variables(path: Path) -> Iterator[dict[str, StoredVariable]]:
    """Opens an HDF5 file of Keras 2 and lists its variables by name.

    Args:
        path: A file of weights or of a whole model.

    Yields:
        Dictionary from ``vit/blocks/0/attn/qkv/kernel`` to :class:`StoredVariable`.

    Raises:
        ValueError: The file is cut off, lacks a weight that it lists, or has one that lies in
            another file.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is no complete HDF5 file ({path.stat().st_size} bytes): {error}. It may be "
            "truncated; copy it again."
        ) from error
    with file:
        root = file.get("model_weights", file)
        # Weights of the model itself, which belong to no layer, have a group of their own.
        groups = _attributes(root, "layer_names")
        groups += ["top_level_model_weights"] if "top_level_model_weights" in root else []
        found: dict[str, StoredVariable] = {}
        for group in groups:
            if group not in root:
                raise ValueError(f"{path} lists the layer {group!r} and does not have it.")
            for name in _attributes(root[group], "weight_names"):
                if name not in root[group]:
                    raise ValueError(f"{path} lists the weight {name!r} and does not have it.")
                data = root[group][name]
                if not _is_own(file, data):
                    raise ValueError(
                        f"{path}: weight {name!r} is no array in this file. Keras writes no links "
                        "to other files, so the file is not read."
                    )
                found[name.split(":")[0]] = StoredVariable(
                    tuple(data.shape), data.dtype, partial(data.__getitem__, ())
                )
        yield found


@contextlib.contextmanager
def checkpoint_variables(path: Path) -> Iterator[dict[str, StoredVariable]]:
    """Opens a TensorFlow checkpoint and lists the model's variables by name.

    Args:
        path: See :func:`checkpoint_prefix`.

    Yields:
        Dictionary from ``vit/blocks/0/attn/qkv/kernel`` to :class:`StoredVariable`; optimizer and
        metrics are left out.

    Raises:
        ValueError: The checkpoint is incomplete or not one of Keras 2.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    try:
        reader = tf.train.load_checkpoint(str(checkpoint_prefix(path)))
        graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        shapes, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except Exception as error:
        raise ValueError(
            f"{path} is no complete checkpoint of Keras 2: {error}. It needs the .index and all "
            ".data files."
        ) from error

    def read(key: str) -> Any:
        try:
            return reader.get_tensor(key)
        except Exception as error:
            raise ValueError(f"{path}: {key!r} cannot be read: {error}") from error

    found: dict[str, StoredVariable] = {}
    for name, key in _graph_variables(graph).items():
        if key in shapes:
            found[name] = StoredVariable(
                tuple(shapes[key]),
                np.dtype(types[key].as_numpy_dtype),
                partial(read, key),
            )
    yield found


def _graph_variables(graph: Any) -> dict[str, str]:
    """Names and keys of all variables that belong to the model of an object graph."""
    if not graph.nodes:
        return {}
    children = {child.local_name: child.node_id for child in graph.nodes[0].children}
    waiting, seen = [children.get("model", 0)], set()  # tfimm's trainer saves it as "model"
    found = {}
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        node = graph.nodes[number]
        for attribute in node.attributes:
            if attribute.name == "VARIABLE_VALUE" and attribute.full_name:
                found[attribute.full_name] = attribute.checkpoint_key
        waiting += [c.node_id for c in node.children if c.local_name not in _NOT_THE_MODEL]
    return found
