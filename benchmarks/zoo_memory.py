"""Peak memory of building the zoo's largest kind of model and loading its weights.

    python benchmarks/zoo_memory.py --output docs/results/zoo_memory.json
        [--timm-python PYTHON] [--model vit_giant_patch14_dinov2] [--dtypes float32 float16]

Writes a checkpoint of random values in timm's names, then loads it in fresh processes, one after
the other: this package on TensorFlow and on JAX, and timm. Each process says how much memory it had
at most (``VmHWM`` of Linux: resident, so that what is only reserved does not count) and how much
before the model was asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, write_result

OURS = """
import json, os, sys
name, path = sys.argv[1:]
import keras, tfimm_lora
tfimm_lora.create_model("test_vit")(keras.ops.zeros((1, 160, 160, 3)))  # what any model would load
"""
TIMM = """
import json, sys
name, path = sys.argv[1:]
import timm, torch
timm.create_model("test_vit").eval()(torch.zeros(1, 3, 160, 160))
"""
MEASURE = """
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(li.split()[1]) * 1024 for li in lines if li.startswith(field + ":"))
before = status("VmRSS")
"""
CREATE = {
    "tfimm_lora": """
model = tfimm_lora.create_model(name, model_path=path)
count = model.count_params()
""",
    "timm": """
model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})
count = sum(p.numel() for p in model.parameters())
""",
}
ANSWER = """
print(json.dumps({"before": before, "peak": status("VmHWM"), "weights": count}))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    parser.add_argument("--model", default="vit_giant_patch14_dinov2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax"])
    parser.add_argument("--timm-python", default="", help="a Python with timm")
    parser.add_argument("--timm-path", default="", help="a folder for its PYTHONPATH")
    return parser.parse_args()


def write_checkpoint(name: str, path: Path, dtype: str) -> int:
    """Writes random values for every weight of a model, one at a time; returns their number."""
    import keras

    import tfimm_lora
    from tfimm_lora.weights.names import timm_variables, to_timm_layout

    with keras.StatelessScope(initialize_variables=False):
        shapes = {
            key: to_timm_layout(v.layer, v.leaf, np.broadcast_to(0.0, v.variable.shape)).shape
            for key, v in timm_variables(tfimm_lora.create_model(name)).items()
        }
    keras.utils.clear_session()
    size, header = np.dtype(dtype).itemsize, {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + size * int(np.prod(shape))
        kind = {"float32": "F32", "float16": "F16"}[dtype]
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            value = rng.standard_normal(int(np.prod(shape)), dtype="float32") * np.float32(0.02)
            file.write(value.astype(dtype).tobytes())
    return sum(int(np.prod(shape)) for shape in shapes.values())


def measure(python: str, code: str, *arguments: str | Path, **environment: str) -> dict[str, Any]:
    """What a fresh process prints in its last line."""
    command = [python, "-c", code, *map(str, arguments)]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = parse()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes:
            path = Path(folder, f"{dtype}.safetensors")
            count = write_checkpoint(arguments.model, path, dtype)
            runs = [("tfimm_lora", sys.executable, b) for b in arguments.backends]
            runs += [("timm", arguments.timm_python, "torch")] if arguments.timm_python else []
            for library, python, backend in runs:
                code = (OURS if library == "tfimm_lora" else TIMM) + MEASURE + CREATE[library]
                environment = {"KERAS_BACKEND": backend} if library == "tfimm_lora" else {}
                if library == "timm":
                    environment = {"PYTHONPATH": arguments.timm_path}
                answer = measure(python, code + ANSWER, arguments.model, path, **environment)
                assert answer["weights"] == count
                weights = 4 * count  # float32 in memory, whatever the file has
                row = {
                    "library": library, "backend": backend, "file": dtype, "weight_bytes": weights,
                    **answer,
                    "peak_over_weights": answer["peak"] / weights,
                    "added_over_weights": (answer["peak"] - answer["before"]) / weights,
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                rows.append(row)
            path.unlink()
    result = {"machine": machine(), "model": arguments.model, "rows": rows}
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
