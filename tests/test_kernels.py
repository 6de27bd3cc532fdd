"""The compiled kernels give what plain PyTorch gives, on any shape, dtype and stride; the CUDA kernels do where there is no GPU.

"cpu" is the CPU library. "emulated" is ops_ext/cuda.cu compiled for the CPU (tests/cuda_on_cpu), which checks its arithmetic
and its accesses to memory. "cuda" is the CUDA library on a GPU, and skipped without one.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ops_ext
from conftest import ROOT
from kernel_cases import argmax_case, check_argmax, check_cross_entropy, cross_entropy_case
from ops_ext import compiler, upsample_argmax, upsample_cross_entropy

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler on PATH"
)
pytestmark = needs_compiler


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def backend(request):
    """The raw operators of a library, and the device that they run on."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated_ops"), torch.device("cpu")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU on this machine")
    assert ops_ext.implementations(request.param)["upsample_argmax"] == request.param
    return torch.ops.ops_ext, torch.device(request.param)


@pytest.fixture(scope="session")
def emulated_ops():
    torch.ops.load_library(str(build_for_tests("emulated")))
    return torch.ops.ops_emulated


def build_for_tests(library: str, *flags: str) -> Path:
    """A library that only tests load, kept in the checkout's build folder."""
    folder = ROOT / "tests" / "cuda_on_cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_EXT_CACHE", str(ROOT / "build"))
        if library == "cpu":
            return compiler.build("cpu", flags)
        source = [folder / "emulated.cpp", folder / "cuda_runtime.h", ROOT / "ops_ext" / "cuda.cu"]
        return compiler.build_library(library, source, [f"-I{folder}", "-Wno-unknown-pragmas", *flags])


@pytest.mark.parametrize("seed", range(120))
def test_argmax_on_a_random_case(backend, seed):
    check_argmax(*backend, argmax_case(seed))


def test_argmax_at_the_size_of_cityscapes():
    torch.manual_seed(0)
    for logits in (torch.randn(1, 19, 128, 256), F.avg_pool2d(torch.randn(1, 19, 128, 256), 9, 1, 4).half()):
        check_argmax(torch.ops.ops_ext, torch.device("cpu"), (logits, (1024, 2048), False))


@pytest.mark.parametrize("seed", range(120))
def test_cross_entropy_on_a_random_case(backend, seed):
    check_cross_entropy(*backend, cross_entropy_case(seed))


@pytest.mark.parametrize("shape, size", [((1, 19, 16, 32), (128, 256)), ((2, 3, 4, 5), (9, 31)), ((1, 256, 3, 3), (24, 24))])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_scores_that_are_no_ordinary_numbers_are_taken_as_pytorch_takes_them(backend, shape, size, value):
    ops, device = backend
    torch.manual_seed(0)
    logits = torch.randn(shape)
    for _ in range(3):
        n, k, i, j = (int(torch.randint(extent, ())) for extent in shape)
        logits[n, k, i, j] = value
    scores = F.interpolate(logits, size, mode="bilinear")
    labels = ops.upsample_argmax(logits.to(device), *size, False).cpu()
    differ = labels != scores.argmax(1)
    if not torch.tensor(value).isfinite():
        assert not differ.any()
        return
    best, second = scores.topk(2, 1).values.unbind(1)  # huge scores round on their own scale
    assert ((best - second)[differ] <= 1e-5 * best[differ].abs()).all()


def test_of_equal_scores_the_first_class_wins(backend):
    ops, device = backend
    logits = torch.randn(1, 4, 6, 7).repeat(1, 3, 1, 1)  # three equal copies of each class
    labels = ops.upsample_argmax(logits.to(device), 48, 56, False)
    assert labels.max() < 4


def test_nan_logits_give_a_nan_loss(backend):
    ops, device = backend
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1, 2, 2] = float("nan")
    target = torch.zeros(1, 32, 32, dtype=torch.uint8)
    loss, _, grad = ops.upsample_cross_entropy(logits.to(device), target.to(device), None, 255, 0.0, False, False, True)
    assert loss.isnan() and grad[0, 1, 2, 2].isnan()


@pytest.mark.parametrize("gap", [0.0, 50.0, 200.0, 3000.0])
def test_the_loss_of_extreme_scores_is_exact(backend, gap):
    ops, device = backend
    logits = torch.tensor([0.0, gap, -gap]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    target = torch.tensor([0, 1, 2, 2]).view(1, 2, 2)
    loss, total, grad = ops.upsample_cross_entropy(logits.to(device), target.to(device), None, 255, 0.0, False, True, False)
    expected = F.cross_entropy(logits.double(), target, reduction="none").float()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert total == 4 and grad.numel() == 0


def test_the_gradient_of_huge_scores_is_exact(backend):
    ops, device = backend
    logits = torch.full((1, 3, 2, 2), -1e9)
    logits[:, 1] = 1e9 + 64  # one unit in the last place, by which another order of the sums would be off
    target = torch.ones(1, 7, 9, dtype=torch.uint8)
    loss, _, grad = ops.upsample_cross_entropy(logits.to(device), target.to(device), None, 255, 0.0, False, False, True)
    assert loss == 0 and grad.abs().max() < 1e-30


def test_weights_of_zero_leave_zero_and_negative_ones_divide(backend):
    ops, device = backend
    logits, target = torch.randn(1, 3, 2, 2), torch.randint(0, 2, (1, 8, 8))
    for weight in (torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-1.0, -2.0, 1.0])):
        loss, total, _ = ops.upsample_cross_entropy(
            logits.to(device), target.to(device), weight.to(device), 255, 0.0, False, False, False
        )
        scores = F.interpolate(logits, (8, 8), mode="bilinear")
        torch.testing.assert_close(loss.cpu(), F.cross_entropy(scores, target, weight, reduction="sum"))
        torch.testing.assert_close(total.cpu(), weight[target].sum())
    assert upsample_cross_entropy(logits, target, weight=torch.tensor([0.0, 0.0, 1.0])) == 0
    expected = F.cross_entropy(scores, target, weight)
    torch.testing.assert_close(upsample_cross_entropy(logits, target, weight=weight), expected)


def test_cpu_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 19, 33, 31, requires_grad=True), torch.randint(0, 19, (2, 260, 250), dtype=torch.uint8)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        logits.grad = None
        loss = upsample_cross_entropy(logits, target)
        loss.backward()
        labels = upsample_argmax(logits, (260, 250))
        results.append((loss.detach(), logits.grad, labels))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_the_derivatives(reduction, align_corners, smoothing):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 7, 9))
    target[:, 2] = 255
    options = {"weight": torch.rand(3, dtype=torch.float64), "label_smoothing": smoothing, "align_corners": align_corners}
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, target, reduction=reduction, **options), logits)


def test_a_second_derivative_is_refused():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def operator_calls():
    torch.manual_seed(0)
    target, weight = torch.randint(0, 5, (2, 17, 25)), torch.rand(5)
    logits = torch.randn(2, 5, 4, 6)
    ops_ext.implementations("cpu")
    ops = torch.ops.ops_ext
    for x in (logits, logits.contiguous(memory_format=torch.channels_last), logits.bfloat16(), logits[:, :, :, ::2]):
        yield ops.upsample_argmax.default, (x, 17, 25, False)
        for per_pixel, with_grad in ((False, False), (False, True), (True, False)):
            x = x.clone().requires_grad_()
            options = (255, 0.1, False, per_pixel, with_grad)
            yield ops.upsample_cross_entropy.default, (x, target, weight, *options)
            yield ops.upsample_cross_entropy.default, (x, target.byte(), None, *options)
        yield ops.upsample_cross_entropy_backward.default, (torch.rand(2, 17, 25), x.detach(), target, weight, 255, 0.1, False)


def test_operators_pass_pytorchs_own_check():
    for op, arguments in operator_calls():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_has_no_graph_breaks(dynamic):
    def everything(logits, target, size):
        labels = upsample_argmax(logits, size)
        losses = [upsample_cross_entropy(logits, target, reduction=r).sum() for r in ("mean", "sum", "none")]
        return sum(losses), labels

    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for size in ((20, 24), (31, 24)):
        inputs = torch.randn(1, 4, 5, 6), torch.randint(0, 4, (1, *size))
        results = []
        for function in (everything, compiled):
            logits = inputs[0].clone().requires_grad_()
            loss, labels = function(logits, inputs[1], size)
            loss.backward()
            results.append((loss.detach(), logits.grad, labels))
        torch.testing.assert_close(*results)


def test_compiled_code_has_no_graph_breaks_where_the_image_shrinks():
    logits, target = torch.randn(1, 4, 20, 24), torch.randint(0, 4, (1, 10, 12))
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), upsample_cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_neither_casts_nor_changes_the_result(dtype):
    logits, target = torch.randn(1, 4, 5, 6), torch.randint(0, 4, (1, 20, 24))
    with torch.autocast("cpu", dtype):
        loss, labels = upsample_cross_entropy(logits, target), upsample_argmax(logits, (20, 24))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, upsample_cross_entropy(logits, target))
    assert torch.equal(labels, upsample_argmax(logits, (20, 24)))


def test_gradients_come_in_the_memory_format_of_the_logits():
    logits = torch.randn(2, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    upsample_cross_entropy(logits, torch.zeros(2, 8, 8, dtype=torch.uint8)).backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)


X, T = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
OPTIONS = (255, 0.0, False, False, False)


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("upsample_argmax", (X[0], 8, 8, False), r"logits have shape \(3, 4, 4\)"),
        ("upsample_argmax", (X[:0], 8, 8, False), r"logits have shape \(0, 3, 4, 4\)"),
        ("upsample_argmax", (X.long(), 8, 8, False), "expected float16, bfloat16, float32 or float64"),
        ("upsample_argmax", (torch.zeros(1, 257, 1, 1), 8, 8, False), "257 classes, expected at most 256"),
        ("upsample_argmax", (X, 0, 8, False), r"size is \(0, 8\)"),
        ("upsample_cross_entropy", (X, T[0], None, *OPTIONS), r"target has shape \(8, 8\), expected \(2, H, W\)"),
        ("upsample_cross_entropy", (X, T[:1], None, *OPTIONS), r"target has shape \(1, 8, 8\)"),
        ("upsample_cross_entropy", (X, T[:, :0], None, *OPTIONS), r"target has shape \(2, 0, 8\)"),
        ("upsample_cross_entropy", (X, T.float(), None, *OPTIONS), "target has another dtype"),
        ("upsample_cross_entropy", (X, T, torch.ones(4), *OPTIONS), r"weight has shape \(4\), expected \(3,\)"),
        ("upsample_cross_entropy", (X, T, torch.ones(3).double(), *OPTIONS), "weight has another dtype"),
        ("upsample_cross_entropy_backward", (torch.ones(2, 8, 7), X, T, None, *OPTIONS[:3]), r"gradient has shape \(2, 8, 7\)"),
    ],
)
def test_the_raw_operators_refuse_what_would_leave_memory(emulated_ops, op, arguments, message):
    ops_ext.implementations("cpu")
    for ops in (torch.ops.ops_ext, emulated_ops):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, op)(*arguments)


@pytest.mark.parametrize("label", [3, 254, -1, -(2**63)])
def test_a_label_outside_the_range_is_named(label):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 7, 7] = label
    for loss in (upsample_cross_entropy, ops_ext.upsample_cross_entropy_reference):
        with pytest.raises(RuntimeError, match=rf"target holds {label}, expected labels from 0 to 2 or 255 \(ignore_index\)"):
            loss(torch.zeros(1, 3, 2, 2), target)


def test_the_cuda_kernel_makes_the_loss_nan_for_such_a_label_and_prints_it(emulated_ops, capfd):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 7, 7] = 77
    loss, _, grad = emulated_ops.upsample_cross_entropy(torch.zeros(1, 3, 2, 2), target, None, 255, 0.0, False, False, True)
    assert loss.isnan() and grad.isnan().any()
    ctypes.CDLL(None).fflush(None)  # what printf keeps until its buffer is full, unless PYTHONUNBUFFERED is set
    assert "target holds 77, expected labels from 0 to 2 or 255" in capfd.readouterr().out


SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
SANITIZED = """
import sys, torch
from kernel_cases import *
torch.ops.load_library(sys.argv[1]), torch.ops.load_library(sys.argv[2])
for seed in range(1000, 1040):
    for ops in (torch.ops.ops_ext, torch.ops.ops_emulated):
        check_argmax(ops, torch.device("cpu"), argmax_case(seed))
        check_cross_entropy(ops, torch.device("cpu"), cross_entropy_case(seed))
print("clean")
"""


def run_sanitized(code: str, *arguments) -> subprocess.CompletedProcess:
    preload = [
        subprocess.run([*compiler._compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in preload):
        pytest.skip("the C++ compiler has no sanitizers")
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",  # Python itself leaks at exit
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    done = run_sanitized(SANITIZED, build_for_tests("cpu", *SANITIZERS), build_for_tests("emulated", *SANITIZERS))
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[max(done.stderr.find("ERROR"), 0) :][:3000]
