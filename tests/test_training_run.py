"""What a run does around its training processes; the processes themselves are stand-ins here."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

from tfimm_lora.evaluation import comparison_table, plot_run
from tfimm_lora.training import (
    Console,
    DataConfig,
    ModelSection,
    RecipeError,
    RunConfig,
    TrainingFailed,
    TrainSection,
    run,
)
from tfimm_lora.training import run as run_function

RUN_MODULE = sys.modules[run_function.__module__]
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
# What tfimm_lora.training.events.send writes, without the seconds that importing it would take.
SEND = """
import json
def send(event, **values):
    print("\\x1e" + json.dumps({"event": event, **values}), flush=True)
"""
ERROR = f"""{SEND}
send("error", kind="ValueError", message="targets match nothing")
"""
WORKS = f"""{SEND}
print("chatter that is no event")
send("started", trainable=12, weights=100, epochs=2)
history = []
for epoch in (1, 2):
    history.append(dict(epoch=epoch, seconds=0.5, accuracy=0.5, loss=1.0, val_loss=1.0,
                        val_accuracy=0.4 + epoch / 10))
    send("step", epoch=epoch, step=1, steps=2)
    send("epoch", **history[-1])
send("saving")
figures = dict(val_accuracy=0.6, trainable_weights=12, weights=100, seconds=1.0,
               peak_memory_mb=None)
send("finished", figures=figures, history=history)
"""


def recipe(output, **train):
    return RunConfig(
        ModelSection("vit_digits"),
        DataConfig("digits", train_images_per_class=2),
        train=TrainSection(epochs=2, **train),
        output=str(output),
    )


@pytest.fixture
def stand_in(monkeypatch):
    """Runs a piece of Python, chosen per method, in place of the training process."""

    def use(**code):
        monkeypatch.setattr(
            RUN_MODULE, "_command", lambda folder, method: [sys.executable, "-c", code[method]]
        )

    return use


def test_results_are_kept(stand_in, tmp_path):
    stand_in(lora=WORKS, full=WORKS)
    stream = io.StringIO()
    config = recipe(tmp_path / "first", methods=["lora", "full"])
    folder, metrics = run(config, console=Console(stream), reports=[plot_run])
    assert folder == tmp_path / "first"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.json", "history.csv", "environment.json", "classes.json",
        "comparison.png", "log.txt",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [(row["method"], row["epoch"]) for row in rows] == [
        ("lora", "1"), ("lora", "2"), ("full", "1"), ("full", "2")
    ]  # fmt: skip
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = stream.getvalue()
    assert "20 to train on (2 per class)" in shown
    assert "epoch 2/2" in shown and "validation accuracy 60.0%" in shown
    assert "\r" not in shown and "\x1b" not in shown, "no live line where nobody watches"
    assert "60.0%" in comparison_table(metrics) and "12 (12.0%)" in comparison_table(metrics)


def test_a_killed_method_does_not_take_the_others_along(stand_in, tmp_path):
    stand_in(lora=WORKS, full=KILLED)
    config = recipe(tmp_path / "first", methods=["full", "lora"])
    folder, metrics = run(config, console=Console(quiet=True), reports=[plot_run])
    assert "killed by SIGKILL" in metrics["methods"]["full"]["failed"]
    assert "--train.batch_size" in metrics["methods"]["full"]["failed"]
    assert metrics["methods"]["lora"]["val_accuracy"] == 0.6
    assert "failed" in comparison_table(metrics)
    assert (folder / "comparison.png").is_file()


def test_all_killed_leaves_no_folder(stand_in, tmp_path):
    stand_in(lora=KILLED)
    with pytest.raises(TrainingFailed, match=r"SIGKILL"):
        run(recipe(tmp_path / "first"), console=Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_crash_is_told_in_its_own_words(stand_in, tmp_path):
    stand_in(lora="raise SystemError('the library is broken')")
    with pytest.raises(TrainingFailed, match=r"exit code 1 .*the library is broken"):
        run(recipe(tmp_path / "first"), console=Console(quiet=True))


def test_an_error_ends_the_run_with_its_message(stand_in, tmp_path):
    stand_in(lora=ERROR, full=WORKS)
    with pytest.raises(TrainingFailed, match=r"targets match nothing"):
        run(recipe(tmp_path / "first", methods=["full", "lora"]), console=Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_failing_report_leaves_no_folder(stand_in, tmp_path):
    def full_disk(folder, metrics):
        raise OSError(28, "No space left on device")

    stand_in(lora=WORKS)
    with pytest.raises(OSError, match=r"No space left"):
        run(recipe(tmp_path / "first"), console=Console(quiet=True), reports=[full_disk])
    assert not list(tmp_path.iterdir())


def test_live_line_on_a_terminal(stand_in, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stand_in(lora=WORKS)
    stream = Terminal()
    run(recipe(tmp_path / "first"), console=Console(stream))
    shown = stream.getvalue()
    assert "\r" in shown and "━" in shown
    lasting = [line.rpartition("\x1b[2K")[2] for line in shown.split("\n")]
    assert sum("LoRA" in line for line in lasting) == 1, "one line per method stays"


def test_no_model_and_unknown_model(tmp_path):
    with pytest.raises(RecipeError, match=r"use --model.name"):
        run(RunConfig(data=DataConfig("digits")), console=Console(quiet=True))
    with pytest.raises(ValueError, match=r"Did you mean 'vit_tiny_patch16_224'"):
        run(RunConfig(ModelSection("vit_tiny_patch16_24")), console=Console(quiet=True))


def test_taken_output_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "results.txt").write_text("old")
    with pytest.raises(RecipeError, match=r"exists already"):
        run(recipe(tmp_path), console=Console(quiet=True))
