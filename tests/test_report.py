"""The page of `eval.py --report`: its pictures show the data, nothing in it comes from elsewhere, and no log or name breaks it."""

import base64
import contextlib
import html
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import eval as evaluation
from conftest import ROOT, last_json, run_script
from data import CITYSCAPES, Classes, open_dataset
from eval import DARK, LIGHT, WorstImages, metrics, read_records, write_report
from model import FastSCNN

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "", "a\nb\x00c", "路面 🚗", "n" * 5000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """A page taken apart: tags, text, and the pictures {alt: [light, dark]}, where dark may be missing."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.pieces, self.open, self.pictures, self.source = set(), [], [], [], {}, None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "tags are left open"
        self.text = " ".join(self.pieces)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.attributes += attributes.items()
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "source":
            self.source = self.picture(attributes["srcset"])
        if tag == "img":
            assert attributes["alt"] not in self.pictures
            self.pictures[attributes["alt"]] = [self.picture(attributes["src"]), self.source]
            self.source = None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.pieces.append(text)

    def picture(self, uri):
        kind, _, code = uri.partition(";base64,")
        file = base64.b64decode(code, validate=True)
        image = Image.open(io.BytesIO(file))
        image.load()
        assert kind == f"data:image/{image.format.lower()}"
        return np.array(image.convert("RGB")).astype(int)

    def chart(self, beginning, theme=LIGHT):
        """The picture whose description begins so."""
        return next(each for alt, each in self.pictures.items() if alt.startswith(beginning))[theme is DARK]


def near(picture, colour, distance=12):
    """(H, W) bool: the pixels of a colour."""
    colour = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return (abs(picture - np.array(colour)) <= distance).all(-1)


def runs(flags):
    """[first, last] of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return [[first, last - 1] for first, last in zip(edges[::2], edges[1::2])]


def some_classes(count):
    return Classes(tuple(f"class of number {i}" for i in range(count)), tuple((37 * i % 256, 200, i) for i in range(count)))


def train_record(step, loss, **fields):
    return json.dumps({"kind": "train", "epoch": 1, "step": step, "loss": loss, "lr": 0.01, "skipped": 0, **fields})


def val_record(epoch, miou, accuracy, **fields):
    return json.dumps({"kind": "val", "epoch": epoch, "miou": miou, "pixel_accuracy": accuracy, "class_iou": {}, **fields})


def report(tmp_path, confusion, classes, lines=None, **more):
    """The page of a confusion matrix and of the lines of a log."""
    log = tmp_path / "metrics.jsonl"
    if lines is not None:
        log.write_text("\n".join(lines) + "\n")
    matrix = None if confusion is None else torch.as_tensor(confusion)
    result = None if confusion is None else metrics(matrix, classes)
    path = tmp_path / "deep" / "report.html"
    write_report(path, "Title", classes, result, confusion=matrix, log=None if lines is None else log, **more)
    return Page(path)


def test_bars_are_as_long_as_their_iou(tmp_path):
    # IoU of red 10 / 20, of green 90 / 100 and of blue 0; white occurs nowhere.
    confusion = [[10, 10, 0, 0], [0, 90, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    colours = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 0, 250))
    page = report(tmp_path, confusion, Classes(("red", "green", "blue", "none"), colours))
    for theme in (LIGHT, DARK):
        chart = page.chart("IoU of each class", theme)
        columns = [np.flatnonzero(near(chart, colour).any(0)) for colour in colours]
        start, grid = columns[0][0], np.flatnonzero(near(chart, theme.grid).sum(0) > chart.shape[0] / 4)
        end = grid[-1]  # the line at 100
        assert (columns[0][-1] - start) / (end - start) == pytest.approx(0.5, abs=0.006)
        assert (columns[1][-1] - start) / (end - start) == pytest.approx(0.9, abs=0.006)
        assert columns[2].size == columns[3].size == 0
        # From the top to the bottom in the order of the classes.
        rows = [np.flatnonzero(near(chart, colour).any(1)).mean() for colour in colours[:2]]
        assert rows[0] < rows[1]
    assert "50.00" in page.text and "90.00" in page.text


def confusion_cells(chart, count):
    """(count, count) how dark each cell is, of a matrix each of whose rows and columns has a full cell."""
    full = near(chart, LIGHT.full)
    full[:, full.sum(0) <= 12] = False  # the scale
    rows, columns = np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))
    inner = 255 - chart[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean(-1)
    split = [np.linspace(0, side, count + 1).round().astype(int) for side in inner.shape]
    return np.array(
        [
            [np.median(inner[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]) for x0, x1 in zip(split[1], split[1][1:])]
            for y0, y1 in zip(split[0], split[0][1:])
        ]
    )


@pytest.mark.parametrize("count", [2, 11, 19])
def test_confusion_matrix_is_dark_where_the_pixels_are(tmp_path, count):
    cells = confusion_cells(report(tmp_path, np.eye(count, dtype=int) * 7, some_classes(count)).chart("Confusion"), count)
    assert cells.argmax(1).tolist() == list(range(count)) and (cells[~np.eye(count, dtype=bool)] < 1).all()
    # All of class i taken for i + 1: rows are the truth. Another count in each row changes nothing.
    moved = np.roll(np.eye(count, dtype=int), 1, 1) * np.arange(1, count + 1)[:, None]
    cells = confusion_cells(report(tmp_path, moved, some_classes(count)).chart("Confusion"), count)
    assert cells.argmax(1).tolist() == [(i + 1) % count for i in range(count)]


def test_shade_of_a_cell_is_its_share_of_the_row(tmp_path):
    confusion = [[100, 0, 0, 0], [75, 25, 0, 0], [0, 0, 1, 0], [0, 0, 0, 5]]
    chart = report(tmp_path, confusion, some_classes(4)).chart("Confusion")
    cells = confusion_cells(chart, 4)
    assert cells[1, 1] / cells[0, 0] == pytest.approx(0.25, abs=0.02)
    assert cells[1, 0] / cells[0, 0] == pytest.approx(0.75, abs=0.02)


def panels(chart):
    """Heights of the grid's lines in the loss' panel, top to bottom, without that at the bottom."""
    lines = [np.mean(run) for run in runs(near(chart, LIGHT.grid, 3).mean(1) > 0.5)]
    floor = [np.mean(run) for run in runs(near(chart, LIGHT.muted, 3).mean(1) > 0.5)]
    return [line for line in lines if line < floor[0] - 4], floor[0]


def test_loss_curve_starts_and_ends_at_its_values(tmp_path):
    steps = range(10, 1010, 10)
    lines = [train_record(step, 4 - 3 * (step - 10) / 990, lr=0.02 * (1 - step / 2000)) for step in steps]
    chart = report(tmp_path, [[1]], some_classes(1), lines).chart("Training loss")
    grid, floor = panels(chart)
    assert len(grid) == 4 and np.ptp(np.diff([*grid, floor])) <= 2, "lines at 4, 3, 2 and 1, above an axis at 0"
    curve = near(chart, LIGHT.first, 30)
    curve[: round(grid[0]) - 12] = False  # the legend
    columns = np.flatnonzero(curve.any(0))
    first, last = (np.flatnonzero(curve[:, column]).mean() for column in (columns[0] + 1, columns[-1] - 1))
    assert first == pytest.approx(grid[0], abs=4) and last == pytest.approx(grid[3], abs=4)
    middle = np.flatnonzero(curve[:, (columns[0] + columns[-1]) // 2]).mean()
    assert middle == pytest.approx((grid[1] + grid[2]) / 2, abs=5)  # of a loss of 2.5
    rate = near(chart, LIGHT.second, 30)
    heights = [np.flatnonzero(rate[:, column]).mean() for column in (columns[0] + 1, columns[-1] - 1)]
    assert floor < heights[0] < heights[1], "the learning rate falls, in a panel below"


def test_validation_curves_end_at_their_values(tmp_path):
    lines = [val_record(epoch, epoch / 10, 0.5 + epoch / 20) for epoch in (2, 4, 6)]
    chart = report(tmp_path, [[1]], some_classes(1), lines).chart("mIoU and pixel accuracy")
    grid = [np.mean(run) for run in runs(near(chart, LIGHT.grid, 3).mean(1) > 0.5)]
    # mIoU ends at 60 and pixel accuracy at 80, which are lines of the grid: 100 80 60 40 20 above the axis at 0.
    assert len(grid) == 5
    for colour, expected in ((LIGHT.first, grid[2]), (LIGHT.second, grid[1])):
        curve = near(chart, colour, 30)
        curve[: round(grid[0])] = False
        columns = np.flatnonzero(curve.any(0))
        mark = np.flatnonzero(curve[:, columns[-1] - 3 : columns[-1]].any(1))
        assert (mark[0] + mark[-1]) / 2 == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("count", [1, 2, 19, 100])
def test_any_number_of_classes_fits_the_pictures(tmp_path, count):
    rng = np.random.default_rng(count)
    confusion = rng.integers(0, 9, (count, count)) + 50 * np.eye(count, dtype=int)
    lines = [train_record(step, 123456.0 / step) for step in range(1, 90)] + [val_record(e, 0.999, 1.0) for e in range(1, 200)]
    page = report(tmp_path, confusion, some_classes(count), lines)
    assert len(page.pictures) == 4
    for light, dark in page.pictures.values():
        for picture, theme in ((light, LIGHT), (dark, DARK)):
            edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert near(edge, theme.paper, 0).all(), "something is cut off at the edge"
            assert picture.shape == light.shape and not near(picture, theme.paper, 0).all()
    assert page.text.count("class of number") >= count


def test_hostile_names_are_text(tmp_path):
    classes = Classes(HOSTILE, tuple((i, i, i) for i in range(len(HOSTILE))))
    image, label = torch.zeros(32, 48, 3, dtype=torch.uint8), torch.zeros(32, 48, dtype=torch.uint8)
    rows = [
        {
            "name": f"/x/{i}{name}",
            "pixel_accuracy": 0.5,
            "miou": None,
            "pictures": evaluation.error_pictures(image, label, label, classes),
        }
        for i, name in enumerate(HOSTILE[:3])
    ]
    page = report(
        tmp_path,
        np.eye(len(HOSTILE), dtype=int),
        classes,
        [],
        worst=rows,
        facts={"weights": HOSTILE[0], HOSTILE[1]: 1},
        arguments={HOSTILE[0]: {HOSTILE[1]: HOSTILE[:3], "out": HOSTILE[1]}},
    )
    assert not page.tags & {"script", "iframe", "link", "object", "svg", "base", "form"}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for name in (*HOSTILE[:3], HOSTILE[5]):
        assert name in page.text
    source = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source and html.escape(HOSTILE[1]) in source
    for picture, _ in list(page.pictures.values())[:2]:
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert near(edge, LIGHT.paper, 0).all(), "a long name is cut off at the edge"


def test_page_asks_for_nothing_from_elsewhere(tmp_path):
    page = report(tmp_path, np.eye(3, dtype=int), some_classes(3), [train_record(1, 1.0), val_record(1, 0.5, 0.5)])
    for name, value in page.attributes:
        assert name not in ("href", "action", "data") and (name not in ("src", "srcset") or value.startswith("data:image/"))
    source = (tmp_path / "deep" / "report.html").read_text()
    assert "url(" not in source and "@import" not in source and "http:" not in source and "https:" not in source


def test_without_a_log_the_page_says_so(tmp_path):
    page = report(tmp_path, np.eye(3, dtype=int), some_classes(3))
    assert "left out" in page.text and not any("loss" in alt for alt in page.pictures)
    assert len(page.pictures) == 2
    for log in (tmp_path / "none.jsonl", tmp_path):  # absent, and a folder
        write_report(tmp_path / "r.html", "T", some_classes(3), metrics(torch.eye(3).long(), some_classes(3)), log=log)
        assert str(log) in Page(tmp_path / "r.html").text


# What is no record of training or validation, and records whose figures are none.
BROKEN = [
    "",
    "{",
    '{"kind": "tra',
    "[]",
    "null",
    "3",
    '"x"',
    "[" * 100_000,
    "{}",
    '{"kind": []}',
    '{"kind": "train"}',
    "\x00\xff\ufffd",
]
BROKEN += [train_record(None, 1.0), train_record("5", 1.0), train_record(float("nan"), 1.0), train_record(True, 1.0)]
BROKEN += [val_record(None, 0.5, 0.5), val_record([1], 0.5, 0.5)]
ODD = [
    train_record(5, "low"),
    train_record(6, [1]),
    train_record(7, 10**400),
    train_record(8, 1.0, lr="x"),
    val_record(1, {}, True),
]


def test_broken_lines_are_left_out_and_counted(tmp_path):
    good = [train_record(10, 2.0), train_record(20, None), train_record(30, float("nan")), val_record(2, None, 0.5)]
    lines = [*BROKEN[:10], *good, *BROKEN[10:], train_record(40, 1.0)]
    page = report(tmp_path, np.eye(3, dtype=int), some_classes(3), lines)
    training, validation, broken = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in training] == [(10, 2.0), (20, None), (30, None), (40, 1.0)]
    assert [(r["epoch"], r["miou"], r["pixel_accuracy"]) for r in validation] == [(2, None, 0.5)]
    assert broken == len([line for line in BROKEN if line])
    assert f"{broken} of its lines" in page.text and len(page.pictures) == 4


@pytest.mark.parametrize(
    "lines",
    [
        [],
        BROKEN,
        ODD,
        [train_record(1, None)],
        [train_record(1, 0.0)],
        [train_record(1, 2.0, lr=None)],
        [train_record(s, 1e29 if s == 3 else -1.0, lr=0) for s in range(5)],
        [train_record(10**12 + s, 1e-20 * s, lr=1e-12) for s in range(5)],
        [val_record(7, 0.5, 0.6)],
        [val_record(1, None, None), val_record(2, None, None)],
        [val_record(1, 0, 0), val_record(2, 1, 1)],
        [json.dumps({"kind": "val", "epoch": 1, "miou": 0.5, "pixel_accuracy": 0.5})],
        [val_record(1, 0.5, 0.5, class_iou=[1]), val_record(2, 0.5, 0.5, class_iou={"class of number 0": "high"})],
    ],
)
def test_any_log_makes_a_page(tmp_path, lines):
    for confusion in (np.eye(3, dtype=int), np.zeros((3, 3), dtype=int), None):  # None: as train.py does, of its log alone
        page = report(tmp_path, confusion, some_classes(3), lines)
        assert "Title" in page.text and "nan" not in page.text


def test_log_of_a_resumed_run_goes_forwards(tmp_path):
    lines = [train_record(s, 9.0) for s in (10, 20, 30, 40)] + [val_record(1, 0.1, 0.1), val_record(2, 0.1, 0.1)]
    lines += [train_record(s, 1.0) for s in (30, 40, 50)] + [val_record(2, 0.7, 0.7)]
    report(tmp_path, None, some_classes(2), lines)
    training, validation, broken = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in training] == [(10, 9.0), (20, 9.0), (30, 1.0), (40, 1.0), (50, 1.0)]
    assert [(r["epoch"], r["miou"]) for r in validation] == [(1, 0.1), (2, 0.7)] and broken == 0


def test_worst_images_are_the_worst(folder_dataset):
    dataset = open_dataset("folder", folder_dataset, "val")
    worst, (image, truth) = WorstImages(dataset, 2), dataset[0]
    scores = {}
    for index, columns in enumerate((0, 30, 10, 60)):  # that are wrong, of 64
        prediction = truth.clone()
        prediction[:, :columns] = (truth[:, :columns] + 1) % 3
        scores[index] = 1 - columns / 64
        worst.add(index % 2, image, truth, prediction, evaluation.confusion_matrix(prediction, truth, 3, 255))
    nothing = torch.full_like(truth, 255)  # no label: it has no figure, and is not bad
    worst.add(0, image, nothing, truth, evaluation.confusion_matrix(truth, nothing, 3, 255))
    rows = worst.rows()
    assert [row["pixel_accuracy"] for row in rows] == [scores[3], scores[1]]
    _, file = rows[0]["pictures"]["errors"]
    picture = np.array(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    orange = near(picture, LIGHT.second, 40).mean(0)  # of each column
    edge = round(60 / 64 * picture.shape[1])
    assert (orange[: edge - 8] > 0.9).all() and (orange[edge + 8 :] < 0.1).all()


def test_page_stays_below_five_megabytes(tmp_path):
    rng = np.random.default_rng(0)  # noise, which no format packs well, in tiles of the size of the page
    image = Image.fromarray(rng.integers(0, 256, (60, 120, 3), np.uint8)).resize((2048, 1024), Image.Resampling.BICUBIC)
    label = torch.from_numpy(rng.integers(0, 19, (16, 32), np.uint8)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    pictures = evaluation.error_pictures(torch.from_numpy(np.array(image)), label, label.flip(0), CITYSCAPES)
    rows = [{"name": str(i), "pixel_accuracy": 0.5, "miou": 0.5, "pictures": pictures} for i in range(30)]
    lines = [train_record(step, float(loss)) for step, loss in enumerate(rng.random(20_000))]
    report_path = tmp_path / "deep" / "report.html"
    with contextlib.suppress(AssertionError):  # the same image many times has the same description
        report(tmp_path, np.eye(19, dtype=int), CITYSCAPES, lines, worst=rows)
    assert 100_000 < report_path.stat().st_size < 5e6


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, drawn):
    """A run's folder with weights of an untrained network, and the log of a training that was cut off and resumed."""
    torch.manual_seed(0)
    model = FastSCNN(19)
    run = tmp_path_factory.mktemp("runs") / "a <b> & c"
    (run / "checkpoints").mkdir(parents=True)
    (run / "logs").mkdir()
    fields = {"model": model.state_dict(), "model_args": model.args, "classes": CITYSCAPES.to_dict()}
    torch.save(
        {**fields, "epoch": 3, "args": {"data": "x", "epochs": 3, "base_lr": 0.045, "out": "<i>"}},
        run / "checkpoints" / "best_model.pth",
    )
    lines = [train_record(step, 3 / (1 + step / 100)) for step in range(5, 400, 5)] + [
        val_record(e, e / 9, e / 6) for e in (1, 2, 3)
    ]
    (run / "logs" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    return run


def test_two_processes_gather_the_worst_images_of_one(run_folder, drawn, tmp_path):
    flags = (
        "--weights",
        run_folder / "checkpoints" / "best_model.pth",
        "--data",
        drawn,
        "--device",
        "cpu",
        "--report-images",
        3,
    )
    pages = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.html"
        done = run_script("eval.py", *flags, "--report", path, processes=processes)
        assert done.returncode == 0, done.stderr
        pages.append(Page(path))
    result, (one, two) = last_json(done.stdout), pages
    assert list(one.pictures) == list(two.pictures) and len(one.pictures) == 4 + 4 * 3
    for alt, (light, _) in one.pictures.items():
        assert np.array_equal(light, two.pictures[alt][0]), alt
    assert f"{100 * result['miou']:.2f} %" in two.text and f"{100 * result['pixel_accuracy']:.2f} %" in two.text
    assert str(run_folder) in two.text and "base_lr" in two.text and "<i>" in two.text and "1 of its lines" in two.text
    # The three are those with the lowest accuracy, the lowest first, counted here image by image.
    model = evaluation.build_from_checkpoint(evaluation.read_checkpoint(flags[1]), flags[1])
    segment, dataset = evaluation.accelerate(model), open_dataset("cityscapes", drawn, "val")
    accuracy = {}
    for sample, (image, label) in zip(dataset.samples, dataset):
        right = (segment(image[None])[0] == label)[label != 255]
        accuracy[sample.image.name] = right.float().mean().item()
    shown = [alt.removeprefix("image of ") for alt in one.pictures if alt.startswith("image of ")]
    assert shown == sorted(accuracy, key=accuracy.get)[:3]
    for name in shown:
        assert f"pixel accuracy {100 * accuracy[name]:.2f} %" in one.text


@pytest.mark.parametrize("flags", [("--report", "page.pdf"), ("--report", "p.html", "--report-images", "-1")])
def test_wrong_flags_are_one_line(run_folder, drawn, flags, capsys):
    argv = ["--weights", str(run_folder / "checkpoints" / "best_model.pth"), "--data", str(drawn), *flags]
    assert evaluation.exit_status("eval.py", lambda: evaluation.main(argv)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--report" in message and "expected" in message


def browse(tmp_path, page, *flags):
    """Chromium without a window and without a network opens a page."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
    )
    closed = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, closed, "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, errors="replace")


@pytest.fixture
def camvid_like_page(tmp_path):
    classes = some_classes(11)
    rng = np.random.default_rng(0)
    image, label = (torch.from_numpy(rng.integers(0, 11, shape, np.uint8)) for shape in ((36, 48, 3), (36, 48)))
    pictures = evaluation.error_pictures(image, label, label.flip(0), classes)
    rows = [{"name": f"/data/{i}.png", "pixel_accuracy": 0.5, "miou": 0.5, "pictures": pictures} for i in range(2)]
    lines = [train_record(step, 1.0) for step in range(9)] + [val_record(1, 0.5, 0.5)]
    confusion = rng.integers(0, 99, (11, 11))
    report(tmp_path, confusion, classes, lines, worst=rows, arguments={"Arguments": {"out": "x" * 300}})
    return tmp_path / "deep" / "report.html"


def test_browser_loads_every_picture_without_a_network(camvid_like_page, tmp_path):
    source = camvid_like_page.read_text()
    # The page forbids scripts, this one too: the copy drops that, and says what the browser made of it.
    policy = source[source.index("<meta http-equiv") : source.index("<title>")]
    script = """<script>onload = () => { const i = [...document.images]; document.body.dataset.seen = [i.length,
        i.filter(e => e.complete && e.naturalWidth > 0).length, performance.getEntriesByType("resource").filter(e =>
        !e.name.startsWith("data:")).length, document.documentElement.scrollWidth <= innerWidth].join(" ") }</script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(source.replace(policy, "").replace("</body>", script + "</body>"))
    for width in (400, 1100):
        done = browse(tmp_path, copy, "--dump-dom", f"--window-size={width},900")
        count = source.count("<img ")
        assert f'data-seen="{count} {count} 0 true"' in done.stdout, done.stderr[-2000:]
    assert count == 4 + 4 * 2


def test_browser_shows_a_page_that_is_not_blank(camvid_like_page, tmp_path):
    done = browse(tmp_path, camvid_like_page, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1100,2600")
    assert done.returncode == 0, done.stderr[-2000:]
    shot = np.array(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert shot.shape == (2600, 1100, 3)
    paper = near(shot, shot[0, 0], 0)
    assert 0.3 < paper.mean() < 0.98 and len(np.unique(shot.reshape(-1, 3), axis=0)) > 100
    assert near(shot, LIGHT.first, 4).sum() > 100 and near(shot, LIGHT.full, 4).sum() > 0, "charts are on it"


def test_report_of_camvid(camvid, tmp_path):
    weights = ROOT / "weights" / "camvid.pth"
    if not weights.exists():
        pytest.skip(f"{weights} is not here")
    done = run_script(
        "eval.py",
        "--weights",
        weights,
        "--dataset",
        "camvid",
        "--data",
        camvid,
        "--report",
        tmp_path / "r.html",
        "--workers",
        0,
    )
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "r.html")
    assert len(page.pictures) == 2 + 4 * 6 and "left out" in page.text
    assert (tmp_path / "r.html").stat().st_size < 5e6
    assert f"{100 * last_json(done.stdout)['miou']:.2f} %" in page.text
