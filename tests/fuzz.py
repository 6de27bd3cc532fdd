"""Feeds broken and hostile input to everything of this project that reads some, and looks at what becomes of it.

    python tests/fuzz.py --count 5000 --seed 0 [--only images labels checkpoints classes commands kernels]

Case N of a kind is drawn from the number N alone, and `--only KIND --seed N --count 1` repeats it. Each either gives the right
result, or is refused in one line that names the file. Anything else is a failure: a wrong result, another error, a crash, more
than LIMIT_S seconds, more than MEMORY bytes. Cases run in child processes, so that a crash costs one case; those of the kernels
under the address and undefined-behaviour sanitizers. The last line is one JSON object; exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import DataError  # noqa: E402
from model import VARIANTS, CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint  # noqa: E402

LIMIT_S = 60  # of one case, compilation and start of its process apart
MEMORY = 4 << 30  # that a child may take beyond what its libraries do; not under sanitizers, whose shadow is terabytes
START_S = 300
MENDABLE = (evaluation.UsageError, DataError, CheckpointError, OSError)
RIGHT, REFUSED = "right", "refused"


class Failure(Exception):
    """What must not happen; the message says what did."""


def expect(fine: bool, message: str) -> None:
    """Raises Failure."""
    if not fine:
        raise Failure(message)


def refusal(error: Exception, path: Path | None = None) -> str:
    """REFUSED, if an error is one line and names the file."""
    text = str(error)
    expect(len(text.splitlines()) == 1, f"an error of several lines, or of none: {text!r:.500}")
    named = path is None or str(path) in text or getattr(error, "filename", None) == str(path)
    expect(named, f"an error that does not name {path}: {text!r:.500}")
    return REFUSED


# -------------------------------------------------------------------------------------------------------------- mutations

EXTREME = (
    b"\0",
    b"\xff",
    b"\0" * 4,
    b"\xff" * 4,
    b"\x7f" + b"\xff" * 3,
    b"\x80\0\0\0",
    b"\0\0\0\x80",
    b"\0" * 8,
    b"\xff" * 8,
    b"\x40\0",
)


def place(size: int, rng: random.Random) -> int:
    """A position, often near one end, where heads and tables lie."""
    return rng.choice([rng.randrange(size + 1), min(size, rng.randrange(64)), max(0, size - rng.randrange(64))])


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three faults: bits, bytes, ranges, the end, the rest of another file, extreme values."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, buffer = place(len(content), rng), bytearray(content)
        kind = rng.choice(["flip", "flip", "insert", "delete", "cut", "splice", "extreme", "repeat"])
        if kind == "flip" and buffer:
            buffer[min(at, len(buffer) - 1)] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            buffer[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == "delete":
            del buffer[at : at + rng.choice([1, 4, rng.randint(1, 64)])]
        elif kind == "cut":
            del buffer[at:]
        elif kind == "splice":
            buffer[at:] = other[rng.choice([at, place(len(other), rng)]) :]
        elif kind == "extreme":
            value = rng.choice(EXTREME)
            buffer[at : at + len(value)] = value
        elif kind == "repeat":
            buffer[at:at] = buffer[at : at + rng.randint(1, 64)] * rng.randint(1, 20)
        content = bytes(buffer)
    return content


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def with_checksums(content: bytes) -> bytes:
    """A damaged PNG file whose checksums are right again, as far as its chunks can be followed."""
    result, at = content[:8], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if at + 12 + size > len(content):
            break
        result += png_chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + size])
        at += 12 + size
    return result + content[at:]


def chunks(content: bytes) -> list[bytes]:
    """The chunks of a PNG file up to its end."""
    result, at = [], 8
    while at + 12 <= len(content) and result[-1:] != [png_chunk(b"IEND", b"")]:
        size = 12 + int.from_bytes(content[at : at + 4], "big")
        result.append(content[at : at + size])
        at += size
    return result


def packed_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG file of 1, 2, 4 or 8 bits, which Pillow does not write."""
    height, width = values.shape
    shifts = np.arange(bits)[::-1]
    rows = np.packbits((values[..., None] >> shifts & 1).reshape(height, -1).astype(np.uint8), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def saved(image: Image.Image, kind: str, orientation: int = 1, **options) -> bytes:
    """An image's file."""
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# What each orientation of Exif asks of rows and columns, by its definition: where row 0 and column 0 of the file are shown.
SHOWN = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}

# ----------------------------------------------------------------------------------------------------- images and label maps


@functools.cache
def image_files() -> list[tuple[str, bytes, np.ndarray | None]]:
    """(suffix, content, RGB pixels, None where they are not known to the bit, or where the file is to be refused)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :56]
    rgb = np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8)
    rgb[10:20, 10:20] = rng.integers(0, 256, (10, 10, 3))
    grey, alpha = rgb[..., 0], rgb[..., 2:]
    palette = rng.integers(0, 256, (16, 3), np.uint8)
    index = (rgb[..., 1] // 16).astype(np.uint8)
    paletted = Image.fromarray(index, "L")
    paletted = Image.frombytes("P", paletted.size, index.tobytes())
    paletted.putpalette(palette.tobytes())
    whole, three = Image.fromarray(rgb), np.stack([grey] * 3, -1)
    noise = Image.fromarray(rng.integers(0, 256, (150, 200, 3), np.uint8))
    files = [
        (".png", saved(whole, "PNG"), rgb),
        (".png", saved(whole, "PNG", compress_level=0), rgb),
        (".png", saved(noise, "PNG"), np.array(noise)),  # of several IDAT chunks
        (".png", saved(Image.fromarray(grey), "PNG"), three),
        (".png", saved(Image.fromarray(np.concatenate([rgb, alpha], -1)), "PNG"), rgb),
        (".png", saved(Image.fromarray(np.concatenate([rgb[..., :1], alpha], -1), "LA"), "PNG"), three),
        (".png", saved(paletted, "PNG"), palette[index]),
        (".png", saved(paletted, "PNG", transparency=bytes(range(0, 256, 16))), palette[index]),
        (".png", saved(whole, "PNG", transparency=(1, 2, 3)), rgb),
        (".png", packed_png(grey >> 7, 1), 255 * (three >> 7)),
        (".png", packed_png(grey >> 4, 4), 17 * (three >> 4)),
        (".png", saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), None),
        *((".png", saved(whole, "PNG", turn), SHOWN[turn](rgb)) for turn in SHOWN),
        (".jpg", saved(whole, "JPEG"), None),
        (".jpg", saved(whole, "JPEG", progressive=True, quality=95), None),
        (".jpg", saved(Image.fromarray(grey), "JPEG"), None),
        (".jpeg", saved(whole.convert("CMYK"), "JPEG"), None),
        *((".jpg", saved(whole, "JPEG", turn), None) for turn in SHOWN),
        (".bmp", saved(whole, "BMP"), None),
        (".bmp", saved(paletted, "BMP"), None),
        (".ppm", saved(whole, "PPM"), None),
        (".ppm", saved(Image.fromarray(grey), "PPM"), None),
        (".ppm", b"P3 56 40 255\n" + " ".join(map(str, rgb.ravel().tolist())).encode(), None),
    ]
    with contextlib.suppress(KeyError):  # a Pillow without WebP
        files += [(".webp", saved(whole, "WEBP", lossless=True), None), (".webp", saved(whole, "WEBP", 6), None)]
    return files


NAMES = ("picture", "a picture", "Bild ä 道", os.fsdecode(b"raw \xff"), "-x", "%s {}", "x" * 200)


def picture_case(files: list, rng: random.Random, folder: Path) -> tuple[Path, str, bool, list[np.ndarray]]:
    """A mutated file: its path, "whole", "damaged" or "mended", whether it is a PNG file, and the pixels it may have."""
    (suffix, content, pixels), (_, other, others) = rng.choice(files), rng.choice(files)
    path = folder / f"{rng.choice(NAMES)}{suffix}"
    state = "whole" if rng.random() < 0.05 else "damaged"
    if state == "damaged":
        first, content = content, mutated(content, other, rng)
        if content[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.3:
            content, state = with_checksums(content), "mended"
        elif chunks(content) not in (chunks(first), chunks(other)) and set(chunks(content)) <= {*chunks(first), *chunks(other)}:
            state = "mended"  # whole chunks of two files, say one's head and the other's pixels: no checksum tells
    path.write_bytes(content)
    return path, state, content[:8] == b"\x89PNG\r\n\x1a\n", [each for each in (pixels, others) if each is not None]


def head_size(path: Path) -> tuple[int, int]:
    """Width and height by the head of a PNG file."""
    head = path.read_bytes()[16:24]
    return int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")


def images(rng: random.Random, folder: Path) -> str:
    """read_image and read_size of a mutated file."""
    path, state, is_png, pixels = picture_case(image_files(), rng, folder)
    try:
        image = data.read_image(path)
    except DataError as error:
        expect(state != "whole" or not pixels or "8 bits" in str(error), f"a whole file was refused: {error}")
        return refusal(error, path)
    finally:
        with contextlib.suppress(DataError):
            size = data.read_size(path)
    expect(image.mode == "RGB" and image.size == size, f"{image.mode} {image.size}, by its head {size}")
    if is_png:
        expect(sorted(image.size) == sorted(head_size(path)), f"{image.size}, in the head {head_size(path)}")
    if is_png and state != "mended":
        expect(any(np.array_equal(np.array(image), each) for each in pixels), "other pixels, and they were taken for right")
    return RIGHT


LABELS = 20
TABLE = data.label_table({i: i for i in range(LABELS)}, ignored=(255,))


@functools.cache
def label_files() -> list[tuple[str, bytes, np.ndarray | None]]:
    """(suffix, content, train ids, None where the file is to be refused)."""
    y, x = np.mgrid[:40, :56]
    values = ((x // 7 + y // 5) % LABELS).astype(np.uint8)
    values[5:9] = 255
    few = values % 4
    grey = Image.fromarray(values)

    def paletted(array: np.ndarray) -> Image.Image:
        image = Image.frombytes("P", array.shape[::-1], array.tobytes())
        image.putpalette(bytes(range(256)) * 3)
        return image

    return [
        (".png", saved(grey, "PNG"), values),
        (".png", saved(grey, "PNG", compress_level=0), values),
        (".png", saved(paletted(values), "PNG"), values),
        (".png", saved(paletted(few), "PNG", bits=2), few),
        (".png", packed_png(values, 8), values),
        (".png", packed_png(few, 2), None),  # 1 would be read as 85
        (".png", packed_png(few & 1, 1), None),
        *((".png", saved(grey, "PNG", turn), SHOWN[turn](values)) for turn in (3, 6, 8)),
        (".png", saved(Image.fromarray(values.astype(np.uint16)), "PNG"), None),
        (".png", saved(grey.convert("RGB"), "PNG"), None),
        (".png", saved(grey.convert("LA"), "PNG"), None),
        (".bmp", saved(grey, "BMP"), values),
        (".jpg", saved(grey, "JPEG", quality=100), None),
        (".ppm", saved(grey, "PPM"), None),
    ]


def labels(rng: random.Random, folder: Path) -> str:
    """read_label of a mutated file."""
    path, state, is_png, maps = picture_case(label_files(), rng, folder)
    try:
        label = data.read_label(path, TABLE)
    except DataError as error:
        expect(
            state != "whole" or not maps or "mode" in str(error) or "save" in str(error), f"a whole file was refused: {error}"
        )
        return refusal(error, path)
    values = np.array(label)
    expect(label.mode == "L" and bool(((values < LABELS) | (values == 255)).all()), "values outside the table")
    if is_png and state != "mended":
        expect(any(np.array_equal(values, each) for each in maps), "other labels, and they were taken for right")
    return RIGHT


# ------------------------------------------------------------------------------------------------------------- checkpoints

JUNK = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, math.nan, math.inf, -math.inf, "", "x", "nan", "\n", "\ud800", [], {}, [[]],
    [1], ["x"], {"x": 1}, {1: 2}, (1, 2), "paper", "x" * 5000, [None] * 3, {"names": ["a"]},
)  # fmt: skip


def junk_tensors() -> list[torch.Tensor]:
    """Tensors that are no weights."""
    return [
        torch.zeros(()), torch.zeros(0), torch.tensor(math.nan), torch.full((3,), math.inf), torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.bool), torch.zeros(1).expand(10**6), torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.int8),
        torch.empty(2, 2, device="meta"), torch.zeros(3, dtype=torch.float8_e5m2), torch.zeros(1).expand(2**40),
    ]  # fmt: skip


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The keys of all that nested dicts and lists hold."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield (*path, key)
        yield from places(value, (*path, key))


def disordered(tree: dict, junk: list, rng: random.Random) -> dict:
    """Nested dicts and lists with one to three faults: another value, a missing one, one more, one in the place of another."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        known = list(places(tree))
        if not known:
            return tree
        depth = rng.choice([1, 1, 2, 2, 3, 4])
        *keys, last = rng.choice([each for each in known if len(each) <= depth])
        holder = functools.reduce(lambda held, key: held[key], keys, tree)
        kind = rng.choice(["replace", "replace", "remove", "add", "move"])
        if kind == "replace":
            holder[last] = copy.deepcopy(rng.choice(junk))
        elif kind == "remove":
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[rng.choice(["x", "names", "trained", "variant", 1])] = copy.deepcopy(rng.choice(junk))
        elif kind == "add":
            holder.insert(0, copy.deepcopy(rng.choice(junk)))
        else:
            *keys, key = rng.choice(known)
            holder[last] = copy.deepcopy(functools.reduce(lambda held, key: held[key], (*keys, key), tree))
    return tree


@functools.cache
def checkpoint_files() -> tuple[dict, bytes, bytes]:
    """A checkpoint with all that resuming needs, its file, and that of another one."""
    torch.manual_seed(0)
    contents = []
    for classes in (3, 4):
        model = FastSCNN(classes, dropout=0.0)
        args = train.get_args_parser().parse_args(["--dataset", "folder", "--data", "x", "--epochs", "5"])
        args.lr = 0.01
        optimizer = train.make_optimizer(model, args)
        model(torch.randn(2, 3, 32, 64)).mean().backward()
        optimizer.step()
        colours = [[i, 2 * i, 3 * i] for i in range(classes)]
        content = {
            "model": model.state_dict(),
            "model_args": model.args,
            "classes": {"names": ["left", "middle", "right", "far"][:classes], "colours": colours, "categories": []},
            "epoch": 2,
            "optimizer": optimizer.state_dict(),
            "scaler": {
                "scale": 65536.0,
                "growth_factor": 2.0,
                "backoff_factor": 0.5,
                "growth_interval": 2000,
                "_growth_tracker": 7,
            },
            "best_miou": 0.5,
            "validated": True,
            "args": vars(args),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        contents += [content, buffer.getvalue()]
    return contents[0], contents[1], contents[3]


def same(a: object, b: object) -> bool:
    """Whether two trees of plain types and tensors are alike."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        alike = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and (
            a.is_meta or a.layout != torch.strided or a.numel() > 10**7 or bool(((a == b) | (a != a)).all())
        )  # NaN is alike, outside the weights
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def use(checkpoint: dict, path: Path) -> None:
    """What eval.py and train.py do with a checkpoint that was read; raises what they raise."""
    model = build_from_checkpoint(checkpoint, path)
    expect(all(tensor.isfinite().all() for tensor in model.state_dict().values()), "weights that are no finite numbers")
    images = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        model(images)
    if "classes" in checkpoint:
        classes = data.Classes.from_dict(checkpoint["classes"])
        expect(len(classes.names) == model.args["num_classes"], "names for another number of classes")
        evaluation.colour_map(np.zeros((2, 2), np.uint8), classes)
    train.read_training_state(path)
    args = train.get_args_parser().parse_args(["--data", "x", "--resume", "auto"])
    train.check_resume(path, checkpoint, model, data.Classes.from_dict(checkpoint["classes"]), args)
    model.load_state_dict(checkpoint.get("trained", checkpoint["model"]))
    args.lr = 0.1
    optimizer = train.make_optimizer(model, args)
    train.load_optimizer(optimizer, checkpoint["optimizer"], path)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if checkpoint["scaler"]:
        torch.amp.GradScaler("cpu").load_state_dict(checkpoint["scaler"])
    expect(0 <= checkpoint["epoch"] + 1 <= 2**31 and -math.inf < checkpoint["best_miou"] < math.inf, "absurd numbers")
    expect(checkpoint["args"]["epochs"] > 0 and str(Path(checkpoint["args"]["data"]).resolve()) != "", "absurd arguments")


def checkpoints(rng: random.Random, folder: Path) -> str:
    """read_checkpoint of a mutated file, and of mutated contents."""
    content, raw, other = checkpoint_files()
    path = folder / f"{rng.choice(NAMES)}.pth"
    if rng.random() < 0.02:
        path.write_bytes(raw)
        expected, kind = content, "whole"
    elif rng.random() < 0.5:
        # Nearly all bytes are numbers; the rest is at the ends.
        ends = [raw[:30000], raw[30000:-60000], raw[-60000:]]
        part = rng.choice([0, 1, 2, 2])
        ends[part] = mutated(ends[part], other, rng)
        path.write_bytes(b"".join(ends))
        expected, kind = content, "raw"
    else:
        expected, kind = disordered(content, [*JUNK, *junk_tensors()], rng), "contents"
        try:
            torch.save(expected, path, _use_new_zipfile_serialization=rng.random() < 0.9)
        except Exception:  # torch cannot save all of it
            return checkpoints(rng, folder)
    try:
        read = read_checkpoint(path)
        expect(same(read, expected), "other contents, and they were taken for right")
        use(read, path)
    except (CheckpointError, OSError) as error:
        expect(kind != "whole", f"a whole file was refused: {error}")
        return refusal(error, path)
    return RIGHT


# ------------------------------------------------------------------------------------------------------------ classes.json

CLASSES = {"names": ["road", "car", "sky"], "colours": [[128, 64, 128], [0, 0, 142], [70, 130, 180]], "ignore": [255, 2]}


def make_folder_dataset(root: Path) -> None:
    """One image and its label map, for --dataset folder."""
    for split in ("train", "val"):
        for kind, image in (("images", Image.new("RGB", (64, 48), (9, 9, 9))), ("labels", Image.new("L", (64, 48), 1))):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            image.save(root / kind / split / "0.png")
    (root / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))


def classes(rng: random.Random, folder: Path) -> str:
    """open_dataset with a mutated classes.json."""
    root = folder / "own"
    if not root.exists():
        make_folder_dataset(root)
    path = root / "classes.json"
    whole = json.dumps(CLASSES).encode()
    kind = rng.choice(["whole", "text", "text", "structure", "structure", "structure", "special"])
    if kind == "text":
        whole = mutated(whole, json.dumps({"names": ["a", "b"]}, indent=1).encode(), rng)
    elif kind == "structure":
        tree = disordered(CLASSES, [*(each for each in JUNK if not isinstance(each, tuple | dict)), {"x": 1}], rng)
        whole = json.dumps(tree, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    elif kind == "special":
        deep, text = rng.choice([10, 10**5]), json.dumps(CLASSES)
        whole = rng.choice([b"", b"\0", b"[" * deep, b'{"names":' * deep, b"\xef\xbb\xbf" + whole, text.encode("utf-16"), whole * 2,
            whole + b" " * 2**21, b'{"names": ["a"], "ignore": ' + b"9" * 5000 + b"}", b'{"names": ["a"], "ignore": 1e999}',
            json.dumps({"names": [str(i) for i in range(rng.choice([1, 254, 255, 10**4]))]}).encode()])  # fmt: skip
    path.write_bytes(whole)
    try:
        dataset = data.open_dataset("folder", root, "train")
    except DataError as error:
        expect(kind != "whole", f"a whole file was refused: {error}")
        return refusal(error, path)
    content = json.loads(whole.decode("utf-8-sig"))
    names, colours, ignored = content["names"], content.get("colours"), content.get("ignore", 255)
    ignored = ignored if isinstance(ignored, list) else [ignored]
    expect(list(dataset.classes.names) == names and all(type(name) is str for name in names), f"names {dataset.classes.names}")
    expect(len(set(names)) == len(names) and colours in (None, [list(c) for c in dataset.classes.colours]), "names or colours")
    levels = [level for colour in dataset.classes.colours for level in colour]
    expect(all(type(level) is int and 0 <= level <= 255 for level in [*levels, *ignored]), f"levels {levels} {ignored}")
    table = [255 if i in ignored else i if i < len(names) else 254 for i in range(256)]
    expect(list(dataset.table) == table, "another table")
    return RIGHT


# ---------------------------------------------------------------------------------------------------------- command lines

NUMBERS = (
    "0", "1", "2", "-1", "64", "128", "0.5", "1.5", "-0.5", "nan", "-nan", "inf", "-inf", "1e400", "1e308", "1e-320", "-0.0", "1e9", "1000000000",
    "2147483648", "99999999999999999999", "9" * 5000, "", " ", "x", "1_0", "0x10", "\u0663", "1,5", "--", "-", "1e", "true",
)  # fmt: skip
WORDS = ("", " ", "x", "nowhere/x", "/proc/none/x", "/dev/null", "a\u00e4", os.fsdecode(b"\xff"), "x" * 300, "y/" * 3000, "%s", "{}", "*", "..", "cpu",
         "cpu:7", "cuda:99", "cuda", "meta", "train", "val", "train+val", "+", "folder", "camvid", "dynamic", "model.onnx", "m.pt2", "s.png")  # fmt: skip


class Reached(Exception):
    """The command line was accepted: what comes next would be the work itself."""


def command_line(
    parser: argparse.ArgumentParser, left_out: set[str], base: list[str], paths: list[str], rng: random.Random
) -> list[str]:
    """Random flags with random values behind those of `base`."""
    actions = [action for action in parser._actions if action.option_strings and action.dest not in left_out]
    argv = list(base)
    for action in rng.sample(actions, rng.choice([0, 1, 1, 2, 3, 5])):
        argv.append(rng.choice(action.option_strings))
        count = action.nargs if isinstance(action.nargs, int) else rng.choice([1, 1, 2, 3]) if action.nargs else 1
        if action.nargs == 0:
            continue
        for _ in range(count if rng.random() < 0.95 else rng.randint(0, 3)):
            if action.choices and rng.random() < 0.8:
                argv.append(str(rng.choice(list(action.choices))))
            elif action.type in (int, float) and rng.random() < 0.95:
                argv.append(rng.choice(NUMBERS))
            else:
                argv.append(rng.choice([*WORDS, *NUMBERS[:20], *paths, *paths]))
    if rng.random() < 0.03:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice([*WORDS, "--unknown", "--we", "@x"]))
    return argv


def commands(rng: random.Random, folder: Path) -> str:
    """eval.py's and train.py's main up to where the work begins."""
    root, weights = folder / "own", folder / "weights.pth"
    if not root.exists():
        make_folder_dataset(root)
    if not weights.exists():
        weights.write_bytes(checkpoint_files()[1])
    (root / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))
    paths = [str(root), str(weights), str(root / "images/val/0.png"), str(root / "images")]
    script, data_flags = rng.choice([evaluation, train]), ["--dataset", "folder", "--data", str(root)]
    own = ["--weights", str(weights)] if script is evaluation else ["--epochs", "3"]
    base = rng.choice([[], own, [*own, *data_flags], [*own, *data_flags], [*own, *data_flags], ["--benchmark"]])
    base = ["--benchmark", "3", *data_flags] if base == ["--benchmark"] and script is train else base
    parser = script.get_args_parser()
    argv = command_line(parser, {"help"}, base, paths, rng)

    def reached(*_args, **_options):
        raise Reached

    def started(device_name: str | None, *_):
        evaluation_start(device_name)
        raise Reached

    evaluation_start, before = evaluation.start_processes, os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(script, "start_processes", started))
            for name in ("export", "save_for_peer"):
                stack.enter_context(mock.patch.object(evaluation, name, reached))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            script.main(argv)
        raise Failure(f"{argv}: came to an end")
    except MENDABLE as error:
        return refusal(error)
    except Reached:
        parsed = vars(train.parse_args(argv) if script is train else parser.parse_args(argv))
    except Exception as error:
        raise Failure(f"{script.__name__} {argv}: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(before)
    for name, value in parsed.items():
        values = value if isinstance(value, list) else [value]
        if name == "loss_scale" and value != "dynamic":
            values = [float(value)]
        numbers = [each for each in values if isinstance(each, int | float)]
        expect(
            all(abs(each) < 2**32 for each in numbers),
            f"{script.__name__} --{name.replace('_', '-')} {value!r:.100} was accepted: {argv}",
        )
    return RIGHT


# ----------------------------------------------------------------------------------------------------------------- kernels

INTEGERS = (0, 1, -1, 2, 7, 255, 256, 257, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def hostile_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A tensor of another dtype, rank, size, device, of odd strides, or of values that are no ordinary ones."""
    kind = rng.choice(
        "dtype rank empty expanded strided reversed meta values values values shorter longer none transposed".split()
    )
    if kind == "dtype":
        others = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
                  torch.complex64, torch.int8)  # fmt: skip
        return tensor.to(rng.choice(others))
    if kind == "rank":
        return rng.choice([tensor[None], tensor.flatten(), tensor.reshape(-1)[:1].squeeze(0), tensor.unsqueeze(-1)])
    if kind in ("empty", "shorter") and tensor.ndim:
        return tensor.narrow(rng.randrange(tensor.ndim), 0, 0 if kind == "empty" else 1)
    if kind == "expanded" and tensor.numel():
        return tensor.flatten()[:1].view([1] * tensor.ndim).expand(tensor.shape)
    if kind == "strided" and tensor.ndim:  # of strides that are huge beside the size
        buffer = tensor.new_zeros([*tensor.shape[:-1], max(1, tensor.shape[-1]) * rng.choice([2, 1000])])
        step = buffer.shape[-1] // max(1, tensor.shape[-1])
        view = buffer[..., ::step][..., : tensor.shape[-1]]
        return view.copy_(tensor)
    if kind == "reversed" and tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "transposed" and tensor.ndim > 1:
        return tensor.transpose(-1, -2)
    if kind == "meta":
        return tensor.to("meta")
    if kind == "longer" and tensor.ndim:
        return torch.cat([tensor, tensor], rng.randrange(tensor.ndim))
    if kind == "values" and tensor.numel():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        odd = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40) if tensor.is_floating_point() else (0, 1, 19, 77, 254, 255)
        odd = odd if tensor.dtype != torch.int64 else (*odd, -1, 256, 300, 2**31, 2**63 - 1, -(2**63))
        for _ in range(rng.choice([1, 3])):
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(odd)
    return tensor


def attempt(call: Callable) -> tuple[object, Exception | None]:
    """The result of a call, or what it raised; only errors for users are caught."""
    try:
        return call(), None
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError) as error:
        return None, error


def kernel_operators(rng: random.Random) -> str:
    """A public operator of ops_ext with arguments of which some are hostile, beside its reference."""
    import ops_ext
    from kernel_cases import argmax_case, confusion_case, cross_entropy_case

    seed = rng.randrange(10**9)
    which = rng.choice(["upsample_argmax", "upsample_cross_entropy", "confusion_matrix"])
    if which == "upsample_argmax":
        logits, size, align_corners = argmax_case(seed)
        arguments, options = [logits, list(size), align_corners], {}
    elif which == "upsample_cross_entropy":
        logits, target, options = cross_entropy_case(seed)
        arguments, options = [logits, target], {**options, "reduction": rng.choice(["mean", "sum", "none", "x"])}
    else:
        arguments, options = list(confusion_case(seed)), {}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*range(len(arguments)), *options])
        holder = options if isinstance(name, str) else arguments
        value = holder[name]
        if isinstance(value, torch.Tensor):
            holder[name] = hostile_tensor(value, rng)
        elif isinstance(value, list):
            holder[name] = [
                rng.choice((0, -1, 1, 3, 2**40, 2**62, -(2**63), 2**63)) if rng.random() < 0.7 else each for each in value
            ]
        elif isinstance(value, bool):
            holder[name] = not value
        elif value is None:
            holder[name] = torch.rand(rng.choice([0, 1, 3, arguments[0].shape[1] if arguments[0].ndim > 1 else 1]))
        elif isinstance(value, float):
            holder[name] = rng.choice([math.nan, math.inf, -0.1, 1.1, 0.5, 1e300])
        elif isinstance(value, int):
            holder[name] = rng.choice(INTEGERS)
    result, error = attempt(lambda: getattr(ops_ext, which)(*arguments, **options))
    tensors = [each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor)]
    if error is not None:
        expect(str(error).strip() != "", f"{which}: {type(error).__name__} without a word")
        return REFUSED
    if any(each.is_meta for each in tensors):
        return RIGHT
    expected, error = attempt(lambda: getattr(ops_ext, f"{which}_reference")(*arguments, **options))
    expect(error is None, f"{which} accepted what its reference refuses: {error}")
    expect(result.shape == expected.shape and result.dtype == expected.dtype, f"{which}: {result.shape} {expected.shape}")
    if which == "confusion_matrix":
        expect(torch.equal(result, expected), "another confusion matrix")
    elif which == "upsample_cross_entropy":
        finite = expected.isfinite()
        close = torch.isclose(result.double(), expected.double(), rtol=5e-3, atol=5e-3) | ~finite
        largest = max(each.abs().max().item() for each in tensors[:1])
        expect(bool(close.all()) or largest > 1e4, f"another loss: {result} {expected}")
    else:
        logits, finite = arguments[0].double(), arguments[0].isfinite()
        scores = F.interpolate(logits, tuple(arguments[1]), mode="bilinear", align_corners=arguments[2])
        best, chosen = scores.amax(1), scores.gather(1, result.long()[:, None])[:, 0]
        tolerance = 1e-5 * (1 + logits.where(finite, 0.0).abs().max())
        fine = (result == expected) | (best - chosen <= tolerance) | (best == chosen) | (best.isnan() & chosen.isnan())
        expect(bool(fine.all()), f"{int((~fine).sum())} labels of a lower score")
    return RIGHT


def kernel_raw(rng: random.Random) -> str:
    """A raw operator, whose own checks have to keep it inside memory, with arguments of which one or two are hostile."""
    import ops_ext
    from kernel_cases import argmax_case, confusion_case, cross_entropy_case
    from test_fused import arguments_of

    ops_ext.implementations("cpu")
    blocks = ["stem_block", "bottleneck_block", "pyramid_block", "head_block"]
    which = rng.choice(
        [*blocks, "upsample_argmax", "upsample_cross_entropy", "upsample_cross_entropy_backward", "confusion_matrix"]
    )
    seed = rng.randrange(10**9)
    if which in blocks:
        arguments = arguments_of(which)
    elif which == "upsample_argmax":
        logits, size, align_corners = argmax_case(seed)
        arguments = [logits, *size, align_corners]
    elif which == "confusion_matrix":
        arguments = list(confusion_case(seed))
    else:
        logits, target, options = cross_entropy_case(seed)
        plain = [
            logits,
            target,
            options["weight"],
            options["ignore_index"],
            options["label_smoothing"],
            options["align_corners"],
        ]
        pixel_grad = torch.rand(target.shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        forward = [*plain, rng.random() < 0.5, rng.random() < 0.5]
        arguments = forward if which == "upsample_cross_entropy" else [pixel_grad, *plain]
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(arguments))
        value = arguments[at]
        if isinstance(value, torch.Tensor):
            arguments[at] = hostile_tensor(value, rng)
        elif isinstance(value, bool):
            arguments[at] = not value
        elif isinstance(value, int):
            large = which == "upsample_argmax"  # sizes between would be computed, for hours
            arguments[at] = rng.choice([each for each in INTEGERS if not (large and 256 < abs(each) < 2**40)])
        elif isinstance(value, float):
            arguments[at] = rng.choice([math.nan, math.inf, -1.0, 1e300])
    _, error = attempt(lambda: getattr(torch.ops.ops_ext, which)(*arguments))
    expect(error is None or str(error).strip() != "", f"{which}: {type(error).__name__} without a word")
    return RIGHT if error is None else REFUSED


@functools.cache
def fused_network(variant: str, num_classes: int, half: bool):
    """The module in float64, and its kernels."""
    from ops_ext.fused import FusedFastSCNN
    from test_fused import MEAN, STD, network

    model = network(num_classes, variant=variant)
    return model, FusedFastSCNN(model, MEAN, STD, half)


def kernel_network(rng: random.Random) -> str:
    """The fused network on an image of odd size, or on what is no image."""
    import ops_ext
    from ops_ext import accelerate
    from test_fused import scores_of

    ops_ext.implementations("cpu")
    half = rng.random() < 0.5 and torch.ops.ops_ext.has_bfloat16()
    model, fused = fused_network(rng.choice(list(VARIANTS)), rng.choice([1, 3, 19, 33]), half)
    torch.set_num_threads(rng.choice([1, 2]))
    shape = [rng.choice([1, 1, 2, 3]), rng.randint(32, 90), rng.randint(32, 90)]
    if rng.random() < 0.05:
        shape[rng.choice([1, 2])] = rng.randint(400, 1200)
    pixels = torch.randint(
        0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(rng.randrange(2**31))
    )
    if rng.random() < 0.2:
        segment = accelerate(model.float(), precision=torch.float32)
        hostile = hostile_tensor(pixels, rng)
        if hostile.ndim > 1 and rng.random() < 0.5:
            hostile = hostile[:, : rng.randint(0, 40)]
        result, error = attempt(lambda: segment(hostile))
        model.double()
        if error is not None:
            expect(str(error).strip() != "", f"{type(error).__name__} without a word")
            return REFUSED
        expect(result.shape == hostile.shape[:3] and bool((result < model.args["num_classes"]).all()), "no labels")
        return RIGHT
    if rng.random() < 0.3:  # of other strides
        pixels = rng.choice(
            [pixels.transpose(1, 2), pixels.flip(2), pixels[:, ::1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)]
        )
    with torch.inference_mode():
        scores, labels = fused.logits(pixels).double(), fused(pixels)
    torch.set_num_threads(1)  # PyTorch's threads wait for each other, on a busy machine for minutes
    wanted = scores_of(model, pixels)
    error = (scores - wanted).norm() / wanted.norm()
    # One score alone may be a small difference of large numbers: there PyTorch's own bfloat16 is as far off.
    most = 1e-3 if not half else 0.3 if scores.shape[1] == 1 else 0.03
    expect(scores.shape == wanted.shape and error < most, f"other scores: {error:.2g}")
    expect(labels.shape == pixels.shape[:3] and bool((labels < model.args["num_classes"]).all()), "other labels")
    return RIGHT


def kernel_values(rng: random.Random) -> str:
    """A random case of tests/kernel_cases.py, compared with plain PyTorch in float64."""
    import kernel_cases as cases
    import ops_ext

    ops_ext.implementations("cpu")
    check, case = rng.choice([(cases.check_argmax, cases.argmax_case), (cases.check_cross_entropy, cases.cross_entropy_case),
                              (cases.check_confusion, cases.confusion_case)])  # fmt: skip
    torch.set_num_threads(rng.choice([1, 2]))
    check(torch.ops.ops_ext, torch.device("cpu"), case(rng.randrange(10**9)))
    return RIGHT


def kernels(rng: random.Random, folder: Path) -> str:
    """The kernels of the CPU, on ordinary and on hostile arguments."""
    return rng.choice([kernel_operators, kernel_raw, kernel_raw, kernel_network, kernel_values])(rng)


# --------------------------------------------------------------------------------------------------------------------- runs

KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "images": images,
    "labels": labels,
    "checkpoints": checkpoints,
    "classes": classes,
    "commands": commands,
    "kernels": kernels,
}


def run_case(kind: str, seed: int, folder: Path) -> str:
    """RIGHT, REFUSED, or what went wrong, in a line."""
    try:
        return KINDS[kind](random.Random(f"{kind} {seed}"), folder)
    except Failure as failure:
        return " ".join(str(failure).split()) or "failed"
    except Exception:  # whatever else the project let through
        return " ".join(traceback.format_exc().split())[-1500:]


def run_child(kind: str, seed: int, count: int, library: str | None) -> None:
    """Cases in this process; a line for each before and after it."""
    torch.set_num_threads(1)
    if library:
        from ops_ext import compiler

        compiler.build = lambda backend, extra_flags=(): Path(library)
    else:
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, virtual + MEMORY))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for number in range(seed, seed + count):
            print(f"begin {number}", flush=True)
            outcome = run_case(kind, number, Path(folder))
            print(f"end {number} {outcome.encode(errors='backslashreplace').decode()}", flush=True)


def sanitizer_environment() -> dict[str, str]:
    """For a Python that loads a library with sanitizers. Raises RuntimeError where the compiler has none."""
    from ops_ext import compiler

    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    command = compiler._compiler()
    preload = [
        subprocess.run([*command, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip() for n in names
    ]
    if not all(map(os.path.isabs, preload)):
        raise RuntimeError("the C++ compiler has no sanitizers")
    options = "detect_leaks=0:protect_shadow_gap=0:allocator_may_return_null=1:max_allocation_size_mb=3000"
    return {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}


def sanitized_library() -> Path:
    """The CPU kernels with sanitizers, in the checkout's build folder."""
    from ops_ext import compiler

    with mock.patch.dict(os.environ, {"OPS_EXT_CACHE": str(ROOT / "build")}):
        return compiler.build("cpu", SANITIZERS)


def run_kind(kind: str, seed: int, count: int, most_failures: int = 20) -> tuple[Counter, list[str]]:
    """Cases seed to seed + count - 1 in child processes: how many came out how, and what failed."""
    outcomes, failures, number, end = Counter(), [], seed, seed + count
    environment, extra = {**os.environ, "PYTHONFAULTHANDLER": "1"}, []
    if kind == "kernels":
        environment |= sanitizer_environment()
        extra = ["--library", str(sanitized_library())]
    while number < end and len(failures) < most_failures:
        command = [
            sys.executable,
            __file__,
            "--child",
            "--only",
            kind,
            "--seed",
            str(number),
            "--count",
            str(end - number),
            *extra,
        ]
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0)
            begun, line, limit, why = None, b"", START_S, ""
            while True:
                if not select.select([child.stdout], [], [], limit)[0]:
                    why = f"took more than {limit} s"
                    child.send_signal(signal.SIGABRT)  # Python's fault handler then says where it is
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(30)
                    child.kill()
                    break
                line = child.stdout.readline()
                if not line:
                    break
                limit = LIMIT_S
                word, at, *outcome = line.decode().rstrip("\n").split(" ", 2)
                if word == "begin":
                    begun = int(at)
                elif word == "end":
                    number, begun = int(at) + 1, None
                    outcomes[outcome[0] if outcome[0] in (RIGHT, REFUSED) else "failed"] += 1
                    if outcome[0] not in (RIGHT, REFUSED):
                        failures.append(described(kind, int(at), outcome[0]))
                        print(failures[-1], flush=True)
            status = child.wait()
            if begun is not None or status:
                errors.seek(0)
                text = errors.read().decode(errors="replace")
                marks = ("ERROR: AddressSanitizer", "runtime error:", "Fatal Python error")
                sanitizer = max(*map(text.find, marks), 0)
                at = number if begun is None else begun
                failures.append(described(kind, at, f"{why or f'ended with status {status}'}: {text[sanitizer:][:3000]}"))
                print(failures[-1], flush=True)
                outcomes["failed"] += 1
                number = at + 1
    return outcomes, failures


def described(kind: str, seed: int, what: str) -> str:
    """A failure for people."""
    return f"FAILED {kind} {seed}: {what}\n    python tests/fuzz.py --only {kind} --seed {seed} --count 1"


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, metavar="N", help="cases of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="number of the first case (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of input (default: all)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        run_child(args.only[0], args.seed, args.count, args.library)
        return 0
    report, failed = {}, False
    for kind in args.only:
        start = time.perf_counter()
        outcomes, failures = run_kind(kind, args.seed, args.count)
        seconds = round(time.perf_counter() - start)
        report[kind] = {
            "tried": outcomes.total(),
            **{name: outcomes[name] for name in (RIGHT, REFUSED, "failed")},
            "seconds": seconds,
        }
        print(f"{kind}: {report[kind]}", flush=True)
        failed |= bool(failures)
    print(json.dumps(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
