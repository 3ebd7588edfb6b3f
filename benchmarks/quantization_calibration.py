"""How much features change with 4-bit kernels: rounded to nearest, and calibrated by AWQ and GPTQ.

    python -m benchmarks.quantization_calibration --weights vit_small_patch14_dinov2.safetensors \
        --data folder:clipart [--output docs/results/quantization_calibration.json]

All dense kernels of the blocks are quantised by ``quantization.convert_to_quantized_model``. The
change is the norm of the difference of the pooled features over that of the float model's, on the
images of the calibration and on as many others, both spread evenly over the training set. A table
goes beside the JSON file.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import tfimm_lora
from benchmarks.report import machine, write_result
from tfimm_lora import quantization
from tfimm_lora.data import DataConfig, Resize, load_dataset, validation_batches

WAYS: dict[str, dict[str, Any]] = {
    "rounded to nearest": {},
    "AWQ": {"algorithm": "awq"},
    "GPTQ": {"algorithm": "gptq"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="safetensors file in timm's key names")
    parser.add_argument("--data", required=True, help="folder:PATH")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--format", default="int4")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results/quantization_calibration.json")
    )
    return parser.parse_args()


def pictures(arguments: argparse.Namespace, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Images for the calibration, and others."""
    facts = model.pretrained_cfg
    resize = Resize(*model.cfg.input_size, 3, facts.interpolation, facts.crop_pct, facts.crop_mode)
    train = load_dataset(DataConfig(arguments.data), check=False).train
    preprocess = tfimm_lora.create_preprocessing(arguments.model)
    count = 2 * arguments.images
    wanted = set(np.linspace(0, len(train.labels) - 1, count).round().astype(int).tolist())
    found, place = [], 0
    for batch, _ in validation_batches(train, resize, preprocess, batch_size=32):
        values = keras.ops.convert_to_numpy(batch)
        found += [image for i, image in enumerate(values, place) if i in wanted]
        place += len(values)
    return np.stack(found[0::2]), np.stack(found[1::2])


def features(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(images, batch_size=16, verbose=0), "float64")


def change(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    size = (arguments.input_size, arguments.input_size)
    model = tfimm_lora.create_model(
        arguments.model, model_path=arguments.weights, nb_classes=0, input_size=size
    )
    seen, others = pictures(arguments, model)
    expected = [features(model, images) for images in (seen, others)]
    rows = []
    for group_size in (64, None):
        for name, options in WAYS.items():
            started = time.perf_counter()
            processor = time.process_time()
            small = quantization.convert_to_quantized_model(
                model,
                {"blocks.*": arguments.format},
                group_size,
                calibration=seen if options else None,
                **options,
            )
            took = time.perf_counter() - started, time.process_time() - processor
            changes = [
                change(features(small, images), before)
                for images, before in zip((seen, others), expected, strict=True)
            ]
            rows.append(
                {"way": name, "group_size": group_size, "seconds": took[0],
                 "processor_seconds": took[1], "seen": changes[0], "others": changes[1]}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return {
        "machine": machine(),
        "model": arguments.model,
        "format": arguments.format,
        "input_size": arguments.input_size,
        "images": arguments.images,
        "rows": rows,
    }


def page(result: dict[str, Any]) -> str:
    where = result["machine"]
    lines = [
        "# Calibration of 4-bit kernels",
        "",
        f"Change of the pooled features of `{result['model']}` "
        f"({result['input_size']} × {result['input_size']} pixels) when all dense kernels of its "
        f"blocks are {result['format']}: norm of the difference over the norm, on the "
        f"{result['images']} images of the calibration and on {result['images']} others. "
        "Processor time is that of the whole conversion, reading what layers read included. "
        f"{where['processor']}, {where['cores']} core(s), Python {where['python']}, Keras "
        f"{where['keras']}, TensorFlow {where['tensorflow']}, {where['date']}.",
        "",
        "| rows of a group | kernels | calibration images | other images | processor time |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['group_size'] or 'all'} | {row['way']} | {row['seen']:.3f} | {row['others']:.3f} "
        f"| {row['processor_seconds']:.1f} s |"
        for row in result["rows"]
    ]
    return "\n".join(
        [*lines, "", "Repeat it with `python -m benchmarks.quantization_calibration`."]
    )


def main() -> None:
    arguments = parse()
    result = measure(arguments)
    write_result(arguments.output, result)
    arguments.output.with_suffix(".md").write_text(page(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
