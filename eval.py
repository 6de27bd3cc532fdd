"""Evaluates a trained Fast-SCNN on a labelled split, at full resolution.

    python eval.py --weights runs/checkpoints/best_model.pth                      # Cityscapes val
    python eval.py --weights W --dataset camvid --data datasets/camvid --sheet sheet.png
    python eval.py --weights W --scales 0.75 1 1.25 --flip                        # test-time averaging
    torchrun --nproc_per_node=8 eval.py --weights W                               # on 8 devices

Prints a table, then one JSON object as the last line on stdout.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from launch import AMP_DTYPES, OneLineParser, UsageError, exit_status, gathered, memory_format, start_processes  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    IGNORE,
    Classes,
    DataError,
    SegmentationDataset,
    init_worker,
    normalise,
    open_dataset,
)
from model import MIN_SIZE, CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint
from ops_ext import accelerate, fast_precision

# ---------------------------------------------------------------------------------------------------------- predictions


def evaluation_loader(dataset: SegmentationDataset, workers: int = 2, rank: int = 0, world_size: int = 1) -> DataLoader:
    """The images rank, rank + world_size, ... of a split, one by one; they may differ in size."""
    indices = range(rank, len(dataset), world_size)  # DistributedSampler repeats images to give each process as many
    workers = min(workers, len(indices))
    return DataLoader(
        dataset,
        batch_size=1,
        sampler=indices,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # keeps the loader off the global generator
    )


def evaluate(segment: Callable[[Tensor], Tensor], loader: DataLoader) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Predicts each image of an `evaluation_loader`. Raises DataError for a bad file.

    `segment`: from (1, H, W, 3) uint8 RGB to (1, H, W) uint8 train ids, as `ops_ext.accelerate` makes it.

    Yields:
        index in the dataset; image (H, W, 3), label (H, W) and, on the network's device, prediction (H, W), all uint8.
    """
    first_process = loader.sampler.start == 0
    bar = tqdm(loader, "evaluation", unit="image", leave=False, disable=None if first_process else True)
    for index, (image, label) in zip(loader.sampler, bar):
        height, width = label.shape[1:]
        if min(height, width) < MIN_SIZE:
            path = loader.dataset.samples[index].image
            raise DataError(f"{path}: {width}x{height} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}")
        yield index, image[0], label[0], segment(image)[0]


def resized(segment: Callable[[Tensor, Sequence[int]], Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    """`segment` of `ops_ext.accelerate` on images that are resized by `scale`; the labels have the images' own size."""

    def segment_resized(images: Tensor) -> Tensor:
        full_size = images.shape[1:3]
        size = [max(MIN_SIZE, round(side * scale)) for side in full_size]
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=scale < 1)
        return segment(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), full_size)

    return segment if scale == 1 else segment_resized


class AveragedNetwork:
    """Test-time averaging of class probabilities over scales and mirrored images.

    Args:
        model: the network.
        device: where to run.
        scales: factors of the input's height and width; probabilities are averaged at full resolution.
        flip: also average over the mirrored image.
        precision: of the convolutions, torch.float32, bfloat16 or float16.
        window: (height, width) of overlapping windows, for images that do not fit in memory; None for the full image.
    """

    def __init__(
        self,
        model: FastSCNN,
        device: torch.device,
        scales: Sequence[float],
        flip: bool = False,
        precision: torch.dtype = torch.float32,
        window: Sequence[int] | None = None,
    ):
        self.model = copy.deepcopy(model).eval().to(device, memory_format=memory_format(device))
        self.device, self.scales, self.flip, self.precision, self.window = device, scales, flip, precision, window

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB -> (N, H, W) uint8 labels."""
        pixels = normalise(images.to(self.device))  # (N, 3, H, W)
        full_size = pixels.shape[2:]
        total = 0
        for scale in self.scales:
            size = [max(MIN_SIZE, round(side * scale)) for side in full_size]
            resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=scale < 1)
            logits = [self.logits(resized)]
            if self.flip:
                logits.append(self.logits(resized.flip(3)).flip(3))
            for each in logits:
                total = total + F.interpolate(each, full_size, mode="bilinear", align_corners=False).softmax(1)
        return total.argmax(1).to(torch.uint8)

    def logits(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W) float32."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return (sliding_window(self.model, x, self.window) if self.window else self.model(x)).float()


def sliding_window(network: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int]) -> Tensor:
    """(N, C, H, W) logits of a network that sees one (height, width) window at a time, averaged where windows overlap.

    Windows overlap by at least a third of their size.
    """
    height, width = (min(size, side) for size, side in zip(window, x.shape[2:]))
    total, count = 0, x.new_zeros(x.shape[2:])
    for top in window_starts(x.shape[2], height):
        for left in window_starts(x.shape[3], width):
            bottom, right = top + height, left + width
            padding = (left, x.shape[3] - right, top, x.shape[2] - bottom)
            total = total + F.pad(network(x[..., top:bottom, left:right]).float(), padding)
            count[top:bottom, left:right] += 1
    return total / count


def window_starts(side: int, size: int) -> list[int]:
    """Start offsets of evenly spaced windows of `size` pixels that cover `side` pixels."""
    steps = math.ceil((side - size) / max(1, size * 2 // 3))
    return [round(i * (side - size) / max(1, steps)) for i in range(steps + 1)]


# -------------------------------------------------------------------------------------------------------------- metrics


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(num_classes, num_classes) int64 counts of labelled pixels; rows are the truth, columns the prediction."""
    code = label.to(prediction.device).long() * num_classes + prediction  # beyond the last class for ignored pixels
    counts = torch.bincount(code.flatten(), minlength=(IGNORE + 1) * num_classes)
    return counts[: num_classes**2].view(num_classes, num_classes)


def metrics(confusion: Tensor, classes: Classes) -> dict:
    """Metrics in [0, 1]; None for a class in neither truth nor prediction, which the means skip.

    Args:
        confusion: (C, C) int64, rows are the truth.
        classes: of the dataset.

    Returns:
        miou, pixel_accuracy, class_iou {name: IoU}, category_miou, category_iou {name: IoU}.
    """
    matrix = confusion.cpu().numpy()
    total = int(matrix.sum())
    class_iou = intersection_over_union(matrix)
    names = list(dict.fromkeys(classes.categories))
    # Classes of one category are merged first: a car predicted as a bus is a vehicle found.
    merge = np.array([[category == name for category in classes.categories] for name in names], dtype=np.int64)
    category_iou = intersection_over_union(merge @ matrix @ merge.T) if names else np.empty(0)
    return {
        "miou": mean_or_none(class_iou),
        "pixel_accuracy": int(np.trace(matrix)) / total if total else None,
        "class_iou": by_name(classes.names, class_iou),
        "category_miou": mean_or_none(category_iou),
        "category_iou": by_name(names, category_iou),
    }


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """(C,) TP / (TP + FP + FN); NaN for a class that occurs in neither truth nor prediction."""
    true_positive = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - true_positive
    return np.divide(true_positive, union, out=np.full(len(confusion), np.nan), where=union > 0)


def by_name(names: Iterable[str], values: Iterable[float]) -> dict[str, float | None]:
    """{name: value}, None for NaN, which JSON does not have."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values)}


def mean_or_none(values: Iterable[float]) -> float | None:
    """Mean of the values that are not NaN; None if there are none."""
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else None


class InstanceScores:
    """Cityscapes' instance-level IoU (iIoU): every object counts as if it had the average size of its class.

    For classes whose instances are labelled, and categories that consist of such classes.
    """

    # Average number of pixels of an instance in the training set, the constants of cityscapesScripts.
    AVERAGE_PIXELS: ClassVar = {
        "person": 3462.4756337644,
        "rider": 3930.4788056518,
        "car": 12794.0202738185,
        "truck": 27855.1264367816,
        "bus": 35732.1511111111,
        "train": 67583.7075812274,
        "motorcycle": 6298.7200839748,
        "bicycle": 4672.3249222261,
    }

    def __init__(self):
        names, categories = CITYSCAPES.names, CITYSCAPES.categories
        category_names = list(dict.fromkeys(categories))
        self.category = torch.tensor([category_names.index(each) for each in categories])  # (C,) of each class
        mixed = {category for name, category in zip(names, categories) if name not in self.AVERAGE_PIXELS}
        self.categories = {name: i for i, name in enumerate(category_names) if name not in mixed}
        self.average = torch.tensor([self.AVERAGE_PIXELS.get(name, 0.0) for name in names], dtype=torch.float64)
        # Weighted pixels of each class: all, of the correct class, of the correct category.
        self.weighted = torch.zeros(len(names), 3, dtype=torch.float64)

    def add(self, prediction: Tensor, instances: Tensor) -> None:
        """(H, W) train ids and the (H, W) int64 map of `SegmentationDataset.read_instances`."""
        inside = instances >= 0
        code, guess = instances[inside], prediction.cpu()[inside].long()
        truth = code // 1000
        correct = torch.stack([torch.ones_like(truth), guess == truth, self.category[guess] == self.category[truth]])
        num_codes = 1000 * len(self.weighted)
        pixels = torch.stack([torch.bincount(code, each.double(), num_codes) for each in correct], 1)  # (codes, 3)
        share = (pixels / pixels[:, :1].clamp(min=1)).view(len(self.weighted), 1000, 3)  # of each object's pixels
        self.weighted += self.average[:, None] * share.sum(1)

    def metrics(self, confusion: Tensor) -> dict:
        """class_iiou and category_iiou {name: iIoU}, and their means miiou and category_miiou, as `metrics` has them.

        confusion: (C, C) int64, of the same images.
        """
        confusion = confusion.cpu().double()
        classes, categories = {}, {}
        for i, name in enumerate(CITYSCAPES.names):
            if name in self.AVERAGE_PIXELS:
                false_positive = confusion[:, i].sum() - confusion[i, i]
                classes[name] = (self.weighted[i, 1] / (self.weighted[i, 0] + false_positive)).item()
        for name, number in self.categories.items():
            mask = self.category == number
            false_positive = confusion[~mask][:, mask].sum()
            total, _, correct = self.weighted[mask].sum(0)
            categories[name] = (correct / (total + false_positive)).item()  # NaN if the category does not occur
        return {
            "miiou": mean_or_none(classes.values()),
            "class_iiou": by_name(classes.keys(), classes.values()),
            "category_miiou": mean_or_none(categories.values()),
            "category_iiou": by_name(categories.keys(), categories.values()),
        }


class SplitScores:
    """The confusion matrix of a split, and its instance scores where all its images have instance maps."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset
        num_classes = len(dataset.classes.names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.instances = InstanceScores() if all(sample.instances for sample in dataset.samples) else None

    def add(self, index: int, label: Tensor, prediction: Tensor) -> Tensor:
        """Counts what `evaluate` yields; returns the confusion matrix of this image."""
        confusion = confusion_matrix(prediction, label, len(self.confusion)).cpu()
        self.confusion += confusion
        if self.instances:
            self.instances.add(prediction, self.dataset.read_instances(index))
        return confusion

    def metrics(self, world_size: int = 1) -> dict:
        """Metrics over all processes, each of which calls this once."""
        self.confusion = sum(gathered([self.confusion], world_size))
        result = metrics(self.confusion, self.dataset.classes)
        if self.instances:
            self.instances.weighted = sum(gathered([self.instances.weighted], world_size))
            result |= self.instances.metrics(self.confusion)
        return result


def format_table(result: dict) -> str:
    """The metrics as a text table, in per cent."""
    sections = (
        ("IoU per class, %", "class_iou", "miou"),
        ("IoU per category, %", "category_iou", "category_miou"),
        ("iIoU per class, %", "class_iiou", "miiou"),
        ("iIoU per category, %", "category_iiou", "category_miiou"),
    )
    lines = []
    for title, values, mean in sections:
        if result.get(values):
            rows = {**result[values], "mean": result[mean]}
            lines += [title, *(f"  {name:<16} {percent(value):>6}" for name, value in rows.items())]
    return "\n".join([*lines, f"pixel accuracy, %  {percent(result['pixel_accuracy']):>6}"])


def percent(value: float | None) -> str:
    """0.5 -> "50.00", None -> "-"."""
    return "-" if value is None else f"{100 * value:.2f}"


# ------------------------------------------------------------------------------------------------------ files it writes


def contact_sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], width: int = 384) -> Image.Image:
    """Rows of pictures, each `width` pixels wide, with a caption for each column."""
    gap, header = 4, 20
    heights = [max(1, round(width * row[0].height / row[0].width)) for row in rows]
    size = gap + len(captions) * (width + gap), header + sum(height + gap for height in heights)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((gap + column * (width + gap), 1), caption, "black", font_size=15)
    top = header
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            tile = picture.resize((width, height), Image.Resampling.BOX)
            sheet.paste(tile, (gap + column * (width + gap), top))
        top += height + gap
    return sheet


def write_submission(dataset: SegmentationDataset, index: int, prediction: Tensor, folder: Path) -> None:
    """Writes a prediction as label ids, under the name that Cityscapes' evaluation server expects."""
    label_ids = np.array(CITYSCAPES_LABEL_IDS, np.uint8)[prediction.cpu().numpy()]
    name = dataset.samples[index].image.name.removesuffix("_leftImg8bit.png")
    Image.fromarray(label_ids).save(folder / f"{name}_pred.png")


# --------------------------------------------------------------------------------------------------------- command line


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for weights, data and protocol."""
    add = parser.add_argument
    add(
        "--weights",
        metavar="FILE",
        required=True,
        help="checkpoint of train.py, or of Tramac, SegmenTron, MMSegmentation",
    )
    add("--dataset", help="cityscapes, camvid or folder (default: by the classes of the weights)")
    add("--data", metavar="ROOT", help="the dataset's folder (default: datasets/NAME)")
    add("--split", default="val", help="split to evaluate, or several joined by + (default: %(default)s)")
    add("--scales", type=float, nargs="+", metavar="S",
        help="factors of the images' size, averaged; 0.5 is half resolution (default: as trained)")  # fmt: skip
    add("--flip", action="store_true", help="also average over the mirrored image")
    add("--window", type=int, nargs=2, metavar=("H", "W"),
        help="predict in overlapping windows of this size in pixels, for images that do not fit in memory")  # fmt: skip
    add("--amp", choices=("auto", *AMP_DTYPES), default="off",
        help="precision of the convolutions; auto is the fastest, off is float32 (default: %(default)s)")  # fmt: skip
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, else the CPU)")
    add("--workers", type=int, default=2, metavar="N", help="decoding processes (default: %(default)s)")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of eval.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_evaluation_flags(parser)
    parser.add_argument("--submit", metavar="DIR", help="also write the predictions for Cityscapes' evaluation server")
    parser.add_argument("--sheet", metavar="FILE", help="also write a picture of 6 images: image | truth | prediction")
    return parser


def open_for_evaluation(args: argparse.Namespace) -> tuple[dict, FastSCNN, SegmentationDataset]:
    """The checkpoint, its network and the split that the flags name; fills in args.dataset and args.data."""
    checkpoint = read_checkpoint(args.weights)
    names = checkpoint.get("classes", {}).get("names")
    known = {"cityscapes": CITYSCAPES, "camvid": CAMVID}  # other projects' weights have no names: assume Cityscapes
    inferred = next((name for name, classes in known.items() if names in (None, list(classes.names))), "folder")
    args.dataset = args.dataset or inferred
    args.data = args.data or f"datasets/{args.dataset}"
    args.scales = args.scales or [checkpoint.get("scale", 1.0)]
    dataset = open_dataset(args.dataset, args.data, args.split, labelled=not getattr(args, "submit", None))
    expected = list(dataset.classes.names)
    model = build_from_checkpoint(checkpoint, args.weights, num_classes=len(expected))
    if names not in (None, expected):
        was, now = next(pair for pair in zip(names, expected) if pair[0] != pair[1])
        raise CheckpointError(
            f"{args.weights}: its classes differ, {was!r} where {args.data} has {now!r}; use its own dataset"
        )
    return checkpoint, model, dataset


def make_segment(args: argparse.Namespace, model: FastSCNN, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From (N, H, W, 3) uint8 RGB to (N, H, W) uint8 labels, as set by the flags."""
    if not all(0 < scale <= 16 for scale in args.scales):
        raise UsageError(
            f"--scales {' '.join(map(str, args.scales))}: expected factors from 0 to 16, such as 0.75 1.0 1.25"
        )
    if args.window and min(args.window) < MIN_SIZE:
        raise UsageError(f"--window {args.window[0]} {args.window[1]}: expected at least {MIN_SIZE} pixels each")
    precision = fast_precision(device) if args.amp == "auto" else AMP_DTYPES[args.amp] or torch.float32
    if len(args.scales) == 1 and not args.flip and not args.window:
        return resized(accelerate(model, device=device, precision=precision), args.scales[0])
    return AveragedNetwork(model, device, args.scales, args.flip, precision, args.window)


def main(argv: list[str] | None = None) -> None:
    """Evaluates as the command line says."""
    args = get_args_parser().parse_args(argv)
    _, model, dataset = open_for_evaluation(args)
    if args.submit and args.dataset != "cityscapes":
        raise UsageError(f"--submit writes Cityscapes' label ids, which {args.dataset} does not have")
    device, rank, world_size = start_processes(args.device)
    segment = make_segment(args, model, device)
    for folder in (args.submit, args.sheet and Path(args.sheet).parent):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)

    scores, sheet_rows = SplitScores(dataset), []
    loader = evaluation_loader(dataset, args.workers, rank, world_size)
    shown = loader.sampler[:: math.ceil(len(loader) / 6)] if len(loader) else ()  # neighbours look the same
    for index, image, label, prediction in evaluate(segment, loader):
        scores.add(index, label, prediction)
        if args.submit:
            write_submission(dataset, index, prediction, Path(args.submit))
        if args.sheet and rank == 0 and index in shown:
            maps = [dataset.classes.colour_map(each.cpu().numpy()) for each in (label, prediction)]
            sheet_rows.append([Image.fromarray(image.numpy()), *maps])
    result = scores.metrics(world_size)
    if rank == 0:
        print(format_table(result))
        if args.scales != [1.0]:
            print(f"images seen at {' and '.join(map(str, args.scales))} times their size")
        if args.sheet:
            contact_sheet(sheet_rows, ("image", "truth", "prediction")).save(args.sheet)
            print(f"wrote {args.sheet}")
        protocol = {"dataset": args.dataset, "split": args.split, "images": len(dataset)}
        protocol |= {"scales": args.scales, "flip": args.flip, "window": args.window}
        print(json.dumps({**protocol, **result}), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError, CheckpointError)))
