"""Makes the embedded checkpoint: ``python -m tfimm_lora.training.pretrain_digits``.

A small ViT learns the digits 0 to 5 of the embedded images, from nothing, under random rotation,
shear, scale and shift. Its weights go to ``vit_digits.safetensors`` in float16, and how they were
made to ``vit_digits.json``. Some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tfimm_lora.data import DataConfig, Resize, load_dataset
from tfimm_lora.data.dataset import Images
from tfimm_lora.data.digits import load_digits
from tfimm_lora.training.files import write_text

ROTATION, SHEAR, SCALE, SHIFT = 0.2, 0.2, 0.15, 0.12
"""Largest random changes: radians, share, share, share of the side."""
HELD_OUT, LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE = 0.15, 1e-3, 0.05, 64
CHECKED = 1e-2
"""Largest difference of logits, relative to their deviation, that float16 weights may make."""


def pretrain(folder: Path, *, epochs: int = 60, seed: int = 0) -> dict[str, Any]:
    """Trains the model and writes its checkpoint and provenance.

    Args:
        folder: Where the two files go.
        epochs: Passes over the images, each time changed anew.
        seed: Seed of everything random.

    Returns:
        The provenance, as written.

    Example:
        >>> pretrain(Path("."), epochs=1)["accuracy"] > 0
        True
    """
    import keras

    import tfimm_lora
    from tfimm_lora.models import save_safetensors
    from tfimm_lora.training.config import EMBEDDED_MODEL as NAME
    from tfimm_lora.training.digits_model import PRETRAINING_CLASSES
    from tfimm_lora.training.schedules import make_optimizer

    keras.utils.set_random_seed(seed)
    dataset = load_dataset(
        DataConfig("digits", classes=list(PRETRAINING_CLASSES), val_fraction=HELD_OUT, seed=seed)
    )
    preprocess = tfimm_lora.create_preprocessing(NAME)
    train, val = _pixels(dataset.train), _pixels(dataset.val)
    generator = np.random.default_rng(seed)
    model = tfimm_lora.create_model(NAME)
    steps = -(-len(train) // BATCH_SIZE) * epochs
    model.compile(
        make_optimizer(LEARNING_RATE, steps, weight_decay=WEIGHT_DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    began = time.perf_counter()
    for epoch in range(epochs):
        changed = np.stack([change(image, generator) for image in train])
        logs = model.fit(
            preprocess(changed), dataset.train.labels, batch_size=BATCH_SIZE, verbose=0
        ).history
        print(f"epoch {epoch + 1:>3}/{epochs}  loss {logs['loss'][0]:.3f}", flush=True)
    seconds = time.perf_counter() - began

    path = save_safetensors(model, folder / f"{NAME}.safetensors", dtype="float16")
    stored = tfimm_lora.create_model(NAME, model_path=path)
    images = preprocess(val)
    logits, of_stored = model.predict(images, verbose=0), stored.predict(images, verbose=0)
    difference = float(np.abs(logits - of_stored).max() / logits.std())
    if difference > CHECKED:
        raise RuntimeError(f"float16 changes the logits by {difference:.1e} of their deviation.")
    facts = {
        "model": NAME,
        "script": f"python -m tfimm_lora.training.pretrain_digits --epochs {epochs} --seed {seed}",
        "data": "tfimm_lora/data/digits.npz (its provenance: digits.json beside it)",
        "classes": list(PRETRAINING_CLASSES),
        "classes_never_seen": ["6", "7", "8", "9"],
        "train_images": len(train),
        "held_out_images": len(val),
        "accuracy": float((of_stored.argmax(-1) == dataset.val.labels).mean()),
        "accuracy_of": "the stored weights on the held-out images of the same classes",
        "augmentation": {
            "rotation_radians": ROTATION, "shear": SHEAR, "scale": SCALE, "shift": SHIFT
        },
        "optimizer": f"AdamW {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, batch {BATCH_SIZE}",
        "epochs": epochs,
        "seed": seed,
        "dtype": "float16",
        "float16_changes_logits_by": difference,
        "bytes": path.stat().st_size,
        "date": date.today().isoformat(),
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "license": "Apache-2.0, as the package; the images it was trained on are CC BY 4.0",
    }  # fmt: skip
    write_text(folder / f"{NAME}.json", json.dumps(facts, indent=2) + "\n")
    return facts


def change(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns a randomly rotated, sheared, scaled and shifted image.

    Args:
        image: Grey image, shape (height, width, 1), uint8.
        generator: Where the randomness comes from.

    Example:
        >>> change(np.zeros((32, 32, 1), "uint8"), np.random.default_rng(0)).shape
        (32, 32, 1)
    """
    height, width, _ = image.shape
    angle, shear, scale = generator.uniform(-1, 1, 3) * (ROTATION, SHEAR, SCALE)
    shift = generator.uniform(-1, 1, 2) * SHIFT * (width, height)
    cos, sin = np.cos(angle) * (1 + scale), np.sin(angle) * (1 + scale)
    matrix = np.array([[cos, -sin + shear], [sin, cos]])
    centre = np.array([width, height]) / 2
    offset = centre - matrix @ centre + shift
    values = (*matrix[0], offset[0], *matrix[1], offset[1])
    picture = Image.fromarray(image[..., 0])
    method, filled = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return np.asarray(picture.transform((width, height), method, values, filled))[..., None]


def _pixels(images: Images) -> np.ndarray:
    """Returns the images at the model's size, shape (images, 32, 32, 1), uint8."""
    resize = Resize(32, 32, channels=1)
    pixels, _ = load_digits()
    return np.stack([resize(Image.fromarray(pixels[index])) for index in images.indices])


def _versions() -> dict[str, str]:
    import keras

    packages = ("tfimm_lora", "keras", "numpy", "pillow", keras.backend.backend())
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # TensorFlow has several distributions
            versions[name] = getattr(__import__(name), "__version__", "unknown")
    return versions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(pretrain(arguments.folder, epochs=arguments.epochs, seed=arguments.seed)))
