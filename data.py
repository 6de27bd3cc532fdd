"""Street scenes with labels: Cityscapes, CamVid, or a folder of one's own; augmentation; what each process reads.

    dataset = open_dataset("cityscapes", "datasets/cityscapes", "train")
    image, label = dataset[0]           # (H, W, 3) uint8 RGB, (H, W) uint8 train ids, 255 = ignore

    python data.py check ROOT           # reads all of one's own data and says what is in it and what is wrong with it

This file needs torch, numpy and pillow, and may be copied into another project as it is. Images stay uint8 in
(H, W, 3) until `normalise` on the device: a quarter of the bytes to move, and channels_last comes for free.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import functools
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import signal
import stat
import struct
import sys
import tempfile
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageDraw, UnidentifiedImageError
from torch import Tensor

IGNORE = 255  # train id of pixels that count neither in the loss nor in the metrics
UNKNOWN = 254  # train id of values that a label file must not hold
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in units of 1
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
SAME_COLOUR = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PADDING_RGB = tuple(round(255 * m) for m in MEAN)  # 0 after normalisation
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")  # whatever a file is called, no other of Pillow's readers sees it
CLASS_FILE_BYTES = 2**20  # classes.json has no more


class DataError(ValueError):
    """Data that the user can mend; the message names the file, what is wrong with it and a remedy."""


# ------------------------------------------------------------------------------------------------------ classes and tables


@dataclass(frozen=True)
class Classes:
    """Names, RGB colours and, where the benchmark has them, categories of the classes, in the order of the train ids."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    categories: tuple[str, ...] = ()

    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB colours of the train ids; what is no class is black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.colours)] = self.colours
        return palette

    def colour_map(self, label: np.ndarray) -> Image.Image:
        """(H, W) uint8 train ids -> RGB image in the classes' colours; ignored pixels are black."""
        image = Image.frombuffer("P", label.shape[::-1], np.ascontiguousarray(label), "raw", "P", 0, 1)
        image.putpalette(self.palette().tobytes())
        return image.convert("RGB")

    def to_dict(self) -> dict[str, list]:
        """Plain types, for checkpoints and JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict[str, list]) -> Classes:
        """The inverse of `to_dict`."""
        colours = tuple(tuple(colour) for colour in fields["colours"])
        return cls(tuple(fields["names"]), colours, tuple(fields["categories"]))


# Train id: (name, colour, category, label id in the files), https://www.cityscapes-dataset.com/dataset-overview/
_CITYSCAPES = (
    ("road", (128, 64, 128), "flat", 7),
    ("sidewalk", (244, 35, 232), "flat", 8),
    ("building", (70, 70, 70), "construction", 11),
    ("wall", (102, 102, 156), "construction", 12),
    ("fence", (190, 153, 153), "construction", 13),
    ("pole", (153, 153, 153), "object", 17),
    ("traffic light", (250, 170, 30), "object", 19),
    ("traffic sign", (220, 220, 0), "object", 20),
    ("vegetation", (107, 142, 35), "nature", 21),
    ("terrain", (152, 251, 152), "nature", 22),
    ("sky", (70, 130, 180), "sky", 23),
    ("person", (220, 20, 60), "human", 24),
    ("rider", (255, 0, 0), "human", 25),
    ("car", (0, 0, 142), "vehicle", 26),
    ("truck", (0, 0, 70), "vehicle", 27),
    ("bus", (0, 60, 100), "vehicle", 28),
    ("train", (0, 80, 100), "vehicle", 31),
    ("motorcycle", (0, 0, 230), "vehicle", 32),
    ("bicycle", (119, 11, 32), "vehicle", 33),
)
_CITYSCAPES_LABEL_IDS = range(34)  # ids 0 to 33; those without a train id are ignored
_CITYSCAPES_LICENSE_PLATE = 255  # label id -1 in a uint8 file

_CAMVID = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign or symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
_CAMVID_UNLABELLED = 11

CITYSCAPES = Classes(*zip(*(entry[:3] for entry in _CITYSCAPES)))
CITYSCAPES_LABEL_IDS = tuple(entry[3] for entry in _CITYSCAPES)  # of the train ids, as the evaluation server wants them
CAMVID = Classes(*zip(*_CAMVID))


def label_table(train_ids: dict[int, int], ignored: Sequence[int], size: int = 256) -> bytes:
    """Train ids, one for each value of a label file, or for each colour red x 65536 + green x 256 + blue with a size of 2 ** 24.

    Values in neither argument become UNKNOWN.
    """
    table = bytearray([UNKNOWN]) * size
    for value in ignored:
        table[value] = IGNORE
    for value, train_id in train_ids.items():
        table[value] = train_id
    return bytes(table)


# ---------------------------------------------------------------------------------------------- the three layouts on disk


@dataclass(frozen=True)
class Sample:
    """Paths of an image, its label map and, where there is one, its map of instances."""

    image: Path
    label: Path
    instances: Path | None = None


def open_dataset(
    name: str, root: str | Path, split: str, augmentation: Augmentation | None = None
) -> SegmentationDataset:
    """A split of a labelled dataset.

    Args:
        name: "cityscapes", "camvid" or "folder".
        root: the dataset's folder. Layouts below it:
            cityscapes: leftImg8bit/{split}/{city}/*_leftImg8bit.png, gtFine/{split}/{city}/*_gtFine_labelIds.png
                (split train_extra: gtCoarse);
            camvid: {split}/NAME.png or .jpg, {split}annot/NAME.png with ids 0 to 10, 11 = unlabelled;
            folder: images/{split}/NAME.*, labels/{split}/NAME.png, sub-folders allowed, and classes.json:
                {"names": [...], "colours": [[r, g, b], ...], "ignore": 255}, the last two optional. Label maps hold the
                classes' numbers, from 0 on; with "labels": "colours" their colours, and "ignore" is a list of colours.
        split: a split's name, or several joined by "+", as in "train+val".
        augmentation: how (epoch, position, index) keys are read; needed for training alone.

    Raises:
        DataError: no data there, an image without its label or the other way round, a bad classes.json, a split twice.
    """
    classes, table, find = _open_layout(name, Path(root))
    samples = [sample for part in _parts(split) for sample in find(part)]
    return SegmentationDataset(samples, classes, table, augmentation)


def _parts(split: str) -> list[str]:
    """Names of splits joined by "+". An empty one would be all splits at once, and one that comes twice count double."""
    parts = split.split("+")
    if "" in parts or len(set(parts)) < len(parts):
        raise DataError(
            f'split {split!r} has a part that is empty or there twice; give e.g. train, or "train+val" for both'
        )
    return parts


def _open_layout(name: str, root: Path):
    """Classes, table of label values, and what finds the samples of a split."""
    layouts = {"cityscapes": _open_cityscapes, "camvid": _open_camvid, "folder": _open_folder}
    if name not in layouts:
        raise DataError(f"dataset {name!r} is unknown, expected one of {', '.join(layouts)}")
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder, expected that of the {name} dataset; see Data in README.md for its layout"
        )
    signs = {
        "cityscapes": root / "leftImg8bit",
        "camvid": next(root.glob("*annot"), None),
        "folder": root / "classes.json",
    }
    there = [each for each, path in signs.items() if path and path.exists()]
    if there and name not in there:
        raise DataError(
            f"{signs[there[0]]} says that this is dataset {there[0]}, not {name}; give --dataset {there[0]}"
        )
    return layouts[name](root)


def _open_cityscapes(root: Path):
    train_ids = {entry[3]: i for i, entry in enumerate(_CITYSCAPES)}
    table = label_table(train_ids, ignored=(*_CITYSCAPES_LABEL_IDS, _CITYSCAPES_LICENSE_PLATE))

    def find(split: str, lone: list[str] | None = None) -> list[Sample]:
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        images, labels = root / "leftImg8bit" / split, root / kind / split
        samples = _pair(
            images,
            "*/*_leftImg8bit.png",
            "_leftImg8bit.png",
            labels,
            f"*/*_{kind}_labelIds.png",
            f"_{kind}_labelIds.png",
            lone,
        )
        instances = [s.label.with_name(s.label.name.replace("_labelIds.png", "_instanceIds.png")) for s in samples]
        return [Sample(s.image, s.label, path if path.is_file() else None) for s, path in zip(samples, instances)]

    return CITYSCAPES, table, find


def _open_camvid(root: Path):
    table = label_table({i: i for i in range(len(_CAMVID))}, ignored=(_CAMVID_UNLABELLED,))

    def find(split: str, lone: list[str] | None = None) -> list[Sample]:
        return _pair(root / split, "*", "", root / f"{split}annot", "*", "", lone)

    return CAMVID, table, find


def _open_folder(root: Path):
    names, colours, table = _read_classes(root / "classes.json")

    def find(split: str, lone: list[str] | None = None) -> list[Sample]:
        return _pair(root / "images" / split, "**/*", "", root / "labels" / split, "**/*", "", lone)

    return Classes(tuple(names), tuple(colours)), table, find


_CLASSES_FORM = 'write e.g. {"names": ["road", "car"], "ignore": 255}'


def _read_classes(path: Path) -> tuple[list[str], list[tuple[int, int, int]], bytes]:
    """Names, colours and `label_table` of a classes.json, see `open_dataset`. Raises DataError for anything else."""
    try:
        with _open_regular(path) as file:
            text = file.read(CLASS_FILE_BYTES + 1)
        if len(text) > CLASS_FILE_BYTES:
            raise DataError(f"{path}: more than {size_text(CLASS_FILE_BYTES)}, expected a few names; {_CLASSES_FORM}")
        content = json.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_CLASSES_FORM}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not the expected JSON ({_reason(error)}); {_CLASSES_FORM}") from error

    def check(fine: bool, what: str) -> None:
        if not fine:
            raise DataError(f"{path}: not the expected JSON ({what}); {_CLASSES_FORM}")

    def is_byte(value: object) -> bool:
        return type(value) is int and 0 <= value <= 255  # JSON's true and false are no numbers here

    check(isinstance(content, dict) and "names" in content, 'expected an object with "names"')
    stray = ", ".join(repr(key)[:40] for key in sorted(content.keys() - {"names", "colours", "ignore", "labels"})[:3])
    meant = "; did you mean colours?" if "colors" in content else ""
    check(not stray, f"unknown are {stray}, expected names, colours, ignore and labels{meant}")
    labels = content.get("labels", "ids")
    meant = "; did you mean colours?" if labels == "colors" else ""
    check(labels in ("ids", "colours"), f'labels is {labels!r:.40}, expected "ids" or "colours"{meant}')
    coded = content.get("labels") == "colours"
    names, colours, ignored = content["names"], content.get("colours"), content.get("ignore", [] if coded else IGNORE)
    check(not coded or colours is not None, '"labels": "colours" needs the colours')
    # Printable, on one line of a table: so neither a line break nor half of a surrogate pair.
    fine = isinstance(names, list) and all(
        isinstance(name, str) and name.isprintable() and name.strip() for name in names
    )
    check(fine, "names must be a list of printable strings, none of them empty")
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    check(twice is None, f"two classes are called {twice!r:.60}")
    colours = _palette(len(names)) if colours is None else colours
    check(
        isinstance(colours, list) and all(isinstance(colour, list | tuple) for colour in colours),
        "colours must be lists",
    )
    ignored = ignored if isinstance(ignored, list) else [ignored]
    if not 0 < len(names) <= UNKNOWN or len(colours) != len(names) or any(len(colour) != 3 for colour in colours):
        raise DataError(
            f"{path}: {len(names)} names and {len(colours)} colours, expected 1 to {UNKNOWN} names, an RGB each"
        )
    levels = [level for colour in colours for level in colour]
    if coded:
        check(all(isinstance(each, list) and len(each) == 3 for each in ignored), "ignore must be a list of colours")
        levels += [level for colour in ignored for level in colour]
    if not all(map(is_byte, levels if coded else [*ignored, *levels])):
        raise DataError(f"{path}: colours and ignored values must be whole numbers that lie between 0 and 255")
    colours = [tuple(colour) for colour in colours]
    if not coded:
        return names, colours, label_table({i: i for i in range(len(names)) if i not in ignored}, ignored)
    codes = [red << 16 | green << 8 | blue for red, green, blue in [*colours, *ignored]]
    twice = next((code for at, code in enumerate(codes) if code in codes[:at]), None)
    check(twice is None, f"colour {_colour_text(twice or 0)} is there twice")
    return (
        names,
        colours,
        label_table({code: i for i, code in enumerate(codes[: len(names)])}, codes[len(names) :], 2**24),
    )


def _colour_text(code: int) -> str:
    return str([code >> 16, code >> 8 & 255, code & 255])


def _palette(count: int) -> list[tuple[int, int, int]]:
    """`count` distinct colours: hues by the golden ratio, on two levels of brightness."""
    hues = [(i * 0.618034) % 1 for i in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 0.8, 0.9 if i % 2 else 0.6) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def _pair(
    image_dir: Path,
    image_glob: str,
    image_end: str,
    label_dir: Path,
    label_glob: str,
    label_end: str,
    lone: list[str] | None = None,
) -> list[Sample]:
    """Images and labels of the same name, less the given ends or, where those are empty, the suffix.

    What has no partner, or the name of another, is an error, or left out and said in `lone`.
    """

    def listing(folder: Path, glob: str, end: str) -> dict[str, Path]:
        depth = math.inf if "**" in glob else glob.count("/")
        names: dict[str, Path] = {}
        for path in sorted(
            p for p in _files(folder, depth) if p.suffix.lower() in IMAGE_SUFFIXES and p.name.endswith(end)
        ):
            relative = path.relative_to(folder)
            name = relative.as_posix().removesuffix(end) if end else relative.with_suffix("").as_posix()
            if name in names:
                twice = f"{path}: has the same name as {names[name]}; rename or remove one"
                if lone is None:
                    raise DataError(twice)
                lone.append(twice)
                continue
            names[name] = path
        return names

    images, labels = listing(image_dir, image_glob, image_end), listing(label_dir, label_glob, label_end)
    if not images:
        raise DataError(f"{image_dir}: no images ({image_glob}); check the folder, --dataset and the split's name")
    for kind, have, other, folder in (("image", images, labels, label_dir), ("label", labels, images, image_dir)):
        single = sorted(have.keys() - other.keys())
        missing = "label" if kind == "image" else "image"
        told = [f"{have[name]}: {kind} without its {missing} in {folder}" for name in single]
        if lone is not None:
            lone += told
        elif told:
            more = f" (and {len(told) - 1} more like it)" if len(told) > 1 else ""
            raise DataError(f"{told[0]}{more}; add the {missing} or remove it")
    return [Sample(images[name], labels[name]) for name in images if name in labels]


def _files(folder: Path, depth: float, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files `depth` folders below this one, or at any depth where that is infinite; links to folders are followed.

    Left out are a link to a folder around it, which would lead round for ever, and hidden files and folders, such as ._NAME.jpg
    and .ipynb_checkpoints, which desktops and notebooks leave behind.

    Raises:
        DataError: a folder that may not be read.
    """
    real = os.path.realpath(folder)
    if any(inner == real or inner.startswith(os.path.join(real, "")) for inner in above):
        return
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({_reason(error)}); make it readable, or remove it") from error
    for entry in entries:
        path = folder / entry.name
        if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
            if depth > 0:
                yield from _files(path, depth - 1, (*above, real))
        elif depth in (0, math.inf):
            yield path


# ---------------------------------------------------------------------------------------------------------------- reading


@functools.cache
def _quiet_pillow() -> None:
    """Once, when the first image is read: no warnings of what is no error here, Exif data in disorder and pictures of 90 megapixels."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: str | Path) -> Image.Image:
    """An RGB image as viewers show it: turned as its Exif orientation says, transparency left out.

    Raises:
        DataError: no regular file, or none of IMAGE_FORMATS; it cannot be decoded, a PNG's checksum is wrong, or it has more
            than 8 bits per channel. JPEG, BMP, PPM and WebP have no checksums: damage that leaves them readable goes unseen.
    """
    with _opened(path) as (image, bits):
        if bits > 8 or image.mode.startswith(("I", "F")):  # convert() would clip nearly all of it to white
            raise DataError(f"{path}: image of mode {image.mode}, expected 8 bits per channel, no more; convert it")
        turn = _turn(image)
        image.load()
        image.info.pop("transparency", None)  # Pillow would look for a colour to stand for it
        image = image if image.mode == "RGB" else image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def writable_as_picture(path: Path) -> bool:
    """Whether Pillow writes RGB in the format of the suffix; some formats it only reads, or writes in black and white."""
    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError):
        return False
    return True


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the image that `read_image` gives, without decoding it. Raises DataError where it is no image."""
    with _opened(path, checked=False) as (image, _):
        return image.size[::-1] if _turn(image) in _QUARTER_TURNS else image.size


def read_label(path: str | Path, table: bytes, classes: Classes | None = None) -> Image.Image:
    """A label map of train ids (mode "L"), turned like an image. The classes are there for the message about a stray value.

    Raises:
        DataError: what `read_image` raises; a format, mode or depth in which values are not class ids; a value outside the table.
    """
    with _opened(path) as (label, bits):
        if label.format not in ("PNG", "BMP"):  # JPEG smears values, PPM scales them
            raise DataError(
                f"{path}: label map in a file of {label.format}, which does not keep class ids; save it as PNG"
            )
        if len(table) > 256:
            return _read_coloured(path, label, table)
        if label.mode not in ("L", "P"):
            remedy = (
                '; where these are colours, say "labels": "colours" in classes.json'
                if label.mode in ("RGB", "RGBA")
                else ""
            )
            raise DataError(
                f"{path}: label map of mode {label.mode}, expected one channel of 8 bits with a class id per pixel{remedy}"
            )
        if label.mode == "L" and bits < 8:  # Pillow scales them: 1 of 4 bits would be read as 17
            raise DataError(
                f"{path}: label map of {bits} bits, whose values are shades of grey; save it with 8 bits per pixel"
            )
        turn = _turn(label)
        label.load()
        if label.mode == "P":  # a palette is for viewers: the indices are the labels
            label = Image.frombytes("L", label.size, label.tobytes())
        label = label if turn is None else label.transpose(turn)
    train_ids = label.point(table)
    if (np.asarray(train_ids) == UNKNOWN).any():
        stray = [value for value, count in enumerate(label.histogram()) if count and table[value] == UNKNOWN]
        values = ", ".join(map(str, stray[:5])) + (", ..." if len(stray) > 5 else "")
        if classes in (None, CITYSCAPES, CAMVID):
            what = "is outside the dataset's table; correct the file, or choose its --dataset"
        else:
            ignored = [value for value in range(256) if table[value] == IGNORE]
            remedy = f'"ignore": {sorted([*stray, *ignored])}' if len(stray) <= 5 else '"ignore": a list of them'
            last = len(classes.names) - 1
            what = f"is outside classes.json (names 0 to {last}); correct the file, add a name, or say {remedy}"
        raise DataError(f"{path}: label value {values} {what}")
    return train_ids


def _read_coloured(path: str | Path, label: Image.Image, table: bytes) -> Image.Image:
    """A label map in the classes' colours, opened and not loaded."""
    turn = _turn(label)
    if label.mode not in ("RGB", "RGBA", "P"):
        raise DataError(f"{path}: label map of mode {label.mode}, expected the classes' colours, as classes.json says")
    label.load()
    label.info.pop("transparency", None)
    label = label.convert("RGB")
    pixels = np.asarray(label if turn is None else label.transpose(turn))
    codes = pixels @ np.array([65536, 256, 1])
    train_ids = np.frombuffer(table, np.uint8)[codes]
    if (train_ids == UNKNOWN).any():
        stray, counts = np.unique(codes[train_ids == UNKNOWN], return_counts=True)
        worst = ", ".join(_colour_text(int(code)) for code in stray[np.argsort(-counts)][:5])
        raise DataError(
            f"{path}: label colour {worst}{', ...' if len(stray) > 5 else ''} in {counts.sum()} pixels is not in classes.json; add it "
            "to the colours, or to ignore"
        )
    return Image.fromarray(train_ids)


_TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
    )
)  # Exif's orientations; 1 is as it lies
_QUARTER_TURNS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))  # which swap width and height


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How viewers turn an image that is not loaded yet; None for not at all."""
    try:
        # Not PNG's own method, which decodes the whole image to look behind the pixels, where the standard allows no Exif data.
        return _TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation))
    except Exception:  # there is no kind of error that damaged Exif data cannot raise; viewers go without them
        return None


def _open_regular(path: str | Path) -> BinaryIO:
    """The file. Raises DataError for a folder, a device or a pipe, which would wait for who writes to it."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; replace or remove it")
    return open(path, "rb")


@contextlib.contextmanager
def _opened(path: str | Path, checked: bool = True) -> Iterator[tuple[Image.Image, int]]:
    """An image that is not loaded yet, and its bits per channel, 8 for all but PNG and unless `checked`.

    What goes wrong with the file within the block becomes a DataError, too.
    """
    _quiet_pillow()
    try:
        with _open_regular(path) as file:
            bits = _check_png(file) if checked else 8
            file.seek(0)
            image = Image.open(file, formats=IMAGE_FORMATS)
            yield image, bits
            if checked and image.format == "PNG":
                _check_length(file, image)
    except (DataError, MemoryError):  # too little memory is no fault of the file
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        formats = ", ".join(IMAGE_FORMATS)
        raise DataError(
            f"{path}: cannot be decoded (its head is none of {formats}); replace or remove the file"
        ) from None
    except Exception as error:  # there is no kind of error that a damaged file cannot raise
        raise DataError(f"{path}: cannot be decoded ({_reason(error)}); replace or remove the file") from error


def _reason(error: Exception) -> str:
    """An error of a library in a part of a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]


def _check_png(file: BinaryIO) -> int:
    """Compares all checksums of a PNG file, of which Pillow leaves out those of the pixels, and returns its bits per channel.

    8 for a file that is no PNG. Raises OSError.
    """
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return 8
    bits, kind = 8, b""
    while kind != b"IEND":
        left, kind = struct.unpack(">I4s", _read_exactly(file, 8))
        checksum = zlib.crc32(kind)
        while left:
            block = _read_exactly(file, min(left, 2**20))
            checksum, left = zlib.crc32(block, checksum), left - len(block)
            if kind == b"IHDR" and len(block) > 8:
                bits = block[8]
        if _read_exactly(file, 4) != checksum.to_bytes(4, "big"):
            raise OSError(f"wrong checksum in chunk {kind!r}")
    return bits


def _check_length(file: BinaryIO, image: Image.Image) -> None:
    """Raises OSError for a loaded PNG file whose pixels end early: Pillow leaves the rest of them 0, class 0 of a label map.

    It needs all to be decompressed once more, and is done where the last row is 0 indeed, or not the last to come.
    """
    width, height = image.size
    if not image.info.get("interlace") and np.asarray(image.crop((0, height - 1, width, height))).any():
        return
    file.seek(0)
    content, at, chunks = file.read(), 8, []  # joined once: appending to bytes copies all that came before
    bits, kind, interlaced = content[24], content[25], content[28]
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == b"IDAT":
            chunks.append(content[at + 8 : at + 8 + size])
        at += 12 + size
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]  # of a pixel
    seven = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    needed = 0
    for left, top, step_x, step_y in seven if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        needed += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    if len(zlib.decompressobj().decompress(b"".join(chunks), needed)) < needed:
        raise OSError("its pixels end early")


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise OSError("truncated PNG file")
    return content


class SegmentationDataset(torch.utils.data.Dataset):
    """Images and label maps.

    `dataset[index]` is a whole image and its label; `dataset[epoch, position, index]`, the keys that TrainBatches deals
    out, an augmented crop that depends on nothing but this key and the augmentation's seed: neither on the number of
    processes and workers nor on what was read before, nor on whether it is cached.

    Both give ((H, W, 3) uint8 RGB, (H, W) uint8 train ids).
    """

    def __init__(self, samples: list[Sample], classes: Classes, table: bytes, augmentation: Augmentation | None = None):
        self.samples = samples
        self.classes = classes
        self.table = table
        self.augmentation = augmentation
        self.cache: RamCache | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        index = key if isinstance(key, int) else key[2]
        if self.cache:
            image, label = self.cache[index]
            height, width = label.shape
        else:
            image, label = self.read(index)
            width, height = label.size
        if not isinstance(key, int):
            labels = thumbnail(np.asarray(label)) if self.augmentation.max_class_share < 1 else None
            image, label = self.augmentation.draw((height, width), key[:2], labels).of(image, label)
        return torch.from_numpy(np.array(image)), torch.from_numpy(np.array(label))

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """A whole RGB image and its label map of train ids, from their files."""
        sample = self.samples[index]
        image, label = read_image(sample.image), read_label(sample.label, self.table, self.classes)
        if image.size != label.size:
            sizes = f"{label.width}x{label.height} pixels, its image {sample.image} {image.width}x{image.height}"
            with _opened(sample.image, checked=False) as (raw, _):
                if raw.size == label.size:
                    sizes += " after the quarter turn that its Exif orientation asks for: turn the label map too"
            raise DataError(f"{sample.label}: {sizes}; give both the same size")
        return image, label

    def read_label(self, index: int) -> np.ndarray:
        """(H, W) uint8 train ids."""
        if self.cache:
            return self.cache[index][1]
        return np.asarray(read_label(self.samples[index].label, self.table, self.classes))

    def read_instances(self, index: int) -> Tensor:
        """(H, W) int64 map of the single objects of a Cityscapes image: 1000 x train id + number, -1 elsewhere."""
        sample = self.samples[index]
        with _opened(sample.instances) as (image, _):
            turn = _turn(image)
            image.load()
            values = np.array(image if turn is None else image.transpose(turn)).astype(np.int64)
        if values.ndim != 2 or values.max(initial=0) >= 34000:
            raise DataError(
                f"{sample.instances}: no map of instances, of label id x 1000 + number; restore it, or remove it"
            )
        train_ids = np.full(34, -1)
        train_ids[list(CITYSCAPES_LABEL_IDS)] = np.arange(len(CITYSCAPES_LABEL_IDS))
        train_id = train_ids[values // 1000]
        return torch.from_numpy(np.where((values > 1000) & (train_id >= 0), 1000 * train_id + values % 1000, -1))

    def sizes(self) -> np.ndarray:
        """Height and width of every image, (number, 2) int64, from the heads of their files."""
        return np.array([read_size(sample.image)[::-1] for sample in self.samples], np.int64).reshape(-1, 2)


def normalise(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32 of about zero mean and unit variance, channels_last in memory."""
    mean, std = _on_device(MEAN, images.device), _on_device(STD, images.device)
    return ((images - 255 * mean) / (255 * std)).permute(0, 3, 1, 2)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant, copied once: each copy from the host would wait for what the device is doing."""
    with torch.inference_mode(False):  # it is kept for training too
        return torch.tensor(values, dtype=torch.float32, device=device)


# ----------------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Section 4.1: random resize, crop, horizontal flip, channel noise and brightness; one seed, any number of workers.

    Beyond the paper, and off unless asked for: contrast, saturation and hue, crops without a class that fills them, and a first
    part of the training at half the resolution.

    Attributes:
        crop_hw: height and width of the crop in pixels; what lies outside the image is the mean colour, and ignored.
        scale_range: bounds of the factor by which the image is resized before the crop; (1, 1) for none.
        flip: mirror half of the crops.
        brightness: the image is multiplied by a factor from 1 - brightness to 1 + brightness.
        channel_noise: each colour channel is multiplied by a factor from 1 - channel_noise to 1 + channel_noise.
        contrast: the distance to medium grey is multiplied by a factor from 1 - contrast to 1 + contrast.
        saturation: the distance to the grey of the same luma is multiplied by a factor from 1 - saturation to 1 + saturation.
        hue: colours turn around the grey axis by an angle from -hue to hue, in degrees.
        max_class_share: a crop whose most frequent class fills more of its labelled pixels is drawn again, up to 10 times
            (MMSegmentation's cat_max_ratio); 1 for never.
        half_epochs: up to this epoch, counted from 1, crops and resize factors are half as large.
        seed: of the random numbers, together with the key of each sample.
    """

    crop_hw: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    brightness: float = 0.3
    channel_noise: float = 0.1
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    max_class_share: float = 1.0
    half_epochs: int = 0
    seed: int = 0

    def __call__(self, image: Image.Image, label: Image.Image, key: Sequence[int]) -> tuple[Image.Image, Image.Image]:
        """The crop of an RGB image and of its label map that belongs to `key` (epoch, position in the epoch)."""
        return self.draw((image.height, image.width), key, thumbnail(np.asarray(label))).of(image, label)

    def draw(self, image_hw: tuple[int, int], key: Sequence[int], labels: np.ndarray | None = None) -> Crop:
        """The random numbers that belong to `key` (epoch, position in the epoch), for an image of this size.

        labels: `thumbnail` of its label map, which max_class_share below 1 looks at.
        """
        if labels is None and self.max_class_share < 1:
            raise ValueError("max_class_share is below 1, which needs the thumbnail of the label map")
        rng = np.random.default_rng((self.seed, *key))
        factor = 0.5 if self.half_epochs and key[0] <= self.half_epochs else 1.0
        crop_hw = tuple(round(size * factor) for size in self.crop_hw)
        for _ in range(10):
            scale = factor * rng.uniform(*self.scale_range)
            scaled_hw = tuple(max(1, round(size * scale)) for size in image_hw)
            # Where the crop starts in the resized image. A negative start is padding: the smaller image then lies anywhere
            # in the crop, which is the translation of the paper.
            top, left = (
                int(rng.integers(min(0, scaled - crop), max(0, scaled - crop), endpoint=True))
                for scaled, crop in zip(scaled_hw, crop_hw)
            )
            crop = Crop(crop_hw, tuple(image_hw), scaled_hw, (top, left))
            if self.max_class_share >= 1 or crop.largest_share(labels) <= self.max_class_share:
                break
        flip = bool(self.flip and rng.random() < 0.5)
        return replace(crop, flip=flip, colour=self._colour(rng))

    def _colour(self, rng: np.random.Generator) -> tuple[float, ...]:
        """A random 3x4 matrix, row by row, from (red, green, blue, 1) to new colours."""
        colour = np.eye(3, 4)
        if self.brightness or self.channel_noise:
            gain = rng.uniform(1 - self.brightness, 1 + self.brightness)
            colour = np.diag(gain * rng.uniform(1 - self.channel_noise, 1 + self.channel_noise, size=3)) @ colour
        if self.contrast:
            factor = rng.uniform(1 - self.contrast, 1 + self.contrast)
            colour = factor * colour
            colour[:, 3] += 127.5 * (1 - factor)
        if self.saturation:
            factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
            colour = (factor * np.eye(3) + (1 - factor) * np.array(LUMA)) @ colour
        if self.hue:
            # Rodrigues' rotation around the axis (1, 1, 1) / sqrt(3).
            angle = np.deg2rad(rng.uniform(-self.hue, self.hue))
            turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
            colour = (np.eye(3) + np.sin(angle) * turn + (1 - np.cos(angle)) * turn @ turn) @ colour
        return tuple(colour.ravel().tolist())


def thumbnail(label: np.ndarray) -> np.ndarray:
    """Every eighth pixel of an (H, W) label map, copied: enough to see which classes fill a crop."""
    return label[::8, ::8].copy()


@dataclass(frozen=True)
class Crop:
    """What is cut out of one image, and how.

    Attributes:
        crop_hw: height and width of the crop in pixels.
        image_hw: of the image.
        scaled_hw: of the resized image.
        start: row and column of the resized image where the crop begins; negative: padding comes first.
        flip: mirrored.
        colour: 3x4 matrix, row by row, from (red, green, blue, 1) to new colours.
    """

    crop_hw: tuple[int, int]
    image_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    start: tuple[int, int]
    flip: bool = False
    colour: tuple[float, ...] = SAME_COLOUR

    def _inside(self) -> list[tuple[int, int]]:
        """Rows and columns of the resized image that lie in the crop, half-open."""
        return [(max(a, 0), min(a + crop, size)) for a, crop, size in zip(self.start, self.crop_hw, self.scaled_hw)]

    def _box(self) -> list[tuple[float, float]]:
        """The same in pixels of the image."""
        factors = [size / scaled for size, scaled in zip(self.image_hw, self.scaled_hw)]
        return [(a * f, min(b * f, size)) for (a, b), f, size in zip(self._inside(), factors, self.image_hw)]

    def region(self) -> tuple[slice, slice]:
        """Rows and columns of the image on which the crop depends."""
        slices = []
        for (a, b), size, scaled in zip(self._box(), self.image_hw, self.scaled_hw):
            reach = max(1, size / scaled) + 1  # of the resizing filter
            slices.append(slice(max(0, int(a - reach)), min(size, int(b + reach) + 1)))
        return tuple(slices)

    def largest_share(self, labels: np.ndarray) -> float:
        """Share of the labelled pixels that its most frequent class has, by the `thumbnail` of the image's label map."""
        ends = [
            (math.ceil(a / 8), math.ceil(b / 8)) for a, b in self._box()
        ]  # those of every eighth pixel that lie inside
        part = tuple(slice(min(a, size - 1), max(a + 1, b)) for (a, b), size in zip(ends, labels.shape))
        counts = np.bincount(labels[part].ravel(), minlength=IGNORE + 1)[:IGNORE]
        return counts.max() / max(1, counts.sum())

    def of(self, image: Image.Image | np.ndarray, label: Image.Image | np.ndarray) -> tuple[Image.Image, Image.Image]:
        """The crop of an RGB image and of its label map, which may be arrays, (H, W, 3) and (H, W) uint8."""
        rows, columns = self.region()
        image, label = (
            Image.fromarray(each[rows, columns])
            if isinstance(each, np.ndarray)
            else each.crop((columns.start, rows.start, columns.stop, rows.stop))
            for each in (image, label)
        )
        (y0, y1), (x0, x1) = self._inside()
        # Resizing this box alone gives the same pixels as resizing the whole image and cropping, at a tenth of the cost.
        (top, bottom), (left, right) = self._box()
        box = (left - columns.start, top - rows.start, right - columns.start, bottom - rows.start)
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box)
        label = label.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, box)
        size = self.crop_hw[::-1]
        if image.size != size:
            whole_image, whole_label = Image.new("RGB", size, PADDING_RGB), Image.new("L", size, IGNORE)
            whole_image.paste(image, (x0 - self.start[1], y0 - self.start[0]))
            whole_label.paste(label, (x0 - self.start[1], y0 - self.start[0]))
            image, label = whole_image, whole_label
        if self.flip:
            image, label = (
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                label.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            )
        if self.colour != SAME_COLOUR:
            matrix = np.array(self.colour).reshape(3, 4)
            gains = matrix.diagonal()[:, None]
            if (matrix == gains * np.eye(3, 4)).all():  # one table per channel is faster
                lookup = np.clip(np.arange(256) * gains + 0.5, 0, 255).astype(np.uint8)  # (3, 256)
                image = image.point(lookup.ravel().tolist())
            else:
                image = image.convert("RGB", self.colour)
        return image, label


# ----------------------------------------------------------------------------------------------------------------- caches


def free_memory() -> int:
    """Bytes of main memory that this process may still take: what the system has, or what its container allows."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such container, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(free, 0)


def size_text(size: float) -> str:
    """A number of bytes for people, as in "1.5 GiB"."""
    power = 1 + (size >= 2**20) + (size >= 2**30)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def cache_bytes(dataset: SegmentationDataset) -> int:
    """What a dataset takes decoded: four bytes a pixel."""
    return int(4 * dataset.sizes().prod(axis=1).sum())


def _decoded(dataset: SegmentationDataset, threads: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, image, label map) of all samples, decoded in threads, a few ahead. Raises the first DataError."""

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = dataset.read(index)
        return np.array(image), np.array(label)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        try:
            for index in range(len(dataset)):
                waiting.append((index, pool.submit(read, index)))
                while len(waiting) > (2 * threads if index < len(dataset) - 1 else 0):
                    first, future = waiting.popleft()
                    yield first, *future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class SharedBytes:
    """Memory that all processes of this machine can see, once for all of them, and that is gone with the last of them.

    On Linux it is no file and needs no room in /dev/shm; elsewhere it is a temporary file. Pickled, it opens the same memory
    in the process that reads the pickle, as long as the one that made it lives.
    """

    def __init__(self, size: int):
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("fast-scnn-cache")
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
            weakref.finalize(self, os.close, descriptor)
        else:
            descriptor, self.path = tempfile.mkstemp(prefix="fast-scnn-cache-")
            os.close(descriptor)
            weakref.finalize(self, os.unlink, self.path)
        os.truncate(self.path, size)
        self.array = self._mapped()

    def _mapped(self) -> np.ndarray:
        with open(self.path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path = path
        self.array = self._mapped()


class RamCache:
    """A dataset's decoded images and label maps in memory that all processes and workers of this machine share.

    `cache[index]` gives views, (H, W, 3) uint8 RGB and (H, W) uint8 train ids. Pickled, it is the same memory.

    Args:
        dataset: what to decode, all of it, now.
        threads: how many images are decoded at once.

    Raises:
        DataError: too little memory, said before anything is decoded; a file that cannot be read or whose size is not
            what its head says. Nothing is left behind.
    """

    def __init__(self, dataset: SegmentationDataset, threads: int = 4):
        self.sizes = dataset.sizes()
        self.ends = np.cumsum(4 * self.sizes.prod(axis=1))
        needed, free = int(self.ends[-1]), free_memory()
        if needed > free:
            raise DataError(
                f"the cache of {len(dataset)} images takes {size_text(needed)} of memory, of which {size_text(free)} are free; "
                "train without a cache, or on a part of the data"
            )
        self.memory = SharedBytes(needed)
        for index, image, label in _decoded(dataset, threads):
            if label.shape != tuple(self.sizes[index]):
                raise DataError(f"{dataset.samples[index].image}: has other sizes than its head says; replace the file")
            for view, pixels in zip(self[index], (image, label)):
                view[:] = pixels

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        h, w = self.sizes[index]
        end = self.ends[index]
        label = self.memory.array[end - h * w : end].reshape(h, w)
        return self.memory.array[end - 4 * h * w : end - h * w].reshape(h, w, 3), label


def cache_in_ram(datasets: Sequence[SegmentationDataset]) -> str:
    """Gives datasets a RamCache, decoded by the first process of each machine, mapped by its others; returns a line for the log.

    Datasets after the first are cached where memory is left for them. Under torchrun all processes call this.
    """
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    caches: list[RamCache] = []
    if local_rank == 0:
        sizes = np.cumsum([cache_bytes(dataset) for dataset in datasets])
        fitting = max(1, int((sizes < 0.8 * free_memory()).sum()))
        caches = [RamCache(dataset, os.cpu_count() or 1) for dataset in datasets[:fitting]]
    if dist.is_initialized():
        pickled: list = [None] * dist.get_world_size()
        dist.all_gather_object(
            pickled, pickle.dumps(caches)
        )  # as bytes: only processes of one machine can unpickle them
        caches = caches or pickle.loads(pickled[rank - local_rank])
    for dataset, cache in zip(datasets, caches):
        dataset.cache = cache
    size = sum(int(cache.ends[-1]) for cache in caches)
    return (
        f"cache ram: {len(caches)} of {len(datasets)} splits, {size_text(size)}, shared by the processes of a machine"
    )


# ------------------------------------------------------------------------------------------------------------------ order


class TrainBatches(torch.utils.data.Sampler):
    """Batch sampler: yields this process's share of every global batch, as (epoch, position, index) keys.

    The global batches do not depend on the number of processes. If the number of samples is not a multiple of the batch
    size, every epoch leaves out other samples; if it is smaller, samples are repeated to fill one batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        """`batch_size` counts the samples of all processes together and must be a multiple of `world_size`."""
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch size {batch_size} is not a multiple of {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch of the next iteration, and the batch of it to start with."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return max(1, self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rounds = math.ceil(len(self) * self.batch_size / self.num_samples)
        order = np.concatenate([rng.permutation(self.num_samples) for _ in range(rounds)]).tolist()
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * self.share
            yield [(self.epoch, position, order[position]) for position in range(start, start + self.share)]


def ignore_interrupts(_worker_id: int) -> None:
    """worker_init_fn of a DataLoader: Ctrl-C and SIGTERM reach its workers too, but only the main process acts on them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # in 5 s the main process has saved; where it is gone, this one ends too
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


def train_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    *,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> torch.utils.data.DataLoader:
    """This process's share of augmented batches: (N, H, W, 3) uint8 RGB and (N, H, W) uint8 train ids.

    Its batch_sampler is a TrainBatches, whose `set_epoch` is to be called before each epoch.
    """
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=TrainBatches(len(dataset), batch_size, seed=seed, rank=rank, world_size=world_size),
        num_workers=workers,
        pin_memory=torch.accelerator.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # without its own, it would draw from the random numbers of the training
    )


# -------------------------------------------------------------------------------------------------------------- own data


def check(
    name: str, root: str | Path, splits: Sequence[str] = (), sheet: str | Path | None = None, rows: int = 6
) -> dict:
    """Reads all images and label maps of a dataset, and says what is in them and what is wrong.

    Args:
        name, root: as in `open_dataset`.
        splits: which, also joined by "+"; none for all that there are.
        sheet: file of a picture of some of the images with their labels, and of the classes' colours.
        rows: how many images of each split are on it.

    Returns:
        {"splits": {split: {"images", "sizes" {"WxH": count}, "unlabelled" share of the pixels, "classes" {name: {"share" of
        the labelled pixels, "images" with it}}}}, "problems": [...], each beginning with a file, "notes": [...]}. Where no label map
        of a split could be read, or none has a label, "classes" is empty; where none could be read, "unlabelled" is None.

    Raises:
        DataError: there is no dataset, nothing in it, or not the splits asked for.
    """
    root = Path(root)
    classes, table, find = _open_layout(name, root)
    asked = _parts("+".join(splits)) if splits else []
    splits = asked or _splits(name, root)
    if not splits:
        raise DataError(f"{root}: no splits, expected e.g. {_SPLIT_EXAMPLES[name]}; make the folders")
    report: dict = {"dataset": name, "root": str(root), "splits": {}, "problems": [], "notes": []}
    seen: dict[bytes, tuple[str, Path]] = {}  # split and file of the pixels with this digest
    tiles: list[tuple[Image.Image, Image.Image]] = []
    for split in splits:
        lone: list[str] = []
        try:
            samples = find(split, lone)
        except DataError as error:
            if asked:
                raise
            report["problems"].append(str(error))
            continue
        if (
            not samples
            and split not in ("train", "val")
            and all(": image without its label in " in each for each in lone)
        ):
            report["notes"].append(f"{split}: {len(lone)} images without label maps, for eval.py --predict alone")
            continue
        report["problems"] += lone
        dataset = SegmentationDataset(samples, classes, table)
        shown = {round((i + 0.5) * len(samples) / rows - 0.5) for i in range(rows)} if sheet else set()

        def read(index: int, split: str = split, dataset: SegmentationDataset = dataset, shown: set[int] = shown):
            try:
                image, label = dataset.read(index)
            except DataError as error:
                return str(error)
            counts = np.bincount(np.asarray(label).ravel(), minlength=256)
            digest = hashlib.blake2b(b"%d" % image.width + image.tobytes(), digest_size=16).digest()
            tile = (
                _tile(image, label, classes, f"{split}: {dataset.samples[index].image.name}")
                if index in shown
                else None
            )
            return image.size, counts, digest, tile

        sizes: dict[str, int] = {}
        pixels, present = np.zeros(256, np.int64), np.zeros(256, np.int64)
        bare: list[str] = []  # label maps without a label
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            contextlib.closing(pool.map(read, range(len(samples)))) as results,
        ):
            for sample, found in zip(
                samples, results
            ):  # closing them, as after Ctrl-C, cancels those that have not begun
                if isinstance(found, str):
                    report["problems"].append(found)
                    continue
                (width, height), counts, digest, tile = found
                sizes[f"{width}x{height}"] = sizes.get(f"{width}x{height}", 0) + 1
                pixels, present = pixels + counts, present + (counts > 0)
                if tile:
                    tiles.append(tile)
                if not counts[:IGNORE].any():
                    bare.append(f"{sample.label}: no pixel has a label; label it, or remove it and its image")
                if min(width, height) < 32:
                    report["problems"].append(
                        f"{sample.image}: {width}x{height} pixels, the network takes 32x32 and more"
                    )
                other = seen.setdefault(digest, (split, sample.image))
                if other[1] != sample.image:
                    where = "the same split" if other[0] == split else f"split {other[0]}, so that figures flatter"
                    report["problems"].append(f"{sample.image}: the same image as {other[1]} of {where}; remove one")
        names, labelled = classes.names, int(pixels[: len(classes.names)].sum())
        shares = pixels[: len(names)] / max(1, labelled)
        report["splits"][split] = {
            "images": len(samples),
            "sizes": dict(sorted(sizes.items(), key=lambda item: -item[1])),
            "unlabelled": float(pixels[IGNORE] / pixels.sum()) if sizes else None,
            "classes": {
                n: {"share": float(shares[i]), "images": int(present[i])} for i, n in enumerate(names) if labelled
            },
        }
        if labelled:
            report["notes"] += [f"{split}: no pixel of class {n}" for i, n in enumerate(names) if not pixels[i]]
        if bare and not labelled and split not in ("train", "val"):  # Cityscapes' test split is so
            report["notes"].append(
                f"{split}: no pixel of its {len(bare)} label maps has a label; it can be predicted, not evaluated"
            )
        else:
            report["problems"] += bare
    for split, use in (("train", "trains on it; make one, or give it another with --split"), ("val", _NO_VAL)):
        if not asked and split not in splits:
            report["notes"].append(f"no split {split}: train.py {use}")
    if sheet and tiles:
        _save_sheet(tiles, classes, Path(sheet))
    return report


_NO_VAL = "validates on it; set some images and their label maps apart for it, or give it another with --val-split"
_SPLIT_EXAMPLES = {
    "cityscapes": "leftImg8bit/train",
    "camvid": "train and trainannot",
    "folder": "images/train and labels/train",
}


def _splits(name: str, root: Path) -> list[str]:
    """The splits that a dataset's folder has, train first."""
    parent = {"cityscapes": root / "leftImg8bit", "camvid": root, "folder": root / "images"}[name]
    found = (
        [path.name for path in sorted(parent.iterdir()) if path.is_dir() and path.name[0] != "."]
        if parent.is_dir()
        else []
    )
    if name == "camvid":
        found = [split for split in found if (root / f"{split}annot").is_dir()]
    return sorted(found, key=lambda split: (split != "train", split != "val", split))


_TILE_WIDTH = 360  # pixels


def _tile(image: Image.Image, label: Image.Image, classes: Classes, title: str) -> tuple[Image.Image, Image.Image]:
    """An image, small and with its title, and the same with its labels in colours laid over it; what is ignored stays as it is."""
    size = (_TILE_WIDTH, max(1, round(_TILE_WIDTH * image.height / image.width)))
    image, label = (
        image.resize(size, Image.Resampling.BILINEAR),
        np.asarray(label.resize(size, Image.Resampling.NEAREST)),
    )
    mask = Image.fromarray(np.where(label == IGNORE, 0, 170).astype(np.uint8))
    overlay = Image.composite(Image.fromarray(classes.palette()[label]), image, mask)
    draw, title = ImageDraw.Draw(image), _latin(title)
    draw.rectangle(draw.textbbox((3, 2), title), "black")
    draw.text((3, 2), title, "white")
    return image, overlay


def _latin(text: str) -> str:
    """What Pillow's own font can write of a name."""
    return text[:50].encode("latin-1", "replace").decode("latin-1")


def _save_sheet(tiles: list[tuple[Image.Image, Image.Image]], classes: Classes, path: Path) -> None:
    """Writes image | labels in two columns, and the classes' colours below."""
    gap, swatch, columns = 4, 16, 4
    rows = [tiles[i : i + 2] for i in range(0, len(tiles), 2)]
    heights = [max(tile.height for pair in row for tile in pair) + gap for row in rows]
    width = 4 * (_TILE_WIDTH + gap) + gap
    legend = -(-len(classes.names) // columns) * (swatch + gap) + 2 * gap
    sheet = Image.new("RGB", (width, gap + sum(heights) + legend), "white")
    top = gap
    for row, height in zip(rows, heights):
        for i, tile in enumerate(tile for pair in row for tile in pair):
            sheet.paste(tile, (gap + i * (_TILE_WIDTH + gap), top))
        top += height
    draw = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(zip(classes.names, classes.colours)):
        x, y = gap + i % columns * (width // columns), top + gap + i // columns * (swatch + gap)
        draw.rectangle((x, y, x + swatch, y + swatch - 1), colour, "black")
        draw.text((x + swatch + gap, y + 2), _latin(name), "black")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: some formats have a greatest size
        raise DataError(f"{path}: cannot be written ({_reason(error)}); give --sheet another file") from error


def _grouped(problems: list[str]) -> list[str]:
    """One line for all problems that say the same of different files; names of further files in them may differ."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\S*/\S*", "", problem.partition(": ")[2]), []).append(problem)
    return [group[0] + (f" (and {len(group) - 1} more like it)" if len(group) > 1 else "") for group in groups.values()]


def _print_report(report: dict) -> None:
    for split, content in report["splits"].items():
        sizes = ", ".join(f"{size} ({count})" for size, count in list(content["sizes"].items())[:5])
        more = f" and {len(content['sizes']) - 5} more sizes" if len(content["sizes"]) > 5 else ""
        print(f"{split}: {content['images']} images with label maps, {sizes or 'none of which could be read'}{more}")
    splits = {split: content for split, content in report["splits"].items() if content["classes"]}
    if splits:
        _print_shares(splits)
    for note in report["notes"]:
        print(f"note: {note}")
    lines, count = _grouped(report["problems"]), len(report["problems"])
    for line in lines[:50]:
        print(f"problem: {line}")
    if len(lines) > 50:
        print(f"and {len(lines) - 50} more kinds of problems")
    every = "; the next line has each of them" if len(lines) < count or len(lines) > 50 else ""
    print(f"{count or 'no'} problem{'' if count == 1 else 's'}{every}")


def _print_shares(splits: dict[str, dict]) -> None:
    print(f"{'share of the labelled pixels, images':<36}" + "".join(f"{split:>20}" for split in splits))
    for name in next(iter(splits.values()))["classes"]:
        cells = [content["classes"][name] for content in splits.values()]
        print(f"  {name:<34}" + "".join(f"{each['share']:12.3%}{each['images']:8}" for each in cells))
    print(
        f"{'unlabelled, of all pixels':<36}"
        + "".join(f"{content['unlabelled']:12.3%}{'':8}" for content in splits.values())
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 where there are problems, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="data.py", description="Looks at data before a network does.")
    command = parser.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="read all of a dataset, and say what is in it and what is wrong",
        description="Reads every image and label map. Prints the sizes, each class' share, and what is wrong: files without a partner, that "
        "cannot be read, or are twice there (above all in two splits), values that no class has, maps without a label. The last line is "
        "one JSON object. Exit status 2 where anything is wrong.",
    )
    command.add_argument("root", metavar="ROOT", nargs="?", help="the dataset's folder")
    command.add_argument("--data", metavar="ROOT", help="the same, as train.py and eval.py call it")
    command.add_argument("--dataset", default="folder", help="folder, cityscapes or camvid (default: %(default)s)")
    command.add_argument(
        "--splits", nargs="+", default=[], metavar="SPLIT", help="default: all that there are; train+val is train val"
    )
    command.add_argument(
        "--sheet", metavar="FILE", help="write a picture of some images with their labels, and the colours"
    )
    command.add_argument(
        "--rows", type=int, default=6, metavar="N", help="images of each split on it (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # file names may be no text in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if (args.root is None) == (args.data is None):
            raise DataError("give the dataset's folder once, as in data.py check ROOT")
        root = Path(args.root or args.data)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; give the dataset's folder as ROOT")
        if args.rows < 1:
            raise DataError(f"--rows is {args.rows}, expected at least 1")
        if args.sheet and not writable_as_picture(Path(args.sheet)):
            raise DataError(
                f"--sheet {args.sheet} has no suffix of an image format that can be written; give e.g. sheet.png"
            )
        report = check(args.dataset, root, args.splits, args.sheet, args.rows)
        _print_report(report)
        if args.sheet:
            print(f"wrote {args.sheet}")
        print(json.dumps(report), flush=True)
        return 2 if report["problems"] else 0
    except BrokenPipeError:  # of | head; the interpreter would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print(
            f"data.py: out of memory; {os.cpu_count()} images are read at once: free some, or make images smaller",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
