"""Writes the table of method x operation from the outcomes of ``test_lora_matrix.py``.

pytest tests/test_lora_matrix.py --write-matrix docs/results/matrix.md
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

HEAD = """# Methods and operations

Every method that adapts layers, on every kind of layer: how many of the checks below passed. The
table is written by the test run itself, `pytest tests/test_lora_matrix.py --sample-slow 1
--write-matrix docs/results/matrix.md`, on TensorFlow. Further tests run the methods on whole models
and against PEFT.
"""
_NODE = re.compile(r"test_lora_matrix\.py::test_(\w+)\[(.+)\]$")


def cell(nodeid: str, sites: Iterable[str], methods: Iterable[str]) -> tuple[str, str, str] | None:
    """Check, site and method of a test of the matrix; ``None`` for other tests."""
    found = _NODE.search(nodeid)
    if not found:
        return None
    words = found[2].split("-")
    site = [w for w in words if w in set(sites)]
    method = [w for w in words if w in set(methods)]
    return (found[1], site[0], method[0]) if site and method else None


class MatrixReport:
    """Collects outcomes, of all workers, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        worst = self.outcomes.get(report.nodeid)
        if worst in (None, "passed"):
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        from tests.test_lora_matrix import ADAPTING, SITES

        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        checks: Counter[str] = Counter()
        for nodeid, outcome in self.outcomes.items():
            found = cell(nodeid, SITES, ADAPTING)
            if found:
                check, site, method = found
                counts[method, site][outcome] += 1
                checks[check] += 1
        if not counts:
            return
        rows = [
            f"| {site.replace('_', ' ')} | "
            + " | ".join(_text(counts[method, site]) for method in ADAPTING)
            + " |"
            for site in SITES
        ]
        total = sum(sum(c.values()) for c in counts.values())
        lines = [
            HEAD,
            f"{total:,} checks, {sum(c['passed'] for c in counts.values()):,} passed.\n",
            "| layer | " + " | ".join(f"`{m}`" for m in ADAPTING) + " |",
            "|---|" + "---|" * len(ADAPTING),
            *rows,
            "\nThe checks, each for every layer and method that it makes sense for:\n",
            *(f"- {check.replace('_', ' ')}" for check in checks),
            "",
        ]
        self.path.write_text("\n".join(lines), encoding="utf-8")


def _text(count: Counter[str]) -> str:
    """``12``, or ``11 of 12`` where something failed, or a dash."""
    total = sum(count.values())
    if not total:
        return "—"
    return str(total) if count["passed"] == total else f"{count['passed']} of {total}"
