"""LoRA on kernels of every format: one checkpoint, one folder of images, over seeds.

    python -m benchmarks.quantization_clipart --weights vit_small_patch14_dinov2.safetensors \
        --data folder:clipart --output docs/results/quantization_clipart

The recipe is that of LoRA in ``clipart_dinov2.py``; only the format of the frozen kernels differs.
Finished runs are kept in the JSON file, and a restarted script goes on where it stopped. With
``--keep FOLDER`` the adapters of QA-LoRA are kept there, and ``--merge`` merges them into quantised
regular models and adds the accuracy of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from benchmarks import clipart_dinov2 as clipart
from tfimm_lora import lora
from tfimm_lora.data import DataConfig, load_dataset
from tfimm_lora.training import LoraSection, RunConfig
from tfimm_lora.training.files import write_text
from tfimm_lora.training.fit import make_batches
from tfimm_lora.training.methods import METHODS

GROUP = 64
QALORA: dict[str, Any] = {
    "method": "qalora",
    "options": {"group_size": GROUP},
    "quantization": "int4",
    "group_size": GROUP,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {},
    "fake-int8": {"quantization": "fake-int8"},
    "int8": {"quantization": "int8"},
    "fake-int4": {"quantization": "fake-int4", "group_size": GROUP},
    "int4": {"quantization": "int4", "group_size": GROUP},
    "int4, GPTQ": {},
    "nf4": {"quantization": "nf4"},
    "QA-LoRA int4": QALORA,
    "QA-LoRA int4, rate 0.003": QALORA,
}
CALIBRATED = "int4, GPTQ"
RATES = {"QA-LoRA int4, rate 0.003": 3e-3}
WANTED_POINTS = 2.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="safetensors file in timm's key names")
    parser.add_argument("--data", required=True, help="folder:PATH")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--output", required=True, help="path of the .json and .md, no suffix")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--input-size", type=int, default=98)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lora-epochs", type=int, default=4)
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--note", default="", help="a sentence for the page")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--keep", type=Path, help="a folder for the adapters of QA-LoRA")
    parser.add_argument("--merge", action="store_true", help="merge those in --keep, train nothing")
    return parser.parse_args()


def recipe(arguments: argparse.Namespace, variant: str, seed: int) -> RunConfig:
    config = clipart.recipe(arguments, "lora", seed)
    section = LoraSection(rank=arguments.rank, **VARIANTS[variant])
    train = config.train
    if variant in RATES:
        train = dataclasses.replace(train, learning_rate=RATES[variant])
    return dataclasses.replace(config, lora=section, train=train)


def adapter_folder(arguments: argparse.Namespace, config: RunConfig) -> Path:
    return arguments.keep / f"qalora-{config.train.learning_rate}-{config.train.seed}"


def measure(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    config = recipe(arguments, variant, seed)
    method = CALIBRATED if variant == CALIBRATED else "lora"
    figures, fit = clipart.train(config, method, load_dataset(config.data))
    if arguments.keep and config.lora.method == "qalora":
        lora.save_adapter(fit.model, adapter_folder(arguments, config))
    keras.backend.clear_session()
    return {"variant": variant, "seed": seed} | figures


@METHODS.register(CALIBRATED)
def create_calibrated(config: RunConfig, classes: int) -> keras.Model:
    """A LoRA model with int4 kernels that GPTQ has calibrated on 32 training images."""
    model = METHODS["lora"](config, classes)
    batches, _ = make_batches(config, model, load_dataset(config.data))
    images = [batch[0] for _, batch in zip(range(2), batches, strict=False)]
    lora.quantize(model, "int4", group_size=GROUP, calibration=images)
    return model


def merge(arguments: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and logits of a trained QA-LoRA model before and after it is merged."""
    config = recipe(arguments, run["variant"], run["seed"])
    dataset = load_dataset(config.data)
    keras.utils.set_random_seed(run["seed"])
    model = METHODS["lora"](config, len(dataset.class_names))
    lora.load_adapter(model, adapter_folder(arguments, config), check_base=False)
    merged = lora.convert_to_regular_model(model, keep_quantized=True)
    _, validation = make_batches(config, model, dataset)
    before, after = (m.predict(validation, verbose=0) for m in (model, merged))
    labels = dataset.val.labels
    return {
        "val_accuracy_unmerged": float(np.mean(before.argmax(-1) == labels)),
        "val_accuracy_merged": float(np.mean(after.argmax(-1) == labels)),
        "largest_logit": float(np.abs(before).max()),
        "largest_logit_difference": float(np.abs(after - before).max()),
    }


def scores(results: dict, variant: str) -> dict[int, float]:
    """Accuracies in percent by seed."""
    runs = [run for run in results["runs"] if run["variant"] == variant]
    return {run["seed"]: 100 * run["val_accuracy"] for run in sorted(runs, key=_seed)}


def _seed(run: dict) -> int:
    return run["seed"]


def change(results: dict, variant: str) -> float | None:
    """Mean difference to float over the seeds that both have; ``None`` if there are none."""
    base, found = scores(results, "float"), scores(results, variant)
    common = sorted(set(base) & set(found))
    return statistics.mean(found[s] - base[s] for s in common) if common else None


def table(results: dict) -> str:
    lines = [
        "| kernels | validation accuracy, mean ± standard deviation | by seed "
        "| difference to float | CPU seconds per run |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        found = list(scores(results, variant).values())
        if not found:
            continue
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        seconds = statistics.mean(
            run["cpu_seconds"] for run in results["runs"] if run["variant"] == variant
        )
        difference = change(results, variant)
        shown = "" if difference is None or variant == "float" else f"{difference:+.1f} points"
        lines.append(
            f"| {variant} | {statistics.mean(found):.1f}{spread} % "
            f"| {', '.join(f'{score:.1f}' for score in found)} "
            f"| {shown} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def verdict(results: dict) -> str:
    """Says of every variant whether it is as near to float as was wanted."""
    base = scores(results, "float")
    lines = []
    for variant in VARIANTS:
        found, difference = scores(results, variant), change(results, variant)
        if variant == "float" or difference is None:
            continue
        missing = sorted(set(base) - set(found))
        some = f" (seeds {', '.join(map(str, missing))} missing)" if missing else ""
        if "int8" in variant:
            own = [base[s] for s in base if s in found]
            mean = statistics.mean(found.values())
            inside = min(own) <= mean <= max(own)
            lines.append(
                f"- {variant}: the mean is {'within' if inside else 'not within'} the range of the "
                f"float runs of the same seeds ({min(own):.1f} to {max(own):.1f} %){some}."
            )
        else:
            inside = abs(difference) <= WANTED_POINTS
            lines.append(
                f"- {variant}: {difference:+.1f} points, {'within' if inside else 'not within'} "
                f"{WANTED_POINTS:.0f} points of float{some}."
            )
    return "\n".join(lines)


def merged_table(results: dict) -> str:
    runs = [run for run in results["runs"] if "merged" in run]
    if not runs:
        return ""
    lines = [
        "",
        "## QA-LoRA merged into the zero points",
        "",
        "| seed (rate) | accuracy, unmerged | accuracy, merged and quantised "
        "| largest difference of a logit | largest logit |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        found = run["merged"]
        lines.append(
            f"| {run['seed']} ({run['learning_rate']:g}) "
            f"| {100 * found['val_accuracy_unmerged']:.1f} % "
            f"| {100 * found['val_accuracy_merged']:.1f} % "
            f"| {found['largest_logit_difference']:.1e} | {found['largest_logit']:.1f} |"
        )
    lines += [
        "",
        "`lora.convert_to_regular_model(model, keep_quantized=True)` of the trained models, on all",
        "validation images.",
        "",
    ]
    return "\n".join(lines)


def page(results: dict) -> str:
    s, data = results["settings"], results["data"]
    return f"""# {s["model"]} on clip art: LoRA on quantised kernels

{table(results)}

{verdict(results)}

{data["train_images"]} training and {data["val_images"]} validation images of {data["classes"]}
classes, {s["input_size"]} × {s["input_size"]} pixels, batch {s["batch_size"]}, {s["precision"]},
{s["lora_epochs"]} epochs at {s["lora_rate"]:g}; one validation image is
{100 / data["val_images"]:.2f} points. The recipe is that of LoRA in
[the comparison of methods](clipart_dinov2.md), at {s["input_size"]} pixels to fit into an hour on
one core. Rank {s["rank"]} on all linear layers of the blocks, and the head, which stays in float.
int8 has a scale for each output channel, int4 one and a zero point for {GROUP} input rows, nf4 one
for 64, quantised again. GPTQ has chosen codes by 32 training images before the training, with
`lora.quantize(model, "int4", group_size={GROUP}, calibration=images)`. The fake formats round to
the values of the packed ones. QA-LoRA reads the sums of {GROUP} inputs. Accuracy is that after the
last epoch; differences are means over the seeds
that both have.{" " + s["note"] if s["note"] else ""}
{merged_table(results)}
Made by `benchmarks/quantization_clipart.py` on {results["date"]} (Python {results["python"]}, Keras
{results["keras"]}, {results["backend"]}); every run and every epoch is in the JSON file beside this
page.
"""


def main() -> None:
    arguments = parse()
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = output.with_suffix(".json")
    runs = json.loads(record.read_text())["runs"] if record.exists() else []
    dataset = load_dataset(DataConfig(arguments.data), check=False)
    hidden = ("output", "weights", "data", "keep", "merge")
    settings = {key: value for key, value in vars(arguments).items() if key not in hidden}

    def write() -> None:
        results = {
            "settings": settings | {"weights": Path(arguments.weights).name},
            **clipart.facts(dataset),
            "runs": runs,
        }
        write_text(record, json.dumps(results, indent=1) + "\n")
        write_text(output.with_suffix(".md"), page(results))

    if arguments.merge:
        for run in runs:
            if VARIANTS[run["variant"]].get("method") == "qalora" and "merged" not in run:
                run["merged"] = merge(arguments, run)
                print(run["variant"], run["seed"], run["merged"], flush=True)
                write()
    done = {(run["variant"], run["seed"]) for run in runs}
    for seed in [] if arguments.merge else arguments.seeds:
        for variant in [v for v in arguments.variants if (v, seed) not in done]:
            runs.append(measure(arguments, variant, seed))
            shown = {k: v for k, v in runs[-1].items() if k != "history"}
            print(json.dumps(shown), flush=True)
            write()
    write()


if __name__ == "__main__":
    main()
