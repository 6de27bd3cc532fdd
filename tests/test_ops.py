"""The ops equal their definition, and say what is wrong with their input; an op is added as the package says."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ops_ext
from conftest import ROOT, last_json, run_script
from model import FastSCNN
from ops_ext import accelerate, compiler, upsample_argmax, upsample_cross_entropy


def test_every_op_names_its_implementation():
    assert set(ops_ext.implementations()) == {"upsample_argmax", "upsample_cross_entropy"}
    assert set(ops_ext.implementations().values()) <= {"cpu", "cuda", "reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_upsample_argmax_is_interpolate_then_argmax(dtype):
    torch.manual_seed(0)
    for size in ((1, 1), (5, 7), (40, 56), (41, 53)):
        for align_corners in (False, True):
            logits = torch.randn(2, 6, 5, 7).to(dtype)
            scores = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
            label = upsample_argmax(logits, size, align_corners)
            assert label.dtype == torch.uint8
            assert torch.equal(label.long(), scores.argmax(1))


def test_upsample_argmax_takes_any_strides():
    logits = torch.randn(2, 12, 10, 6)
    expected = upsample_argmax(logits[:, ::2, :, 1:].contiguous(), (30, 20))
    assert torch.equal(upsample_argmax(logits[:, ::2, :, 1:], (30, 20)), expected)
    assert torch.equal(upsample_argmax(logits[:, ::2, :, 1:].to(memory_format=torch.channels_last), (30, 20)), expected)


def cross_entropy_by_definition(scores, target, weight, smoothing):
    """Losses and weights per pixel, in Python's own floats; 255 is ignored."""
    losses, weights = [], []
    count = scores.shape[1]
    for pixel, truth in zip(scores.permute(0, 2, 3, 1).reshape(-1, count).tolist(), target.flatten().tolist()):
        if truth == 255:
            losses.append(0.0), weights.append(0.0)
            continue
        total = math.log(sum(math.exp(s) for s in pixel))
        log_p = [s - total for s in pixel]
        wanted = [smoothing / count + (1 - smoothing) * (k == truth) for k in range(count)]
        losses.append(-sum(weight[k] * wanted[k] * log_p[k] for k in range(count)))
        weights.append(weight[truth])
    return losses, weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upsample_cross_entropy_is_its_definition(dtype, smoothing):
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 3, 4, dtype=dtype)
    scores = F.interpolate(logits.double(), (9, 11), mode="bilinear", align_corners=False)
    for label_dtype in (torch.uint8, torch.int64):
        target = torch.randint(0, 3, (2, 9, 11)).to(label_dtype)
        target[0, :3] = 255
        for weight in (None, [0.5, 2.0, 1.0]):
            losses, weights = cross_entropy_by_definition(scores, target, weight or [1.0] * 3, smoothing)
            options = {"weight": weight and torch.tensor(weight, dtype=dtype), "label_smoothing": smoothing}
            each = upsample_cross_entropy(logits, target, reduction="none", **options)
            torch.testing.assert_close(each, torch.tensor(losses, dtype=dtype).view(2, 9, 11))
            total = upsample_cross_entropy(logits, target, reduction="sum", **options)
            assert total.item() == pytest.approx(sum(losses), rel=1e-5)
            mean = upsample_cross_entropy(logits, target, **options)
            assert mean.item() == pytest.approx(sum(losses) / sum(weights), rel=1e-5)


def test_gradients_of_float64_and_smoothed_losses_are_the_derivatives():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 7, 9))
    target[:, 2] = 255
    options = {"weight": torch.rand(3, dtype=torch.float64), "label_smoothing": 0.1}
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x: upsample_cross_entropy(x, target, reduction=reduction, **options),  # noqa: B023
            logits,
        )


def test_all_ignored_is_zero_with_zero_gradients():
    for dtype in (torch.float32, torch.float64):  # kernel and reference
        logits = torch.randn(1, 3, 4, 4, dtype=dtype, requires_grad=True)
        loss = upsample_cross_entropy(logits, torch.full((1, 8, 8), 255))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: upsample_argmax(x[0], (8, 8)), r"logits are torch.float32 \(3, 4, 4\)"),
        (lambda x, t: upsample_argmax(x.long(), (8, 8)), "logits are torch.int64"),
        (lambda x, t: upsample_argmax(x[:0], (8, 8)), "not empty"),
        (lambda x, t: upsample_argmax(torch.zeros(1, 257, 2, 2), (8, 8)), "257 classes, expected at most 256"),
        (lambda x, t: upsample_argmax(x, (0, 8)), r"size is \(0, 8\)"),
        (lambda x, t: upsample_cross_entropy(x, t[0]), r"target has shape \(8, 8\)"),
        (lambda x, t: upsample_cross_entropy(x, t[:1]), r"target has shape \(1, 8, 8\), expected \(2, H, W\)"),
        (lambda x, t: upsample_cross_entropy(x, t.float()), "target is torch.float32, expected uint8 or int64"),
        (lambda x, t: upsample_cross_entropy(x, t, weight=torch.ones(4)), r"weight is torch.float32 \(4,\)"),
        (lambda x, t: upsample_cross_entropy(x, t, weight=torch.ones(3).double()), "weight is torch.float64"),
        (lambda x, t: upsample_cross_entropy(x, t.to("meta")), "target is on meta, expected cpu"),
        (lambda x, t: upsample_cross_entropy(x, t, reduction="max"), "reduction is 'max'"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64))


def test_accelerate_gives_the_networks_labels_and_leaves_it_untouched():
    torch.manual_seed(0)
    model = FastSCNN(6).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), np.uint8)
    labels = accelerate(model)(torch.from_numpy(image))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.from_numpy(((image / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = model.eval()(x).argmax(1)
    assert labels.shape == (2, 50, 70) and labels.dtype == torch.uint8
    assert (labels == expected).float().mean() > 0.999  # rounding decides between scores that are all but equal


def test_accelerate_refuses_what_is_no_image_batch():
    with pytest.raises(ValueError, match=r"torch.float32 \(1, 3, 64, 64\), expected uint8 \(N, H, W, 3\)"):
        accelerate(FastSCNN(3))(torch.zeros(1, 3, 64, 64))


def test_the_benchmark_of_the_ops_runs():
    done = run_script("tests/benchmarks/ops.py", "--size", 64, 128, "--seconds", 0)
    assert done.returncode == 0, done.stderr
    assert [set(each["ms"]) >= {"plain", "ops_ext"} for each in last_json(done.stdout)["results"]] == [True] * 3


def test_an_op_is_added_as_the_package_says(tmp_path):
    try:
        compiler.load("cpu")
    except compiler.BuildError as error:
        pytest.skip(f"no kernels: {error}")
    shutil.copytree(ROOT / "ops_ext", tmp_path / "ops_ext", ignore=shutil.ignore_patterns("__pycache__"))
    recipe = ops_ext.__doc__.split("How to add an op")[1].splitlines()
    code = [line[7:] for line in recipe if line.startswith(" " * 7)]
    python, cpp = code[: code.index('#include "common.h"')], code[code.index('#include "common.h"') :]
    python[:0] = ["import torch", "from .compiler import has_kernels", "def double_it_reference(x): return 2 * x"]
    (tmp_path / "ops_ext" / "double_it.py").write_text("\n".join(python))
    body = "Tensor out = torch::stable::clone(x); *static_cast<float*>(out.mutable_data_ptr()) *= 2; return out;"
    (tmp_path / "ops_ext" / "double_it.cpp").write_text("\n".join(cpp).replace("...", body))
    use = """
import torch
from ops_ext.double_it import double_it
print(double_it(torch.tensor([21.0])).item())
torch.library.opcheck(torch.ops.ops_ext.double_it.default, (torch.ones(1),))
"""
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "42.0\n", done.stderr
