"""Exported networks compute what PyTorch computes, at any size, whichever exporter wrote them."""

import json
import sys

import pytest
import torch

from conftest import ROOT, last_json, run_script
from data import normalise
from launch import UsageError, exit_status
from model import VARIANTS, FastSCNN, load_weights, read_checkpoint, save_for_peer
from tools import export

SIZES = ((2, 97, 131), (1, 64, 96), (3, 161, 72))  # none of them the size of the example that is traced
WEIGHTS = ROOT / "weights/camvid.pth"


def onnx_session(path, name):
    pytest.importorskip("onnxruntime", reason="ONNX files run in ONNX Runtime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("exporter", ["jit.trace", "legacy ONNX"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_networks_run_at_other_sizes(exporter, tmp_path):
    if exporter == "legacy ONNX":
        pytest.importorskip("onnx", reason="torch.onnx.export(dynamo=False) needs it")
    model, example = load_weights(WEIGHTS), torch.randn(2, 3, 72, 136)
    if exporter == "jit.trace":
        run = torch.jit.trace(model, example)
    else:
        axes, path = {"x": {0: "n", 2: "h", 3: "w"}}, tmp_path / "m.onnx"
        torch.onnx.export(model, (example,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
        run = onnx_session(path, "x")
    for n, height, width in SIZES:
        x = torch.randn(n, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def program():
    """The labels of weights/camvid.pth as torch.export has them: made once, it takes seconds."""
    return export.exported_program(export.Deployed(load_weights(WEIGHTS).requires_grad_(False), "labels").eval())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_files_for_other_runtimes_give_pytorchs_labels(program, suffix, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"new/m{suffix}"
    if suffix == ".onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="export to ONNX, and running it, need it")
    monkeypatch.setattr(export, "exported_program", lambda _network, _size: program)
    export.main(["--weights", str(WEIGHTS), str(path)])
    assert last_json(capsys.readouterr().out)["file"] == str(path)
    run = torch.export.load(path).module() if suffix == ".pt2" else onnx_session(path, "images")
    network = export.Deployed(load_weights(WEIGHTS), "labels")
    for shape in SIZES:
        images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
        labels = run(images)
        assert labels.dtype == torch.uint8 and labels.shape == shape
        with torch.inference_mode():
            assert (labels == network(images)).float().mean() > 0.999
    if suffix == ".onnx":  # some toolchains have no 8-bit arithmetic: the pixels are cast before anything else
        import onnx

        assert {node.op_type for node in onnx.load(path).graph.node if "images" in node.input} == {"Cast", "Shape"}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_fixed_size_normalised_input_and_what_the_network_was_trained_on(suffix, tmp_path):
    if suffix == ".onnx":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="export to ONNX, and running it, need it")
    model, path, weights = load_weights(WEIGHTS), tmp_path / f"m{suffix}", tmp_path / "own.pth"
    state = {"model": model.state_dict(), "model_args": model.args, "image_hw": [360, 480]}
    torch.save({**state, "classes": {"names": list("abcdefghijk")}}, weights)
    flags = ["--size", "64", "96", "--input", "normalised", "--output", "logits"]
    export.main(["--weights", str(weights), str(path), *flags])
    x = torch.randn(1, 3, 64, 96)
    if suffix == ".pt2":
        files = {"metadata.json": ""}
        run = torch.export.load(path, extra_files=files).module()
        metadata = json.loads(files["metadata.json"])
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == [1, 3, 64, 96]
        properties = session.get_modelmeta().custom_metadata_map
        metadata = {name: json.loads(properties[name]) for name in ("classes", "image_hw")}
        run = onnx_session(path, "images")
    assert metadata == {"classes": {"names": list("abcdefghijk")}, "image_hw": [360, 480]}
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-3)


def test_deployed_network_is_the_normalised_images_logits_and_their_argmax():
    model, images = load_weights(WEIGHTS), torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(normalise(images))
        logits, labels = (export.Deployed(model, output)(images) for output in ("logits", "labels"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (labels == expected.argmax(1)).float().mean() > 0.999


def test_a_wrong_command_line_is_one_line_from_any_folder(tmp_path):
    done = run_script("tools/export.py", "--weights", tmp_path / "none.pth", "m.pt2", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"export.py: {tmp_path / 'none.pth'}: no such checkpoint; give the path of a .pth file\n"


def test_weights_for_another_project_and_back(tmp_path, capsys):
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = FastSCNN(5, variant=variant, aux=True)
        torch.save({"model": model.state_dict(), "model_args": model.args}, tmp_path / "own.pth")
        argv = ["--weights", str(tmp_path / "own.pth"), str(tmp_path / f"sub/{variant}.pth"), "--as"]
        if variant == "paper":
            with pytest.raises(UsageError, match="is of variant paper; train with --variant mmseg"):
                export.main([*argv, "mmseg"])
            continue
        export.main([*argv, variant])
        assert last_json(capsys.readouterr().out)["variant"] == variant
        save_for_peer(model, tmp_path / "same.pth", variant)
        written, expected = (torch.load(tmp_path / name) for name in (f"sub/{variant}.pth", "same.pth"))
        assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)


def test_weights_for_inference_are_small_and_predict_the_same(tmp_path):
    torch.manual_seed(0)
    model = FastSCNN(5, aux=True)
    fields = {"classes": {"names": list("abcde")}, "image_hw": [96, 192], "scale": 1.5, "epoch": 7}
    torch.save({"model": model.state_dict(), "model_args": model.args, **fields, "optimizer": {}}, tmp_path / "own.pth")
    export.main(["--weights", str(tmp_path / "own.pth"), str(tmp_path / "small.pth")])
    assert (tmp_path / "small.pth").stat().st_size < 0.5 * (tmp_path / "own.pth").stat().st_size
    small = read_checkpoint(tmp_path / "small.pth")
    assert fields.items() <= small.items() and "optimizer" not in small
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(load_weights(tmp_path / "small.pth")(x), model.eval()(x), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["model.tflite"], "has the suffix '.tflite', expected .onnx, .pt2 or .pth"),
        (["m.pth", "--as", "mmseg", "--output", "logits"], "a .pth file holds only weights: leave out --output"),
        (["m.pth", "--size", "64", "96"], "a .pth file holds only weights: leave out --output"),
        (["model.onnx", "--as", "mmseg"], "has the suffix '.onnx', expected .onnx, .pt2 or .pth; --as: .pth"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(UsageError, match=message):
        export.main(["--weights", str(WEIGHTS), *flags])


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert exit_status(lambda: export.main(["--weights", str(WEIGHTS), "model.onnx"])) == 2
    assert capsys.readouterr().err.endswith(": this needs the package onnxscript: pip install onnxscript\n")
