"""Metrics by hand, the modes of eval.py, and what it says to wrong input."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from conftest import ROOT, last_json, run_script
from data import CAMVID, CITYSCAPES, Classes
from eval import ContactSheet, colour_map, exit_status, metrics
from model import FastSCNN

THREE = Classes(("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), ("x", "x", "y"))


def test_metrics_by_hand():
    confusion = torch.tensor([[5, 1, 0], [2, 3, 0], [1, 0, 8]])
    result = metrics(confusion, THREE)
    assert result["class_iou"] == pytest.approx({"a": 5 / 9, "b": 3 / 6, "c": 8 / 9})
    assert result["miou"] == pytest.approx((5 / 9 + 3 / 6 + 8 / 9) / 3)
    assert result["pixel_accuracy"] == pytest.approx(16 / 20)
    # Merged to x = {a, b}: 11 of 12 pixels found, 1 too many.
    assert result["category_iou"] == pytest.approx({"x": 11 / 12, "y": 8 / 9})
    assert result["category_miou"] == pytest.approx((11 / 12 + 8 / 9) / 2)


def test_absent_class_is_null_and_left_out_of_the_mean():
    result = metrics(torch.tensor([[5, 1, 0], [0, 4, 0], [0, 0, 0]]), THREE)
    assert result["class_iou"]["c"] is None and result["category_iou"]["y"] is None
    assert result["miou"] == pytest.approx((5 / 6 + 4 / 5) / 2)
    wrong = metrics(torch.tensor([[5, 0, 1], [0, 4, 0], [0, 0, 0]]), THREE)
    assert wrong["class_iou"]["c"] == 0  # predicted, though it never occurs: counted
    nothing = metrics(torch.zeros(3, 3, dtype=torch.int64), THREE)
    assert nothing["miou"] is None and nothing["pixel_accuracy"] is None
    json.dumps(nothing)


def test_dataset_without_categories_has_none():
    result = metrics(torch.eye(11, dtype=torch.int64), CAMVID)
    assert result["category_iou"] == {} and result["category_miou"] is None and result["miou"] == 1


def test_counts_beyond_float32_stay_exact():
    confusion = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    iou = metrics(confusion, Classes(("a", "b"), ((0, 0, 0), (1, 1, 1))))["class_iou"]
    assert iou["b"] == 2**40 / (2**40 + 1) and iou["a"] < 1


def test_table_shows_every_class_and_mean():
    table = evaluation.format_table(metrics(torch.eye(19, dtype=torch.int64) * 3, CITYSCAPES))
    assert all(name in table for name in CITYSCAPES.names) and table.count("100.00") == 19 + 7 + 2 + 1


def test_colours_and_contact_sheet(tmp_path):
    label = np.array([[0, 1], [2, 255]], np.uint8)
    assert np.array(colour_map(label, THREE)).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    sheet = ContactSheet(THREE, rows=2, width=64)
    for height in (32, 48, 64):
        truth = torch.zeros(height, 64, dtype=torch.uint8)
        sheet.add(torch.full((height, 64, 3), 200, dtype=torch.uint8), truth, truth + 1)
    sheet.save(tmp_path / "deep" / "sheet.png")
    picture = np.array(Image.open(tmp_path / "deep" / "sheet.png"))
    assert picture.shape == (16 + 4 + 2 * (48 + 4), 4 + 3 * (64 + 4), 3)
    assert (
        picture[40, 30].tolist() == [200] * 3
        and picture[40, 100].tolist() == [255, 0, 0]
        and picture[40, 170].tolist() == [0, 255, 0]
    )


@pytest.mark.parametrize("width, height, tile", [(3000, 3, 1), (3, 3000, 8 * 64)])
def test_pictures_of_images_out_of_all_proportion(tmp_path, width, height, tile):
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    sheet = ContactSheet(THREE, rows=1, width=64)
    sheet.add(image, image[..., 0], image[..., 0])
    sheet.save(tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (4 + 3 * 68, 16 + 8 + tile)
    # JPEG ends at 65535 pixels: at the image's own proportions there would be 480000.
    for kind, file in evaluation.error_pictures(image, image[..., 0], image[..., 0], THREE).values():
        assert Image.open(io.BytesIO(file)).format == kind.upper()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of an untrained network for Cityscapes."""
    torch.manual_seed(0)
    model = FastSCNN(19)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save({"model": model.state_dict(), "model_args": model.args, "classes": CITYSCAPES.to_dict()}, path)
    return path


def test_two_processes_give_exactly_the_metrics_of_one(weights, drawn):
    flags = ("--weights", weights, "--data", drawn, "--device", "cpu")
    one, two = run_script("eval.py", *flags), run_script("eval.py", *flags, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    result = last_json(one.stdout)
    assert result == last_json(two.stdout)
    assert result["images"] == 5 and result["dataset"] == "cityscapes" and result["split"] == "val"
    figures = {"miou", "class_iou", "category_miou", "category_iou", "miiou", "class_iiou", "category_miiou", "category_iiou"}
    assert set(result) == {"dataset", "split", "images", "pixel_accuracy", "scales", "flip", "window"} | figures


def test_evaluation_counts_every_labelled_pixel_once(weights, drawn, capsys):
    status = exit_status(
        "eval.py", lambda: evaluation.main(["--weights", str(weights), "--data", str(drawn), "--device", "cpu"])
    )
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert status == 0
    model, dataset = (
        evaluation.build_from_checkpoint(evaluation.read_checkpoint(weights), weights),
        evaluation.open_dataset("cityscapes", drawn, "val"),
    )
    segment = evaluation.accelerate(model)
    right = total = 0
    for image, label in dataset:
        labelled = label != 255
        right += ((segment(image[None])[0] == label) & labelled).sum().item()
        total += labelled.sum().item()
    assert result["pixel_accuracy"] == right / total


def test_folder_of_pictures_becomes_overlays(weights, tmp_path, capsys):
    for name, size in (("a.jpg", (64, 48)), ("sub/b c.png", (97, 51)), ("sub/grau.png", (40, 40))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "grau" in name else "RGB", size, 90).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    flags = ["--weights", str(weights), "--predict", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert exit_status("eval.py", lambda: evaluation.main(flags)) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["images"] == 3
    sizes = {str(p.relative_to(tmp_path / "out")): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"a.jpg_overlay.png": (64, 48), "sub/b c.png_overlay.png": (97, 51), "sub/grau.png_overlay.png": (40, 40)}


def test_benchmark_needs_no_weights(capsys):
    flags = ["--benchmark", "--size", "64", "96", "--batch-size", "2", "--repeats", "5", "--device", "cpu"]
    assert exit_status("eval.py", lambda: evaluation.main(flags)) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (
        result["size"] == [64, 96] and result["batch_size"] == 2 and result["params"] == 1_137_795 and result["device"] == "cpu"
    )
    latency = result["latency_ms"]
    assert 0 < latency["min"] <= latency["median"] <= latency["p95"]
    assert math.isclose(result["fps"], 2000 / latency["median"], rel_tol=0.01)


def cut(path, target):
    target.write_bytes(path.read_bytes()[:5000])
    return target


def folder(path):
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "flags, message",
    [
        (lambda w, d, t: ["--weights", t / "none.pth", "--data", d], "none.pth: no such checkpoint"),
        (lambda w, d, t: ["--weights", cut(w, t / "cut.pth"), "--data", d], "cut.pth: damaged, truncated or no checkpoint"),
        (lambda w, d, t: ["--weights", next(d.rglob("*.png")), "--data", d], "damaged, truncated or no checkpoint"),
        (lambda w, d, t: ["--weights", w, "--data", t / "nowhere"], "nowhere: no such folder"),
        (lambda w, d, t: ["--weights", w, "--data", t], "no images"),
        (lambda w, d, t: ["--data", d], "--weights FILE is missing"),
        (lambda w, d, t: ["--weights", w, "--data", d, "--device", "warp"], "--device warp is no device"),
        (lambda w, d, t: ["--weights", w, "--data", d, "--colour"], "unrecognized arguments: --colour"),
        (lambda w, d, t: ["--weights", w, "--predict", t / "none.png", "--out", t / "o"], "none.png: no such picture"),
        (lambda w, d, t: ["--weights", w, "--predict", t, "--out", t / "o"], "no pictures in this folder"),
        (lambda w, d, t: ["--benchmark", "--size", "16", "64"], "--size is 16 64, expected at least 32 pixels each"),
        (lambda w, d, t: ["--benchmark", "--repeats", "0"], "--repeats is 0, expected at least 1"),
        (lambda w, d, t: ["--weights", w, "--data", d, "--sheet", t / "sheet"], "has no suffix of an image format"),
        (
            lambda w, d, t: ["--weights", w, "--data", d, "--sheet", t / "s.psd"],
            "s.psd has no suffix of an image format that can",
        ),
        (
            lambda w, d, t: ["--weights", w, "--data", d, "--sheet", t / "s.xbm"],
            "s.xbm has no suffix of an image format that can",
        ),
        (lambda w, d, t: ["--weights", w, "--data", d, "--sheet", folder(t / "s.png")], "s.png is a folder, expected a file"),
        (
            lambda w, d, t: ["--weights", w, "--data", d, "--report", folder(t / "r.html")],
            "r.html is a folder, expected a file",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(weights, drawn, tmp_path, capsys, flags, message):
    argv = [str(flag) for flag in flags(weights, drawn, tmp_path)]
    assert exit_status("eval.py", lambda: evaluation.main(argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("eval.py: ") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_another_class_count_is_refused(weights, folder_dataset, capsys):
    argv = ["--weights", str(weights), "--dataset", "folder", "--data", str(folder_dataset)]
    assert exit_status("eval.py", lambda: evaluation.main(argv)) == 2
    assert "has 19 classes, expected 3" in capsys.readouterr().err


def test_other_classes_of_the_same_number_are_refused(folder_dataset, tmp_path, capsys):
    model, classes = FastSCNN(3), {"names": ["left", "right", "middle"], "colours": [[0, 0, 0]] * 3, "categories": []}
    torch.save({"model": model.state_dict(), "model_args": model.args, "classes": classes}, tmp_path / "w.pth")
    argv = ["--weights", str(tmp_path / "w.pth"), "--dataset", "folder", "--data", str(folder_dataset)]
    assert exit_status("eval.py", lambda: evaluation.main(argv)) == 2
    assert "w.pth: has other classes, such as right (here middle)" in capsys.readouterr().err


def test_contact_sheet_of_an_evaluation(weights, drawn, tmp_path):
    argv = [
        "--weights",
        str(weights),
        "--data",
        str(drawn),
        "--sheet",
        str(tmp_path / "s.png"),
        "--sheet-rows",
        "2",
        "--device",
        "cpu",
    ]
    assert exit_status("eval.py", lambda: evaluation.main(argv)) == 0
    assert Image.open(tmp_path / "s.png").size == (4 + 3 * 388, 16 + 4 + 2 * (192 + 4))


def test_error_in_a_loader_process_is_one_line_too(weights, folder_dataset, tmp_path):
    model = FastSCNN(3)
    torch.save({"model": model.state_dict(), "model_args": model.args}, tmp_path / "w.pth")
    Image.new("L", (64, 48), 99).save(folder_dataset / "labels/val/1.png")
    done = run_script(
        "eval.py", "--weights", tmp_path / "w.pth", "--dataset", "folder", "--data", folder_dataset, "--device", "cpu"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "labels/val/1.png: label value 99 is outside" in done.stderr


@pytest.mark.parametrize(
    "classes, name", [(None, "cityscapes"), (CITYSCAPES, "cityscapes"), (CAMVID, "camvid"), (THREE, "folder")]
)
def test_dataset_is_that_of_the_weights_classes(tmp_path, monkeypatch, capsys, classes, name):
    monkeypatch.chdir(tmp_path)
    model = FastSCNN(len(classes.names) if classes else 19)
    named = {"classes": classes.to_dict()} if classes else {}
    torch.save({"model": model.state_dict(), "model_args": model.args, **named}, "w.pth")
    assert exit_status("eval.py", lambda: evaluation.main(["--weights", "w.pth"])) == 2
    assert f"datasets/{name}: no such folder" in capsys.readouterr().err
    assert exit_status("eval.py", lambda: evaluation.main(["--weights", "w.pth", "--dataset", "camvid"])) == 2
    assert "datasets/camvid: no such folder" in capsys.readouterr().err


def test_faults_keep_their_traceback():
    def broken():
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError):
        exit_status("eval.py", broken)


def test_an_error_among_processes_ends_with_status_2_and_without_an_abort():
    # Leaving the interpreter around a collective under way aborted about one process in thirty.
    script = (
        "import atexit, sys, torch, torch.distributed as dist; from eval import UsageError, exit_status\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    atexit.register(print, 'through the interpreter')\n"
        "    dist.all_reduce(torch.ones(1), async_op=True)\n"
        "    print('said')\n"
        "    raise UsageError('mend this')\n"
        "sys.exit(exit_status('eval.py', main))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "said\n", "eval.py: mend this\n")


def test_benchmark_without_a_size_takes_the_papers_three_and_times_stages_and_others(capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_SIZES", ((64, 96), (40, 40)))
    flags = ["--benchmark", "--repeats", "2", "--device", "cpu", "--stages", "--against", "eager", "channels_last"]
    evaluation.main(flags)
    result = last_json(capsys.readouterr().out)
    assert [each["size"] for each in result["sizes"]] == [[64, 96], [40, 40]] and result["size"] == [64, 96]
    assert set(result["against"]) == {"eager", "channels_last"} and sum(result["stages_ms"].values()) > 0


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_export_in_torchs_own_format_runs_at_any_size(tmp_path, capsys, weights, output):
    evaluation.main(["--weights", str(weights), "--export", str(tmp_path / "model.pt2"), "--export-output", output])
    assert last_json(capsys.readouterr().out)["agreement"] == 1
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.zeros(3, 50, 70, 3, dtype=torch.uint8)
    assert program(images).shape[-2:] == (50, 70)


def test_export_to_onnx_agrees_with_pytorch_in_onnx_runtime(tmp_path, capsys, weights):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    evaluation.main(["--weights", str(weights), "--export", str(tmp_path / "model.onnx")])
    assert last_json(capsys.readouterr().out)["agreement"] > 0.999


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--export", "model.tflite"], "has the suffix '.tflite', expected .onnx or .pt2"),
        (["--export", "model.onnx"], "needs the package onnx: pip install onnx"),
        (["--benchmark", "--against", "onnxruntime"], "needs the package onnx: pip install onnx"),
        (["--benchmark", "--against", "openvino"], "needs the package openvino: pip install openvino"),
    ],
)
def test_missing_packages_and_formats_are_named(weights, monkeypatch, flags, message):
    for package in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(evaluation.UsageError, match=message):
        evaluation.main(["--weights", str(weights), "--device", "cpu", *flags])


def test_a_batch_that_does_not_fit_is_one_line(monkeypatch):
    flags = ["--benchmark", "--size", "8192", "16384", "--batch-size", "100000", "--repeats", "1", "--device", "cpu"]
    with pytest.raises(evaluation.UsageError, match="100000 images of 8192x16384 do not fit in memory; lower --batch-size"):
        evaluation.main(flags)


def test_the_difference_to_float32_is_printed_on_request(capsys, drawn, weights):
    flags = ["--weights", str(weights), "--data", str(drawn), "--device", "cpu", "--amp", "auto", "--compare"]
    evaluation.main(flags)
    out = capsys.readouterr().out
    result = last_json(out)
    assert abs(result["miou"] - result["miou_fp32"]) < 0.02 and "points of mIoU to fp32" in out
    assert 0.95 < result["agreement"]["min"] <= result["agreement"]["mean"] <= 1


def test_the_weights_in_the_repository_give_the_readmes_figure(camvid, capsys):
    weights = ROOT / "weights/camvid.pth"
    assert weights.stat().st_size < 6e6
    argv = ["--weights", str(weights), "--dataset", "camvid", "--data", str(camvid), "--device", "cpu", "--workers", "0"]
    evaluation.main(argv)
    result = last_json(capsys.readouterr().out)
    assert result["images"] == 101 and result["miou"] == pytest.approx(0.6100, abs=5e-4)
    assert "epoch 34/34  mIoU 0.6100  pixel accuracy 0.9153" in (ROOT / "README.md").read_text()
