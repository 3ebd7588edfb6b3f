"""Training for real: what each method changes, repeats and leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from importlib import resources

import keras
import numpy as np
import pytest
from PIL import Image

import tfimm_lora
import tfimm_lora.training.digits_model
from tfimm_lora.data import DataConfig, load_dataset
from tfimm_lora.training import LoraSection, ModelSection, RunConfig, TrainSection
from tfimm_lora.training.events import receive, send
from tfimm_lora.training.fit import fit_method, make_batches
from tfimm_lora.training.methods import METHODS
from tfimm_lora.training.pretrain_digits import pretrain
from tfimm_lora.training.results import checked_difference, save_results
from tfimm_lora.training.schedules import make_optimizer

SMALL = ModelSection("vit_digits", pretrained=False, options={"depth": 1})


def recipe(**changes):
    values = {
        "model": SMALL,
        "data": DataConfig("digits", classes=["6", "7"], train_images_per_class=8, shift=0.1),
        "lora": LoraSection(rank=2, targets=["attn.q", "attn.v"]),
        "train": TrainSection(epochs=2, batch_size=8, validate_every=2, learning_rate=3e-3),
    }
    return RunConfig(**(values | changes))


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(recipe().data)


def values(model):
    return {v.path: np.array(v) for v in model.weights}


@pytest.mark.parametrize("method", ["linear_probe", "lora", "full"])
def test_methods_train_what_they_say(method, dataset, tmp_path):
    config = recipe()
    events = []
    keras.utils.set_random_seed(config.train.seed)
    before = values(METHODS[method](config, 2))
    fit = fit_method(config, method, dataset, lambda event, **values: events.append(event))
    changed = {
        path for path, old in before.items() if not np.array_equal(old, values(fit.model)[path])
    }
    trainable = {v.path for v in fit.model.trainable_variables}
    assert changed == trainable
    names = {path.split("/", 1)[1] for path in trainable}
    if method == "linear_probe":
        assert names == {"head/kernel", "head/bias"}
    elif method == "lora":
        assert all("lora" in name or name.startswith("head/") for name in names)
    else:
        assert len(names) == len(before)
    assert fit.figures["trainable_weights"] == sum(
        int(np.prod(v.shape)) for v in fit.model.trainable_variables
    )
    assert events[0] == "started" and events.count("epoch") == 2
    assert [("val_accuracy" in epoch) for epoch in fit.history] == [False, True]
    # What was recorded is what the model does.
    loss, accuracy = fit.model.evaluate(fit.validation, verbose=0)
    assert fit.figures["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert fit.figures["val_loss"] == pytest.approx(loss, rel=1e-4)

    saved = save_results(fit, method, tmp_path / method, save_models=True)
    images = next(iter(fit.validation.as_numpy_iterator()))[0][:16]
    expected = fit.model.predict_on_batch(images)
    path = tmp_path / method / "model.safetensors"
    loaded = tfimm_lora.create_model("vit_digits", model_path=path, nb_classes=2, depth=1)
    np.testing.assert_allclose(loaded.predict_on_batch(images), expected, atol=1e-5)
    if method == "lora":
        assert saved["merge_difference"] < 1e-5
        merged = keras.saving.load_model(tmp_path / method / "model.keras")
        np.testing.assert_allclose(merged.predict_on_batch(images), expected, atol=1e-5)


def test_the_same_recipe_gives_the_same_history(dataset):
    def history():
        epochs = fit_method(recipe(), "lora", dataset, lambda *a, **k: None).history
        return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in epochs]

    assert history() == history()


def test_photographs_in_a_folder_reach_the_model_as_its_checkpoint_wants(tmp_path):
    for split in ("train", "val"):
        for name, shade in (("dark", 40), ("light", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                picture = Image.new("RGB", (40, 48), (shade + index,) * 3)
                picture.save(tmp_path / split / name / f"{index}.png")
    data = DataConfig(f"folder:{tmp_path}")
    train = TrainSection(epochs=8, batch_size=8, validate_every=8, learning_rate=1e-2)
    config = recipe(data=data, train=train)
    dataset = load_dataset(data)
    assert dataset.flip
    fit = fit_method(config, "linear_probe", dataset, lambda *a, **k: None)
    assert fit.figures["val_accuracy"] == 1.0
    _, validation = make_batches(config, fit.model, dataset)
    images, labels = next(iter(validation.as_numpy_iterator()))
    assert images.shape == (8, 32, 32, 1)
    shades = np.array([40, 41, 42, 43, 200, 201, 202, 203])
    np.testing.assert_allclose(images[:, 5, 5, 0], (shades / 255 - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(labels, [0] * 4 + [1] * 4)


def test_mixed_precision(dataset):
    train = TrainSection(epochs=1, batch_size=16, precision="mixed_bfloat16")
    fit = fit_method(recipe(train=train), "lora", dataset, lambda *a, **k: None)
    assert fit.model.dtype_policy.name == "mixed_bfloat16"
    assert all(v.dtype == "float32" for v in fit.model.trainable_variables)
    assert np.isfinite(fit.figures["train_loss"])


# --- The embedded checkpoint --------------------------------------------------------------------


def test_embedded_checkpoint_is_as_good_as_its_provenance_says():
    folder = resources.files("tfimm_lora.training")
    facts = json.loads(folder.joinpath("vit_digits.json").read_text(encoding="utf-8"))
    assert folder.joinpath("vit_digits.safetensors").stat().st_size == facts["bytes"] < 2e6
    model = tfimm_lora.create_model("vit_digits", pretrained=True)
    data = DataConfig("digits", classes=facts["classes"], val_fraction=0.15, seed=facts["seed"])
    dataset = load_dataset(data)
    assert (len(dataset.train), len(dataset.val)) == (
        facts["train_images"], facts["held_out_images"]
    )  # fmt: skip
    _, validation = make_batches(recipe(), model, dataset)
    predicted = model.predict(validation, verbose=0).argmax(-1)
    assert np.mean(predicted == dataset.val.labels) == pytest.approx(facts["accuracy"], abs=0.01)


def test_the_script_makes_a_checkpoint_of_the_same_kind(tmp_path, monkeypatch):
    import tfimm_lora.training.pretrain_digits as script

    # The same script on few images and with one block, for the sake of speed.
    few = load_dataset(DataConfig("digits", classes=list("012345"), train_images_per_class=4))
    monkeypatch.setattr(script, "load_dataset", lambda config: few)
    monkeypatch.setattr(
        script, "_pixels", lambda images: np.zeros((len(images), 32, 32, 1), "uint8")
    )
    small = functools.partial(tfimm_lora.create_model, depth=1)
    monkeypatch.setattr(tfimm_lora, "create_model", small)
    facts = pretrain(tmp_path, epochs=1)
    made = json.loads((tmp_path / "vit_digits.json").read_text(encoding="utf-8"))
    stored = resources.files("tfimm_lora.training").joinpath("vit_digits.json")
    assert made == facts
    assert set(made) == set(json.loads(stored.read_text(encoding="utf-8")))
    small("vit_digits", model_path=tmp_path / "vit_digits.safetensors")


# --- Parts --------------------------------------------------------------------------------------


def test_rate_rises_and_falls():
    optimizer = make_optimizer(0.5, steps=100, warmup=0.1, weight_decay=0.01)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.25, 0.0], abs=1e-6)
    assert float(make_optimizer(0.5, steps=100, warmup=0.0)._learning_rate(0)) == 0.5


def test_a_wrong_merge_is_an_error():
    logits = np.array([[1.0, -1.0]], "float32")
    assert checked_difference(logits, logits + 1e-5) == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(RuntimeError, match=r"not merged rightly"):
        checked_difference(logits, logits + 0.1)


def test_events_pass_through_a_pipe(capsys):
    send("epoch", epoch=3, loss=0.5)
    line = capsys.readouterr().out
    assert receive(line) == {"event": "epoch", "epoch": 3, "loss": 0.5}
    assert receive("anything else\n") is None


def test_peak_memory_grows_with_what_is_held():
    # In a process of its own: after the peaks of other tests there is nothing to be seen here.
    code = (
        "import numpy as np\n"
        "from tfimm_lora.training.memory import peak_megabytes\n"
        "before = peak_megabytes()\n"
        "held = np.ones(64 * 2**20 // 8)\n"
        "print(peak_megabytes() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 32 < float(run.stdout) < 128


def test_images_are_prepared_as_the_loaded_checkpoint_wants(dataset):
    """Not as the default checkpoint of the model's name does."""
    model = tfimm_lora.create_model("vit_digits", depth=1, nb_classes=2)
    facts = dataclasses.replace(model.pretrained_cfg, mean=(0.0,), std=(1 / 255,))
    model.pretrained_cfg = facts
    for batches in make_batches(recipe(), model, dataset):
        images = next(iter(batches))[0].numpy()
        assert images.min() >= -1e-3 and images.max() > 100  # bytes, as they were
        np.testing.assert_allclose(images, np.rint(images), atol=1e-3)
