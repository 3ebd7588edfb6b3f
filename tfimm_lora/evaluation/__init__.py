"""Tables and plots of runs."""

from __future__ import annotations

from tfimm_lora.evaluation.plots import plot_run
from tfimm_lora.evaluation.ranks import plot_rank_history
from tfimm_lora.evaluation.tables import comparison_table, format_table

__all__ = ["comparison_table", "format_table", "plot_rank_history", "plot_run"]
