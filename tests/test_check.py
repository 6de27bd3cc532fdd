"""`data.py check`: what it counts, what it finds wrong, and label maps in colours."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT, last_json
from data import DataError, check, open_dataset


def coloured(root, ignore=([0, 0, 0],), **changes):
    """Turns the label maps of the fixture's dataset into the classes' colours."""
    colours = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    content = {"names": ["left", "middle", "right"], "colours": colours, "labels": "colours", "ignore": ignore, **changes}
    (root / "classes.json").write_text(json.dumps(content))
    for path in root.glob("labels/*/*.png"):
        label = np.array(Image.open(path))
        label[:4] = 3  # to be ignored
        Image.fromarray(np.array([*colours, [0, 0, 0]], np.uint8)[label]).save(path)
    return colours


def test_counts_by_hand(folder_dataset):
    label = np.array(Image.open(folder_dataset / "labels/train/0.png"))
    label[:24] = 255
    Image.fromarray(label).save(folder_dataset / "labels/train/0.png")
    report = check("folder", folder_dataset)
    assert report["problems"] == [] == report["notes"] and list(report["splits"]) == ["train", "val"]
    train = report["splits"]["train"]
    assert (train["images"], train["sizes"], train["unlabelled"]) == (2, {"64x48": 2}, 0.25)
    assert train["classes"] == {
        name: {"share": w / 64, "images": 2} for name, w in (("left", 20), ("middle", 20), ("right", 24))
    }


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_labels_in_colours_are_read_as_classes(folder_dataset, mode):
    before = [open_dataset("folder", folder_dataset, "train")[i][1].numpy() for i in range(2)]
    coloured(folder_dataset)
    for path in folder_dataset.glob("labels/*/*.png"):
        label = Image.open(path)
        (label.quantize(8) if mode == "P" else label.convert(mode)).save(path)
    dataset = open_dataset("folder", folder_dataset, "train")
    for i, expected in enumerate(before):
        got = dataset[i][1].numpy()
        assert (got[:4] == 255).all() and (got[4:] == expected[4:]).all()


def test_a_colour_that_no_class_has_is_named_with_its_file(folder_dataset):
    coloured(folder_dataset, ignore=[])
    with pytest.raises(DataError, match=r"labels/train/0.png: label colour \[0, 0, 0\] in 256 pixels is not in classes.json"):
        open_dataset("folder", folder_dataset, "train")[0]
    problems = check("folder", folder_dataset)["problems"]
    assert len(problems) == 4 and all("label colour [0, 0, 0]" in problem for problem in problems)


def test_colours_without_saying_so_are_refused_with_the_way_out(folder_dataset):
    coloured(folder_dataset)
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))
    with pytest.raises(DataError, match='mode RGB, .*say "labels": "colours" in classes.json'):
        open_dataset("folder", folder_dataset, "train")[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": "colors"}, 'labels is \'colors\', expected "ids" or "colours"; did you mean colours'),
        ({"ignore": 255}, "ignore must be a list of colours"),
        ({"ignore": [[200, 0, 0]]}, r"colour \[200, 0, 0\] is there twice"),
        ({"ignore": [[256, 0, 0]]}, "between 0 and 255"),
        ({"colours": None}, '"labels": "colours" needs the colours'),
    ],
)
def test_classes_in_colours_are_checked(folder_dataset, changes, message):
    coloured(folder_dataset, **changes)
    with pytest.raises(DataError, match=message):
        open_dataset("folder", folder_dataset, "train")


def test_everything_that_is_wrong_is_found_at_once(folder_dataset):
    images, labels = folder_dataset / "images", folder_dataset / "labels"
    (images / "train/alone.png").write_bytes((images / "train/0.png").read_bytes())
    Image.new("L", (64, 48)).save(labels / "val/alone.png")
    Image.new("L", (64, 48), 77).save(labels / "train/1.png")
    (images / "val/1.png").write_bytes((images / "train/0.png").read_bytes())  # of another split
    Image.new("RGB", (40, 40)).save(images / "val/void.png")
    Image.new("L", (40, 40), 255).save(labels / "val/void.png")
    Image.new("RGB", (31, 40), "red").save(images / "val/small.png")
    Image.new("L", (31, 40)).save(labels / "val/small.png")
    (images / "val/broken.png").write_bytes(b"")
    Image.new("L", (64, 48)).save(labels / "val/broken.png")
    report = check("folder", folder_dataset)
    expected = [
        ("images/train/alone.png", "image without its label"),
        ("labels/train/1.png", "label value 77"),
        ("labels/val/alone.png", "label without its image"),
        ("images/val/1.png", "the same image as"),
        ("images/val/broken.png", "cannot be decoded"),
        ("labels/val/void.png", "no pixel has a label"),
        ("images/val/small.png", "31x40 pixels"),
    ]
    assert len(report["problems"]) == len(expected)
    for name, what in expected:
        (line,) = (p for p in report["problems"] if p.startswith(f"{folder_dataset / name}: "))
        assert what in line
    assert "images/train/0.png of split train, so that figures flatter" in next(
        p for p in report["problems"] if "the same image" in p
    )


def test_command_line(folder_dataset, tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, ROOT / "data.py", "check", *flags], capture_output=True, text=True, timeout=60)

    done = run(folder_dataset, "--sheet", tmp_path / "sheets/own.png", "--rows", "2")
    assert (done.returncode, done.stderr) == (0, "") and "no problems" in done.stdout
    assert last_json(done.stdout) == check("folder", folder_dataset)
    sheet = np.array(Image.open(tmp_path / "sheets/own.png"))
    # Four images of 64x48, two in a row, each with its labels beside it.
    assert sheet.shape == (4 + 2 * (270 + 4) + 28, 4 * 364 + 4, 3)
    for column in (0, 2):
        image, label = (sheet[4:274, 4 + 364 * (column + i) : 364 + 364 * (column + i)].reshape(-1, 3) for i in range(2))
        assert len(np.unique(label[::7], axis=0)) >= 3 and (image != label).any()
    (folder_dataset / "labels/train/1.png").unlink()
    done = run(folder_dataset)
    assert done.returncode == 2 and "problem: " in done.stdout and last_json(done.stdout)["problems"]
    for flags, message in (
        ((tmp_path / "none",), "none: no such folder"),
        ((tmp_path,), "classes.json: no such file"),
        ((folder_dataset, "--splits", "test"), "images/test: no images"),
        ((folder_dataset, "--sheet", "sheet"), "--sheet sheet has no suffix"),
        ((folder_dataset, "--dataset", "voc"), "dataset 'voc' is unknown"),
    ):
        done = run(*flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done


def test_drawn_scenes_have_no_problems(drawn):
    report = check("cityscapes", drawn)
    assert report["problems"] == [] and report["splits"]["train"]["images"] == 12
    assert sum(each["share"] for each in report["splits"]["val"]["classes"].values()) == pytest.approx(1)


def test_camvid_as_others_have_counted_it(camvid):
    report = check("camvid", camvid)
    assert report["problems"] == []
    assert {split: content["images"] for split, content in report["splits"].items()}["train"] == 367
    # Road fills about a third of CamVid, and bicyclists a few thousandths.
    shares = report["splits"]["train"]["classes"]
    assert 0.25 < shares["road"]["share"] < 0.4 and shares["bicyclist"]["share"] < 0.01
    dataset = data.open_dataset("camvid", camvid, "train")
    first = sum(int((dataset[i][1] == 3).sum()) for i in range(0, 367, 40))
    assert first > 0
