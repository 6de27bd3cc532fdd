"""tools/check.py: what it counts and what it finds wrong."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import last_json, run_script
from data import DataError
from launch import exit_status
from tools.check import check, main


def test_counts_by_hand(folder_dataset):
    label = np.array(Image.open(folder_dataset / "labels/train/0.png"))
    label[:24] = 255
    Image.fromarray(label).save(folder_dataset / "labels/train/0.png")
    report = check("folder", folder_dataset)
    assert report["problems"] == [] and list(report["splits"]) == ["train", "val"]
    train = report["splits"]["train"]
    assert (train["images"], train["sizes"], train["unlabelled"]) == (2, {"64x48": 2}, 0.25)
    assert train["classes"] == {"left": 20 / 64, "middle": 20 / 64, "right": 24 / 64}


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
    expected = [
        ("images/train/alone.png", "no file of this name in"),
        ("labels/train/1.png", "label value 77"),
        ("labels/val/alone.png", "no file of this name in"),
        ("images/val/1.png", f"same image as {images / 'train/0.png'}"),
        ("images/val/broken.png", "cannot be read"),
        ("labels/val/void.png", "no pixel has a label"),
        ("images/val/small.png", "31x40 pixels"),
    ]
    problems = check("folder", folder_dataset)["problems"]
    assert len(problems) == len(expected)
    for name, what in expected:
        (line,) = (problem for problem in problems if problem.startswith(f"{folder_dataset / name}: "))
        assert what in line and "\n" not in line


def test_a_missing_split_and_an_absent_class_are_problems(folder_dataset):
    shutil.rmtree(folder_dataset / "images/val"), shutil.rmtree(folder_dataset / "labels/val")
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right", "up"]}))
    absent, missing = check("folder", folder_dataset)["problems"]
    assert absent.startswith("train: values 0, 1, 2 occur; class 'up' [3] has no pixel: ")
    assert (
        missing == f"{folder_dataset / 'images/val'}: no images; check the folder, --dataset and the name of the split"
    )


def test_a_problem_with_one_split_does_not_hide_the_others(folder_dataset):
    (folder_dataset / "images/val/0.jpg").write_bytes((folder_dataset / "images/val/0.png").read_bytes())
    (folder_dataset / "images/.ipynb_checkpoints").mkdir()
    report = check("folder", folder_dataset)
    assert list(report["splits"]) == ["train"] and len(report["problems"]) == 1
    assert "images/val/0.png: has the same name as" in report["problems"][0]


def test_pictures_in_one_folder_are_checked_as_two_splits(folder_dataset):
    for kind in ("images", "labels"):
        for i, split in ((0, "train"), (1, "train"), (2, "val")):
            (folder_dataset / kind / split / f"{i % 2}.png").rename(folder_dataset / kind / f"{i}.png")
        shutil.rmtree(folder_dataset / kind / "train"), shutil.rmtree(folder_dataset / kind / "val")
    report = check("folder", folder_dataset)
    assert [report["splits"][split]["images"] for split in ("train", "val")] == [2, 1] and report["problems"] == []


def test_masks_under_another_name_are_one_line_without_an_empty_table(folder_dataset, capsys):
    for path in folder_dataset.glob("labels/*/*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert main([str(folder_dataset)]) == 2
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert len(lines) == 2 and "to rename all: " in lines[0] and lines[1] == "4 problems", lines


def test_the_table_shows_what_each_value_means(folder_dataset, capsys):
    fields = {"names": ["ends", "middle"], "values": [[0, 2], 1]}
    (folder_dataset / "classes.json").write_text(json.dumps(fields))
    assert main([str(folder_dataset)]) == 0
    out = capsys.readouterr().out
    assert last_json(out)["values"] == {"ends": [0, 2], "middle": [1]}
    rows = [line.split() for line in out.splitlines()]
    assert ["0,", "2", "ends", "68.750%", "68.750%"] in rows and [
        "1",
        "middle",
        "31.250%",
        "31.250%",
    ] in rows  # 44 and 20 columns of 64


def test_a_test_split_may_lack_labels(folder_dataset):
    (folder_dataset / "images/test").mkdir()
    for name in ("0", "1"):
        Image.new("RGB", (64, 48), (int(name), 7, 7)).save(folder_dataset / f"images/test/{name}.png")
    assert check("folder", folder_dataset)["problems"] == []
    (folder_dataset / "labels/test").mkdir()
    for name in ("0", "1"):  # as in Cityscapes
        Image.new("L", (64, 48), 255).save(folder_dataset / f"labels/test/{name}.png")
    report = check("folder", folder_dataset)
    assert report["problems"] == []
    assert report["splits"]["test"]["unlabelled"] == 1
    for name in ("0", "1"):
        Image.new("L", (64, 48), 255).save(folder_dataset / f"labels/train/{name}.png")
    assert check("folder", folder_dataset)["problems"][0].startswith("train: no pixel has a label")


def test_one_cause_is_one_line(folder_dataset, capsys):
    for i in range(2, 12):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(folder_dataset / f"images/train/{i}.png")
        Image.new("L", (64, 48), 11).save(folder_dataset / f"labels/train/{i}.png")
    Image.new("L", (64, 48)).save(folder_dataset / "labels/val/a.png")
    assert main([str(folder_dataset)]) == 2
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(lines) == 2 and len(last_json(out)["problems"]) == 11 and "\n11 problems\n" in out
    assert "label value 11 in 3072 pixels is no class; " in lines[0] and lines[0].endswith(" (and 9 more like it)")


def test_smoothed_label_maps_are_one_line(folder_dataset, capsys):
    for path in folder_dataset.glob("labels/*/*.png"):
        label = Image.open(path).point(lambda value: value * 100).resize((256, 192))
        label.rotate(11 + 20 * int(path.stem), Image.Resampling.BICUBIC).resize((64, 48), Image.Resampling.BOX).save(
            path
        )
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"], "values": [0, 100, 200]}))
    assert main([str(folder_dataset)]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert "of the pixels lie between those of the classes" in lines[0] and lines[0].endswith(" (and 3 more like it)")


def test_neighbours_of_train_images_in_val_are_noted(folder_dataset, capsys):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 200, (12, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(4)]
    for name, frame in zip(("train/0", "train/1", "val/0", "val/1"), frames):
        Image.fromarray(frame).save(folder_dataset / f"images/{name}.png")
    assert check("folder", folder_dataset)["notes"] == []
    moved = frames[1] // 2 + rng.integers(0, 30, frames[1].shape, np.uint8)  # darker, and noisy
    Image.fromarray(moved).save(folder_dataset / "images/val/0.png")
    (note,) = check("folder", folder_dataset)["notes"]
    assert note.startswith("1 of 2 images of val look like neighbours") and "val/0.png like " in note
    for kind in ("images", "labels"):
        for split, number in (("train", 17), ("val", 18)):
            (folder_dataset / kind / split / "1.png").rename(folder_dataset / kind / split / f"drive_{number}.png")
    assert main([str(folder_dataset)]) == 0  # a note is no problem
    assert "note: train and val both have images named drive_*, if of one recording" in capsys.readouterr().out


def test_command_line_from_another_folder(folder_dataset, tmp_path):
    done = run_script("tools/check.py", folder_dataset, "--sheet", "sheets/own.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "no problems" in done.stdout
    assert last_json(done.stdout) == check("folder", folder_dataset)
    sheet = Image.open(tmp_path / "sheets/own.png")
    assert sheet.height > 3 * 288 and sheet.width > 2 * 384  # four images of 64x48, 384 wide, with their labels


def test_what_the_user_can_mend_is_one_line(folder_dataset, tmp_path, monkeypatch, capsys):
    for flags, message in (
        ((tmp_path / "none",), "none: no such folder"),
        ((tmp_path,), "classes.json: "),
        ((folder_dataset, "--dataset", "voc"), "dataset 'voc' is unknown"),
        ((folder_dataset, "--rows"), "unrecognized arguments: --rows"),
    ):
        monkeypatch.setattr("sys.argv", ["check.py", *map(str, flags)])
        assert exit_status(main, (DataError,)) == 2
        error = capsys.readouterr().err
        assert error.startswith("check.py: ") and message in error and error.count("\n") == 1


def test_drawn_scenes_have_no_problems(drawn):
    report = check("cityscapes", drawn)
    assert report["problems"] == [] and report["splits"]["train"]["images"] == 12
    assert sum(report["splits"]["val"]["classes"].values()) == pytest.approx(1)


def test_camvids_val_is_part_of_a_drive_in_train(camvid):
    assert "images named 0016E5_*" in str(check("camvid", camvid)["notes"])


def test_camvid_as_others_have_counted_it(camvid):
    report = check("camvid", camvid)
    assert report["problems"] == [] and report["splits"]["train"]["images"] == 367
    # Road covers about a third of CamVid, bicyclists a few thousandths.
    shares = report["splits"]["train"]["classes"]
    assert 0.25 < shares["road"] < 0.4 and shares["bicyclist"] < 0.01
