"""The plot of a run: how each method learned, and what its accuracy cost in weights."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfimm_lora.training.config import LABELS
from tfimm_lora.weights.safetensors_file import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by everyone; methods differ by marker as well.
STYLES = {"linear_probe": ("#0072B2", "o"), "lora": ("#D55E00", "D"), "full": ("#009E73", "s")}
OTHERS = (("#CC79A7", "^"), ("#56B4E9", "v"), ("#E69F00", "P"))
INK, FAINT = "#222222", "#8a8a8a"


def plot_run(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Draws ``comparison.png`` into a run folder.

    Args:
        folder: The run folder, with its ``history.csv``.
        metrics: The content of its ``metrics.json``.

    Example:
        >>> plot_run("runs/first", json.load(open("runs/first/metrics.json")))
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    done = {name: f for name, f in metrics["methods"].items() if "failed" not in f}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window, no global state
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1), sharey=True)
    _draw_curves(left, _history(folder), done, metrics["score"])
    _draw_costs(right, done, metrics["score"])
    lowest = min(min(line.get_ydata()) for line in left.lines if len(line.get_ydata()))
    left.set_ylim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.03)
    for axes in (left, right):
        _tidy(axes)
    title = f"{metrics['model']} adapted to {metrics['classes']} classes"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    under = (
        f"{metrics['data']}: {metrics['train_images']} training and {metrics['val_images']} "
        "validation images"
    )
    figure.supxlabel(under, x=0.01, ha="left", fontsize=9, color=FAINT)

    def draw(path: Path) -> None:
        figure.savefig(path, dpi=160, format="png", facecolor="white")

    write_aside(folder / "comparison.png", draw)


def _history(folder: Path) -> dict[str, list[dict[str, float]]]:
    text = (folder / "history.csv").read_text(encoding="utf-8")
    history = defaultdict(list)
    for row in csv.DictReader(io.StringIO(text)):
        history[row.pop("method")].append({k: float(v) for k, v in row.items() if v})
    return history


def _style(name: str, names: list[str]) -> tuple[str, str]:
    return STYLES.get(name) or OTHERS[names.index(name) % len(OTHERS)]


def _draw_curves(
    axes: Axes, history: dict[str, list[dict[str, float]]], done: dict[str, Any], score: str
) -> None:
    names = list(done)
    for name in names:
        colour, marker = _style(name, names)
        epochs = [row["epoch"] for row in history[name]]
        validated = [row for row in history[name] if f"val_{score}" in row]
        label = LABELS.get(name, name)
        axes.plot(
            [row["epoch"] for row in validated],
            [row[f"val_{score}"] for row in validated],
            marker=marker,
            color=colour,
            lw=2.2,
            ms=5,
            label=label,
            zorder=3,
        )
        train = [row[score] for row in history[name]]
        axes.plot(epochs, train, color=colour, lw=1.1, ls=(0, (2, 2)), alpha=0.6, zorder=2)
    axes.plot([], [], color=FAINT, lw=1.1, ls=(0, (2, 2)), label="on training images")
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(score)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.set_title("Learning curves", loc="left", fontsize=11, color=INK)


def _draw_costs(axes: Axes, done: dict[str, Any], score: str) -> None:
    names = list(done)
    sizes = [math.log10(figures["trainable_weights"]) for figures in done.values()]
    low, high = min(sizes), max(sizes)
    margin = 0.22 * max(high - low, 1.0)
    for name, figures in done.items():
        colour, marker = _style(name, names)
        weights, value = figures["trainable_weights"], figures[f"val_{score}"]
        axes.plot([weights], [value], marker, color=colour, ms=11, zorder=3)
        axes.annotate(
            f"{LABELS.get(name, name)}\n{value:.1%}\n{weights:,} weights",
            (weights, value),
            xytext=(0, -13 - 44 * _neighbours_before(sizes, names.index(name), margin)),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
            linespacing=1.35,
            color=INK,
        )
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    axes.set_xlabel("trainable weights (logarithmic)")
    axes.set_title("What the accuracy cost", loc="left", fontsize=11, color=INK)


def _neighbours_before(sizes: list[float], index: int, margin: float) -> int:
    """How many earlier labels stand where this one would: it goes below them."""
    return sum(abs(sizes[index] - other) < margin for other in sizes[:index])


def _tidy(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b5b5b5")
