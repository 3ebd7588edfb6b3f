"""Saving that fails half way: a full disk, a killed process. The old file is always intact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import assert_same_bits, run_python, tiny_lora_model, tiny_model, values
from tfimm_lora import lora, models
from tfimm_lora.weights import safetensors_file
from tfimm_lora.weights.safetensors_file import write_safetensors

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")

# --- A full disk ------------------------------------------------------------------------------

# Files of this process cannot grow beyond a limit, as on a full disk (EFBIG for ENOSPC).
FULL_DISK = """
import resource, sys
import numpy as np
from tfimm_lora.weights.safetensors_file import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_safetensors(sys.argv[1], {"a": np.full(300_000, 2, "float32")}, {})
except OSError as error:
    print("OSError", error)
"""


@posix
@pytest.mark.parametrize("limit", [0, 10, 4096, 1_000_000])
def test_full_disk(limit: int, tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": np.ones(9, "float32")}, {})
    before = path.read_bytes()
    process = run_python(FULL_DISK, path, limit)
    expected = f"OSError {path} could not be written (1,200,000 bytes): "
    assert process.stdout.startswith(expected), process.stdout + process.stderr
    assert "before is intact; make room" in process.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@posix
def test_full_disk_at_first_saving_leaves_nothing(tmp_path):
    process = run_python(FULL_DISK, tmp_path / "a.safetensors", 1000)
    assert process.stdout.startswith("OSError"), process.stdout + process.stderr
    assert list(tmp_path.iterdir()) == []


def _no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_no_space_leaves_the_old_state(what: str, tmp_path, monkeypatch):
    old, new = tiny_lora_model(seed=1), tiny_lora_model(seed=2)

    def save(model):
        if what == "adapter":
            lora.save_adapter(model, tmp_path)
        else:
            regular = lora.convert_to_regular_model(model)
            models.save_safetensors(regular, tmp_path / "model.safetensors")

    save(old)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(safetensors_file, "save_file", _no_space)
    with pytest.raises(OSError, match="No space left"):
        save(new)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- Killed while saving ----------------------------------------------------------------------

# Writes 1s and 2s in turn, for ever; the loop has begun when a line is printed.
SAVING = """
import sys
import numpy as np
from tfimm_lora.weights.safetensors_file import write_safetensors
arrays = [{f"t{i}": np.full(100_000, n, "float32") for i in range(20)} for n in (1, 2)]
print("ready", flush=True)
while True:
    for tensors in arrays:
        write_safetensors(sys.argv[1], tensors, {})
"""


@posix
def test_killed_while_saving(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {f"t{i}": np.full(100_000, 1, "float32") for i in range(20)}
    write_safetensors(path, tensors, {})
    moments = random.Random(0)
    leftovers = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = load_file(path)
        assert found.keys() == tensors.keys()
        (value,) = {v for t in found.values() for v in np.unique(t)}
        assert value in (1, 2)
        leftovers += len(list(tmp_path.iterdir())) - 1
        for file in tmp_path.glob(".writing-*"):
            file.unlink()
    assert leftovers, "no process was killed while it wrote"


class _Killed(BaseException):
    """Stands for the end of the process: nothing after it runs, not even clean-up code."""


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
@pytest.mark.parametrize("new_rank", [2, 3])
def test_an_adapter_is_always_the_old_or_the_new_one(
    renames: int, new_rank: int, tmp_path, monkeypatch
):
    """Killed before, between and behind the renames of an adapter's two files and its card."""
    base = tiny_model()
    old, new = tiny_lora_model(lora_rank=2, seed=1), tiny_lora_model(lora_rank=new_rank, seed=2)
    for model in (old, new):
        models.transfer_weights(base, model, lora.LORA_WEIGHT_NAMES)
    lora.save_adapter(old, tmp_path)
    done, replace = 0, os.replace

    def killed(source, target):
        nonlocal done
        if done == renames:
            raise _Killed
        done += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    if renames < 3:
        with pytest.raises(_Killed):
            lora.save_adapter(new, tmp_path)
    else:
        lora.save_adapter(new, tmp_path)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the config is not that of the weights
        loaded = lora.load_adapter(base, tmp_path)
    assert_same_bits(values(loaded), values(new if renames else old))


ADAPTER_LOOP = """
import sys
from tests.helpers import tiny_lora_model
from tfimm_lora import lora
models = [tiny_lora_model(embed_dim=192, num_heads=3, seed=0, lora_rank=r) for r in (16, 24)]
for i, model in enumerate(models):
    for layer in lora.lora_layers(model):
        for weight in layer.lora_weights:
            weight.assign(weight * 0 + i + 1)
print("ready", flush=True)
while True:
    for model in models:
        lora.save_adapter(model, sys.argv[1])
"""


@posix
@pytest.mark.filterwarnings("ignore:.*is not the config that was saved with the weights")
def test_adapter_killed_while_saving(tmp_path):
    base = tiny_lora_model(embed_dim=192, num_heads=3, lora_rank=16)
    lora.save_adapter(base, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", ADAPTER_LOOP, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.5 + 0.2 * random.Random(1).random())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    regular = tiny_model(embed_dim=192, num_heads=3)
    loaded = lora.load_adapter(regular, tmp_path, check_base=False)
    found = {v for p, a in values(loaded).items() if "_lora_" in p for v in np.unique(a)}
    rank = lora.lora_layers(loaded)[0].lora_rank
    assert (rank, found) in ((16, {1.0}), (24, {2.0}))
