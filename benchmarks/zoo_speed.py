"""Time to names and to models, against timm and tfimm, in one run.

    python -m benchmarks.zoo_speed --output docs/results/zoo_speed.json \
        --timm-python PYTHON --tfimm-python PYTHON --tfimm-path FOLDER

Every measurement is a fresh process. The libraries take turns, round after round, so that a machine
that slows down slows them all. ``process`` is a process until its first call has returned, imports
included, ``call`` that first call alone, and ``again`` the median of three further calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result

# What a user types, by task and library. BEFORE is not part of the call.
TASKS: dict[str, dict[str, tuple[str, str]]] = {
    "list_models()": {
        "tfimm_lora": ("import tfimm_lora", "tfimm_lora.list_models()"),
        "timm": ("import timm", "timm.list_models()"),
        "tfimm": ("import tfimm", "tfimm.list_models()"),
    },
    "create_model('convnext_tiny')": {
        "tfimm_lora": (
            "import keras; import tfimm_lora; from tfimm_lora.models.factory import create_model",
            "create_model('convnext_tiny')",
        ),
        "timm": ("import timm", "timm.create_model('convnext_tiny')"),
        "tfimm": ("import tfimm", "tfimm.create_model('convnext_tiny')"),
    },
    "create_model('convnext_tiny'), weights from a file": {
        "tfimm_lora": (
            "import keras; import tfimm_lora; from tfimm_lora.models.factory import create_model",
            "create_model('convnext_tiny', model_path=FILE + '.safetensors')",
        ),
        "timm": (
            "import timm",
            "timm.create_model('convnext_tiny', pretrained=True, "
            "pretrained_cfg_overlay={'file': FILE + '.safetensors'})",
        ),
        "tfimm": ("import tfimm", "tfimm.create_model('convnext_tiny').load_weights(FILE + '.h5')"),
    },
}
PROGRAM = """
import json, statistics, sys, time
FILE, BEGAN = sys.argv[1], float(sys.argv[2])
{before}
def measure():
    wall, cpu = time.perf_counter(), time.process_time()
    {call}
    return time.perf_counter() - wall, time.process_time() - cpu
call = measure()
process = time.time() - BEGAN, time.process_time()
again = [statistics.median(seconds) for seconds in zip(*(measure() for _ in range(3)))]
print(json.dumps({{"process": process, "call": call, "again": again}}))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timm-python", required=True, help="a Python with timm")
    parser.add_argument("--timm-path", default="", help="a folder for its PYTHONPATH")
    parser.add_argument(
        "--tfimm-python", required=True, help="a Python with TensorFlow and tf-keras"
    )
    parser.add_argument("--tfimm-path", required=True, help="the folder that tfimm lies in")
    return parser.parse_args()


def run(python: str, code: str, file: str, env: dict[str, str]) -> dict[str, float]:
    """Seconds of one process until its first call has returned, of that call, and of later ones."""
    command = [python, "-c", code, file, str(time.time())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer = json.loads(done.stdout.splitlines()[-1])
    return {
        f"{what} {kind}": seconds
        for what, pair in answer.items()
        for kind, seconds in zip(("wall", "cpu"), pair, strict=True)
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, minimum and maximum of every figure."""
    found = {}
    for figure in rounds[0]:
        values = [r[figure] for r in rounds]
        found[figure] = [statistics.median(values), min(values), max(values)]
    return found


def main() -> None:
    arguments = parse()
    common = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    tfimm = {"PYTHONPATH": arguments.tfimm_path, "TF_USE_LEGACY_KERAS": "1"}
    libraries = {
        "tfimm_lora": (sys.executable, {**common, "KERAS_BACKEND": "tensorflow"}),
        "tfimm_lora on JAX": (sys.executable, {**common, "KERAS_BACKEND": "jax"}),
        "timm": (arguments.timm_python, {**common, "PYTHONPATH": arguments.timm_path}),
        "tfimm": (arguments.tfimm_python, {**common, **tfimm}),
    }
    result: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "tasks": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "convnext_tiny"))
        save = (
            "import tfimm_lora; from tfimm_lora.models import save_safetensors; "
            "save_safetensors(tfimm_lora.create_model('convnext_tiny'), FILE + '.safetensors')"
        )
        run(sys.executable, PROGRAM.format(before=save, call="pass"), file, common)
        save = "import tfimm; tfimm.create_model('convnext_tiny').save_weights(FILE + '.h5')"
        run(
            *libraries["tfimm"][:1],
            PROGRAM.format(before=save, call="pass"),
            file,
            libraries["tfimm"][1],
        )
        for task, programs in TASKS.items():
            rounds: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
            for number in range(arguments.rounds + 1):
                for library, (python, env) in libraries.items():
                    before, call = programs[library.partition(" ")[0]]
                    seconds = run(python, PROGRAM.format(before=before, call=call), file, env)
                    if number:  # the first round fills the disk's cache
                        rounds[library].append(seconds)
            ours = rounds["tfimm_lora"]
            result["tasks"][task] = {
                library: {
                    "seconds": summary(values),
                    # Pair by pair, so that what slowed both down cancels.
                    "times_ours": summary(
                        [{k: v[k] / o[k] for k in v} for v, o in zip(values, ours, strict=True)]
                    ),
                }
                for library, values in rounds.items()
            }
            for library, figures in result["tasks"][task].items():
                medians = {k: round(v[0], 3) for k, v in figures["seconds"].items()}
                print(task, library, medians, flush=True)
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
