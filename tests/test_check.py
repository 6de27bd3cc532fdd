"""`data.py check`: what it counts, what it finds wrong, and label maps in colours."""

import json
import os
import shutil
import signal
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


def printed(capsys, *argv):
    """Exit status, stdout and stderr of the command line."""
    status = data.main(["check", *map(str, argv)])
    return status, *capsys.readouterr()


def test_a_split_that_train_needs_is_missed(folder_dataset, capsys):
    shutil.rmtree(folder_dataset / "images/val"), shutil.rmtree(folder_dataset / "labels/val")
    status, out, _ = printed(capsys, folder_dataset)
    assert status == 0 and "note: no split val: train.py validates on it" in out and "--val-split" in out
    assert check("folder", folder_dataset, ["train"])["notes"] == []  # who names the splits knows them


def test_one_cause_is_one_line(folder_dataset, capsys):
    for i in range(2, 12):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(folder_dataset / f"images/train/{i}.png")
        Image.new("L", (64, 48), 11).save(folder_dataset / f"labels/train/{i}.png")
    Image.new("L", (64, 48)).save(folder_dataset / "labels/val/a.png")
    status, out, _ = printed(capsys, folder_dataset)
    lines = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert status == 2 and len(lines) == 2 and len(last_json(out)["problems"]) == 11
    assert "label value 11 is outside classes.json (names 0 to 2); " in lines[0] and lines[0].endswith(" (and 9 more like it)")
    assert "11 problems; the next line has each of them" in out
    for i in range(2, 12):
        (folder_dataset / f"labels/train/{i}.png").unlink(), (folder_dataset / f"images/train/{i}.png").unlink()
    assert "\n1 problem\n" in printed(capsys, folder_dataset)[1]


def test_a_split_of_which_nothing_could_be_read_has_no_figures(folder_dataset, capsys):
    for path in folder_dataset.glob("labels/*/*.png"):
        Image.new("L", (64, 48), 11).save(path)
    status, out, _ = printed(capsys, folder_dataset)
    assert status == 2 and "note: " not in out and "share of" not in out and "%" not in out
    assert "train: 2 images with label maps, none of which could be read\n" in out
    assert last_json(out)["splits"]["train"] == {"images": 2, "sizes": {}, "unlabelled": None, "classes": {}}


def test_what_is_wrong_with_one_split_does_not_hide_the_others(folder_dataset):
    (folder_dataset / "images/notes").mkdir()
    (folder_dataset / "images/.ipynb_checkpoints").mkdir()
    (folder_dataset / "images/train/0.jpg").write_bytes((folder_dataset / "images/train/0.png").read_bytes())
    report = check("folder", folder_dataset)
    assert list(report["splits"]) == ["train", "val"] and len(report["problems"]) == 2
    twice, stray = report["problems"]
    assert "images/train/0.png: has the same name as" in twice and "images/notes: no images" in stray
    assert report["splits"]["train"]["images"] == 2


def test_a_test_split_without_labels_is_one_note(folder_dataset):
    shutil.copytree(folder_dataset / "images/train", folder_dataset / "images/test")
    for path in folder_dataset.glob("images/test/*"):
        Image.new("RGB", (64, 48), (int(path.stem), 7, 7)).save(path)
    report = check("folder", folder_dataset)
    assert report["problems"] == [] and report["notes"] == ["test: 2 images without label maps, for eval.py --predict alone"]
    (folder_dataset / "labels/test").mkdir()
    for name in ("0", "1"):  # as Cityscapes' own
        Image.new("L", (64, 48), 255).save(folder_dataset / f"labels/test/{name}.png")
    report = check("folder", folder_dataset)
    assert report["problems"] == [] and len(report["notes"]) == 1 and report["splits"]["test"]["classes"] == {}
    assert report["notes"][0].startswith("test: no pixel of its 2 label maps has a label")
    Image.new("L", (64, 48), 255).save(folder_dataset / "labels/train/1.png")
    assert "labels/train/1.png: no pixel has a label" in check("folder", folder_dataset)["problems"][0]


def test_splits_may_be_joined(folder_dataset):
    assert list(check("folder", folder_dataset, ["train+val"])["splits"]) == ["train", "val"]
    for splits in (["train", "train"], ["train+"], ["train+val", "val"]):
        with pytest.raises(DataError, match="empty or there twice"):
            check("folder", folder_dataset, splits)


@pytest.mark.parametrize("name", ["x.psd", "x.cur", "x.xbm", "x.PSD", "x", "x.txt"])
def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_read(folder_dataset, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(data, "check", lambda *_: pytest.fail("was read"))
    status, out, errors = printed(capsys, folder_dataset, "--sheet", tmp_path / name)
    assert status == 2 and out == "" and f"{name} has " in errors and "give e.g. sheet.png" in errors


def test_the_root_is_given_once(folder_dataset, tmp_path, capsys):
    assert printed(capsys, "--data", folder_dataset)[0] == 0
    for flags in ((), (folder_dataset, "--data", folder_dataset)):
        assert "give the dataset's folder once" in printed(capsys, *flags)[2]
    _, _, errors = printed(capsys, tmp_path / "none")
    assert "none: no such folder; give the dataset's folder as ROOT" in errors and "--data" not in errors


def test_too_little_memory_is_one_line(folder_dataset, capsys, monkeypatch):
    def read(path):
        raise MemoryError

    monkeypatch.setattr(data, "read_image", read)
    status, _, errors = printed(capsys, folder_dataset)
    assert status == 2 and errors.startswith("data.py: out of memory") and errors.count("\n") == 1


def test_a_reader_that_goes_away_and_ctrl_c_leave_no_traceback(folder_dataset):
    command = [sys.executable, ROOT / "data.py", "check", folder_dataset]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.stderr == b"" and done.returncode == 2
    for i in range(2, 300):
        for kind in ("images", "labels"):
            (folder_dataset / kind / f"train/{i}.png").symlink_to("0.png")
    # In one write each: two threads' print would mix text and ends of lines.
    slow = "import data, os, sys, time\ndef read(path, real=data.read_image):\n os.write(1, b'read\\n'); time.sleep(0.2)\n return real(path)"
    code = f"{slow}\ndata.read_image = read; sys.exit(data.main(['check', {str(folder_dataset)!r}]))"
    handler = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **handler
    )
    assert process.stdout.readline() == "read\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "data.py: interrupted\n")
    assert out.count("read") < 200  # what had not begun is not read first


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
    titles = sheet[4:16, 4:40], sheet[278:290, 4:40]  # white on black: which split a row is of
    assert all({0, 255} <= set(np.unique(title)) for title in titles) and (titles[0] != titles[1]).any()
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
