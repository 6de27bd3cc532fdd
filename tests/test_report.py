"""The page of tools/report.py: its figures against the data, what it says, and that it needs no other file."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from conftest import ROOT, last_json
from data import Classes, open_dataset
from eval import metrics
from model import FastSCNN, load_weights
from ops_ext import accelerate
from tools import report

TWO = Classes(("left", "right"), ((200, 30, 30), (20, 60, 220)))


class Page(HTMLParser):
    """What a browser would read: tags, text, decoded pictures, and the text of table rows as lists of cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.pictures, self.rows, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", attrs["src"]).groups()
            image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            assert image.format == kind.upper()
            self.pictures.append((np.array(image.convert("RGB")).astype(int), attrs["alt"]))
        assert not {"href", "srcset", "onload", "onerror", "onclick"} & attrs.keys()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def save_network(path, classes: Classes, **more) -> FastSCNN:
    """An untrained network as train.py saves it."""
    torch.manual_seed(0)
    model = FastSCNN(len(classes.names))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "model_args": model.args, "classes": classes.to_dict(), "epoch": 7}
    torch.save({**state, **more}, path)
    return model


# --------------------------------------------------------------------------------------------------------------- curves


def test_curves_are_the_last_records_of_each_step_and_epoch(tmp_path):
    records = [
        {"kind": "train", "epoch": 1, "step": 20, "loss": 2.0, "lr": 0.1, "seconds": 60},
        {"kind": "train", "epoch": 1, "step": 40, "loss": 9.0, "lr": 0.1, "seconds": 99},
        {"kind": "val", "epoch": 2, "miou": 0.9, "pixel_accuracy": 0.95},
        {"kind": "train", "epoch": 1, "step": 40, "loss": 1.5, "lr": 0.1, "seconds": 61.4},  # resumed
        {"kind": "train", "epoch": 2, "step": 60, "loss": None, "lr": 0.1},  # all steps were skipped
        {"kind": "train", "epoch": 2, "step": 80, "loss": float("nan"), "lr": 0.1},
        {"kind": "val", "epoch": 1, "miou": 0.25, "pixel_accuracy": 0.5},
        {"kind": "val", "epoch": 2, "miou": None, "pixel_accuracy": 0.75},
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:25], *lines[3:], '{"kind": "tra']))
    curves = {name: curve.tolist() for name, curve in report.read_curves(tmp_path / "metrics.jsonl").items()}
    assert curves == {"loss": [[20, 2], [40, 1.5]], "seconds": [[20, 60], [40, 61.4]], "miou": [[1, 0.25]]}
    page = Page(report.training_curves(tmp_path / "metrics.jsonl"))
    assert page.tags.count("svg") == 2 and "nan" not in page.text
    assert "training loss, median: last 1.5" in page.text and "Time of the training steps: 0:02:01" in page.text
    assert "mIoU, %: best 25.00 in epoch 1" in page.text


def test_a_run_without_records_has_no_curves(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"kind": "train", "st')
    for name in ("empty.jsonl", "missing.jsonl"):
        page = Page(report.training_curves(tmp_path / name))
        assert "svg" not in page.tags and "No curves" in page.text


def test_points_lie_where_the_axes_say():
    svg = report.chart(np.array([[0, 0], [5, 50], [10, 400.0]]), 100, "epoch", "a")
    grid = {float(y): float(label) for y, label in re.findall(r'y1="([\d.]+)" .*?text-anchor="end">([\d.]+)<', svg)}
    (path,) = re.findall(r'd="M([\d., ]+)h0"', svg)
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    place = {value: y for y, value in grid.items()}
    assert [points[0][1], points[2][1]] == [place[0], place[100]]  # what is above the axis is drawn at its top
    assert points[1][1] == pytest.approx(place[50])
    labels = {label: float(x) for x, label in re.findall(r'x="([\d.]+)" y="224" text-anchor="middle">([\d.]+)<', svg)}
    assert [points[0][0], points[2][0]] == [labels["0"], labels["10"]]
    assert points[1][0] == pytest.approx(labels["5"])


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_class_table_by_hand():
    classes = Classes(("left", "right", "never"), ((1, 2, 3),) * 3)
    confusion = torch.tensor([[60, 20, 0], [5, 15, 0], [0, 0, 0]])
    result = {**metrics(confusion, classes), "class_iiou": {"left": 0.5}, "miiou": 0.5}
    page = Page(report.class_table(result, confusion.numpy(), classes))
    # IoU 60 / 85 and 15 / 40; 60 of 80 found, 60 of 65 right, 80 of 100 pixels; 15 of 20, 15 of 35, 20 of 100.
    assert page.rows[1] == ["left", "", "70.59", "75.00", "92.31", "80.00", "50.00"]
    assert page.rows[2] == ["right", "", "37.50", "75.00", "42.86", "20.00", "-"]
    assert page.rows[3] == ["never", "", "-", "-", "-", "0.00", "-"]
    assert "iIoU" not in report.class_table(metrics(confusion, classes), confusion.numpy(), classes)


def test_the_confusion_table_by_hand():
    table = report.confusion_table(np.array([[999, 1, 0], [50, 150, 0], [0, 0, 0]]), ("a", "b", "c"))
    rows = Page(table).rows
    assert [row[0] for row in rows[1:]] == rows[0][1:] == ["a", "b", "c"]
    assert [row[1:] for row in rows[1:]] == [["100", "", ""], ["25", "75", ""], ["", "", ""]]
    heats = re.findall(r'<td class="(blue|orange)" style="--heat:(\d+)">', table)
    assert [heat for _, heat in heats[:6]] == ["100", "3", "0", "50", "87", "0"]
    assert [kind for kind, _ in heats] == ["blue", "orange", "orange", "orange"] * 2 + ["blue"]


def test_wrong_pixels_are_orange_and_unlabelled_ones_black():
    image = torch.full((40, 960, 3), 200, dtype=torch.uint8)
    truth = torch.zeros(40, 960, dtype=torch.uint8)
    truth[:, 640:] = 255
    prediction = torch.zeros_like(truth)
    prediction[:, 320:] = 1
    tiles = report.pictures(image, truth, prediction, TWO)
    row = ("a.png", 0.5, 0.25, tiles)
    pictures = dict(zip(tiles, (picture for picture, _ in Page(report.worst_images([row])).pictures)))
    assert list(pictures) == ["image", "truth", "prediction", "errors"]
    assert all(picture.shape == (20, 480, 3) for picture in pictures.values())
    right, wrong, ignored = (pictures["errors"][10, x] for x in (80, 240, 400))
    assert np.ptp(right) < 6 and np.abs(wrong - [224, 108, 30]).max() < 12 and ignored.max() < 6
    assert pictures["truth"][10, 240].tolist() == [200, 30, 30]
    assert pictures["prediction"][10, 240].tolist() == [20, 60, 220]
    assert pictures["truth"][10, 400].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_the_worst_images_and_the_figures_of_eval(drawn, tmp_path, capsys):
    weights = tmp_path / "run" / "checkpoints" / "best_model.pth"
    save_network(
        weights,
        open_dataset("cityscapes", drawn, "val").classes,
        args={"data": "somewhere", "epochs": 8, "crop_size": [96, 192]},
    )
    (tmp_path / "run" / "logs").mkdir()
    record = {"kind": "val", "epoch": 7, "miou": 0.4, "pixel_accuracy": 0.8}
    (tmp_path / "run" / "logs" / "metrics.jsonl").write_text(json.dumps(record))
    flags = ["--weights", str(weights), "--data", str(drawn), "--device", "cpu"]
    report.main([*flags, "--out", str(tmp_path / "new" / "1.html")])
    assert last_json(capsys.readouterr().out)["images"] == 5
    page = read(tmp_path / "new" / "1.html")
    shown = re.findall(r"(\S+_leftImg8bit\.png) pixel accuracy ([\d.]+) %", page.text)
    # By hand: the share of the labelled pixels that are right, of every image.
    dataset = open_dataset("cityscapes", drawn, "val")
    segment, scores = accelerate(load_weights(weights), device="cpu", precision=torch.float32), []
    for sample, (image, label) in zip(dataset.samples, map(dataset.__getitem__, range(5))):
        right = (segment(image[None])[0] == label)[label != 255]
        scores.append((right.float().mean().item(), str(sample.image.relative_to(drawn))))
    assert shown == [(name, f"{100 * score:.2f}") for score, name in sorted(scores)]
    # The figures are those of eval.py.
    evaluation.main(flags)
    result = last_json(capsys.readouterr().out)
    for key, name in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"), ("miiou", "iIoU")):
        assert f"{100 * result[key]:.2f} % {name}" in page.text
    table = {row[0]: (row[2], row[6]) for row in page.rows[1:20]}
    assert table == {
        name: (evaluation.percent(iou), evaluation.percent(result["class_iiou"].get(name)))
        for name, iou in result["class_iou"].items()
    }
    assert len(page.pictures) == 5 * 4 and page.tags.count("svg") == 1
    assert "epoch 7" in page.text and "epochs 8" in page.text and "crop_size 96 192" in page.text


def test_names_from_users_are_text_and_the_page_needs_no_other_file(folder_dataset, tmp_path, capsys):
    names = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "&amp;</style></table>"]
    (folder_dataset / "classes.json").write_text(json.dumps({"names": names}))
    for kind in ("images", "labels"):
        for i in range(2):
            (folder_dataset / kind / "val" / f"{i}.png").rename(folder_dataset / kind / "val" / f"<b>'{i}'&lt;.png")
    root = folder_dataset.rename(tmp_path / "<u>data")
    weights = tmp_path / "<i>w.pth"
    args = {"data": "</dl><script>", "epochs": 1, "<b>": 1}
    save_network(weights, open_dataset("folder", root, "val").classes, args=args, scale=0.8)
    flags = ["--weights", str(weights), "--data", str(root), "--device", "cpu", "--workers", "0"]
    report.main([*flags, "--out", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b>", "u", "link", "iframe", "object"} & set(page.tags) and page.tags.count("img") == 2 * 4
    for part in (*names, "<u>data", "<i>w.pth", "</dl><script>", "<b>'0'&lt;.png", "<b>'1'&lt;.png"):
        assert part in page.text
    assert [row[0] for row in page.rows if row[0] in names] == names * 2  # of the classes, and of the confusion matrix
    assert all(any(f"<b>'{i}'&lt;.png" in alt for _, alt in page.pictures) for i in range(2))
    assert not re.search(r"https?:|url\(|@import|//\w", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert "No curves" in page.text


def test_the_network_in_the_repository_makes_a_page(camvid, tmp_path):
    argv = ["--weights", str(ROOT / "weights/camvid.pth"), "--dataset", "camvid", "--data", str(camvid)]
    report.main([*argv, "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "r.html")])
    page = read(tmp_path / "r.html")
    assert "66.88 % mIoU 93.31 % pixel accuracy" in page.text and "camvid val, 101 images" in page.text
    assert len(page.pictures) == 6 * 4 and (tmp_path / "r.html").stat().st_size < 2e6
    accuracies = [float(each) for each in re.findall(r"pixel accuracy ([\d.]+) %", page.text)]
    assert accuracies == sorted(accuracies) and len(accuracies) == 6 and accuracies[-1] < 93.31
