"""Writes the tables of the matrix from the outcomes of its tests.

pytest tests/test_lora_matrix.py --write-matrix docs/results/matrix.md
pytest tests/test_lora_matrix_kernels.py --write-matrix docs/results/matrix_kernels.md
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

HEAD = """# Methods and operations

Every method that adapts layers, on every kind of layer: how many of the checks below passed. The
table is written by the test run itself, `pytest tests/test_lora_matrix.py --sample-slow 1
--write-matrix docs/results/matrix.md`, on TensorFlow. Further tests run the methods on whole models
and against PEFT.
"""
KERNELS_HEAD = """# Methods, operations and kernel formats

Every method that adapts layers on every format of the frozen kernel, and every kind of layer on
every format: how many of the checks below passed. The tables are written by the test run itself,
`pytest tests/test_lora_matrix_kernels.py --sample-slow 1 --write-matrix
docs/results/matrix_kernels.md`, on TensorFlow.
"""
_NODE = re.compile(r"test_lora_matrix(?:_kernels)?\.py::test_(\w+)\[(.+)\]$")


def cell(nodeid: str, *axes: Iterable[str]) -> tuple[str, ...] | None:
    """Check and the values of some axes of a test of the matrix; ``None`` for other tests."""
    found = _NODE.search(nodeid)
    if not found:
        return None
    values = []
    for axis in axes:
        # The longest: some names have a dash and are parts of others.
        there = [name for name in axis if f"-{name}-" in f"-{found[2]}-"]
        if not there:
            return None
        values.append(max(there, key=len))
    return (found[1], *values)


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
        from tests.test_lora_matrix_kernels import KERNELS

        counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        checks: Counter[str] = Counter()
        outcomes: Counter[str] = Counter()
        kernels = any("test_lora_matrix_kernels.py" in nodeid for nodeid in self.outcomes)
        axes = (SITES, ADAPTING, KERNELS) if kernels else (SITES, ADAPTING)
        for nodeid, outcome in self.outcomes.items():
            found = cell(nodeid, *axes)
            if found:
                check, site, *rest = found
                for row, column in [(site, rest[-1]), *([(rest[0], rest[1])] if kernels else [])]:
                    counts[row, column][outcome] += 1
                checks[check] += 1
                outcomes[outcome] += 1
        if not counts:
            return
        lines = [
            KERNELS_HEAD if kernels else HEAD,
            f"{outcomes.total():,} checks, {outcomes['passed']:,} passed.\n",
        ]
        if kernels:
            lines += [*_table("method", [(f"`{m}`", m) for m in ADAPTING], KERNELS, counts), ""]
        rows = [(site.replace("_", " "), site) for site in SITES]
        lines += _table("layer", rows, KERNELS if kernels else ADAPTING, counts)
        lines += [
            "\nThe checks, each for every layer and method that it makes sense for:\n",
            *(f"- {check.replace('_', ' ')}" for check in checks),
            "",
        ]
        self.path.write_text("\n".join(lines), encoding="utf-8")


def _table(
    corner: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    counts: dict[tuple[str, str], Counter[str]],
) -> list[str]:
    """Lines of a table; rows have a text and a name."""
    return [
        f"| {corner} | " + " | ".join(f"`{column}`" for column in columns) + " |",
        "|---|" + "---|" * len(columns),
        *(
            f"| {text} | " + " | ".join(_text(counts[row, column]) for column in columns) + " |"
            for text, row in rows
        ),
    ]


def _text(count: Counter[str]) -> str:
    """``12``, or ``11 of 12`` where something failed, or a dash."""
    total = sum(count.values())
    if not total:
        return "—"
    return str(total) if count["passed"] == total else f"{count['passed']} of {total}"
