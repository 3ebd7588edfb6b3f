"""``{model-table} PATTERN ...``: the checkpoints of the models whose names match, from the data.

A pattern that starts with ``!`` leaves models out. One row per checkpoint. When all pages are read,
a model that is in no table, or in two, is an error.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import tfimm_lora
from tfimm_lora.models import pretrained_config
from tfimm_lora.models.registry import find_entry
from tfimm_lora.weights.licence import is_free

MODULES = ("convnext", "vision_transformer", "deit")
COLUMNS = (
    ("architecture", 34),
    ("weights", 9),
    ("checkpoint", 30),
    ("pixels", 6),
    ("classes", 8),
    ("licence", 10),
)


def registered() -> list[str]:
    """All architectures of the package's own tables."""
    return [name for module in MODULES for name in tfimm_lora.list_models(module=module)]


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


class ModelTable(SphinxDirective):
    """A table with one row per checkpoint."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        patterns = self.arguments[0].split()
        names = tfimm_lora.list_models(
            [p for p in patterns if p[0] != "!"],
            exclude_filters=[p[1:] for p in patterns if p[0] == "!"],
        )
        if not names:
            raise self.error(f"No model matches {self.arguments[0]!r}.")
        listed = self.env.__dict__.setdefault("listed_models", {})
        listed.setdefault(self.env.docname, []).extend(names)
        rows = [row for name in names for row in self.rows(name)]
        checkpoints = sum(bool(row[2].astext()) for row in rows)
        caption = f"{len(names)} architectures, {checkpoints} checkpoints"
        return [nodes.paragraph("", caption), table(rows)]

    def rows(self, name: str) -> list[list[nodes.Node]]:
        parameters = find_entry(name)[0].parameters
        tags = tfimm_lora.list_models(f"{name}.*", include_tags=True)
        default = pretrained_config(name).tag
        tags.sort(key=lambda full: full != f"{name}.{default}")  # the default one first
        rows = []
        for number, full in enumerate(tags or [name]):
            facts = pretrained_config(full)
            first = [nodes.literal("", name), text(millions(parameters))] if not number else None
            rows.append([*(first or [text(""), text("")]), *facts_of(facts)])
        return rows


def text(value: str) -> nodes.Text:
    return nodes.Text(value)


def facts_of(facts: tfimm_lora.PretrainedConfig) -> list[nodes.Node]:
    """The cells of one checkpoint."""
    tag: nodes.Node = text("")
    if facts.tag and facts.has_weights:
        place = facts.hf_hub_id and f"https://huggingface.co/{facts.hf_hub_id}"
        tag = nodes.reference("", facts.tag, refuri=place or facts.url)
    licence = facts.license or "not stated"
    height, width = facts.input_size[1:]
    return [
        tag,
        text(str(height) if height == width else f"{height} × {width}"),
        text(f"{facts.num_classes:,}" if facts.num_classes else "–"),
        text(licence if is_free(facts.license) else f"{licence} *"),
    ]


def table(rows: list[list[nodes.Node]]) -> nodes.table:
    group = nodes.tgroup(cols=len(COLUMNS))
    group.extend(nodes.colspec(colwidth=width) for _, width in COLUMNS)
    head = nodes.thead("", row([text(title) for title, _ in COLUMNS]))
    group.extend([head, nodes.tbody("", *(row(cells) for cells in rows))])
    return nodes.table("", group, classes=["models"])


def row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def purge(app, env, docname) -> None:
    getattr(env, "listed_models", {}).pop(docname, None)


def merge(app, env, docnames, other) -> None:
    env.__dict__.setdefault("listed_models", {}).update(getattr(other, "listed_models", {}))


def check(app, env) -> None:
    listed = [name for names in getattr(env, "listed_models", {}).values() for name in names]
    missing = sorted(set(registered()) - set(listed))
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if missing or twice:
        raise ValueError(f"Models in no table: {missing}. Models in two: {twice}.")


def setup(app):
    app.add_directive("model-table", ModelTable)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
