"""EVA: first values of A from what the adapted layers read. Paper: arXiv:2410.07170."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from tfimm_lora.lora.adapter_state import adapter_state
from tfimm_lora.lora.config import split_lora_values
from tfimm_lora.lora.merge import lora_layers
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.weights.names import iterate_layers, timm_path

_BATCH = 32


def initialize_eva(
    model: keras.Model, images: Any, rho: float = 1.0, whiten: bool = False
) -> keras.Model:
    """Sets A of every adapted layer to the principal components of the layer's inputs.

    B stays zero, so that step 0 is the base model. The inputs' mean is taken off, as in PEFT.

    Args:
        model: A LoRA model that was made with ``lora_init="eva"`` and not trained yet.
        images: Images that are like the training set's, preprocessed: an array, or batches of them
            one after the other (of tuples the first element counts). A few hundred do.
        rho: Largest rank of a layer in multiples of its own. With more than 1 the same number of
            ranks is distributed anew over the layers, to the components that explain the largest
            part of their layer's variance. Defaults to 1.0.
        whiten: Divide every component by the root of its singular value. Defaults to ``False``.

    Returns:
        The same model; with ``rho`` of more than 1 a new one, with ranks in ``lora_rank_pattern``
        and alphas that keep the scalings.

    Raises:
        ValueError: The model has another initialisation, is trained or merged, there are no images
            or too few, or ``rho`` is less than 1.

    Example:
        >>> model = initialize_eva(model, images[:256])
    """
    if isinstance(model, FeatureExtractor):
        adapted = initialize_eva(model.backbone, images, rho, whiten)
        return model if adapted is model.backbone else model.replace_backbone(adapted)
    if not rho >= 1:
        raise ValueError(f"rho has to be at least 1, found {rho!r}.")
    sites = _sites(model)
    scatters = _scatters(model, images)
    found = {
        name: scatters[id(update.layer)].components(math.ceil(update.site.rank * rho), name)
        for name, update in sites.items()
    }
    if rho > 1:
        ranks = _ranks(found, sites)
        if any(ranks[name] != update.site.rank for name, update in sites.items()):
            model = _with_ranks(model, sites, ranks)
            sites = _sites(model)
    for name, update in sites.items():
        components, values, _ = found[name]
        rank, a = update.site.rank, update.variables["kernel_lora_a"]
        rows = components[:rank] / np.sqrt(values[:rank, None]) if whiten else components[:rank]
        a.assign(rows.T.reshape(a.shape).astype("float32"))
    return model


def _sites(model: Any) -> dict[str, Any]:
    """The updates of the model's adapter by timm path, checked."""
    state = adapter_state(model)
    if len(state.fields) != 1:
        raise ValueError(
            f"initialize_eva takes a model with one adapter, this has {', '.join(state.fields)}."
        )
    ((name, fields),) = state.fields.items()
    if fields.lora_init != "eva":
        raise ValueError(
            f"The model was made with lora_init={fields.lora_init!r}. Make it with lora_init='eva'."
        )
    state.check_unmerged(model)
    paths = {id(layer): timm_path(path) for path, layer in iterate_layers(model)}
    sites = {}
    for layer in lora_layers(model):
        if layer.operation.layer_class not in _ROWS or getattr(layer, "groups", 1) > 1:
            raise ValueError(
                f"{layer.path}: EVA takes layers all of whose outputs read the same inputs, not "
                "convolutions in groups. Leave it out of lora_targets."
            )
        for update in layer.adapters[name].updates:
            if np.any(update.numpy_values()["kernel_lora_b"]):
                raise ValueError(f"{layer.path} is trained already: its B is not zero.")
            module = paths[id(layer)]
            if update.site.name:
                module = f"{module.rpartition('.')[0]}.{update.site.name}".lstrip(".")
            sites[module] = update
    return sites


class _Scatter:
    """Sums over all rows of a layer's inputs, in float64, from a first mean on."""

    def __init__(self) -> None:
        self.count = 0
        self.origin: Any = None
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Any) -> None:
        """Adds rows, (n, features)."""
        rows = ops.cast(rows, "float32")
        if self.origin is None:
            self.origin = ops.mean(rows, axis=0, keepdims=True)
        # Far from the origin, products of float32 would lose the variance.
        rows = rows - self.origin
        self.count += int(rows.shape[0])
        self.total += ops.convert_to_numpy(ops.sum(rows, axis=0)).astype("float64")
        product = ops.matmul(ops.transpose(rows), rows)
        self.squares += ops.convert_to_numpy(product).astype("float64")

    def components(self, rank: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Principal components (rank, features), their singular values and parts of the variance.

        Raises:
            ValueError: There are fewer rows or features than components.
        """
        features = len(self.total)
        rank = min(rank, features)
        if self.count <= rank:
            raise ValueError(
                f"{name}: {self.count} positions in the images are too few for {rank} components. "
                "Give more images, or use a lower rank or rho."
            )
        scatter = self.squares - np.outer(self.total, self.total) / self.count
        values, vectors = np.linalg.eigh(scatter)
        values, rows = np.maximum(values[::-1], 0), vectors.T[::-1][:rank]
        signs = np.sign(rows[np.arange(rank), np.abs(rows).argmax(axis=1)])
        singular = np.sqrt(np.maximum(values[:rank], np.finfo("float32").tiny))
        return rows * signs[:, None], singular, values[:rank] / max(values.sum(), 1e-30)


def _scatters(model: Any, images: Any) -> dict[int, _Scatter]:
    """Runs the images through the model and sums up what its adapted layers read."""
    found = {id(layer): _Scatter() for layer in lora_layers(model)}
    number = 0
    with contextlib.ExitStack() as stack:
        for layer in lora_layers(model):
            stack.enter_context(_captured(layer, found[id(layer)].add))
        for batch in _batches(images):
            model(ops.convert_to_tensor(batch), training=False)
            number += 1
    if not number:
        raise ValueError("There are no images.")
    return found


@contextlib.contextmanager
def _captured(layer: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, a layer hands over its inputs as rows before it is called."""
    rows, call = _ROWS[layer.operation.layer_class], layer.call

    def call_and_take(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        take(rows(layer, inputs))
        return call(inputs, *args, **kwargs)

    layer.call = call_and_take
    try:
        yield
    finally:
        del layer.call


def _batches(images: Any) -> Iterable[Any]:
    if hasattr(images, "shape"):
        return (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))
    return (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in images)


def _dense_rows(layer: Any, inputs: Any) -> Any:
    return ops.reshape(inputs, (-1, inputs.shape[-1]))


def _einsum_rows(layer: Any, inputs: Any) -> Any:
    letters, kernel = layer.equation.replace(" ", "").split("->")[0].split(",")
    summed = "".join(c for c in kernel if c in letters and c not in layer.equation.split("->")[1])
    rest = "".join(c for c in letters if c not in summed)
    size = math.prod(layer.kernel.shape[kernel.index(c)] for c in summed)
    return ops.reshape(ops.einsum(f"{letters}->{rest}{summed}", inputs), (-1, size))


def _conv_rows(layer: Any, inputs: Any) -> Any:
    """Patches, whose axes are those of A: height, width, channel."""
    if layer.data_format == "channels_first":
        inputs = ops.moveaxis(inputs, 1, -1)
    patches = ops.image.extract_patches(
        inputs,
        layer.kernel_size,
        strides=layer.strides,
        dilation_rate=layer.dilation_rate[0],
        padding=layer.padding,
        data_format="channels_last",
    )
    return ops.reshape(patches, (-1, patches.shape[-1]))


_ROWS: dict[type, Callable[[Any, Any], Any]] = {
    keras.layers.Dense: _dense_rows,
    keras.layers.EinsumDense: _einsum_rows,
    keras.layers.Conv2D: _conv_rows,
}


def _ranks(found: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, int]:
    """Distributes the ranks of all sites to the components that explain most of their layers."""
    parts = [(-part, name) for name, (_, _, explained) in found.items() for part in explained]
    budget = sum(update.site.rank for update in sites.values())
    chosen = sorted(parts, key=lambda item: item[0])[:budget]
    return {name: sum(other == name for _, other in chosen) for name in sites}


def _with_ranks(model: Any, sites: Mapping[str, Any], ranks: Mapping[str, int]) -> keras.Model:
    """The model once more, with other ranks; sites of rank 0 are not adapted."""
    from tfimm_lora.lora.factory import convert_to_lora_model
    from tfimm_lora.lora.regular import convert_to_regular_model

    ((name, fields),) = adapter_state(model).fields.items()
    exact = {m: f"^{re.escape(m)}$" for m, rank in ranks.items() if rank}
    updates = {m: sites[m] for m in exact}
    lora = split_lora_values(vars(fields))[0] | {
        "lora_adapter_name": name,
        "lora_targets": tuple(exact.values()),
        "lora_rank_pattern": {exact[m]: ranks[m] for m in exact},
        "lora_alpha_pattern": {
            exact[m]: update.alpha_for(update.scaling, ranks[m]) for m, update in updates.items()
        },
    }
    return convert_to_lora_model(convert_to_regular_model(model), **lora)
