"""eval.py --predict: pictures, folders, videos and raw frames, what becomes of them, and of those that are damaged."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import ops_ext
from conftest import ROOT, last_json, run_script
from data import CAMVID, Classes
from eval import Painter, VideoFrames, VideoPainter, exit_status, legend
from model import load_weights

WEIGHTS = ROOT / "weights/camvid.pth"
needs_ffmpeg = pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="no ffmpeg on PATH")


@pytest.fixture(scope="module")
def segment():
    return ops_ext.accelerate(load_weights(WEIGHTS), device="cpu")


def predict(*flags) -> int:
    """The exit status of eval.py in this process."""
    argv = ["--weights", str(WEIGHTS), "--device", "cpu", *map(str, flags)]
    return exit_status("eval.py", lambda: evaluation.main(argv))


def ffmpeg(*arguments, **kwargs) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, **kwargs).stdout


def make_video(path, width=96, height=64, frames=12, rate="25", codec=("-c:v", "ffv1"), audio=False, extra=()):
    """Moving shapes; lossless unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"testsrc2=size={width + width % 2}x{height + height % 2}:rate={rate},crop={width}:{height}:exact=1"
    sound = ("-f", "lavfi", "-i", "sine=frequency=440", "-c:a", "aac", "-shortest") if audio else ()
    ffmpeg("-f", "lavfi", "-i", source, *sound, "-frames:v", frames, "-pix_fmt", "yuv420p", *codec, *extra, f"file:{path}")
    return path


def facts(path) -> dict:
    """Of a video's first stream of pictures, frames counted, and the codecs of its sound."""
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", f"file:{path}"]
    streams = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["streams"]
    video = next(s for s in streams if s["codec_type"] == "video")
    return {
        "size": (video["width"], video["height"]),
        "frames": int(video["nb_read_frames"]),
        "rate": Fraction(video["r_frame_rate"]),
        "codec": video["codec_name"],
        "audio": [s["codec_name"] for s in streams if s["codec_type"] == "audio"],
    }


def planes_of(path, height, width) -> np.ndarray:
    """(frames, bytes of a frame) of a video in YUV 4:2:0."""
    raw = ffmpeg("-i", f"file:{path}", "-vf", "setpts=N/FRAME_RATE/TB", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2))


def labels_of(segment, planes, height, width) -> np.ndarray:
    """What the network says of frames in BT.601."""
    rgb = [
        ops_ext.yuv420_to_rgb(torch.from_numpy(each.copy()), torch.empty((height, width, 3), dtype=torch.uint8))
        for each in planes
    ]
    return torch.cat([segment(each[None]) for each in rgb]).numpy()


def no_children() -> bool:
    """Whether no process of this one's is left, running or ended but not waited for."""
    children = subprocess.run(["ps", "-o", "comm=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return "ffmpeg" not in children


# ---------------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture(params=["kernel", "reference"])
def with_kernels(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(ops_ext, "_compiled", lambda device: False)


@pytest.mark.parametrize("height, width", [(64, 256), (33, 129), (2, 2), (1, 1), (51, 300)])
@pytest.mark.parametrize("kr, kb, full_range", [(0.299, 0.114, False), (0.2126, 0.0722, True)])
def test_yuv_becomes_rgb_as_the_standard_says(with_kernels, height, width, kr, kb, full_range):
    h, w = (height + 1) // 2, (width + 1) // 2
    planes = torch.randint(0, 256, (height * width + 2 * h * w,), dtype=torch.uint8)
    got = ops_ext.yuv420_to_rgb(planes, torch.empty((height, width, 3), dtype=torch.uint8), kr, kb, full_range).double()
    y, uv = planes[: height * width].view(height, width).double(), planes[height * width :].view(2, h, w).double()
    y, uv = (y / 255, (uv - 128) / 255) if full_range else ((y - 16) / 219, (uv - 128) / 224)
    u, v = uv.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)  # by the definition of Y
    expected = (255 * torch.stack([red, green, blue], -1)).clamp(0, 255)
    assert (got - expected).abs().max() <= 0.51  # rounded once


@pytest.mark.parametrize(
    "shape, step, out", [((48, 200), 1, (48, 200)), ((48, 200), 2, (24, 100)), ((33, 67), 1, (34, 68)), ((33, 67), 2, (17, 34))]
)
@pytest.mark.parametrize("keep", [0, 115, 256])
def test_colours_lie_over_a_plane(with_kernels, shape, step, out, keep):
    labels = torch.randint(0, 12, (shape[0] // 3 + 1, shape[1] // 3 + 1), dtype=torch.uint8)
    labels = labels.repeat_interleave(3, 0).repeat_interleave(3, 1)[: shape[0], : shape[1]].contiguous()
    plane = torch.randint(0, 256, ((shape[0] + step - 1) // step, (shape[1] + step - 1) // step), dtype=torch.uint8)
    colours = torch.arange(256).flip(0) * (256 - keep) // 256
    got = ops_ext.overlay_plane(plane, labels, colours.byte(), keep, torch.empty(out, dtype=torch.uint8), step)
    for y, x in ((0, 0), (out[0] - 1, out[1] - 1), (5, 7), (out[0] // 2, out[1] - 1), (out[0] - 1, 3)):
        pixel = plane[min(y, plane.shape[0] - 1), min(x, plane.shape[1] - 1)].item()
        label = labels[min(y * step, shape[0] - 1), min(x * step, shape[1] - 1)].item()
        assert got[y, x] == (pixel * keep + 128) // 256 + colours[label]
    in_place = plane.clone()
    if out == tuple(plane.shape):
        assert torch.equal(ops_ext.overlay_plane(in_place, labels, colours.byte(), keep, in_place, step), got)
    # Every pixel, by way of the other implementation.
    assert torch.equal(ops_ext.overlay_plane_reference(plane, labels, colours.byte(), keep, got.clone(), step), got)


def test_wrong_planes_are_refused():
    out = torch.empty((4, 6, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected 36 contiguous uint8 for 4x6"):
        ops_ext.yuv420_to_rgb(torch.zeros(35, dtype=torch.uint8), out)
    with pytest.raises(ValueError, match=r"expected contiguous uint8 \(H, W, 3\)"):
        ops_ext.yuv420_to_rgb(torch.zeros(36, dtype=torch.uint8), out.float())


# --------------------------------------------------------------------------------------------------------------- pictures


def test_styles_of_a_picture():
    label = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.new("RGB", (2, 2), (200, 100, 0))
    three = Classes(("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), ("x", "x", "y"))
    pictures = {style: np.array(Painter(three, style, 0.25).picture(image, label)) for style in evaluation.STYLES}
    assert pictures["labels"].tolist() == label.tolist()
    assert pictures["colour"].tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    colours = pictures["colour"].astype(float)
    assert np.abs(pictures["overlay"] - (0.75 * np.array([200, 100, 0]) + 0.25 * colours)).max() <= 1


def test_the_legend_names_what_occurs_and_hides_nothing():
    label = np.full((40, 200), 3, np.uint8)
    image = Image.new("RGB", (200, 40), (9, 9, 9))
    one = Painter(CAMVID, "colour", legend=True).picture(image, label)
    bare = Painter(CAMVID, "colour").picture(image, label)
    assert np.array_equal(np.array(one)[:40], np.array(bare)) and one.width == 200 and one.height > 40
    colours = {tuple(c) for c in np.array(one)[40:].reshape(-1, 3).tolist()}
    assert CAMVID.colours[3] in colours and not colours & (set(CAMVID.colours) - {CAMVID.colours[3]} - {(128, 128, 128)})
    every = legend(CAMVID, 200, range(11))
    assert every.height % 2 == 0 and every.height > legend(CAMVID, 2000, range(11)).height  # lines are broken
    assert set(CAMVID.colours) <= {tuple(c) for c in np.array(every).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("style", evaluation.STYLES)
def test_a_folder_of_all_sorts(tmp_path, capsys, segment, style):
    source, out = tmp_path / "in put", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for name in ("a.png", "sub/ä b.png", "sub/-x.png", "a.bmp"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(source / name)
    Image.fromarray(pixels[:, :, 0]).resize((97, 33)).save(source / "grey.jpg")
    (source / "notes.txt").write_text("nothing to see")
    torch.set_num_threads(2)  # two pictures at once
    try:
        assert predict("--predict", source, "--out", out, "--style", style) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert last_json(capsys.readouterr().out) | {"out": ""} == {
        "images": 5, "videos": 0, "frames": 0, "out": "", "style": style, "fps": None
    }  # fmt: skip
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names == {f"{name}_{style}.png" for name in ("a.png", "sub/ä b.png", "sub/-x.png", "a.bmp", "grey.jpg")}
    label = segment(torch.from_numpy(pixels)[None])[0].numpy()
    expected = np.array(Painter(CAMVID, style).picture(Image.fromarray(pixels), label))
    assert np.array_equal(np.array(Image.open(out / f"sub/ä b.png_{style}.png")), expected)


def test_one_bad_picture_does_not_waste_the_others(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    Image.new("RGB", (40, 20)).save(tmp_path / "2.png")
    assert predict("--predict", tmp_path, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert (
        len(errors) == 3 and "1.png: cannot be decoded" in errors[0] and "2.png: 40x20 pixels, expected at least" in errors[1]
    )
    assert errors[2] == f"eval.py: 2 of 4 files could not be segmented, see above; the others are in {tmp_path / 'out'}"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0.png_overlay.png", "3.png_overlay.png"}


def test_results_below_the_folder_are_not_segmented_again(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for _ in range(2):
        assert predict("--predict", tmp_path, "--out", tmp_path / "out") == 0
        assert last_json(capsys.readouterr().out)["images"] == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png_overlay.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--predict", "{}"], "no pictures in this folder, and no videos"),
        (["--predict", "{}/none.mp4"], "none.mp4: no such picture, video or folder"),
        (["--predict", "-", "--size", "64", "64"], "--predict - and --out - go together"),
        (["--predict", "{}", "--out", "-"], "--predict - and --out - go together"),
        (["--predict", "-", "--out", "-"], "needs the frames' --size H W in pixels, of at least 32 each"),
        (["--predict", "-", "--out", "-", "--size", "31", "64"], "--size is 31 64, expected at least 32 pixels each"),
        (["--predict", "-", "--out", "-", "--size", "64", "64", "--legend"], "--legend makes pictures higher"),
        (["--predict", "{}", "--legend", "--style", "labels"], "--legend names colours"),
        (["--predict", "{}", "--strength", "1.5"], "--strength is 1.5, expected at most 1"),
        (["--predict", "{}", "--strength", "nan"], "--strength is nan, expected at most 1"),
        (["--predict", "{}", "--scales", "0.5"], "--predict is of one scale; leave out --scales, --flip and --window"),
        (["--predict", "{}", "--flip"], "--predict is of one scale"),
        (["--predict", "{}", "--window", "64", "64"], "--predict is of one scale"),
        (["--predict", "{}", "--preset", "hasty"], "argument --preset: invalid choice: 'hasty'"),
        (["--predict", "{}", "--out", "{}/a.PNG"], "a.PNG is the folder that --predict writes to, not the file"),
        (["--predict", "{}", "--out", "{}/a.mp4"], "a.mp4 is the folder that --predict writes to, not the file"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, flags, message):
    assert predict(*(flag.format(tmp_path) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("count, said", [(1, "wrote 1 overlay to "), (2, "wrote 2 overlays to ")])
def test_what_was_written_is_counted(tmp_path, capsys, count, said):
    for i in range(count):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    assert predict("--predict", tmp_path, "--out", tmp_path / "out") == 0
    assert said in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert predict("--predict", tmp_path / "pipe.mp4", "--out", tmp_path / "out") == 2
    assert "pipe.mp4 is no regular file and no folder; --predict - takes raw frames" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ video


@needs_ffmpeg
@pytest.mark.parametrize("rate", ["30000/1001", "12"])
def test_every_frame_of_a_video_has_its_labels(tmp_path, capsys, segment, rate):
    path = make_video(tmp_path / "clip.mkv", rate=rate, frames=30, audio=True)
    torch.set_num_threads(2)  # two frames at once
    try:
        assert predict("--predict", path, "--out", tmp_path / "out", "--style", "labels") == 0
    finally:
        torch.set_num_threads(1)
    result = last_json(capsys.readouterr().out)
    assert result["videos"] == 1 and result["frames"] == 30 and result["fps"] > 0
    written = facts(tmp_path / "out/clip_labels.mkv")
    assert written == {"size": (96, 64), "frames": 30, "rate": Fraction(rate), "codec": "ffv1", "audio": []}
    got = np.frombuffer(ffmpeg("-i", tmp_path / "out/clip_labels.mkv", "-pix_fmt", "gray", "-f", "rawvideo", "-"), np.uint8)
    expected = labels_of(segment, planes_of(path, 64, 96), 64, 96)
    assert len(np.unique(expected)) > 2 and np.array_equal(got.reshape(30, 64, 96), expected)
    assert no_children()


@needs_ffmpeg
def test_an_overlaid_video_keeps_frames_rate_size_and_sound(tmp_path, capsys, segment):
    path = make_video(tmp_path / "clip.mp4", rate="30000/1001", frames=30, codec=("-c:v", "libx264", "-qp", "0"), audio=True)
    assert predict("--predict", path, "--out", tmp_path) == 0
    written = facts(tmp_path / "clip_overlay.mp4")
    assert written == {"size": (96, 64), "frames": 30, "rate": Fraction(30000, 1001), "codec": "h264", "audio": ["aac"]}
    # As the eye sees it: RGB of the source blended with the labels' colours, within what the codec loses.
    planes = planes_of(path, 64, 96)
    labels = labels_of(segment, planes, 64, 96)
    kinds = [ffmpeg("-i", p, "-pix_fmt", "rgb24", "-f", "rawvideo", "-") for p in (path, tmp_path / "clip_overlay.mp4")]
    before, after = (np.frombuffer(kind, np.uint8).reshape(30, 64, 96, 3).astype(float) for kind in kinds)
    expected = 0.45 * before + 0.55 * CAMVID.palette()[labels]
    errors = np.abs(after - expected).mean((1, 2, 3))
    assert errors.max() < 12 and np.abs(after - before).mean() > 3 * errors.mean()
    assert {p.name for p in tmp_path.iterdir()} == {"clip.mp4", "clip_overlay.mp4"}


@needs_ffmpeg
@pytest.mark.parametrize("style, strength", [("overlay", 0.55), ("overlay", 0.0), ("colour", 0.55)])
@pytest.mark.parametrize("width, height", [(96, 64), (67, 33)])
def test_colours_laid_over_a_frame_are_those_of_a_picture(tmp_path, style, strength, width, height):
    path = make_video(tmp_path / "clip.mkv", width, height, frames=1)
    with contextlib.closing(VideoFrames(path)) as source:
        in_yuv = VideoPainter(Painter(CAMVID, style, strength), source)
        slot = in_yuv.slot()
        assert source.read(slot.given)
    rgb = in_yuv.to_rgb(slot)[0].numpy().copy()
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 // 2 * 2 :] = 8
    in_yuv.paint(slot, label)
    even = height + height % 2, width + width % 2
    assert slot.result[:6].tobytes() == b"FRAME\n" and len(slot.result) == 6 + even[0] * even[1] * 3 // 2
    planes = torch.from_numpy(slot.result[6:].copy())
    got = ops_ext.yuv420_to_rgb(planes, torch.empty((*even, 3), dtype=torch.uint8)).numpy()[:height, :width].astype(float)
    expected = np.array(Painter(CAMVID, style, strength).picture(Image.fromarray(rgb), label)).astype(float)
    difference = np.abs(got - expected)
    assert np.median(difference) <= 2 and (difference > 8).mean() < 0.1  # colours beyond the range of RGB are cut there first


@needs_ffmpeg
def test_odd_sizes_get_an_even_one_and_a_legend_more_rows(tmp_path):
    path = make_video(tmp_path / "odd.mkv", 67, 45)
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    assert facts(tmp_path / "out/odd_overlay.mp4")["size"] == (68, 46)
    assert predict("--predict", path, "--out", tmp_path / "out", "--style", "labels") == 0
    assert facts(tmp_path / "out/odd_labels.mkv")["size"] == (67, 45)
    assert predict("--predict", path, "--out", tmp_path / "out", "--legend", "--style", "colour") == 0
    width, height = facts(tmp_path / "out/odd_colour.mp4")["size"]
    assert (width, height) == (68, 46 + legend(CAMVID, 68, range(11)).height)


@needs_ffmpeg
def test_a_turned_video_stands_upright(tmp_path):
    path = make_video(tmp_path / "flat.mp4", 96, 64, codec=("-c:v", "libx264"))
    turned = tmp_path / "turned.mp4"
    ffmpeg("-i", path, "-c", "copy", "-metadata:s:v", "rotate=90", turned)
    if b"rotation" not in subprocess.run(["ffprobe", "-v", "error", "-show_streams", turned], capture_output=True).stdout:
        ffmpeg("-display_rotation", "90", "-i", path, "-c", "copy", turned)  # newer ffmpeg
    assert predict("--predict", turned, "--out", tmp_path / "out") == 0
    assert facts(tmp_path / "out/turned_overlay.mp4")["size"] == (64, 96)


@needs_ffmpeg
@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_irregular_frames_are_put_to_their_average_rate(tmp_path, container):
    """10 frames at 100 a second, then 30 at 10: 3 seconds, of which MKV says 100 a second throughout."""
    path = tmp_path / f"vfr.{container}"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=100", "-frames:v", 40, "-vf", "select='not(mod(n,10))+lt(n,10)'",
        "-vsync", "vfr", "-c:v", "ffv1" if container == "mkv" else "libx264", path,
    )  # fmt: skip
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    written = facts(tmp_path / "out/vfr_overlay.mp4")
    assert 35 <= written["frames"] <= 45 and 2.8 <= written["frames"] / written["rate"] <= 3.3


@needs_ffmpeg
def test_packets_without_a_frame_do_not_make_frames_irregular(tmp_path):
    """VP8's alternate references: packets that are never shown, here 318 of 300 frames."""
    path, log = tmp_path / "clip.webm", tmp_path / "log"
    source = ("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=30", "-frames:v", 120, "-c:v", "libvpx", "-b:v", "300k")
    source += ("-auto-alt-ref", 1, "-lag-in-frames", 16, "-passlogfile", log)
    ffmpeg(*source, "-pass", 1, "-f", "null", "-")
    ffmpeg(*source, "-pass", 2, path)
    count = ["ffprobe", "-v", "error", "-count_packets", "-show_entries", "stream=nb_read_packets", "-of", "csv=p=0", path]
    assert int(subprocess.run(count, check=True, capture_output=True).stdout) > 120
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    written = facts(tmp_path / "out/clip_overlay.mp4")
    assert (written["frames"], written["rate"]) == (120, 30)


@pytest.mark.parametrize("field_order, rate", [("tt", "25/1"), ("progressive", "50")])
def test_the_packets_of_interlaced_video_may_be_fields(tmp_path, monkeypatch, field_order, rate):
    """As in broadcasts (H.264, PAFF), which no encoder here writes: what ffprobe says of them is written out."""
    video = {"codec_type": "video", "field_order": field_order, "r_frame_rate": "50/1", "avg_frame_rate": "25/1"}
    (tmp_path / "facts").write_text(json.dumps({"streams": [video]}))
    (tmp_path / "packets").write_text("\n".join(f"{0.02 * i:.6f}" for i in range(100)))
    fake = tmp_path / "ffprobe"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *packet=*) cat {tmp_path}/packets;; *) cat {tmp_path}/facts;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert evaluation.probe(tmp_path / "a.ts")["avg_frame_rate"] == rate


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "ts", "mpg", "flv", "ogv", "wmv", "y4m"])
def test_frames_at_a_constant_rate_are_each_taken_once(tmp_path, capsys, suffix):
    """Sound that goes on after them does not count; where it starts before them, the first is shown from its start on."""
    path = tmp_path / f"clip.{suffix}"
    sound = () if suffix == "y4m" else ("-f", "lavfi", "-i", "sine=frequency=440:duration=4", "-map", "0:v", "-map", "1:a")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=25:duration=2", *sound, path)
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    assert last_json(capsys.readouterr().out)["frames"] == 50
    written = facts(tmp_path / "out/clip_overlay.mp4")
    assert written["frames"] == 50 + (suffix in ("flv", "wmv")) and written["rate"] == 25


@needs_ffmpeg
def test_a_video_trimmed_without_encoding_is_not_damaged(tmp_path):
    """Its file keeps the frames before the cut that others need, and an edit list hides them."""
    whole = make_video(tmp_path / "long.mp4", frames=150, codec=("-c:v", "libx264", "-g", "50"))
    ffmpeg("-ss", "3.9", "-i", whole, "-c", "copy", tmp_path / "trimmed.mp4")
    with contextlib.closing(VideoFrames(tmp_path / "trimmed.mp4")) as source:
        assert int(source.facts["nb_frames"]) == 100 and source.total in (52, 53) and isinstance(source.total, int)
    assert predict("--predict", tmp_path / "trimmed.mp4", "--out", tmp_path / "out") == 0
    assert facts(tmp_path / "out/trimmed_overlay.mp4")["frames"] in (52, 53)


@needs_ffmpeg
def test_no_frame_is_lost_where_the_resolution_changes(tmp_path):
    for width in (160, 96):
        make_video(tmp_path / f"{width}.ts", width, frames=20, codec=("-c:v", "libx264"))
    (tmp_path / "both.ts").write_bytes((tmp_path / "160.ts").read_bytes() + (tmp_path / "96.ts").read_bytes())
    assert predict("--predict", tmp_path / "both.ts", "--out", tmp_path / "out") == 0
    written = facts(tmp_path / "out/both_overlay.mp4")
    assert (written["frames"], written["rate"], written["size"]) == (40, 25, (160, 64))


@needs_ffmpeg
@pytest.mark.parametrize(
    "name, codec", [("a.mov", ("png", "rgb24")), ("a.mp4", ("libx264rgb", "bgr0")), ("a.mkv", ("ffv1", "gbrp"))]
)
@pytest.mark.parametrize("height, matrix", [(720, "bt709"), (64, "smpte170m")])
def test_colours_of_video_in_rgb_stay(tmp_path, name, codec, height, matrix):
    """A saturated red and green, the network's colours at no strength; players read YUV with the matrix of its size or tag."""
    image = Image.new("RGB", (96, height), (220, 30, 20))
    image.paste((20, 200, 60), (48, 0, 96, height))
    image.save(tmp_path / "a.png")
    ffmpeg("-loop", 1, "-i", tmp_path / "a.png", "-frames:v", 3, "-c:v", codec[0], "-pix_fmt", codec[1], tmp_path / name)
    assert predict("--predict", tmp_path / name, "--out", tmp_path / "out", "--strength", 0) == 0
    result = tmp_path / "out/a_overlay.mp4"
    assert evaluation.probe(result)["color_space"] == matrix
    planes = torch.from_numpy(planes_of(result, height, 96)[0].copy())
    kr, kb = (0.2126, 0.0722) if matrix == "bt709" else (0.299, 0.114)
    rgb = ops_ext.yuv420_to_rgb(planes, torch.empty((height, 96, 3), dtype=torch.uint8), kr, kb).numpy().astype(int)
    assert np.abs(rgb[height // 2, [20, 76]] - [[220, 30, 20], [20, 200, 60]]).max() <= 6


@needs_ffmpeg
def test_tags_of_colours_that_say_nothing_are_left_out(tmp_path):
    reserved = "h264_metadata=matrix_coefficients=3:colour_primaries=3:transfer_characteristics=3"
    path = make_video(tmp_path / "a.mp4", codec=("-c:v", "libx264"), extra=("-bsf:v", reserved))
    assert evaluation.probe(path)["color_space"] == "reserved"
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    assert facts(tmp_path / "out/a_overlay.mp4")["frames"] == 12


@needs_ffmpeg
@pytest.mark.parametrize("rate, codec", [(8000, "aac"), (16000, "mp3")])
def test_mp3_that_mp4_does_not_take_becomes_aac(tmp_path, rate, codec):
    """In AVI, which counts 35 frames for the 30 of a second, as the sound at 8 kHz ends later."""
    path = tmp_path / "a.avi"
    sound = ("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "libmp3lame", "-ar", rate)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=30:duration=1", *sound, "-c:v", "mjpeg", path)
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    written = facts(tmp_path / "out/a_overlay.mp4")
    assert written["frames"] == 30 and written["audio"] == [codec]


@needs_ffmpeg
def test_sound_of_an_unknown_codec_is_left_out_and_that_is_said(tmp_path, capsys):
    """The second of two; the first is taken over."""
    sound = ("-f", "lavfi", "-i", "sine", "-f", "lavfi", "-i", "sine", "-map", "0:v", "-map", "1:a", "-map", "2:a")
    path = tmp_path / "a.mkv"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=25", *sound, "-t", 1, "-c:v", "ffv1", "-c:a:0", "libmp3lame",
        "-c:a:1", "libvorbis", path,
    )  # fmt: skip
    content = path.read_bytes()
    assert content.count(b"A_VORBIS") == 1
    path.write_bytes(content.replace(b"A_VORBIS", b"A_NOBODY"))
    assert predict("--predict", path, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert f"eval.py: {path}: its sound is left out: codec " in error and error.count("\n") == 1
    assert facts(tmp_path / "out/a_overlay.mp4")["audio"] == ["mp3"]


def test_addresses_in_what_ffmpeg_says_are_left_out(tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho '[vost#0:0/libx264 @ 0x55d0] [enc: x 264 @ 0xaf] too wide [as it is]' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = evaluation.Ffmpeg("-", stdout=subprocess.PIPE)
    try:
        assert program.complaint() == "too wide [as it is]"
    finally:
        program.close()


@needs_ffmpeg
@pytest.mark.parametrize("name", ["-x.mp4", "a b é.mp4", "concat:a|b.mp4", "http:host.mp4", "%d'q.mp4", "in.put/a.mp4"])
def test_names_are_never_taken_for_something_else(tmp_path, monkeypatch, name):
    make_video(tmp_path / name, codec=("-c:v", "libx264"), frames=3)
    monkeypatch.chdir(tmp_path)
    assert predict(f"--predict={name}", "--out=-o", "--style", "colour") == 0
    stem = os.path.basename(name).removesuffix(".mp4")
    assert facts(tmp_path / "-o" / f"{stem}_colour.mp4")["frames"] == 3


@needs_ffmpeg
def test_a_folder_of_pictures_and_videos_of_one_name(tmp_path, capsys):
    make_video(tmp_path / "in/sub/a.mkv")
    make_video(tmp_path / "in/sub/a.avi")
    Image.new("RGB", (40, 40)).save(tmp_path / "in/a.png")
    assert predict("--predict", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert last_json(capsys.readouterr().out)["frames"] == 24
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"a.png_overlay.png", "sub/a_overlay.mp4", "sub/a.mkv_overlay.mp4"}


@needs_ffmpeg
def test_no_result_takes_the_name_of_another(tmp_path, capsys):
    for name in ("a.mov", "a.mp4", "a.mp4.mkv"):
        make_video(tmp_path / "in" / name, codec=("-c:v", "libx264"), frames=3)
    assert predict("--predict", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a_overlay.mp4", "a.mp4_overlay.mp4", "a.mp4.mkv_overlay.mp4"
    }  # fmt: skip


@needs_ffmpeg
def test_two_processes_share_pictures_and_videos(tmp_path):
    for name in "ab":
        make_video(tmp_path / f"in/{name}.mkv")
        Image.new("RGB", (40, 40)).save(tmp_path / f"in/{name}.png")
    (tmp_path / "in/bad.png").write_bytes(b"nothing")
    (tmp_path / "in/bad.mkv").write_bytes(b"nothing")
    flags = ("--weights", WEIGHTS, "--device", "cpu", "--predict", tmp_path / "in", "--out", tmp_path / "out")
    done = run_script("eval.py", *flags, processes=2)
    assert "2 of 6 files could not be segmented" in done.stderr and done.returncode != 0
    names = {"a.png_overlay.png", "b.png_overlay.png", "a_overlay.mp4", "b_overlay.mp4"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert all(facts(tmp_path / f"out/{name}_overlay.mp4")["frames"] == 12 for name in "ab")


# ---------------------------------------------------------------------------------------------------- what can go wrong


def test_without_ffmpeg_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"never read")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert predict("--predict", tmp_path / "a.mp4", "--out", tmp_path / "out") == 2
    assert "video needs the program ffmpeg on PATH: apt install ffmpeg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ffmpeg_the_pictures_of_a_folder_are_segmented_all_the_same(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"never read")
    Image.new("RGB", (40, 40)).save(tmp_path / "in/z.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert predict("--predict", tmp_path / "in", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "a.mp4: video needs the program ffmpeg on PATH" in errors[0] and "1 of 2 files" in errors[1]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["z.png_overlay.png"]


@needs_ffmpeg
def test_what_cannot_be_encoded_is_one_files_failure(tmp_path, capsys):
    """Wider than H.264 can be; names that leave no room for what is added to them. All else is done."""
    make_video(tmp_path / "in/a.mkv", 20000, 32, frames=1)
    make_video(tmp_path / f"in/{'b' * 240}.mkv", frames=3)
    make_video(tmp_path / "in/c.mkv", frames=3)
    for name in ("d" * 245, "e"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"in/{name}.png")
    assert predict("--predict", tmp_path / "in", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4 and "3 of 5 files could not be segmented" in errors[3]
    assert "ddd.png: the name of what it becomes is too long; shorten its own" in errors[0]
    assert (
        "a_overlay.mp4: cannot be written (" in errors[1] and f"leave {tmp_path / 'in/a.mkv'} out, or convert it" in errors[1]
    )
    assert "bbb.mkv: the name of what it becomes is too long" in errors[2]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"c_overlay.mp4", "e.png_overlay.png"} and no_children()


@needs_ffmpeg
def test_without_ffprobe_video_works_too(tmp_path, capsys, monkeypatch):
    path = make_video(tmp_path / "a.mkv", audio=True, rate="30000/1001")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ffmpeg").symlink_to(shutil.which("ffmpeg"))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))
        assert predict("--predict", path, "--out", tmp_path / "out") == 0
    written = facts(tmp_path / "out/a_overlay.mp4")
    assert written["frames"] in (12, 13) and written["rate"] == Fraction(30000, 1001) and written["audio"] == ["aac"]


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["text", "empty", "sound", "small", "picture"])
def test_what_is_no_video(tmp_path, capsys, kind):
    path = tmp_path / "a.mp4"
    if kind == "sound":
        ffmpeg("-f", "lavfi", "-i", "sine=frequency=440:duration=1", "-c:a", "aac", path)
    elif kind == "small":
        make_video(path, 30, 64, codec=("-c:v", "libx264"))
    elif kind == "picture":
        path = tmp_path / "photo"  # without a suffix: a picture all the same
        Image.new("RGB", (40, 40)).save(path, "PNG")
    else:
        path.write_bytes({"text": b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "empty": b""}[kind])
    status = predict("--predict", path, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    if kind == "picture":
        assert status == 0 and (tmp_path / "out/photo_overlay.png").is_file()
        return
    assert status == 2 and error.count("\n") == 1 and f"{path}: " in error
    assert ("30x64 pixels, expected at least 32x32" if kind == "small" else "no video that ffmpeg can decode") in error
    assert not [p for p in tmp_path.rglob("*_overlay*")] and no_children()


@needs_ffmpeg
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_video_that_breaks_off_keeps_its_frames_under_another_name(tmp_path, capsys, container):
    flags = ("-movflags", "+faststart") if container == "mp4" else ()
    whole = make_video(tmp_path / f"whole.{container}", 160, 96, 60, codec=("-c:v", "libx264", "-g", "5"), extra=flags)
    path = tmp_path / f"in/cut.{container}"
    path.parent.mkdir()
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    Image.new("RGB", (40, 40)).save(tmp_path / "in/z.png")
    assert predict("--predict", tmp_path / "in", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "1 of 2 files could not be segmented" in errors[1]
    told = re.search(r"cut\.\w+: damaged \(.+\); (.+) holds what could be decoded, (\d+)", errors[0])
    assert told, errors[0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cut_overlay.partial.mp4", "z.png_overlay.png"}
    assert told[1].endswith("cut_overlay.partial.mp4") and 10 < int(told[2]) < 60
    assert facts(tmp_path / "out/cut_overlay.partial.mp4")["frames"] == int(told[2])


@needs_ffmpeg
@pytest.mark.parametrize("which", ["-i file:", "pipe:0"])
def test_ffmpeg_ended_by_somebody_else(tmp_path, which):
    """The decoder: what it gave is kept as partial. The encoder: nothing is."""
    path = make_long_video(tmp_path)
    process = start(path, tmp_path / "out")
    try:
        child = wait_for_child(process, which, tmp_path / "out")
        os.kill(child, signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and error.count("\n") == 1
    left = [p.name for p in (tmp_path / "out").iterdir()]
    if which == "pipe:0":
        assert "cannot be written (ffmpeg was ended by signal 9)" in error and left == []
    else:
        assert "damaged (ffmpeg was ended by signal 9)" in error and left == ["long_overlay.partial.mp4"]


def make_long_video(folder):
    """Of some 10 seconds of work."""
    path = make_video(folder / "short.mkv", 320, 192, 250, codec=("-c:v", "libx264", "-preset", "ultrafast"))
    ffmpeg("-stream_loop", "19", "-i", path, "-c", "copy", folder / "long.mkv")
    return folder / "long.mkv"


def command_of(path, out, *flags) -> list:
    return [sys.executable, ROOT / "eval.py", "--weights", WEIGHTS, "--device", "cpu", "--predict", path, "--out", out, *flags]


def start(path, out, *flags, **kwargs) -> subprocess.Popen:
    command = command_of(path, out, *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def as_from_a_terminal():  # in the background a shell ignores Ctrl-C, as nohup does SIGHUP, and so would what is started here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    pipes["preexec_fn"] = as_from_a_terminal
    return subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, **{**pipes, **kwargs})


def children_of(pid: int) -> dict[int, str]:
    listing = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return {int(line.split()[0]): line for line in listing.splitlines()}


def wait_for_child(process: subprocess.Popen, which: str, out) -> int:
    """The decoder ("-i file:" alone) or the encoder ("pipe:0") at work, once there is something of the result."""
    for _ in range(1200):
        children = children_of(process.pid)
        found = [pid for pid, line in children.items() if ("pipe:0" in line) == (which == "pipe:0") and "yuv4mpegpipe" in line]
        if len(found) == 1 and any(out.glob("*.partial")):
            time.sleep(0.5)
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no child at work within a minute")


@needs_ffmpeg
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_killed_in_the_middle_it_leaves_nothing_that_looks_whole(tmp_path, how):
    path = make_long_video(tmp_path)
    process = start(path, tmp_path / "out")
    try:
        wait_for_child(process, "pipe:0", tmp_path / "out")
        children = children_of(process.pid)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    left = [p.name for p in (tmp_path / "out").iterdir()]
    if how == signal.SIGINT:
        assert process.returncode == 130 and error == "eval.py: interrupted\n" and left == []
    elif how in (signal.SIGTERM, signal.SIGHUP):
        assert process.returncode == 128 + how and error == "" and left == []
    else:
        assert left in ([], ["long_overlay.mp4.partial"])
    for _ in range(100):  # the children of a process that was killed end by themselves, for want of a pipe
        alive = [
            pid
            for pid in children
            if "ffmpeg" in subprocess.run(["ps", "-o", "comm=", "-p", str(pid)], capture_output=True, text=True).stdout
        ]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


@needs_ffmpeg
def test_under_nohup_it_goes_on(tmp_path):
    path = make_video(tmp_path / "a.mkv", 320, 192, 250, codec=("-c:v", "libx264", "-preset", "ultrafast"))
    process = start(path, tmp_path / "out", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    try:
        wait_for_child(process, "pipe:0", tmp_path / "out")
        process.send_signal(signal.SIGHUP)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and error == "" and facts(tmp_path / "out/a_overlay.mp4")["frames"] == 250


@needs_ffmpeg
def test_a_full_disk_is_one_line(tmp_path):
    """A limit on the size of files stands for the disk; what was there before stays."""
    path = make_video(tmp_path / "a.mkv", 320, 192, 100, codec=("-c:v", "libx264", "-preset", "ultrafast"))
    before = tmp_path / "out/a_overlay.mp4"
    before.parent.mkdir()
    before.write_bytes(b"an earlier result")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(path, tmp_path / "out", preexec_fn=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1 and "a_overlay.mp4: cannot be written (" in error
    assert [p.name for p in before.parent.iterdir()] == ["a_overlay.mp4"] and before.read_bytes() == b"an earlier result"


@needs_ffmpeg
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    path = make_video(tmp_path / "a.mkv")
    (tmp_path / "file").write_text("no folder")
    assert predict("--predict", path, "--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1 and no_children()


# ------------------------------------------------------------------------------------------------------------- raw frames


def raw(frames: bytes, *flags) -> subprocess.CompletedProcess:
    command = command_of("-", "-", *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(list(map(str, command)), input=frames, capture_output=True, timeout=120, env=environment, cwd=ROOT)


def test_a_stream_of_raw_frames_that_ends_within_one(segment):
    """Those before are written, two at a time in the order they came, and it is said."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 40, 70, 3), np.uint8)
    labels = torch.cat([segment(torch.from_numpy(frame)[None]) for frame in frames]).numpy()
    done = raw(frames.tobytes()[:-100], "--size", 40, 70, "--strength", "0.3")
    painter = Painter(CAMVID, "overlay", 0.3)
    expected = [np.array(painter.picture(Image.fromarray(f), label)) for f, label in zip(frames, labels)]
    assert done.returncode == 2 and done.stdout == np.stack(expected[:8]).tobytes()
    assert done.stderr.decode() == "eval.py: stdin ended within a frame, after 8300 of 8400 bytes; is --size right?\n"


def test_a_raw_frame_is_answered_before_the_next_is_sent(segment):
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), np.uint8)
    process = start("-", "-", "--size", "40", "70", "--style", "labels", stdin=subprocess.PIPE, text=False, bufsize=0)
    try:
        for frame in frames:
            process.stdin.write(frame.tobytes())
            got = b""
            while len(got) < 40 * 70:
                part = process.stdout.read(40 * 70 - len(got))
                assert part, process.stderr.read()
                got += part
            assert got == segment(torch.from_numpy(frame)[None]).numpy().tobytes()
        process.stdin.close()
        assert process.wait(60) == 0 and process.stdout.read() == b""
        assert last_json(process.stderr.read().decode()) == {"frames": 3, "out": "-", "style": "labels"}
    finally:
        process.kill()


def test_who_reads_raw_frames_may_go_away():
    process = start("-", "-", "--size", "40", "70", stdin=subprocess.PIPE, text=False, bufsize=0)
    try:
        process.stdin.write(bytes(40 * 70 * 3))
        process.stdout.read(100)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(1000):
                process.stdin.write(bytes(40 * 70 * 3))
        assert process.wait(60) == 2
        assert b"who read the frames went away after" in process.stderr.read()
    finally:
        process.kill()


def test_no_more_frames_are_under_way_than_there_are_slots():
    """Reading is fast, writing slow: the reader waits, and the order is kept."""
    read, written, most = 0, [], 0

    def reading(slot):
        nonlocal read, most
        slot.given[:] = read
        read += 1
        most = max(most, read - len(written))
        return read <= 200

    def work(slot):
        time.sleep(0.002 * (int(slot.given[0]) % 3))  # frames overtake each other
        slot.result[:] = slot.given

    def write(slot):
        time.sleep(0.0005)
        written.append(int(slot.result[0]))

    slots = [evaluation.Slot(np.zeros(1, np.int64), np.zeros(1, np.int64)) for _ in range(5)]
    evaluation.in_order(reading, work, write, slots, threads=3)
    assert written == list(range(200)) and most <= 6


@pytest.mark.parametrize("where", ["read", "work", "write"])
def test_an_error_anywhere_ends_all(where):
    count = 0

    def step(name):
        def run(slot):
            nonlocal count
            count += name == "read"
            if name == where and count > 20:
                raise OSError(f"in {name}")
            return True

        return run

    slots = [evaluation.Slot(np.zeros(1), np.zeros(1)) for _ in range(4)]
    with pytest.raises(OSError, match=f"in {where}"):
        evaluation.in_order(step("read"), step("work"), step("write"), slots, threads=2)
