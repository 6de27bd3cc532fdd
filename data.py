"""Street scenes with labels: Cityscapes, CamVid, or a folder of one's own; augmentation; what each process reads.

    dataset = open_dataset("cityscapes", "datasets/cityscapes", "train")
    image, label = dataset[0]           # (H, W, 3) uint8 RGB, (H, W) uint8 train ids, 255 = ignore

This file needs torch, numpy and pillow, and may be copied into another project as it is. Images stay uint8 in
(H, W, 3) until `normalise` on the device: a quarter of the bytes to move, and channels_last comes for free.
"""

from __future__ import annotations

import colorsys
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IGNORE = 255  # train id of pixels that count neither in the loss nor in the metrics
UNKNOWN = 254  # train id of values that a label file must not hold
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in units of 1
STD = (0.229, 0.224, 0.225)
PADDING_RGB = tuple(round(255 * m) for m in MEAN)  # 0 after normalisation
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")


class DataError(ValueError):
    """Data that the user can mend; the message names the file, what is wrong with it and a remedy."""


# ------------------------------------------------------------------------------------------------------ classes and tables


@dataclass(frozen=True)
class Classes:
    """Names, RGB colours and, where the benchmark has them, categories of the classes, in the order of the train ids."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    categories: tuple[str, ...] = ()

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
CAMVID = Classes(*zip(*_CAMVID))


def label_table(train_ids: dict[int, int], ignored: Sequence[int]) -> bytes:
    """256 train ids, one for each value of a label file; values in neither argument become UNKNOWN."""
    table = bytearray([UNKNOWN] * 256)
    for value in ignored:
        table[value] = IGNORE
    for value, train_id in train_ids.items():
        table[value] = train_id
    return bytes(table)


# ---------------------------------------------------------------------------------------------- the three layouts on disk


@dataclass(frozen=True)
class Sample:
    """Paths of an image and its label map."""

    image: Path
    label: Path


def open_dataset(name: str, root: str | Path, split: str, augmentation: Augmentation | None = None) -> SegmentationDataset:
    """A split of a labelled dataset.

    Args:
        name: "cityscapes", "camvid" or "folder".
        root: the dataset's folder. Layouts below it:
            cityscapes: leftImg8bit/{split}/{city}/*_leftImg8bit.png, gtFine/{split}/{city}/*_gtFine_labelIds.png
                (split train_extra: gtCoarse);
            camvid: {split}/NAME.png or .jpg, {split}annot/NAME.png with ids 0 to 10, 11 = unlabelled;
            folder: images/{split}/NAME.*, labels/{split}/NAME.png, sub-folders allowed, and classes.json:
                {"names": [...], "colours": [[r, g, b], ...], "ignore": 255}, the last two optional.
        split: a split's name, or several joined by "+", as in "train+val".
        augmentation: how (epoch, position, index) keys are read; needed for training alone.

    Raises:
        DataError: no data there, an image without its label or the other way round, a bad classes.json.
    """
    layouts = {"cityscapes": _open_cityscapes, "camvid": _open_camvid, "folder": _open_folder}
    if name not in layouts:
        raise DataError(f"dataset {name!r} is unknown, expected one of {', '.join(layouts)}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the {name} dataset's folder with --data")
    classes, table, find = layouts[name](root)
    samples = [sample for part in split.split("+") for sample in find(part)]
    return SegmentationDataset(samples, classes, table, augmentation)


def _open_cityscapes(root: Path):
    train_ids = {entry[3]: i for i, entry in enumerate(_CITYSCAPES)}
    table = label_table(train_ids, ignored=(*_CITYSCAPES_LABEL_IDS, _CITYSCAPES_LICENSE_PLATE))

    def find(split: str) -> list[Sample]:
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        images, labels = root / "leftImg8bit" / split, root / kind / split
        return _pair(
            images, "*/*_leftImg8bit.png", "_leftImg8bit.png", labels, f"*/*_{kind}_labelIds.png", f"_{kind}_labelIds.png"
        )

    return CITYSCAPES, table, find


def _open_camvid(root: Path):
    table = label_table({i: i for i in range(len(_CAMVID))}, ignored=(_CAMVID_UNLABELLED,))
    return CAMVID, table, lambda split: _pair(root / split, "*", "", root / f"{split}annot", "*", "")


def _open_folder(root: Path):
    path = root / "classes.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for name in content["names"]]
        colours = [tuple(int(v) for v in colour) for colour in content.get("colours") or _palette(len(names))]
        ignored = content.get("ignore", IGNORE)
        ignored = [int(v) for v in (ignored if isinstance(ignored, list) else [ignored])]
    except FileNotFoundError:
        raise DataError(f'{path}: no such file; write one such as {{"names": ["road", "car"], "ignore": 255}}') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the expected JSON ({type(error).__name__}: {error}); see data.open_dataset") from error
    if not 0 < len(names) <= UNKNOWN or len(colours) != len(names) or any(len(colour) != 3 for colour in colours):
        raise DataError(f"{path}: {len(names)} names and {len(colours)} colours, expected 1 to {UNKNOWN} names, an RGB each")
    if any(not 0 <= value <= 255 for value in [*ignored, *(v for colour in colours for v in colour)]):
        raise DataError(f"{path}: colours and ignored values must lie between 0 and 255")
    table = label_table({i: i for i in range(len(names)) if i not in ignored}, ignored)

    def find(split: str) -> list[Sample]:
        return _pair(root / "images" / split, "**/*", "", root / "labels" / split, "**/*", "")

    return Classes(tuple(names), tuple(colours)), table, find


def _palette(count: int) -> list[tuple[int, int, int]]:
    """`count` distinct colours: hues by the golden ratio, on two levels of brightness."""
    hues = [(i * 0.618034) % 1 for i in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 0.8, 0.9 if i % 2 else 0.6) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours]


def _pair(image_dir: Path, image_glob: str, image_end: str, label_dir: Path, label_glob: str, label_end: str) -> list[Sample]:
    """Images and labels of the same name, less the given ends or, where those are empty, the suffix."""

    def listing(folder: Path, glob: str, end: str) -> dict[str, Path]:
        paths = sorted(p for p in folder.glob(glob) if p.suffix.lower() in IMAGE_SUFFIXES)
        names: dict[str, Path] = {}
        for path in paths:
            relative = path.relative_to(folder)
            name = relative.as_posix().removesuffix(end) if end else relative.with_suffix("").as_posix()
            if name in names:
                raise DataError(f"{path}: has the same name as {names[name]}; rename or remove one")
            names[name] = path
        return names

    images, labels = listing(image_dir, image_glob, image_end), listing(label_dir, label_glob, label_end)
    if not images:
        raise DataError(f"{image_dir}: no images ({image_glob}); check --data, --dataset and the split's name")
    for kind, have, other, folder in (("image", images, labels, label_dir), ("label", labels, images, image_dir)):
        lone = sorted(have.keys() - other.keys())
        if lone:
            missing = "label" if kind == "image" else "image"
            more = f" (and {len(lone) - 1} more like it)" if len(lone) > 1 else ""
            raise DataError(f"{have[lone[0]]}: {kind} without its {missing} in {folder}{more}; add the {missing} or remove it")
    return [Sample(images[name], labels[name]) for name in images]


# ---------------------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path) -> Image.Image:
    """An RGB image. Raises DataError where the file cannot be decoded or has more than 8 bits per channel."""
    image = _decode(path)
    if image.mode.startswith(("I", "F")):  # convert() would clip nearly all of it to white
        raise DataError(f"{path}: image of mode {image.mode}, expected 8 bits per channel; convert it")
    return image.convert("RGB")


def read_label(path: str | Path, table: bytes) -> Image.Image:
    """A label map of train ids (mode "L"). Raises DataError where a value is outside the table."""
    label = _decode(path)
    if label.mode == "P":  # a palette is for viewers: the indices are the labels
        label = Image.frombytes("L", label.size, label.tobytes())
    if label.mode != "L":
        raise DataError(f"{path}: label map of mode {label.mode}, expected one channel of 8 bits with a class id per pixel")
    stray = [value for value, count in enumerate(label.histogram()) if count and table[value] == UNKNOWN]
    if stray:
        values = ", ".join(map(str, stray[:5])) + (", ..." if len(stray) > 5 else "")
        raise DataError(
            f"{path}: label value {values} is outside the dataset's table; correct the file, or choose its --dataset"
        )
    return label.point(table)


def _decode(path: str | Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove the file") from error
    return image


class SegmentationDataset(torch.utils.data.Dataset):
    """Images and label maps.

    `dataset[index]` is a whole image and its label; `dataset[epoch, position, index]`, the keys that TrainBatches deals
    out, an augmented crop that depends on nothing but this key and the augmentation's seed: neither on the number of
    processes and workers nor on what was read before.

    Both give ((H, W, 3) uint8 RGB, (H, W) uint8 train ids).
    """

    def __init__(self, samples: list[Sample], classes: Classes, table: bytes, augmentation: Augmentation | None = None):
        self.samples = samples
        self.classes = classes
        self.table = table
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            image, label = self.read(key)
        else:
            epoch, position, index = key
            image, label = self.augmentation(*self.read(index), (epoch, position))
        return torch.from_numpy(np.array(image)), torch.from_numpy(np.array(label))

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """A whole RGB image and its label map of train ids."""
        sample = self.samples[index]
        image, label = read_image(sample.image), read_label(sample.label, self.table)
        if image.size != label.size:
            sizes = f"{label.width}x{label.height} pixels, its image {sample.image} {image.width}x{image.height}"
            raise DataError(f"{sample.label}: {sizes}; give both the same size")
        return image, label


def normalise(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32 of about zero mean and unit variance, channels_last in memory."""
    mean = torch.tensor(MEAN, device=images.device).mul_(255)
    std = torch.tensor(STD, device=images.device).mul_(255)
    return ((images - mean) / std).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- augmentation and order


@dataclass(frozen=True)
class Augmentation:
    """Section 4.1: random resize, crop, horizontal flip, channel noise and brightness; one seed, any number of workers.

    Attributes:
        crop_hw: height and width of the crop in pixels; what lies outside the image is the mean colour, and ignored.
        scale_range: bounds of the factor by which the image is resized before the crop; (1, 1) for none.
        flip: mirror half of the crops.
        brightness: the image is multiplied by a factor from 1 - brightness to 1 + brightness.
        channel_noise: each colour channel is multiplied by a factor from 1 - channel_noise to 1 + channel_noise.
        seed: of the random numbers, together with the key of each sample.
    """

    crop_hw: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    brightness: float = 0.3
    channel_noise: float = 0.1
    seed: int = 0

    def __call__(self, image: Image.Image, label: Image.Image, key: Sequence[int]) -> tuple[Image.Image, Image.Image]:
        """The crop of an RGB image and of its label map that belongs to `key` (epoch, position in the epoch)."""
        rng = np.random.default_rng((self.seed, *key))
        image, label = self._resized_crop(image, label, rng)
        if self.flip and rng.random() < 0.5:
            image, label = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.brightness or self.channel_noise:
            image = self._recolour(image, rng)
        return image, label

    def _resized_crop(self, image: Image.Image, label: Image.Image, rng: np.random.Generator):
        crop_h, crop_w = self.crop_hw
        scale = rng.uniform(*self.scale_range)
        scaled_h, scaled_w = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        # Where the crop starts in the resized image. A negative start is padding: the smaller image then lies anywhere
        # in the crop, which is the translation of the paper.
        top = int(rng.integers(min(0, scaled_h - crop_h), max(0, scaled_h - crop_h), endpoint=True))
        left = int(rng.integers(min(0, scaled_w - crop_w), max(0, scaled_w - crop_w), endpoint=True))
        y0, y1 = max(top, 0), min(top + crop_h, scaled_h)
        x0, x1 = max(left, 0), min(left + crop_w, scaled_w)
        # Resizing this box alone gives the same pixels as resizing the whole image and cropping, at a tenth of the cost.
        fy, fx = image.height / scaled_h, image.width / scaled_w
        box = (x0 * fx, y0 * fy, min(x1 * fx, image.width), min(y1 * fy, image.height))
        image = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box)
        label = label.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, box)
        if image.size == (crop_w, crop_h):
            return image, label
        padded_image, padded_label = Image.new("RGB", (crop_w, crop_h), PADDING_RGB), Image.new("L", (crop_w, crop_h), IGNORE)
        padded_image.paste(image, (x0 - left, y0 - top))
        padded_label.paste(label, (x0 - left, y0 - top))
        return padded_image, padded_label

    def _recolour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        gain = rng.uniform(1 - self.brightness, 1 + self.brightness)
        gains = gain * rng.uniform(1 - self.channel_noise, 1 + self.channel_noise, size=(3, 1))
        lookup = np.clip(np.arange(256) * gains + 0.5, 0, 255).astype(np.uint8)  # (3, 256), one table per channel
        return image.point(lookup.ravel().tolist())


class TrainBatches(torch.utils.data.Sampler):
    """This process' share of every global batch, as lists of (epoch, position, index) keys for SegmentationDataset.

    The global batches are the same for any number of processes. A dataset that does not divide by the batch leaves some
    images out of an epoch, others in each; one that is smaller than a batch is repeated to fill it.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1):
        """`batch_size` counts the images of all processes together.

        Raises:
            ValueError: the batch does not divide over the processes, or there is nothing to deal out.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch of {batch_size} does not divide over {world_size} processes")
        if num_samples < 1:
            raise ValueError("no samples")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rounds = -(-len(self) * self.batch_size // self.num_samples)
        order = np.concatenate([rng.permutation(self.num_samples) for _ in range(rounds)])
        for batch in range(len(self)):
            start = batch * self.batch_size + self.rank * self.share
            yield [(self.epoch, position, int(order[position])) for position in range(start, start + self.share)]
