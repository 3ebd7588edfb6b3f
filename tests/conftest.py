"""Settings and fixtures for every test.

The environment is settled here, before anything imports Keras: one thread per worker, no network,
no caches of the user's, little logging. ``KERAS_BACKEND`` from outside is respected.

Tests that compare with another implementation ask for ``oracle_python`` (torch, timm and PEFT),
``tfimm_python`` (tfimm 0.2.14 on Keras 2) or ``shared_dir`` (weights and images that are too large
for the repository). Where those are missing the tests skip and say why; with
``TFIMM_LORA_REQUIRE_ORACLES=1``, as CI sets it, they fail instead.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

_ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TFDS_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# A home for Keras, the hub and matplotlib that the user's own files cannot leak into.
_HOME = tempfile.TemporaryDirectory(prefix="tfimm_lora_tests_", ignore_cleanup_errors=True)
for _name in ("KERAS_HOME", "HF_HOME", "MPLCONFIGDIR", "TFDS_DATA_DIR"):
    _folder = Path(_HOME.name, _name.lower())
    _folder.mkdir()
    os.environ[_name] = str(_folder)
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_name, None)

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIRE_ORACLES = os.environ.get("TFIMM_LORA_REQUIRE_ORACLES", "0") not in ("", "0")
ORACLE_FIXTURES = frozenset({"shared_dir", "oracle_python", "tfimm_python"})


# --- Which tests run --------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample-slow",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="share of the tests marked slow to run, 0 (default) to 1 (all); which ones is a "
        "function of their names and of --sample-seed alone",
    )
    parser.addoption(
        "--sample-seed",
        default="",
        metavar="TEXT",
        help="another text takes another sample of the slow tests; CI takes the commit's hash",
    )

    parser.addoption(
        "--write-matrix",
        type=Path,
        metavar="PAGE",
        help="write the table of methods and operations from this run's outcomes",
    )


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--write-matrix")
    if page and not hasattr(config, "workerinput"):
        from tests.matrix_report import MatrixReport

        config.pluginmanager.register(MatrixReport(page))


def pytest_report_header(config: pytest.Config) -> str:
    fraction, seed = (config.getoption(f"--sample-{name}") for name in ("slow", "seed"))
    return f"slow tests: --sample-slow {fraction} --sample-seed {seed!r}"


def in_sample(nodeid: str, fraction: float, seed: str = "") -> bool:
    """Whether a slow test belongs to the sample: by a hash of its name, not by date or order."""
    return zlib.crc32((seed + nodeid).encode()) / 2**32 < fraction


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if ORACLE_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.oracle)
    fraction, seed = config.getoption("--sample-slow"), config.getoption("--sample-seed")
    # A test that is named on the command line is meant.
    if any("::" in argument for argument in config.args):
        return
    left_out = [
        item
        for item in items
        if item.get_closest_marker("slow") and not in_sample(item.nodeid, fraction, seed)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A comparison that was skipped although CI promised the oracles is a failure."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if REQUIRE_ORACLES and skipped and item.get_closest_marker("oracle"):
        report.outcome = "failed"
        report.longrepr = f"skipped under TFIMM_LORA_REQUIRE_ORACLES=1: {report.longrepr}"
    return report


# --- Every test starts alike ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_start():
    """Float32, seed 0, and no policy left behind by the test before."""
    import keras

    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often Python runs through the layers: compiled functions do not."""
    from tfimm_lora import lora

    count = [0]
    original = lora.LoRALayer.call

    def call(self, inputs, training=None):  # Keras looks at the names
        count[0] += 1
        return original(self, inputs, training=training)

    monkeypatch.setattr(lora.LoRALayer, "call", call)
    return count


# --- The other implementations ----------------------------------------------------------------


def _missing(what: str, remedy: str) -> None:
    reason = f"{what}; {remedy}"
    if REQUIRE_ORACLES:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the oracles, weights and images: ``TFIMM_LORA_SHARED`` or ``../shared``."""
    folder = Path(os.environ.get("TFIMM_LORA_SHARED") or REPOSITORY.parent / "shared").resolve()
    if not (folder / "oracle").is_dir():
        _missing(f"no oracle/ in {folder}", "set TFIMM_LORA_SHARED to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def oracle_python() -> str:
    """A Python that imports torch, timm and PEFT: ``TFIMM_LORA_ORACLE_PYTHON``."""
    python = os.environ.get("TFIMM_LORA_ORACLE_PYTHON", "")
    if not Path(python).is_file():
        _missing(
            f"no Python with torch, timm and PEFT (TFIMM_LORA_ORACLE_PYTHON={python!r})",
            "install .ci/oracles.lock into an environment and set the variable to its python",
        )
    return python


@pytest.fixture(scope="session")
def bitsandbytes_dir(oracle_python: str) -> Path:
    """The folder that has bitsandbytes: ``TFIMM_LORA_BITSANDBYTES_PATH``, or where CI puts it."""
    default = Path(oracle_python).parents[1] / "bitsandbytes_path"
    folder = Path(os.environ.get("TFIMM_LORA_BITSANDBYTES_PATH") or default)
    if not (folder / "bitsandbytes").is_dir():
        _missing(
            f"no bitsandbytes in {folder}",
            "pip install --no-deps --target FOLDER bitsandbytes==0.50.2, and set "
            "TFIMM_LORA_BITSANDBYTES_PATH to the folder",
        )
    return folder


@dataclass(frozen=True)
class TfimmPython:
    """How to run tfimm: ``subprocess.run([tfimm_python.python, ...], env=tfimm_python.env)``."""

    python: str
    path: str

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, with tfimm on the path and Keras 2 under TensorFlow."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_")}
        return environment | {"PYTHONPATH": self.path, "TF_USE_LEGACY_KERAS": "1"}


@pytest.fixture(scope="session")
def tfimm_python() -> TfimmPython:
    """tfimm 0.2.14, where ``TFIMM_LORA_TFIMM_PYTHON`` and ``TFIMM_LORA_TFIMM_PATH`` say."""
    python = os.environ.get("TFIMM_LORA_TFIMM_PYTHON", "")
    path = os.environ.get("TFIMM_LORA_TFIMM_PATH", "")
    if not Path(python).is_file() or not Path(path, "tfimm").is_dir():
        _missing(
            f"no tfimm (TFIMM_LORA_TFIMM_PYTHON={python!r}, TFIMM_LORA_TFIMM_PATH={path!r})",
            "install .ci/tfimm.lock into an environment and tfimm==0.2.14 into a folder, and set "
            "the variables to its python and to the folder",
        )
    return TfimmPython(python, path)
