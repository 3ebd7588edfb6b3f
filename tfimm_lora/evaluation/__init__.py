"""Tables and plots of runs."""

from __future__ import annotations

from tfimm_lora.evaluation.plots import plot_run
from tfimm_lora.evaluation.tables import comparison_table, format_table

__all__ = ["comparison_table", "format_table", "plot_run"]
