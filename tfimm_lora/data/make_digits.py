"""Makes ``digits.npz`` and ``digits.json``: ``python -m tfimm_lora.data.make_digits``.

scikit-learn is no dependency of the package, so the images are stored here. They are scikit-learn's
copy of the test set of "Optical Recognition of Handwritten Digits" of the UCI repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

PROVENANCE = {
    "name": "Optical Recognition of Handwritten Digits, test set",
    "authors": "E. Alpaydin, C. Kaynak (1998)",
    "origin": "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49",
    "license": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "obtained_through": "sklearn.datasets.load_digits",
    "changes": "none: pixel values 0 to 16 stored as uint8",
    "script": "python -m tfimm_lora.data.make_digits",
}


def make_digits(folder: Path) -> None:
    """Writes the images and their provenance.

    Args:
        folder: Where ``digits.npz`` and ``digits.json`` go.

    Example:
        >>> make_digits(Path("."))
    """
    import sklearn
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    np.savez_compressed(folder / "digits.npz", images=images, labels=labels)
    facts = PROVENANCE | {
        "scikit_learn": sklearn.__version__,
        "images": list(images.shape),
        "sha256_of_pixels": hashlib.sha256(images.tobytes()).hexdigest(),
        "sha256_of_labels": hashlib.sha256(labels.tobytes()).hexdigest(),
    }
    (folder / "digits.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    make_digits(parser.parse_args().folder)
