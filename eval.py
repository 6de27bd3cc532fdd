"""Evaluates a trained Fast-SCNN, or segments pictures with it.

    python eval.py --weights runs/checkpoints/best_model.pth                      # Cityscapes val at full resolution
    python eval.py --weights W --dataset camvid --data datasets/camvid --sheet sheet.png
    python eval.py --weights W --predict PATH --out DIR                           # coloured overlays of pictures and videos
    ffmpeg ... -pix_fmt rgb24 -f rawvideo - | python eval.py --weights W --predict - --size 512 1024 --out - | ...
    python eval.py --benchmark                                                    # speed, no weights needed
    python eval.py --weights W --export model.onnx                                # for other runtimes: image in, labels out
    torchrun --nproc_per_node=8 eval.py --weights W                               # shares the images out

A table for people, then one JSON object as the last line on stdout. Exit status: 0, 2 for what the user can mend, 1 for faults.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import errno
import functools
import hashlib
import html
import importlib
import io
import json
import math
import multiprocessing
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    IGNORE,
    IMAGE_SUFFIXES,
    MEAN,
    STD,
    Classes,
    DataError,
    SegmentationDataset,
    normalise,
    open_dataset,
    read_image,
    writable_as_picture,
)
from model import MIN_SIZE, VARIANTS, CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint, save_for_peer
from ops_ext import accelerate, confusion_matrix, overlay_plane, yuv420_to_rgb

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
MAX_SCALE, MAX_SIZE = 16, 2**16  # of --scales, and in pixels a side of --size and --window: beyond, a slip of the keyboard
PAPER_SIZES = ((1024, 2048), (512, 1024), (256, 512))  # table 6
PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


class UsageError(ValueError):
    """Arguments that do not go together or do not fit this machine; the message says which and what to change."""


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a wrong command line in one line."""

    def error(self, message: str):
        raise UsageError(f"{message}; --help lists all flags")


def check_bounds(args: argparse.Namespace, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises UsageError for a flag beyond its bounds, both ends included, or nan; the keys are names, or several in one string."""
    for names, (least, most) in bounds.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise UsageError(f"--{name.replace('_', '-')} is {value}, expected {bound}")


REMEDIES = {
    errno.EPIPE: "who read what this prints is gone",
    errno.EMFILE: "raise the limit (ulimit -n), or give fewer --workers",
    errno.EBADF: "keep stdin and stdout open",
}


def exit_status(program: str, main: Callable[[], int | None]) -> int:
    """Runs `main`, then leaves the process group that it joined, if any; its status is what `main` returned, or else 0.

    What the user can mend becomes one line on stderr and status 2; faults keep their traceback.
    """
    rank = os.environ.get("RANK", "0")
    for stream in (sys.stdout, sys.stderr):  # file names may be no text in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        if dist.is_initialized():  # not after an error: other processes may be waiting within a collective, and this one too
            dist.destroy_process_group()
        return status
    except (UsageError, DataError, CheckpointError, OSError, MemoryError, RuntimeError) as error:
        # An error that crossed from a loader's worker carries that process' traceback, its own text in the last line.
        text = str(error).strip() or repr(error)
        line = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        if isinstance(error, OSError) and error.strerror:
            place = f"{error.filename}: " if error.filename else ""
            line = f"{place}{error.strerror.lower()}; {REMEDIES.get(error.errno, 'give another path, or make room or permission there')}"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:  # the CPU's has no class
            line = f"out of memory ({text.splitlines()[0][:120]}); take smaller batches, crops or images"
        elif "DataLoader worker (pid" in text:
            line = "a decoding process was killed, mostly for lack of memory; give fewer --workers, or a smaller batch"
        elif isinstance(error, RuntimeError):
            raise
        if rank != "0" and not dist.is_initialized():
            # What is wrong before the processes meet is wrong for all of them: process 0 says it, and torchrun then ends
            # the others. One that outlives this pause has an error of its own.
            time.sleep(10)
        print(f"{program}{'' if rank == '0' else f' [process {rank}]'}: {line}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # Gloo's threads, with a collective under way, abort an interpreter that ends around them
            end_workers()
            sys.stdout.flush()
            os._exit(2)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    finally:
        end_workers()


def end_workers() -> None:
    """Ends the workers of a loader that an error left behind."""
    if workers := multiprocessing.active_children():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a fault
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, handler)


# --------------------------------------------------------------------------------------------------- devices and processes


def start_processes(device_name: str | None, timeout_minutes: float = 30) -> tuple[torch.device, int, int]:
    """(device, rank, world size) of this process; under torchrun it joins the others.

    Args:
        device_name: "cpu", "cuda", "cuda:1", ...; None takes the machine's accelerator, or else the CPU.
        timeout_minutes: how long to wait for another process in a collective.

    Raises:
        UsageError: there is no such device, or too few for the processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device_name is not None:
        try:
            wanted = torch.device(device_name)
        except RuntimeError:
            raise UsageError(f"--device {device_name} is no device; give cpu, cuda, or cuda:0") from None
        if wanted.type not in ("cpu", device.type):
            raise UsageError(f"--device {device_name} is not available here; this machine has {device.type}")
        device = wanted
    if device.type != "cpu":
        index = local_rank if device.index is None else device.index
        if index >= torch.accelerator.device_count():
            raise UsageError(
                f"{device.type}:{index} does not exist; this machine has {torch.accelerator.device_count()} devices"
            )
        device = torch.device(device.type, index)
        torch.accelerator.set_device_index(index)
    if "RANK" not in os.environ:
        return device, 0, 1
    if missing := {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UsageError(f"RANK is set, but not {', '.join(sorted(missing))}; start the processes with torchrun, or unset RANK")
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        store = dist.PrefixStore(name_of_this_start(store, rank, world_size, timeout_minutes), store)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type != "cpu" else None,
    )
    return device, rank, world_size


def name_of_this_start(store: dist.Store, rank: int, world_size: int, timeout_minutes: float) -> str:
    """A name on which the processes that live now agree, of a store that outlives them.

    torchrun keeps its store over restarts: what a killed process has written there, such as its address, would be read in the
    place of what its successor has yet to write. So each says hello with a token of its own, process 0 proposes the tokens that
    it finds, all who find their own among them agree, and where one was a dead process' it is proposed anew.

    Raises:
        UsageError: they did not all meet in time.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    hellos = [f"hello/{each}" for each in range(world_size)]
    deadline = time.monotonic() + 60 * timeout_minutes
    while time.monotonic() < deadline:
        if rank == 0 and store.check(hellos):
            store.set("proposal", b" ".join(store.get(each) for each in hellos))
        tokens = store.get("proposal") if store.check(["proposal"]) else b""
        if own.encode() in tokens.split():
            name = hashlib.sha256(tokens).hexdigest()
            store.set(f"{name}/{rank}", "agreed")
            if rank == 0 and store.check([f"{name}/{each}" for each in range(world_size)]):
                store.set(f"{name}/all", "agreed")
            if store.check([f"{name}/all"]):
                return name
        time.sleep(0.05)
    raise UsageError(f"the {world_size} processes did not meet within {timeout_minutes:g} minutes; see what the others say")


def outlive_signals(_: int) -> None:
    """For a loader's worker: what is sent to all processes at once is for the one that reads from it, which ends this one.

    A Ctrl-C is ignored, and SIGTERM obeyed 5 seconds later, when the other has done its step and saved.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


def name_of(device: torch.device) -> str:
    """The device as its maker calls it, or "cpu"."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def gathered(share: list, world_size: int) -> list:
    """The lists of all processes in one, in every process."""
    shares = [share]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, share)
    return [each for share in shares for each in share]


# ---------------------------------------------------------------------------------------------------------------- metrics


class WithInstances(torch.utils.data.Dataset):
    """Whole images and label maps of a dataset, and their maps of instances."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label = self.dataset[index]
        instances = self.dataset.read_instances(index)
        if instances.shape != label.shape:
            path = self.dataset.samples[index].instances
            raise DataError(
                f"{path}: {tuple(instances.shape)} pixels, its label map {tuple(label.shape)}; give both the same size"
            )
        return image, label, instances


class InstanceScores:
    """Cityscapes' instance-weighted IoU (iIoU): each object counts as if it had its class' average size.

    It is for classes of single objects, and for the categories all of whose classes are.
    """

    # Mean number of pixels of an instance in the training set, the constants of cityscapesScripts.
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
        classes = CITYSCAPES
        self.names = classes.names
        categories = list(dict.fromkeys(classes.categories))
        self.category = torch.tensor([*(categories.index(each) for each in classes.categories), -1])  # the last is void
        self.weighted = torch.zeros(len(classes.names), 3, dtype=torch.float64)  # all, found, found of the same category
        self.average = torch.tensor([self.AVERAGE_PIXELS.get(name, 0.0) for name in classes.names], dtype=torch.float64)
        single = {
            c: all(n in self.AVERAGE_PIXELS for n, k in zip(classes.names, classes.categories) if k == c) for c in categories
        }
        self.categories = {name: categories.index(name) for name in categories if single[name]}

    def add(self, prediction: Tensor, instances: Tensor) -> None:
        """(H, W) labels, of which those beyond the classes are void, and the (H, W) map of `read_instances`."""
        inside = instances >= 0
        code, guess = instances[inside], prediction.cpu()[inside].long().clamp(max=len(self.names))
        truth = code // 1000
        found = torch.stack(
            [torch.ones_like(truth, dtype=torch.bool), guess == truth, self.category[guess] == self.category[truth]]
        )
        codes = 1000 * len(self.names)
        pixels = torch.stack([torch.bincount(code[each], minlength=codes) for each in found], 1).double()  # (codes, 3)
        share = (pixels / pixels[:, :1].clamp(min=1)).view(len(self.names), 1000, 3)
        self.weighted += self.average[:, None] * share.sum(1)

    def reduce(self, device: torch.device) -> None:
        """Adds up what all processes have."""
        weighted = self.weighted.to(device)
        dist.all_reduce(weighted)
        self.weighted = weighted.cpu()

    def metrics(self, confusion: Tensor) -> dict:
        """class_iiou and category_iiou {name: iIoU}, their means miiou and category_miiou, in [0, 1], null for what does not occur.

        confusion: (C, C) or with columns of void predictions behind; rows are the truth.
        """
        matrix, n = confusion.double(), len(self.names)

        def score(found: float, everything: float, false_positives: float) -> float:
            return found / (everything + false_positives) if everything + false_positives > 0 else float("nan")

        classes, categories = {}, {}
        for i, name in enumerate(self.names):
            if name in self.AVERAGE_PIXELS:
                false_positives = matrix[:, i].sum() - matrix[i, i]
                classes[name] = score(self.weighted[i, 1].item(), self.weighted[i, 0].item(), false_positives.item())
        for name, number in self.categories.items():
            member = self.category[:n] == number
            false_positives = matrix[~member][:, :n][:, member].sum()
            categories[name] = score(*self.weighted[member][:, [2, 0]].sum(0).tolist(), false_positives.item())
        return {
            "miiou": _mean(np.array(list(classes.values()))),
            "class_iiou": {name: _number(value) for name, value in classes.items()},
            "category_miiou": _mean(np.array(list(categories.values()))),
            "category_iiou": {name: _number(value) for name, value in categories.items()},
        }


def evaluate(
    segment: Callable[[Tensor], Tensor],
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    workers: int = 2,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    sheet: ContactSheet | None = None,
    instances: InstanceScores | None = None,
    each: Callable[[int, Tensor], None] | None = None,
    worst: WorstImages | None = None,
) -> Tensor:
    """Confusion matrix of a whole split at full resolution, every image counted exactly once by one of the processes.

    Args:
        segment: from (1, H, W, 3) uint8 RGB to (1, H, W) uint8 labels, as `ops_ext.accelerate` makes it.
        dataset: the split; images may differ in size.
        device: where the confusion matrix is accumulated.
        workers: processes that decode images, per process.
        rank, world_size: which share of the images is this process'.
        progress: show a progress bar on a terminal.
        sheet: gathers the first pictures of rank 0.
        instances: gathers what instance-level figures need; all images have maps of instances.
        each: called with the index of every image and its (H, W) prediction.
        worst: gathers the worst pictures of this process.

    Returns:
        (num_classes, num_classes) int64 on the CPU, rows are the truth; the same in every process.

    Raises:
        DataError: a file cannot be read, or an image is smaller than the network takes.
    """
    num_classes = len(dataset.classes.names)
    indices = range(rank, len(dataset), world_size)
    # No padding to an even share: unlike torch's DistributedSampler no image is counted twice.
    source = dataset if instances is None else WithInstances(dataset)
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=1,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # else it draws from the training's random numbers
    )
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    loader = tqdm(loader, "evaluation", unit="image", leave=False, disable=None if progress and rank == 0 else True)
    for index, (image, label, *maps) in zip(indices, loader):
        if min(label.shape[1:]) < MIN_SIZE:
            height, width = label.shape[1:]
            raise DataError(f"{dataset.samples[index].image}: {width}x{height} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}")
        prediction = segment(image)
        matrix = confusion_matrix(prediction, label.to(device), num_classes, IGNORE)
        confusion += matrix
        if sheet is not None:
            sheet.add(image[0], label[0], prediction[0])
        if instances is not None:
            instances.add(prediction[0], maps[0][0])
        if each is not None:
            each(index, prediction[0])
        if worst is not None:
            worst.add(index, image[0], label[0], prediction[0], matrix)
    if world_size > 1:
        dist.all_reduce(confusion)
        if instances is not None:
            instances.reduce(device)
    return confusion.cpu()


def slide(network: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int]) -> Tensor:
    """(N, C, H, W) scores of a network that sees windows of (height, width) alone, averaged where they overlap.

    Windows lie at most two thirds of their size apart; on an image that one of them covers this is the network's own result.
    """
    height, width = (min(size, side) for size, side in zip(window, x.shape[2:]))

    def starts(side: int, size: int) -> list[int]:
        steps = math.ceil((side - size) / max(1, size * 2 // 3))
        return [round(i * (side - size) / steps) for i in range(steps + 1)] if steps else [0]

    total, count = None, x.new_zeros(x.shape[2:])
    for top in starts(x.shape[2], height):
        for left in starts(x.shape[3], width):
            part = slice(top, top + height), slice(left, left + width)
            scores = network(x[(..., *part)]).float()
            total = scores.new_zeros((*scores.shape[:2], *x.shape[2:])) if total is None else total
            total[(..., *part)] += scores
            count[part] += 1
    return total / count


def averaging(
    model: FastSCNN,
    device: torch.device,
    scales: Sequence[float],
    flip: bool,
    dtype: torch.dtype | None = None,
    window: Sequence[int] | None = None,
) -> Callable[[Tensor], Tensor]:
    """Labels from the mean of the class probabilities at several scales, and of mirrored images too.

    Args:
        model: the network.
        device: where to run.
        scales: factors of the input's height and width; the probabilities are taken at its full resolution.
        flip: also mirror each.
        dtype: of mixed precision; None for float32.
        window: height and width of what the network sees at once; None for all.

    Returns:
        From (N, H, W, 3) uint8 RGB to (N, H, W) uint8 labels on `device`.
    """
    model = copy.deepcopy(model).eval().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def segment(images: Tensor) -> Tensor:
        pixels = normalise(images.to(device))  # (N, 3, H, W)
        total = 0
        for scale in scales:
            size = [max(MIN_SIZE, round(side * scale)) for side in pixels.shape[2:]]
            resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=scale < 1)
            for mirrored in (False, True) if flip else (False,):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    source = resized.flip(3) if mirrored else resized
                    scores = slide(model, source, window) if window else model(source)
                scores = scores.flip(3) if mirrored else scores
                total = total + F.interpolate(scores.float(), pixels.shape[2:], mode="bilinear", align_corners=False).softmax(1)
        return total.argmax(1).to(torch.uint8)

    return segment


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) of each class; NaN for one that occurs neither in truth nor in prediction.

    confusion: (C, C) or more columns, of predictions that are no class; rows are the truth.
    """
    true_positive = np.diag(confusion).astype(float)
    union = confusion.sum(0)[: len(confusion)] + confusion.sum(1) - np.diag(confusion)
    return np.divide(true_positive, union, out=np.full(len(confusion), np.nan), where=union > 0)


def metrics(confusion: Tensor, classes: Classes) -> dict:
    """The benchmark's figures from a confusion matrix, in [0, 1]; null for what does not occur, which no mean counts.

    Returns:
        miou, pixel_accuracy, class_iou {name: IoU}, category_miou, category_iou {name: IoU}.
    """
    matrix = confusion.numpy()
    total = int(matrix.sum())
    class_iou = intersection_over_union(matrix)
    names = list(dict.fromkeys(classes.categories))
    # Classes of one category are merged first: a car taken for a bus is a vehicle found.
    member = np.array([[category == name for category in classes.categories] for name in names], dtype=np.int64)
    n = len(matrix)
    merged = np.hstack([member @ matrix[:, :n] @ member.T, member @ matrix[:, n:]]) if names else np.empty((0, 0))
    category_iou = intersection_over_union(merged)
    return {
        "miou": _mean(class_iou),
        "pixel_accuracy": int(np.trace(matrix)) / total if total else None,
        "class_iou": {name: _number(v) for name, v in zip(classes.names, class_iou)},
        "category_miou": _mean(category_iou),
        "category_iou": {name: _number(v) for name, v in zip(names, category_iou)},
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None


def format_table(result: dict) -> str:
    """The metrics as a text table, in per cent."""

    def rows(title: str, values: dict, mean: float | None) -> list[str]:
        body = [f"  {name:<16} {_percent(value)}" for name, value in values.items()]
        return [title, *body, f"  {'mean':<16} {_percent(mean)}"] if values else []

    lines = rows("IoU per class, %", result["class_iou"], result["miou"])
    lines += rows("IoU per category, %", result["category_iou"], result["category_miou"])
    if "miiou" in result:
        lines += rows("iIoU per class, %", result["class_iiou"], result["miiou"])
        lines += rows("iIoU per category, %", result["category_iiou"], result["category_miiou"])
    return "\n".join([*lines, f"pixel accuracy, %  {_percent(result['pixel_accuracy'])}"])


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:6.2f}"


def write_submission(dataset: SegmentationDataset, folder: Path, index: int, prediction: Tensor) -> None:
    """Writes a prediction as label ids, named as Cityscapes' evaluation server and scripts look for it."""
    label_ids = np.array(CITYSCAPES_LABEL_IDS, np.uint8)[prediction.cpu().numpy()]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label_ids).save(folder / f"{dataset.samples[index].image.name.removesuffix('_leftImg8bit.png')}_pred.png")


# --------------------------------------------------------------------------------------------------------------- pictures


def colour_map(label: np.ndarray, classes: Classes) -> Image.Image:
    """(H, W) uint8 train ids -> RGB picture in the classes' colours; what is ignored is black."""
    indices = Image.frombuffer("P", label.shape[::-1], np.ascontiguousarray(label), "raw", "P", 0, 1)
    indices.putpalette(classes.palette().tobytes())
    return indices.convert("RGB")  # 17 times as fast as indexing in NumPy


def overlay(image: Image.Image, label: np.ndarray, classes: Classes, strength: float = 0.55) -> Image.Image:
    """The image with its label map in colours laid over it."""
    return Image.blend(image, colour_map(label, classes), strength)


class ContactSheet:
    """Rows of image | truth | prediction in one picture, with a caption above."""

    def __init__(self, classes: Classes, rows: int, width: int = 384):
        self.classes, self.rows, self.width = classes, rows, width
        self.tiles: list[Tensor] = []

    def add(self, image: Tensor, truth: Tensor, prediction: Tensor) -> None:
        """(H, W, 3) uint8 RGB and two (H, W) uint8 label maps; ignored once the sheet is full."""
        if len(self.tiles) >= 3 * self.rows:
            return
        pictures = [Image.fromarray(image.numpy())] + [colour_map(m.cpu().numpy(), self.classes) for m in (truth, prediction)]
        height = min(max(1, round(self.width * image.shape[0] / image.shape[1])), 8 * self.width)  # of what is all height too
        for picture, how in zip(pictures, (Image.Resampling.BILINEAR, Image.Resampling.NEAREST, Image.Resampling.NEAREST)):
            tile = torch.from_numpy(np.array(picture.resize((self.width, height), how)))
            self.tiles.append(tile.permute(2, 0, 1))

    def save(self, path: str | Path) -> None:
        """Writes the picture; the folder is made if need be."""
        height = max(tile.shape[1] for tile in self.tiles)
        tiles = [torch.nn.functional.pad(tile, (0, 0, 0, height - tile.shape[1])) for tile in self.tiles]
        grid = torchvision.utils.make_grid(tiles, nrow=3, padding=4, pad_value=255)
        sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + 16), "white")
        sheet.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, 16))
        draw = ImageDraw.Draw(sheet)
        for column, caption in enumerate(("image", "truth", "prediction")):
            draw.text((8 + column * (self.width + 4), 3), caption, "black")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)


# ----------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Theme:
    """Colours of a chart; `first` and `second` are told apart by the colour-blind too (Okabe and Ito)."""

    paper: str
    ink: str
    muted: str
    grid: str
    first: str
    second: str
    full: str  # of a confusion matrix' cell with all of its row

    def mix(self, colour: str | tuple[int, int, int], share: float) -> tuple[int, int, int]:
        """`share` of the colour on paper."""
        colour = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
        return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, ImageColor.getrgb(self.paper)))


LIGHT = Theme("#ffffff", "#1b1d21", "#63676e", "#e2e4e8", "#0072b2", "#d55e00", "#08306b")
DARK = Theme("#15181c", "#e9eaec", "#9da2aa", "#343941", "#56b4e9", "#e69f00", "#c6dbef")
DRAWN, SHOWN = 4, 2  # pixels per unit of a chart, drawn and then averaged to those in the file; a unit is a pixel of the page
TILE = 480  # pixels, width of a picture of an image
MAX_POINTS = 2000  # drawn of a curve


class Chart:
    """A drawing whose coordinates are pixels of the page, from the top left."""

    def __init__(self, width: float, height: float, theme: Theme):
        self.width, self.height, self.theme = math.ceil(width), math.ceil(height), theme
        self.image = Image.new("RGB", (DRAWN * self.width, DRAWN * self.height), theme.paper)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """A line through (x, y) points, of which there may be none."""
        if points:
            self.draw.line([(DRAWN * x, DRAWN * y) for x, y in points], colour, round(DRAWN * width), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour, outline: str | None = None) -> None:
        """A filled rectangle with sharp edges, `right` and `bottom` excluded."""
        left, top, right, bottom = (round(SHOWN * each) * DRAWN // SHOWN for each in (left, top, right, bottom))
        corners = left, top, right - 1, bottom - 1
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            self.draw.rectangle(corners, colour, outline, DRAWN // 2)

    def rule(self, left: float, top: float, right: float, bottom: float, colour: str, width: float = 1.0) -> None:
        """A sharp horizontal or vertical line, of at least a pixel."""
        thick = max(1, round(SHOWN * width))
        first = round(SHOWN * (top if top == bottom else left)) - thick // 2
        if top == bottom:
            self.box(left, first / SHOWN, right, (first + thick) / SHOWN, colour)
        else:
            self.box(first / SHOWN, top, (first + thick) / SHOWN, bottom, colour)

    def mark(self, x: float, y: float, colour, radius: float = 2.0, square: bool = False) -> None:
        """A disc or a square about a point."""
        shape = self.draw.rectangle if square else self.draw.ellipse
        shape([DRAWN * (x - radius), DRAWN * (y - radius), DRAWN * (x + radius), DRAWN * (y + radius)], colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        colour=None,
        align: float = 0,
        turned: bool = False,
        on_paper: bool = False,
    ) -> None:
        """Text about the height y; x is its start, middle or end for `align` 0, 0.5 or 1.

        Turned, it reads upwards, about x and aligned along y; `on_paper`, nothing that was drawn before shows between its letters.
        """
        mask = _text_mask(text, round(DRAWN * size))
        along, across = round(align * mask.width), mask.height // 2
        if turned:
            mask, along, across = mask.transpose(Image.Transpose.ROTATE_90), across, round((1 - align) * mask.width)
        left, top = round(DRAWN * x) - along, round(DRAWN * y) - across
        if on_paper:
            self.draw.rectangle([left - DRAWN, top, left + mask.width + DRAWN, top + mask.height], self.theme.paper)
        self.image.paste(colour or self.theme.ink, (left, top), mask)

    def axes(
        self, box: tuple, x: tuple[float, float], y: Sequence[float], x_title: str = "", y_title: str = ""
    ) -> tuple[Callable[[float], float], Callable[[float], float]]:
        """Grid, ticks and titles of a plot; returns what maps values to coordinates.

        Args:
            box: left, top, right and bottom of the plot.
            x: first and last value of the whole numbers along it.
            y: the ticks up its side, of which the outer ones bound it.
            x_title, y_title: what they are; without `x_title` there are no numbers along it.
        """
        left, top, right, bottom = box
        x_span = (x[1] - x[0]) or 1

        def across(value: float) -> float:
            return left + (right - left) * ((value - x[0]) / x_span if x[1] > x[0] else 0.5)

        def up(value: float) -> float:
            return bottom - (bottom - top) * (value - y[0]) / (y[-1] - y[0])

        for value, label in zip(y, _tick_labels(y)):
            self.rule(left, up(value), right, up(value), self.theme.grid)
            self.text(left - 6, up(value), label, colour=self.theme.muted, align=1)
        inside = [value for value in ticks(*x, whole=True) if x[0] <= value <= x[1]]
        for value, label in zip(inside, _tick_labels(inside)):
            self.rule(across(value), bottom, across(value), bottom + 4, self.theme.muted)
            if x_title:
                self.text(across(value), bottom + 13, label, colour=self.theme.muted, align=0.5)
        self.rule(left, bottom, right, bottom, self.theme.muted)
        self.text((left + right) / 2, bottom + 31, x_title, 13, align=0.5)
        self.text(10, (top + bottom) / 2, y_title, 13, align=0.5, turned=True)
        return across, up

    def png(self) -> bytes:
        """The file, at SHOWN pixels a unit."""
        return _encoded(self.image.reduce(DRAWN // SHOWN), "PNG")


@functools.cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Pillow's own font, which has little beyond English, then what the system has; of one size where Pillow has no FreeType."""
    try:
        fonts = [ImageFont.load_default(size)]
    except ImportError:
        return [ImageFont.load_default()]
    for name in ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc"):
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@functools.cache
def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """The first font that has all letters of the text, None where there is none."""

    def has(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letter: str) -> bool:
        if not isinstance(font, ImageFont.FreeTypeFont):
            return ord(letter) < 256
        return ord(letter) < 128 or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))

    return next((font for font in _fonts(size) if text.isprintable() and all(has(font, letter) for letter in text)), None)


def _text_mask(text: str, size: int) -> Image.Image:
    """Text in white on black, as high as its font at `size` pixels."""
    font = _font_for(text, size)
    scalable = isinstance(font, ImageFont.FreeTypeFont)
    height = sum(font.getmetrics()) if scalable else font.getbbox("Ag")[3]
    mask = Image.new("L", (max(1, math.ceil(font.getbbox(text)[2])), height))
    ImageDraw.Draw(mask).text((0, 0), text, 255, font)
    return mask if scalable else mask.resize((max(1, round(mask.width * 1.2 * size / height)), round(1.2 * size)))


def _class_labels(classes: Classes, width: float) -> list[str]:
    """The classes' names as a chart shows them: shortened to `width`, or as numbers where no font has their letters."""

    def label(number: int, name: str) -> str:
        if _font_for(name, 12 * DRAWN) is None:
            return f"class {number}"
        short = name
        while len(short) > 1 and _text_mask(short, 12 * DRAWN).width > DRAWN * width:
            short = short.removesuffix("...")[:-1].rstrip() + "..."
        return short

    return [label(number, name[:200]) for number, name in enumerate(classes.names)]


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Some `count` round values, 1, 2 or 5 times a power of ten apart, the first at or below `low`, the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span <= count * step * factor * (1 + 1e-9))
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _tick_labels(values: Sequence[float]) -> list[str]:
    step = values[1] - values[0] if len(values) > 1 else 1
    largest = max(map(abs, values), default=0)
    if largest >= 1e10 or step < 1e-5:
        return [f"{value:.3g}" for value in values]
    if largest >= 1e4:
        unit, letter = (1e6, "M") if largest >= 1e6 else (1e3, "k")
        return [f"{value / unit:g}{letter}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def read_records(path: Path) -> tuple[list[dict], list[dict], int]:
    """The records of training and of validation in a metrics.jsonl, and how many of its lines are none.

    Of what was done twice, by a run that went on from an older checkpoint, the second time counts.
    """
    needed = {"train": ("step", "loss", "lr"), "val": ("epoch", "miou", "pixel_accuracy")}
    kept: dict[str, list[dict]] = {"train": [], "val": []}
    broken = 0

    def number(value: object, most: float) -> float | None:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most  # nor is nan
        return value if fine else None

    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            names = needed[record["kind"]]
            place = number(record[names[0]], 1e15)
            values = {name: number(record[name], 1 if record["kind"] == "val" else 1e30) for name in names[1:]}
        except (ValueError, KeyError, TypeError, RecursionError):
            place = None
        if place is None:
            broken += bool(line.strip())  # cut off when the run was
            continue
        records = kept[record["kind"]]
        while records and records[-1][names[0]] >= place:
            records.pop()
        records.append({names[0]: place, **values})
    return kept["train"], kept["val"], broken


def loss_chart(records: list[dict], theme: Theme) -> Chart:
    """The training loss over the steps, as logged and smoothed, and the learning rate below. There is at least one loss."""
    chart = Chart(480, 390, theme)
    steps, losses = np.array([(r["step"], r["loss"]) for r in records if r["loss"] is not None], float).T
    drawn = sorted({*range(0, len(losses), math.ceil(len(losses) / MAX_POINTS)), len(losses) - 1})
    half = len(losses) // 40  # of the window; near the start, where the loss falls, it reaches as far ahead as back
    smooth = [np.median(losses[max(0, i - half) : i + min(half, i) + 1]) for i in drawn]
    # A few outliers would press all else flat; they are drawn on the upper edge.
    scale = ticks(0, min(max(smooth), 4 * np.quantile(losses, 0.9)))
    top, span = 30, (0, records[-1]["step"])
    across, up = chart.axes((58, top, 454, 238), span, scale, y_title="training loss")
    for i in drawn:
        chart.mark(across(steps[i]), max(top, up(losses[i])), theme.mix(theme.first, 0.4), 1.4)
    chart.line([(across(steps[i]), max(top, up(value))) for i, value in zip(drawn, smooth)], theme.first, 2)
    chart.mark(66, 12, theme.mix(theme.first, 0.4), 2)
    chart.text(76, 12, "as logged")
    if half:
        chart.rule(156, 12, 176, 12, theme.first, 2)
        chart.text(184, 12, f"median of {2 * half + 1} records")
    rates = [(r["step"], r["lr"]) for r in records if r["lr"] is not None]
    highest = max((rate for _, rate in rates), default=0) or 1
    across, up = chart.axes((58, 264, 454, 342), span, ticks(0, highest, 3), "step", "learning rate")
    chart.line([(across(step), up(rate)) for step, rate in rates[:: math.ceil(len(rates) / MAX_POINTS) or 1]], theme.second, 2)
    return chart


def validation_chart(records: list[dict], theme: Theme) -> Chart:
    """mIoU and pixel accuracy over the epochs, in per cent. There is at least one record."""
    chart = Chart(480, 390, theme)
    curves = []
    for name, title in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        curves.append((title, [(r["epoch"], 100 * r[name]) for r in records if r[name] is not None]))
    values = [value for _, curve in curves for _, value in curve] or [0, 100]
    scale = ticks(max(0, min(values) - 2), min(100, max(values) + 2))
    span = records[0]["epoch"], records[-1]["epoch"]
    across, up = chart.axes((58, 46, 454, 342), span, scale, "epoch", "mIoU and pixel accuracy, %")
    for row, ((title, curve), colour) in enumerate(zip(curves, (theme.first, theme.second))):
        points = [(across(epoch), up(value)) for epoch, value in curve]
        chart.line(points, colour, 2)
        for x, y in points if len(points) <= 60 else []:
            chart.mark(x, y, colour, 3, square=row == 1)
        chart.rule(60, 11 + 17 * row, 80, 11 + 17 * row, colour, 2)
        chart.mark(70, 11 + 17 * row, colour, 3, square=row == 1)
        if curve:
            best = max(curve, key=lambda point: point[1])
            title += f": last {curve[-1][1]:.2f}, best {best[1]:.2f} in epoch {best[0]:g}"
        chart.text(88, 11 + 17 * row, title)
    return chart


def class_chart(class_iou: dict[str, float | None], miou: float | None, classes: Classes, theme: Theme) -> Chart:
    """A bar for each class, in its colour, as long as its IoU; "-" for one that does not occur."""
    row = 20 if len(class_iou) <= 40 else 14
    left, top, right = 128, 22, 426
    bottom = top + row * len(class_iou)
    chart = Chart(480, bottom + 44, theme)
    for value in range(0, 101, 20):
        x = left + (right - left) * value / 100
        chart.rule(x, top, x, bottom + 4, theme.grid)
        chart.text(x, bottom + 13, str(value), colour=theme.muted, align=0.5)
    if miou is not None:
        x = left + (right - left) * miou
        for y in range(top - 4, bottom, 6):
            chart.rule(x, y, x, min(y + 3, bottom), theme.muted)
        chart.text(x, 9, f"mean {100 * miou:.1f}", align=0.5)
    for i, (value, label) in enumerate(zip(class_iou.values(), _class_labels(classes, left - 16))):
        y, end = top + row * i, left + (right - left) * (value or 0)
        chart.text(left - 8, y + row / 2, label, align=1)
        if value is not None:
            chart.box(left, y + 3, end, y + row - 3, tuple(classes.colours[i]), theme.muted)
        chart.text(end + 6, y + row / 2, "-" if value is None else f"{100 * value:.1f}", on_paper=True)
    chart.rule(left, top, left, bottom, theme.muted)
    chart.text((left + right) / 2, bottom + 31, "IoU, %", 13, align=0.5)
    return chart


def confusion_chart(confusion: Tensor, classes: Classes, theme: Theme) -> Chart:
    """How the pixels of each class of the truth, a row, spread over the predictions, in per cent where there is room.

    confusion: (C, C), or with columns of predictions that are no class behind.
    """
    matrix = confusion.double().numpy()
    totals, count = matrix.sum(1), len(matrix)
    cell = min(34.0, 600 / count)
    names = _class_labels(classes, 102) if cell >= 12 else [str(i) if i % 10 == 0 else "" for i in range(count)]
    margin = 24 + max(_text_mask(name, 12 * DRAWN).width for name in names) / DRAWN + 8
    side = cell * count
    chart = Chart(margin + max(side, 60) + 62, margin + max(side, 110) + 8, theme)
    chart.text(margin + side / 2, 10, "prediction", 13, align=0.5)
    chart.text(10, margin + side / 2, "truth", 13, align=0.5, turned=True)
    for i, name in enumerate(names):
        middle = margin + cell * (i + 0.5)
        chart.text(margin - 6, middle, name, align=1)
        chart.text(middle, margin - 6, name, turned=True)
        for j in range(count) if totals[i] else []:
            share = matrix[i, j] / totals[i]
            x, y = margin + cell * j, margin + cell * i
            chart.box(x, y, x + cell, y + cell, theme.mix(theme.full, share))
            if cell >= 24 and share >= 0.005:
                colour = theme.paper if share > 0.5 else theme.ink
                chart.text(x + cell / 2, y + cell / 2, f"{100 * share:.0f}", colour=colour, align=0.5)
        if not totals[i]:
            chart.text(middle, middle, "-", colour=theme.muted, align=0.5)
    for i in range(count + 1) if cell >= 12 else (0, count):
        chart.rule(margin + cell * i, margin, margin + cell * i, margin + side, theme.grid, 0.5)
        chart.rule(margin, margin + cell * i, margin + side, margin + cell * i, theme.grid, 0.5)
    left, height = margin + max(side, 60) + 14, 100
    for i in range(height):
        chart.box(left, margin + i, left + 10, margin + i + 1, theme.mix(theme.full, 1 - i / (height - 1)))
    for share in (0, 50, 100):
        chart.text(left + 15, margin + height * (1 - share / 100), f"{share}", colour=theme.muted)
    return chart


class WorstImages:
    """Gathers the images of a split with the lowest pixel accuracy, which is what the picture of their errors shows."""

    def __init__(self, dataset: SegmentationDataset, count: int):
        self.dataset, self.count = dataset, count
        self.found: list[tuple] = []  # (pixel accuracy, index, mIoU, image, truth, prediction), the lowest first

    def add(self, index: int, image: Tensor, truth: Tensor, prediction: Tensor, confusion: Tensor) -> None:
        """(H, W, 3) uint8 RGB, two (H, W) uint8 label maps, and their confusion matrix; one without labels does not count."""
        matrix = confusion.cpu().numpy()
        total = int(matrix.sum())
        if not total:
            return
        place = int(np.trace(matrix)) / total, index
        if len(self.found) < self.count or (self.found and place < self.found[-1][:2]):
            # Copies: what a loader's worker sent lies in shared memory, of which there may be little.
            pictures = image.clone(), truth.clone(), prediction.cpu().clone()
            self.found = sorted([*self.found, (*place, _mean(intersection_over_union(matrix)), *pictures)], key=lambda f: f[:2])
            del self.found[self.count :]

    def rows(self, world_size: int = 1) -> list[dict]:
        """The worst of all processes, the worst first: pixel_accuracy, miou, name and pictures {caption: (type, file)}."""
        rows = []
        for accuracy, index, miou, *maps in self.found:
            path = self.dataset.samples[index].image
            pictures = error_pictures(*maps, self.dataset.classes)
            rows.append({"pixel_accuracy": accuracy, "index": index, "miou": miou, "name": str(path), "pictures": pictures})
        rows = gathered(rows, world_size)
        return sorted(rows, key=lambda row: (row["pixel_accuracy"], row["index"]))[: self.count]


def error_pictures(image: Tensor, truth: Tensor, prediction: Tensor, classes: Classes) -> dict[str, tuple[str, bytes]]:
    """{caption: (type, file)} of (H, W, 3) uint8 RGB and its (H, W) label maps, as wide as TILE; JPEG where there is a photograph."""
    photograph = Image.fromarray(image.numpy())
    size = TILE, min(max(1, round(TILE * photograph.height / photograph.width)), 8 * TILE)  # JPEG ends at 65535
    errors = 96 + np.asarray(photograph.convert("L"), np.float32)[..., None].repeat(3, 2) * 0.6
    errors[(truth != prediction).numpy()] = ImageColor.getrgb(LIGHT.second)
    errors[(truth == IGNORE).numpy()] = 0
    how = Image.Resampling.BOX if photograph.width > TILE else Image.Resampling.NEAREST
    maps = {name: colour_map(label.numpy(), classes) for name, label in (("truth", truth), ("prediction", prediction))}
    errors = Image.fromarray(errors.astype(np.uint8)).resize(size, how)
    return {
        "image": ("jpeg", _encoded(photograph.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=85)),
        **{name: ("png", _encoded(picture.resize(size, how), "PNG")) for name, picture in maps.items()},
        "errors": ("jpeg", _encoded(errors, "JPEG", quality=85, subsampling=0)),
    }


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def git_revision() -> str:
    """Commit of this code, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1d21; --muted: #63676e; --grid: #e2e4e8 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e9eaec; --muted: #9da2aa; --grid: #343941 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--grid) }
h3 { font-size: .95rem; font-weight: 600; margin: 1.25rem 0 .25rem }
p, figcaption, small { color: var(--muted) }
p { margin: .25rem 0 .75rem; max-width: 46rem }
img { display: block; max-width: 100%; height: auto }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .87rem; max-width: 46rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; align-items: start }
.wide { overflow-x: auto }
.wide img { max-width: none }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .4rem }
.tiles img { width: 100% }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0 }
.figures b { display: block; font-size: 1.9rem; line-height: 1.2; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .12rem .6rem .12rem 0; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top }
th { font-weight: 600 }
th, td:not(:nth-child(2)) { white-space: nowrap }
td { overflow-wrap: normal }
@media print, (max-width: 30rem) { th, td { padding-right: .4rem; font-size: .8rem } }
th:nth-child(2), td:nth-child(2) { text-align: left }
i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid var(--muted) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .87rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: .5rem 0; font-size: .87rem }
dt { color: var(--muted) }
dd { margin: 0 }
.arguments { columns: 3 17rem; column-gap: 2rem; display: block }
.arguments div { display: flex; gap: .5rem; break-inside: avoid }
.arguments dt { white-space: nowrap }
@media print {
  :root { --paper: #ffffff; --ink: #1b1d21; --muted: #63676e; --grid: #e2e4e8 }
  body { max-width: none; padding: 0; font-size: 12px }
  figure, .row, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .wide img { max-width: 100% }
  .charts { grid-template-columns: 1fr 1fr }
  .tiles { grid-template-columns: repeat(4, 1fr) }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def report_title(data: str, split: str) -> str:
    """Named after the folder: there are other data in the layout of Cityscapes than Cityscapes."""
    return f"Fast-SCNN on {Path(data).resolve().name}, {split}"


def write_report(
    path: str | Path,
    title: str,
    classes: Classes,
    result: dict | None,
    *,
    confusion: Tensor | None = None,
    log: str | Path | None = None,
    worst: Sequence[dict] | None = None,
    facts: dict[str, object] | None = None,
    arguments: dict[str, dict] | None = None,
) -> None:
    """Writes curves, figures, confusion matrix and worst images as one HTML page that needs no other file.

    Args:
        path: the page; its folder is made if need be.
        title: its heading.
        classes: of the dataset.
        result: what `metrics` gives; None leaves the figures and classes out.
        confusion: (C, C) int64, rows are the truth; None leaves that picture out.
        log: metrics.jsonl of the run that trained the network; where there is none, the page says so.
        worst: rows of `WorstImages`; None leaves them out.
        facts: more {name: value} for the head of the page, beside the commit, torch's version and the date.
        arguments: {heading: {name: value}} of the programs that made it.
    """
    text = html.escape

    def data_uri(kind: str, file: bytes) -> str:
        return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"

    def figure(draw: Callable[[Theme], Chart], alt: str, caption: str = "", wide: bool = False) -> str:
        light, dark = draw(LIGHT), draw(DARK)
        return (
            f'<figure{" class=wide" if wide else ""}><picture><source media="screen and (prefers-color-scheme: dark)" '
            f'srcset="{data_uri("png", dark.png())}"><img src="{data_uri("png", light.png())}" width="{light.width}" '
            f'height="{light.height}" alt="{text(alt)}"></picture>{f"<figcaption>{caption}</figcaption>" if caption else ""}</figure>'
        )

    def percent(value: float | None) -> str:
        return _percent(value).strip()

    def swatch(colour: Sequence[int]) -> str:
        return f'<i style="background: rgb({", ".join(map(str, colour))})"></i>'

    training, validation, broken = [], [], 0
    missing = "Training curves are left out: the weights are in no run's folder with logs/metrics.jsonl."
    if log is not None:
        try:
            training, validation, broken = read_records(Path(log))
            missing = f"Training curves are left out: {log} has no records of them."
        except OSError as error:
            missing = f"Training curves are left out: {log}: {(error.strerror or str(error)).lower()}."
    body = [f"<h1>{text(title)}</h1>"]
    if result is not None:
        shown = {"mIoU": result["miou"], "pixel accuracy": result["pixel_accuracy"]}
        shown |= {"iIoU": result["miiou"]} if "miiou" in result else {}
        shown |= {"mIoU of categories": result["category_miou"]} if result.get("category_iou") else {}
        cells = [f"<div><b>{percent(value)} %</b>{name}</div>" for name, value in shown.items()]
        body.append(f'<div class="figures">{"".join(cells)}</div>')
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    lines = {**(facts or {}), "commit": git_revision(), "torch": torch.__version__, "date": now}
    body.append(f"<dl>{''.join(f'<dt>{text(str(k))}</dt><dd>{text(str(v))}</dd>' for k, v in lines.items())}</dl>")

    body.append("<h2>Training</h2>")
    charts = []
    if any(record["loss"] is not None for record in training):
        last = next(r for r in reversed(training) if r["loss"] is not None)
        alt = f"Training loss over steps, {last['loss']:.4f} at step {last['step']}"
        charts.append(figure(functools.partial(loss_chart, training), alt))
    if validation:
        alt = f"mIoU and pixel accuracy over epochs, {percent(validation[-1]['miou'])} % and "
        alt += f"{percent(validation[-1]['pixel_accuracy'])} % in epoch {validation[-1]['epoch']}"
        charts.append(figure(functools.partial(validation_chart, validation), alt))
    notes = [f"From {log}."] if charts else [missing]
    notes += [f"{broken} of its lines are no records and were left out."] if broken else []
    body += [f'<div class="charts">{"".join(charts)}</div>' if charts else "", f"<p>{text(' '.join(notes))}</p>"]

    if result is not None:
        class_iou = {name: result["class_iou"].get(name) for name in classes.names}
        body.append("<h2>Classes</h2>")
        alt = "IoU of each class in per cent, as in the table"
        chart = figure(functools.partial(class_chart, class_iou, result["miou"], classes), alt)
        titles, columns = ["IoU"], [list(class_iou.values())]
        if confusion is not None:
            matrix = confusion.double().numpy()
            count, hits = len(matrix), np.diag(matrix)
            for heading, sums in (("recall", matrix.sum(1)), ("precision", matrix.sum(0)[:count])):
                titles.append(heading)
                columns.append([hit / total if total else None for hit, total in zip(hits, sums)])
            titles.append("pixels")
            columns.append([total / (matrix.sum() or 1) for total in matrix.sum(1)])
        if "class_iiou" in result:
            titles.append("iIoU")
            columns.append([result["class_iiou"].get(name) for name in classes.names])
        rows = [
            f"<tr><td>{i}</td><td>{swatch(colour)}{text(name)}</td>{''.join(f'<td>{percent(v[i])}</td>' for v in columns)}</tr>"
            for i, (name, colour) in enumerate(zip(classes.names, classes.colours))
        ]
        rows.append(f"<tr><th></th><th>mean</th><th>{percent(result['miou'])}</th>{'<th></th>' * (len(columns) - 1)}</tr>")
        head = "".join(f"<th>{title}</th>" for title in titles)
        table = f'<div class="wide"><table><tr><th></th><th>class, in %</th>{head}</tr>{"".join(rows)}</table></div>'
        body.append(f'<div class="charts">{chart}{table}</div>')
        instances = ", one whose iIoU is - has no instances" if "class_iiou" in result else ""
        body.append(
            f"<p>A class whose IoU is - occurs neither in truth nor in prediction{instances}; no mean counts it. "
            "Pixels: share of the labelled ones.</p>"
        )

    body.append("<h2>Confusion matrix</h2>")
    if confusion is None:
        body.append("<p>Left out: python eval.py --report draws it.</p>")
    else:
        caption = "Share of the pixels of each class, a row, that were given to each class, in %; below 0.5 % no number."
        alt = "Confusion matrix, rows are the truth; its diagonal is the recall in the table"
        body.append(figure(functools.partial(confusion_chart, confusion, classes), alt, caption, wide=True))

    if worst:
        body.append("<h2>Worst images</h2>")
        body.append(
            f"<p>The {len(worst)} with the lowest share of labelled pixels that are right (pixel accuracy). In the errors wrong pixels are "
            "orange; what has no label is black, and counts nowhere.</p>"
        )
        legend = [f"<span>{swatch(colour)}{text(name)}</span>" for name, colour in zip(classes.names, classes.colours)]
        body.append(f'<div class="legend">{"".join(legend)}</div>')
        for row in worst:
            tiles = [
                f'<figure><img src="{data_uri(*picture)}" alt="{caption} of {text(Path(row["name"]).name)}">'
                f"<figcaption>{caption}</figcaption></figure>"
                for caption, picture in row["pictures"].items()
            ]
            figures = f"pixel accuracy {percent(row['pixel_accuracy'])} %, mIoU {percent(row['miou'])} %"
            body.append(
                f'<div class="row"><h3>{text(row["name"])}</h3><small>{figures}</small><div class="tiles">{"".join(tiles)}</div></div>'
            )

    for heading, values in (arguments or {}).items():
        pairs = [
            f"<div><dt>{text(str(name))}</dt><dd>{text(' '.join(map(str, value)) if isinstance(value, list | tuple) else str(value))}</dd></div>"
            for name, value in values.items()
        ]
        body.append(f'<h2>{text(heading)}</h2><dl class="arguments">{"".join(pairs)}</dl>')
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may be no text


# ------------------------------------------------------------------------------------------------------------- the modes


def run_evaluation(args: argparse.Namespace) -> dict:
    """Evaluates --weights on a labelled split."""
    averaged = args.scales != [1.0] or args.flip or args.window
    if args.compare and averaged:
        raise UsageError("--compare is of one scale; leave out --scales, --flip and --window")
    if args.report and Path(args.report).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {args.report} has the suffix {Path(args.report).suffix!r}, expected .html")
    checkpoint = read_checkpoint(args.weights)
    args.dataset = args.dataset or dataset_of(checkpoint)
    args.data = args.data or f"datasets/{args.dataset}"
    if args.submit and args.dataset != "cityscapes":
        raise UsageError(f"--submit writes Cityscapes' label ids, which {args.dataset} does not have")
    dataset = open_dataset(args.dataset, args.data, args.split)
    classes = dataset.classes
    model = build_from_checkpoint(checkpoint, args.weights, num_classes=len(classes.names))
    names = checkpoint.get("classes", {}).get("names", list(classes.names))
    differing = [f"{was} (here {now})" for was, now in zip(names, classes.names) if was != now]
    if differing:
        raise CheckpointError(
            f"{args.weights}: has other classes, such as {differing[0]}; choose the dataset it was trained on"
        )
    device, rank, world_size = start_processes(args.device)
    if averaged:
        segment = averaging(model, device, args.scales, args.flip, AMP_DTYPES.get(args.amp or "off"), args.window)
    else:
        segment = accelerate(model, device=device, precision=PRECISIONS[args.amp or "off"], mean=MEAN, std=STD)
    over = functools.partial(evaluate, dataset=dataset, device=device, workers=args.workers, rank=rank, world_size=world_size)
    sheet = ContactSheet(classes, args.sheet_rows) if args.sheet and rank == 0 else None
    instances = InstanceScores() if all(sample.instances for sample in dataset.samples) else None
    submit = functools.partial(write_submission, dataset, Path(args.submit)) if args.submit else None
    worst = WorstImages(dataset, args.report_images) if args.report else None
    if args.report and rank == 0:
        Path(args.report).parent.mkdir(parents=True, exist_ok=True)  # rather now than after the evaluation
    confusion = over(segment, sheet=sheet, instances=instances, each=submit, worst=worst)
    result = metrics(confusion, classes)
    if instances is not None:
        result |= instances.metrics(confusion)
    if args.compare:
        exact = accelerate(model, device=device, precision=torch.float32, mean=MEAN, std=STD)
        agreement = []  # of each image, share of the pixels with the same label

        def compared(images: Tensor) -> Tensor:
            labels = exact(images)
            agreement.append((labels == segment(images)).float().mean().item())
            return labels

        result["miou_fp32"] = metrics(over(compared), classes)["miou"]
        agreement = gathered(agreement, world_size)
        result["agreement"] = {"mean": statistics.mean(agreement), "min": min(agreement)}
    if rank == 0:
        print(format_table(result))
        if args.compare:
            difference = 100 * ((result["miou"] or 0) - (result["miou_fp32"] or 0))
            print(f"{segment.precision}: {difference:+.3f} points of mIoU to fp32", end="; ")
            print("labels agree in {mean:.3%} of the pixels, at least {min:.3%} of an image".format(**result["agreement"]))
        if sheet is not None:
            sheet.save(args.sheet)
            print(f"wrote {args.sheet}")
    if worst is not None:
        rows = worst.rows(world_size)
        if rank == 0:
            report_evaluation(args, checkpoint, dataset, result, confusion, rows, device, world_size)
            print(f"wrote {args.report}")
    protocol = {"scales": args.scales, "flip": args.flip, "window": args.window}
    return {"dataset": args.dataset, "split": args.split, "images": len(dataset), **protocol, **result}


def dataset_of(checkpoint: dict) -> str:
    """The dataset that has a checkpoint's classes; Cityscapes where it names none, as other projects' files do."""
    names = checkpoint.get("classes", {}).get("names")
    known = {"cityscapes": CITYSCAPES, "camvid": CAMVID}
    return next((name for name, classes in known.items() if names in (None, list(classes.names))), "folder")


def report_evaluation(
    args: argparse.Namespace, checkpoint: dict, dataset: SegmentationDataset, result: dict, confusion: Tensor,
    worst: Sequence[dict], device: torch.device, world_size: int,
) -> None:  # fmt: skip
    """Writes --report, with the curves of the run whose folder the weights lie in."""
    folder = Path(args.weights).resolve().parent
    how = [f"scale {scale:g}" for scale in args.scales] + ["mirrored too"] * args.flip
    how += [f"windows of {args.window[0]}x{args.window[1]}"] if args.window else []
    arguments = {"Arguments of eval.py": vars(args)}
    if isinstance(checkpoint.get("args"), dict):
        arguments["Arguments of train.py"] = checkpoint["args"]
    write_report(
        args.report,
        report_title(args.data, args.split),
        dataset.classes,
        result,
        confusion=confusion,
        log=folder.parent / "logs" / "metrics.jsonl" if folder.name == "checkpoints" else None,
        worst=worst,
        facts={
            "weights": args.weights + (f", epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""),
            "data": f"{args.data}, {args.dataset} {args.split}, {len(dataset)} images",
            "protocol": ", ".join(how),
            "device": f"{name_of(device)}, precision {args.amp or 'float32'}, {world_size} {'process' if world_size == 1 else 'processes'}",
        },
        arguments=arguments,
    )


def latency_ms(segment: Callable[[Tensor], Tensor], images: Tensor, warmup: int, repeats: int) -> dict[str, float]:
    """Median, 95th percentile and minimum of the time from images in memory to labels in memory, in milliseconds."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        segment(images).cpu()  # the copy back waits for the device
        times.append(1000 * (time.perf_counter() - start))
    times = sorted(times[warmup:])
    figures = {"median": statistics.median(times), "p95": times[math.ceil(0.95 * (len(times) - 1))], "min": times[0]}
    return {name: round(value, 3) for name, value in figures.items()}


def run_benchmark(args: argparse.Namespace) -> dict:
    """Latency from an RGB uint8 image in memory to a uint8 label map in memory, warm-up apart."""
    sizes = [args.size] if args.size else PAPER_SIZES
    model = (
        build_from_checkpoint(read_checkpoint(args.weights), args.weights) if args.weights else FastSCNN(variant=args.variant)
    )
    device, rank, _ = start_processes(args.device)
    segment = accelerate(model, device=device, precision=PRECISIONS[args.amp or "auto"], mean=MEAN, std=STD)
    segments = {"": segment, **{name: RUNTIMES[name](model, device) for name in args.against}}
    results = []
    for height, width in sizes:
        result = {
            "device": name_of(device),
            "precision": segment.precision,
            "size": [height, width],
            "batch_size": args.batch_size,
        }
        with _out_of_memory_named(f"{args.batch_size} images of {height}x{width}"):
            images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (args.batch_size, height, width, 3), np.uint8))
            figures = {name: latency_ms(runtime, images, args.warmup, args.repeats) for name, runtime in segments.items()}
            if args.stages:
                result["stages_ms"] = segment.stages_ms(images)
        result["latency_ms"] = figures.pop("")
        result["fps"] = round(1000 * args.batch_size / result["latency_ms"]["median"], 3)
        result["params"] = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("aux_"))
        if figures:
            result["against"] = figures
        if rank == 0:
            for name, each in {segment.precision: result["latency_ms"], **figures}.items():
                fps = 1000 * args.batch_size / each["median"]
                print(f"{height}x{width}, batch {args.batch_size}, {name}: {each['median']:.1f} ms, {fps:.1f} fps", flush=True)
            for stage, ms in result.get("stages_ms", {}).items():
                print(f"    {stage} {ms:.2f} ms")
        results.append(result)
    return {**results[0], "sizes": results} if len(results) > 1 else results[0]


@contextlib.contextmanager
def _out_of_memory_named(what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of numpy; of torch, on the CPU without a class of its own
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise UsageError(f"{what} do not fit in memory; lower --batch-size or --size") from None
        raise


# ------------------------------------------------------------------------------------------------------------- prediction

STYLES = ("overlay", "colour", "labels")
VIDEO_SUFFIXES = tuple(".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .y4m".split())
AUDIO_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "alac", "opus"}  # copied as it is; other audio becomes AAC
KR_KB = {"bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}  # shares of red and blue in Y; others have BT.601's
MOST_THREADS = 8  # that segment a picture or a frame each; more would but fill the memory


class Painter:
    """Shows label maps in one of STYLES.

    Args:
        classes: their names and colours.
        style: "overlay", "colour", or "labels" for the train ids themselves.
        strength: of an overlay's colours, in [0, 1].
        legend: name the colours below the picture.
    """

    def __init__(self, classes: Classes, style: str = "overlay", strength: float = 0.55, legend: bool = False):
        self.classes, self.style, self.strength, self.legend = classes, style, strength, legend

    def picture(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        """An RGB image and its (H, W) uint8 train ids -> RGB, or train ids as an image of mode L; the legend is of what occurs."""
        if self.style == "labels":
            return Image.fromarray(label)
        overlaid = self.style == "overlay"
        picture = overlay(image, label, self.classes, self.strength) if overlaid else colour_map(label, self.classes)
        if not self.legend:
            return picture
        strip = legend(self.classes, picture.width, np.flatnonzero(np.bincount(label.ravel(), minlength=256)))
        whole = Image.new("RGB", (picture.width, picture.height + strip.height))
        whole.paste(picture)
        whole.paste(strip, (0, picture.height))
        return whole


def legend(classes: Classes, width: int, which: Sequence[int]) -> Image.Image:
    """A strip `width` wide that names the colours of the classes `which`; its height is even, as video wants it."""
    size = min(max(12, width // 80), 40)  # of the letters, in pixels
    line, places, x, row = 2 * size, [], 0, 0
    for index in which:
        if index < len(classes.names):
            font, name = _font_for(classes.names[index], size), classes.names[index]
            font, name = (font, name) if font else (_fonts(size)[0], f"class {index}")  # no font has its letters
            length = line + math.ceil(font.getbbox(name)[2]) + size
            if x and x + length > width:
                x, row = 0, row + 1
            places.append((x, row * line, index, font, name))
            x += length
    strip = Image.new("RGB", (width, (row + 1) * line), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, index, font, name in places:
        draw.rectangle(
            (x + size // 2, y + size // 2, x + 3 * size // 2, y + 3 * size // 2), tuple(classes.colours[index]), "black"
        )
        draw.text((x + line, y + line // 2), name, "black", font, "lm")
    return strip


@dataclass
class Slot:
    """Memory for a frame on its way, used again for later ones: as read, and as it is written."""

    given: np.ndarray
    result: np.ndarray


def in_order(
    read: Callable[[Slot], bool],
    work: Callable[[Slot], None],
    write: Callable[[Slot], None],
    slots: Sequence[Slot],
    threads: int,
) -> None:
    """Reads in a thread, works in `threads` more, and writes in this one, in the order of reading, as soon as a frame is done.

    No more frames are under way than there are slots. `read` says whether there was a frame; what it raises is raised after
    the frames before are written.
    """
    free, begun = queue.SimpleQueue(), queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    with ThreadPoolExecutor(threads, "segment") as pool:

        def reading() -> None:
            try:
                while (slot := free.get()) is not None and read(slot):
                    begun.put((slot, pool.submit(work, slot)))
                begun.put((None, None))
            except Exception as error:
                begun.put((None, error))

        # A daemon: after an error here it may wait for input that never comes.
        threading.Thread(target=reading, name="read", daemon=True).start()
        try:
            while (slot := (item := begun.get())[0]) is not None:
                item[1].result()
                write(slot)
                free.put(slot)
        finally:
            free.put(None)
            pool.shutdown(cancel_futures=True)
    if item[1] is not None:
        raise item[1]


def fill(file: io.RawIOBase, memory: np.ndarray) -> int:
    """Reads until `memory` is full or the file ends; the number of bytes read."""
    view, count = memoryview(memory).cast("B"), 0
    while count < len(view) and (got := file.readinto(view[count:])):
        count += got
    return count


def write_all(file: io.RawIOBase, memory: np.ndarray) -> None:
    """Writes all of it."""
    view = memoryview(memory).cast("B")
    while len(view):
        view = view[file.write(view) :]


def _widen(pipe: io.RawIOBase) -> None:
    """Lets a pipe hold 1 MiB, where the system has that: fewer changes between the processes."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)


def segment_raw(
    segment: Callable[[Tensor], Tensor], size: Sequence[int], painter: Painter, out: io.RawIOBase, threads: int
) -> int:
    """Raw RGB frames of (height, width) from stdin to `out`, RGB or, as labels, a byte a pixel; the number of frames.

    Each is written as soon as it is done, so that who waits for a frame before the next is sent gets it.
    """
    source, count = open(0, "rb", buffering=0, closefd=False), 0
    for pipe in (source, out):
        _widen(pipe)
    slots = [Slot(np.empty((*size, 3), np.uint8), np.empty(0, np.uint8)) for _ in range(threads + 2)]

    def read(slot: Slot) -> bool:
        got = fill(source, slot.given)
        if 0 < got < slot.given.size:
            raise DataError(f"stdin ended within a frame, after {got} of {slot.given.size} bytes; is --size right?")
        return got > 0

    def work(slot: Slot) -> None:
        label = segment(torch.from_numpy(slot.given)[None])[0].cpu().numpy()
        image = Image.frombuffer("RGB", (size[1], size[0]), slot.given, "raw", "RGB", 0, 1)
        slot.result = np.asarray(painter.picture(image, label))

    def write(slot: Slot) -> None:
        nonlocal count
        try:
            write_all(out, slot.result)
        except BrokenPipeError:
            raise OSError(f"--out -: who read the frames went away after {count} of them") from None
        count += 1

    in_order(read, work, write, slots, threads)
    return count


# Video: ffmpeg decodes to YUV 4:2:0 in a pipe, and encodes what comes from another. What is laid over a frame is laid over
# its Y, U and V, at half the bytes of RGB and without a conversion back; RGB is for the network alone.


class Ffmpeg:
    """The program ffmpeg at work on one end of a pipe. `close` ends it, whatever it does."""

    def __init__(self, *arguments: str, **pipes: int):
        self.log = tempfile.TemporaryFile()
        threads = ("-threads", str(max(1, (os.cpu_count() or 1) // 2)))  # the network works beside it
        command = [
            _program("ffmpeg"), "-hide_banner", "-nostdin", "-v", "error", *threads, *arguments[:-1], *threads, arguments[-1]
        ]  # fmt: skip
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it: it would make a whole file of
        # what it has.
        self.process = subprocess.Popen(command, stderr=self.log, bufsize=0, start_new_session=True, **pipes)
        self.pipe = self.process.stdout or self.process.stdin
        _widen(self.pipe)

    def said(self) -> str:
        """Waits for its end. All that it complained about."""
        self.process.wait()
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def complaint(self) -> str:
        """Waits for its end. What it complained about, in one line; empty if about nothing."""
        lines = [line for line in self.said().splitlines() if line.strip()]
        status = self.process.returncode
        if status < 0:
            lines.append(f"ffmpeg was ended by signal {-status}")
        elif status > 0 and not lines:
            lines.append(f"ffmpeg ended with status {status}")
        # The first names the cause, as in "[mov,mp4,... @ 0x55d0] moov atom not found"; the addresses say nothing.
        return re.sub(r"\[[^][]* @ 0x\w+\] *", "", lines[0] if status >= 0 else lines[-1]) if lines else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UsageError(
            f"video needs the program {name} on PATH: apt install ffmpeg, brew install ffmpeg, or https://ffmpeg.org"
        )
    return path


def _local(path: Path) -> tuple[str, ...]:
    """A file as ffmpeg's input. Nothing in its name or within it is taken for an option, a protocol, or something to fetch."""
    return "-protocol_whitelist", "file,pipe", "-i", f"file:{path.absolute()}"


@functools.cache
def _listed(what: str) -> str:
    """ffmpeg's list of its "encoders" or "codecs"."""
    command = [_program("ffmpeg"), "-v", "error", f"-{what}"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def probe(path: Path) -> dict:
    """What ffprobe says of a video: rates, duration, colours; "delay" of the first frame in s, "audio", its streams.

    Empty without ffprobe.
    """
    if shutil.which("ffprobe") is None:
        return {}

    def ask(*entries: str) -> str:
        command = ["ffprobe", "-v", "quiet", *_local(path), "-show_entries", *entries]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL).stdout

    wanted = "stream=codec_type,codec_name,sample_rate,r_frame_rate,avg_frame_rate,start_time,duration,nb_frames,field_order,"
    wanted += "height,pix_fmt,color_space,color_primaries,color_transfer:"
    wanted += "stream_disposition=attached_pic:format=start_time,duration"
    try:
        facts = json.loads(ask(wanted, "-of", "json"))
    except ValueError:
        return {}
    streams, whole = facts.get("streams", []), facts.get("format", {})
    of_video = [s for s in streams if s.get("codec_type") == "video" and not s.get("disposition", {}).get("attached_pic")]
    video = of_video[0] if of_video else {}
    interlaced = video.get("field_order", "unknown") not in ("progressive", "unknown")  # a packet may then be half a frame
    if video and "nb_frames" not in video and not interlaced:
        # The average rate is then but what the container promises, or that of the first seconds. A time that occurs twice is of
        # a packet without a frame (VP8 has such); a step back, or of more than 10 s, is a break, as ffmpeg takes it.
        listing = ask("packet=dts_time", "-select_streams", "V:0", "-of", "csv=p=0")
        times = [float(time) for time in re.findall(r"^-?\d+\.\d+", listing, re.MULTILINE)]
        steps = [after - before for before, after in pairwise(times) if 0 < after - before < 10]
        if steps:
            video["avg_frame_rate"] = str(Fraction(len(steps) / sum(steps)).limit_denominator(1000))
    delay = (_number_in(video.get("start_time")) or 0) - (_number_in(whole.get("start_time")) or 0)
    audio = [s for s in streams if s.get("codec_type") == "audio"]
    return {**whole, **video, "delay": float(delay), "audio": audio}


def _number_in(text: str | None) -> Fraction | None:
    """A number other than 0 that ffprobe gives, if it does; a rate is a fraction."""
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
        return Fraction(text) or None


class VideoFrames:
    """A video's frames as planes of Y, U and V at a constant rate, upright, in the form of YUV4MPEG2.

    Attributes: height, width, rate (frames a second), header (the fields of YUV4MPEG2), total (number of frames, about, or
    None), full_range, tags (the colours', as ffmpeg's setparams takes them).

    Raises:
        DataError: ffmpeg finds no video in the file, or it is too small for the network.
        UsageError: there is no ffmpeg.
    """

    START = b"FRAME\n"

    def __init__(self, path: Path):
        self.path, self.facts = path, probe(path)
        nominal, average, seconds, count = (
            _number_in(self.facts.get(key)) for key in ("r_frame_rate", "avg_frame_rate", "duration", "nb_frames")
        )
        # Every frame once, unless they come at irregular times, so that in the end they would be off by more than a tenth of a
        # second. Such are put to a constant rate by leaving out or repeating some, to their average one: ffmpeg would take the
        # nominal rate, which of a phone's or a screen's video may be a hundred times too high.
        irregular = not (nominal and average) or abs(average / nominal - 1) * (seconds or 10) > 0.1
        given, made = () if irregular else ("-r", str(nominal)), ("-r", str(average)) if irregular and average else ()
        self.delay = 0 if irregular else max(0, self.facts.get("delay", 0))  # of the first frame, in seconds
        names = {"colorspace": "color_space", "color_primaries": "color_primaries", "color_trc": "color_transfer"}
        tags = {name: self.facts.get(key, "unknown") for name, key in names.items()}
        self.tags = {name: tag for name, tag in tags.items() if tag not in ("unknown", "reserved", "gbr")}
        if re.search("rgb|bgr|gbr|pal8", self.facts.get("pix_fmt", "")):
            # RGB has no matrix: ffmpeg would make YUV of it with BT.601's at any size, and players read that of its size.
            self.tags["colorspace"] = "bt709" if self.facts.get("height", 0) >= 720 else "smpte170m"
            made += ("-vf", f"scale=out_color_matrix={self.tags['colorspace']}:out_range=tv")
        self.ffmpeg = Ffmpeg(
            *given, *_local(path), "-map", "0:V:0", *made, "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "pipe:1",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            head = self.ffmpeg.pipe.readline(1000).decode(errors="replace").split()
            if head[:1] != ["YUV4MPEG2"]:
                raise DataError(f"{path}: no video that ffmpeg can decode ({self.ffmpeg.complaint() or 'it holds no frames'})")
            self.header = head[1:]
            fields = {field[0]: field[1:] for field in reversed(self.header)}
            self.width, self.height, self.rate = int(fields["W"]), int(fields["H"]), Fraction(fields["F"].replace(":", "/"))
            if min(self.height, self.width) < MIN_SIZE:
                size, least = f"{self.width}x{self.height}", f"{MIN_SIZE}x{MIN_SIZE}"
                raise DataError(f"{path}: {size} pixels, expected at least {least}; enlarge it")
        except BaseException:
            self.close()
            raise
        self.full_range = "XCOLORRANGE=FULL" in self.header
        counts = [seconds and seconds * self.rate, None if irregular else count]  # an edit list may hide some
        self.total = round(min(filter(None, counts))) if any(counts) else None

    def read(self, memory: np.ndarray) -> bool:
        """The next frame, START and planes, if there is one whole."""
        return fill(self.ffmpeg.pipe, memory) == len(memory) and memory[: len(self.START)].tobytes() == self.START

    def close(self) -> None:
        self.ffmpeg.close()


class VideoFile:
    """A video under way: frames as YUV4MPEG2 go in; under a name of its own until `finish`, so that half a file looks like one.

    Raises:
        OSError: no file can be written there.
        DataError: ffmpeg cannot write this one.
    """

    def __init__(self, target: Path, source: VideoFrames, size: tuple[int, int], style: str, preset: str):
        self.source, self.target, self.partial = source.path, target, target.with_name(f"{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        if style == "labels":
            arguments = ("-c:v", "ffv1", "-pix_fmt", "gray", "-f", "matroska")
        else:
            codec = ("-c:v", "libx264", "-preset", preset, "-crf", "23")
            if " libx264 " not in _listed("encoders"):
                codec = ("-c:v", "mpeg4", "-q:v", "3")
            tags = ":".join(f"{name}={tag}" for name, tag in source.tags.items())
            arguments = (
                *_local(source.path), "-map", "0:v", *self.sound(source), *(("-vf", f"setparams={tags}") if tags else ()),
                *codec, "-pix_fmt", "yuv420p", "-f", "mp4",
            )  # fmt: skip
        self.ffmpeg = Ffmpeg(
            "-y", "-itsoffset", f"{source.delay:.6f}", "-f", "yuv4mpegpipe", "-i", "pipe:0", *arguments,
            f"file:{self.partial.absolute()}", stdin=subprocess.PIPE,
        )  # fmt: skip
        fields = [field for field in source.header if field[0] not in "WH" and (style != "labels" or field[0] not in "CX")]
        fields = [f"W{size[1]}", f"H{size[0]}", *fields, *(["Cmono"] if style == "labels" else [])]
        try:
            self.write(np.frombuffer(" ".join(["YUV4MPEG2", *fields]).encode() + b"\n", np.uint8))
        except BaseException:
            self.close()
            raise

    @staticmethod
    def sound(source: VideoFrames) -> list[str]:
        """The options by which ffmpeg takes over what is heard, of its input 1: as it is where MP4 can hold that, else as AAC."""
        streams = source.facts.get("audio")
        if streams is None:
            return ["-map", "1:a?", "-c:a", "aac"]
        options, taken = [], 0
        for index, stream in enumerate(streams):
            codec = stream.get("codec_name", "unknown")
            if not re.search(rf"^ D\S+ {re.escape(codec)} ", _listed("codecs"), re.MULTILINE):
                tqdm.write(f"eval.py: {source.path}: its sound is left out: codec {codec}, which ffmpeg lacks", file=sys.stderr)
                continue
            fits = codec in AUDIO_IN_MP4 and (codec != "mp3" or int(stream.get("sample_rate", 0)) >= 16000)
            options += ["-map", f"1:a:{index}", f"-c:a:{taken}", "copy" if fits else "aac"]
            taken += 1
        return options

    def refusal(self) -> Exception:
        """What to raise when ffmpeg has given up: OSError where no file can be written, DataError where this one cannot."""
        message, said = f"{self.target}: cannot be written ({self.ffmpeg.complaint()})", self.ffmpeg.said()
        if any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)):
            return OSError(message)
        return DataError(f"{message}; leave {self.source} out, or convert it")

    def write(self, memory: np.ndarray) -> None:
        """START and planes of a frame."""
        try:
            write_all(self.ffmpeg.pipe, memory)
        except BrokenPipeError:
            raise self.refusal() from None

    def finish(self, target: Path) -> None:
        """Gives the file, with all frames in it, its name."""
        self.ffmpeg.pipe.close()
        if "rror writing" in self.ffmpeg.complaint() or self.ffmpeg.process.returncode:
            raise self.refusal()
        os.replace(self.partial, target)

    def close(self) -> None:
        self.ffmpeg.close()
        self.partial.unlink(missing_ok=True)


class VideoPainter:
    """Shows label maps of a video's frames as `Painter` does, in planes of Y, U and V, whose sides are made even."""

    def __init__(self, painter: Painter, source: VideoFrames):
        self.height, self.width, self.labels = source.height, source.width, painter.style == "labels"
        # Untagged video has the matrix of its size, as players take it.
        self.space = source.tags.get("colorspace", "bt709" if source.height >= 720 else "bt601")
        self.full_range, self.mine = source.full_range, threading.local()
        even = source.height + source.height % 2, source.width + source.width % 2
        colours = self.to_yuv(painter.classes.palette()[None])[0]  # (256, 3)
        self.keep = round(256 * (1 - painter.strength)) if painter.style == "overlay" else 0
        colours = (colours * (256 - self.keep) >> 8).astype(np.uint8)
        self.tables = torch.from_numpy(colours).t().contiguous()  # (3, 256)
        self.even = [even, *[(even[0] // 2, even[1] // 2)] * 2]  # sizes of the planes, without the legend
        self.legend = None
        if painter.legend and not self.labels:
            strip = np.asarray(legend(painter.classes, even[1], range(len(painter.classes.names))))
            self.legend = self.to_yuv(strip).astype(np.uint8)
        self.size = (
            (source.height, source.width)
            if self.labels
            else (even[0] + (0 if self.legend is None else len(self.legend)), even[1])
        )
        self.in_place = self.size == (source.height, source.width) and not self.labels

    def to_yuv(self, rgb: np.ndarray) -> np.ndarray:
        """(..., 3) uint8 RGB -> (..., 3) int Y, U, V, in the video's own colours."""
        kr, kb = KR_KB.get(self.space, (0.299, 0.114))
        red, green, blue = np.moveaxis(rgb / 255, -1, 0)
        y = kr * red + (1 - kr - kb) * green + kb * blue
        u, v = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
        black, light, colour = (0, 255, 255) if self.full_range else (16, 219, 224)
        return np.stack([black + light * y, 128 + colour * u, 128 + colour * v], -1).round().astype(int).clip(0, 255)

    def slot(self) -> Slot:
        """Memory for a frame."""
        given = self.memory(self.height, self.width)
        if self.labels:
            result = np.empty(len(VideoFrames.START) + self.height * self.width, np.uint8)
        else:
            result = given if self.in_place else self.memory(*self.size)
        result[: len(VideoFrames.START)] = np.frombuffer(VideoFrames.START, np.uint8)
        if self.legend is not None:
            for i, plane in enumerate(self.planes(result, *self.size)):
                part = self.legend[:, :, i] if i == 0 else self.legend[::2, ::2, i]
                plane[-len(part) :] = part
        return Slot(given, result)

    @staticmethod
    def memory(height: int, width: int) -> np.ndarray:
        return np.empty(len(VideoFrames.START) + height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2), np.uint8)

    @staticmethod
    def planes(memory: np.ndarray, height: int, width: int) -> list[np.ndarray]:
        """Views of Y (H, W), U and V (ceil(H/2), ceil(W/2))."""
        h, w, start = (height + 1) // 2, (width + 1) // 2, len(VideoFrames.START) + height * width
        y = memory[len(VideoFrames.START) : start].reshape(height, width)
        return [y, *memory[start:].reshape(2, h, w)]

    def to_rgb(self, slot: Slot) -> Tensor:
        """(1, H, W, 3) uint8 RGB of a frame, in memory that the thread's next frame takes too."""
        kr, kb = KR_KB.get(self.space, (0.299, 0.114))
        if not hasattr(self.mine, "rgb"):
            self.mine.rgb = torch.empty((self.height, self.width, 3), dtype=torch.uint8)
        planes = torch.from_numpy(slot.given[len(VideoFrames.START) :])
        return yuv420_to_rgb(planes, self.mine.rgb, kr, kb, self.full_range)[None]

    def paint(self, slot: Slot, label: np.ndarray) -> None:
        """Fills a slot's result from its frame and (H, W) train ids."""
        if self.labels:
            slot.result[len(VideoFrames.START) :] = label.ravel()
            return
        labels = torch.from_numpy(label)
        planes = zip(self.planes(slot.given, self.height, self.width), self.planes(slot.result, *self.size), self.even)
        for i, (plane, result, (height, width)) in enumerate(planes):
            out = torch.from_numpy(result[:height, :width])
            overlay_plane(torch.from_numpy(plane), labels, self.tables[i], self.keep, out, step=2 if i else 1)


def segment_video(
    path: Path,
    target: Path,
    segment: Callable[[Tensor], Tensor],
    painter: Painter,
    preset: str,
    threads: int,
    progress: bool = True,
) -> tuple[int, float]:
    """Segments a video; (frames, seconds).

    Raises:
        DataError: it is none, or it is damaged; what could be decoded is then in NAME.partial.mp4.
        OSError: the result cannot be written.
    """
    with contextlib.closing(VideoFrames(path)) as source:
        in_yuv = VideoPainter(painter, source)
        with (
            contextlib.closing(VideoFile(target, source, in_yuv.size, painter.style, preset)) as sink,
            tqdm(total=source.total, desc=path.name, unit="frame", leave=False, disable=None if progress else True) as bar,
        ):

            def work(slot: Slot) -> None:
                in_yuv.paint(slot, segment(in_yuv.to_rgb(slot))[0].cpu().numpy())

            def write(slot: Slot) -> None:
                nonlocal frames
                sink.write(slot.result)
                frames += 1
                bar.update()

            frames, start = 0, time.perf_counter()
            slots = [in_yuv.slot() for _ in range(threads + 2)]
            in_order(lambda slot: source.read(slot.given), work, write, slots, threads)
            complaint = source.ffmpeg.complaint()
            # A quarter of a second may be missing at any length: AVI counts empty packets beside the end of its sound.
            least = 0.9 * source.total - source.rate / 4 if source.total and "nb_frames" in source.facts else 0
            if not complaint and frames < least:
                complaint = "it ends early"
            if not frames:
                raise DataError(f"{path}: no frame of it can be decoded ({complaint or 'it holds none'}); replace the file")
            if complaint:
                target = target.with_name(f"{target.stem}.partial{target.suffix}")
            sink.finish(target)
            seconds = time.perf_counter() - start
    if complaint:
        of = f" of about {source.total}" if source.total else ""
        raise DataError(f"{path}: damaged ({complaint}); {target} holds what could be decoded, {frames}{of} frames")
    return frames, seconds


def segment_picture(path: Path, target: Path, segment: Callable[[Tensor], Tensor], painter: Painter) -> None:
    """Segments a picture. Raises DataError where it cannot be read or is too small."""
    image = read_image(path)
    if min(image.size) < MIN_SIZE:
        raise DataError(f"{path}: {image.width}x{image.height} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}; enlarge it")
    label = segment(torch.from_numpy(np.array(image))[None])[0].cpu().numpy()  # (H, W)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")  # half a file must not look whole
    try:
        painter.picture(image, label).save(partial, "PNG", compress_level=1)  # a quarter of the time, a tenth more bytes
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_video(path: Path) -> bool:
    """By its suffix; without one that is known, what is no picture."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix in Image.registered_extensions():
        return suffix in VIDEO_SUFFIXES
    try:
        Image.open(path).close()
        return False
    except Exception:  # whatever Pillow says to what it does not know
        return True


def find_pictures(source: Path, out: Path, style: str) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Pictures and videos at or below `source`, each with the file below `out` that it becomes."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such picture, video or folder; give one to --predict")
    paths, root = [source], source.parent
    if source.is_dir():
        results = out.resolve()  # of an earlier run: no pictures to segment
        paths = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and p.is_file()]
        paths, root = [p for p in paths if results == source.resolve() or results not in p.resolve().parents], source
    elif not source.is_file():
        raise UsageError(f"--predict {source} is no regular file and no folder; --predict - takes raw frames from a pipe")
    if not paths:
        supported = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise DataError(f"{source}: no pictures in this folder, and no videos; supported are {supported}")
    # Below DIR as it lies below the folder; a picture's suffix is kept, so that a.jpg and a.png stay apart.
    pictures, videos, names = {}, {}, set()
    for path in paths:
        folder = out / path.parent.relative_to(root)
        if not is_video(path):
            pictures[path] = folder / f"{path.name}_{style}.png"
            continue
        suffix = ".mkv" if style == "labels" else ".mp4"
        target = folder / f"{path.stem}_{style}{suffix}"
        if target in names:
            target = folder / f"{path.name}_{style}{suffix}"
        names.add(target)
        videos[path] = target
    return pictures, videos


@contextlib.contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Makes a DataError that names the file of what keeps but this one from being segmented."""
    try:
        yield
    except UsageError as error:  # there is no ffmpeg
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise DataError(f"{path}: the name of what it becomes is too long; shorten its own") from None


def run_prediction(args: argparse.Namespace) -> dict:
    """Segments --predict, a picture, a video, or all of a folder, into --out; or raw frames from stdin to stdout."""
    raw = args.predict == "-"
    if raw != (args.out == "-"):
        raise UsageError("--predict - and --out - go together: raw frames from stdin to stdout; ffmpeg turns files into such")
    if raw and (not args.size or min(args.size) < MIN_SIZE):
        raise UsageError(f"--predict - needs the frames' --size H W in pixels, of at least {MIN_SIZE} each")
    if raw and args.legend:
        raise UsageError("--legend makes pictures higher, which raw frames cannot be; leave it out")
    if args.legend and args.style == "labels":
        raise UsageError("--legend names colours, which --style labels does not have; leave it out")
    if args.scales != [1.0] or args.flip or args.window:
        raise UsageError("--predict is of one scale; leave out --scales, --flip and --window")
    out = Path(args.out)
    if out.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and not out.is_dir():
        raise UsageError(f"--out {out} is the folder that --predict writes to, not the file; give one, such as {out.parent}")
    pictures, videos = ({}, {}) if raw else find_pictures(Path(args.predict), out, args.style)
    if videos and not pictures:
        _program("ffmpeg")
    checkpoint = read_checkpoint(args.weights)
    model = build_from_checkpoint(checkpoint, args.weights)
    if "classes" in checkpoint:
        classes = Classes.from_dict(checkpoint["classes"])
    elif model.args["num_classes"] == len(CITYSCAPES.names):  # weights of another project
        classes = CITYSCAPES
    else:
        raise CheckpointError(f"{args.weights}: holds no classes, so no colours; take a checkpoint that train.py wrote")
    device, rank, world_size = start_processes(args.device)
    segment = accelerate(model, device=device, precision=PRECISIONS[args.amp or "auto"], mean=MEAN, std=STD)
    painter = Painter(classes, args.style, args.strength, args.legend)
    # A thread for a picture or frame, of two at once, is as fast as two threads for one, and neither waits for the other.
    before = torch.get_num_threads()
    threads = min(before, MOST_THREADS)
    frame_threads = threads if device.type == "cpu" else 1
    if device.type != "cpu":
        segment = _one_at_a_time(segment)
    torch.set_num_threads(max(1, before // threads))
    # What ends this takes away what is half done. Under nohup, SIGHUP is ignored, and does not.
    hangs_up = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]
    earlier = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in ends}
    try:
        if raw:
            if world_size > 1:
                raise UsageError("--predict - is one stream, for one process; leave out torchrun")
            # Frames alone go to stdout: what is printed from here on, the JSON line too, goes to stderr.
            sys.stdout.flush()
            with open(os.dup(1), "wb", buffering=0) as stdout:
                os.dup2(2, 1)
                frames = segment_raw(segment, args.size, painter, stdout, frame_threads)
            return {"frames": frames, "out": "-", "style": args.style}
        mine = [list(each.items())[rank::world_size] for each in (pictures, videos)]
        failed, frames, seconds = [], 0, 0.0

        def fail(error: DataError) -> None:
            failed.append(error)
            if len(pictures) + len(videos) > 1:
                tqdm.write(f"eval.py: {error}", file=sys.stderr)

        def one(item: tuple[Path, Path]) -> DataError | None:
            try:
                with _blamed_on(item[0]):
                    segment_picture(*item, segment, painter)
            except DataError as error:  # others are not lost for it
                return error

        if mine[0]:
            with ThreadPoolExecutor(threads) as pool:
                done = tqdm(
                    pool.map(one, mine[0]), "prediction", len(mine[0]), False, unit="image", disable=None if rank == 0 else True
                )
                for error in filter(None, done):
                    fail(error)
        for path, target in mine[1]:
            try:
                with _blamed_on(path):
                    count, spent = segment_video(path, target, segment, painter, args.preset, frame_threads, rank == 0)
                frames, seconds = frames + count, seconds + spent
            except DataError as error:
                fail(error)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        torch.set_num_threads(before)
    failures, frames = map(sum, zip(*gathered([(len(failed), frames)], world_size)))
    if failures and rank == 0:
        total = len(pictures) + len(videos)
        raise (
            failed[0]
            if total == 1
            else DataError(f"{failures} of {total} files could not be segmented, see above; the others are in {out}")
        )
    fps = round(frames / seconds, 1) if seconds else None
    if rank == 0:
        kind = {"overlay": "overlay", "colour": "colour map", "labels": "label map"}[args.style]
        wrote = [_counted(len(pictures), kind)] if pictures else []
        speed = "" if world_size > 1 else f", {fps} a second"
        wrote += [f"{_counted(len(videos), 'video')} ({_counted(frames, 'frame')}{speed})"] if videos else []
        print(f"wrote {' and '.join(wrote)} to {out}")
    result = {"images": len(pictures), "videos": len(videos), "frames": frames, "out": str(out), "style": args.style}
    return {**result, "fps": fps} if world_size == 1 else result


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _one_at_a_time(segment: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    lock = threading.Lock()

    def segment_alone(images: Tensor) -> Tensor:
        with lock:
            return segment(images)

    return segment_alone


# ------------------------------------------------------------------------------------------------- export, other runtimes


class Deployed(nn.Module):
    """A network with what surrounds it, for export: (N, H, W, 3) uint8 RGB -> (N, H, W) uint8 labels, or (N, C, H, W) scores."""

    def __init__(self, model: nn.Module, output: str = "labels"):
        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.output = output
        self.register_buffer("shift", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(STD).view(3, 1, 1) * 255))

    def forward(self, images: Tensor) -> Tensor:
        scores = self.model((images.permute(0, 3, 1, 2).float() - self.shift) * self.scale)
        return scores if self.output == "logits" else scores.argmax(1).to(torch.uint8)


def export(model: nn.Module, path: str | Path, output: str = "labels") -> None:
    """Writes the network as ONNX (`.onnx`) or in torch.export's own format (`.pt2`), for any batch, height and width.

    Args:
        model: the network.
        path: the file; its suffix is the format.
        output: "labels" or "logits", see `Deployed`.

    Raises:
        UsageError: another suffix, or a package that is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"--export {path} has the suffix {path.suffix!r}, expected .onnx or .pt2")
    if path.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            import_option(package, "--export to ONNX")
    sizes = {0: torch.export.Dim("batch", min=1, max=1024)}
    # From 33 pixels on: at 32 the innermost map is a single pixel, which export would take for a constant.
    sizes |= {1: torch.export.Dim("height", min=33, max=2**14), 2: torch.export.Dim("width", min=33, max=2**14)}
    example = torch.zeros(2, 72, 136, 3, dtype=torch.uint8)
    program = torch.export.export(Deployed(model, output).eval(), (example,), dynamic_shapes={"images": sizes})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=[output])
        exported.save(path)


def run_export(args: argparse.Namespace) -> dict:
    """Writes the network for other runtimes and compares what it computes there, where that runtime is installed."""
    model = build_from_checkpoint(read_checkpoint(args.weights), args.weights)
    export(model, args.export, args.export_output)
    result = {"export": str(args.export), "output": args.export_output}
    if Path(args.export).suffix == ".pt2":
        run = torch.export.load(args.export).module()
    else:
        try:
            run = onnx_session(args.export)
        except UsageError as error:
            print(f"wrote {args.export}; not checked: {error}")
            return result
    reference, agreement = Deployed(model, args.export_output), 1.0
    for shape in ((1, 64, 96), (2, 97, 131), (1, 256, 512)):
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
        with torch.inference_mode():
            expected, got = reference(images), run(images)
        close = torch.isclose(got, expected, rtol=1e-3, atol=1e-3) if args.export_output == "logits" else got == expected
        agreement = min(agreement, close.float().mean().item())
    result["agreement"] = round(agreement, 6)
    print(f"wrote {args.export}; at three sizes it agrees with PyTorch in {agreement:.2%} of the values")
    return result


def run_export_weights(args: argparse.Namespace) -> dict:
    """Writes the weights with the names of another project."""
    if args.as_variant is None:
        raise UsageError("--export-weights needs --as, the project whose names to use: tramac, segmentron, mmseg or mmseg-old")
    model = build_from_checkpoint(read_checkpoint(args.weights), args.weights)
    Path(args.export_weights).parent.mkdir(parents=True, exist_ok=True)
    try:
        save_for_peer(model, args.export_weights, args.as_variant)
    except ValueError as error:
        raise UsageError(f"{args.weights}: {error}; train with --variant {args.as_variant}") from None
    print(f"wrote {args.export_weights} with the names of {args.as_variant}")
    return {"export_weights": str(args.export_weights), "as": args.as_variant}


def onnx_session(path: str | Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file in ONNX Runtime, on PyTorch's number of threads."""
    runtime = import_option("onnxruntime", "running ONNX")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _in_onnxruntime(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "model.onnx")
        return onnx_session(Path(folder) / "model.onnx")


def _in_openvino(model: nn.Module, device: torch.device, precision: str = "f32") -> Callable[[Tensor], Tensor]:
    openvino = import_option("openvino", "--against openvino")
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "model.onnx")
        network = openvino.Core().read_model(Path(folder) / "model.onnx")
    compiled = {}  # by size: with a fixed size OpenVINO is faster

    def segment(images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in compiled:
            network.reshape(list(shape))
            threads = torch.get_num_threads()
            hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
            compiled[shape] = openvino.Core().compile_model(network, "CPU", hints)
        return torch.from_numpy(compiled[shape]([images.numpy()])[0])

    return segment


def _in_pytorch(model: nn.Module, device: torch.device, how: str, bf16: bool = False) -> Callable[[Tensor], Tensor]:
    network = Deployed(model).to(device)
    modes = {"compile": "default", "max-autotune": "max-autotune"}
    run = torch.compile(network, mode=modes[how]) if how in modes else network

    def segment(images: Tensor) -> Tensor:
        images = images.to(device)
        if how == "eager":  # planes of colour, as torchvision's ToTensor gives them; else as they come, in channels_last
            images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return run(images)

    return segment


RUNTIMES = {
    "eager": functools.partial(_in_pytorch, how="eager"),
    "channels_last": functools.partial(_in_pytorch, how="channels_last"),
    "compile": functools.partial(_in_pytorch, how="compile"),
    "max-autotune": functools.partial(_in_pytorch, how="max-autotune"),
    "max-autotune-bf16": functools.partial(_in_pytorch, how="max-autotune", bf16=True),
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
    "openvino-bf16": functools.partial(_in_openvino, precision="bf16"),
}


def import_option(package: str, purpose: str):
    """A package that is no requirement. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(f"{purpose} needs the package {package}: pip install {package}") from None


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of eval.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="checkpoint of train.py, or of Tramac, SegmenTron, MMSegmentation")
    add("--dataset", help="cityscapes, camvid or folder (default: the one of the weights' classes)")
    add("--data", metavar="ROOT", help="the dataset's folder (default: datasets/NAME)")
    add("--split", default="val", help="split to evaluate, or several joined by + (default: %(default)s)")
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="factors of the input's size, whose class probabilities are averaged at full resolution; 0.5 is the paper's half "
        "resolution (default: 1.0)",
    )
    add("--flip", action="store_true", help="also average over the mirrored image")
    add(
        "--window",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="let the network see overlapping windows of this size in pixels, for images that do not fit in memory",
    )
    add("--compare", action="store_true", help="also evaluate in float32, and print the difference in mIoU")
    add("--submit", metavar="DIR", help="also write the predictions as label ids, for Cityscapes' evaluation server")
    add("--sheet", metavar="FILE", help="also write a contact sheet: image | truth | prediction")
    add("--sheet-rows", type=int, default=6, metavar="N", help="images on the sheet (default: %(default)s)")
    add(
        "--report",
        metavar="FILE",
        help="also write figures, training curves, confusion matrix and the worst images as one page, such as runs/report.html",
    )
    add(
        "--report-images",
        type=int,
        default=6,
        metavar="N",
        help="worst images on it, by pixel accuracy, at most 25 (default: %(default)s)",
    )
    add(
        "--predict",
        metavar="PATH",
        help="segment this picture or video, or all below this folder, instead; - takes raw RGB frames of --size from stdin, "
        "3 bytes a pixel, for --out -; video needs the program ffmpeg",
    )
    add(
        "--out",
        default="runs/predictions",
        metavar="DIR",
        help="where --predict writes (default: %(default)s); - writes the raw frames of --predict - to stdout, and what is "
        "printed, the JSON line too, to stderr",
    )
    add(
        "--style",
        choices=STYLES,
        default="overlay",
        help="what --predict writes: colours laid over the image; colours alone; or train ids, 8 bits a pixel, without loss "
        "(PNG, FFV1 in MKV) (default: %(default)s)",
    )
    add("--strength", type=float, default=0.55, help="of the colours of an overlay, 0 to 1 (default: %(default)s)")
    add("--legend", action="store_true", help="also name the colours, in a strip below the picture or video")
    add(
        "--preset",
        choices="ultrafast superfast veryfast faster fast medium slow slower veryslow placebo".split(),
        default="ultrafast",
        help="x264's, for video: veryfast writes files of half the size and takes three times as long to encode "
        "(default: %(default)s)",
    )
    add("--export", metavar="FILE", help="write the network as FILE.onnx or FILE.pt2 for other runtimes instead")
    add("--export-output", choices=("labels", "logits"), default="labels", help="what it gives (default: %(default)s)")
    add("--export-weights", metavar="FILE", help="write the weights under the names of another project instead, given by --as")
    add("--as", dest="as_variant", choices=[name for name in VARIANTS if name != "paper"], help="which, for --export-weights")
    add("--benchmark", action="store_true", help="measure the latency instead; needs no weights")
    add("--variant", choices=VARIANTS, default="paper", help="network of a --benchmark without weights (default: %(default)s)")
    add(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="pixels, for --benchmark (default: the paper's three sizes) and --predict -",
    )
    add("--against", nargs="+", choices=RUNTIMES, default=[], help="other runtimes to time on the same input, for --benchmark")
    add("--stages", action="store_true", help="also time the parts of the network, for --benchmark")
    add("--batch-size", type=int, default=1, metavar="N", help="images at once, for --benchmark")
    add("--repeats", type=int, default=20, metavar="N", help="timed runs, for --benchmark (default: %(default)s)")
    add("--warmup", type=int, default=3, metavar="N", help="untimed runs before (default: %(default)s)")
    add(
        "--amp",
        choices=PRECISIONS,
        help="precision of the network (default: off, float32, to evaluate; else auto, the fastest)",
    )
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, or else the CPU)")
    add("--workers", type=int, default=2, metavar="N", help="decoding processes (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the mode that the command line asks for."""
    args = get_args_parser().parse_args(argv)
    if not args.weights and not args.benchmark:
        raise UsageError("--weights FILE is missing; train.py writes runs/checkpoints/best_model.pth")
    bounds = {
        "workers": (0, 1024),
        "sheet_rows": (1, 10**4),
        "report_images": (0, 25),
        "warmup": (0, 10**6),
        "strength": (0, 1),
    }
    check_bounds(args, {**bounds, "batch_size repeats": (1, 10**6)})
    if not all(0 < scale <= MAX_SCALE for scale in args.scales):  # nor is nan
        raise UsageError(
            f"--scales are {' '.join(map(str, args.scales))}, expected factors above 0, at most {MAX_SCALE}, such as 0.75 1.0 1.25"
        )
    for name in ("window", "size"):
        sides = getattr(args, name)
        if sides and min(sides) < MIN_SIZE:
            raise UsageError(f"--{name} is {sides[0]} {sides[1]}, expected at least {MIN_SIZE} pixels each")
        if sides and max(sides) > MAX_SIZE:
            raise UsageError(f"--{name} is {sides[0]} {sides[1]}, expected at most {MAX_SIZE} pixels each")
    if args.export and any("\ud800" <= letter <= "\udfff" for letter in args.export):  # torch.export would abort the process
        raise UsageError(f"--export {args.export!r} is a name that is no UTF-8; give another")
    if args.sheet and not writable_as_picture(Path(args.sheet)):
        raise UsageError(f"--sheet {args.sheet} has no suffix of an image format that can be written; give e.g. sheet.png")
    for name in ("sheet", "report"):
        if (path := getattr(args, name)) and Path(path).is_dir():
            raise UsageError(f"--{name} {path} is a folder, expected a file; give another name")
    modes = {
        "benchmark": run_benchmark,
        "export": run_export,
        "export_weights": run_export_weights,
        "predict": run_prediction,
    }
    result = next((mode for name, mode in modes.items() if getattr(args, name)), run_evaluation)(args)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status("eval.py", main))
