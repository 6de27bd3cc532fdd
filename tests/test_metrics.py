"""Every figure of eval.py is the official script's, on real label and instance maps and on drawn ones, to 1e-9."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from conftest import last_json, shared_data
from data import CITYSCAPES, CITYSCAPES_LABEL_IDS, DataError, Sample, SegmentationDataset, open_dataset
from eval import InstanceScores, confusion_matrix, metrics
from model import FastSCNN

official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


@pytest.fixture(autouse=True)
def older_numpy(monkeypatch):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # which the official script calls, and NumPy has no more


def official_figures(predictions, truths):
    args = official.args
    args.evalInstLevelScore, args.evalPixelAccuracy, args.JSONOutput, args.quiet, args.bold = (
        True,
        False,
        False,
        True,
        "",
    )
    figures = official.evaluateImgLists([str(p) for p in predictions], [str(p) for p in truths], args)
    categories = tuple(dict.fromkeys(CITYSCAPES.categories))
    names = {
        "class_iou": ("classScores", CITYSCAPES.names),
        "class_iiou": ("classInstScores", InstanceScores.AVERAGE_PIXELS),
    }
    names |= {
        "category_iou": ("categoryScores", categories),
        "category_iiou": ("categoryInstScores", ("human", "vehicle")),
    }
    expected = {ours: {name: figures[theirs][name] for name in which} for ours, (theirs, which) in names.items()}
    means = {"miou": "Classes", "miiou": "ClassInst", "category_miou": "Categories", "category_miiou": "CategoryInst"}
    for ours, theirs in means.items():
        expected[ours] = figures[f"averageScore{theirs}"] if f"averageScore{theirs}" in figures else None
    return expected


def corrupted(labels, seed):
    """Label ids shifted, with classes swapped and holes of another class; road where there is no evaluated class."""
    rng = np.random.default_rng(seed)
    result = np.roll(labels, (int(rng.integers(1, 9)), int(rng.integers(-9, 9))), (0, 1))
    for a, b in ((26, 28), (24, 25), (11, 12)):  # car and bus, person and rider, building and wall
        where = rng.random(result.shape) < 0.2
        result = np.where(where & (result == a), b, np.where(where & (result == b), a, result))
    h, w = result.shape
    for label in (23, 7, 33):
        y, x = int(rng.integers(0, h // 2)), int(rng.integers(0, w // 2))
        result[y : y + h // 6, x : x + w // 6] = label
    evaluated = np.isin(result, CITYSCAPES_LABEL_IDS)
    return np.where(evaluated, result, 7).astype(np.uint8)


def samples_of(root, split):
    found = sorted((root / "gtFine" / split).glob("*/*_labelIds.png"))
    return [Sample(path, path, path.with_name(path.name.replace("labelIds", "instanceIds"))) for path in found]


@pytest.mark.parametrize("source", ["real", "drawn"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_figure_is_the_official_one(source, seed, drawn, tmp_path, capsys):
    samples = samples_of(shared_data("cityscapes_labels") if source == "real" else drawn, "val")
    table = open_dataset("cityscapes", drawn, "val").table
    dataset = SegmentationDataset(samples, CITYSCAPES, table)
    confusion, instances = torch.zeros(19, 19, dtype=torch.int64), InstanceScores()
    predictions = []
    for i, sample in enumerate(samples):
        truth = np.array(Image.open(sample.label))
        guess = corrupted(truth, 10 * seed + i)
        predictions.append(tmp_path / f"{sample.label.name}")
        Image.fromarray(guess).save(predictions[-1])
        to_train_id = np.zeros(256, np.uint8)
        to_train_id[list(CITYSCAPES_LABEL_IDS)] = np.arange(19)
        train_ids = np.frombuffer(table, np.uint8)[truth]
        prediction = torch.from_numpy(to_train_id[guess])
        confusion += confusion_matrix(prediction, torch.from_numpy(train_ids), 19)
        instances.add(prediction, dataset.read_instances(i))
    ours = {**metrics(confusion, CITYSCAPES), **instances.metrics(confusion)}
    expected = official_figures(predictions, [sample.label for sample in samples])
    compared = 0
    for key in ("class_iou", "class_iiou", "category_iou", "category_iiou"):
        assert ours[key].keys() == expected[key].keys()
        for name, value in expected[key].items():
            if np.isnan(value):
                assert ours[key][name] is None, (key, name)
            else:
                assert ours[key][name] == pytest.approx(value, abs=1e-9), (key, name)
                compared += 1
        mean = {
            "class_iou": "miou",
            "class_iiou": "miiou",
            "category_iou": "category_miou",
            "category_iiou": "category_miiou",
        }[key]
        if expected[mean] is not None:
            assert ours[mean] == pytest.approx(expected[mean], abs=1e-9)
        present = [value for value in expected[key].values() if not np.isnan(value)]
        assert ours[mean] == pytest.approx(np.mean(present), abs=1e-9)
    assert compared > 20


def test_instance_scores_by_hand():
    # A car of 4 pixels, of which 1 is found and 1 taken for a bus, and one of 2 pixels, all found; 3 pixels of road are
    # taken for a car.
    car, bus, road = (CITYSCAPES.names.index(name) for name in ("car", "bus", "road"))
    instances = torch.tensor([[1000 * car + 1] * 4 + [1000 * car + 7] * 2 + [-1] * 3])
    prediction = torch.tensor([[car, bus, road, road, car, car, car, car, car]], dtype=torch.uint8)
    truth = torch.tensor([[car] * 6 + [road] * 3], dtype=torch.uint8)
    scores = InstanceScores()
    scores.add(prediction, instances)
    result = scores.metrics(confusion_matrix(prediction, truth, 19))
    average = InstanceScores.AVERAGE_PIXELS["car"]
    assert result["class_iiou"]["car"] == pytest.approx(1.25 * average / (2 * average + 3), abs=1e-12)
    assert result["category_iiou"]["vehicle"] == pytest.approx(1.5 * average / (2 * average + 3), abs=1e-12)
    assert result["class_iiou"]["bus"] == 0 and result["class_iiou"]["person"] is None
    assert result["category_iiou"]["human"] is None


def test_evaluation_prints_instance_figures_and_writes_a_submission(drawn, tmp_path, capsys):
    torch.manual_seed(0)
    model = FastSCNN(19).eval()
    torch.save({"model": model.state_dict(), "model_args": model.args}, tmp_path / "w.pth")
    argv = [
        "--weights",
        str(tmp_path / "w.pth"),
        "--data",
        str(drawn),
        "--device",
        "cpu",
        "--submit",
        str(tmp_path / "s"),
    ]
    evaluation.main(argv)
    printed = capsys.readouterr().out
    result = last_json(printed)
    truths = [sample.label for sample in samples_of(drawn, "val")]
    predictions = [tmp_path / "s" / truth.name.replace("_gtFine_labelIds", "_pred") for truth in truths]
    expected = official_figures(predictions, truths)  # of the files, as the server would find them
    for key in ("class_iou", "class_iiou", "category_iou", "category_iiou"):
        for name, value in expected[key].items():
            assert result[key][name] is None if np.isnan(value) else result[key][name] == pytest.approx(value, abs=1e-9)
    assert "iIoU per class" in printed


def test_bad_map_of_instances_is_named(drawn, tmp_path):
    sample = samples_of(drawn, "val")[0]
    wrong = tmp_path / "x_instanceIds.png"
    Image.fromarray(np.full((96, 192), 60000, np.uint16)).save(wrong)
    dataset = SegmentationDataset([Sample(sample.image, sample.label, wrong)], CITYSCAPES, bytes(256))
    with pytest.raises(DataError, match=r"x_instanceIds.png: not an instance map"):
        dataset.read_instances(0)
