"""Semantic segmentation datasets (Cityscapes, CamVid, own folders), augmentation, RAM cache and batch sampling.

    dataset = open_dataset("cityscapes", "datasets/cityscapes", "train")
    image, label = dataset[0]           # (H, W, 3) uint8 RGB, (H, W) uint8 train ids, 255 = ignore

Needs only torch, numpy and pillow, and works when copied alone into another project. Images stay uint8 in
(H, W, 3) until `normalise` on the device: a quarter of the transfer, and channels_last for free.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import json
import math
import os
import pickle
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

IGNORE = 255  # train id of pixels that count neither in the loss nor in the metrics
UNKNOWN = 254  # in a label table: a value that is not allowed in label files
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
PADDING_RGB = tuple(round(255 * m) for m in MEAN)  # 0 after normalisation
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # Pillow's decoders in use, whatever the suffix


class DataError(ValueError):
    """A problem with the data that the user can fix; the message names the file, the problem and a remedy."""


@dataclass(frozen=True)
class Classes:
    """Class names, RGB colours and, where there are some, categories; indexed by train id."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    categories: tuple[str, ...] = ()

    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB colours of the train ids; black where there is no class."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self.colours)] = self.colours
        return palette

    def colour_map(self, label: np.ndarray) -> Image.Image:
        """(H, W) uint8 train ids -> RGB image in the classes' colours; ignored pixels are black."""
        indices = Image.fromarray(label)
        indices.putpalette(self.palette().tobytes())
        return indices.convert("RGB")  # 17 times as fast as indexing in NumPy

    def to_dict(self) -> dict[str, list]:
        """Plain types, for checkpoints and JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict[str, list]) -> Classes:
        """The inverse of `to_dict`."""
        return cls(tuple(fields["names"]), tuple(map(tuple, fields["colours"])), tuple(fields["categories"]))


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

CITYSCAPES = Classes(*zip(*(entry[:3] for entry in _CITYSCAPES)))
CITYSCAPES_LABEL_IDS = tuple(entry[3] for entry in _CITYSCAPES)  # by train id, for the evaluation server
CAMVID = Classes(*zip(*_CAMVID))


def label_table(values: Iterable[int | Iterable[int]], ignored: Iterable[int], size: int = 256) -> bytes:
    """Table from label value to train id: i for values[i], a number or several; IGNORE for `ignored`; else UNKNOWN.

    Colours are encoded as red x 65536 + green x 256 + blue; their table has a size of 2 ** 24.
    """
    table = bytearray([UNKNOWN]) * size
    for train_id, group in [*enumerate(values), (IGNORE, ignored)]:
        for value in group if isinstance(group, Iterable) else [group]:
            if table[value] not in (UNKNOWN, train_id):
                raise ValueError(f"class {table[value]} (0-based) shares a value with another class or with ignore")
            table[value] = train_id
    return bytes(table)


def values_of(table: bytes, *train_ids: int) -> list[int] | list[list[int]]:
    """The label values that a `label_table` maps to these train ids, as in classes.json."""
    values = np.flatnonzero(np.isin(np.frombuffer(table, np.uint8), train_ids)).tolist()
    return values if len(table) == 256 else [[*value.to_bytes(3, "big")] for value in values]


# --------------------------------------------------------------------------------------------------------- data on disk


class Sample(NamedTuple):
    """Paths of an image and, where there are some, its label map and its instance map."""

    image: Path
    label: Path | None
    instances: Path | None = None


def open_dataset(
    name: str, root: str | Path, split: str, augmentation: Augmentation | None = None, labelled: bool = True
) -> SegmentationDataset:
    """Opens a split of a labelled dataset.

    Args:
        name: "cityscapes", "camvid" or "folder".
        root: the dataset's folder. Layouts below it:
            cityscapes: leftImg8bit/{split}/{city}/*_leftImg8bit.png, gtFine/{split}/{city}/*_gtFine_labelIds.png, or
                *_gtFine_labelTrainIds.png where there are no others (split train_extra: gtCoarse);
            camvid: {split}/NAME.png or .jpg, {split}annot/NAME.png with ids 0 to 10, 11 = unlabelled;
            folder: images/{split}/NAME.*, labels/{split}/NAME.png, subfolders allowed; if images has none, val is
                the last fifth by name. classes.json: {"names": [...], "values": [0, [1, 4], ...], "ignore": 255,
                "colours": [[r, g, b], ...]}, values default to 0, 1, ...; with "labels": "colours", `colours`.
        split: name of a split, or several joined by "+"; "train:a*+val" takes only files of train that match a*.
        augmentation: applied to each sample; None for full images.
        labelled: False also takes images without a label map; all their pixels are ignored.

    Raises DataError for no data, an image without its label or a label without its image, or a bad classes.json.
    """
    root = Path(root)
    classes, table = read_classes(name, root)
    samples: list[Sample] = []
    for part in split_names(split):
        found, problems = find_samples(name, root, part, labelled)
        if problems:
            raise DataError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
        samples += found
    return SegmentationDataset(list(dict.fromkeys(samples)), classes, table, augmentation)


def split_names(split: str) -> list[str]:
    """The names of splits joined by "+"."""
    names = split.split("+")
    if "" in names or len(set(names)) < len(names):
        raise DataError(f'split {split!r} has an empty or repeated part; give e.g. train, or "train+val" for both')
    return names


_LAYOUTS = {  # folder of images, folder of labels, pattern of the files in both, ends of their names ("": any suffix)
    "cityscapes": ("leftImg8bit/{split}", "{gt}/{split}", "*/*", "_leftImg8bit.png", "_{gt}_{ids}.png"),
    "camvid": ("{split}", "{split}annot", "*", "", ""),
    "folder": ("images/{split}", "labels/{split}", "**/*", "", ""),
}


def find_samples(name: str, root: Path, split: str, labelled: bool = True) -> tuple[list[Sample], list[str]]:
    """The samples of one part of a split, and an error message for each unpaired file. Raises DataError."""
    split, _, wanted = split.partition(":")
    flat = name == "folder" and split in ("train", "val") and not any(p.is_dir() for p in root.glob("images/[!.]*"))
    gt, ids = "gtCoarse" if split == "train_extra" else "gtFine", _kind_of_ids(root)
    layout = (part.format(split="" if flat else split, gt=gt, ids=ids) for part in _LAYOUTS[name])
    image_dir, label_dir, pattern, image_end, label_end = layout
    images = _list_files(root / image_dir, pattern, image_end)
    labels = _list_files(root / label_dir, pattern, label_end)
    stems = list(images)
    if flat:
        num_train = len(stems) - max(1, len(stems) // 5)
        stems = stems[:num_train] if split == "train" else stems[num_train:]
    stems = [stem for stem in stems if fnmatch.fnmatchcase(stem, wanted or "*")]
    if not stems:
        raise DataError(
            f"{root / image_dir / wanted}: no images; check the folder, --dataset and the name of the split"
        )
    problems, unpaired = [], [stem for stem in labels if stem not in images]
    for stem in [stem for stem in stems if labelled and stem not in labels]:
        remedy = "add it, or remove this one"
        twin = min((other for other in unpaired if other.startswith(stem)), key=len, default=None)
        if twin:
            unpaired.remove(twin)
            folder, end, suffix = labels[twin].parent, labels[twin].name[len(Path(stem).name) :], labels[twin].suffix
            remedy = f'to rename all: cd "{folder}"; for f in *{end}; do mv -n "$f" "${{f%{end}}}{suffix}"; done'
        problems.append(f"{images[stem]}: no file of this name in {root / label_dir}; {remedy}")
    problems += [f"{labels[s]}: no file of this name in {root / image_dir}; add it, or remove this" for s in unpaired]
    samples = [Sample(images[stem], labels.get(stem)) for stem in stems if stem in labels or not labelled]
    if name == "cityscapes" and ids == "labelIds":
        maps = [s.label and s.label.with_name(s.label.name.replace("_labelIds", "_instanceIds")) for s in samples]
        samples = [s._replace(instances=path) if path and path.is_file() else s for s, path in zip(samples, maps)]
    return samples, problems


def _kind_of_ids(root: Path) -> str:
    """Suffix of the label maps of a Cityscapes folder: labelTrainIds if there are no labelIds."""
    maps = (any(root.glob(f"gt*/*/*/*_{kind}.png")) for kind in ("labelIds", "labelTrainIds"))
    return "labelTrainIds" if tuple(maps) == (False, True) else "labelIds"


def _list_files(folder: Path, pattern: str, end: str) -> dict[str, Path]:
    """Image files by their relative path without end or suffix. Raises DataError for duplicates."""
    files: dict[str, Path] = {}
    for path in sorted(folder / found for found in glob.glob(pattern + end, root_dir=folder, recursive=True)):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            first = files.setdefault(path.relative_to(folder).as_posix().removesuffix(end or path.suffix), path)
            if first != path:
                raise DataError(f"{path}: has the same name as {first}; rename or remove one")
    return files


def read_classes(name: str, root: Path) -> tuple[Classes, bytes]:
    """The classes of a dataset and the `label_table` of its label maps. Raises DataError."""
    if name not in _LAYOUTS:
        raise DataError(f"dataset {name!r} is unknown, expected one of {', '.join(_LAYOUTS)}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, give that of the {name} dataset (--data); README.md says its layout")
    markers = {"cityscapes": "leftImg8bit", "camvid": "trainannot", "folder": "classes.json"}
    present = [dataset for dataset, mark in markers.items() if (root / mark).exists()]
    if present and name not in present:
        raise DataError(f"{root / markers[present[0]]} is of dataset {present[0]}; give --dataset {present[0]}")
    if name == "cityscapes":
        values = CITYSCAPES_LABEL_IDS if _kind_of_ids(root) == "labelIds" else range(19)
        return CITYSCAPES, label_table(values, {*range(34), 255} - {*values})  # 255: label id -1, license plate
    if name == "camvid":
        return CAMVID, label_table(range(11), ignored=[11])  # 11 is unlabelled
    path, example = root / "classes.json", 'write e.g. {"names": ["background", "road", "car"]}'
    try:
        return _parse_classes(json.loads(path.read_text("utf-8-sig")))
    except (AttributeError, OSError, TypeError, ValueError) as error:  # JSON of other types, too
        raise DataError(f"{path}: {error}; {example}") from None


def _parse_classes(content: object) -> tuple[Classes, bytes]:
    """Classes and `label_table` of a classes.json, see `open_dataset`. Raises ValueError."""
    unknown = content.keys() - {"names", "colours", "values", "ignore", "labels"}
    if unknown or content.get("labels", "ids") not in ("ids", "colours"):
        unknown = min(unknown, default=f"labels: {content.get('labels')}")
        raise ValueError(f"{unknown!r} is unknown, expected names, values, colours, ignore, and labels: ids or colours")
    names, channels = content.get("names"), 3 if content.get("labels") == "colours" else 1
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("names must be a list of non-empty strings")
    if not 2 <= len(set(names)) == len(names) <= UNKNOWN:
        raise ValueError(f"expected 2 to {UNKNOWN} distinct names, got {len(names)}; the background is a class, too")
    colours = _bytes("colours", content.get("colours", _distinct_colours(len(names))), 3)
    values = content.get("values", content.get("colours") if channels == 3 else [*range(len(names))])
    if not isinstance(values, list) or not len(values) == len(colours) == len(names):
        raise ValueError(f"values and colours must be lists of {len(names)}, one for each name")
    powers = 256 ** np.arange(channels)[::-1]
    groups = [_bytes("values", value, channels) @ powers for value in values]
    ignored = [] if channels == 3 or IGNORE in np.concatenate(groups) else IGNORE
    ignored = _bytes("ignore", content.get("ignore", ignored), channels) @ powers
    return Classes(tuple(names), tuple(map(tuple, colours.tolist()))), label_table(groups, ignored, 256**channels)


def _bytes(key: str, value: object, channels: int) -> np.ndarray:
    """(N, channels) numbers from one or several values of a key in classes.json. Raises ValueError."""
    numbers = np.array(value)
    if numbers.size and (numbers.dtype.kind != "i" or numbers.min() < 0 or numbers.max() > 255):
        raise ValueError(f"{key} must be integers from 0 to 255, or [red, green, blue], not {value}")
    return numbers.astype(int).reshape(-1, channels)


def _distinct_colours(count: int) -> list[list[int]]:
    """Colours that look different: each is the grid colour farthest in CIELAB from black and the earlier ones."""
    grid = 36 * np.indices((8, 8, 8)).reshape(3, -1).T
    to_xyz = np.array([[0.434, 0.213, 0.018], [0.376, 0.715, 0.109], [0.190, 0.072, 0.873]])  # white is (1, 1, 1)
    lab = np.cbrt((grid / 255) ** 2.2 @ to_xyz) @ np.array([[0, 500, 0], [116, -500, 200], [0, 0, -200]])
    chosen, distances = [0], np.full(len(grid), np.inf)
    for _ in range(count):
        distances = np.minimum(distances, np.square(lab - lab[chosen[-1]]).sum(1))
        chosen.append(int(distances.argmax()))
    return grid[chosen[1:]].tolist()


def read_image(path: str | Path) -> Image.Image:
    """Reads an RGB image, rotated by its Exif orientation, without its transparency.

    Raises DataError if it is missing, damaged (only PNG has checksums), or has more than 8 bits per channel.
    """
    image = _load(path)
    if image.mode[0] in "IF":  # convert() would clip nearly all of it to white
        raise DataError(f"{path}: image of mode {image.mode}, expected 8 bits per channel; convert it")
    return _to_rgb(image)


def read_label(path: str | Path, table: bytes) -> np.ndarray:
    """Reads a label map as (H, W) uint8 train ids, upright like its image. `table` is a `label_table`.

    Raises DataError if it is missing or damaged, its format or mode cannot store values exactly, or one is UNKNOWN.
    """
    label, by_colour = _load(path), len(table) > 256
    if label.format not in ("PNG", "BMP"):
        raise DataError(f"{path}: label map in {label.format} format, which alters class ids; save it as PNG")
    if label.mode not in (("RGB", "RGBA", "P") if by_colour else ("1", "L", "P")):
        kind = "colours" if by_colour else 'class ids of 8 bits (for colours, set "labels": "colours" in classes.json)'
        raise DataError(f"{path}: label map of mode {label.mode}, expected {kind}")
    if by_colour:
        values = np.asarray(_to_rgb(label)) @ np.array([65536, 256, 1])
        train_ids = np.frombuffer(table, np.uint8)[values]
    else:
        values = np.asarray(label.convert("L") if label.mode == "1" else label)  # of mode P the indices
        train_ids = np.frombuffer(values.tobytes().translate(table), np.uint8).reshape(values.shape)
    unknown = train_ids == UNKNOWN
    if unknown.any():
        found, counts = np.unique(values[unknown], return_counts=True)
        most = found[np.argsort(-counts)][:100].tolist()
        if len(found) > 8 and lie_between(most, table):
            what = f"{len(found)} values on {unknown.mean():.1%} of the pixels lie between those of the classes"
            raise DataError(f"{path}: {what}, as smoothing makes them; export or resize with nearest neighbour, as PNG")
        shown = [[*value.to_bytes(3, "big")] if by_colour else value for value in most[:5]]
        what = f"label value {str(shown)[1:-1]} in {counts.sum()} pixels is no class; correct the file"
        remedy = 'or give the names "values" in classes.json, as in "values": [1, 2], "ignore": [0] if 0 is no label'
        raise DataError(f"{path}: {what}, {remedy}")
    return train_ids


def lie_between(values: list[int], table: bytes) -> bool:
    """Whether nearly all these values lie between two classes of a `label_table`: near a line, if they are colours."""
    powers, tolerance = ([65536, 256, 1], 24) if len(table) > 256 else ([1], 0.5)
    known = np.flatnonzero(np.frombuffer(table, np.uint8) < UNKNOWN)
    points, known = (np.array(each)[:, None] // powers % 256 for each in (values, known))  # (V, C), (K, C)
    steps = known[None] - known[:, None]  # (K, K, C), from every class to every other
    offsets = points[:, None, None] - known[:, None]  # (V, K, 1, C)
    along = (offsets * steps).sum(-1) / np.maximum(1, (steps**2).sum(-1))  # (V, K, K)
    distances = np.linalg.norm(offsets - along.clip(0, 1)[..., None] * steps, axis=-1)
    return np.mean(distances.min((1, 2)) < tolerance) > 0.9


def _load(path: str | Path) -> Image.Image:
    """A decoded image file of any mode, upright. Raises DataError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.verify()  # compares the checksums of a PNG, which load() does not
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
    except MemoryError:  # not the fault of the file
        raise
    except Exception as error:  # Pillow's decoders raise many exception types
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); replace or remove it") from error
    with contextlib.suppress(Exception):  # damaged Exif data raise many kinds of errors; viewers ignore them
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # convert() would take it into account
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(eq=False)
class SegmentationDataset(Dataset):
    """Images and label maps, as ((H, W, 3) uint8 RGB, (H, W) uint8 train ids).

    Without augmentation `dataset[index]` is a full image and its label; with one, a random crop. The keys of
    TrainBatches, `dataset[epoch, position, index]`, and the augmentation's seed determine a crop completely.
    """

    samples: list[Sample]
    classes: Classes
    table: bytes  # `label_table` of the label maps
    augmentation: Augmentation | None = None
    cache: RamCache | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        *sample_key, index = key if isinstance(key, tuple) else (key,)
        image, label = self.cache[index] if self.cache else self.read(index)
        if self.augmentation:
            image, label = self.augmentation(image, label, sample_key or torch.randint(2**31, (2,)).tolist())
        return torch.from_numpy(np.array(image)), torch.from_numpy(np.array(label))

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """A full RGB image and its (H, W) uint8 label map of train ids, from their files."""
        sample = self.samples[index]
        image = read_image(sample.image)
        if sample.label is None:
            return image, np.full(image.size[::-1], IGNORE, np.uint8)
        label = read_label(sample.label, self.table)
        height, width = label.shape
        if image.size != (width, height):
            note = " upright, as its Exif orientation says" if image.size == (height, width) else ""
            size = f"{width}x{height} pixels, its image {sample.image} {image.width}x{image.height}{note}"
            raise DataError(f"{sample.label}: {size}; give both the same size")
        return image, label

    def count_pixels(self, index: int) -> np.ndarray:
        """(256,) pixels per train id of a label map; also reads its image, as a check."""
        _, label = self.cache[index] if self.cache else self.read(index)
        return np.bincount(label.ravel(), minlength=256)

    def read_instances(self, index: int) -> Tensor:
        """(H, W) int64 instance map of a Cityscapes image: 1000 x train id + number, -1 elsewhere."""
        sample = self.samples[index]
        values = np.asarray(_load(sample.instances)).astype(np.int64)
        if values.ndim != 2 or values.max() >= 34000:
            raise DataError(f"{sample.instances}: not an instance map (label id x 1000 + number); replace or remove it")
        train_ids = np.frombuffer(self.table, np.uint8)[values // 1000].astype(np.int64)
        is_instance = (values > 1000) & (train_ids < UNKNOWN)
        return torch.from_numpy(np.where(is_instance, 1000 * train_ids + values % 1000, -1))


def label_problem(dataset: SegmentationDataset, counts: np.ndarray, every_class: bool = False) -> str | None:
    """What is wrong with the labels of a split, given their `count_pixels`; `every_class`: all must occur."""
    names, table = dataset.classes.names, dataset.table
    absent = [i for i in range(len(names)) if not counts[i]]
    if len(absent) == len(names):
        return f"no pixel has a label; label some, or look at what classes.json ignores: {values_of(table, IGNORE)}"
    if dataset.classes == CITYSCAPES and not counts[6:UNKNOWN].any():
        return "no label id above 18 in *_labelIds.png, so they hold train ids; rename them to *_labelTrainIds.png"
    if absent and every_class:
        found = values_of(table, *[i for i in (*range(len(names)), IGNORE) if counts[i]])
        what = f"values {str(found)[1:-1]} occur; class {names[absent[0]]!r} {values_of(table, absent[0])} has no pixel"
        remedy = f'write "values": {found} if these are the classes, or ' if len(found) == len(names) else ""
        return f'{what}: {remedy}leave out its name and give the others their "values" in classes.json'


def normalise(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, normalised with ImageNet's mean and deviation, channels_last."""
    mean, std = _on_device(MEAN, images.device), _on_device(STD, images.device)
    return ((images - 255 * mean) / (255 * std)).permute(0, 3, 1, 2)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A cached constant: copying it each time would synchronise with the device."""
    with torch.inference_mode(False):  # a normal tensor, for training
        return torch.tensor(values, dtype=torch.float32, device=device)


# --------------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Section 4.1: random resize, crop, horizontal flip, channel noise and brightness."""

    crop_hw: tuple[int, int]  # height and width of the crop in pixels; padding has the mean colour and is ignored
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the random resize factor, before the crop
    flip: bool = True  # mirror half of the crops
    brightness: float = 0.3  # the image is multiplied by a factor in [1 - brightness, 1 + brightness]
    channel_noise: float = 0.1  # and every channel by a factor in [1 - channel_noise, 1 + channel_noise]
    # Beyond the paper, and off by default:
    contrast: float = 0.0  # factor of the distance to medium grey, in [1 - contrast, 1 + contrast]
    saturation: float = 0.0  # factor of the distance to the pixel's grey, in [1 - saturation, 1 + saturation]
    hue: float = 0.0  # colours are rotated about the grey axis by an angle in [-hue, hue], in degrees
    half_epochs: int = 0  # up to this epoch, counted from 1, crops and resize factors are half as large
    seed: int = 0  # seeds the generator, with the key of the sample

    def __call__(self, image, label: np.ndarray, key: Sequence[int]) -> tuple[Image.Image, Image.Image]:
        """The crop of an RGB image (PIL or (H, W, 3) uint8) and its (H, W) uint8 label map.

        All random numbers follow from the seed and `key`, (epoch, position in the epoch).
        """
        rng = np.random.default_rng((self.seed, *key))
        factor = 0.5 if self.half_epochs and key[0] <= self.half_epochs else 1.0
        scale = factor * rng.uniform(*self.scale_range)
        sizes = zip(label.shape, self.crop_hw)
        rows, columns = (draw_span(rng, n, max(1, round(n * scale)), round(crop * factor)) for n, crop in sizes)
        flip = self.flip and rng.random() < 0.5
        image = cut(image, rows, columns, Image.Resampling.BILINEAR, PADDING_RGB)
        label = cut(label, rows, columns, Image.Resampling.NEAREST, IGNORE)
        if flip:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        return recolour(image, self._draw_colour(rng)), label

    def _draw_colour(self, rng: np.random.Generator) -> np.ndarray:
        """A random 3x4 matrix from (red, green, blue, 1) to new colours."""
        spread = np.array([self.brightness, *3 * [self.channel_noise], self.contrast, self.saturation])
        gain, *noise, contrast, saturation = rng.uniform(1 - spread, 1 + spread)
        angle = np.deg2rad(rng.uniform(-self.hue, self.hue))
        turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)  # Rodrigues, about (1, 1, 1) / sqrt(3)
        colour = np.eye(3) + np.sin(angle) * turn + (1 - np.cos(angle)) * turn @ turn
        colour = colour @ (saturation * np.eye(3) + (1 - saturation) * np.array(LUMA))
        return np.column_stack([colour * (contrast * gain * np.array(noise)), np.full(3, 127.5 * (1 - contrast))])


class Span(NamedTuple):
    """One axis of a crop and the part of the image that it shows, in pixels."""

    size: int  # of the crop
    offset: int  # where the image begins in the crop; outside of it is padding
    length: int  # of the image in the crop
    visible: tuple[float, float]  # interval of the image that is resized to `length`
    needed: slice  # pixels of the image that the resize reads


def draw_span(rng: np.random.Generator, image_size: int, resized_size: int, crop_size: int) -> Span:
    """A crop at a random position along one axis of a resized image."""
    # A negative start is padding: a smaller image lies anywhere in the crop, which is the translation of the paper.
    room = resized_size - crop_size
    start = int(rng.integers(min(0, room), max(0, room), endpoint=True))
    first, last = max(start, 0), min(start + crop_size, resized_size)
    scale = image_size / resized_size
    visible = first * scale, min(last * scale, image_size)
    reach = max(1, scale) + 1  # support of the filter
    needed = slice(max(0, int(visible[0] - reach)), min(image_size, int(visible[1] + reach) + 1))
    return Span(crop_size, first - start, last - first, visible, needed)


def cut(image: Image.Image | np.ndarray, rows: Span, columns: Span, resampling: int, padding) -> Image.Image:
    """The crop of an image, with padding of the given colour or value."""
    # Resizing only the visible part gives the pixels of the full resized image, at a tenth of the cost.
    top, left = rows.needed.start, columns.needed.start
    if isinstance(image, np.ndarray):
        part = Image.fromarray(image[rows.needed, columns.needed])
    else:
        part = image.crop((left, top, columns.needed.stop, rows.needed.stop))
    (y0, y1), (x0, x1) = rows.visible, columns.visible
    part = part.resize((columns.length, rows.length), resampling, (x0 - left, y0 - top, x1 - left, y1 - top))
    if part.size == (columns.size, rows.size):
        return part
    crop = Image.new(part.mode, (columns.size, rows.size), padding)
    crop.paste(part, (columns.offset, rows.offset))
    return crop


def recolour(image: Image.Image, colour: np.ndarray) -> Image.Image:
    """Applies a 3x4 matrix from (red, green, blue, 1) to new colours."""
    gains = colour.diagonal()[:, None]
    if (colour == gains * np.eye(3, 4)).all():  # one table per channel is faster
        lookup = np.clip(np.arange(256) * gains + 0.5, 0, 255).astype(np.uint8)  # (3, 256)
        return image.point(lookup.ravel().tolist())
    return image.convert("RGB", tuple(colour.ravel().tolist()))


# ------------------------------------------------------------------------------------------- cache, batches and loader


def free_memory() -> int:
    """Bytes of main memory that this process may still take, from /proc/meminfo and cgroups; 2 ** 63 if unknown."""
    free = 2**63
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        group = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2])
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))  # the page cache, which makes way
    return max(free, 0)


def cache_bytes(dataset: SegmentationDataset) -> list[int]:
    """Decoded size of each image and label map in bytes, from the headers of the files."""
    sizes = []
    for sample in dataset.samples:
        with Image.open(sample.image, formats=IMAGE_FORMATS) as image:
            sizes.append(4 * image.width * image.height)
    return sizes


class RamCache:
    """A dataset's decoded images and label maps, in memory that all processes and workers of this machine share.

    `cache[index]` gives views, (H, W, 3) uint8 RGB and (H, W) uint8 train ids. Unpickling it maps the same memory, in
    other processes, too, while the one that built it lives.

    Decodes in `threads` threads. Raises DataError for too little memory, before decoding, and for unreadable files.
    """

    def __init__(self, dataset: SegmentationDataset, threads: int = 4):
        self.ends = np.cumsum(cache_bytes(dataset)).tolist()
        self.shapes = [(0, 0)] * len(dataset)
        needed, free = self.ends[-1], free_memory()
        if not hasattr(os, "memfd_create"):
            raise DataError("the RAM cache needs Linux; train without it")
        if needed > free:
            raise DataError(f"the RAM cache needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; omit it")
        descriptor = os.memfd_create("fast-scnn-cache")  # no file to leave behind, and /dev/shm may be small
        weakref.finalize(self, os.close, descriptor)
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.memory = np.asarray(np.memmap(self.path, np.uint8, "w+", shape=needed))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._store, [dataset] * len(dataset), range(len(dataset))))

    def _store(self, dataset: SegmentationDataset, index: int) -> None:
        image, label = dataset.read(index)
        self.shapes[index] = label.shape
        for view, pixels in zip(self[index], (image, label)):
            view[:] = pixels

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        (height, width), end = self.shapes[index], self.ends[index]
        image, label = np.split(self.memory[end - 4 * height * width : end], [3 * height * width])
        return image.reshape(height, width, 3), label.reshape(height, width)

    def __getstate__(self) -> dict:
        return {**vars(self), "memory": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.memory = np.asarray(np.memmap(self.path, np.uint8, "r+"))


def cache_in_ram(datasets: Sequence[SegmentationDataset]) -> str:
    """Sets `dataset.cache`, built by local rank 0 and shared by the other processes; returns a log line.

    Datasets after the first are cached if a fifth of the free memory is left. Under torchrun all processes call this.
    """
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    caches: list[RamCache] = []
    if local_rank == 0:
        sizes = np.cumsum([sum(cache_bytes(dataset)) for dataset in datasets])
        num_cached = max(1, int((sizes < 0.8 * free_memory()).sum()))
        caches = [RamCache(dataset, torch.get_num_threads()) for dataset in datasets[:num_cached]]
    if dist.is_initialized():
        pickled: list = [None] * dist.get_world_size()
        dist.all_gather_object(pickled, pickle.dumps(caches))  # bytes: only processes of one machine can unpickle them
        caches = caches or pickle.loads(pickled[rank - local_rank])
    for dataset, cache in zip(datasets, caches):
        dataset.cache = cache
    size = sum(cache.ends[-1] for cache in caches) / 2**30
    return f"cache ram: {len(caches)} of {len(datasets)} splits, {size:.2f} GiB, shared by the processes of a machine"


class TrainBatches(Sampler):
    """Batch sampler: yields this process's share of every global batch, as (epoch, position, index) keys.

    The global batches do not depend on the number of processes. If the number of samples is not a multiple of the batch
    size, each epoch drops other samples; if it is smaller, samples are repeated to fill one batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        """`batch_size` counts the samples of all processes together and must be a multiple of `world_size`."""
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch size {batch_size} is not a multiple of {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Sets the epoch and the first batch of the next iteration."""
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


def init_worker(_worker_id: int) -> None:
    """worker_init_fn of a DataLoader: Ctrl-C and SIGTERM reach its workers, too, but the main process handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # the main process has 30 s to finish its step and save, as torchrun gives it
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def train_loader(dataset: SegmentationDataset, batch_size: int, *, workers: int = 0, **sampling: int) -> DataLoader:
    """This process's share of augmented batches: (N, H, W, 3) uint8 RGB and (N, H, W) uint8 train ids.

    `sampling`: seed, rank and world_size of TrainBatches. Call `loader.batch_sampler.set_epoch` before each epoch.
    """
    return DataLoader(
        dataset,
        batch_sampler=TrainBatches(len(dataset), batch_size, **sampling),
        num_workers=workers,
        pin_memory=torch.accelerator.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # keeps the loader off the global generator
    )
