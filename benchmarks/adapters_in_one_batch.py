"""Many adapters in one compiled call, against one call for each adapter, in one run.

    python -m benchmarks.adapters_in_one_batch --output docs/results/adapters_in_one_batch.json

A batch of images, spread evenly over N LoRA adapters of one ViT, is answered in three ways that
take turns: ``one call`` gives every image its adapter; ``call by call`` puts the weights of the
adapters into a model with one adapter, one after the other, and gives each its images; ``base`` is
the model without adapters. Everything is compiled before it is timed. Writes the .json file and a
table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import machine, write_result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the .json file")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--adapters", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", help="measure here, with this backend, and print JSON")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of this process's backend."""
    import keras
    import numpy as np

    import tfimm_lora
    from tfimm_lora import lora

    generator = np.random.default_rng(0)

    def compiled(model: Any) -> Any:
        model.compile(jit_compile=True)
        return model

    base = compiled(tfimm_lora.create_model(arguments.model))
    fields = {"lora_rank": arguments.rank, "lora_train_classifier": False}
    single = compiled(lora.convert_to_lora_model(base, **fields))
    found = []
    for count in arguments.adapters:
        names = [f"adapter{i}" for i in range(count)]
        model = lora.convert_to_lora_model(base, lora_adapter_name=names[0], **fields)
        for name in names[1:]:
            lora.add_adapter(model, name, **fields)
        for variable in model.variables:
            if "kernel_lora_b" in variable.name:
                variable.assign(0.02 * generator.standard_normal(variable.shape))
        compiled(model)
        slots = [v for layer in lora.lora_layers(single) for v in layer.lora_weights]
        weights = {
            name: [
                keras.ops.convert_to_numpy(v)
                for layer in lora.lora_layers(model)
                for v in layer.adapters[name].variables
            ]
            for name in names
        }
        for size in arguments.batches:
            shape = (size, *model.cfg.input_size, 3)
            images = generator.standard_normal(shape).astype("float32")
            ids = np.arange(size) % count
            parts = {name: images[ids == i] for i, name in enumerate(names)}

            def one_call(model: Any = model, images: Any = images, ids: Any = ids) -> Any:
                return model.predict_on_batch({"image": images, "adapter": ids})

            def call_by_call(
                ids: Any = ids, parts: Any = parts, slots: Any = slots, weights: Any = weights
            ) -> Any:
                outputs = np.empty((len(ids), 1000), "float32")
                for i, (name, part) in enumerate(parts.items()):
                    for slot, value in zip(slots, weights[name], strict=True):
                        slot.assign(value)
                    outputs[ids == i] = single.predict_on_batch(part)
                return outputs

            def of_base(images: Any = images) -> Any:
                return base.predict_on_batch(images)

            ways: dict[str, Callable[[], Any]] = {
                "one call": one_call, "call by call": call_by_call, "base": of_base
            }  # fmt: skip
            difference = np.abs(one_call() - call_by_call()).max()
            seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
            for number in range(arguments.rounds + 1):
                for way, call in ways.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    call()
                    times = [time.perf_counter() - wall, time.process_time() - cpu]
                    if number:
                        seconds[way].append(times)
            found.append(
                {
                    "backend": keras.backend.backend(),
                    "adapters": count,
                    "batch": size,
                    "largest difference": float(difference),
                    **{
                        f"{way} {kind}": statistics.median(pair[place] for pair in pairs)
                        for way, pairs in seconds.items()
                        for place, kind in enumerate(("wall", "cpu"))
                    },
                    **{
                        f"{way} over one call": statistics.median(
                            other[1] / one[1]
                            for other, one in zip(seconds[way], seconds["one call"], strict=True)
                        )
                        for way in ("call by call", "base")
                    },
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "| backend | adapters | batch | one call (images/s) | call by call (images/s) | base "
        "(images/s) | speed-up | of the base's speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["measurements"]:
        speeds = [
            f"{row['batch'] / row[f'{way} cpu']:.1f}"
            for way in ("one call", "call by call", "base")
        ]
        lines.append(
            f"| {row['backend']} | {row['adapters']} | {row['batch']} | {' | '.join(speeds)} | "
            f"{row['call by call over one call']:.2f} | {100 * row['base over one call']:.0f} % |"
        )
    facts = result["machine"]
    return (
        f"# Many adapters in one batch\n\n{result['model']}, LoRA of rank {result['rank']} on all "
        "linear layers of the blocks, images spread evenly over the adapters. Seconds are CPU time "
        f"of {facts['cores']} cores ({facts['processor']}), medians of {result['rounds']} rounds; "
        "ratios are medians of the ratios within a round. *Call by call* puts each adapter's "
        "weights into a model with one adapter in turn and predicts its images; all is compiled. "
        "Made by `python -m benchmarks.adapters_in_one_batch`.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    arguments = parse()
    if arguments.backend:
        print(json.dumps(measure(arguments)))
        return
    result: dict[str, Any] = {
        "machine": machine(),
        "model": arguments.model,
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "measurements": [],
    }
    for backend in ("tensorflow", "jax"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.adapters_in_one_batch", *sys.argv[1:]]
            + ["--backend", backend],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result["measurements"] += json.loads(done.stdout.splitlines()[-1])
    write_result(arguments.output, result)
    arguments.output.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
