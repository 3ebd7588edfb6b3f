"""The plot of the ranks that AdaLoRA gave to the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.evaluation.plots import FAINT, INK
from tfimm_lora.weights.safetensors_file import write_aside


def plot_rank_history(history: dict[str, Any], path: str | Path) -> None:
    """Draws how the ranks of the layers changed over the steps of a training.

    Args:
        history: What :func:`tfimm_lora.lora.rank_history` returns.
        path: Where to write the picture, a PNG file.

    Raises:
        ValueError: The history is empty.

    Example:
        >>> plot_rank_history(lora.rank_history(model), "ranks.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, ranks = history["step"], history["ranks"]
    if not steps or not ranks:
        raise ValueError("The history has no steps. Train with lora_method='adalora' first.")
    table = np.array(list(ranks.values()))
    height = 2.6 + 0.22 * len(ranks)
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window, no global state
    upper, lower = figure.subplots(2, 1, height_ratios=(1, height - 2), sharex=True)
    # A rank holds from the step where it was seen to the next one.
    edges = [*steps, steps[-1] + max(1, steps[-1] - steps[max(len(steps) - 2, 0)])]
    upper.stairs(table.sum(axis=0), edges, color="#0072B2", lw=2.2, baseline=None)
    upper.set_ylim(bottom=0)
    upper.set_ylabel("all ranks")
    mesh = lower.pcolormesh(
        edges, np.arange(len(ranks) + 1), table, cmap="viridis", vmin=0, vmax=table.max()
    )
    lower.set_yticks(np.arange(len(ranks)) + 0.5, list(ranks), fontsize=8)
    lower.invert_yaxis()
    lower.set_xlabel("step")
    whole = MaxNLocator(integer=True)
    figure.colorbar(mesh, ax=lower, label="rank", ticks=whole)
    for axes in (upper, lower):
        axes.tick_params(colors=INK, labelsize=8, length=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#b5b5b5")
    upper.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.grid(axis="y", color="#e6e6e6", lw=0.8)
    figure.suptitle(
        "Ranks over the training", x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK
    )
    kept = f"{table[:, -1].sum()} of {table[:, 0].sum()} ranks are left"
    figure.supxlabel(kept, x=0.01, ha="left", fontsize=9, color=FAINT)

    def draw(aside: Path) -> None:
        figure.savefig(aside, dpi=160, format="png", facecolor="white")

    write_aside(Path(path), draw)
