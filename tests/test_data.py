"""Images and labels are found, read, checked and augmented together; every process gets its share and no more."""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
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
    normalise,
    open_dataset,
    read_image,
    read_label,
    read_size,
)

PLAIN = {"scale_range": (1.0, 1.0), "flip": False, "brightness": 0.0, "channel_noise": 0.0}


# --------------------------------------------------------------------------------------------------------------- layouts


def test_cityscapes_label_ids_become_train_ids(drawn, tmp_path):
    # From the table of cityscapesScripts: label id -> train id, all others of 0 to 33 are ignored.
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    expected |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    ids = np.array([*range(34), 255], np.uint8)
    Image.fromarray(ids[None]).save(tmp_path / "label.png")
    read = np.array(read_label(tmp_path / "label.png", open_dataset("cityscapes", drawn, "val").table))[0]
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


def test_folder_may_choose_what_is_ignored(folder_dataset):
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"], "ignore": [1, 255]}))
    assert open_dataset("folder", folder_dataset, "val")[0][1].unique().tolist() == [0, 2, IGNORE]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not the expected JSON"),
        ("[1]", "not the expected JSON"),
        ('{"names": []}', "0 names"),
        ('{"names": ["a"], "colours": [[1, 2]]}', "an RGB each"),
        ('{"names": ["a"], "ignore": 300}', "between 0 and 255"),
        ("", "not the expected JSON"),
        ("[" * 100_000, "not the expected JSON .RecursionError"),
        ('{"names": ["a"], "ignore": Infinity}', "between 0 and 255"),
        ('{"names": ["a"], "ignore": true}', "between 0 and 255"),
        ('{"names": ["a"], "ignore": null}', "between 0 and 255"),
        ('{"names": ["a"], "ignore": %s}' % ("9" * 5000), "not the expected JSON"),
        ('{"names": ["a"], "colours": [[0.5, 1, 2]]}', "whole numbers that lie between 0 and 255"),
        ('{"names": ["a"], "colours": [[NaN, 1, 2]]}', "whole numbers"),
        ('{"names": ["a"], "colours": [[true, 1, 2]]}', "whole numbers"),
        ('{"names": ["a"], "colours": ["abc"]}', "colours must be lists"),
        ('{"names": ["a"], "colours": 0}', "colours must be lists"),
        ('{"names": "abc"}', "names must be a list of printable strings"),
        ('{"names": ["a", 1]}', "names must be a list of printable strings"),
        ('{"names": ["a", " "]}', "names must be a list of printable strings"),
        ('{"names": ["a\\nb"]}', "names must be a list of printable strings"),
        ('{"names": ["\\ud800"]}', "names must be a list of printable strings"),
        ('{"names": ["a", "b", "a"]}', "two classes are called 'a'"),
        (
            '{"names": ["a"], "colors": [[1, 2, 3]]}',
            "unknown are 'colors', .*; did you mean colours.*write e.g. {.names.: ..road., .car.., .ignore.: 255}",
        ),
        ('{"names": ["a"]}' + " " * 2**20, "more than 1.0 MiB"),
        (b'{"names": ["\xff"]}', "not the expected JSON .UnicodeDecodeError"),
    ],
)
def test_bad_class_file_is_named_in_one_line(folder_dataset, content, message):
    (folder_dataset / "classes.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"classes.json: .*{message}") as caught:
        open_dataset("folder", folder_dataset, "train")
    assert len(str(caught.value).splitlines()) == 1


def test_class_file_with_a_byte_order_mark_is_read(folder_dataset):
    content = '{"names": ["left", "middle", "right"]}'.encode("utf-8-sig")
    (folder_dataset / "classes.json").write_bytes(content)
    assert open_dataset("folder", folder_dataset, "train").classes.names == ("left", "middle", "right")


def test_class_file_that_is_a_folder_or_a_pipe_is_named(folder_dataset):
    path = folder_dataset / "classes.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="classes.json: is a folder"):
        open_dataset("folder", folder_dataset, "train")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DataError, match="classes.json: is no regular file"):  # and does not wait for who writes to it
        open_dataset("folder", folder_dataset, "train")


def test_classes_survive_a_checkpoint():
    assert Classes.from_dict(json.loads(json.dumps(CITYSCAPES.to_dict()))) == CITYSCAPES


# ------------------------------------------------------------------------------------------------------------- bad input


def test_no_data_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset("cityscapes", tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no images"):
        open_dataset("cityscapes", tmp_path, "train")
    with pytest.raises(DataError, match="dataset 'kitti' is unknown, expected one of cityscapes, camvid, folder"):
        open_dataset("kitti", tmp_path, "train")


def test_the_data_of_another_dataset_are_said_to_be_it(folder_dataset, drawn, tmp_path):
    (tmp_path / "camvid/trainannot").mkdir(parents=True)
    for root, own in ((folder_dataset, "folder"), (drawn, "cityscapes"), (tmp_path / "camvid", "camvid")):
        for name in {"folder", "cityscapes", "camvid"} - {
            own
        }:  # cityscapes is the default of train.py, folder of data.py
            with pytest.raises(DataError, match=f"this is dataset {own}, not {name}; give --dataset {own}"):
                open_dataset(name, root, "train")


def test_image_without_label_and_label_without_image_are_named(folder_dataset):
    (folder_dataset / "labels/train/1.png").rename(folder_dataset / "labels/train/2.png")
    with pytest.raises(DataError, match=r"images/train/1.png: image without its label"):
        open_dataset("folder", folder_dataset, "train")
    (folder_dataset / "images/train/1.png").unlink()
    with pytest.raises(DataError, match=r"labels/train/2.png: label without its image"):
        open_dataset("folder", folder_dataset, "train")


def test_sizes_that_differ_are_named(folder_dataset):
    Image.new("L", (64, 47)).save(folder_dataset / "labels/train/0.png")
    with pytest.raises(DataError, match=r"labels/train/0.png: 64x47 pixels, its image .*images/train/0.png 64x48"):
        open_dataset("folder", folder_dataset, "train")[0]


def test_stray_label_value_is_named(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    label = np.array(Image.open(path))
    label[3, 5] = 17
    Image.fromarray(label).save(path)
    remedy = r'is outside classes.json \(names 0 to 2\); correct the file, add a name, or say "ignore": \[17, 255\]'
    with pytest.raises(DataError, match=f"labels/train/0.png: label value 17 {remedy}"):
        open_dataset("folder", folder_dataset, "train")[0]
    # As the message says, what was ignored before included.
    (folder_dataset / "classes.json").write_text('{"names": ["left", "middle", "right"], "ignore": [17, 255]}')
    assert int(open_dataset("folder", folder_dataset, "train")[0][1][3, 5]) == IGNORE
    with pytest.raises(DataError, match="label value 17 is outside the dataset's table; .* choose its --dataset"):
        read_label(path, data.label_table({0: 0, 1: 1, 2: 2}, ()))


def test_colour_label_is_refused_and_palette_label_read(folder_dataset):
    path = folder_dataset / "labels/train/0.png"
    label = Image.open(path)
    label.convert("RGB").save(path)
    dataset = open_dataset("folder", folder_dataset, "train")
    with pytest.raises(DataError, match=r"labels/train/0.png: label map of mode RGB, expected one channel"):
        dataset[0]
    palette = Image.frombytes("P", label.size, label.tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(path)
    assert dataset[0][1].unique().tolist() == [0, 1, 2]


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
        with pytest.raises(DataError, match=f"{kind}/train/0.png: cannot be decoded"):
            dataset[0]


def test_no_flipped_bit_of_a_png_is_taken_for_right(tmp_path):
    # Pillow leaves out the checksums of the pixels: of these bits some gave other labels in silence.
    label = np.zeros((48, 64), np.uint8)
    label[:, :20], label[10:20] = 1, 2
    Image.fromarray(label).save(tmp_path / "label.png")
    content, table = (tmp_path / "label.png").read_bytes(), data.label_table({i: i for i in range(3)}, (255,))
    path = tmp_path / "flipped.png"
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        for read in (read_image, lambda path: read_label(path, table)):
            with pytest.raises(DataError, match=r"flipped.png: cannot be decoded"):
                read(path)


def test_a_png_with_more_behind_its_end_is_read_and_one_without_an_end_is_not(tmp_path):
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content + b"more")
    assert read_image(tmp_path / "x.png").getpixel((3, 3)) == (1, 2, 3)
    (tmp_path / "x.png").write_bytes(content[:-12])
    with pytest.raises(DataError, match="x.png: cannot be decoded .OSError: truncated PNG file"):
        read_image(tmp_path / "x.png")


def png(values, bits, kind=0):
    """A PNG file by its standard; Pillow writes no grey of 2 or 4 bits and no colour of 16."""
    values = np.asarray(values)
    shifts = np.arange(bits)[::-1]
    rows = np.packbits((values[..., None] >> shifts & 1).reshape(len(values), -1).astype(np.uint8), axis=1)
    head = values.shape[1].to_bytes(4, "big") + values.shape[0].to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [name + body for name, body in ((b"IHDR", head), (b"IDAT", lines), (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (1, 1), (3, 5)])
def test_a_png_of_too_few_pixels_is_refused_rather_than_filled_with_class_0(tmp_path, size, interlaced):
    # Its checksums are right; Pillow leaves the rows that do not come black.
    height, width = size
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [range(x, width, dx) and (len(range(y, height, dy)), len(range(x, width, dx))) for x, y, dx, dy in starts]
    passes = [each for each in passes if each and each[0]] if interlaced else [(height, width)]
    for value in (0, 3):
        lines = [b"\0" + bytes([value]) * columns for rows, columns in passes for _ in range(rows)]
        for there in range(len(lines) + 1):
            head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, interlaced])
            chunks = (head, b"IDAT" + zlib.compress(b"".join(lines[:there])), b"IEND")
            content = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
            (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
            if there == len(lines):
                assert (np.array(read_label(tmp_path / "x.png", bytes(range(256)))) == value).all()
                continue
            for read in (read_image, lambda path: read_label(path, bytes(range(256)))):
                with pytest.raises(DataError, match=r"x.png: cannot be decoded"):
                    read(tmp_path / "x.png")


def test_the_time_to_read_a_png_grows_with_its_size_not_with_its_square(tmp_path):
    # 16 MB in 32,000 chunks, the last row black; appending each to bytes took 8 s.
    noise = np.random.default_rng(0).integers(0, 256, (2000, 8000), np.uint8)
    noise[-1] = 0
    head = b"IHDR" + (8000).to_bytes(4, "big") + (2000).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise), 0)
    chunks = (head, *(b"IDAT" + lines[i : i + 500] for i in range(0, len(lines), 500)), b"IEND")
    content = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
    start = time.process_time()
    with Image.open(tmp_path / "x.png") as image, open(tmp_path / "x.png", "rb") as file:
        image.load()
        loaded = time.process_time()
        data._check_length(file, image)
    checked = time.process_time()
    assert checked - loaded < 10 * (loaded - start), (loaded - start, checked - loaded)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_grey_label_map_of_few_bits_is_refused_rather_than_scaled(tmp_path, bits):
    # Pillow reads them as shades of grey: class 1 of 4 bits would be 17, another class.
    (tmp_path / "x.png").write_bytes(png(np.eye(8, dtype=int), bits))
    table = data.label_table({i: i for i in range(100)}, (255,))
    with pytest.raises(DataError, match=r"x.png: label map of (mode 1|[24] bits)"):
        read_label(tmp_path / "x.png", table)
    (tmp_path / "x.png").write_bytes(png(np.eye(8, dtype=int), 8))
    assert (np.array(read_label(tmp_path / "x.png", table)) == np.eye(8)).all()


@pytest.mark.parametrize("suffix", [".jpg", ".ppm"])
def test_a_label_map_in_a_format_that_changes_values_is_refused(tmp_path, suffix):
    Image.new("L", (40, 40), 3).save(tmp_path / f"x{suffix}")
    with pytest.raises(DataError, match="which does not keep class ids; save it as PNG"):
        read_label(tmp_path / f"x{suffix}", bytes(256))


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "I;16"])
def test_label_maps_of_other_modes_are_named(tmp_path, mode):
    Image.new(mode, (40, 40)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=f"x.png: label map of mode {mode}"):
        read_label(tmp_path / "x.png", bytes(256))


def test_16_bit_colour_is_refused_too(tmp_path):
    content = png(np.full((8, 3 * 8), 40000), 16, kind=2)  # 24 numbers a row, of 8 pixels
    head = b"IHDR" + (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    content = content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]
    (tmp_path / "x.png").write_bytes(content)
    assert Image.open(tmp_path / "x.png").mode == "RGB"  # Pillow would keep the upper half of each value
    with pytest.raises(DataError, match="x.png: image of mode RGB, expected 8 bits per channel"):
        read_image(tmp_path / "x.png")


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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_images_are_turned_as_viewers_turn_them(tmp_path, orientation, suffix):
    rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    Image.fromarray(rgb).save(path, exif=exif, quality=100, **({"lossless": True} if suffix == ".webp" else {}))
    image, expected = read_image(path), SHOWN[orientation](rgb)
    assert np.abs(np.array(image).astype(int) - expected).mean() < (8 if suffix == ".jpg" else 1e-9)
    assert read_size(path) == image.size == expected.shape[1::-1]


def test_an_orientation_behind_the_pixels_or_in_disorder_turns_nothing(tmp_path):
    Image.new("RGB", (40, 48)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "x.jpg").size == read_size(tmp_path / "x.jpg") == (40, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 48)).save(tmp_path / "x.png", exif=exif)
    content = (tmp_path / "x.png").read_bytes()
    start = content.index(b"eXIf") - 4
    size = 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[start + size : -12] + content[start : start + size] + content[-12:]
    (tmp_path / "x.png").write_bytes(moved)
    assert read_image(tmp_path / "x.png").size == read_size(tmp_path / "x.png") == (40, 48)


def test_a_label_map_that_fits_the_unturned_image_alone_is_named(folder_dataset):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, label = folder_dataset / "images/train/0.png", folder_dataset / "labels/train/0.png"
    Image.open(image).save(image, exif=exif)
    dataset = open_dataset("folder", folder_dataset, "train")
    with pytest.raises(
        DataError, match=r"0.png: 64x48 pixels, its image .*0.png 48x64 after the quarter turn that its Exif"
    ):
        dataset[0]
    turned = Image.open(label).transpose(Image.Transpose.ROTATE_270)
    turned.save(label)
    pixels, labels = dataset[0]
    assert pixels.shape == (64, 48, 3) and labels.shape == (64, 48)
    assert dataset.sizes()[0].tolist() == [64, 48] and labels[0].tolist() == [0] * 48
    Image.open(label).transpose(Image.Transpose.ROTATE_90).save(label, exif=exif)  # with its image's Exif data
    assert torch.equal(dataset[0][1], labels)
    assert (RamCache(dataset)[0][1] == labels.numpy()).all()


def test_what_is_no_regular_file_is_named_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's path may have some 100 characters alone
    try:
        server.bind("socket.png")
    finally:
        os.chdir(here)
    messages = {
        "pipe": "no regular file",
        "device": "no regular file",
        "socket": "no regular file",
        "folder": "a folder",
    }
    for name, message in {**messages, "loop": "Too many levels of symbolic links"}.items():
        for read in (read_image, read_size, lambda path: read_label(path, bytes(256))):
            with pytest.raises(DataError, match=f"{name}.png: .*{message}"):
                read(tmp_path / f"{name}.png")
    server.close()


def test_listings_pass_over_folders_and_name_links_that_lead_nowhere(folder_dataset):
    for kind in ("images", "labels"):
        (folder_dataset / kind / "train/more.png").mkdir()
        (folder_dataset / kind / "train/again").symlink_to(folder_dataset / kind)  # a loop
    assert len(open_dataset("folder", folder_dataset, "train")) == 2
    for kind in ("images", "labels"):
        (folder_dataset / kind / "train/2.png").symlink_to("nowhere.png")
    dataset = open_dataset("folder", folder_dataset, "train")
    assert len(dataset) == 3
    with pytest.raises(DataError, match=r"images/train/2.png: no such file"):
        dataset[2]


def test_linked_folders_are_read_and_hidden_files_are_not(folder_dataset, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "site" / kind).mkdir(parents=True)
        train = folder_dataset / kind / "train"
        (tmp_path / "site" / kind / "far.png").write_bytes((train / "0.png").read_bytes())
        (train / "site").symlink_to(tmp_path / "site" / kind)  # as photos of a camera on another disk would be
        (tmp_path / "site" / kind / "round").symlink_to(train)
        (train / ".ipynb_checkpoints").mkdir()
        (train / ".ipynb_checkpoints/0-checkpoint.png").write_bytes((train / "0.png").read_bytes())
    (folder_dataset / "images/train/._0.png").write_bytes(b"of a Mac")
    samples = open_dataset("folder", folder_dataset, "train").samples
    assert [s.image.relative_to(folder_dataset).as_posix() for s in samples] == [
        f"images/train/{name}.png" for name in ("0", "1", "site/far")
    ]


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
        place(tmp_path / folder / "x.png"), place(tmp_path / folder / "a/y.png")
    assert [s.image.name for s in open_dataset("camvid", tmp_path, "val").samples] == ["x.png"]
    for kind in ("images", "labels"):
        place(folder_dataset / kind / "val/a/b/c/x.png")
    assert len(open_dataset("folder", folder_dataset, "val")) == 3


@pytest.mark.parametrize("split", ["", "train+", "+train", "train+train", "train+val+train"])
def test_a_split_that_is_empty_or_there_twice_is_refused(folder_dataset, split):
    with pytest.raises(DataError, match="empty or there twice"):  # "" gave all splits, a second part each image twice
        open_dataset("folder", folder_dataset, split)
    assert len(open_dataset("folder", folder_dataset, "train+val")) == 4


@pytest.mark.parametrize("name", ["a b.png", "ä 道.png", os.fsdecode(b"raw \xff.png"), "%s{}.png", "-x.png"])
def test_names_of_all_kinds_are_read_and_named(folder_dataset, name):
    for kind in ("images", "labels"):
        os.rename(folder_dataset / kind / "train/1.png", folder_dataset / kind / "train" / name)
    dataset = open_dataset("folder", folder_dataset, "train")
    index = next(i for i, sample in enumerate(dataset.samples) if sample.image.name == name)
    assert dataset[index][0].shape == (48, 64, 3)
    (folder_dataset / "labels/train" / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        dataset[index]
    assert str(folder_dataset / "labels/train" / name) in str(caught.value)


def test_too_little_memory_is_not_taken_for_a_damaged_file(folder_dataset, monkeypatch):
    def load(image):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for read in (read_image, lambda path: read_label(path, bytes(256))):
        with pytest.raises(MemoryError):
            read(folder_dataset / "labels/train/0.png")


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="x.png: cannot be decoded .PermissionError"):
            read_image(tmp_path / "x.png")
    finally:
        os.seteuid(user)


def test_other_formats_than_the_five_are_refused_whatever_the_name(tmp_path):
    # Of Pillow's other readers some start programs (EPS: Ghostscript), and all of them are code that a file could reach.
    for kind in ("GIF", "TIFF", "ICO", "EPS"):
        Image.new("RGB", (40, 40)).save(tmp_path / "x.png", kind)
        with pytest.raises(DataError, match="x.png: cannot be decoded .its head is none of PNG, JPEG, BMP, PPM, WEBP"):
            read_image(tmp_path / "x.png")


def test_a_decompression_bomb_is_refused_and_a_large_picture_is_not(tmp_path, monkeypatch):
    Image.new("L", (2000, 1000)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_001)
    assert read_image(tmp_path / "x.png").size == (2000, 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999_999)  # twice that is the limit
    for read in (read_image, read_size):
        with pytest.raises(DataError, match="x.png: cannot be decoded .DecompressionBombError"):
            read(tmp_path / "x.png")


def test_pillow_warns_of_nothing_that_is_right(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
import data
image = Image.new("P", (40, 40))
image.putpalette(bytes(range(48)))
image.save("p.png", transparency=bytes(range(16)))
Image.new("RGB", (40, 40)).save("exif.jpg", exif=b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\xff\\xff" + b"\\1\\1\\4\\0\\xff\\xff\\xff\\x0f" * 4)
Image.new("RGB", (1200, 1000)).save("large.png")
Image.MAX_IMAGE_PIXELS = 1_000_000
for name in ("p.png", "exif.jpg", "large.png"):
    print(data.read_image(name).size, data.read_size(name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["(40, 40) (40, 40)"] * 2 + ["(1200, 1000) (1200, 1000)"] and done.stderr == ""


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("BMP", {}), ("PPM", {}), ("WEBP", {})]
)
def test_other_formats_cut_short_are_named(tmp_path, kind, options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(buffer, kind, **options)
    path = tmp_path / "x.bmp"
    for length in (0, 1, 10, 30, len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 20):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(DataError, match="x.bmp: cannot be decoded"):
            read_image(path)


# ---------------------------------------------------------------------------------------------------------- augmentation


def coordinates(height, width):
    """An image whose pixels say where they are (red = x, green = y), and a label that says the same in blocks of 8."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    return Image.fromarray(image), Image.fromarray((y // 8 * 16 + x // 8).astype(np.uint8))


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
        crop, truth = Augmentation((40, 60), (0.8, 2.0), False, 0, 0)(image, Image.fromarray(values), (0, position))
        rng = np.random.default_rng((0, 0, position))
        scale = rng.uniform(0.8, 2.0)
        height, width = round(120 * scale), round(200 * scale)
        top, left = (int(rng.integers(0, full - part, endpoint=True)) for full, part in ((height, 40), (width, 60)))
        whole = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 60, top + 40))
        # Pillow keeps the box in float32 and rounds after each of two passes: now and then a level's difference in each.
        difference = np.abs(np.array(crop).astype(int) - np.array(whole))
        assert difference.max() <= 2 and difference.mean() < 0.1
        # The nearest label by geometry; a sample on the border of two pixels may take either.
        y, x = (top + np.arange(40) + 0.5) * 120 / height, (left + np.arange(60) + 0.5) * 200 / width
        nearest = [
            values[np.ix_((y + dy).astype(int), (x + dx).astype(int))] for dy in (-1e-4, 1e-4) for dx in (-1e-4, 1e-4)
        ]
        assert np.any([np.array(truth) == labels for labels in nearest], axis=0).all()


def test_padding_is_the_mean_colour_and_ignored():
    image, label = Image.new("RGB", (64, 48), (10, 200, 30)), Image.new("L", (64, 48), 5)
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
    image, label = Image.new("RGB", (40, 40), (100, 100, 100)), Image.new("L", (40, 40), 1)
    augment = Augmentation((40, 40), (1, 1), brightness=0.3, channel_noise=0.1)
    means = np.array([np.array(augment(image, label, (1, p))[0]).mean((0, 1)) for p in range(300)])
    assert 100 * 0.7 * 0.9 - 1 <= means.min() < 70 and 135 < means.max() <= 100 * 1.3 * 1.1 + 1
    assert np.ptp(means, axis=1).max() > 10  # channels move apart


def colours_of(pixel, positions=range(200), **choices):
    """(number, 3) colours that an image of one colour takes."""
    image, label = Image.new("RGB", (16, 16), pixel), Image.new("L", (16, 16), 1)
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


def test_a_crop_that_one_class_fills_is_drawn_again():
    # Left two thirds class 1, the rest class 2: crops of a quarter of the width mostly show one class alone.
    label = np.full((64, 384), 1, np.uint8)
    label[:, 256:] = 2
    label[:, :8] = IGNORE
    image, truth = Image.new("RGB", (384, 64)), Image.fromarray(label)

    def shares(limit):
        augment = Augmentation((64, 96), (1, 1), max_class_share=limit)
        crops = [np.array(augment(image, truth, (1, p))[1]) for p in range(200)]
        return np.array(
            [np.bincount(crop[crop != IGNORE], minlength=3).max() / (crop != IGNORE).sum() for crop in crops]
        )

    free, limited = shares(1.0), shares(0.75)
    assert (free == 1).mean() > 0.6
    assert (limited > 0.85).mean() < 0.2  # of ten draws one shows both, nearly always; the thumbnail is that coarse


def test_the_first_epochs_are_at_half_the_resolution():
    image = Image.fromarray(np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None] * 2, (64, 128, 3)).copy())
    label = Image.new("L", image.size, 1)
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


def test_normalise_is_zero_mean_unit_variance_of_imagenet():
    images = torch.tensor([[[[124, 116, 104], [255, 0, 0]]]], dtype=torch.uint8)
    x = normalise(images)
    assert x.shape == (1, 3, 1, 2) and x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, :, 0, 0].abs().max() < 0.01
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor(expected))


# ---------------------------------------------------------------------------------------------------------------- batches


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


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch size 12 is not a multiple of 8 processes"):
        TrainBatches(100, 12, world_size=8)


# -------------------------------------------------------------------------------------------------------------- real data


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
    expected = [dataset[key] for key in KEYS] + [dataset[3]]
    dataset.cache = RamCache(dataset, threads=2)
    for sample in dataset.samples:  # nothing is read any more
        sample.image.unlink()
    options = {"multiprocessing_context": context} if workers else {}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=[*KEYS, 3], num_workers=workers, **options)
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
    with pytest.raises(DataError, match=r"images/train/3.png: cannot be decoded"):
        RamCache(dataset)


def test_too_little_memory_is_said_with_both_sizes_before_anything_is_decoded(tmp_path, monkeypatch):
    dataset = mixed_dataset(tmp_path)
    monkeypatch.setattr(data, "free_memory", lambda: 2**16)
    monkeypatch.setattr(SegmentationDataset, "read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"5 images takes 288.0 KiB of memory, of which 64.0 KiB are free"):
        RamCache(dataset)


def test_free_memory_is_a_sensible_number():
    assert 2**24 < data.free_memory() < 2**50


def test_importing_changes_nothing_outside(tmp_path):
    code = "import warnings, torch, PIL.Image; before = list(warnings.filters); import data; assert warnings.filters == before"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=data.__file__.rpartition("/")[0]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
