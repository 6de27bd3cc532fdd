"""The drawn scenes are Cityscapes in all that data.py can see, and the same for everybody."""

import numpy as np
import pytest
from PIL import Image

import streets
from data import CITYSCAPES, open_dataset


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        streets.write_dataset(tmp_path / name, {"train": 2, "val": 1}, 64, 128, seed=4, processes=1 + (name == "b"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_splits_and_seeds_differ():
    scenes = [np.array(streets.draw_scene(64, 128, key)[0]) for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))]
    assert all((scenes[i] != scenes[j]).any() for i in range(4) for j in range(i))


def test_every_class_occurs_often_enough_to_be_learnt(drawn):
    pixels, scenes = np.zeros(256), np.zeros(256)
    table = open_dataset("cityscapes", drawn, "val").table
    for number in range(60):
        label = np.array(streets.draw_scene(128, 256, (9, 0, number))[1].point(table))
        count = np.bincount(label.ravel(), minlength=256)
        pixels += count / label.size / 60
        scenes += count > 30
    assert pixels[254] == 0
    for train_id, name in enumerate(CITYSCAPES.names):
        assert pixels[train_id] > 0.003 and scenes[train_id] >= 15, (name, pixels[train_id], scenes[train_id])


def test_instance_maps_follow_cityscapes_rule(drawn):
    things = {
        streets.PERSON,
        streets.RIDER,
        streets.CAR,
        streets.TRUCK,
        streets.BUS,
        streets.TRAIN,
        streets.MOTORCYCLE,
        streets.BICYCLE,
    }
    seen = set()
    for path in sorted((drawn / "gtFine/train/street").glob("*_instanceIds.png")):
        instances = np.array(Image.open(path)).astype(int)
        labels = np.array(Image.open(path.with_name(path.name.replace("instanceIds", "labelIds")))).astype(int)
        single = np.isin(labels, list(things))
        assert (instances[single] // 1000 == labels[single]).all()  # label id x 1000 + number of the object
        assert (instances[~single] == labels[~single]).all()
        seen |= set(labels[single])
    assert len(seen) >= 6


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine: exists already"):
        streets.write_dataset(tmp_path / "mine", {"train": 1}, 64, 128, seed=0)


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(streets, "write_scene", None)  # what the pool calls fails
    with pytest.raises(TypeError):
        streets.write_dataset(tmp_path / "x", {"train": 1}, 64, 128, seed=0)
    assert list(tmp_path.iterdir()) == []
