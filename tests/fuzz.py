"""Damages images, label maps, class files and checkpoints at random, reads them, and judges what comes of it.

    python tests/fuzz.py --count 5000 --seed 0 [--only images labels classes checkpoints]

Every case reads the right content, or is refused by an error of one line that names the file. Anything else fails:
other content, another error, a crash, more than LIMIT_S seconds, more than MEMORY bytes. A case depends only on its
kind and number: `--only KIND --seed N --count 1` repeats it. The last line is a JSON object; status 1 for failures.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import data
from data import DataError
from model import CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint

LIMIT_S = 60
MEMORY = 4 << 30  # beyond what the libraries map
RIGHT, REFUSED = "right", "refused"


class Failure(Exception):
    """What must not happen; the message says what did."""


def expect(condition: bool, message: str) -> None:
    """Raises Failure unless the condition holds."""
    if not condition:
        raise Failure(message)


def refused(error: Exception, path: Path, intact: bool) -> str:
    """REFUSED, if the file is damaged and the error is one line that names it."""
    text = str(error)
    expect(not intact, f"an intact file was refused: {text}")
    expect(len(text.splitlines()) == 1, f"an error that is not one line: {text!r:.500}")
    expect(str(path) in text or getattr(error, "filename", None) == str(path), f"does not name {path}: {text:.500}")
    return REFUSED


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three faults, often near an end, where headers and tables are."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        size, buffer = len(content), bytearray(content)
        at = rng.choice([rng.randrange(size + 1), min(size, rng.randrange(64)), max(0, size - rng.randrange(64))])
        fault = rng.choice(["flip", "flip", "insert", "delete", "cut", "overwrite", "repeat"])
        if fault == "flip" and size:
            buffer[min(at, size - 1)] ^= 1 << rng.randrange(8)
        elif fault == "insert":
            buffer[at:at] = rng.randbytes(rng.randint(1, 16))
        elif fault == "delete":
            del buffer[at : at + rng.choice([1, 4, rng.randint(1, 64)])]
        elif fault == "cut":
            del buffer[at:]
        elif fault == "overwrite":
            buffer[at : at + 4] = rng.choice([b"\0", b"\xff", b"\x7f"]) * 4
        elif fault == "repeat":
            buffer[at:at] = buffer[at : at + rng.randint(1, 64)] * rng.randint(1, 20)
        content = bytes(buffer)
    return content


def place(content: bytes, suffix: str, rng: random.Random, folder: Path) -> tuple[Path, bool]:
    """Writes a file, in one of 20 cases intact; its path, and whether it is intact."""
    path = folder / f"{rng.choice(['picture', 'a picture', 'Bild ä 道', '-x', '%s {}', 'x' * 200])}{suffix}"
    harmed = content if rng.random() < 0.05 else damaged(content, rng)
    path.write_bytes(harmed)
    return path, harmed == content


# ----------------------------------------------------------------------------------------------- images and label maps


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_palette(values: np.ndarray, palette: np.ndarray) -> Image.Image:
    """An image of mode P."""
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


@functools.cache
def image_files() -> list[tuple[str, bytes, np.ndarray | None]]:
    """(suffix, content, RGB pixels, or None for formats without checksums, in which damage may give others)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :56]
    rgb = np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8)
    rgb[10:20, 10:20] = rng.integers(0, 256, (10, 10, 3))
    noise = rng.integers(0, 256, (150, 200, 3), np.uint8)  # several IDAT chunks
    palette, index = rng.integers(0, 256, (16, 3), np.uint8), rgb[..., 1] // 16
    image, grey, exif = Image.fromarray(rgb), Image.fromarray(rgb[..., 0]), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    return [
        (".png", encoded(image, "PNG"), rgb),
        (".png", encoded(image, "PNG", compress_level=0), rgb),
        (".png", encoded(image, "PNG", exif=exif), np.rot90(rgb, -1)),
        (".png", encoded(Image.fromarray(noise), "PNG"), noise),
        (".png", encoded(grey, "PNG"), np.stack([rgb[..., 0]] * 3, -1)),
        (".png", encoded(image.convert("RGBA"), "PNG"), rgb),
        (".png", encoded(with_palette(index, palette), "PNG", transparency=bytes(range(16))), palette[index]),
        (".jpg", encoded(image, "JPEG", exif=exif), None),
        (".jpg", encoded(image, "JPEG", progressive=True, quality=95), None),
        (".jpg", encoded(grey, "JPEG"), None),
        (".jpeg", encoded(image.convert("CMYK"), "JPEG"), None),
        (".bmp", encoded(image, "BMP"), None),
        (".ppm", encoded(image, "PPM"), None),
        (".webp", encoded(image, "WEBP", lossless=True), None),
        (".webp", encoded(image, "WEBP"), None),
    ]


def images(rng: random.Random, folder: Path) -> str:
    """A case of read_image."""
    suffix, content, pixels = rng.choice(image_files())
    path, intact = place(content, suffix, rng, folder)
    try:
        image = data.read_image(path)
    except DataError as error:
        return refused(error, path, intact)
    expect(image.mode == "RGB", f"mode {image.mode}")
    expect(pixels is None or np.array_equal(np.array(image), pixels), "other pixels")
    return RIGHT


TABLE = data.label_table(range(20), ignored=[255])


@functools.cache
def label_files() -> list[tuple[str, bytes, np.ndarray]]:
    """(suffix, content, train ids)."""
    y, x = np.mgrid[:40, :56]
    values = ((x // 7 + y // 5) % 20).astype(np.uint8)
    values[5:9] = 255
    palette = np.repeat(np.arange(256)[:, None], 3, 1)
    return [
        (".png", encoded(Image.fromarray(values), "PNG"), values),
        (".png", encoded(Image.fromarray(values), "PNG", compress_level=0), values),
        (".png", encoded(with_palette(values, palette), "PNG"), values),
        (".png", encoded(with_palette(values % 4, palette), "PNG", bits=2), values % 4),
        (".bmp", encoded(Image.fromarray(values), "BMP"), values),
    ]


def labels(rng: random.Random, folder: Path) -> str:
    """A case of read_label."""
    suffix, content, values = rng.choice(label_files())
    path, intact = place(content, suffix, rng, folder)
    try:
        label = data.read_label(path, TABLE)
    except DataError as error:
        return refused(error, path, intact)
    expect(label.dtype == np.uint8 and bool(((label < 20) | (label == 255)).all()), "values outside of the table")
    expect(suffix != ".png" or np.array_equal(label, values), "other labels")
    return RIGHT


# -------------------------------------------------------------------------------------------- class files, checkpoints

CLASSES = {"names": ["road", "car", "sky"], "colours": [[9, 64, 128], [0, 0, 142], [70, 130, 180]], "ignore": [255, 7]}
JUNK = [None, True, 0, -1, 3, 256, 10**30, 0.5, float("nan"), "", "x", "colours", [], {}, [[]], [1], ["x"], {"x": 1}]


def classes(rng: random.Random, folder: Path) -> str:
    """A case of open_dataset: classes.json with damaged bytes, or with a wrong value."""
    for kind, image in (("images", Image.new("RGB", (64, 48))), ("labels", Image.new("L", (64, 48)))):
        (folder / kind / "train").mkdir(parents=True)
        image.save(folder / kind / "train/0.png")
    content = json.loads(json.dumps(CLASSES))
    key = rng.choice([*CLASSES, "labels", "color"])
    if key in CLASSES and rng.random() < 0.5:
        content[key][rng.randrange(len(content[key]))] = rng.choice(JUNK)
    else:
        content[key] = rng.choice(JUNK)
    intact = json.dumps(CLASSES).encode()
    written = rng.choice([intact, json.dumps(content).encode(), damaged(intact, rng), damaged(intact, rng)])
    path = folder / "classes.json"
    path.write_bytes(written)
    try:
        dataset = data.open_dataset("folder", folder, "train")
    except DataError as error:
        return refused(error, path, written == intact)
    content = json.loads(written)
    ignored = content.get("ignore", 255)
    ignored = ignored if isinstance(ignored, list) else [ignored]
    expect(list(dataset.classes.names) == content["names"], f"names {dataset.classes.names}")
    if content.get("labels") != "colours":
        count = len(content["names"])
        table = [255 if i in ignored else i if i < count else data.UNKNOWN for i in range(256)]
        expect(list(dataset.table) == table, "another table")
    return RIGHT


@functools.cache
def checkpoint() -> tuple[dict[str, torch.Tensor], bytes]:
    """The weights in a checkpoint, and its file."""
    model = FastSCNN(3)
    fields = {"names": ["left", "middle", "right"], "colours": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "categories": []}
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "model_args": model.args, "classes": fields, "epoch": 2}, buffer)
    return model.state_dict(), buffer.getvalue()


def checkpoints(rng: random.Random, folder: Path) -> str:
    """A case of read_checkpoint and build_from_checkpoint."""
    weights, content = checkpoint()
    path, intact = place(content, ".pth", rng, folder)
    try:
        model = build_from_checkpoint(read_checkpoint(path), path)
    except (CheckpointError, OSError) as error:
        return refused(error, path, intact)
    expect(all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "other weights")
    return RIGHT


# ---------------------------------------------------------------------------------------------------------------- runs

KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "images": images,
    "labels": labels,
    "classes": classes,
    "checkpoints": checkpoints,
}


def run_case(kind: str, number: int) -> str:
    """RIGHT, REFUSED, or what went wrong."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=sys.__stderr__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return KINDS[kind](random.Random(f"{kind} {number}"), Path(folder))
    except Failure as failure:
        return str(failure)
    except Exception:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    """Of this process, before its first case."""
    torch.set_num_threads(1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def run_kind(kind: str, first: int, count: int) -> dict[str, int]:
    """Runs the cases of a kind in a process of their own, prints failures, and counts the outcomes."""
    outcomes: Counter[str] = Counter()
    fork, pool = multiprocessing.get_context("fork"), None
    for number in range(first, first + count):
        pool = pool or ProcessPoolExecutor(1, fork, limit_memory)
        try:
            outcome = pool.submit(run_case, kind, number).result()
        except BrokenProcessPool:
            outcome, pool = f"crashed, or took more than {LIMIT_S} s", None
        if outcome not in (RIGHT, REFUSED):
            print(
                f"FAILED {kind} {number}: {outcome}\n    python tests/fuzz.py --only {kind} --seed {number} --count 1"
            )
            outcome = "failed"
        outcomes[outcome] += 1
    return dict(outcomes)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=5000, metavar="N", help="cases of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="number of the first case (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds (default: all)")
    args = parser.parse_args(argv)
    report = {kind: run_kind(kind, args.seed, args.count) for kind in args.only}
    print(json.dumps(report))
    return int(any("failed" in outcomes for outcomes in report.values()))


if __name__ == "__main__":
    sys.exit(main())
