"""What a training step of each method costs, as a multiple of LoRA's.

    python -m benchmarks.methods [--output docs/results/methods.json] [--methods dora loha lokr]

Each pair of model and backend is a fresh process, in which LoRA and the other methods are compiled
and then take turns, step after step, so that a machine that slows down slows them all. The ratio is
the median over the rounds of the step's processor time over that of LoRA's step in the same round.
Results of methods that were not asked for stay in the file, so that methods can be added later. A
table goes beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import fewer_blocks, machine, write_result

MODELS = {"vit_small_patch16_224": "ViT-S/16", "convnext_tiny": "ConvNeXt-T"}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}
RANK, CLASSES = 8, 10
FIELDS: dict[str, dict[str, Any]] = {
    # What fit would tell.
    "adalora": {"lora_options": {"total_step": 1000}},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/methods.json"))
    parser.add_argument("--methods", nargs="+", help="which methods; LoRA is always among them")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, help="keep this many blocks (per stage), for a trial")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def create(name: str, method: str, blocks: int | None) -> Any:
    """A compiled LoRA model with random weights."""
    from tfimm_lora import lora

    model = lora.create_model(
        name,
        nb_classes=CLASSES,
        lora_method=method,
        lora_rank=RANK,
        lora_train_classifier=method == "linear_probe",
        **FIELDS.get(method, {}),
        **fewer_blocks(name, blocks),
    )
    model.compile("sgd", "mean_squared_error", jit_compile=True)
    return model


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of the methods' steps, all in this process."""
    import numpy as np

    from tfimm_lora import lora
    from tfimm_lora.lora.methods import METHODS

    wanted = dict.fromkeys(["lora", *(arguments.methods or METHODS)])
    models = {method: create(name, method, arguments.blocks) for method in wanted}
    rng = np.random.default_rng(0)
    images = rng.standard_normal((arguments.batch, 224, 224, 3)).astype("float32")
    targets = np.zeros((arguments.batch, CLASSES), "float32")
    seconds: dict[str, list[float]] = {method: [] for method in models}
    for number in range(arguments.rounds + 1):
        for method, model in models.items():
            wall, before = time.perf_counter(), time.process_time()
            model.train_on_batch(images, targets)
            cpu = time.process_time() - before
            if number:  # the first step compiles
                seconds[method].append(cpu)
            else:
                spent = time.perf_counter() - wall
                print(f"  {name} {method}: first step {spent:.0f} s", file=sys.stderr, flush=True)
    found = {}
    for method, values in seconds.items():
        ratios = [v / base for v, base in zip(values, seconds["lora"], strict=True)]
        found[method] = {
            "weights": sum(int(np.prod(v.shape)) for v in models[method].trainable_variables),
            "adapted_layers": len(lora.lora_layers(models[method])),
            "cpu_seconds": [statistics.median(values), min(values), max(values)],
            "times_lora": [statistics.median(ratios), min(ratios), max(ratios)],
        }
    return found


def run(name: str, backend: str) -> dict[str, Any]:
    """Measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.methods", *sys.argv[1:]]
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [*command, "--worker", "--models", name], env=env, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} on {backend} failed.")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    facts = result["machine"]
    lines = [
        "# A training step of each method",
        "",
        "Processor time of one compiled step (`jit_compile=True`, SGD, batch "
        f"{result['batch']}, 224 × 224 pixels, rank {RANK}, default targets) as a multiple of "
        "LoRA's step, with which it took turns in one process: median, and in brackets the range, "
        f"of {result['rounds']} rounds. {facts['processor']}, {facts['cores']} cores, Python "
        f"{facts['python']}, Keras {facts['keras']}, TensorFlow {facts['tensorflow']}, JAX "
        f"{facts['jax']}, {facts['date']}.",
        "",
    ]
    for name, backends in result["models"].items():
        columns = [b for b in BACKENDS if b in backends]
        base = ", ".join(
            f"{backends[b]['lora']['cpu_seconds'][0]:.2f} s on {BACKENDS[b]}" for b in columns
        )
        lines += [
            f"## {MODELS[name]} (`{name}`)",
            "",
            f"LoRA's step: {base}.",
            "",
            "| method | weights trained | " + " | ".join(BACKENDS[b] for b in columns) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        for method in dict.fromkeys(m for b in columns for m in backends[b]):
            found = {b: backends[b][method] for b in columns if method in backends[b]}
            weights = next(iter(found.values()))["weights"]
            cells = [_cell(found[b]["times_lora"]) if b in found else "" for b in columns]
            lines.append(f"| `{method}` | {weights:,} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append("Repeat it with `python -m benchmarks.methods`.")
    return "\n".join(lines) + "\n"


def _cell(times: list[float]) -> str:
    median, least, most = times
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print(json.dumps(measure(arguments.models[0], arguments)))
        return
    result: dict[str, Any] = {"models": {}}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result |= {"machine": machine(), "batch": arguments.batch, "rounds": arguments.rounds}
    for backend in arguments.backends:
        for name in arguments.models:
            found = run(name, backend)
            result["models"].setdefault(name, {}).setdefault(backend, {}).update(found)
            write_result(arguments.output, result)
            arguments.output.with_suffix(".md").write_text(table(result))
            for method, facts in found.items():
                print(backend, name, method, [round(t, 3) for t in facts["times_lora"]], flush=True)


if __name__ == "__main__":
    main()
