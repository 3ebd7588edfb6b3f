"""The package as a whole: what it declares, what it ships, which part may import which."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tfimm_lora

PACKAGE = Path(tfimm_lora.__file__).parent
# From the bottom up: a part may import those before it.
KERAS_ONLY = ["layers", "architectures", "weights", "models", "quantization", "lora"]
PARTS = [*KERAS_ONLY, "data", "tasks", "training", "evaluation", "cli"]
IMPORT_NAMES = {
    "pyyaml": "yaml",
    "pillow": "PIL",
}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], "tfimm_lora.")
    if not module.name.endswith("__main__")
)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every absolute import of a file, and whether it happens when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node not in deferred) for name in names]
    return found


def source_id(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def declared(extra: str = "") -> dict[str, Requirement]:
    """The requirements of the installed package, of one extra or of none."""
    requirements = map(Requirement, importlib.metadata.requires("tfimm_lora") or [])
    return {
        canonicalize_name(requirement.name): requirement
        for requirement in requirements
        if (not requirement.marker and not extra)
        or (extra and requirement.marker and requirement.marker.evaluate({"extra": extra}))
    }


def test_version_is_the_installed_one():
    assert importlib.metadata.version("tfimm_lora") == tfimm_lora.__version__


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_its_public_names_exist(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} does not say what it is for"
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_imports_point_downwards(path):
    part = path.relative_to(PACKAGE).parts[0]
    if path.parent == PACKAGE:  # the table of contents and what it needs
        return
    assert part in PARTS
    for name, _ in imports(path):
        words = name.split(".")
        if words[0] == "tfimm_lora" and len(words) > 1 and words[1] in PARTS:
            assert PARTS.index(words[1]) <= PARTS.index(part), f"{part} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_model_code_knows_keras_only(path):
    if path.relative_to(PACKAGE).parts[0] not in KERAS_ONLY:
        return
    roots = {name.split(".")[0] for name, immediate in imports(path) if immediate}
    frameworks = roots & {"tensorflow", "jax", "torch", "timm"}
    assert not frameworks, "everything up to lora/ has to run on every backend"


def test_every_import_is_declared_and_every_dependency_is_imported():
    optional = {"jax", "torch", "timm", "tf2onnx", "onnx", "pandas", "sklearn"}
    dependencies = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared()}
    at_import, anywhere = set(), set()
    for path in SOURCES:
        for name, immediate in imports(path):
            root = name.split(".")[0]
            if root in sys.stdlib_module_names or root == "tfimm_lora":
                continue
            anywhere.add(root)
            at_import |= {root} if immediate else set()
    assert at_import <= dependencies
    assert anywhere <= dependencies | optional
    # TensorFlow is there as Keras' backend, and for its data pipelines.
    assert dependencies - {"tensorflow"} <= anywhere


def test_importing_the_zoo_leaves_the_command_line_and_the_data_sets_alone():
    code = (
        "import sys, keras\n"  # Keras imports matplotlib where it is installed.
        "before = set(sys.modules)\n"
        "import tfimm_lora, tfimm_lora.lora\n"
        "heavy = {'matplotlib', 'tensorflow_datasets', 'jsonargparse', 'torch', 'timm'}\n"
        "print(*(heavy & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_package_data_is_covered_and_small():
    configuration = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.search(r'"\*" = \[(.*)\]', configuration)[1].replace('"', "").split(", ")
    files = [
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    ]
    assert PACKAGE / "py.typed" in files
    for path in files:
        assert any(path.match(pattern) for pattern in patterns), f"{path} would not be installed"
    assert sum(path.stat().st_size for path in files) < 8e6


@pytest.mark.parametrize("path", SOURCES, ids=source_id)
def test_files_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    if re.search(r"^ *(def|class) ", text, re.MULTILINE):
        assert "from __future__ import annotations" in text


def test_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="tfimm-lora")
    assert callable(entry.load())


def test_python_versions_are_those_announced(repository):
    metadata = importlib.metadata.metadata("tfimm_lora")
    announced = {
        classifier.rsplit(" ", 1)[1]
        for classifier in metadata.get_all("Classifier")
        if re.search(r":: Python :: 3\.\d+$", classifier)
    }
    allowed = Requirement(f"x{metadata['Requires-Python']}").specifier
    assert announced == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed}


def test_locked_versions_lie_in_the_declared_ranges(repository):
    locked = {
        canonicalize_name(requirement.name): requirement
        for line in (repository / ".ci/requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    for extra in ("", "jax", "export", "report", "docs", "test"):
        for name, requirement in declared(extra).items():
            if name == "tfimm-lora":
                continue
            assert name in locked, f"{name} of extra {extra!r} is not in the locked set"
            (pin,) = locked[name].specifier
            assert Version(pin.version) in requirement.specifier, f"{name} {pin} not in range"


def test_top_level_has_nothing_unexpected(repository):
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True
    )
    top = {line.split("/")[0] for line in run.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
        "tfimm_lora", "tests", "docs", "notebooks", "benchmarks",
    }  # fmt: skip
