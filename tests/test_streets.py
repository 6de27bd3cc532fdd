"""The drawn scenes look like Cityscapes to data.py, and are the same on every machine."""

import numpy as np
import pytest
from PIL import Image

from conftest import last_json, run_script
from data import CITYSCAPES, open_dataset
from launch import UsageError
from tools import streets


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


def test_every_class_occurs_often_enough_to_be_learned(drawn):
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


def test_instance_maps_follow_the_rule_of_cityscapes(drawn):
    things = [streets.PERSON, streets.RIDER, streets.CAR, streets.TRUCK, streets.BUS, streets.TRAIN]
    things += [streets.MOTORCYCLE, streets.BICYCLE]
    seen = set()
    for path in sorted((drawn / "gtFine/train/street").glob("*_instanceIds.png")):
        instances = np.array(Image.open(path)).astype(int)
        labels = np.array(Image.open(path.with_name(path.name.replace("instanceIds", "labelIds")))).astype(int)
        single = np.isin(labels, things)
        assert (instances[single] // 1000 == labels[single]).all()  # label id x 1000 + number of the object
        assert (instances[~single] == labels[~single]).all()
        seen |= set(labels[single])
    assert len(seen) >= 6


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="mine exists; remove it"):
        streets.write_dataset(tmp_path / "mine", {"train": 1}, 64, 128, seed=0)


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(streets, "write_scene", None)  # what the pool calls fails
    with pytest.raises(TypeError):
        streets.write_dataset(tmp_path / "x", {"train": 1}, 64, 128, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_command_line_from_another_folder(tmp_path):
    flags = ("drawn", "--train", 2, "--val", 1, "--size", 64, 128)
    done = run_script("tools/streets.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert last_json(done.stdout) == {"out": "drawn", "train": 2, "val": 1, "size": [64, 128], "seed": 0}
    assert len(open_dataset("cityscapes", tmp_path / "drawn", "train")) == 2
    done = run_script("tools/streets.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("streets.py: drawn exists") and done.stderr.count("\n") == 1
