"""What quantised kernels save: bytes on disk and in memory, a large model's peak, training's part.

    python -m benchmarks.quantization_memory [--output docs/results/quantization_memory.json]
        [--parts kernels giant training]

``kernels``: every model in every format, in memory and as a ``.keras`` file.

``giant``: writes a float32 checkpoint of random values in timm's names. A fresh process creates the
model from it with packed kernels and predicts one image; another one does the same with a model of
no size, which is what the framework takes. Each says how much memory it had at most (``VmHWM`` of
Linux: resident, pages of the file that are mapped among them).

``training``: memory that XLA plans for a training step under JAX, compiled and not run.

Parts that were not asked for stay in the file. A page goes beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quantization_steps import (
    BACKENDS,
    CLASSES,
    FORMATS,
    RANK,
    compile_jax,
    create,
    kernel_bytes,
)
from benchmarks.report import machine, write_result

MODELS = {"vit_small_patch16_224": "ViT-S/16", "convnext_tiny": "ConvNeXt-T"}
WANTED = {"int8": 0.26, "int4": 0.16, "nf4": 0.14}
WANTED_PEAK = 0.25

GIANT = """
import json, sys
name, path, side, format = sys.argv[1:]
import keras, numpy as np
from tfimm_lora import lora

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(li.split()[1]) * 1024 for li in lines if li.startswith(field + ":"))

def facts():
    found = {k: status(v) for k, v in
             {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}.items()}
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted anew
    return found

side = int(side)
model = lora.create_model(
    name, model_path=path, nb_classes=0, input_size=(side, side), lora_quantization=format)
answer = {"created": facts()}
outputs = model.predict(np.ones((1, side, side, 3), "float32"), verbose=0)
assert np.isfinite(outputs).all()
answer |= {"predicted": facts(), "weights": sum(
    int(np.prod(v.shape)) for v in model.weights if "kernel" not in v.name) + sum(
    int(np.prod(la.kernel.shape)) for la in model._flatten_layers() if hasattr(la, "kernel"))}
print(json.dumps(answer))
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results/quantization_memory.json")
    )
    every = ["kernels", "giant", "training"]
    parser.add_argument("--parts", nargs="+", default=every, choices=every)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--giant", default="vit_giant_patch14_dinov2")
    parser.add_argument("--giant-format", default="nf4")
    parser.add_argument("--side", type=int, default=224, help="pixels of the giant's image")
    parser.add_argument("--folder", help="where the checkpoint is written; it is removed")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--training-model", default="vit_base_patch16_224")
    parser.add_argument("--training-formats", nargs="+", default=["float", "int8", "nf4"])
    parser.add_argument("--training-batch", type=int, default=32)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- Kernels ------------------------------------------------------------------------------------


def kernels(name: str) -> dict[str, Any]:
    """Bytes of a model's kernels in every format."""
    import h5py
    import keras
    import numpy as np

    found = {}
    for format in FORMATS:
        model = create(name, format, None)
        stored, whole = kernel_bytes(model)
        every = sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in model.weights)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.keras")
            model.save(path)
            with zipfile.ZipFile(path) as file:
                file.extract("model.weights.h5", folder)
            sizes: list[int] = []

            def visit(_: str, item: Any, sizes: list[int] = sizes) -> None:
                if isinstance(item, h5py.Dataset):
                    sizes.append(item.id.get_storage_size())

            with h5py.File(Path(folder, "model.weights.h5")) as file:
                file.visititems(visit)
            size = path.stat().st_size
        optimizer = sum(
            int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in model.optimizer.variables
        )
        found[format] = {
            "in_memory": stored,
            "in_memory_over_float": stored / whole,
            "on_disk_over_float": (sum(sizes) - optimizer - (every - stored)) / whole,
            "keras_file": size,
        }
        print(name, format, found[format], flush=True)
        keras.backend.clear_session()
    return found


# --- A large model ------------------------------------------------------------------------------


def giant(arguments: argparse.Namespace, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Peaks of a large model and of a tiny one, after each backend; adds to what was found."""
    import keras

    from benchmarks.zoo_memory import measure, write_checkpoint

    found: dict[str, Any] = {"backends": {}, **before}
    found |= {"model": arguments.giant, "side": arguments.side}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tiny, large = Path(folder, "tiny.safetensors"), Path(folder, "large.safetensors")
        tiny_name = "test_vit"
        write_checkpoint(tiny_name, tiny, "float32")
        found["weight_bytes"] = 4 * write_checkpoint(arguments.giant, large, "float32")
        keras.backend.clear_session()
        for backend in arguments.backends:
            answers = {
                key: measure(
                    sys.executable, GIANT, name, path, str(side), arguments.giant_format,
                    KERAS_BACKEND=backend,
                )
                for key, name, path, side in (
                    ("tiny", tiny_name, tiny, 160),
                    ("large", arguments.giant, large, arguments.side),
                )
            }  # fmt: skip
            own = max(answers["tiny"][k]["peak"] for k in ("created", "predicted"))
            peak = max(answers["large"][k]["peak"] for k in ("created", "predicted"))
            found["backends"][backend] = {
                **answers,
                "framework_bytes": own,
                "peak_bytes": peak,
                "added_over_float": (peak - own) / found["weight_bytes"],
            }
            print(backend, found["backends"][backend], flush=True)
            yield found


# --- Training -----------------------------------------------------------------------------------


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """What XLA plans for a step; nothing is run."""
    import numpy as np

    images = np.zeros((arguments.training_batch, 224, 224, 3), "float32")
    labels = np.zeros(arguments.training_batch, "int32")
    found: dict[str, Any] = {}
    for format in arguments.training_formats:
        model = create(arguments.training_model, format, None)
        memory = compile_jax(model, images, labels)[0].memory_analysis()
        found[format] = {
            "kernel_bytes": kernel_bytes(model)[0],
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
        print(format, found[format], file=sys.stderr, flush=True)
    return found


# --- The page -----------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    facts = result["machine"]
    lines = ["# Memory of quantised kernels", ""]
    if "kernels" in result:
        lines += kernels_section(result["kernels"])
    if "giant" in result:
        lines += giant_section(result["giant"])
    if "training" in result:
        lines += training_section(result["training"])
    lines += [
        f"{facts['processor']}, Python {facts['python']}, Keras {facts['keras']}, TensorFlow "
        f"{facts['tensorflow']}, JAX {facts['jax']}, {facts['date']}. Repeat it with "
        "`python -m benchmarks.quantization_memory`.",
    ]
    return "\n".join(lines) + "\n"


def kernels_section(models: dict[str, Any]) -> list[str]:
    lines = [
        "## Bytes of kernels",
        "",
        f"All kernels of a LoRA model with {CLASSES} classes, against float32: those that stay in "
        "float are counted in (the head, which is trained, and kernels too small to gain). On disk "
        "is what the weights in the `.keras` file take, less all the model's variables that hold "
        f"no kernel; the whole file has the adapter of rank {RANK}, too. int4 has groups of 64 "
        "rows.",
        "",
        "| model | kernels | in memory | on disk | wanted | whole `.keras` file |",
        "|---|---|---|---|---|---|",
    ]
    for name, formats in models.items():
        for format, found in formats.items():
            wanted = f"≤ {WANTED[format]:.2f}" if format in WANTED else ""
            lines.append(
                f"| {MODELS.get(name, name)} | {format} | {found['in_memory'] / 1e6:.1f} MB "
                f"({found['in_memory_over_float']:.4f}) | {found['on_disk_over_float']:.4f} "
                f"| {wanted} | {found['keras_file'] / 1e6:.1f} MB |"
            )
    return [*lines, ""]


def giant_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "## A large model",
        "",
        f"`{found['model']}` with nf4, created from a float32 safetensors file of "
        f"{found['weight_bytes'] / 1e9:.2f} GB; predicts one image of {found['side']} × "
        f"{found['side']} pixels, all in a fresh process and as Keras does by default on a CPU "
        "(XLA under JAX, a graph without XLA under TensorFlow). Peak resident memory, pages of the "
        "file that are mapped among it. The framework's own is the same with a model of no size "
        "(`test_vit`).",
        "",
        "| backend | framework's own | peak while creating | peak while predicting "
        "| (peak - own) / float32 bytes | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for backend, values in found["backends"].items():
        created, predicted = (values["large"][k]["peak"] / 1e9 for k in ("created", "predicted"))
        lines.append(
            f"| {BACKENDS[backend]} | {values['framework_bytes'] / 1e9:.2f} GB | {created:.2f} GB "
            f"| {predicted:.2f} GB | {values['added_over_float']:.3f} | ≤ {WANTED_PEAK} |"
        )
    over = [
        BACKENDS[b] for b, v in found["backends"].items() if v["added_over_float"] > WANTED_PEAK
    ]
    if over:
        lines += ["", f"More than was wanted: {', '.join(over)}."]
    return [*lines, ""]


def training_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Training: what it saves and what it does not",
        "",
        f"XLA's plan for a training step of `{found['model']}` under JAX, batch {found['batch']} "
        f"at 224 × 224 pixels, float32, LoRA of rank {RANK} with AdamW. Arguments are the kernels, "
        "all other weights, the optimizer's and the images; temporary memory is activations, "
        "gradients and dequantised kernels.",
        "",
        "| kernels | kernels alone | arguments | temporary | together |",
        "|---|---|---|---|---|",
    ]
    for format, values in found["formats"].items():
        sizes = [values[k] / 1e6 for k in ("kernel_bytes", "argument_bytes", "temp_bytes")]
        cells = " | ".join(f"{size:,.0f} MB" for size in [*sizes, sizes[1] + sizes[2]])
        lines.append(f"| {format} | {cells} |")
    base = found["formats"].get("float")
    if base and "nf4" in found["formats"]:
        packed = found["formats"]["nf4"]
        arguments, temporary = (base[k] - packed[k] for k in ("argument_bytes", "temp_bytes"))
        together = base["argument_bytes"] + base["temp_bytes"]
        lines += [
            "",
            f"Activations dominate: nf4 saves {arguments / 1e6:.0f} MB of arguments, takes "
            f"{-temporary / 1e6:.0f} MB more temporary memory, and so saves "
            f"{100 * (arguments + temporary) / together:.1f} % of it all.",
        ]
    return [*lines, ""]


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(training(arguments)))
        return
    result: dict[str, Any] = {}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result["machine"] = machine()

    def write() -> None:
        write_result(arguments.output, result)
        arguments.output.with_suffix(".md").write_text(page(result))

    if "kernels" in arguments.parts:
        for name in arguments.models:
            result.setdefault("kernels", {})[name] = kernels(name)
            write()
    if "training" in arguments.parts:
        command = [sys.executable, "-m", "benchmarks.quantization_memory", *sys.argv[1:]]
        env = {**os.environ, "KERAS_BACKEND": "jax"}
        done = subprocess.run([*command, "--worker"], env=env, stdout=subprocess.PIPE, check=True)
        result["training"] = {
            "model": arguments.training_model,
            "batch": arguments.training_batch,
            "formats": json.loads(done.stdout.splitlines()[-1]),
        }
        write()
    if "giant" in arguments.parts:
        for found in giant(arguments, result.get("giant", {})):
            result["giant"] = found
            write()


if __name__ == "__main__":
    main()
