"""Images in folders: what is found, how it is divided, and what is said when it cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tfimm_lora.data import DataConfig, DataError, load_dataset

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (230, 30, 30)}


def make_images(folder, name, count, colour, suffix=".png"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(name))
    for index in range(count):
        noise = generator.integers(-20, 20, (24, 20, 3))
        pixels = np.clip(np.array(colour) + noise, 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / name / f"{index:02}{suffix}")


@pytest.fixture
def plain(tmp_path):
    """One folder per class, ten images each."""
    for name, colour in COLOURS.items():
        make_images(tmp_path, name, 10, colour)
    return tmp_path


@pytest.fixture
def divided(tmp_path):
    """train and val, with one folder per class each."""
    for name, colour in COLOURS.items():
        make_images(tmp_path / "train", name, 6, colour)
        make_images(tmp_path / "val", name, 3, colour)
    return tmp_path


def load(folder, **options):
    return load_dataset(DataConfig(f"folder:{folder}", **options))


# --- What is found ------------------------------------------------------------------------------


def test_folder_per_class_is_divided_by_class(plain):
    dataset = load(plain, val_fraction=0.3)
    assert dataset.class_names == ("blue", "green", "red")
    assert np.bincount(dataset.train.labels).tolist() == [7, 7, 7]
    assert np.bincount(dataset.val.labels).tolist() == [3, 3, 3]
    assert not set(dataset.train.indices) & set(dataset.val.indices)


def test_the_seed_decides_the_division(plain):
    one, same, other = (load(plain, seed=seed) for seed in (1, 1, 2))
    assert one.val.indices.tolist() == same.val.indices.tolist()
    assert one.val.indices.tolist() != other.val.indices.tolist()


def test_train_and_val_folders_are_kept(divided):
    dataset = load(divided)
    assert (len(dataset.train), len(dataset.val)) == (18, 9)
    assert len(load(divided, train_images_per_class=2).train) == 6
    assert len(load(divided, train_images_per_class=2).val) == 9


def test_few_images_per_class_leave_the_rest_for_validation(plain):
    dataset = load(plain, train_images_per_class=4)
    assert np.bincount(dataset.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(dataset.val.labels).tolist() == [6, 6, 6]


def test_chosen_classes_are_counted_anew(plain):
    dataset = load(plain, classes=["red", "green"])
    assert dataset.class_names == ("red", "green")
    for images, label in ((dataset.train, 0), (dataset.train, 1)):
        folder = {images.split.items[i].parent.name for i in images.indices[images.labels == label]}
        assert folder == {dataset.class_names[label]}


def test_other_files_are_ignored_and_counted(plain):
    (plain / "red" / "notes.txt").write_text("no image")
    (plain / "red" / ".hidden.png").write_text("no image")
    assert "1 .txt" in load(plain).summary()


def test_summary_says_what_was_found(divided):
    summary = load(divided).summary()
    for part in (str(divided), "3: blue, green, red", "18 to train on (6 per class)", "9 to val"):
        assert part in summary


# --- What cannot be used ------------------------------------------------------------------------


def test_missing_folder_suggests_its_neighbour(plain):
    with pytest.raises(DataError, match=rf"does not exist.*Did you mean '{plain.name}'"):
        load(plain.with_name(plain.name + "x"))


def test_a_file_is_no_folder(plain):
    with pytest.raises(DataError, match=r"is a file"):
        load(plain / "red" / "00.png")


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing; expected one folder per class"):
        load(tmp_path)


def test_images_without_class_folders(tmp_path):
    make_images(tmp_path, ".", 3, (0, 0, 0))
    with pytest.raises(DataError, match=r"holds 3 images but no folders"):
        load(tmp_path)


def test_class_folders_without_images(tmp_path):
    for name in COLOURS:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"no images in its 3 folders \(blue, green, red\)"):
        load(tmp_path)


def test_one_class_without_images_is_named(plain):
    (plain / "yellow").mkdir()
    with pytest.raises(DataError, match=r"1 class without images: yellow"):
        load(plain)
    assert load(plain, classes=["red", "blue"]).class_names == ("red", "blue")


def test_one_class(tmp_path):
    make_images(tmp_path, "cat", 4, (0, 0, 0))
    with pytest.raises(DataError, match=r"one class only \(cat\)"):
        load(tmp_path)


def test_one_chosen_class(plain):
    with pytest.raises(DataError, match=r"one class only \(red\)"):
        load(plain, classes=["red"])


def test_unknown_class_suggests_the_nearest(plain):
    with pytest.raises(DataError, match=r"no class 'gren'. Did you mean 'green'"):
        load(plain, classes=["gren", "red"])


def test_class_in_val_that_is_not_in_train(divided):
    make_images(divided / "val", "yellow", 1, (250, 250, 0))
    with pytest.raises(DataError, match=r"1 class that .*train lacks: yellow"):
        load(divided)


def test_too_few_images_to_divide(plain):
    make_images(plain, "yellow", 1, (250, 250, 0))
    with pytest.raises(DataError, match=r"yellow \(1\).*one to train on and one to validate on"):
        load(plain)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_unreadable_images_are_named_and_counted(plain, damage, suffix):
    make_images(plain, "red", 1, COLOURS["red"], suffix)
    whole = (plain / "red" / f"00{suffix}").read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}
    for name in ("bad1", "bad2"):
        (plain / "red" / f"{name}{suffix}").write_bytes(broken[damage])

    with pytest.raises(DataError, match=r"2 of the images cannot be read") as caught:
        load(plain)
    for name in ("bad1", "bad2"):
        assert f"{name}{suffix}" in str(caught.value)
    assert "--data.skip_unreadable true" in str(caught.value)

    dataset = load(plain, skip_unreadable=True)
    assert len(dataset.skipped) == 2
    assert "2 unreadable" in dataset.summary()
    used = {images.split.items[i].stem for images in dataset.images for i in images.indices}
    assert not used & {"bad1", "bad2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction has to lie between 0 and 1"),
        ({"train_images_per_class": 0}, "train_images_per_class has to be 1 or more"),
        ({"shift": 0.5}, "shift has to be"),
    ],
)
def test_values_without_sense(options, message):
    with pytest.raises(DataError, match=message):
        DataConfig("digits", **options)
