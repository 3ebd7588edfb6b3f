"""A run: check the recipe and the images, train each method in a process of its own, keep all."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tfimm_lora.data import Dataset, load_dataset
from tfimm_lora.models.registry import find_entry
from tfimm_lora.tasks import TASKS
from tfimm_lora.training.config import EMBEDDED_MODEL, RunConfig
from tfimm_lora.training.console import Console
from tfimm_lora.training.environment import describe_environment
from tfimm_lora.training.errors import RecipeError
from tfimm_lora.training.events import receive
from tfimm_lora.training.files import new_folder, require_free, write_text

Report = Callable[[Path, dict[str, Any]], None]
"""Adds files (a plot, say) to the unfinished run folder, given the metrics."""


class TrainingFailed(RuntimeError):
    """A training process ended with an error; the message is that error."""


def run(
    config: RunConfig, *, console: Console | None = None, reports: Sequence[Report] = ()
) -> tuple[Path, dict[str, Any]]:
    """Trains the methods of a recipe and writes the run folder.

    The folder gets its name when everything in it is complete: ``config.yaml`` (the recipe as it
    was resolved), ``metrics.json``, ``history.csv``, ``environment.json``, ``classes.json``,
    ``log.txt``, and one folder per method with its adapter or model. A method whose process is
    killed, for lack of memory say, is recorded as failed, and the others go on.

    Every training process is a new one: it knows the package's models, not one that the caller's
    code registered with ``register_model``.

    Args:
        config: The recipe.
        console: Shows progress; by default a new one on standard output.
        reports: Functions that add files to the folder.

    Returns:
        The run folder and the content of ``metrics.json``.

    Raises:
        RecipeError: The recipe lacks a model, or the output folder is taken.
        ValueError: There is no such model or task.
        DataError: The images cannot be used.
        TrainingFailed: A method stopped with an error, or every method was killed.

    Example:
        >>> folder, metrics = run(
        ...     RunConfig(ModelSection("vit_digits"), DataConfig("digits"), output="runs/first")
        ... )
    """
    console = console or Console()
    if not config.model.name:
        raise RecipeError(
            "No model given: use --model.name, vit_tiny_patch16_224 say. "
            "'tfimm-lora models' lists all."
        )
    if config.model.name != EMBEDDED_MODEL:
        find_entry(config.model.name)
    TASKS[config.train.task]  # an unknown one is said before images are read
    config = replace(config, output=str(Path(config.output or _default_output(config))))
    require_free(str(config.output))
    dataset = load_dataset(config.data)
    console.say(f"model    {config.model.name}")
    console.say(dataset.summary())
    console.say()
    began = time.perf_counter()
    with new_folder(str(config.output)) as folder:
        job = {"config": config.to_dict(), "skipped": list(dataset.skipped)}
        write_text(folder / "job.json", json.dumps(job))
        results = {name: _train(name, folder, console) for name in config.train.method_names}
        (folder / "job.json").unlink()
        metrics = _metrics(config, dataset, results, time.perf_counter() - began)
        _write(folder, config, dataset, metrics, results)
        if all("failed" in method for method in metrics["methods"].values()):
            raise TrainingFailed("; ".join(m["failed"] for m in metrics["methods"].values()))
        for report in reports:
            report(folder, metrics)
    return Path(str(config.output)), metrics


def _default_output(config: RunConfig) -> Path:
    name = str(config.model.name).replace("/", "_")
    return Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def _train(method: str, folder: Path, console: Console) -> dict[str, Any]:
    """Runs one method's process to its end and returns its last event."""
    console.begin(method)
    with (
        open(folder / "log.txt", "a", encoding="utf-8") as log,
        subprocess.Popen(
            _command(folder, method),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=_environment(),
        ) as process,
    ):
        assert process.stdout is not None
        last: dict[str, Any] = {}
        try:
            for line in process.stdout:
                event = receive(line)
                if event is not None:
                    console.on_event(event)
                    last = event
        except BaseException:
            process.kill()
            raise
    if last.get("event") == "finished":
        console.end(_finished(last["figures"]))
        return last
    if last.get("event") == "error":
        console.end("failed")
        raise TrainingFailed(last["message"])
    failed = _how_it_ended(process.returncode, folder / "log.txt")
    console.end(failed)
    return {"event": "failed", "failed": f"{method} {failed}"}


def _command(folder: Path, method: str) -> list[str]:
    return [sys.executable, "-m", "tfimm_lora.training.worker", str(folder), method]


def _environment() -> dict[str, str]:
    """The child finds this package, and the user's modules, where the parent found them."""
    paths = [os.path.abspath(path) for path in sys.path if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _finished(figures: dict[str, Any]) -> str:
    score = next(value for name, value in figures.items() if name.startswith("val_"))
    return f"validation accuracy {score:.1%} after {figures['seconds']:.1f} s of training"


def _how_it_ended(code: int, log: Path) -> str:
    if code >= 0:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"ended with exit code {code} before it was done: {last}"
    name = signal.Signals(-code).name
    hint = ": probably out of memory, try a smaller --train.batch_size" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _metrics(
    config: RunConfig, dataset: Dataset, results: dict[str, dict[str, Any]], seconds: float
) -> dict[str, Any]:
    return {
        "score": TASKS[config.train.task].score,
        "model": config.model.name,
        "data": dataset.description,
        "classes": len(dataset.class_names),
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "skipped_images": list(dataset.skipped),
        "methods": {
            name: result.get("figures") or {"failed": result["failed"]}
            for name, result in results.items()
        },
        "seconds_in_all": seconds,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "meaning": {
            "score": "share of validation images classified rightly after the last epoch",
            "seconds": "training and validation of all epochs with the tracing or compiling of "
            "the step; without imports, building the model and reading the weights",
            "peak_memory_mb": "largest resident memory of the method's own process until the end "
            "of training, libraries included; MB are 2**20 bytes",
            "memory_before_training_mb": "resident memory before the first step: libraries, model",
            "merge_difference": "largest difference of logits before and after merging over their "
            "standard deviation, on one validation batch",
        },
    }


def _write(
    folder: Path,
    config: RunConfig,
    dataset: Dataset,
    metrics: dict[str, Any],
    results: dict[str, dict[str, Any]],
) -> None:
    # Without the folder's name, so that --config can take it again.
    recipe = replace(config, output=None).to_dict()
    write_text(folder / "config.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(folder / "classes.json", json.dumps(list(dataset.class_names), indent=2) + "\n")
    environment = describe_environment() | {
        "train_seed": config.train.seed,
        "data_seed": config.data.seed,
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    rows = [
        {"method": name, **epoch}
        for name, result in results.items()
        for epoch in result.get("history", ())
    ]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "history.csv", text.getvalue())
