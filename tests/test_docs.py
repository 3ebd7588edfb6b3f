"""The documentation says what is true: its code runs, its names and links exist."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import pytest

import tfimm_lora
from tests.keras2_layout import keras2_weights, write_h5
from tfimm_lora import lora, models, weights

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("methods/*.md"))]
# A page's blocks are run one after the other, in one namespace.
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
PARTS = ["lora", "models", "architectures", "layers", "weights"]
PARTS += ["quantization", "data", "tasks", "training", "evaluation"]


def page_id(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, with the line in which each begins."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start()].count("\n") + 2, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """Stands in for the hub: a repository of timm's has random weights of the right shapes."""
    from tfimm_lora.weights import hub

    def download(repo: str, filename: str, revision: str | None) -> Path:
        file = tmp_path / "hub" / repo / filename
        if not file.exists():
            file.parent.mkdir(parents=True)
            organisation, name = repo.split("/")
            assert organisation == "timm" and filename == "model.safetensors"
            models.save_safetensors(tfimm_lora.create_model(name), file)
        return file

    monkeypatch.setattr(hub, "download", download)


def write_old_files(folder: Path) -> None:
    """The files that the page about tfimm loads."""
    model = tfimm_lora.create_model("vit_tiny_patch16_224", nb_classes=10)
    write_h5(folder / "vit.h5", keras2_weights(model))
    model = lora.create_model("convnext_tiny", nb_classes=10, lora_rank=2)
    write_h5(folder / "lora.h5", keras2_weights(model))


@pytest.mark.parametrize("page", WITH_CODE, ids=page_id)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch, offline_hub):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "example"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"methods": {"lora": {"val_accuracy": 0.9}}}))
    if page.name == "command_line.md":
        pytest.importorskip("pandas", reason="pandas comes with the extra 'report'")
    if page.name == "coming_from_tfimm.md":
        write_old_files(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page):
        # Empty lines in front, so that an error names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_pages_with_code_are_found():
    assert {page.name for page in WITH_CODE} >= {"README.md", "quickstart.md", "lora.md"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("part", ["", *PARTS])
def test_every_public_name_is_documented(part):
    module = importlib.import_module(f"tfimm_lora.{part}" if part else "tfimm_lora")
    pages = [*DOCS.rglob("reference/*.rst"), *DOCS.glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    documented = set(re.findall(r"auto(?:function|class|exception|data):: (\w+)", text))
    submodules = {*PARTS, "__version__"} if not part else set()
    assert set(module.__all__) - documented - submodules == set()


def test_notebooks_are_committed_with_their_output():
    notebooks = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
        assert "error" not in kinds and kinds & {"stream", "execute_result"}
        assert os.path.expanduser("~") not in path.read_text(encoding="utf-8")


def test_saved_weights_are_the_ones_of_the_stand_in(offline_hub):
    """The stand-in for the hub is used, and gives what the docs then talk about."""
    checkpoint = weights.find_checkpoint(models.pretrained_config("test_vit"))
    assert checkpoint.path.name == "model.safetensors"
    with weights.read_safetensors(checkpoint.path) as file:
        assert "patch_embed.proj.weight" in file.shapes
