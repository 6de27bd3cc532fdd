"""tools/predict.py: images, folders and videos, what becomes of them, and of those that are damaged."""

import json
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import tools.predict
from conftest import ROOT, last_json, run_script
from data import CAMVID, Classes, DataError, read_classes
from launch import exit_status
from model import CheckpointError, FastSCNN, load_weights, save_for_peer
from ops_ext import accelerate
from tools.predict import Painter, Predictor, in_order, legend, planes, yuv_colours

WEIGHTS = ROOT / "weights/camvid.pth"


@pytest.fixture(scope="module")
def segment():
    return accelerate(load_weights(WEIGHTS), device="cpu")


def predict(*flags) -> int:
    """The exit status of tools/predict.py in this process."""
    argv = [*map(str, flags), "--weights", str(WEIGHTS), "--device", "cpu", "--no-resize", "--no-legend"]
    return exit_status(lambda: tools.predict.main(argv), (DataError, CheckpointError))


def moving_shapes(count, height, width) -> list[np.ndarray]:
    """RGB frames: a gradient on which a block moves."""
    rows, columns = np.mgrid[:height, :width]
    frames = []
    for i in range(count):
        frame = np.stack([255 * columns // width, 255 * rows // height, np.full_like(rows, 90)], -1).astype(np.uint8)
        frame[height // 4 : height // 2, 4 * i % width : 4 * i % width + 16] = (30, 200, 60)
        frames.append(frame)
    return frames


def write_video(path, frames, codec="libx264", pixels="yuv420p", pts=None, sound=None, turned=0, options=None, **tags):
    """25 frames a second, or those `pts` in ms; lossless. `sound` is a codec of one second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options_of_file = {"movflags": "faststart"} if path.suffix == ".mp4" else {}  # as cameras finish their files
    with av.open(path, "w", options=options_of_file) as sink:
        audio = sink.add_stream(sound, rate=16000, layout="mono") if sound else None
        video = sink.add_stream(
            codec, rate=25, options={"qp": "0", **(options or {})} if codec == "libx264" else options
        )
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt, video.codec_context.time_base = pixels, Fraction(1, 1000)
        for name, value in tags.items():
            setattr(video.codec_context, name, value)
        if turned:
            video.set_display_rotation(turned)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.colorspace, frame.pts = tags.get("colorspace", 6), pts[i] if pts else 40 * i
            frame.time_base = Fraction(1, 1000)
            sink.mux(video.encode(frame))
        sink.mux(video.encode(None))
        if audio:
            tone = (8000 * np.sin(np.arange(16000) / 6)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            samples.rate = 16000
            resampled = av.AudioResampler(audio.format, "mono", 16000, audio.codec_context.frame_size or 1024).resample(
                samples
            )
            for frame in resampled:
                sink.mux(audio.encode(frame))
            sink.mux(audio.encode(None))
    return path


def read_video(path) -> tuple[list, list[str]]:
    """The frames of a video, and the codecs of its sound."""
    with av.open(path) as container:
        return list(container.decode(video=0)), [stream.codec_context.name for stream in container.streams.audio]


def packets_of_sound(path) -> list[bytes]:
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


# --------------------------------------------------------------------------------------------------------------- images


def test_styles_of_an_image():
    label = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.new("RGB", (2, 2), (200, 100, 0))
    three = Classes(("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), ("x", "x", "y"))
    labels = Painter(three, "labels").paint(image, label)
    colours, overlay = (np.array(Painter(three, "overlay", s, legend=False).paint(image, label)) for s in (1, 0.25))
    assert np.array(labels).tolist() == label.tolist()
    assert np.array_equal(labels.convert("RGB"), colours)  # viewers show its palette
    assert colours.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    assert np.abs(overlay - (0.75 * np.array([200, 100, 0]) + 0.25 * colours)).max() <= 1


def test_the_legend_names_what_occurs_and_hides_nothing():
    label, image = np.full((40, 200), 3, np.uint8), Image.new("RGB", (200, 40), (9, 9, 9))
    bare, named = (np.array(Painter(CAMVID, strength=1, legend=each).paint(image, label)) for each in (False, True))
    assert np.array_equal(named[:40], bare) and named.shape[0] > 40 and named.shape[1] == 200
    colours = {tuple(colour) for colour in named[40:].reshape(-1, 3).tolist()}
    assert colours & set(CAMVID.colours) - {(128, 128, 128)} == {CAMVID.colours[3]}  # grey is in smoothed letters, too
    every = legend(CAMVID, 200, range(11))
    assert every.height > legend(CAMVID, 200, [3]).height  # lines are broken
    assert legend(CAMVID, 4000, [3]).height == 200  # a phone's photo is looked at small
    assert set(CAMVID.colours) <= {tuple(colour) for colour in np.array(every).reshape(-1, 3).tolist()}


def test_names_that_the_font_lacks_become_numbers():
    strips = [legend(Classes((name,), ((1, 2, 3),)), 200, [0]) for name in ("道路", "class 0", "road")]
    assert strips[0].tobytes() == strips[1].tobytes() != strips[2].tobytes()


def test_weights_of_a_peer_have_the_classes_of_cityscapes(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for classes, status in ((19, 0), (7, 2)):
        save_for_peer(FastSCNN(classes, variant="tramac").eval(), tmp_path / "theirs.pth", "tramac")
        argv = [
            str(tmp_path / "a.png"),
            "--weights",
            str(tmp_path / "theirs.pth"),
            "--out",
            str(tmp_path / f"out{classes}"),
        ]
        assert exit_status(lambda: tools.predict.main(argv), (DataError, CheckpointError)) == status  # noqa: B023
    assert "has 7 classes, expected 19" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("out*/*")] == ["a.png_overlay.png"]


@pytest.mark.parametrize("style", ["overlay", "labels"])
def test_a_folder_of_all_sorts(tmp_path, capsys, segment, style):
    source, out = tmp_path / "in put", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for name in ("a.png", "sub/ä b.png", "sub/-x.png", "a.bmp"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(source / name)
    Image.fromarray(pixels[:, :, 0]).resize((97, 33)).save(source / "grey.JPG")
    for name in ("notes.txt", "sub/more.txt", "photo.heic", "README"):
        (source / name).write_text("not an image")
    torch.set_num_threads(2)  # two images at once
    assert predict(source, "--out", out, "--style", style) == 0
    captured = capsys.readouterr()
    assert captured.err.endswith(f"{source}: left out 2 .txt, 1 without suffix, 1 .heic\n")
    assert captured.err.count("\n") == 1
    expected = {"images": 5, "videos": 0, "frames": 0, "out": str(out), "style": style, "fps": None}
    assert last_json(captured.out) == expected
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {f"{name}_{style}.png" for name in ("a.png", "sub/ä b.png", "sub/-x.png", "a.bmp", "grey.JPG")} | (
        {"classes.json"} if style == "labels" else set()
    )
    if style == "labels":  # with the list of classes that a dataset of these labels needs
        assert read_classes("folder", out)[0] == Classes(CAMVID.names, CAMVID.colours)
    label = segment(torch.from_numpy(pixels)[None])[0].numpy()
    expected = np.array(Painter(CAMVID, style, legend=False).paint(Image.fromarray(pixels), label))
    assert np.array_equal(np.array(Image.open(out / f"sub/ä b.png_{style}.png")), expected)


def test_one_damaged_file_does_not_waste_the_others(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    (tmp_path / "4.mp4").write_bytes(b"not a video")
    assert predict(tmp_path, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2 and "1.png: cannot be read" in errors[0] and "4.mp4: " in errors[1]
    assert last_json(captured.out)["images"] == 3 and "2 files failed, see above" in captured.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{i}.png_overlay.png" for i in (0, 2, 3)}


def test_images_smaller_than_the_network_needs_are_enlarged(tmp_path):
    for width, height in ((40, 20), (1, 1)):
        Image.new("RGB", (width, height)).save(tmp_path / "a.png")
        assert predict(tmp_path / "a.png", "--out", tmp_path / "out", "--style", "labels") == 0
        assert Image.open(tmp_path / "out/a.png_labels.png").size == (width, height)


@pytest.mark.parametrize("out", [".", "out"])
def test_results_of_an_earlier_run_are_not_segmented(tmp_path, capsys, out):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    write_video(tmp_path / "b.mp4", moving_shapes(2, 40, 40))
    for _ in range(2):
        assert predict(tmp_path, "--out", tmp_path / out) == 0
        captured = capsys.readouterr()
        assert (last_json(captured.out)["images"], last_json(captured.out)["videos"], captured.err) == (1, 1, "")
    results = ["a.png_overlay.png", "b.mp4_overlay.mp4"]
    assert sorted(path.name for path in (tmp_path / out).glob("*_*")) == results


def test_several_paths_and_no_result_takes_the_name_of_another(tmp_path, capsys):
    for name in ("x/a.jpg", "x/a.png", "y/b.png", "y/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    assert predict(tmp_path / "x", tmp_path / "y/b.png", "--out", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.jpg_overlay.png", "a.png_overlay.png", "b.png_overlay.png"}
    assert predict(tmp_path / "x", tmp_path / "y", "--out", tmp_path / "out") == 2
    assert "x/a.png and " in (error := capsys.readouterr().err) and "y/a.png would both become " in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["{}"], "no images or videos, but nothing; supported are .png"),
        (["{}/none.mp4"], "none.mp4: no such image, video or folder"),
        (["{}", "--strength", "1.5"], "--strength is 1.5, expected 0 to 1"),
        (["{}", "--strength", "nan"], "--strength is nan, expected 0 to 1"),
        (["{}", "--style", "loud"], "argument --style: invalid choice: 'loud'"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, capsys, flags, message):
    assert predict(*(flag.format(tmp_path) for flag in flags), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_results_keep_the_order_and_few_are_under_way():
    """Reading is fast and writing slow: the reader waits."""
    read, written, most = 0, [], 0

    def numbers():
        nonlocal read, most
        for read in range(1, 101):
            most = max(most, read - len(written))
            yield read

    def work(number):
        time.sleep(0.002 * (number % 3))  # some overtake others
        return number

    for future in in_order(work, numbers(), threads=3):
        written.append(future.result())
    assert written == list(range(1, 101)) and most <= 6


# ---------------------------------------------------------------------------------------------------------------- video


@pytest.mark.parametrize(
    "height, width, turned", [(64, 96, 0), (45, 67, 0), (64, 96, 90), (64, 96, -90), (64, 96, 180)]
)
def test_the_network_sees_every_frame_of_a_video_once_and_upright(
    tmp_path, capsys, monkeypatch, segment, height, width, turned
):
    """At odd sizes with a row or column more."""
    path = write_video(tmp_path / "clip.mp4", moving_shapes(12, height + height % 2, width + width % 2), turned=turned)
    if height % 2:
        path = write_video(tmp_path / "clip.mkv", moving_shapes(12, height, width), "ffv1")
    torch.set_num_threads(2)  # two frames at once
    seen = []
    monkeypatch.setattr(
        tools.predict,
        "accelerate",
        lambda *_, **__: lambda images, size: (seen.append(images[0]), segment(images, size))[1],
    )
    assert predict(path, "--out", tmp_path / "out") == 0
    result = last_json(capsys.readouterr().out)
    assert result["videos"] == 1 and result["frames"] == 12 and result["fps"] > 0
    upright = [np.rot90(frame.to_ndarray(format="rgb24"), turned // 90) for frame in read_video(path)[0]]
    height, width, _ = upright[0].shape
    if height % 2:
        assert {each.shape for each in seen} == {(46, 68, 3)} and len({each.numpy().tobytes() for each in seen}) == 12
    else:
        expected = sorted(image.tobytes() for image in upright)
        assert sorted(image.numpy().tobytes() for image in seen) == expected and len(set(expected)) == 12
    frames = read_video(tmp_path / f"out/{path.name}_overlay.mp4")[0]
    assert {(frame.height, frame.width) for frame in frames} == {(height + height % 2, width + width % 2)}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("pts", [[40 * i for i in range(20)], [0, 10, 20, 133, 134, 500, 1500, 1533, 1600, 3000]])
def test_every_frame_keeps_its_time(tmp_path, suffix, pts):
    path = write_video(tmp_path / f"clip.{suffix}", moving_shapes(len(pts), 64, 96), pts=pts)
    assert predict(path, "--out", tmp_path) == 0
    times = [[float(frame.time) for frame in read_video(each)[0]] for each in (path, f"{path}_overlay.mp4")]
    assert times[1] == pytest.approx(np.array(times[0]) - times[0][0], abs=1e-5) and np.diff(times[1]) == pytest.approx(
        np.diff(pts) / 1000, abs=2e-3
    )


@pytest.mark.parametrize(
    "suffix, sound", [("mp4", "aac"), ("mkv", "libmp3lame"), ("avi", "libmp3lame"), ("webm", "libopus")]
)
def test_sound_is_copied(tmp_path, capsys, suffix, sound):
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = write_video(tmp_path / f"clip.{suffix}", moving_shapes(25, 64, 96), codec, sound=sound)
    assert predict(path, "--out", tmp_path) == 0
    assert len(read_video(f"{path}_overlay.mp4")[0]) == 25 and capsys.readouterr().err == ""
    assert packets_of_sound(f"{path}_overlay.mp4") == packets_of_sound(path) != []


def test_sound_that_mp4_does_not_take_is_left_out_and_that_is_said(tmp_path, capsys):
    path = write_video(tmp_path / "clip.mov", moving_shapes(25, 64, 96), sound="pcm_mulaw")
    assert predict(path, "--out", tmp_path) == 0
    error = capsys.readouterr().err
    assert f"{path}: sound is left out (" in error and "pcm_mulaw" in error and error.count("\n") == 1
    frames, sound = read_video(f"{path}_overlay.mp4")
    assert len(frames) == 25 and sound == []


@pytest.mark.parametrize("matrix, kr, kb", [(1, 0.2126, 0.0722), (6, 0.299, 0.114)])  # BT.709, BT.601
@pytest.mark.parametrize("levels", [1, 2])  # limited, full
def test_colours_are_mixed_in_the_matrix_and_range_of_the_video(matrix, kr, kb, levels):
    """Strength 0 leaves the planes alone, 1 gives the classes' colours by the standards' formulas, else a mixture."""
    label = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 11, (8, 12), np.uint8), 4, 0), 4, 1)
    red, green, blue = np.moveaxis(CAMVID.palette()[label] / 255, -1, 0)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    u, v = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    black, light, colour = (16, 219, 224) if levels == 1 else (0, 255, 255)
    full = [black + light * y, (128 + colour * u)[::2, ::2], (128 + colour * v)[::2, ::2]]
    random = np.random.default_rng(0).integers(40, 200, (48, 48), np.uint8)  # the planes of 32x48 pixels
    frame = av.VideoFrame.from_ndarray(random, format="yuv420p")
    frame.colorspace, frame.color_range, frame.pts, frame.time_base = matrix, levels, 0, Fraction(1, 25)
    given = [plane.astype(float) for plane in planes(frame)]
    for strength in (0.0, 0.3, 1.0):
        painter = Painter(CAMVID, strength=strength)
        predictor = Predictor(lambda *_: torch.from_numpy(label)[None], painter, None, 1, True)
        painted = planes(predictor.segment_frame(frame, frame, yuv_colours(painter, frame)))
        for got, before, after in zip(painted, given, full):
            error = np.abs(got - ((1 - strength) * before + strength * after)).max()
            assert error <= (0 if strength == 0 else 1.6), strength


@pytest.mark.parametrize("matrix, levels", [(1, 1), (6, 2), (9, 1), (2, 0)])
def test_tags_of_colours_are_carried_over(tmp_path, matrix, levels):
    """And at no strength the colours; what is untagged gets the matrix that players assume at its size."""
    tags = {"colorspace": matrix, "color_range": levels, "color_primaries": 9 if matrix == 9 else 1, "color_trc": 1}
    path = write_video(tmp_path / "a.mp4", moving_shapes(5, 64, 96), **tags)
    assert predict(path, "--out", tmp_path, "--strength", 0) == 0
    before, after = read_video(path)[0], read_video(f"{path}_overlay.mp4")[0]
    assert after[0].colorspace == (6 if matrix == 2 else matrix)
    assert all(getattr(after[0], tag) == getattr(before[0], tag) for tag in tags if tag != "colorspace")
    for one, other in zip(before, after):  # within what x264 loses
        assert np.abs(one.to_ndarray().astype(int) - other.to_ndarray()).mean() < 3


@pytest.mark.parametrize("height, matrix", [(720, 1), (64, 6)])
def test_colours_of_video_in_rgb_stay(tmp_path, height, matrix):
    image = np.full((height, 96, 3), (220, 30, 20), np.uint8)
    image[:, 48:] = (20, 200, 60)
    path = write_video(tmp_path / "a.mkv", [image] * 3, "ffv1", "bgr0")
    assert predict(path, "--out", tmp_path, "--strength", 0) == 0
    frame = read_video(f"{path}_overlay.mp4")[0][0]
    assert frame.colorspace == matrix
    assert np.abs(frame.to_ndarray(format="rgb24")[height // 2, [20, 76]].astype(int) - image[0, [20, 76]]).max() <= 6


def test_odd_sizes_become_even(tmp_path):
    path = write_video(tmp_path / "odd.mkv", moving_shapes(3, 45, 67), "ffv1")
    assert predict(path, "--out", tmp_path) == 0
    frame = read_video(f"{path}_overlay.mp4")[0][0]
    assert (frame.width, frame.height) == (68, 46)


def test_a_picture_of_another_size_is_seen_at_that_of_the_training_images(tmp_path, capsys):
    """Enlarged four times, turned or not, an image gets the labels of the original."""
    rows, columns = np.mgrid[:360, :480]
    image = np.stack([columns // 2, rows // 2, np.where(rows > 200, 90, 200)], -1).astype(np.uint8)
    small = Image.fromarray(image)
    small.save(tmp_path / "small.png")
    small.resize((1920, 1440), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    flags = ["--weights", str(WEIGHTS), "--device", "cpu", "--style", "labels", "--out", str(tmp_path)]
    paths = [str(tmp_path / f"{name}.png") for name in ("small", "large")]
    assert exit_status(lambda: tools.predict.main([*paths, *flags]), (DataError, CheckpointError)) == 0
    assert "the network saw them at 540x720 pixels" in capsys.readouterr().out
    labels = {name: Image.open(tmp_path / f"{name}.png_labels.png") for name in ("small", "large")}
    assert labels["large"].size == (1920, 1440)
    shrunk = np.array(labels["large"].resize((480, 360), Image.Resampling.NEAREST))
    assert (shrunk == np.array(labels["small"])).mean() > 0.97


def test_a_photo_of_12_megapixels_upright_or_not(tmp_path, monkeypatch, segment):
    """The network sees as many pixels as in training, in the photo's proportions; labels have the photo's size."""
    seen = []

    def spy(images, size):
        seen.append(tuple(images.shape[1:3]))
        return segment(images, size)

    monkeypatch.setattr(tools.predict, "accelerate", lambda *_, **__: spy)
    flags = ["--weights", str(WEIGHTS), "--device", "cpu", "--style", "labels", "--out", str(tmp_path)]
    for width, height in ((4032, 3024), (3024, 4032)):
        Image.new("RGB", (width, height), (90, 120, 150)).save(tmp_path / "photo.jpg")
        assert tools.predict.main([str(tmp_path / "photo.jpg"), *flags]) == 0
        assert Image.open(tmp_path / "photo.jpg_labels.png").size == (width, height)
    assert seen == [(540, 720), (720, 540)]


def test_processes_wait_a_day_for_the_one_with_the_long_video(tmp_path, monkeypatch):
    waits = []

    def start(device, timeout_minutes):
        waits.append(timeout_minutes)
        return torch.device("cpu"), 0, 1

    monkeypatch.setattr(tools.predict, "start_processes", start)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    assert tools.predict.main([str(tmp_path / "a.png"), "--weights", str(WEIGHTS), "--out", str(tmp_path)]) == 0
    assert waits == [24 * 60]


def test_pictures_larger_than_pillows_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # beyond twice of which Pillow refuses
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert predict(tmp_path / "a.png", "--out", tmp_path / "out") == 0


@pytest.mark.parametrize("name", ["photo.heic", "notes.txt", "README"])
def test_a_file_that_is_not_read_is_named_for_what_it_is(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"not read")
    assert predict(tmp_path / name, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    what = f"{tmp_path / name}: {(tmp_path / name).suffix or 'no suffix'} is not read, export it as JPEG; supported are"
    assert what in error and error.count("\n") == 1
    assert predict(tmp_path, "--out", tmp_path / "out") == 2
    assert f"no images or videos, but 1 {(tmp_path / name).suffix or 'without suffix'}; " in capsys.readouterr().err


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.tif")
    assert predict("~/a.tif", "--out", tmp_path / "out") == 0


# ---------------------------------------------------------------------------------------------------- what can go wrong


def test_without_pyav_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"never read")
    monkeypatch.setattr(tools.predict, "av", None)
    assert predict(tmp_path / "a.mp4", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.endswith('video needs the package av: pip install "av>=17.1"\n') and error.count("\n") == 1


def test_labels_of_a_video_are_refused_with_a_way_on(tmp_path, capsys):
    path = write_video(tmp_path / "a.mp4", moving_shapes(2, 64, 64))
    assert predict(path, "--style", "labels", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"ffmpeg -i {path} %06d.png makes images" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["text", "empty", "sound", "folder"])
def test_what_is_not_a_video(tmp_path, capsys, kind):
    path = tmp_path / "a.mp4"
    if kind == "sound":
        with av.open(path, "w") as sink:
            audio = sink.add_stream("aac", rate=16000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate = 16000
            sink.mux(audio.encode(silence))
            sink.mux(audio.encode(None))
    else:
        path.write_bytes({"text": b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "empty": b"", "folder": b""}[kind])
    (tmp_path / "out").write_text("a file") if kind == "folder" else None
    assert predict(path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "out" if kind == "folder" else path) in error
    assert not list(tmp_path.rglob("*_overlay*"))


@pytest.mark.parametrize("kind", ["cut.mp4", "overwritten.mp4"])
def test_what_can_be_decoded_of_a_damaged_video_is_kept_and_the_damage_said(tmp_path, capsys, kind):
    options = {"g": "5", "qp": "20"}
    complete = write_video(tmp_path / "complete.mp4", moving_shapes(60, 96, 160), options=options, sound="aac")
    content, path = complete.read_bytes(), tmp_path / "in" / kind
    path.parent.mkdir()
    if kind.startswith("cut"):
        content = content[: len(content) * 6 // 10]
    else:
        middle = len(content) // 2
        content = content[:middle] + np.random.default_rng(0).bytes(1500) + content[middle + 1500 :]
    path.write_bytes(content)
    assert predict(tmp_path / "in", "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert f"{path}: damaged, " in error and error.count("\n") <= 2
    assert 10 < len(read_video(tmp_path / f"out/{kind}_overlay.mp4")[0]) < 60


def test_ended_by_sigterm_it_leaves_a_video_that_plays(tmp_path):
    path = write_video(tmp_path / "long.mp4", moving_shapes(1, 192, 320) * 1500, options={"preset": "ultrafast"})
    command = [sys.executable, ROOT / "tools/predict.py", path, "--weights", WEIGHTS, "--out", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command), "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    result = tmp_path / "out/long.mp4_overlay.mp4"
    try:
        while not (result.exists() and result.stat().st_size > 0):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.terminate()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (143, "") and 0 < len(read_video(result)[0]) < 1500


def test_two_processes_share_images_and_videos(tmp_path):
    for name in "ab":
        write_video(tmp_path / f"in/{name}.mkv", moving_shapes(12, 64, 96), "ffv1")
        Image.new("RGB", (40, 40)).save(tmp_path / f"in/{name}.png")
    (tmp_path / "in/bad.png").write_bytes(b"nothing")
    (tmp_path / "in/notes.txt").write_text("left out")
    flags = (tmp_path / "in", "--weights", WEIGHTS, "--device", "cpu", "--out", tmp_path / "out")
    done = run_script("tools/predict.py", *flags, processes=2)
    assert done.returncode != 0 and done.stderr.count("bad.png: ") == done.stderr.count("left out 1 .txt") == 1
    expected = {"images": 2, "videos": 2, "frames": 24}
    assert {
        key: value for key, value in json.loads(done.stdout.strip().splitlines()[-1]).items() if key in expected
    } == expected
    names = {"a.png_overlay.png", "b.png_overlay.png", "a.mkv_overlay.mp4", "b.mkv_overlay.mp4"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(len(read_video(tmp_path / f"out/{name}.mkv_overlay.mp4")[0]) == 12 for name in "ab")
