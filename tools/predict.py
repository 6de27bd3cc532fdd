"""Segments images and videos, named one by one or by their folder.

    python tools/predict.py photo.jpg --weights weights/camvid.pth
    python tools/predict.py PHOTOS drive.mp4 --weights W --out DIR --style labels
    torchrun --nproc_per_node=8 tools/predict.py PHOTOS --weights W               # shares the files out

PHOTOS/a/b.jpg becomes DIR/a/b.jpg_overlay.png, drive.mp4 becomes DIR/drive.mp4_overlay.mp4. Video needs PyAV: pip
install "av>=17.1". The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import OneLineParser, UsageError, exit_status, gathered, start_processes  # isort: skip

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

try:
    import av
except ModuleNotFoundError:  # only video needs it
    av = None

from data import CAMVID, CITYSCAPES, IMAGE_SUFFIXES, Classes, DataError, read_image
from model import MIN_SIZE, CheckpointError, build_from_checkpoint, read_checkpoint
from ops_ext import accelerate

VIDEO_SUFFIXES = tuple(".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .y4m".split())
SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
SUPPORTED = f"supported are {' '.join(SUFFIXES)}"
RESULT = re.compile(r"\.\w+_(overlay|labels)\.(png|mp4)$")  # names that this script gives
BT709, BT601 = 1, 6  # FFmpeg's numbers of the two common YUV matrices
MATRICES = {BT709, 4, 5, BT601, 7, 9}  # those that FFmpeg converts; the others mean unknown, or RGB


# ------------------------------------------------------------------------------------------------------------- painting


@dataclass
class Painter:
    """How label maps are shown."""

    classes: Classes
    style: str = "overlay"  # colours over the image, or "labels" for train ids
    strength: float = 0.4  # of the colours over the image, in [0, 1]
    legend: bool = True  # below images

    def paint(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        """An RGB image and its (H, W) uint8 label map -> RGB image, or train ids with a palette for "labels"."""
        if self.style == "labels":
            painted = Image.fromarray(label)
            painted.putpalette(self.classes.palette().tobytes())  # viewers show colours, programs read train ids
            return painted
        painted = Image.blend(image, self.classes.colour_map(label), self.strength)
        if self.legend:
            strip = legend(self.classes, painted.width, np.unique(label))
            painted = Image.fromarray(np.concatenate([painted, strip]))
        return painted


def legend(classes: Classes, width: int, labels: Iterable[int]) -> Image.Image:
    """A table of the colours and names of some classes, `width` pixels wide."""
    size = max(12, width // 40)  # of the letters, in pixels: readable where a large picture is shown small
    font, row = ImageFont.load_default(size), 2 * size
    shown = [index for index in labels if index < len(classes.names)]
    # Pillow's own font has little more than ASCII.
    names = [classes.names[index] if classes.names[index].isascii() else f"class {index}" for index in shown]
    column = row + size + math.ceil(max(map(font.getlength, names), default=0))
    columns = max(1, width // column)
    table = Image.new("RGB", (width, row * math.ceil(len(names) / columns)), "white")
    draw = ImageDraw.Draw(table)
    for i, (name, index) in enumerate(zip(names, shown)):
        x, y = i % columns * column + size // 2, i // columns * row + size // 2
        draw.rectangle((x, y, x + size, y + size), tuple(classes.colours[index]), "black")
        draw.text((x + 3 * size // 2, y + size // 2), name, "black", font, "lm")
    return table


# ---------------------------------------------------------------------------------------------------------------- video


def first_frame(path: Path):
    """The first frame of a video, with a matrix, in 4:2:0, which needs even sizes. Raises DataError for no video."""
    with av.open(path) as container:
        frame = next(container.decode(video=0), None) if container.streams.video else None
    if frame is None:
        raise DataError(f"{path}: holds no video")
    return in_yuv420(frame, frame.width + frame.width % 2, frame.height + frame.height % 2)


def in_yuv420(frame, width: int, height: int):
    """A frame in 4:2:0; one without a YUV matrix that FFmpeg converts gets what players assume for its size."""
    if frame.colorspace not in MATRICES:
        frame.colorspace = BT709 if frame.height >= 720 else BT601
    return frame.reformat(width, height, format="yuv420p")


def planes(frame) -> list[np.ndarray]:
    """Views of a frame's Y, U and V, (height, width) uint8."""
    return [np.frombuffer(each, np.uint8).reshape(each.height, -1)[:, : each.width] for each in frame.planes]


def yuv_colours(painter: Painter, first) -> np.ndarray:
    """(3, 256) uint16: 256 times Y, U and V of what each train id adds to a pixel, with the matrix of the frame."""
    frame = type(first).from_ndarray(painter.classes.palette()[None], format="rgb24")
    options = {"dst_colorspace": first.colorspace, "dst_color_range": first.color_range}
    colours = frame.to_ndarray(format="yuv444p", **options)[:, 0].astype(int)
    return (round(256 * painter.strength) * colours + 128).astype(np.uint16)


def add_streams(sink, container, first) -> tuple:
    """The video stream of `sink`, and its streams of sound by their indices in `container`.

    Sound is copied where MP4 takes it. Colours are tagged as those of the first frame.
    """
    source, size = container.streams.video[0], (first.width, first.height)
    options = {"preset": "ultrafast", "crf": "23"}
    video = sink.add_stream("libx264", rate=source.average_rate or 25, options=options)
    video.width, video.height = size[::-1] if round(first.rotation / 90) % 2 else size
    video.pix_fmt, video.codec_context.time_base = "yuv420p", source.time_base
    for tag in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(video.codec_context, tag, getattr(first, tag))
    sound = {}
    for stream in container.streams.audio:
        try:
            sound[stream.index] = sink.add_stream_from_template(stream)
        except ValueError as error:
            report(f"{container.name}: sound is left out ({error})")
    return video, sound


def demux_frames(container, sink, sound: dict) -> Iterator:
    """Yields the frames of a video, at increasing times, and copies packets of sound to `sink` on the way."""
    video = container.streams.video[0]
    video.thread_type = "AUTO"
    damaged, last, step = 0, None, 1 / (video.average_rate or 25) / video.time_base
    for packet in container.demux():
        index = packet.stream.index
        if index in sound and packet.dts is not None:
            packet.stream = sound[index]
            sink.mux(packet)
        elif index == video.index:
            try:
                frames = packet.decode()
            except av.FFmpegError:
                damaged, frames = damaged + 1, []
            for frame in frames:
                if last is not None and (frame.pts is None or frame.pts <= last):
                    frame.pts = last + max(1, round(step))  # AVI has no times, joined recordings start again at 0
                last = frame.pts
                yield frame
    if damaged:
        report(f"{container.name}: damaged, {damaged} packets that cannot be decoded are left out")


# ----------------------------------------------------------------------------------------------------------- prediction


def in_order(function: Callable, items: Iterable, threads: int) -> Iterator[Future]:
    """function(item) for each item in worker threads; yields the futures in the order of the items.

    At most threads + 2 items are under way, so that a long video does not fill the memory.
    """
    under_way = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == threads + 2:
                yield under_way.popleft()
        yield from under_way


@dataclass
class Predictor:
    """Segments files, with a thread for each image or frame."""

    segment: Callable[[Tensor], Tensor]  # of ops_ext.accelerate
    painter: Painter
    image_hw: Sequence[int] | None  # size of the training images: others are resized to as many pixels; None: not
    threads: int
    quiet: bool  # no progress bars

    def segment_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H, W) uint8 label map, which the network makes of the resized image."""
        height, width = image.shape[:2]
        scale = math.sqrt(math.prod(self.image_hw) / (height * width)) if self.image_hw else 1.0
        size = [max(MIN_SIZE, round(side * scale)) for side in (width, height)]
        if size != [width, height]:
            image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        return self.segment(torch.from_numpy(image)[None], (height, width))[0].cpu().numpy()

    def segment_picture(self, paths: tuple[Path, Path]) -> None:
        """Image file to image file."""
        source, target = paths
        image = read_image(source)
        painted = self.painter.paint(image, self.segment_image(np.array(image)))
        target.parent.mkdir(parents=True, exist_ok=True)
        painted.save(target, compress_level=1)  # a quarter of the time for a tenth more bytes

    def segment_frame(self, frame, first, colours: np.ndarray):
        """A decoded frame -> the painted frame, upright; `colours` are `yuv_colours`."""
        turns = round(first.rotation / 90)  # to the left
        frame = in_yuv420(frame, first.width, first.height)
        label = self.segment_image(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
        painted = type(frame)(label.shape[1], label.shape[0], "yuv420p")
        keep = np.uint16(256 - round(256 * self.painter.strength))
        for i, (source, target) in enumerate(zip(planes(frame), planes(painted))):
            step = 2 if i else 1  # U and V have half the resolution
            mixed = np.multiply(np.rot90(source, turns), keep, dtype=np.uint16)
            mixed += colours[i].take(label[::step, ::step])
            target[:] = mixed >> 8
        painted.pts, painted.time_base = frame.pts, frame.time_base
        return painted

    def segment_video(self, source: Path, target: Path) -> int:
        """Video file to video file; the number of frames."""
        count = 0
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            first = first_frame(source)
            with av.open(source) as container:
                # Recordings may start at any time; "unofficial" allows, for instance, MP3 of 8 kHz.
                options = {"output_ts_offset": f"{-(container.start_time or 0)}us", "strict": "unofficial"}
                with av.open(target, "w", "mp4", options) as sink:
                    video, sound = add_streams(sink, container, first)
                    frames = demux_frames(container, sink, sound)
                    segment = partial(self.segment_frame, first=first, colours=yuv_colours(self.painter, first))
                    done = in_order(segment, frames, self.threads)
                    total = container.streams.video[0].frames
                    for future in tqdm(done, source.name, total, False, disable=self.quiet):
                        sink.mux(video.encode(future.result()))
                        count += 1
                    sink.mux(video.encode(None))
                    if count < 0.9 * total and "mp4" in container.format.name:  # AVI's numbers may be wrong
                        report(f"{source}: damaged, it ends after {count} of {total} frames")
        except av.FFmpegError as error:
            target.unlink(missing_ok=True)
            raise DataError(f"{source}: cannot be segmented ({error.strerror}); convert it, or leave it out") from None
        return count


# ---------------------------------------------------------------------------------------------------------------- files


def find_files(paths: Sequence[str], out: Path, style: str) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Images and videos at or below `paths`, each with the file below `out` that it becomes."""
    images, videos, sources = [], [], {}
    for given in (Path(path).expanduser() for path in paths):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such image, video or folder")
        if given.is_file() and given.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{given}: {given.suffix or 'no suffix'} is not read, export it as JPEG; {SUPPORTED}")
        files, root = (files_below(given), given) if given.is_dir() else ([given], given.parent)
        for file in files:
            is_video = file.suffix.lower() in VIDEO_SUFFIXES
            # The file's own suffix stays in the name: the results of a.jpg and a.png must differ.
            name = f"{file.name}_{style}{'.mp4' if is_video else '.png'}"
            target = out / file.relative_to(root).with_name(name)
            if target in sources:
                raise UsageError(f"{sources[target]} and {file} would both become {target}; give one another --out")
            sources[target] = file
            (videos if is_video else images).append((file, target))
    return images, videos


def files_below(folder: Path) -> list[Path]:
    """Images and videos below a folder, without results of this script; a line on stderr says what else is there."""
    files, left_out = [], Counter()
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if RESULT.search(path.name) or not path.is_file():
            continue
        if suffix in SUFFIXES:
            files.append(path)
        else:
            left_out[suffix or "without suffix"] += 1
    others = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common()) or "nothing"
    if not files:
        raise DataError(f"{folder}: no images or videos, but {others}; {SUPPORTED}")
    if left_out and os.environ.get("RANK", "0") == "0":
        report(f"{folder}: left out {others}")
    return files


def successes(calls: Iterable[Callable]) -> list:
    """The results of the calls, one for each file, that succeed; the others are a line on stderr each."""
    results = []
    for call in calls:
        try:
            results.append(call())
        except (DataError, OSError) as error:
            report(error)
    return results


def report(message: object) -> None:
    tqdm.write(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/predict.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="image, video, or folder with such")
    add("--weights", required=True, metavar="FILE",
        help="checkpoint of train.py, or of Tramac, SegmenTron, MMSegmentation")  # fmt: skip
    add("--out", type=Path, default="runs/predictions", metavar="DIR", help="folder to write to (default: %(default)s)")
    add("--style", choices=("overlay", "labels"), default="overlay",
        help="colours over the image, or a palette image of train ids (default: %(default)s)")  # fmt: skip
    add("--strength", type=float, default=0.4, help="of the overlay; 1 shows only colours (default: %(default)s)")
    add("--legend", action=argparse.BooleanOptionalAction, default=True, help="name the colours below each image")
    add("--resize", action=argparse.BooleanOptionalAction, default=True,
        help="give the network images of as many pixels as those that it was trained on")  # fmt: skip
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, or else the CPU)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Segments the files that the command line names; the exit status."""
    args = get_args_parser().parse_args(argv)
    if not 0 <= args.strength <= 1:
        raise UsageError(f"--strength is {args.strength}, expected 0 to 1")
    images, videos = find_files(args.paths, args.out, args.style)
    if videos:
        if av is None:
            raise UsageError('video needs the package av: pip install "av>=17.1"')
        if args.style == "labels":
            raise UsageError(f"--style labels is for images: ffmpeg -i {videos[0][0]} %06d.png makes images of a video")
    checkpoint = read_checkpoint(args.weights)
    # A peer's weights have no class names; 19 classes are those of Cityscapes.
    classes = Classes.from_dict(checkpoint["classes"]) if "classes" in checkpoint else CITYSCAPES
    model = build_from_checkpoint(checkpoint, args.weights, len(classes.names))
    known = {CITYSCAPES.names: (1024, 2048), CAMVID.names: (360, 480)}  # for files that do not tell
    image_hw = checkpoint.get("image_hw", known.get(classes.names)) if args.resize else None
    Image.MAX_IMAGE_PIXELS = None  # the user chose the pictures
    device, rank, world_size = start_processes(args.device, timeout_minutes=24 * 60)  # some get the longer videos

    # On the CPU, a thread for each image is faster than several threads for one.
    threads = min(torch.get_num_threads(), 8)  # each holds an image: more mostly fill the memory
    torch.set_num_threads(1)
    predictor = Predictor(
        segment=accelerate(model, device=device),
        painter=Painter(classes, args.style, args.strength, args.legend),
        image_hw=image_hw,
        threads=threads,
        quiet=rank != 0 or not sys.stderr.isatty(),
    )
    share = images[rank::world_size]
    done = tqdm(in_order(predictor.segment_picture, share, threads), "images", len(share), disable=predictor.quiet)
    written = gathered(successes(future.result for future in done), world_size)
    start = time.perf_counter()
    frames = gathered(successes(partial(predictor.segment_video, *v) for v in videos[rank::world_size]), world_size)
    fps = round(sum(frames) / (time.perf_counter() - start), 1) if frames else None

    failed = len(images) + len(videos) - len(written) - len(frames)
    if rank == 0:
        if written and args.style == "labels" and not (args.out / "classes.json").exists():  # a data set's own
            (args.out / "classes.json").write_text(json.dumps({"names": classes.names, "colours": classes.colours}))
        scale = "{}x{} pixels, as it was trained on".format(*image_hw) if image_hw else "their own size"
        wrote = f"wrote {len(written)} images and {len(frames)} videos to {args.out}; the network saw them at {scale}"
        print(f"{failed} files failed, see above; {wrote}" if failed else wrote)
        result = {"images": len(written), "videos": len(frames), "frames": sum(frames)}
        print(json.dumps({**result, "out": str(args.out), "style": args.style, "fps": fps}), flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that a video ends well
    sys.exit(exit_status(main, (DataError, CheckpointError)))
