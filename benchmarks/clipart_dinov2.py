"""Linear probe, LoRA and full fine-tuning of one checkpoint on one folder of images, over seeds.

    python benchmarks/clipart_dinov2.py --weights vit_small_patch14_dinov2.safetensors \
        --data folder:clipart --output docs/results/clipart_dinov2

Each method has its own rate and number of epochs, chosen on a seed that is not reported (see
``--help``). The probe is trained on features that are computed once, of the images and of their
mirror images, so it may see them many more times than the others at a fraction of the price.
Finished runs are kept in the JSON file, and a restarted script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import tfimm_lora
from tfimm_lora.data import DataConfig, Resize, load_dataset, validation_batches
from tfimm_lora.data.dataset import Dataset
from tfimm_lora.training import LoraSection, ModelSection, RunConfig, TrainSection
from tfimm_lora.training.config import LABELS
from tfimm_lora.training.files import write_text
from tfimm_lora.training.fit import Fit, fit_method
from tfimm_lora.training.schedules import make_optimizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="safetensors file in timm's key names")
    parser.add_argument("--data", required=True, help="folder:PATH")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--output", required=True, help="path of the .json and .md, no suffix")
    parser.add_argument("--methods", nargs="+", default=["linear_probe", "lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--input-size", type=int, default=112)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--probe-epochs", type=int, default=100)
    parser.add_argument("--probe-rate", type=float, default=3e-3)
    parser.add_argument("--lora-epochs", type=int, default=5)
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--full-epochs", type=int, default=5)
    parser.add_argument("--full-rate", type=float, default=5e-5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--note", default="", help="a sentence for the table's caption")
    return parser.parse_args()


def recipe(arguments: argparse.Namespace, method: str, seed: int) -> RunConfig:
    prefix = method.removeprefix("linear_")
    epochs, rate = (getattr(arguments, f"{prefix}_{name}") for name in ("epochs", "rate"))
    return RunConfig(
        model=ModelSection(
            arguments.model, path=arguments.weights, input_size=arguments.input_size
        ),
        data=DataConfig(arguments.data),
        lora=LoraSection(rank=arguments.rank),
        train=TrainSection(
            methods=method,
            epochs=epochs,
            batch_size=arguments.batch_size,
            validate_every=epochs,
            learning_rate=rate,
            precision=arguments.precision,
            seed=seed,
        ),
    )


def extract_features(config: RunConfig, dataset: Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pooled features of the training images, of their mirror images, and for validation."""
    model = tfimm_lora.create_model(config.model.name, nb_classes=0, **config.model.arguments())
    facts, cfg = model.pretrained_cfg, model.cfg
    resize = Resize(*cfg.input_size, 3, facts.interpolation, facts.crop_pct, facts.crop_mode)
    preprocess = tfimm_lora.create_preprocessing(config.model.name)
    parts = []
    for images in dataset.images:
        batches = validation_batches(images, resize, preprocess, batch_size=32)
        parts.append((model.predict(batches, verbose=0), images.labels))
        if images is dataset.train:
            mirrored = batches.map(lambda x, y: (x[:, :, ::-1], y))
            parts.append((model.predict(mirrored, verbose=0), images.labels))
    return parts


def probe(config: RunConfig, features: list[tuple[np.ndarray, np.ndarray]], classes: int) -> dict:
    keras.utils.set_random_seed(config.train.seed)
    *train, (val_x, val_y) = features
    x, y = (np.concatenate(values) for values in zip(*train, strict=True))
    head = keras.Sequential([keras.layers.Dense(classes)])
    steps = config.train.epochs * -(-len(x) // 64)
    head.compile(
        make_optimizer(config.train.rate("linear_probe"), steps, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    began = time.process_time()
    history = head.fit(x, y, batch_size=64, epochs=config.train.epochs, verbose=0).history
    accuracy = head.evaluate(val_x, val_y, verbose=0)[1]
    return {
        "val_accuracy": float(accuracy),
        "train_accuracy": float(history["accuracy"][-1]),
        "trainable_weights": head.count_params(),
        "cpu_seconds": time.process_time() - began,
    }


def measure(arguments: argparse.Namespace, method: str, seed: int, kept: dict) -> dict:
    config = recipe(arguments, method, seed)
    dataset = load_dataset(config.data)
    if method == "linear_probe":
        if "features" not in kept:
            began = time.process_time()
            kept["features"] = extract_features(config, dataset)
            kept["cpu_seconds"] = time.process_time() - began
        figures = probe(config, kept["features"], len(dataset.class_names))
        figures["cpu_seconds_for_features"] = kept["cpu_seconds"]
    else:
        figures, _ = train(config, method, dataset)
        keras.backend.clear_session()
    return {"method": method, "seed": seed} | figures


def train(config: RunConfig, method: str, dataset: Dataset) -> tuple[dict, Fit]:
    """Trains one method; returns what is kept of its figures, and everything."""

    def show(event: str, **values: object) -> None:
        if event == "epoch":
            print(f"  {values}", flush=True)

    fit = fit_method(config, method, dataset, show)
    # All runs share this process, so its peak memory is nobody's.
    figures = {k: v for k, v in fit.figures.items() if "memory" not in k}
    return figures | {"history": fit.history}, fit


def facts(dataset: Dataset) -> dict:
    """What goes into the record beside the runs."""
    return {
        "data": {
            "train_images": len(dataset.train),
            "val_images": len(dataset.val),
            "classes": len(dataset.class_names),
        },
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }


def table(results: dict) -> str:
    lines = [
        "| method | validation accuracy, mean ± standard deviation | by seed | trainable weights "
        "| CPU seconds per run |",
        "|---|---|---|---|---|",
    ]
    for method in results["settings"]["methods"]:
        runs = [run for run in results["runs"] if run["method"] == method]
        if not runs:
            continue
        scores = [100 * run["val_accuracy"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        seconds = statistics.mean(run["cpu_seconds"] for run in runs)
        extra = runs[0].get("cpu_seconds_for_features")
        lines.append(
            f"| {LABELS[method]} | {statistics.mean(scores):.1f} ± {spread:.1f} % "
            f"| {', '.join(f'{score:.1f}' for score in scores)} "
            f"| {runs[0]['trainable_weights']:,} "
            f"| {seconds:.0f}{f' + {extra:.0f} for the features' if extra else ''} |"
        )
    return "\n".join(lines)


def page(results: dict) -> str:
    s, data = results["settings"], results["data"]
    return f"""# {s["model"]} on clip art: linear probe, LoRA, full fine-tuning

{table(results)}

{data["train_images"]} training and {data["val_images"]} validation images of {data["classes"]}
classes, {s["input_size"]} × {s["input_size"]} pixels, batch {s["batch_size"]}, {s["precision"]}.
Accuracy is that after the last epoch. LoRA has rank {s["rank"]} on all linear layers of the
blocks, and trains the head too. AdamW with warm-up and cosine, weight decay 0.01; random
mirroring, and for LoRA and full fine-tuning random shifts of up to 10 %.
Rates and epochs: linear probe {s["probe_rate"]:g}, {s["probe_epochs"]} (on features computed
once, of the images and of their mirror images); LoRA {s["lora_rate"]:g}, {s["lora_epochs"]}; full
fine-tuning {s["full_rate"]:g}, {s["full_epochs"]}. {s["note"]}

Made by `benchmarks/clipart_dinov2.py` on {results["date"]} (Python {results["python"]}, Keras
{results["keras"]}); every run and every epoch is in the JSON file beside this page.
"""


def main() -> None:
    arguments = parse()
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = output.with_suffix(".json")
    runs = json.loads(record.read_text())["runs"] if record.exists() else []
    done = {(run["method"], run["seed"]) for run in runs}
    dataset = load_dataset(DataConfig(arguments.data), check=False)
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("output", "weights", "data")
    }
    kept: dict = {}
    wanted = [(method, seed) for method in arguments.methods for seed in arguments.seeds]
    for method, seed in [run for run in wanted if run not in done]:
        runs.append(measure(arguments, method, seed, kept))
        print(json.dumps({k: v for k, v in runs[-1].items() if k != "history"}), flush=True)
        results = {
            "settings": settings | {"weights": Path(arguments.weights).name},
            **facts(dataset),
            "runs": runs,
        }
        write_text(record, json.dumps(results, indent=1) + "\n")
        write_text(output.with_suffix(".md"), page(results))


if __name__ == "__main__":
    main()
