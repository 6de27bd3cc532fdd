"""Metrics by hand, evaluation of a split, test-time averaging, and what eval.py says to wrong input."""

import json
import shutil
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from conftest import ROOT, last_json, run_script
from data import CAMVID, CITYSCAPES, CITYSCAPES_LABEL_IDS, Classes, DataError, normalise, open_dataset
from eval import (
    AveragedNetwork,
    confusion_matrix,
    contact_sheet,
    evaluate,
    evaluation_loader,
    metrics,
    sliding_window,
    window_starts,
)
from launch import exit_status
from model import CheckpointError, FastSCNN, load_weights
from ops_ext import accelerate

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
    figures = {
        "miou",
        "class_iou",
        "category_miou",
        "category_iou",
        "miiou",
        "class_iiou",
        "category_miiou",
        "category_iiou",
    }
    assert set(result) == {"dataset", "split", "images", "pixel_accuracy", "scales", "flip", "window"} | figures


def status_of(*argv):
    """Exit status of eval.py on the CPU, in this process."""
    argv = [str(each) for each in ("--device", "cpu", "--workers", 0, *argv)]
    return exit_status(lambda: evaluation.main(argv), (DataError, CheckpointError))


def save_network(path, num_classes, classes=None, **fields):
    """An untrained network as a checkpoint."""
    torch.manual_seed(0)
    model = FastSCNN(num_classes)
    named = {"classes": classes.to_dict()} if classes else {}
    torch.save({"model": model.state_dict(), "model_args": model.args, **named, **fields}, path)
    return path


def test_confusion_matrix_by_hand():
    label = torch.tensor([[0, 0, 1], [2, 255, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [0, 2, 0]], dtype=torch.uint8)
    assert confusion_matrix(prediction, label, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    label, prediction = (torch.randint(0, 250, (64, 64), dtype=torch.uint8) for _ in range(2))
    confusion = confusion_matrix(prediction, label, 250)
    assert confusion.sum() == 64 * 64 and confusion[label[5, 7].long(), prediction[5, 7].long()] >= 1


def test_every_image_is_predicted_once_by_one_of_the_processes(weights, drawn):
    dataset, segment = open_dataset("cityscapes", drawn, "val"), accelerate(load_weights(weights))
    shares = [list(evaluate(segment, evaluation_loader(dataset, 0, rank, world_size=2))) for rank in (0, 1)]
    assert [[index for index, *_ in share] for share in shares] == [[0, 2, 4], [1, 3]]
    for index, image, label, prediction in shares[0] + shares[1]:
        assert torch.equal(image, dataset[index][0]) and torch.equal(label, dataset[index][1])
        assert torch.equal(prediction, segment(image[None])[0])


def test_evaluation_counts_every_labelled_pixel_once(weights, drawn, capsys):
    assert status_of("--weights", weights, "--data", drawn) == 0
    result = last_json(capsys.readouterr().out)
    segment = accelerate(load_weights(weights), precision=torch.float32)
    right = total = 0
    for image, label in open_dataset("cityscapes", drawn, "val"):
        labelled = label != 255
        right += ((segment(image[None])[0] == label) & labelled).sum().item()
        total += labelled.sum().item()
    assert result["pixel_accuracy"] == right / total


def test_contact_sheet_shows_images_in_rows(weights, drawn, tmp_path):
    red, blue = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (20, 40), "blue")
    sheet = contact_sheet([[red, red], [blue, blue]], ("image", "truth"), width=40)
    assert sheet.size == (4 + 2 * 44, 20 + (20 + 4) + (80 + 4))  # each row as high as its images are at this width
    assert sheet.getpixel((50, 30)) == (255, 0, 0) and sheet.getpixel((10, 100)) == (0, 0, 255)
    assert status_of("--weights", weights, "--data", drawn, "--sheet", tmp_path / "deep/s.png") == 0
    assert Image.open(tmp_path / "deep/s.png").size == (4 + 3 * 388, 20 + 5 * (192 + 4))


def test_averaging_over_scales_and_mirror_images(drawn):
    torch.manual_seed(0)
    model, cpu = FastSCNN(19).eval(), torch.device("cpu")
    image = open_dataset("cityscapes", drawn, "val")[0][0][None]
    plain = accelerate(model, precision=torch.float32)(image)
    assert (AveragedNetwork(model, cpu, [1.0])(image) == plain).float().mean() > 0.999
    # Mirrored in, mirrored out.
    segment = AveragedNetwork(model, cpu, [0.5, 1.5], flip=True)
    assert (segment(image).flip(2) == segment(image.flip(2))).float().mean() > 0.999
    # By hand, with Pillow's filter for the smaller input.
    total = 0
    for size in ((48, 96), (96, 192)):
        part = Image.fromarray(image[0].numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        with torch.no_grad():
            scores = model(normalise(torch.from_numpy(np.array(part))[None]))
        total = total + torch.nn.functional.interpolate(scores, (96, 192), mode="bilinear").softmax(1)
    assert (AveragedNetwork(model, cpu, [0.5, 1.0])(image) == total.argmax(1)).float().mean() > 0.97


def test_windows_cover_the_image_and_their_means_are_taken():
    for side in (32, 33, 100, 257):
        for size in (32, 40, 96):
            starts = window_starts(side, min(size, side))
            steps = [after - before for before, after in pairwise(starts)]
            assert (
                starts[0] == 0 and starts[-1] + min(size, side) == side and max(steps, default=0) <= size * 2 // 3 + 1
            )
    seen = []

    def network(x):
        seen.append(x.shape[2:])
        return torch.cat([x[:, :1], torch.full_like(x[:, :1], float(len(seen)))], 1)

    x = torch.randn(2, 3, 100, 70)
    scores = sliding_window(network, x, (40, 96))
    assert seen == [(40, 70)] * 4  # at 0, 20, 40 and 60, as wide as the image
    torch.testing.assert_close(scores[:, :1], x[:, :1])
    assert scores[0, 1, [0, 19, 20, 39, 40, 60, 80, 99], 5].tolist() == [1, 1, 1.5, 1.5, 2.5, 3.5, 4, 4]
    model = FastSCNN(4).eval()
    with torch.no_grad():
        torch.testing.assert_close(sliding_window(model, x[..., :64], (128, 64)), model(x[..., :64]))


def test_protocol_is_stated_and_checked(weights, drawn, capsys):
    def run(*flags):
        return status_of("--weights", weights, "--data", drawn, *flags)

    assert run("--scales", 0.5, 1.0, "--flip", "--amp", "auto") == 0
    result = last_json(capsys.readouterr().out)
    assert result["scales"] == [0.5, 1.0] and result["flip"] is True and result["window"] is None
    assert run("--window", 64, 96) == 0
    assert last_json(capsys.readouterr().out)["window"] == [64, 96]
    assert run("--window", 16, 96) == 2 and "--window 16 96: expected at least 32" in capsys.readouterr().err
    assert run("--scales", 0) == 2 and "--scales 0.0: expected factors from 0 to 16" in capsys.readouterr().err


def test_submission_holds_label_ids_under_the_servers_names(weights, drawn, folder_dataset, tmp_path, capsys):
    assert status_of("--weights", weights, "--data", drawn, "--submit", tmp_path / "s") == 0
    dataset = open_dataset("cityscapes", drawn, "val")
    names = {sample.image.name.replace("_leftImg8bit.png", "_pred.png") for sample in dataset.samples}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names
    segment = accelerate(load_weights(weights), precision=torch.float32)
    label_ids = np.array(CITYSCAPES_LABEL_IDS)[segment(dataset[0][0][None])[0].numpy()]
    assert (np.array(Image.open(tmp_path / "s" / min(names))) == label_ids).all()
    own = save_network(tmp_path / "own.pth", 3)
    flags = ("--weights", own, "--dataset", "folder", "--data", folder_dataset, "--submit", tmp_path / "t")
    assert status_of(*flags) == 2 and "which folder does not have" in capsys.readouterr().err


def test_a_submission_needs_no_labels(weights, drawn, tmp_path, capsys):
    shutil.copytree(drawn / "leftImg8bit/val", tmp_path / "leftImg8bit/test")
    args = ("--weights", weights, "--data", tmp_path, "--split", "test")
    assert status_of(*args, "--submit", tmp_path / "s") == 0
    result = last_json(capsys.readouterr().out)
    assert result["images"] == 5 and result["miou"] is None
    assert status_of("--weights", weights, "--data", drawn, "--submit", tmp_path / "v") == 0
    for path in (tmp_path / "v").iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()
    assert status_of(*args) == 2 and "no file of this name" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_images_are_seen_at_the_scale_of_the_training_unless_the_flags_say_otherwise(drawn, tmp_path, capsys, scale):
    weights = save_network(tmp_path / "w.pth", 19, CITYSCAPES, scale=scale)
    assert status_of("--weights", weights, "--data", drawn, "--submit", tmp_path / "s") == 0
    output = capsys.readouterr().out
    assert last_json(output)["scales"] == [scale] and f"images seen at {scale} times their size" in output
    dataset, segment = open_dataset("cityscapes", drawn, "val"), accelerate(load_weights(weights))
    image, size = Image.fromarray(dataset[0][0].numpy()), (round(192 * scale), round(96 * scale))
    seen = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR)))
    label_ids = np.array(CITYSCAPES_LABEL_IDS)[segment(seen[None], (96, 192))[0].numpy()]
    written = np.array(Image.open(min((tmp_path / "s").iterdir())))
    assert (written == label_ids).mean() > 0.98  # PyTorch's and Pillow's resizing round differently
    assert status_of("--weights", weights, "--data", drawn, "--scales", 1) == 0
    output = capsys.readouterr().out
    assert last_json(output)["scales"] == [1.0] and "images seen" not in output


def test_the_table_of_shifts_begins_with_what_eval_says(drawn, tmp_path, capsys):
    weights = save_network(tmp_path / "w.pth", 19, CITYSCAPES, scale=0.75)
    assert status_of("--weights", weights, "--data", drawn) == 0
    miou = last_json(capsys.readouterr().out)["miou"]
    done = run_script("tests/benchmarks/shifts.py", "--dataset", "cityscapes", "--data", drawn, weights)
    cells = done.stdout.splitlines()[-1].split(" | ")
    assert cells[1] == f"{miou:.4f}" and len(cells) == 7, done.stderr


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(drawn, context, monkeypatch):
    dataset = open_dataset("cityscapes", drawn, "val")
    monkeypatch.setattr(evaluation, "DataLoader", partial(evaluation.DataLoader, multiprocessing_context=context))
    loader = evaluation_loader(dataset, workers=2)
    for _ in range(2):  # the workers stay for the next validation
        seen = [index for index, *_ in evaluate(lambda images: images[..., 0], loader)]
        assert seen == [0, 1, 2, 3, 4]


def test_what_the_user_can_mend_is_one_line_and_status_2(weights, drawn, folder_dataset, tmp_path, capsys):
    def refused(message, *flags):
        assert status_of(*flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:5000])
    refused("none.pth: no such", "--weights", tmp_path / "none.pth", "--data", drawn)
    refused("cut.pth: ", "--weights", tmp_path / "cut.pth", "--data", drawn)
    refused("nowhere: no such folder", "--weights", weights, "--data", tmp_path / "nowhere")
    refused("no images", "--weights", weights, "--data", drawn, "--split", "tset")
    refused("--weights", "--data", drawn)
    refused("--device warp is not available", "--weights", weights, "--data", drawn, "--device", "warp")
    refused("unrecognized arguments: --colour", "--weights", weights, "--data", drawn, "--colour")
    own = ("--dataset", "folder", "--data", folder_dataset)
    refused("has 19 classes, expected 3", "--weights", weights, *own)
    swapped = Classes(("left", "right", "middle"), ((0, 0, 0),) * 3)
    refused("'right' where", "--weights", save_network(tmp_path / "swapped.pth", 3, swapped), *own)
    small = Image.open(folder_dataset / "images/val/0.png").crop((0, 0, 64, 20))
    small.save(folder_dataset / "images/val/0.png")
    Image.new("L", small.size).save(folder_dataset / "labels/val/0.png")
    refused("0.png: 64x20 pixels, expected at least 32x32", "--weights", save_network(tmp_path / "own.pth", 3), *own)


def test_dataset_is_that_of_the_weights_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for classes, name in ((None, "cityscapes"), (CITYSCAPES, "cityscapes"), (CAMVID, "camvid"), (THREE, "folder")):
        save_network("w.pth", len(classes.names) if classes else 19, classes)
        assert status_of("--weights", "w.pth") == 2
        assert f"datasets/{name}: no such folder" in capsys.readouterr().err
    assert status_of("--weights", "w.pth", "--dataset", "camvid") == 2
    assert "datasets/camvid: no such folder" in capsys.readouterr().err


def test_the_weights_in_the_repository_give_the_readmes_figure(camvid, capsys):
    assert (ROOT / "weights/camvid.pth").stat().st_size < 6e6
    assert status_of("--weights", ROOT / "weights/camvid.pth", "--data", camvid) == 0
    result = last_json(capsys.readouterr().out)
    assert result["images"] == 101 and result["miou"] == pytest.approx(0.6688, abs=5e-4)
    assert "| **66.88** val" in (ROOT / "README.md").read_text()
