"""What a training step costs on kernels of every format, as a multiple of that on float kernels.

    python -m benchmarks.quantization_steps [--output docs/results/quantization_steps.json]
        [--models convnext_tiny] [--backends jax] [--qwix-python PYTHON]

Each pair of model and backend is a fresh process, in which all formats are compiled and then take
turns, step after step, so that a machine that slows down slows them all. The ratio is the median
over the rounds of the step's processor time over that of the float model's step in the same round.
Memory is what XLA has planned for the compiled step. With ``--qwix-python`` the ViT under JAX and
``quantization_qwix.py`` (see there for its environment) run in turns, process after process.
Results that were not asked for stay in the file. A table goes beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import fewer_blocks, machine, write_result

MODELS = {"vit_small_patch16_224": "ViT-S/16", "convnext_tiny": "ConvNeXt-T"}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}
RANK, CLASSES, GROUP = 8, 10, 64
FORMATS: dict[str, dict[str, Any]] = {
    "float": {},
    "fake-int8": {"lora_quantization": "fake-int8"},
    "fake-int4": {"lora_quantization": "fake-int4", "lora_group_size": GROUP},
    "int8": {"lora_quantization": "int8"},
    "int4": {"lora_quantization": "int4", "lora_group_size": GROUP},
    "nf4": {"lora_quantization": "nf4"},
}
WANTED = {"fake-int8": 1.15, "fake-int4": 1.15, "int8": 1.1, "int4": 1.25}
QWIX = {
    "float": "float",
    "fake-int8": "fake-int8-channel",
    "fake-int4": "fake-int4-64",
    "int8": "int8-channel",
    "int4": "int4-64-minmax",
    "nf4": "nf4-64",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/quantization_steps.json"))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, help="keep this many blocks (per stage), for a trial")
    parser.add_argument("--qwix-python", help="a Python with Qwix; only the ViT under JAX is run")
    parser.add_argument("--qwix-turns", type=int, default=2, help="processes of each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- In a process of its own --------------------------------------------------------------------


def create(name: str, format: str, blocks: int | None) -> Any:
    """A compiled LoRA model with random weights."""
    import keras

    from tfimm_lora import lora

    keras.utils.set_random_seed(0)
    model = lora.create_model(
        name, nb_classes=CLASSES, lora_rank=RANK, lora_train_classifier=True,
        **FORMATS[format], **fewer_blocks(name, blocks),
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, jit_compile=True)
    return model


def kernel_bytes(model: Any) -> tuple[int, int]:
    """Bytes of all kernels as they are stored, and in float32."""
    import numpy as np

    from tfimm_lora.lora.layer import LoRALayer
    from tfimm_lora.quantization import StoredKernel

    stored = whole = 0
    for layer in model._flatten_layers():
        if isinstance(layer, LoRALayer):
            kernel = layer.kernel
            parts = kernel.variables.values() if isinstance(kernel, StoredKernel) else [kernel]
            stored += sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in parts)
            whole += 4 * int(np.prod(kernel.shape))
    return stored, whole


def compile_jax(model: Any, images: Any, labels: Any) -> tuple[Any, Any, Any]:
    """The model's step, compiled by JAX; the state and the data that it takes."""
    import jax

    model.optimizer.build(model.trainable_variables)
    # Metrics come to be in a step.
    model._symbolic_build(data_batch=(images, labels))
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    data = (jax.numpy.asarray(images), jax.numpy.asarray(labels))
    return jax.jit(model.train_step, donate_argnums=0).lower(state, data).compile(), state, data


def prepare_jax(model: Any, images: Any, labels: Any) -> tuple[Callable[[], Any], int, int]:
    """A call that takes one step; bytes of its temporary memory and of its arguments."""
    import jax

    compiled, state, data = compile_jax(model, images, labels)
    memory = compiled.memory_analysis()
    kept = [state]

    def take() -> None:
        logs, kept[0] = compiled(kept[0], data)
        jax.block_until_ready((logs, kept[0]))

    take()
    return take, memory.temp_size_in_bytes, memory.argument_size_in_bytes


def prepare_tensorflow(
    model: Any, images: Any, labels: Any, dump: Path
) -> tuple[Callable[[], Any], int, int]:
    """As :func:`prepare_jax`; the bytes come from what XLA dumps of its buffers."""
    before = set(dump.glob("*buffer-assignment.txt"))

    def take() -> None:
        model.train_on_batch(images, labels)

    take()
    texts = [path.read_text() for path in set(dump.glob("*buffer-assignment.txt")) - before]
    plans = [_planned(text) for text in texts]
    return (take, *max(plans))


def _planned(text: str) -> tuple[int, int]:
    temp = arguments = 0
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", text, re.MULTILINE):
        temp += int(size) * ("preallocated-temp" in rest)
        arguments += int(size) * bool(re.search(r"\bparameter \d", rest))
    return temp, arguments


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds and memory of the formats' steps, all in this process."""
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.batch, 224, 224, 3)).astype("float32")
    labels = rng.integers(CLASSES, size=arguments.batch)
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for format in dict.fromkeys(["float", *arguments.formats]):
        began = time.process_time()
        model = create(name, format, arguments.blocks)
        stored, whole = kernel_bytes(model)
        if keras.backend.backend() == "jax":
            steps[format], temp, taken = prepare_jax(model, images, labels)
        else:
            dump = Path(os.environ["QUANTIZATION_STEPS_DUMP"])
            steps[format], temp, taken = prepare_tensorflow(model, images, labels, dump)
        found[format] = {
            "kernel_bytes": stored,
            "kernel_bytes_over_float": stored / whole,
            "temp_bytes": temp,
            "argument_bytes": taken,
            "first_step_cpu_s": time.process_time() - began,
            "step_cpu_s": [],
            "step_wall_s": [],
        }
        seconds = found[format]["first_step_cpu_s"]
        print(f"  {name} {format}: {seconds:.0f} s, temp {temp:,}", file=sys.stderr, flush=True)
    for _ in range(arguments.rounds):
        for format, take in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            take()
            found[format]["step_cpu_s"].append(time.process_time() - cpu)
            found[format]["step_wall_s"].append(time.perf_counter() - wall)
    for facts in found.values():
        facts["times_float"] = ratio(facts["step_cpu_s"], found["float"]["step_cpu_s"])
    return found


# --- The processes ------------------------------------------------------------------------------


def ratio(values: list[float], base: list[float]) -> list[float]:
    """Median, least and largest of the ratios round by round."""
    ratios = [v / b for v, b in zip(values, base, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def run(name: str, backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.quantization_steps", "--worker", "--models", name,
        "--formats", *arguments.formats, "--batch", str(arguments.batch),
        "--rounds", str(arguments.rounds),
    ]  # fmt: skip
    if arguments.blocks:
        command += ["--blocks", str(arguments.blocks)]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if backend == "tensorflow":
            env["QUANTIZATION_STEPS_DUMP"] = folder
            env["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} on {backend} failed.")
    return json.loads(done.stdout.splitlines()[-1])


def run_qwix(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our ViT and Qwix's under JAX, in turns: the comparison, and our first turn alone."""
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    script = str(Path(__file__).with_name("quantization_qwix.py"))
    variants = [QWIX[format] for format in arguments.formats]
    steps = ["--batch", str(arguments.batch), "--steps", str(arguments.rounds)]
    for _ in range(arguments.qwix_turns):
        ours.append(run("vit_small_patch16_224", "jax", arguments))
        done = subprocess.run(
            [arguments.qwix_python, script, "--variants", *variants, *steps],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        theirs.append({line["variant"]: line for line in lines})
    versions = {k: lines[0][k] for k in ("jax", "flax", "qwix")}
    found: dict[str, Any] = {"versions": versions, "batch": arguments.batch}
    for format in arguments.formats:
        found[format] = {
            "ours": _joined([turn[format] for turn in ours]),
            "qwix": _joined([turn[QWIX[format]] for turn in theirs]),
        }
    return found, ours[0]


def _joined(turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for turn in turns for s in turn["step_cpu_s"]]
    return {
        "step_cpu_s": seconds,
        "temp_bytes": turns[0]["temp_bytes"],
        "argument_bytes": turns[0]["argument_bytes"],
    }


# --- The page -----------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    facts = result["machine"]
    every = [b["float"] for backends in result["models"].values() for b in backends.values()]
    counts = sorted({len(found["step_cpu_s"]) for found in every})
    rounds = " or ".join(map(str, counts))
    lines = [
        "# A training step on quantised kernels",
        "",
        "Processor time of one compiled step (forward, backward and AdamW; `jit_compile=True`, "
        f"batch {result['batch']}, 224 × 224 pixels, float32, LoRA of rank {RANK} on the default "
        "targets and a new head) as a multiple of the step on float kernels, with which it took "
        f"turns in one process: median, and in brackets the range, of {rounds} rounds. "
        "Temporary memory is what XLA plans for the step beside its arguments: activations, "
        "gradients and kernels that are dequantised. Kernels are all of the model's, those that "
        f"stay in float among them; int4 and fake-int4 have groups of {GROUP} rows. "
        f"{facts['processor']}, {facts['cores']} core(s), Python {facts['python']}, Keras "
        f"{facts['keras']}, TensorFlow {facts['tensorflow']}, JAX {facts['jax']}, "
        f"{facts['date']}.",
        "",
    ]
    for name, backends in result["models"].items():
        columns = [b for b in BACKENDS if b in backends]
        steps = ", ".join(
            f"{statistics.median(backends[b]['float']['step_cpu_s']):.2f} s on {BACKENDS[b]}"
            for b in columns
        )
        lines += [
            f"## {MODELS[name]} (`{name}`)",
            "",
            f"The step on float kernels: {steps}.",
            "",
            "| kernels | bytes of kernels "
            + "".join(f"| time, {BACKENDS[b]} | temporary, {BACKENDS[b]} " for b in columns)
            + "| wanted time |",
            "|---|---|" + "---|---|" * len(columns) + "---|",
        ]
        for format in FORMATS:
            found = {b: backends[b][format] for b in columns if format in backends[b]}
            if not found:
                continue
            first = next(iter(found.values()))
            size = f"{first['kernel_bytes'] / 1e6:.1f} MB ({first['kernel_bytes_over_float']:.3f})"
            cells = []
            for b in columns:
                if b not in found:
                    cells += ["", ""]
                    continue
                median, least, most = found[b]["times_float"]
                cells.append(f"{median:.2f} ({least:.2f} to {most:.2f})")
                cells.append(f"{found[b]['temp_bytes'] / 1e6:.0f} MB")
            wanted = f"≤ {WANTED[format]:.2f}" if format in WANTED else ""
            lines.append(f"| {format} | {size} | " + " | ".join(cells) + f" | {wanted} |")
        lines += ["", *missed(backends, columns), ""]
    if "qwix" in result:
        lines += qwix_section(result["qwix"])
    lines.append("Repeat it with `python -m benchmarks.quantization_steps`.")
    return "\n".join(lines) + "\n"


def missed(backends: dict[str, Any], columns: list[str]) -> list[str]:
    """Says which steps take longer than was wanted."""
    found = [
        f"{format} on {BACKENDS[b]} ({backends[b][format]['times_float'][0]:.2f})"
        for b in columns
        for format, most in WANTED.items()
        if format in backends[b] and backends[b][format]["times_float"][0] > most
    ]
    slow = f"Slower than was wanted: {', '.join(found)}."
    return [slow if found else "All are as fast as was wanted."]


def qwix_section(found: dict[str, Any]) -> list[str]:
    v = found["versions"]
    lines = [
        "## Beside Qwix",
        "",
        f"The same ViT-S/16, batch {found['batch']}, under JAX, processes of both in turns: median "
        "processor time of a step and XLA's memory (temporary + arguments). Qwix "
        f"{v['qwix']} with Flax {v['flax']} and JAX {v['jax']}: QLoRA for packed kernels, and "
        "quantised training of weights only for fake ones, on the linear layers of the blocks. "
        "The difference in time is there on float kernels, too: it comes from the models, not from "
        "the formats.",
        "",
        "| kernels | Qwix's variant | step, ours | step, Qwix | memory, ours | memory, Qwix |",
        "|---|---|---|---|---|---|",
    ]
    for format in [f for f in FORMATS if f in found]:
        cells = []
        for who in ("ours", "qwix"):
            cells.append(f"{statistics.median(found[format][who]['step_cpu_s']):.2f} s")
        for who in ("ours", "qwix"):
            temp, taken = (found[format][who][k] / 1e6 for k in ("temp_bytes", "argument_bytes"))
            cells.append(f"{temp:.0f} + {taken:.0f} MB")
        lines.append(f"| {format} | `{QWIX[format]}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(measure(arguments.models[0], arguments)))
        return
    result: dict[str, Any] = {"models": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result |= {"machine": machine(), "batch": arguments.batch, "rounds": arguments.rounds}

    def write() -> None:
        write_result(arguments.output, result)
        arguments.output.with_suffix(".md").write_text(page(result))

    if arguments.qwix_python:
        result["qwix"], first = run_qwix(arguments)
        result["models"].setdefault("vit_small_patch16_224", {}).setdefault("jax", {}).update(first)
        write()
        return
    for backend in arguments.backends:
        for name in arguments.models:
            found = run(name, backend, arguments)
            result["models"].setdefault(name, {}).setdefault(backend, {}).update(found)
            write()
            for format, facts in found.items():
                print(backend, name, format, [round(t, 3) for t in facts["times_float"]])


if __name__ == "__main__":
    main()
