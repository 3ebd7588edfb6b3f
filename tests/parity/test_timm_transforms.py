"""The transforms against timm's own, on real pictures: settings, geometry, pixels, random crops."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tfimm_lora
from tests.oracles import Oracle
from tfimm_lora.data import EvaluationTransform
from tfimm_lora.data.pillow_resample import INTERPOLATIONS

MODULES = ["convnext", "vision_transformer", "deit"]
# Height and width of the result, and crop_pct.
TARGETS = [((224, 224), 0.875), ((224, 224), 0.95), ((128, 128), 1.0)]
TARGETS += [((64, 96), 0.875), ((64, 96), 1.0), ((161, 97), 0.95)]
# Height and width of what is cut from a wall of real pictures; the last ones are extremes.
SHAPES = [(224, 224), (333, 500), (500, 333), (480, 640), (97, 131), (61, 60), (400, 400)]
SHAPES += [(1, 1), (3, 90), (150, 5), (9, 300)]
# In tf.data: what Pillow's filters give is met, but for the last bit of a sine.
TENSOR_LIMIT = 1


@pytest.fixture(scope="module")
def oracle(oracle_python: str, oracle_cache: Path) -> Iterator[Oracle]:
    """timm with the real torchvision, which lies apart from the other oracles' packages."""
    default = Path(oracle_python).parents[1] / "torchvision_path"
    folder = os.environ.get("TFIMM_LORA_TORCHVISION_PATH", str(default))
    if not Path(folder, "torchvision").is_dir():
        pytest.skip(
            f"no torchvision in {folder}: pip install --no-deps --target {folder} "
            "torchvision==0.28.0, or set TFIMM_LORA_TORCHVISION_PATH"
        )
    script = Path(__file__).with_name("drive_transforms.py")
    oracle = Oracle("transforms", oracle_python, script, [], oracle_cache, [folder])
    with contextlib.closing(oracle):
        yield oracle


@pytest.fixture(scope="module")
def pictures(
    shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, np.ndarray]]:
    """Real pictures of many shapes: name to file and pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    files = sorted((shared_dir / "data" / "clipart" / "val").rglob("*.jpg"))[::7][:20]
    tiles = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    wall = np.vstack([np.hstack(tiles[i : i + 5]) for i in range(0, 20, 5)])
    found = {}
    for i, (height, width) in enumerate(SHAPES):
        pixels = wall[37 * i % 150 :, 53 * i % 100 :][:height, :width]
        assert pixels.shape == (height, width, 3)
        name = f"{height}x{width}"
        Image.fromarray(pixels).save(folder / f"{name}.png")
        found[name] = folder / f"{name}.png", pixels
    return found


def in_tf_data(transform: Callable[[Any], Any], images: list[np.ndarray]) -> list[np.ndarray]:
    """Maps a transform over a dataset of images whose sizes it does not know."""
    import tensorflow as tf

    signature = tf.TensorSpec((None, None, 3), tf.uint8)
    dataset = tf.data.Dataset.from_generator(lambda: iter(images), output_signature=signature)
    return list(dataset.map(transform).as_numpy_iterator())


def difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pixels_are_timms(
    interpolation: str,
    crop_mode: str,
    oracle: Oracle,
    pictures: dict[str, tuple[Path, np.ndarray]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    largest = share = 0.0
    for size, crop_pct in TARGETS:
        rules = {"interpolation": interpolation, "crop_mode": crop_mode, "crop_pct": crop_pct}
        rules |= {"mean": (0.48, 0.46, 0.41), "std": (0.23, 0.22, 0.225)}
        # timm fails on pictures of which nothing is left: a side of 0 pixels.
        names = [n for n, (_, x) in pictures.items() if not vanishes(x, size, crop_pct)]
        names = names if crop_mode == "border" else list(pictures)
        assert len(names) >= 8
        files = {name: str(pictures[name][0]) for name in names}
        oracle.call(
            "evaluate",
            pictures=files,
            out=str(tmp_path),
            options={"input_size": (3, *size), **rules},
        )
        ours = EvaluationTransform((3, *size), **rules)
        bytes_ = EvaluationTransform((3, *size), normalize=False, **rules)
        in_graph = in_tf_data(bytes_, [pictures[name][1] for name in names])
        for name, tensor in zip(names, in_graph, strict=True):
            pixels = np.load(tmp_path / f"{name}.pixels.npy")
            values = np.load(tmp_path / f"{name}.values.npy")
            picture = Image.open(files[name])
            np.testing.assert_array_equal(bytes_(picture), pixels, err_msg=name)
            np.testing.assert_array_equal(bytes_(pictures[name][1]), pixels, err_msg=name)
            np.testing.assert_array_equal(ours(picture), values, err_msg=name)
            largest = max(largest, difference(tensor, pixels))
            share = max(share, float((tensor != pixels).mean()))
    record_property(f"tf.data {interpolation} {crop_mode}", f"{largest:.0f} levels, {share:.1e}")
    assert largest <= TENSOR_LIMIT
    assert share <= 1e-3


def vanishes(pixels: np.ndarray, size: tuple[int, int], crop_pct: float) -> bool:
    ratio = max(n / int(m / crop_pct) for n, m in zip(pixels.shape, size, strict=False))
    return round(min(pixels.shape[:2]) / ratio) == 0


def test_normalised_tensors_are_timms(
    oracle: Oracle, pictures: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    """The last step in tf.data, where the pixels are the same."""
    path, pixels = pictures["480x640"]
    options = {"input_size": (3, 64, 96), "interpolation": "nearest", "crop_pct": 0.9}
    oracle.call("evaluate", pictures={"one": str(path)}, out=str(tmp_path), options=options)
    ours = in_tf_data(EvaluationTransform(**options), [pixels])[0]
    np.testing.assert_allclose(ours, np.load(tmp_path / "one.values.npy"), atol=1e-6)


def test_settings_of_every_tag_are_timms(oracle: Oracle) -> None:
    theirs = oracle.call("settings", modules=MODULES)
    assert len(theirs) >= 457
    for name, pair in theirs.items():
        for use_test_size, expected in zip((False, True), pair, strict=True):
            transform = tfimm_lora.create_transform(name, use_test_size=use_test_size)
            ours = {key: getattr(transform, key) for key in expected}
            assert plain(ours) == plain(expected), f"{name} use_test_size={use_test_size}"


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in settings.items()}


@pytest.mark.parametrize(("height", "width"), [(300, 400), (90, 900)])
def test_random_crops_are_distributed_as_timms(oracle: Oracle, height: int, width: int) -> None:
    """Two samples of 4,000 boxes: the distributions of every side differ by chance only."""
    import tensorflow as tf

    from tfimm_lora.data.training_transform import crop_box

    count = 4000
    theirs = np.array(oracle.call("crops", height=height, width=width, count=count))

    def draw(index: tf.Tensor) -> tf.Tensor:
        seed = tf.stack([index, tf.constant(7, tf.int64)])
        return tf.stack(crop_box([height, width, 3], (0.08, 1.0), (3 / 4, 4 / 3), seed))

    ours = np.array(list(tf.data.Dataset.range(count).map(draw).as_numpy_iterator()))
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        at = np.unique(np.concatenate([ours[:, column], theirs[:, column]]))
        steps = [
            np.searchsorted(np.sort(x[:, column]), at, "right") / count for x in (ours, theirs)
        ]
        # Kolmogorov and Smirnov: chance goes beyond this once in a million.
        assert np.abs(steps[0] - steps[1]).max() < 2.7 * np.sqrt(2 / count)
