"""RADIO as NVIDIA publishes it: ``radio_model.model.``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.layers.resample import resample_position_table
from tfimm_lora.weights.foreign.view import Format, Translation, below

_PREFIX = "radio_model.model."
_EMBEDDER = "patch_generator.embedder.weight"


def _crop_positions(table: np.ndarray, grid: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resizes a square table of positions to a square that holds the grid, and crops the grid.

    Args:
        table: (1, side * side, width).
        grid: Rows and columns of the wanted grid, the upper left part of the square.
        interpolation: See ``resample_position_table``.

    Returns:
        (1, rows * columns, width).
    """
    side, largest = round(table.shape[1] ** 0.5), max(grid)
    square = resample_position_table(
        table, (side, side), (largest, largest), 0, interpolation=interpolation
    )
    maps = square.reshape(1, largest, largest, -1)[:, : grid[0], : grid[1]]
    return maps.reshape(1, grid[0] * grid[1], -1)


def _translate(to: Translation, cfg: Any) -> None:
    # Input statistics, heads for its teachers and the like are not part of the backbone.
    for name, source in below(to.shapes, _PREFIX).items():
        shape = to.shapes[source]
        if name == _EMBEDDER:
            # A dense layer on flattened patches, channels first; RADIO itself has 3 channels.
            side = round((shape[1] / 3) ** 0.5)
            to.reshape("patch_embed.proj.weight", source, (shape[0], 3, side, side))
            to.fill("patch_embed.proj.bias", shape[:1], 0.0)
        elif name == "patch_generator.pos_embed":
            rows, columns = cfg.grid_size
            to.make(
                "pos_embed",
                [source],
                (1, rows * columns, shape[-1]),
                lambda table: _crop_positions(table, cfg.grid_size, cfg.pos_embed_interpolation),
            )
            to.source_size = cfg.input_size
        elif name == "patch_generator.cls_token.token":
            # A class token for every teacher, then registers: the first is timm's class token.
            to.make("cls_token", [source], (1, 1, shape[1]), lambda token: token[None, :1])
            to.make(
                "reg_token", [source], (1, shape[0] - 1, shape[1]), lambda token: token[None, 1:]
            )
        elif name.startswith("blocks."):
            to.keep(name.replace(".grandma", ".gamma"), source)


RADIO = Format("RADIO of NVIDIA", lambda shapes: _PREFIX + _EMBEDDER in shapes, _translate)
