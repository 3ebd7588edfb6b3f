"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfimm_lora.training.config import LABELS


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Returns a table with a line under its headings.

    Args:
        headings: One per column.
        rows: The cells.
        align: One letter per column, ``l`` for left and ``r`` for right.

    Example:
        >>> print(format_table(("model", "input"), [("convnext_tiny", "224")], "lr"))
        model          input
        ─────────────  ─────
        convnext_tiny    224
    """
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = [headings, ["─" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, align, strict=True)
        ).rstrip()
        for line in lines
    )


def comparison_table(metrics: dict[str, Any]) -> str:
    """Returns the table of a run's methods.

    Args:
        metrics: The content of a run's ``metrics.json``.

    Example:
        >>> print(comparison_table(json.load(open("runs/first/metrics.json"))))
    """
    score = metrics["score"]
    headings = (
        "method", f"validation {score}", "trainable weights", "seconds", "peak memory (MB)"
    )  # fmt: skip
    rows = []
    for name, figures in metrics["methods"].items():
        if "failed" in figures:
            rows.append((LABELS.get(name, name), "failed", "–", "–", "–"))
            continue
        share = figures["trainable_weights"] / figures["weights"]
        memory = figures["peak_memory_mb"]
        rows.append(
            (
                LABELS.get(name, name),
                f"{figures[f'val_{score}']:.1%}",
                f"{figures['trainable_weights']:,} ({share:.1%})",
                f"{figures['seconds']:.1f}",
                "–" if memory is None else f"{memory:.0f}",
            )
        )
    notes = (
        f"{metrics['val_images']} validation images, last epoch. Seconds: training and validation, "
        "tracing included.\nPeak memory: the largest resident size of the method's own process, "
        "libraries included."
    )
    return f"{format_table(headings, rows, 'lrrrr')}\n{notes}"
