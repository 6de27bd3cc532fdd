"""Images and labels are found, read, checked and augmented together; every process gets its share and no more."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import ROOT
from data import (
    CAMVID,
    CITYSCAPES,
    IGNORE,
    PADDING_RGB,
    Augmentation,
    Classes,
    DataError,
    RamCache,
    SegmentationDataset,
    TrainBatches,
    label_problem,
    label_table,
    normalise,
    open_dataset,
    read_image,
    read_label,
)

IDS = label_table(range(20), ignored=[IGNORE])
PLAIN = {"scale_range": (1.0, 1.0), "flip": False, "brightness": 0.0, "channel_noise": 0.0}


# -------------------------------------------------------------------------------------------------------------- layouts


def test_cityscapes_label_ids_become_train_ids(drawn, tmp_path):
    # From the table of cityscapesScripts: label id -> train id, all others of 0 to 33 are ignored.
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    expected |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    ids = np.array([*range(34), 255], np.uint8)
    Image.fromarray(ids[None]).save(tmp_path / "label.png")
    read = read_label(tmp_path / "label.png", open_dataset("cityscapes", drawn, "val").table)[0]
    assert read.tolist() == [expected.get(int(i), IGNORE) for i in ids]
    assert CITYSCAPES.names[0] == "road" and CITYSCAPES.names[18] == "bicycle" and len(CITYSCAPES.names) == 19


def test_camvid_layout_and_unlabelled(tmp_path):
    for name, value in (("a.jpg", 3), ("b.png", 11)):
        (tmp_path / "train").mkdir(exist_ok=True), (tmp_path / "trainannot").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "train" / name)
        Image.new("L", (40, 30), value).save(tmp_path / "trainannot" / f"{name[0]}.png")
    dataset = open_dataset("camvid", tmp_path, "train")
    assert [dataset[i][1].unique().tolist() for i in range(2)] == [[3], [IGNORE]]
    assert dataset.classes == CAMVID and len(CAMVID.names) == 11


def test_coarse_labels_belong_to_train_extra(tmp_path):
    for folder, end in (("leftImg8bit", "leftImg8bit"), ("gtCoarse", "gtCoarse_labelIds")):
        path = tmp_path / folder / "train_extra" / "city" / f"city_000000_000019_{end}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB" if end == "leftImg8bit" else "L", (40, 40), 0).save(path)
    assert len(open_dataset("cityscapes", tmp_path, "train_extra")) == 1


def test_folder_layout(folder_dataset):
    dataset = open_dataset("folder", folder_dataset, "train")
    image, label = dataset[0]
    assert image.shape == (48, 64, 3) and image.dtype == label.dtype == torch.uint8
    assert label[0].tolist() == [0] * 20 + [1] * 20 + [2] * 24
    assert dataset.classes.names == ("left", "middle", "right")
    assert len(set(dataset.classes.colours)) == 3


def with_classes(root, **content):
    """The samples of split train under another classes.json."""
    (root / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"], **content}))
    return open_dataset("folder", root, "train")


def test_folder_may_choose_what_is_ignored(folder_dataset):
    values = [0, [], 2]  # no value means "middle"
    assert with_classes(folder_dataset, values=values, ignore=[1, 255])[0][1].unique().tolist() == [0, 2, IGNORE]


def test_classes_may_have_other_values_and_several(folder_dataset):
    # Columns of 0, 1 and 2 as in the fixture.
    for names, values, expected in (
        (["right", "left"], [[1, 2], 0], [1, 0, 0]),
        (["a", "b", "c"], [2, 0, 1], [1, 2, 0]),
        (["a", "b"], [1, 2], [IGNORE, 0, 1]),
    ):
        dataset = with_classes(folder_dataset, names=names, values=values, ignore=[0] if IGNORE in expected else 255)
        assert dataset[0][1][0, [0, 20, 40]].tolist() == expected, values


@pytest.mark.parametrize("mode", ["1", "L"])
def test_masks_of_0_and_255_are_two_classes(folder_dataset, mode):
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).convert(mode).save(folder_dataset / "labels/train/0.png")
    dataset = with_classes(folder_dataset, names=["background", "road"], values=[0, 255])
    assert dataset[0][1][0].tolist() == [0] * 40 + [1] * 24  # 255 is ignored only where no class has it


def test_a_class_of_several_colours(folder_dataset):
    coloured(folder_dataset)
    red, green, blue = [200, 0, 0], [0, 200, 0], [0, 0, 200]
    fields = {"names": ["both", "right"], "labels": "colours", "values": [[red, green], blue], "ignore": [0, 0, 0]}
    dataset = with_classes(folder_dataset, **fields)
    assert dataset[0][1][10, [0, 20, 40]].tolist() == [0, 0, 1] and dataset[0][1][0].unique().tolist() == [IGNORE]


def test_a_value_has_one_meaning(folder_dataset):
    for content in (
        {"ignore": [0, 255]},  # 1-based labels: names[0] could never occur
        {"ignore": [1, 255]},
        {"values": [0, 255, 2], "ignore": 255},
        {"values": [0, 1, [1, 2]]},
    ):
        with pytest.raises(
            DataError, match="classes.json: class . .0-based. shares a value with another class or with"
        ):
            with_classes(folder_dataset, **content)


def lab(colours):
    """CIELAB of sRGB colours, by the standard's formulas, with the white of D65."""
    levels = np.array(colours) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    x, y, z = np.moveaxis(xyz / [0.9505, 1, 1.089], -1, 0)
    x, y, z = (np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def test_automatic_colours_are_told_apart_by_eye(folder_dataset):
    # A distance of 2.3 in CIELAB is just noticeable side by side; black is what is ignored.
    for count, least in ((12, 45), (30, 25), (254, 5)):
        colours = with_classes(folder_dataset, names=[str(i) for i in range(count)]).classes.colours
        points = lab([(0, 0, 0), *colours])
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1000 * np.eye(count + 1)
        assert distances.min() > least, (count, distances.min())


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1]", "'list' object has no attribute 'keys'"),
        ('{"names": []}', "expected 2 to 254 distinct names, got 0"),
        ('{"colours": []}', "names must be a list of non-empty strings"),
        ('{"names": "abc"}', "names must be a list of non-empty strings"),
        ('{"names": ["a", 1]}', "names must be a list of non-empty strings"),
        ('{"names": ["a", " "]}', "names must be a list of non-empty strings"),
        ('{"names": ["a", "b", "a"]}', "expected 2 to 254 distinct names, got 3"),
        ('{"names": ["a"]}', "expected 2 to 254 distinct names, got 1; the background is a class, too"),
        (
            '{"names": ["a", "b"], "colors": [[1, 2, 3]]}',
            "'colors' is unknown, expected names, values, colours, ignore",
        ),
        ('{"names": ["a"], "labels": "colors"}', "'labels: colors' is unknown"),
        ('{"names": ["a", "b"], "colours": [[1, 2]]}', "cannot reshape array of size 2"),
        ('{"names": ["a", "b"], "colours": [[1, 2, 3]]}', "values and colours must be lists of 2, one for each name"),
        ('{"names": ["a", "b"], "values": [1]}', "values and colours must be lists of 2, one for each name"),
        ('{"names": ["a", "b"], "values": 1}', "values and colours must be lists of 2, one for each name"),
        ('{"names": ["a", "b"], "values": [1, "2"]}', "values must be integers from 0 to 255"),
        ('{"names": ["a", "b"], "labels": "colours"}', "values and colours must be lists of 2, one for each name"),
        ('{"names": ["a", "b"], "colours": [[0.5, 1, 2], [1, 2, 3]]}', "colours must be integers from 0 to 255"),
        ('{"names": ["a", "b"], "colours": ["abc"]}', "colours must be integers"),
        ('{"names": ["a", "b"], "ignore": 300}', "ignore must be integers from 0 to 255"),
        ('{"names": ["a", "b"], "ignore": true}', "ignore must be integers"),
        (b'{"names": ["\xff"]}', "can't decode byte"),
    ],
)
def test_bad_class_file_is_named_in_one_line(folder_dataset, content, message):
    (folder_dataset / "classes.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f'classes.json: .*{message}.*; write e.g. {{"names"') as caught:
        open_dataset("folder", folder_dataset, "train")
    assert len(str(caught.value).splitlines()) == 1


def test_missing_class_file_is_named(folder_dataset):
    (folder_dataset / "classes.json").unlink()
    with pytest.raises(DataError, match='classes.json: .*No such file.*; write e.g. {"names"'):
        open_dataset("folder", folder_dataset, "train")


def test_class_file_with_a_byte_order_mark_is_read(folder_dataset):
    content = '{"names": ["left", "middle", "right"]}'.encode("utf-8-sig")
    (folder_dataset / "classes.json").write_bytes(content)
    assert open_dataset("folder", folder_dataset, "train").classes.names == ("left", "middle", "right")


def coloured(root, ignore=([0, 0, 0],), **changes):
    """Turns the label maps of the fixture's dataset into the classes' colours."""
    colours = [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    content = {
        "names": ["left", "middle", "right"],
        "colours": colours,
        "labels": "colours",
        "ignore": ignore,
        **changes,
    }
    (root / "classes.json").write_text(json.dumps(content))
    for path in root.glob("labels/*/*.png"):
        label = np.array(Image.open(path))
        label[:4] = 3  # to be ignored
        Image.fromarray(np.array([*colours, [0, 0, 0]], np.uint8)[label]).save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_labels_in_colours_are_read_as_classes(folder_dataset, mode):
    before = [open_dataset("folder", folder_dataset, "train")[i][1].numpy() for i in range(2)]
    coloured(folder_dataset)
    for path in folder_dataset.glob("labels/*/*.png"):
        label = Image.open(path)
        (label.quantize(8) if mode == "P" else label.convert(mode)).save(path)
    dataset = open_dataset("folder", folder_dataset, "train")
    for i, expected in enumerate(before):
        read = dataset[i][1].numpy()
        assert (read[:4] == IGNORE).all() and (read[4:] == expected[4:]).all()


def test_a_colour_of_no_class_is_named(folder_dataset):
    coloured(folder_dataset, ignore=[])
    with pytest.raises(DataError, match=r"labels/train/0.png: label value \[0, 0, 0\] in 256 pixels is no class"):
        open_dataset("folder", folder_dataset, "train")[0]


def test_colours_without_saying_so_are_refused_with_the_remedy(folder_dataset):
    coloured(folder_dataset)
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))
    with pytest.raises(DataError, match='mode RGB, .*set "labels": "colours" in classes.json'):
        open_dataset("folder", folder_dataset, "train")[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ignore": 255}, "cannot reshape array"),
        ({"ignore": [[200, 0, 0]]}, "class 0 .0-based. shares a value with another class or with ignore"),
        ({"ignore": [[256, 0, 0]]}, "from 0 to 255"),
        ({"colours": None}, "colours must be integers from 0 to 255"),
    ],
)
def test_classes_in_colours_are_checked(folder_dataset, changes, message):
    coloured(folder_dataset, **changes)
    with pytest.raises(DataError, match=message):
        open_dataset("folder", folder_dataset, "train")


def test_colour_map_shows_the_palette_and_ignored_pixels_black():
    classes = Classes(("a", "b"), ((1, 2, 3), (250, 0, 7)))
    label = np.array([[0, 1, IGNORE], [1, 1, 0]], np.uint8)
    picture = classes.colour_map(label)
    assert picture.mode == "RGB"
    a, b, black = [1, 2, 3], [250, 0, 7], [0, 0, 0]
    assert np.array(picture).tolist() == [[a, b, black], [b, b, a]]
    assert np.array(classes.colour_map(label.T)).tolist() == [[a, b], [b, b], [black, a]]  # of other strides, too


def test_classes_survive_a_checkpoint():
    assert Classes.from_dict(json.loads(json.dumps(CITYSCAPES.to_dict()))) == CITYSCAPES


# ------------------------------------------------------------------------------------------------------------ bad input


def test_no_data_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset("cityscapes", tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="leftImg8bit/train: no images"):
        open_dataset("cityscapes", tmp_path, "train")
    with pytest.raises(DataError, match="dataset 'kitti' is unknown, expected one of cityscapes, camvid, folder"):
        open_dataset("kitti", tmp_path, "train")


def test_data_of_another_dataset_are_recognised(folder_dataset, drawn, tmp_path):
    (tmp_path / "camvid/trainannot").mkdir(parents=True)
    for root, own in ((folder_dataset, "folder"), (drawn, "cityscapes"), (tmp_path / "camvid", "camvid")):
        for name in {"folder", "cityscapes", "camvid"} - {
            own
        }:  # the default is cityscapes in train.py, folder in check.py
            with pytest.raises(DataError, match=f"is of dataset {own}; give --dataset {own}"):
                open_dataset(name, root, "train")


def test_image_without_label_and_label_without_image_are_named(folder_dataset):
    (folder_dataset / "labels/train/1.png").rename(folder_dataset / "labels/train/2.png")
    with pytest.raises(
        DataError, match=r"images/train/1.png: no file of this name in .*labels/train; .* \(and 1 more\)"
    ):
        open_dataset("folder", folder_dataset, "train")
    (folder_dataset / "images/train/1.png").unlink()
    with pytest.raises(DataError, match=r"labels/train/2.png: no file of this name in .*images/train"):
        open_dataset("folder", folder_dataset, "train")


def test_labels_of_another_name_are_found_and_the_line_renames_them(folder_dataset):
    for old, new in (("{}.png", "{}_L.png"), ("{}_L.png", "{}.jpg.png")):  # original CamVid; labelling programs
        for i in range(2):
            folder = folder_dataset / "labels/train"
            (folder / old.format(i)).rename(folder / new.format(i))
        with pytest.raises(
            DataError, match=r"images/train/0.png: no file of this name in .*; to rename all: cd "
        ) as caught:
            open_dataset("folder", folder_dataset, "train")
        if old == "{}_L.png":
            line = str(caught.value).partition("to rename all: ")[2].removesuffix(" (and 1 more)")
            subprocess.run(["bash", "-c", line], check=True)
    assert len(open_dataset("folder", folder_dataset, "train")) == 2


def test_pictures_in_one_folder_are_split_without_parting_neighbours(folder_dataset):
    for kind in ("images", "labels"):
        content = (folder_dataset / kind / "train/0.png").read_bytes()
        (folder_dataset / kind).rename(folder_dataset / f"old {kind}")
        (folder_dataset / kind).mkdir()
        for i in range(40):
            (folder_dataset / kind / f"frame{i:02}.png").write_bytes(content)
    train, val = (
        [sample.image.stem for sample in open_dataset("folder", folder_dataset, split).samples]
        for split in ("train", "val")
    )
    assert train == [f"frame{i:02}" for i in range(32)] and val == [f"frame{i}" for i in range(32, 40)]
    with pytest.raises(DataError, match="images/test: no images"):
        open_dataset("folder", folder_dataset, "test")


def test_a_split_may_be_part_of_another(folder_dataset, drawn):
    def names(split, name="folder", root=folder_dataset):
        return [sample.image.name for sample in open_dataset(name, root, split).samples]

    assert names("train:1*") == ["1.png"] and names("train:0*+val:1") == ["0.png", "1.png"]
    assert names("train+train:1*") == names("train")  # each image once
    with pytest.raises(DataError, match=r"images/train/x\*: no images; check"):
        names("train:x*")
    cities = names("train:street/*", "cityscapes", drawn)
    assert cities == names("train", "cityscapes", drawn) and len(cities) == 12


def test_label_maps_saved_with_smoothing_are_named_as_such(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    mask = Image.new("L", (64, 48))
    mask.paste(255, (20, 10, 50, 40))
    ramp = mask.rotate(17, Image.Resampling.BICUBIC).resize((256, 192), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    mask.save(buffer, "JPEG")
    for label, in_colours in ((ramp, False), (Image.open(buffer), False), (ramp.convert("RGB"), True)):
        label.save(path)
        fields = {"names": ["background", "road"], "values": [0, 255]}
        if in_colours:
            fields = {"names": fields["names"], "values": [[0] * 3, [255] * 3], "labels": "colours"}
        message = r"0.png: \d+ values on \d+.\d% of the pixels lie between those of the classes, .* nearest neighbour"
        with pytest.raises(DataError, match=message) as error:
            with_classes(folder_dataset, **fields).read(0)
        assert "\n" not in str(error.value)


def test_smoothed_colours_are_told_from_forgotten_classes(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    picture = Image.new("RGB", (64, 48), (128, 64, 128))
    picture.paste((0, 0, 142), (20, 10, 50, 40))
    picture.paste((107, 142, 35), (40, 0, 64, 20))
    colours = {"names": ["road", "car", "tree"], "labels": "colours"}
    colours["colours"] = [[128, 64, 128], [0, 0, 142], [107, 142, 35]]
    picture.rotate(10, Image.Resampling.BILINEAR, fillcolor=(128, 64, 128)).save(path)
    with pytest.raises(DataError, match="lie between those of the classes"):
        with_classes(folder_dataset, **colours).read(0)
    for value in range(9):  # nine more classes
        picture.paste((200, 25 * value, 255 - 25 * value), (5 * value, 40, 5 * value + 5, 48))
    picture.save(path)
    with pytest.raises(DataError, match="in 360 pixels is no class"):
        with_classes(folder_dataset, **colours).read(0)
    Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(48, 0)).save(path)  # 64 classes
    with pytest.raises(DataError, match="in 2928 pixels is no class"):
        with_classes(folder_dataset, names=["a", "b", "c"]).read(0)


def test_the_advice_for_labels_from_1_on_shifts_no_name(folder_dataset):
    for i in range(2):
        path = folder_dataset / f"labels/train/{i}.png"
        Image.fromarray(np.array(Image.open(path)) + 1).save(path)
    with pytest.raises(DataError, match=r'label value 3 in .* "values": \[1, 2\], "ignore": \[0\] if 0 is no label'):
        with_classes(folder_dataset)[0]
    dataset = with_classes(folder_dataset, values=[1, 2, 3], ignore=[0])
    assert dataset[0][1].unique().tolist() == [0, 1, 2]


def fault(dataset, every_class=True):
    return label_problem(dataset, sum(dataset.count_pixels(i) for i in range(len(dataset))), every_class)


def test_a_class_without_a_pixel_is_a_fault_that_names_the_values(folder_dataset):
    assert fault(with_classes(folder_dataset)) is None
    names = ["left", "middle", "right", "up"]
    text = fault(with_classes(folder_dataset, names=names))
    assert text.startswith("values 0, 1, 2 occur; class 'up' [3] has no pixel: leave out its name")
    assert fault(with_classes(folder_dataset, names=names), every_class=False) is None
    for i in range(2):
        mask = np.array(Image.open(folder_dataset / f"labels/train/{i}.png")) // 2 * 255
        Image.fromarray(mask.astype(np.uint8)).save(folder_dataset / f"labels/train/{i}.png")
    text = fault(with_classes(folder_dataset, names=["background", "road"]))
    assert text.startswith(
        "values 0, 255 occur; class 'road' [1] has no pixel: write \"values\": [0, 255] if these are"
    )
    assert fault(with_classes(folder_dataset, names=["background", "road"], values=[0, 255])) is None


def training(root, **flags):
    """Starts training on a dataset of one's own, of 48x64 pixels; DataError where it is refused."""
    flags = {"out": root / "runs", "epochs": 1, "batch_size": 2, "workers": 0, "device": "cpu", **flags}
    argv = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    train.main(["--dataset", "folder", "--data", str(root), "--crop-size", "32", "48", *argv])


def test_training_refuses_wrong_data_before_the_first_step(folder_dataset, monkeypatch):
    def save(kind, split, values):
        Image.fromarray(values.astype(np.uint8)).save(folder_dataset / kind / split / "1.png")

    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was taken"))
    label = np.array(Image.open(folder_dataset / "labels/train/1.png"))
    image = np.array(Image.open(folder_dataset / "images/val/1.png"))
    masks, classes_json = ["labels/train/0.png", "labels/train/1.png"], folder_dataset / "classes.json"
    kept = {path: (folder_dataset / path).read_bytes() for path in masks}
    for cache in ("none", "ram"):
        for kind, split, wrong, message in (
            ("labels", "val", label + 7, "labels/val/1.png: label value 9, 7, 8 in 3072 pixels is no class"),
            ("labels", "train", label + 7, "labels/train/1.png: label value 9, 7, 8"),
            ("images", "val", image[:-1], "labels/val/1.png: 64x48 pixels, its image .*images/val/1.png 64x47"),
        ):
            path = folder_dataset / kind / split / "1.png"
            before = path.read_bytes()
            save(kind, split, wrong)
            with pytest.raises(DataError, match=message):
                training(folder_dataset, cache=cache)
            path.write_bytes(before)
        for value, message in ((255, "labels/train: no pixel has a label"), (0, "class 'middle' .1. has no pixel")):
            for path in masks:
                Image.new("L", (64, 48), value).save(folder_dataset / path)
            with pytest.raises(DataError, match=message):
                training(folder_dataset, cache=cache)
            for path in masks:
                (folder_dataset / path).write_bytes(kept[path])
    for split in ("train", "val"):
        for i in range(2):
            Image.fromarray((label // 2 * 255).astype(np.uint8)).save(folder_dataset / f"labels/{split}/{i}.png")
    classes_json.write_text(json.dumps({"names": ["background", "road"]}))
    with pytest.raises(
        DataError, match=r"values 0, 255 occur; class 'road' \[1\] has no pixel: write \"values\": \[0, 255\]"
    ):
        training(folder_dataset)
    assert not list(folder_dataset.rglob("*.pth"))


def test_masks_of_0_and_255_train_as_two_classes(folder_dataset):
    for path in folder_dataset.glob("labels/*/*.png"):
        Image.fromarray((np.array(Image.open(path)) // 2 * 255).astype(np.uint8)).save(path)
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["background", "road"], "values": [0, 255]}))
    training(folder_dataset)
    records = (folder_dataset / "runs/logs/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["class_iou"].keys() == {"background", "road"}


def test_ignored_pixels_alone_are_a_fault(folder_dataset):
    for i in range(2):
        Image.new("L", (64, 48), 255).save(folder_dataset / f"labels/train/{i}.png")
    assert "no pixel has a label; label some, or look at what classes.json ignores: [255]" in fault(
        with_classes(folder_dataset)
    )


def as_train_ids(root, drawn, name):
    """A copy of split val of the drawn scenes whose label maps hold train ids, called *_{name}.png."""
    shutil.copytree(drawn / "leftImg8bit/val", root / "leftImg8bit/val")
    for i, sample in enumerate(open_dataset("cityscapes", drawn, "val").samples):
        path = root / sample.label.relative_to(drawn)
        path.parent.mkdir(parents=True, exist_ok=True)
        train_ids = open_dataset("cityscapes", drawn, "val")[i][1].numpy()
        Image.fromarray(train_ids).save(path.with_name(path.name.replace("labelIds", name)))


def test_train_ids_in_files_of_label_ids_are_noticed(drawn, tmp_path):
    assert fault(open_dataset("cityscapes", drawn, "val"), False) is None
    as_train_ids(tmp_path, drawn, "labelIds")
    dataset = open_dataset("cityscapes", tmp_path, "val")
    assert "no label id above 18 in *_labelIds.png, so they hold train ids" in fault(dataset, False)


def test_label_maps_of_train_ids_are_read_where_there_are_no_others(drawn, tmp_path):
    as_train_ids(tmp_path, drawn, "labelTrainIds")
    expected, dataset = (open_dataset("cityscapes", root, "val") for root in (drawn, tmp_path))
    assert len(dataset) == 5 and not any(sample.instances for sample in dataset.samples)
    for (_, label), (_, train_ids) in zip(dataset, expected, strict=True):
        assert torch.equal(label, train_ids)


def test_sizes_that_differ_are_named(folder_dataset):
    Image.new("L", (64, 47)).save(folder_dataset / "labels/train/0.png")
    with pytest.raises(DataError, match=r"labels/train/0.png: 64x47 pixels, its image .*images/train/0.png 64x48"):
        open_dataset("folder", folder_dataset, "train")[0]


def test_label_values_of_no_class_are_named(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    label = np.array(Image.open(path))
    label[3, 5], label[7, :2] = 17, 44
    Image.fromarray(label).save(path)
    with pytest.raises(DataError, match="labels/train/0.png: label value 44, 17 in 3 pixels is no class; correct"):
        open_dataset("folder", folder_dataset, "train")[0]
    assert int(with_classes(folder_dataset, ignore=[17, 44, 255])[0][1][3, 5]) == IGNORE


def test_palette_label_is_read_by_its_indices(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    label = Image.open(path)
    palette = Image.frombytes("P", label.size, label.tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(path)
    assert open_dataset("folder", folder_dataset, "train")[0][1].unique().tolist() == [0, 1, 2]


def test_16_bit_image_is_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: image of mode I;16, expected 8 bits per channel"):
        read_image(tmp_path / "x.png")


def test_two_images_of_one_name_are_refused(folder_dataset):
    Image.new("RGB", (64, 48)).save(folder_dataset / "images/train/0.jpg")
    with pytest.raises(DataError, match="0.png: has the same name as .*0.jpg"):
        open_dataset("folder", folder_dataset, "train")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_truncated_png_is_named(folder_dataset, kind):
    path = folder_dataset / kind / "train/0.png"
    content = path.read_bytes()
    dataset = open_dataset("folder", folder_dataset, "train")
    for length in (0, 8, 20, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{kind}/train/0.png: cannot be read .*; replace or remove it") as caught:
            dataset[0]
        assert len(str(caught.value).splitlines()) == 1


def test_no_flipped_bit_of_a_png_gives_other_pixels(tmp_path):
    # Pillow's load() skips the checksums of the pixels: with it alone, some of these bits give other labels in silence.
    label = np.zeros((48, 64), np.uint8)
    label[:, :20], label[10:20] = 1, 2
    Image.fromarray(label).save(tmp_path / "label.png")
    content = (tmp_path / "label.png").read_bytes()
    path, refused = tmp_path / "flipped.png", 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert (read_label(path, IDS) == label).all()
        except DataError as error:
            assert "flipped.png: cannot be read" in str(error)
            refused += 1
    assert refused > 0.9 * 8 * len(content)  # all but the end of the file, which holds no pixels


@pytest.mark.parametrize("suffix", [".jpg", ".ppm"])
def test_a_label_map_in_a_format_that_alters_values_is_refused(tmp_path, suffix):
    Image.new("L", (40, 40), 3).save(tmp_path / f"x{suffix}")
    with pytest.raises(DataError, match="which alters class ids; save it as PNG"):
        read_label(tmp_path / f"x{suffix}", IDS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_label_maps_of_other_modes_are_named(tmp_path, mode):
    Image.new(mode, (40, 40)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=f"x.png: label map of mode {mode}, expected class ids of 8 bits"):
        read_label(tmp_path / "x.png", IDS)


def test_modes_become_rgb_without_their_transparency(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    grey, clear = np.stack([rgb[..., 0]] * 3, -1), np.zeros((20, 30, 1), np.uint8)
    palette, index = rgb[0, :8], rgb[..., 0] % 8
    paletted = Image.frombytes("P", (30, 20), index.tobytes())
    paletted.putpalette(palette.tobytes())
    cases = (
        (Image.fromarray(rgb), {}, rgb),
        (Image.fromarray(rgb), {"transparency": tuple(rgb[0, 0].tolist())}, rgb),
        (Image.fromarray(np.concatenate([rgb, clear], -1)), {}, rgb),
        (Image.fromarray(rgb[..., 0]), {}, grey),
        (Image.fromarray(np.concatenate([grey[..., :1], clear], -1), "LA"), {}, grey),
        (paletted, {}, palette[index]),
        (paletted, {"transparency": bytes(8)}, palette[index]),
        (paletted, {"transparency": 3}, palette[index]),
        (Image.fromarray(rgb[..., 0] > 127), {}, np.where(grey > 127, 255, 0)),
    )
    for image, options, expected in cases:
        image.save(tmp_path / "x.png", **options)
        assert np.array_equal(np.array(read_image(tmp_path / "x.png")), expected), (image.mode, options)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").mode == "RGB"


# Where the first row and the first column of the file are shown, by the Exif standard's words.
SHOWN = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_images_are_read_upright(tmp_path, orientation, suffix):
    rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    Image.fromarray(rgb).save(path, exif=exif, quality=100, **({"lossless": True} if suffix == ".webp" else {}))
    image, expected = read_image(path), SHOWN[orientation](rgb)
    assert np.abs(np.array(image).astype(int) - expected).mean() < (8 if suffix == ".jpg" else 1e-9)
    assert image.size == expected.shape[1::-1]


def test_damaged_exif_data_are_ignored(tmp_path):
    Image.new("RGB", (40, 48)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "x.jpg").size == (40, 48)


def test_a_label_map_that_is_not_turned_like_its_image_is_named(folder_dataset):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, label = folder_dataset / "images/train/0.png", folder_dataset / "labels/train/0.png"
    Image.open(image).save(image, exif=exif)
    dataset = open_dataset("folder", folder_dataset, "train")
    with pytest.raises(
        DataError, match=r"0.png: 64x48 pixels, its image .*0.png 48x64 upright, as its Exif orientation"
    ):
        dataset[0]
    turned = Image.open(label).transpose(Image.Transpose.ROTATE_270)
    turned.save(label)
    pixels, labels = dataset[0]
    assert pixels.shape == (64, 48, 3) and labels.shape == (64, 48) and labels[0].tolist() == [0] * 48
    Image.open(label).transpose(Image.Transpose.ROTATE_90).save(label, exif=exif)  # with the Exif data of its image
    assert torch.equal(dataset[0][1], labels)
    assert (RamCache(dataset)[0][1] == labels.numpy()).all()


def test_linked_folders_are_read_and_hidden_files_are_not(folder_dataset, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "site" / kind).mkdir(parents=True)
        train = folder_dataset / kind / "train"
        (tmp_path / "site" / kind / "far.png").write_bytes((train / "0.png").read_bytes())
        (train / "site").symlink_to(tmp_path / "site" / kind)  # as photos of a camera on another disk would be
        (train / ".ipynb_checkpoints").mkdir()
        (train / ".ipynb_checkpoints/0-checkpoint.png").write_bytes((train / "0.png").read_bytes())
    (folder_dataset / "images/train/._0.png").write_bytes(b"of a Mac")
    samples = open_dataset("folder", folder_dataset, "train").samples
    names = [sample.image.relative_to(folder_dataset).as_posix() for sample in samples]
    assert names == [f"images/train/{name}.png" for name in ("0", "1", "site/far")]


def test_each_layout_looks_as_deep_as_it_is(tmp_path, folder_dataset):
    def place(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40)).save(path)

    for city in ("a", "a/b", "."):
        for folder, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            place(tmp_path / folder / "val" / city / f"x_{end}.png")
    place(tmp_path / "leftImg8bit/val/a/other.png")
    assert [s.image.parent.name for s in open_dataset("cityscapes", tmp_path, "val").samples] == ["a"]
    for folder in ("val", "valannot"):
        place(tmp_path / "camvid" / folder / "x.png"), place(tmp_path / "camvid" / folder / "a/y.png")
    assert [s.image.name for s in open_dataset("camvid", tmp_path / "camvid", "val").samples] == ["x.png"]
    for kind in ("images", "labels"):
        place(folder_dataset / kind / "val/a/b/c/x.png")
    assert len(open_dataset("folder", folder_dataset, "val")) == 3


def test_a_split_that_is_empty_or_repeated_is_refused(folder_dataset):
    for split in ("", "train+", "+train", "train+train", "train+val+train"):
        with pytest.raises(DataError, match="empty or repeated part"):
            open_dataset("folder", folder_dataset, split)
    assert len(open_dataset("folder", folder_dataset, "train+val")) == 4


def test_names_of_all_kinds_are_read_and_named(folder_dataset):
    for i, name in enumerate(("a b.png", "ä 道.png", "%s{}[1].png", "-x.png")):
        for kind in ("images", "labels"):
            content = (folder_dataset / kind / "train/0.png").read_bytes()
            (folder_dataset / kind / "train" / name).write_bytes(content)
        dataset = open_dataset("folder", folder_dataset, "train")
        index = next(i for i, sample in enumerate(dataset.samples) if sample.image.name == name)
        assert len(dataset) == 3 + i and dataset[index][0].shape == (48, 64, 3)


def test_too_little_memory_is_not_reported_as_a_damaged_file(folder_dataset, monkeypatch):
    def load(image):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for read in (read_image, lambda path: read_label(path, IDS)):
        with pytest.raises(MemoryError):
            read(folder_dataset / "labels/train/0.png")


def test_other_formats_are_refused_whatever_the_suffix(tmp_path):
    # Of Pillow's other decoders some start programs (EPS: Ghostscript).
    for kind in ("GIF", "ICO", "EPS"):
        Image.new("RGB", (40, 40)).save(tmp_path / "x.png", kind)
        with pytest.raises(DataError, match="x.png: cannot be read .cannot identify image file"):
            read_image(tmp_path / "x.png")
    with pytest.raises(DataError, match="none.png: cannot be read .*No such file"):
        read_image(tmp_path / "none.png")


def test_a_palette_with_transparency_gives_no_warning(tmp_path, recwarn):
    image = Image.new("P", (40, 40))
    image.putpalette(bytes(range(48)))
    image.save(tmp_path / "p.png", transparency=bytes(range(16)))
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (0, 1, 2) and len(recwarn) == 0


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("BMP", {}), ("PPM", {}), ("WEBP", {})]
)
def test_other_formats_cut_short_are_named(tmp_path, kind, options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(buffer, kind, **options)
    path = tmp_path / "x.bmp"
    for length in (0, 1, 10, 30, len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 20):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(DataError, match="x.bmp: cannot be read"):
            read_image(path)


# --------------------------------------------------------------------------------------------------------- augmentation


def coordinates(height, width):
    """An image whose pixels say where they are (red = x, green = y), and a label that says the same in blocks of 8."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    return Image.fromarray(image), (y // 8 * 16 + x // 8).astype(np.uint8)


def test_image_and_label_move_together():
    image, label = coordinates(96, 128)
    for position in range(50):
        crop, truth = Augmentation((48, 64), brightness=0, channel_noise=0)(image, label, (0, position))
        crop, truth = np.array(crop).astype(int), np.array(truth)
        inside = truth != IGNORE
        # Nearest and bilinear may fall into neighbouring pixels, so the block's borders are left out.
        x, y = crop[..., 0], crop[..., 1]
        inside &= (x % 8 > 1) & (x % 8 < 6) & (y % 8 > 1) & (y % 8 < 6)
        assert inside.sum() > 100
        assert (truth[inside] == (y // 8 * 16 + x // 8)[inside]).all()


def test_cropping_before_resizing_is_resizing_then_cropping():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8))
    values = np.random.default_rng(1).integers(0, 200, (120, 200), np.uint8)
    for position in range(40):
        crop, truth = Augmentation((40, 60), (0.8, 2.0), False, 0, 0)(image, values, (0, position))
        rng = np.random.default_rng((0, 0, position))
        scale = rng.uniform(0.8, 2.0)
        height, width = round(120 * scale), round(200 * scale)
        top, left = (int(rng.integers(0, full - part, endpoint=True)) for full, part in ((height, 40), (width, 60)))
        whole = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 60, top + 40))
        # Pillow keeps the box in float32 and rounds after each of two passes: now and then one level apart in each.
        difference = np.abs(np.array(crop).astype(int) - np.array(whole))
        assert difference.max() <= 2 and difference.mean() < 0.1
        # The nearest label by geometry; a sample on the border of two pixels may take either.
        y, x = (top + np.arange(40) + 0.5) * 120 / height, (left + np.arange(60) + 0.5) * 200 / width
        nearest = [
            values[np.ix_((y + dy).astype(int), (x + dx).astype(int))] for dy in (-1e-4, 1e-4) for dx in (-1e-4, 1e-4)
        ]
        assert np.any([np.array(truth) == labels for labels in nearest], axis=0).all()


def test_padding_is_the_mean_colour_and_ignored():
    image, label = Image.new("RGB", (64, 48), (10, 200, 30)), np.full((48, 64), 5, np.uint8)
    starts = set()
    for position in range(30):
        crop, truth = Augmentation((100, 120), **PLAIN)(image, label, (0, position))
        crop, truth = np.array(crop), np.array(truth)
        inside = (crop == (10, 200, 30)).all(-1)
        assert inside.sum() == 48 * 64
        assert (truth[inside] == 5).all() and (truth[~inside] == IGNORE).all()
        assert (crop[~inside] == PADDING_RGB).all()
        starts.add(tuple(np.argwhere(inside)[0]))
    assert len(starts) > 20  # anywhere, not in a corner


def test_random_numbers_have_the_stated_distribution():
    image, label = coordinates(64, 128)
    augment = Augmentation((32, 64), (0.5, 2.0))
    crops = [np.array(augment(image, label, (0, position))[0]).astype(int) for position in range(600)]
    red = [crop[..., 0] for crop in crops]
    flipped = np.mean([np.median(np.diff(r, axis=1)) < 0 for r in red])
    assert 0.4 < flipped < 0.6
    steps = [
        abs(
            np.diff(
                np.array(Augmentation((32, 64), (0.5, 2.0), False, 0, 0)(image, label, (0, p))[0])[..., 0].astype(int),
                axis=1,
            )
        ).mean()
        for p in range(300)
    ]
    assert min(steps) < 0.6 and max(steps) > 1.2  # x advances by 1 / scale per pixel


def test_colour_changes_within_bounds():
    image, label = Image.new("RGB", (40, 40), (100, 100, 100)), np.ones((40, 40), np.uint8)
    augment = Augmentation((40, 40), (1, 1), brightness=0.3, channel_noise=0.1)
    means = np.array([np.array(augment(image, label, (1, p))[0]).mean((0, 1)) for p in range(300)])
    assert 100 * 0.7 * 0.9 - 1 <= means.min() < 70 and 135 < means.max() <= 100 * 1.3 * 1.1 + 1
    assert np.ptp(means, axis=1).max() > 10  # channels move apart


def colours_of(pixel, positions=range(200), **choices):
    """(number, 3) colours that an image of one colour takes."""
    image, label = Image.new("RGB", (16, 16), pixel), np.ones((16, 16), np.uint8)
    augment = Augmentation((16, 16), (1, 1), flip=False, **{"brightness": 0, "channel_noise": 0, **choices})
    return np.array([np.array(augment(image, label, (1, p))[0])[0, 0] for p in positions]).astype(int)


def test_contrast_saturation_and_hue_by_their_definitions():
    # Contrast leaves medium grey as it is, and moves 27.5 away from it to between 13.75 and 41.25.
    assert (np.abs(colours_of((127, 127, 128), contrast=0.5) - [127, 127, 128]) <= 1).all()
    values = colours_of((100, 100, 100), contrast=0.5)
    assert 86 <= values.min() < 90 and 110 < values.max() <= 114 and (values == values[:, :1]).all()
    # Saturation and hue leave greys as they are. Saturation keeps the luma, hue the sum of the channels.
    for choices in ({"saturation": 0.5}, {"hue": 30}):
        assert (np.abs(colours_of((90, 90, 90), **choices) - 90) <= 1).all()
    luma = colours_of((120, 80, 100), saturation=0.5) @ [0.299, 0.587, 0.114]
    assert np.abs(luma - (120 * 0.299 + 80 * 0.587 + 100 * 0.114)).max() < 1
    turned = colours_of((120, 80, 100), hue=30)
    assert np.abs(turned.sum(1) - 300).max() <= 2 and np.ptp(turned, axis=0).min() > 8
    # A turn by 120 degrees would move each channel on to the next.
    assert any(np.abs(c - [100, 120, 80]).max() <= 3 or np.abs(c - [80, 100, 120]).max() <= 3
               for c in colours_of((120, 80, 100), range(400), hue=125))  # fmt: skip


def test_the_first_epochs_are_at_half_the_resolution():
    image = Image.fromarray(np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None] * 2, (64, 128, 3)).copy())
    label = np.ones((64, 128), np.uint8)
    augment = Augmentation((64, 96), (1, 1), False, 0, 0, half_epochs=3)
    for epoch, size, slope in ((1, (32, 48), 4), (3, (32, 48), 4), (4, (64, 96), 2)):
        crop, truth = augment(image, label, (epoch, 0))
        assert crop.size == truth.size == size[::-1]
        assert np.median(np.diff(np.array(crop)[10, :, 0].astype(int))) == slope


def test_samples_depend_on_their_key_alone(drawn):
    def load(workers):
        dataset = open_dataset("cityscapes", drawn, "train", Augmentation((64, 96), seed=3))
        batches = TrainBatches(len(dataset), 4, seed=3)
        batches.set_epoch(7)
        return list(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers))

    alone, shared = load(0), load(2)
    assert len(alone) == 3
    for (image, label), (same_image, same_label) in zip(alone, shared):
        assert torch.equal(image, same_image) and torch.equal(label, same_label)


def test_a_plain_loader_augments(drawn):
    dataset = open_dataset("cityscapes", drawn, "train", Augmentation((64, 96)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    epochs = [torch.cat([image for image, _ in loader]) for _ in range(2)]
    assert epochs[0].shape == (12, 64, 96, 3)
    torch.manual_seed(0)
    (first, _), (second, _) = dataset[3], dataset[3]
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(dataset[3][0], first)


def test_normalise_is_zero_mean_unit_variance_of_imagenet():
    images = torch.tensor([[[[124, 116, 104], [255, 0, 0]]]], dtype=torch.uint8)
    x = normalise(images)
    assert x.shape == (1, 3, 1, 2) and x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, :, 0, 0].abs().max() < 0.01
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor(expected))


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_share_the_same_global_batches(world_size):
    def global_batches(processes):
        ranks = [list(TrainBatches(50, 16, seed=1, rank=r, world_size=processes)) for r in range(processes)]
        return [[key for share in shares for key in share] for shares in zip(*ranks)]

    batches = global_batches(world_size)
    assert batches == global_batches(1)
    indices = [index for batch in batches for _, _, index in batch]
    assert len(indices) == len(set(indices)) == 48


def test_epochs_are_ordered_differently_and_reproducibly():
    batches = TrainBatches(40, 8, seed=5)
    orders = []
    for epoch in (1, 2, 1):
        batches.set_epoch(epoch)
        orders.append([index for batch in batches for _, _, index in batch])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))


def test_small_dataset_is_repeated_to_fill_a_batch():
    (batch,) = list(TrainBatches(3, 8))
    assert [sorted(index for _, _, index in batch).count(i) for i in range(3)] in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert len({position for _, position, _ in batch}) == 8  # so that each copy is augmented differently


def test_a_resumed_epoch_yields_the_rest_of_its_batches():
    batches = TrainBatches(50, 8, seed=2, rank=1, world_size=2)
    batches.set_epoch(3)
    complete = list(batches)
    batches.set_epoch(3, first=4)
    assert list(batches) == complete[4:] and len(complete) == len(batches) == 6


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch size 12 is not a multiple of 8 processes"):
        TrainBatches(100, 12, world_size=8)


# ------------------------------------------------------------------------------------------------------------ real data


def test_camvid_is_read(camvid):
    train, val = open_dataset("camvid", camvid, "train"), open_dataset("camvid", camvid, "val")
    assert (len(train), len(val), len(open_dataset("camvid", camvid, "train+val"))) == (367, 101, 468)
    image, label = val[0]
    assert image.shape == (360, 480, 3) and label.shape == (360, 480)
    seen = torch.bincount(torch.stack([train[i][1] for i in range(0, 367, 30)]).flatten().long(), minlength=256)
    assert (seen[:11] > 0).all() and seen[11:255].sum() == 0


def test_cityscapes_is_read(cityscapes_sample):
    train, val = (
        open_dataset("cityscapes", cityscapes_sample, "train"),
        open_dataset("cityscapes", cityscapes_sample, "val"),
    )
    assert (len(train), len(val)) == (4, 2)
    image, label = val[0]
    assert image.shape == (1024, 2048, 3) and label.shape == (1024, 2048)
    # By a table of this test's own: road is 7 and car is 26 in the files, 0 and 13 in training.
    raw = torch.from_numpy(np.array(Image.open(val.samples[0].label)))
    assert torch.equal(label == 0, raw == 7) and torch.equal(label == 13, raw == 26)
    assert torch.equal(label == IGNORE, sum(raw == v for v in (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)) > 0)
    assert torch.equal(torch.from_numpy(np.array(read_image(val.samples[0].image))), image)


# --------------------------------------------------------------------------------------------------------------- caches


def mixed_dataset(root, augmentation=None):
    """Five images of two sizes, with labels of 8-pixel blocks."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps({"names": [str(i) for i in range(20)]}))
    for i in range(5):
        h, w = (96, 160) if i % 2 else (128, 112)
        blocks = rng.integers(0, 256, (h // 16, w // 16, 3), np.uint8)
        smooth = Image.fromarray(blocks).resize((w, h), Image.Resampling.BICUBIC)
        smooth.save(root / "images" / "train" / f"{i}.png")
        labels = rng.integers(0, 20, (h // 8, w // 8), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(labels).save(root / "labels" / "train" / f"{i}.png")
    return open_dataset("folder", root, "train", augmentation)


KEYS = [(epoch, position, position % 5) for epoch in (1, 2) for position in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_samples_from_memory_are_those_from_files(tmp_path, workers, context):
    dataset = mixed_dataset(tmp_path, Augmentation((80, 96), seed=2))
    expected = [dataset[key] for key in KEYS]
    dataset.cache = RamCache(dataset, threads=2)
    for sample in dataset.samples:  # nothing is read any more
        sample.image.unlink()
    options = {"multiprocessing_context": context} if workers else {}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=KEYS, num_workers=workers, **options)
    for (image, label), (expected_image, expected_label) in zip(loader, expected, strict=True):
        assert torch.equal(image, expected_image) and torch.equal(label, expected_label)


def test_cache_is_memory_of_no_name_that_goes_with_its_owner(tmp_path):
    def held():
        return [
            path for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and "fast-scnn" in os.readlink(path)
        ]

    if not hasattr(os, "memfd_create"):
        pytest.skip("Linux alone has memory without a name")
    dataset = mixed_dataset(tmp_path)
    cache = RamCache(dataset)
    copy = pickle.loads(pickle.dumps(cache))
    copy[0][0][:] = 7  # the same memory
    assert (cache[0][0] == 7).all() and held()
    del cache, copy
    assert not held()


def test_corrupt_image_ends_caching_and_is_named(tmp_path):
    dataset = mixed_dataset(tmp_path, Augmentation((80, 96)))
    path = dataset.samples[3].image
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"images/train/3.png: cannot be read"):
        RamCache(dataset)


def test_too_little_memory_is_reported_before_anything_is_decoded(tmp_path, monkeypatch):
    dataset = mixed_dataset(tmp_path)
    monkeypatch.setattr(data, "cache_bytes", lambda _: [2**30] * 5)
    monkeypatch.setattr(data, "free_memory", lambda: 2**31)
    monkeypatch.setattr(SegmentationDataset, "read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"the RAM cache needs 5.0 GiB, 2.0 are free; omit it"):
        RamCache(dataset)


def test_a_second_split_is_cached_only_if_it_fits(tmp_path, monkeypatch):
    datasets = [mixed_dataset(tmp_path / "a"), mixed_dataset(tmp_path / "b")]
    size = sum(data.cache_bytes(datasets[0]))
    assert size == 4 * (3 * 128 * 112 + 2 * 96 * 160)
    monkeypatch.setattr(data, "free_memory", lambda: 2 * size)
    assert data.cache_in_ram(datasets).startswith("cache ram: 1 of 2 splits")
    assert datasets[0].cache and not datasets[1].cache
    monkeypatch.setattr(data, "free_memory", lambda: 3 * size)
    data.cache_in_ram(datasets)
    assert (datasets[1].cache[4][1] == datasets[1].read(4)[1]).all() and datasets[1].cache


def test_free_memory_is_a_sensible_number():
    assert 2**24 < data.free_memory() < 2**50


@pytest.mark.parametrize("group", ["/", "/user.slice/session-1.scope"])
def test_free_memory_is_that_of_the_own_container_and_counts_the_page_cache(tmp_path, monkeypatch, group):
    folder = tmp_path / f"sys/fs/cgroup{group}"
    files = {"memory.max": "5000000\n", "memory.current": "4500000\n", "memory.stat": "anon 9\ninactive_file 300000\n"}
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"0::{group}\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(data, "Path", lambda path: Path(f"{tmp_path}/{path}"))
    assert data.free_memory() == 800000
    (folder / "memory.max").write_text("max\n")
    assert data.free_memory() == 8000000 * 1024


def test_index_may_be_a_numpy_integer(tmp_path):
    dataset = mixed_dataset(tmp_path)
    for cache in (None, RamCache(dataset)):
        dataset.cache = cache
        for a, b in zip(dataset[np.int64(3)], dataset[3]):
            assert torch.equal(a, b)
        assert (dataset.count_pixels(np.int64(3)) == np.bincount(dataset[3][1].flatten(), minlength=256)).all()
        with pytest.raises(IndexError):  # which ends `for image, label in dataset`
            dataset[5]


def test_imports_without_what_other_systems_lack(tmp_path):
    # Windows has neither fcntl, mmap's flags, resource nor these functions; macOS has no memfd_create.
    code = """
import os, signal, sys, warnings
import torch, PIL.Image, numpy
for name in ("fcntl", "resource", "posix", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("memfd_create", "sysconf", "sched_getaffinity"):
    delattr(os, name)
for name in ("alarm", "SIGALRM", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
before = list(warnings.filters)
import data
assert warnings.filters == before
data.init_worker(0)
data.open_dataset("folder", sys.argv[1], "train")[0]
for name in ("device_count", "max_memory_allocated", "recommended_max_memory"):
    vars(torch.mps).pop(name, None)
import eval, train
from tools import benchmark, check, export, predict, report, streets
assert train.get_args_parser() and train.keep_freed_memory() is None
try:
    data.RamCache(data.open_dataset("folder", sys.argv[1], "train"))
except data.DataError as error:
    print(error)
"""
    mixed_dataset(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and "the RAM cache needs Linux" in done.stdout
