"""The page that --report writes: its pictures against the data, what it says, and that a browser shows it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import eval as evaluation
from conftest import ROOT, last_json, run_script
from data import CAMVID, CITYSCAPES, Classes, open_dataset
from eval import (
    DARK,
    LIGHT,
    SHOWN,
    WorstImages,
    class_chart,
    confusion_chart,
    error_pictures,
    loss_chart,
    metrics,
    read_records,
    ticks,
    validation_chart,
    write_report,
)
from model import FastSCNN

TWO = Classes(("left", "right"), ((200, 30, 30), (20, 60, 220)))


class Page(HTMLParser):
    """What a browser would read: tags, text, and pictures decoded; `media` of those for another colour scheme."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.pictures, self.alternatives, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        for name, pictures in (("src", self.pictures), ("srcset", self.alternatives)):
            if name in attrs:
                kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", attrs[name]).groups()
                image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
                image.load()
                assert image.format == kind.upper()
                pictures.append((image, attrs))
        assert not {"href", "onload", "onerror", "onclick"} & attrs.keys()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pixels(chart) -> np.ndarray:
    """(H, W, 3) of the file that a chart becomes."""
    return np.array(Image.open(io.BytesIO(chart.png()))).astype(int)


def where(image: np.ndarray, colour, tolerance: int = 6) -> np.ndarray:
    """(N, 2) row and column of the pixels of about this colour."""
    if isinstance(colour, str):
        colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((np.abs(image - np.array(colour)) <= tolerance).all(2))


def grid_lines(image: np.ndarray, theme) -> np.ndarray:
    """Rows of a chart that are grid for the most part of its width."""
    rows = where(image, theme.grid, 2)[:, 0]
    counts = np.bincount(rows, minlength=len(image))
    return np.flatnonzero(counts > 0.6 * image.shape[1])


def confusion_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 1000, (count, count)) + np.diag(generator.integers(0, 20000, count)))


# ----------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 4.4, [0, 1, 2, 3, 4, 5]),
        (37, 91, [20, 40, 60, 80, 100]),
        (0, 0.0613, [0, 0.02, 0.04, 0.06, 0.08]),
        (3, 3, [3, 4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_range_are_few_and_whole_where_asked():
    generator = np.random.default_rng(0)
    for low, span in zip(generator.normal(0, 100, 300), 10 ** generator.uniform(-6, 12, 300)):
        values = ticks(low, low + span)
        assert values[0] <= low + 1e-6 * span and values[-1] >= low + (1 - 1e-6) * span and 2 <= len(values) <= 8
        assert all(value == int(value) for value in ticks(low, low + span, whole=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_bar_is_as_long_as_the_iou_of_its_class(theme):
    image = pixels(class_chart({"left": 0.9, "right": 0.5}, 0.7, TWO, theme))
    first = where(image, TWO.colours[0])[:, 1].min()
    grid = np.bincount(where(image, theme.grid, 2)[:, 1])
    axis = np.flatnonzero(grid > grid.max() / 2)[-1] - first  # to the line of 100
    assert axis > image.shape[1] / 2
    for colour, share in zip(TWO.colours, (0.9, 0.5)):
        bar = where(image, colour)[:, 1]
        assert bar.min() == first and (bar.max() - first) / axis == pytest.approx(share, abs=0.01)


def test_a_class_that_does_not_occur_has_no_bar_but_a_dash():
    def ink_right_of_the_axis(value):
        image = pixels(class_chart({"left": 1.0, "right": value}, 1.0, TWO, LIGHT))
        assert not len(where(image, TWO.colours[1]))
        start = where(image, TWO.colours[0])[:, 1].min()
        return where(image[42 * SHOWN : 62 * SHOWN, start : start + 60 * SHOWN], LIGHT.ink, 60)[:, 1]

    dash, zero = ink_right_of_the_axis(None), ink_right_of_the_axis(0.0)
    assert 0 < np.ptp(dash) < 8 * SHOWN < np.ptp(zero)  # "-" and "0.0"


@pytest.mark.parametrize("count", [1, 2, 19, 100])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_all_that_is_predicted_right_lies_on_the_diagonal(count, theme):
    classes = Classes(tuple(f"class {i}" for i in range(count)), ((9, 9, 9),) * count)
    image = pixels(confusion_chart(7 * torch.eye(count, dtype=torch.int64), classes, theme))
    image = image[:, : -62 * SHOWN + 8 * SHOWN]  # without the scale beside it
    full = where(image, theme.full)
    top, left = full.min(0)
    side = (full.max(0) - [top, left] + 1).max()
    places = full - [top, left]
    assert (np.abs(places[:, 0] - places[:, 1]) <= side / count + 1).all()  # no further apart than a cell is wide
    assert len(set((places[:, 0] + 0.5) * count // side)) == count
    # A cell's colour is that of the whole row, nowhere else is anything: all else of the square is paper, grid and letters.
    off = np.ones((side, side), bool)
    off[full[:, 0] - top, full[:, 1] - left] = False
    if 1 < count < 100:
        square = image[top : top + side, left : left + side]
        assert (where(square, theme.paper).shape[0] + where(square, theme.grid).shape[0]) / off.sum() > 0.8


def test_cells_are_shares_of_their_row():
    confusion = torch.tensor([[30, 10], [0, 4000]])
    image = pixels(confusion_chart(confusion, TWO, LIGHT))
    for share, least in ((0.75, 300), (0.25, 300), (1.0, 300)):
        assert len(where(image, LIGHT.mix(LIGHT.full, share), 2)) > least
    rows = {share: where(image, LIGHT.mix(LIGHT.full, share), 2) for share in (0.75, 0.25)}
    assert rows[0.75][:, 1].mean() < rows[0.25][:, 1].mean() - 20 * SHOWN  # the first column is the first class
    assert np.median(rows[0.75][:, 0]) == pytest.approx(np.median(rows[0.25][:, 0]), abs=4 * SHOWN)


def train_record(step, loss, lr=0.01):
    return {"kind": "train", "epoch": 1, "step": step, "loss": loss, "lr": lr, "images_per_s": 9.0}


def test_the_loss_curve_ends_at_the_height_of_the_last_loss():
    records = [train_record(20 * i, 4 - 0.1 * i) for i in range(1, 31)]  # 3.9 down to 1.0, on an axis from 0 to 4
    image = pixels(loss_chart(records, LIGHT))[:, : 458 * SHOWN]
    curve = where(image[30 * SHOWN : 240 * SHOWN], LIGHT.first, 40)
    curve[:, 0] += 30 * SHOWN
    end = curve[curve[:, 1] >= curve[:, 1].max() - 1][:, 0].mean()
    lines = grid_lines(image[: 240 * SHOWN], LIGHT)
    highest = lines.min()  # the line of 4
    zero = where(image[200 * SHOWN : 250 * SHOWN], LIGHT.muted, 20)
    zero = 200 * SHOWN + np.bincount(zero[:, 0]).argmax()
    assert (zero - end) / (zero - highest) == pytest.approx(1.0 / 4, abs=0.01)


def test_the_smoothed_loss_is_not_bent_by_one_outlier():
    def curve(outlier):
        records = [train_record(i, outlier if i == 400 else 1.0) for i in range(1, 1001)]
        return where(pixels(loss_chart(records, LIGHT))[30 * SHOWN : 240 * SHOWN], LIGHT.first, 40)[:, 0]

    assert np.ptp(curve(1.0)) < 4 * SHOWN and np.ptp(curve(50.0)) < 4 * SHOWN


def test_accuracies_lie_at_their_heights():
    records = [{"epoch": e, "miou": 0.18 * e, "pixel_accuracy": 0.7} for e in (1, 2, 3)]  # on an axis from 0 to 80
    plot = pixels(validation_chart(records, LIGHT))[46 * SHOWN - 2 :, : 458 * SHOWN]
    accuracy, miou = where(plot, LIGHT.second, 30), where(plot, LIGHT.first, 30)
    lines = grid_lines(plot, LIGHT)
    lines = [lines[i : i + SHOWN].mean() for i in range(0, len(lines), SHOWN)]  # of 80, 60, 40 and 20, SHOWN pixels thick
    assert len(lines) == 4
    per_cent = (lines[3] - lines[0]) / 60
    end = miou[miou[:, 1] >= miou[:, 1].max() - 1][:, 0].mean()
    assert (np.median(accuracy[:, 0]) - lines[0]) / per_cent == pytest.approx(80 - 70, abs=0.5)
    assert (end - lines[0]) / per_cent == pytest.approx(80 - 54, abs=0.5)


@pytest.mark.parametrize("records", [[train_record(20, 3.0)], [train_record(20, 0.0, 0.0), train_record(40, 1e29, None)]])
def test_charts_of_one_record_and_of_extremes(records):
    assert pixels(loss_chart(records, LIGHT)).std() > 0
    for value in (None, 0.0, 1.0):
        validation_chart([{"epoch": 1, "miou": value, "pixel_accuracy": value}], DARK)


@pytest.mark.parametrize("count", [1, 2, 11, 19, 40, 100, 254])
def test_nothing_is_cut_off_at_the_edges(count):
    names = [f"{'a rather long name of a class ' * (i % 2)}{i}" for i in range(count)]
    classes = Classes(tuple(names), tuple((i % 200, 40, 90) for i in range(count)))
    confusion = 100 * torch.eye(count, dtype=torch.int64)
    records = [train_record(10000 * i, 123456.0) for i in range(1, 101)]
    accuracies = [{"epoch": 1000 * i, "miou": i / 10, "pixel_accuracy": 1.0} for i in range(1, 11)]
    for chart in (
        class_chart(dict.fromkeys(names, 1.0), 1.0, classes, LIGHT),
        confusion_chart(confusion, classes, LIGHT),
        loss_chart(records, LIGHT),
        validation_chart(accuracies, LIGHT),
    ):
        image = pixels(chart)
        edges = np.concatenate([image[:, 0], image[:, -1], image[0], image[-1]])
        assert (edges == 255).all()


@pytest.fixture
def other_fonts():
    """Fonts are looked for anew in this test, and after it."""
    caches = (evaluation._fonts, evaluation._font_for)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_charts_where_pillow_has_no_freetype(monkeypatch, other_fonts):
    bitmap = ImageFont.load_default_imagefont()

    def load_default(size=None):
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return bitmap

    monkeypatch.setattr(evaluation.ImageFont, "load_default", load_default)
    classes = Classes(("größer", "道路"), TWO.colours)
    assert evaluation._class_labels(classes, 200) == ["größer", "class 1"]
    image = pixels(class_chart({"größer": 1.0, "道路": 0.5}, 0.75, classes, LIGHT))
    rows = where(image[:, : 120 * SHOWN], LIGHT.ink, 60)[:, 0]  # the names, in the rows of their bars
    for colour in TWO.colours:
        bar = where(image, colour)[:, 0]
        assert ((rows >= bar.min() - 4) & (rows <= bar.max() + 4)).sum() > 100


def test_names_that_no_font_has_become_numbers(monkeypatch, other_fonts):
    load = ImageFont.truetype

    def truetype(font, *args, **options):
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return load(font, *args, **options)  # of Pillow's own

    monkeypatch.setattr(evaluation.ImageFont, "truetype", truetype)
    classes = Classes(("road", "道路", "a\x07b"), ((0, 0, 0),) * 3)
    assert evaluation._class_labels(classes, 200) == ["road", "class 1", "class 2"]
    [short] = evaluation._class_labels(Classes(("a name that is far too long for this",), ((0, 0, 0),)), 60)
    assert short.startswith("a name") and short.endswith("...")


# ------------------------------------------------------------------------------------------------------------ metrics.jsonl


def test_records_of_a_broken_log(tmp_path):
    lines = [
        json.dumps(train_record(20, 3.0)),
        json.dumps(train_record(40, None)),
        json.dumps(train_record(60, float("nan"))),  # NaN, as json.dumps writes it
        json.dumps({**train_record(80, 1.0), "lr": "fast"}),
        json.dumps({"kind": "val", "epoch": 1, "miou": 0.5, "pixel_accuracy": None, "class_iou": {}}),
        json.dumps({"kind": "val", "epoch": 2, "miou": 7, "pixel_accuracy": True}),
        json.dumps({"kind": "note"}),
        json.dumps(["train"]),
        '{"kind": ["train"], "step": 1}',
        '{"kind": "train", "step": null, "loss": 1, "lr": 1}',
        "[" * 100_000,
        "",
        '{"kind": "train", "epoch": 1, "st',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\x00")
    train, val, broken = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["lr"]) for r in train] == [
        (20, 3.0, 0.01),
        (40, None, 0.01),
        (60, None, 0.01),
        (80, 1.0, None),
    ]
    assert val == [
        {"epoch": 1, "miou": 0.5, "pixel_accuracy": None},
        {"epoch": 2, "miou": None, "pixel_accuracy": None},
    ]
    assert broken == 6


def test_of_steps_that_were_done_twice_the_second_time_counts(tmp_path):
    steps = [(20, 3.0), (40, 2.0), (60, 9.0), (40, 1.5), (60, 1.0)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(train_record(*each)) + "\n" for each in steps))
    train, _, broken = read_records(tmp_path / "m.jsonl")
    assert [(r["step"], r["loss"]) for r in train] == [(20, 3.0), (40, 1.5), (60, 1.0)] and broken == 0


# --------------------------------------------------------------------------------------------------------------- the page


def worst_rows(classes: Classes, count: int = 2) -> list[dict]:
    image = torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8)
    truth = torch.zeros(60, 90, dtype=torch.uint8)
    pictures = error_pictures(image, truth, truth, classes)
    row = {"pixel_accuracy": 0.25, "index": 0, "miou": None, "name": "a/<b>&.png", "pictures": pictures}
    return [row] * count


@pytest.mark.parametrize("count", [1, 2, 19, 100])
def test_a_page_for_any_number_of_classes(tmp_path, count):
    classes = Classes(tuple(f"kind {i}" for i in range(count)), tuple((i, 99, 50) for i in range(count)))
    confusion = confusion_of(count)
    result = metrics(confusion, classes)
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, [train_record(20, 3.0), {"kind": "val", "epoch": 1, **result}])))
    write_report(
        tmp_path / "deep" / "r.html", "A title", classes, result, confusion=confusion, log=log, worst=worst_rows(classes)
    )
    page = read(tmp_path / "deep" / "r.html")
    assert len(page.pictures) == 4 + 2 * 4 and len(page.alternatives) == 4
    for image, attrs in page.pictures[:4]:
        assert image.size == (SHOWN * int(attrs["width"]), SHOWN * int(attrs["height"])) and attrs["alt"]
    for (light, _), (dark, _) in zip(page.pictures, page.alternatives):
        assert light.size == dark.size and light.getpixel((0, 0)) == (255, 255, 255) != dark.getpixel((0, 0))
    assert all(image.size == (480, 320) for image, _ in page.pictures[4:])
    assert f"{100 * result['miou']:.2f} % mIoU" in page.text and torch.__version__ in page.text
    for name, value in result["class_iou"].items():
        assert f"{name} {100 * value:.2f}" in page.text
    assert (tmp_path / "deep" / "r.html").stat().st_size < 2e6


def test_the_table_holds_recall_precision_and_share(tmp_path):
    confusion = torch.tensor([[60, 20], [5, 15]])
    write_report(tmp_path / "r.html", "t", TWO, metrics(confusion, TWO), confusion=confusion)
    # 60 of 80 found, 60 of 65 right, 80 of 100 pixels; 15 of 20, 15 of 35, 20 of 100.
    assert "left 70.59 75.00 92.31 80.00" in read(tmp_path / "r.html").text
    assert "right 37.50 75.00 42.86 20.00" in read(tmp_path / "r.html").text


def test_text_from_users_is_text(tmp_path):
    names = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "&amp;", "</style></table>")
    classes = Classes(names, ((1, 2, 3),) * 4)
    confusion = confusion_of(4)
    write_report(
        tmp_path / "r.html",
        "</title><script>",
        classes,
        metrics(confusion, classes),
        confusion=confusion,
        log=tmp_path / "<script>none",
        worst=worst_rows(classes),
        facts={"<b>": "</dd><script>", "undecodable": "\udcff.png"},
        arguments={"<i>heading": {"<u>name": ["<script>", 1], "path": "a & b"}},
    )
    page = read(tmp_path / "r.html")
    assert not {"script", "b>", "u", "iframe"} & set(page.tags) and page.tags.count("img") == 2 + 2 * 4
    for text in (*names, "</title><script>", "<b> </dd><script>", "<u>name <script> 1", "a & b", "a/<b>&.png", "<i>heading"):
        assert text in page.text
    assert "<script>none: no such file or directory" in page.text


def test_a_page_of_nothing_says_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st')
    write_report(tmp_path / "r.html", "t", TWO, None, log=tmp_path / "metrics.jsonl")
    page = read(tmp_path / "r.html")
    assert not page.pictures and "has no records of them. 1 of its lines are no records" in page.text
    nothing = torch.zeros(2, 2, dtype=torch.int64)
    write_report(tmp_path / "r.html", "t", TWO, metrics(nothing, TWO), confusion=nothing, worst=[])
    assert len(read(tmp_path / "r.html").pictures) == 2 and "- % mIoU" in read(tmp_path / "r.html").text


@pytest.mark.parametrize(
    "records",
    [
        [train_record(20, None)],
        [train_record(20, 2.0, None)],
        [train_record(0, 0.0, 0.0), train_record(10, 1e29)],
        [train_record(10**12 + i, 1e-20 * i, 1e-12) for i in range(5)],
        [train_record(20, -1.0), train_record(40, 10**400)],
        [{"kind": "val", "epoch": 7, "miou": None, "pixel_accuracy": None}] * 2,
        [{"kind": "val", "epoch": epoch, "miou": epoch, "pixel_accuracy": 0} for epoch in (0, 1)],
        [{"kind": "val", "epoch": 7, "miou": {}, "pixel_accuracy": True, "class_iou": "none"}],
    ],
)
def test_any_log_makes_a_page(tmp_path, records):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_report(tmp_path / "r.html", "t", TWO, None, log=tmp_path / "metrics.jsonl")
    assert "nan" not in read(tmp_path / "r.html").text


def test_a_long_run_and_many_images_stay_below_five_megabytes(tmp_path):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (60, 120, 3), np.uint8)).resize((2048, 1024), Image.Resampling.BICUBIC)
    label = torch.from_numpy(generator.integers(0, 19, (16, 32), np.uint8)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    pictures = error_pictures(torch.from_numpy(np.array(noise)), label, label.flip(0), CITYSCAPES)
    row = {"pixel_accuracy": 0.5, "miou": 0.5, "name": "a.png", "pictures": pictures}
    records = [train_record(20 * i, loss) for i, loss in enumerate(generator.random(20_000))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    confusion = confusion_of(19)
    result = metrics(confusion, CITYSCAPES)
    log = tmp_path / "metrics.jsonl"
    write_report(tmp_path / "r.html", "t", CITYSCAPES, result, confusion=confusion, log=log, worst=[row] * 20)
    assert 1e6 < (tmp_path / "r.html").stat().st_size < 5e6


def test_wrong_pixels_are_marked_and_ignored_ones_black():
    image = torch.full((40, 480, 3), 200, dtype=torch.uint8)
    truth = torch.zeros(40, 480, dtype=torch.uint8)
    truth[:, 320:] = 255
    prediction = truth.clone()
    prediction[:, 160:] = 1
    files = error_pictures(image, truth, prediction, TWO)
    pictures = {name: np.array(Image.open(io.BytesIO(file)).convert("RGB")).astype(int) for name, (_, file) in files.items()}
    assert list(pictures) == ["image", "truth", "prediction", "errors"]
    right, wrong, ignored = (pictures["errors"][20, x] for x in (80, 240, 400))
    assert np.ptp(right) < 6 < np.ptp(wrong) and ignored.max() < 6
    assert np.abs(wrong - [0xD5, 0x5E, 0x00]).max() < 8
    assert pictures["truth"][20, 240].tolist() == [200, 30, 30] and pictures["prediction"][20, 240].tolist() == [20, 60, 220]
    assert pictures["truth"][20, 400].tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------- eval.py


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder with an untrained network for Cityscapes and a log that ends in the middle of a line."""
    torch.manual_seed(0)
    model, folder = FastSCNN(19), tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    (folder / "logs").mkdir()
    checkpoint = {"model": model.state_dict(), "model_args": model.args, "classes": CITYSCAPES.to_dict(), "epoch": 7}
    torch.save({**checkpoint, "args": {"data": "<somewhere>", "epochs": 8}}, folder / "checkpoints" / "best_model.pth")
    records = [train_record(20 * i, None if i == 3 else 3 / i) for i in range(1, 9)]
    records.append({"kind": "val", "epoch": 7, "miou": 0.4, "pixel_accuracy": 0.8})
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')
    return folder


def names_of_images(page: Page) -> list[str]:
    return re.findall(r"(\S+_leftImg8bit\.png) pixel accuracy ([\d.]+) %", page.text)


def test_two_processes_show_the_worst_images_of_both(run_folder, drawn, tmp_path):
    weights = run_folder / "checkpoints/best_model.pth"
    flags = ("--weights", weights, "--data", drawn, "--device", "cpu", "--report-images", "3", "--report")
    one = run_script("eval.py", *flags, tmp_path / "1.html")
    two = run_script("eval.py", *flags, tmp_path / "2.html", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert last_json(one.stdout) == last_json(two.stdout) and f"wrote {tmp_path / '2.html'}" in two.stdout
    pages = [read(tmp_path / name) for name in ("1.html", "2.html")]
    assert "1 process" in pages[0].text and "2 processes" in pages[1].text
    shown = [names_of_images(page) for page in pages]
    assert shown[0] == shown[1]
    assert [np.array(image).tolist() for image, _ in pages[0].pictures] == [
        np.array(image).tolist() for image, _ in pages[1].pictures
    ]
    # By hand: the share of the labelled pixels that are right, of every image.
    dataset = open_dataset("cityscapes", drawn, "val")
    segment = evaluation.accelerate(
        evaluation.build_from_checkpoint(evaluation.read_checkpoint(weights), weights), device=torch.device("cpu")
    )
    scores = []
    for (image, label), sample in zip((dataset[i] for i in range(len(dataset))), dataset.samples):
        right = (segment(image[None])[0] == label)[label != 255]
        scores.append((right.float().mean().item(), str(sample.image)))
    expected = [(name, f"{100 * score:.2f}") for score, name in sorted(scores)[:3]]
    assert shown[0] == expected
    page = pages[0]
    assert "epoch 7" in page.text and "epochs 8" in page.text and "<somewhere>" in page.text
    assert "1 of its lines are no records" in page.text
    assert len(page.pictures) == 4 + 3 * 4  # loss, accuracies, bars, confusion


def test_weights_outside_a_run_have_no_curves(run_folder, drawn, tmp_path, capsys):
    shutil.copy(run_folder / "checkpoints/best_model.pth", tmp_path / "w.pth")
    flags = ["--weights", str(tmp_path / "w.pth"), "--data", str(drawn), "--device", "cpu", "--workers", "0"]
    evaluation.main([*flags, "--report", str(tmp_path / "new" / "r.html"), "--report-images", "0"])
    page = read(tmp_path / "new" / "r.html")
    assert "Training curves are left out" in page.text and len(page.pictures) == 2
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "w.pth").rename(tmp_path / "checkpoints/w.pth")
    flags[1] = str(tmp_path / "checkpoints/w.pth")
    evaluation.main([*flags, "--report", str(tmp_path / "r.html"), "--report-images", "9"])
    page = read(tmp_path / "r.html")
    assert f"{tmp_path / 'logs/metrics.jsonl'}: no such file" in page.text
    assert len(names_of_images(page)) == 5  # all that there are


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--report", "page"], "--report page has the suffix '', expected .html"),
        (["--report", "page.pdf"], "--report page.pdf has the suffix '.pdf', expected .html"),
        (["--report", "page.html", "--report-images", "-1"], "--report-images is -1, expected at least 0"),
    ],
)
def test_wrong_flags_are_said_before_the_evaluation(run_folder, drawn, flags, message):
    weights = run_folder / "checkpoints/best_model.pth"
    with pytest.raises(evaluation.UsageError, match=re.escape(message)):
        evaluation.main(["--weights", str(weights), "--data", str(drawn), "--device", "cpu", *flags])


def test_images_without_labels_are_not_the_worst(drawn):
    worst = WorstImages(open_dataset("cityscapes", drawn, "val"), 2)
    image, label = worst.dataset[0]
    for index, right in enumerate((0, 3, 1, 2)):
        confusion = torch.zeros(19, 19, dtype=torch.int64)
        confusion[0, 0], confusion[0, 1] = right, (4 - right) * (index > 0)
        worst.add(index, image, label, label, confusion)
    rows = worst.rows()
    assert [(row["index"], row["pixel_accuracy"]) for row in rows] == [(2, 0.25), (3, 0.5)]
    # 1 right and 3 taken for another: 1 / 4 and 0 / 3. 2 and 2: 2 / 4 and 0 / 2.
    assert [row["miou"] for row in rows] == [0.125, 0.25]


# ------------------------------------------------------------------------------------------------------------- the browser


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH (chromium, chromium-browser, google-chrome)")


def browse(page, folder, *flags) -> str:
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [
        "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
        page.as_uri(),
    ]  # port 9: no network
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_picture(tmp_path, scheme):
    confusion = confusion_of(11)
    log = tmp_path / "metrics.jsonl"
    records = [train_record(20 * i, 3 / i) for i in range(1, 9)] + [
        {"kind": "val", "epoch": 1, "miou": 0.4, "pixel_accuracy": 1}
    ]
    log.write_text("\n".join(map(json.dumps, records)))
    result = metrics(confusion, CAMVID)
    write_report(tmp_path / "r.html", "t", CAMVID, result, confusion=confusion, log=log, worst=worst_rows(CAMVID))
    # The page in a frame, 390 pixels wide as on a phone, and a script beside it that looks in.
    counts = "[i.length, [...i].filter(e => e.complete && e.naturalWidth > 0).length, d.documentElement.scrollWidth, "
    counts += "getComputedStyle(d.body).backgroundColor, d.scripts.length, d.images[0].currentSrc.length]"
    (tmp_path / "frame.html").write_text(
        f'<iframe width="390" height="800" style="border: 0" srcdoc="{html.escape((tmp_path / "r.html").read_text())}"></iframe>'
        "<pre></pre><script>onload = () => { const d = document.querySelector('iframe').contentDocument, i = d.images; "
        f"document.querySelector('pre').textContent = JSON.stringify({counts}) }}</script>"
    )
    setting = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    dom = browse(tmp_path / "frame.html", tmp_path, "--dump-dom", "--virtual-time-budget=5000", setting)
    images, loaded, width, background, scripts, source = json.loads(html.unescape(re.search("<pre>(.*)</pre>", dom)[1]))
    assert images == loaded == 4 + 2 * 4 and scripts == 0
    assert width <= 390  # nothing makes the page wider than the phone
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    page = read(tmp_path / "r.html")
    chosen = page.pictures[0][1]["src"] if scheme == "light" else page.alternatives[0][1]["srcset"]
    assert source == len(chosen)


def test_a_screenshot_has_the_charts_on_it(tmp_path):
    confusion = torch.tensor([[50, 0], [50, 100]])  # IoU 50 % and 66.67 %
    write_report(tmp_path / "r.html", "t", TWO, metrics(confusion, TWO), confusion=confusion)
    browse(tmp_path / "r.html", tmp_path, f"--screenshot={tmp_path / 's.png'}", "--window-size=1100,1200")
    image = np.array(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    assert image.shape == (1200, 1100, 3)
    left, right = (where(image[:, :560], colour)[:, 1] for colour in TWO.colours)  # the bars, not the table beside them
    assert np.ptp(left) / np.ptp(right) == pytest.approx(0.5 / (2 / 3), abs=0.03)


def test_the_network_in_the_repository_makes_a_page(camvid, tmp_path, capsys):
    argv = ["--weights", str(ROOT / "weights/camvid.pth"), "--dataset", "camvid", "--data", str(camvid), "--device", "cpu"]
    evaluation.main([*argv, "--workers", "0", "--report", str(tmp_path / "r.html")])
    page = read(tmp_path / "r.html")
    assert "61.00 % mIoU 91.53 % pixel accuracy" in page.text and "camvid val, 101 images" in page.text
    assert len(page.pictures) == 2 + 6 * 4 and (tmp_path / "r.html").stat().st_size < 3e6
    accuracies = [float(each) for each in re.findall(r"pixel accuracy ([\d.]+) %", page.text)]
    assert accuracies == sorted(accuracies) and len(accuracies) == 6 and accuracies[-1] < 91.53
