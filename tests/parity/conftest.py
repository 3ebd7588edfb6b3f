"""The oracles as fixtures: one process per worker, started when a test first asks for a case."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.oracles import Oracle

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def oracle_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where cases are kept: ``TFIMM_LORA_ORACLE_CACHE``, or pytest's own cache if it has one."""
    folder = os.environ.get("TFIMM_LORA_ORACLE_CACHE")
    if folder:
        return Path(folder)
    cache = getattr(request.config, "cache", None)  # not there with -p no:cacheprovider
    return Path(cache.mkdir("oracles")) if cache else tmp_path_factory.mktemp("oracles")


@pytest.fixture(scope="session")
def timm_oracle(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """timm, with random weights."""
    source = shared_dir / "oracle" / "timm_oracle.py"
    oracle = Oracle(
        "timm", oracle_python, HERE / "drive_timm.py", [source], oracle_cache, [str(source)]
    )
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def foreign_oracle(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """timm's loader, and the library transformers, on checkpoints in the names of others."""
    source = shared_dir / "oracle" / "timm_oracle.py"
    oracle = Oracle(
        "foreign",
        oracle_python,
        HERE / "drive_foreign.py",
        [source, HERE / "foreign_layouts.py"],
        oracle_cache,
        [str(source)],
    )
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def transformers_oracle(oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """Vision models of the library transformers; without timm, whose oracle hides torchvision."""
    script = HERE / "drive_transformers.py"
    oracle = Oracle("transformers", oracle_python, script, [], oracle_cache)
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def peft_oracle(shared_dir: Path, oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """PEFT on timm models."""
    source = shared_dir / "oracle" / "peft_oracle.py"
    env = {**os.environ, "ORACLE_THREADS": "1"}
    oracle = Oracle(
        "peft", oracle_python, HERE / "drive_peft.py", [source], oracle_cache, [str(source)], env
    )
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def bitsandbytes_oracle(
    oracle_python: str, bitsandbytes_dir: Path, oracle_cache: Path
) -> Iterator[Oracle]:
    """bitsandbytes on the CPU."""
    script = HERE / "drive_bitsandbytes.py"
    folder = str(bitsandbytes_dir)
    oracle = Oracle("bitsandbytes", oracle_python, script, [], oracle_cache, [folder])
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def tfimm_oracle(tfimm_python, oracle_cache: Path) -> Iterator[Oracle]:
    """tfimm 0.2.14 on Keras 2."""
    oracle = Oracle(
        "tfimm",
        tfimm_python.python,
        HERE / "drive_tfimm.py",
        [],
        oracle_cache,
        env=tfimm_python.env,
    )
    yield oracle
    oracle.close()


@pytest.fixture(scope="session")
def zoo(shared_dir: Path) -> dict[str, Any]:
    """The facts of timm 1.0.31's architectures and checkpoints."""
    return json.loads((shared_dir / "reference" / "timm_zoo.json").read_text())
