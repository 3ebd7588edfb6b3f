"""The command line, as a person types it: in processes of their own where that matters."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import yaml

import tfimm_lora
from tfimm_lora.cli.main import main
from tfimm_lora.training.recipes import recipe_path

COMMAND = [sys.executable, "-m", "tfimm_lora.cli"]


def type_in(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def refuse(capsys, *arguments):
    """Runs a command that is typed wrongly and returns its message and exit code."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return capsys.readouterr().err, code


# --- Quick answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["models"]])
def test_help_needs_no_keras(arguments):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tfimm_lora.cli", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "tfimm_lora.cli.main" in imported
    assert not {"keras", "tensorflow", "jax", "matplotlib.pyplot"} & imported


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert tfimm_lora.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for option in ("--config", "--print_config", "--model.name", "--data.skip_unreadable",
                   "--lora.rank_pattern", "--train.jit_compile", "--output"):  # fmt: skip
        assert option in shown
    assert "``" not in shown


def test_models_table(capsys):
    assert main(["models", "convnext_tiny*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = ["model", "weights (M)", "input", "classes", "licence", "default tag"]
    assert re.split(r"\s{2,}", lines[0]) == columns
    assert re.split(r"\s{2,}", lines[2])[:3] == ["convnext_tiny", "28.6", "224 × 224"]
    names = [line.split()[0] for line in lines[2:]]
    assert names == tfimm_lora.list_models("convnext_tiny*")
    assert main(["models", "convnext_tiny*", "--tags", "--pretrained"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == tfimm_lora.list_models("convnext_tiny*", pretrained=True, include_tags=True)


def test_print_config_is_a_recipe(capsys, tmp_path):
    """What --print_config prints can be given back by --config, and options override it."""
    with pytest.raises(SystemExit) as stop:
        main(["train", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    embedded = yaml.safe_load(recipe_path("digits").read_text(encoding="utf-8"))
    assert printed["model"]["name"] == "vit_digits"
    assert printed["train"]["methods"] == embedded["train"]["methods"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(printed))
    with pytest.raises(SystemExit):
        main(
            ["train", "--config", str(tmp_path / "recipe.yaml"), "--lora.rank", "7"]
            + ["--train.learning_rate.full", "0.5", "--data.val_fraction", "0.5"]
            + ["--print_config"]
        )
    again = yaml.safe_load(capsys.readouterr().out)
    assert again["lora"].pop("rank") == 7
    assert again["data"].pop("val_fraction") == 0.5
    assert again["train"]["learning_rate"].pop("full") == 0.5
    for section, key in (("lora", "rank"), ("data", "val_fraction")):
        printed[section].pop(key)
    printed["train"]["learning_rate"].pop("full")
    assert again == printed


# --- Typed wrongly ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "--model.pretraned", "true"], "Did you mean '--model.pretrained'"),
        (["train", "--model.nam", "vit_digits"], "Did you mean '--model.name'"),
        (["train", "--lora.rnk", "3"], "Did you mean '--lora.rank'"),
        (["train", "--train.methods", "[lora,ful]"], "Did you mean 'full'"),
        (["train", "--train.precision", "flaot32"], "Did you mean 'float32'"),
        (["train", "--train.epochs", "many"], "Expected a whole number. Got value: many"),
        (["train", "--train.epochs", "0"], "train.epochs has to be 1 or more"),
        (["train", "--config", "nowhere.yaml"], "does not exist"),
        (["train", "--data.source", "digits"], "No model given: use --model.name"),
        (["merge", "adapter"], "arguments are required: --output"),
        (["merge"], "arguments are required: ADAPTER, --output"),
        ([], "{train,models,merge}"),
        (["merge", "adapter", "--output", "merged.h5"], ".safetensors or .keras"),
    ],
)
def test_typed_wrongly(capsys, arguments, expected):
    message, code = refuse(capsys, *arguments)
    assert code == 2
    assert expected in message
    assert message.startswith("tfimm-lora")
    assert len(message.splitlines()) <= 2, "short enough to read"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models", "convnxt_tin*"], "Did you mean 'convnext_tiny'"),
        (["models", "--module", "convnet"], "Did you mean 'convnext'"),
        (["train", "--model.name", "vit_tiny_patch16_24"], "Did you mean 'vit_tiny_patch16_224'"),
        (["train", "--model.name", "vit_digits", "--data.source", "digit"], "mean 'digits'"),
        (["train", "--model.name", "vit_digits", "--data.source", "folder:nowhere"], "not exist"),
        (["train", "--train.task", "clasification"], "Did you mean 'classification'"),
        (["merge", "nowhere", "--output", "merged.keras"], "no adapter in nowhere"),
    ],
)
def test_cannot_be_done(capsys, arguments, expected):
    message, code = refuse(capsys, *arguments)
    assert code == 1
    assert expected in message


def test_unknown_key_in_a_recipe(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("data:\n  sorce: digits\n")
    message, code = refuse(capsys, "train", "--config", tmp_path / "recipe.yaml")
    assert code == 2
    assert "Does not accept option 'data.sorce'" in message
    assert "Did you mean 'data.source'" in message


def test_one_class_in_a_folder(capsys, tmp_path):
    from PIL import Image

    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "tom.png")
    arguments = ("train", "--model.name", "vit_digits", "--data.source", f"folder:{tmp_path}")
    message, code = refuse(capsys, *arguments)
    assert code == 1
    assert "one class only (cat)" in message


# --- A run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The embedded example, cut short, as a person runs it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run = type_in(
        "train", "--train.epochs", 2, "--train.methods", "[linear_probe,lora]",
        "--data.train_images_per_class", 8, "--data.val_fraction", 0.2,
        "--lora.targets", "[attn.q,attn.v]", "--output", folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_run_prints_what_was_found_and_a_table(finished):
    folder, shown = finished
    assert "32 to train on (8 per class), 143 to validate on" in shown
    assert shown.index("to train on") < shown.index("epoch")
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, label in (("linear_probe", "linear probe"), ("lora", "LoRA")):
        figures = metrics["methods"][name]
        (row,) = [line for line in shown.splitlines() if line.startswith(f"{label}  ")
                  and f"{figures['trainable_weights']:,} (" in line]  # fmt: skip
        assert f"{figures['val_accuracy']:.1%}" in row
        assert f"{figures['peak_memory_mb']:.0f}" in row
    assert str(folder) in shown.splitlines()[-1]


def test_run_folder_is_complete(finished):
    folder, _ = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "metrics.json", "history.csv", "environment.json", "classes.json",
        "comparison.png", "log.txt", "linear_probe/model.safetensors",
        "lora/adapter/README.md", "lora/adapter/adapter_config.json",
        "lora/adapter/adapter_model.safetensors",
        "lora/model.safetensors", "lora/model.keras",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing unfinished"
    metrics = json.loads((folder / "metrics.json").read_text())
    lora = metrics["methods"]["lora"]
    assert lora["merge_difference"] < 1e-5
    assert 100 < lora["memory_before_training_mb"] < lora["peak_memory_mb"]
    rows = [
        row for row in csv.DictReader((folder / "history.csv").open()) if row["method"] == "lora"
    ]
    assert float(rows[-1]["val_accuracy"]) == lora["val_accuracy"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["output"] is None, "so that the recipe can be run again"
    assert config["train"]["epochs"] == 2 and config["lora"]["targets"] == ["attn.q", "attn.v"]
    assert json.loads((folder / "classes.json").read_text()) == ["6", "7", "8", "9"]
    assert json.loads((folder / "environment.json").read_text())["packages"]["keras"]


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.keras"])
def test_merge_gives_the_adapted_models_logits(finished, tmp_path, capsys, name):
    folder, _ = finished
    adapter, output = folder / "lora" / "adapter", tmp_path / "new" / name
    assert main(["merge", str(adapter), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    base = tfimm_lora.create_model("vit_digits", pretrained=True, nb_classes=4)
    adapted = tfimm_lora.lora.load_adapter(base, adapter)
    if name.endswith(".keras"):
        merged = keras.saving.load_model(output)
    else:
        merged = tfimm_lora.create_model("vit_digits", model_path=output, nb_classes=4)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 1)).astype("float32")
    expected = adapted.predict_on_batch(images)
    np.testing.assert_allclose(merged.predict_on_batch(images), expected, atol=1e-5)
    assert not np.allclose(base.predict_on_batch(images), expected, atol=1e-3)


def test_merge_into_other_weights_is_refused(finished, tmp_path, capsys):
    folder, _ = finished
    message, code = refuse(
        capsys, "merge", folder / "lora" / "adapter", "--model.name", "vit_digits",
        "--model.pretrained", "false", "--output", tmp_path / "merged.safetensors",
    )  # fmt: skip
    assert code == 1
    assert "trained on other weights" in message
    assert not list(tmp_path.iterdir())


def start_and_wait(output):
    """Starts a long run and waits until its unfinished folder is there."""
    process = subprocess.Popen(
        [*COMMAND, "train", "--train.epochs", "10000", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Whoever starts the tests in the background may have had interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(output.parent.glob(".*unfinished*/log.txt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_interrupted_run_leaves_nothing(tmp_path):
    process = start_and_wait(tmp_path / "first")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_killed_run_leaves_no_result(tmp_path):
    process = start_and_wait(tmp_path / "first")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "first").exists()
