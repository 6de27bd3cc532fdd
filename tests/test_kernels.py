"""The compiled kernels give what plain PyTorch gives, on any shape and stride; those for CUDA also without a GPU.

"cpu" are the libraries for the CPU. "emulated" are the .cu files compiled for the CPU (tests/cuda_on_cpu), which checks
their arithmetic and their accesses to memory. "cuda" are the libraries for CUDA on a GPU, and skipped without one.
"""

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ops_ext
from conftest import ROOT
from kernel_cases import argmax_case, check_argmax, check_cross_entropy, cross_entropy_case
from ops_ext import compiler, upsample_argmax, upsample_cross_entropy

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler on PATH"
)
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def backend(request):
    """The raw operators of a library, and the device that they run on."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated_ops"), torch.device("cpu")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU on this machine")
    assert set(ops_ext.implementations(request.param).values()) == {request.param}
    return torch.ops.ops_ext, torch.device(request.param)


@pytest.fixture(scope="session")
def emulated_ops():
    for op in ops_ext.OPS:
        torch.library.define(f"ops_emulated::{op}", importlib.import_module(f"ops_ext.{op}").SCHEMA)
    torch.ops.load_library(*build_for_tests("emulated"))
    return torch.ops.ops_emulated


def build_for_tests(*names: str, flags: tuple[str, ...] = ()) -> list[Path]:
    """Libraries for tests alone, kept in the checkout's build folder: "emulated", or sources of ops_ext."""
    emulation, package = ROOT / "tests" / "cuda_on_cpu", ROOT / "ops_ext"
    inputs = [emulation / "cuda_runtime.h", *sorted(package.glob("*.cu"))]

    def build(name: str) -> Path:
        if name != "emulated":
            return compiler.build(package / name, flags)
        return compiler.build(emulation / "emulated.cpp", [f"-I{emulation}", "-Wno-unknown-pragmas", *flags], inputs)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("OPS_EXT_CACHE", str(ROOT / "build"))
        return list(pool.map(build, names))


def test_argmax_on_random_cases(backend):
    for seed in range(120):
        check_argmax(*backend, argmax_case(seed))


def test_argmax_at_the_size_of_cityscapes():
    torch.manual_seed(0)
    for logits in (torch.randn(1, 19, 128, 256), F.avg_pool2d(torch.randn(1, 19, 128, 256), 9, 1, 4)):
        check_argmax(torch.ops.ops_ext, torch.device("cpu"), (logits, (1024, 2048), False))


def test_cross_entropy_on_random_cases(backend):
    for seed in range(120):
        check_cross_entropy(*backend, cross_entropy_case(seed))


def test_scores_that_are_not_ordinary_numbers_are_taken_as_pytorch_takes_them(backend):
    ops, device = backend
    for shape, size in (((1, 19, 16, 32), (128, 256)), ((2, 3, 4, 5), (9, 31)), ((1, 256, 3, 3), (24, 24))):
        for value in (float("nan"), float("inf"), -float("inf"), 3e38, -3e38):
            torch.manual_seed(0)
            logits = torch.randn(shape)
            for _ in range(3):
                n, k, i, j = (int(torch.randint(extent, ())) for extent in shape)
                logits[n, k, i, j] = value
            scores = F.interpolate(logits, size, mode="bilinear")
            differ = ops.upsample_argmax(logits.to(device), *size, False).cpu() != scores.argmax(1)
            if not torch.tensor(value).isfinite():
                assert not differ.any()
                continue
            best, second = scores.topk(2, 1).values.unbind(1)  # huge scores round on their own scale
            assert ((best - second)[differ] <= 1e-5 * best[differ].abs()).all()


def test_of_equal_scores_the_first_class_wins(backend):
    ops, device = backend
    logits = torch.randn(1, 4, 6, 7).repeat(1, 3, 1, 1)  # three equal copies of each class
    labels = ops.upsample_argmax(logits.to(device), 48, 56, False)
    assert labels.max() < 4


def losses_of(backend, logits, target, weight=None, per_pixel=False):
    """(loss, total, grad) of the raw operator; grad where the loss is summed."""
    ops, device = backend
    weight = None if weight is None else weight.to(device)
    options = (None, 255, False, per_pixel, not per_pixel)
    results = ops.upsample_cross_entropy(logits.to(device), target.to(device), weight, *options)
    return tuple(result.cpu() for result in results)


def test_nan_logits_give_a_nan_loss(backend):
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1, 2, 2] = float("nan")
    loss, _, grad = losses_of(backend, logits, torch.zeros(1, 32, 32, dtype=torch.uint8))
    assert loss.isnan() and grad[0, 1, 2, 2].isnan()


def test_the_loss_of_extreme_scores_is_exact(backend):
    target = torch.tensor([0, 1, 2, 2]).view(1, 2, 2)
    for gap in (0.0, 50.0, 200.0, 3000.0):
        logits = torch.tensor([0.0, gap, -gap]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
        loss, total, grad = losses_of(backend, logits, target, per_pixel=True)
        expected = F.cross_entropy(logits.double(), target, reduction="none").float()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert total == 4 and grad.numel() == 0


def test_the_gradient_of_huge_scores_is_exact(backend):
    logits = torch.full((1, 3, 2, 2), -1e9)
    logits[:, 1] = 1e9 + 64  # one unit in the last place, by which another order of the sums would be off
    loss, _, grad = losses_of(backend, logits, torch.ones(1, 7, 9, dtype=torch.uint8))
    assert loss == 0 and grad.abs().max() < 1e-30


def test_weights_of_zero_leave_zero_and_negative_ones_divide(backend):
    logits, target = torch.randn(1, 3, 2, 2), torch.randint(0, 2, (1, 8, 8))
    scores = F.interpolate(logits, (8, 8), mode="bilinear")
    for weight in (torch.tensor([0.0, 0.0, 1.0]), torch.tensor([-1.0, -2.0, 1.0])):
        loss, total, _ = losses_of(backend, logits, target, weight)
        torch.testing.assert_close(loss, F.cross_entropy(scores, target, weight, reduction="sum"))
        torch.testing.assert_close(total, weight[target].sum())
    assert upsample_cross_entropy(logits, target, weight=torch.tensor([0.0, 0.0, 1.0])) == 0
    expected = F.cross_entropy(scores, target, weight)
    torch.testing.assert_close(upsample_cross_entropy(logits, target, weight=weight), expected)


def test_cpu_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 19, 33, 31, requires_grad=True), torch.randint(0, 19, (2, 260, 250))
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        logits.grad = None
        loss = upsample_cross_entropy(logits, target)
        loss.backward()
        results.append((loss.detach(), logits.grad, upsample_argmax(logits, (260, 250))))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_gradients_are_those_of_plain_pytorch():
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 7, 9))
    target[:, 2] = 255
    weight = torch.rand(3)
    for reduction in REDUCTIONS:
        for align_corners in (False, True):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
                logits = torch.randn(2, 3, 3, 4).to(dtype).requires_grad_()
                exact = logits.detach().double().requires_grad_()
                scores = F.interpolate(exact, (7, 9), mode="bilinear", align_corners=align_corners)
                expected = F.cross_entropy(scores, target, weight.double(), ignore_index=255, reduction=reduction)
                options = {"weight": weight, "reduction": reduction, "align_corners": align_corners}
                loss = upsample_cross_entropy(logits, target, **options)
                factors = torch.rand(loss.shape)
                (loss * factors).sum().backward()
                (expected * factors).sum().backward()
                assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
                torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_a_second_derivative_is_refused():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


def operator_calls():
    torch.manual_seed(0)
    target, weight = torch.randint(0, 5, (2, 17, 25)), torch.rand(5)
    logits = torch.randn(2, 5, 4, 6)
    ops = torch.ops.ops_ext
    for x in (logits, logits.contiguous(memory_format=torch.channels_last), logits[:, :, :, ::2]):
        yield ops.upsample_argmax.default, (x, 17, 25, False)
        for per_pixel, with_grad in ((False, False), (False, True), (True, False)):
            x = x.clone().requires_grad_()
            yield ops.upsample_cross_entropy.default, (x, target, weight, None, 255, False, per_pixel, with_grad)
            yield ops.upsample_cross_entropy.default, (x, target.byte(), None, None, 255, False, per_pixel, with_grad)
        pixel_grad = torch.rand(2, 17, 25)
        yield ops.upsample_cross_entropy.default, (x.detach(), target, weight, pixel_grad, 255, False, False, True)


def test_operators_pass_pytorchs_own_check():
    ops_ext.implementations("cpu")
    for op, arguments in operator_calls():
        torch.library.opcheck(op, arguments)


def test_compiled_code_has_no_graph_breaks():
    def everything(logits, target, size):
        losses = [upsample_cross_entropy(logits, target, reduction=each).sum() for each in REDUCTIONS]
        return sum(losses), upsample_argmax(logits, size)

    for dynamic in (False, True):
        compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for size in ((20, 24), (31, 24), (3, 4)):  # the last one shrinks
            inputs = torch.randn(1, 4, 5, 6), torch.randint(0, 4, (1, *size))
            results = []
            for function in (everything, compiled):
                logits = inputs[0].clone().requires_grad_()
                loss, labels = function(logits, inputs[1], size)
                loss.backward()
                results.append((loss.detach(), logits.grad, labels))
            torch.testing.assert_close(*results)


def test_autocast_neither_casts_nor_changes_the_result():
    logits, target = torch.randn(1, 4, 5, 6), torch.randint(0, 4, (1, 20, 24))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss, labels = upsample_cross_entropy(logits, target), upsample_argmax(logits, (20, 24))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, upsample_cross_entropy(logits, target))
        assert torch.equal(labels, upsample_argmax(logits, (20, 24)))


def test_gradients_come_in_the_memory_format_of_the_logits():
    logits = torch.randn(2, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    upsample_cross_entropy(logits, torch.zeros(2, 8, 8, dtype=torch.uint8)).backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_raw_operators_refuse_what_would_leave_memory(emulated_ops):
    ops_ext.implementations("cpu")
    x, t, options = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64), (255, False, False, False)
    calls = [
        ("upsample_argmax", (x[0], 8, 8, False), "logits"),
        ("upsample_argmax", (x.double(), 8, 8, False), "logits"),
        ("upsample_argmax", (torch.zeros(1, 257, 1, 1), 8, 8, False), "256 classes"),
        ("upsample_argmax", (x, 0, 8, False), "a size"),
        ("upsample_cross_entropy", (x, t[:1], None, None, *options), "target"),
        ("upsample_cross_entropy", (x, t.float(), None, None, *options), "target"),
        ("upsample_cross_entropy", (x, t, torch.ones(4), None, *options), "weight"),
        ("upsample_cross_entropy", (x, t, None, torch.ones(2, 8, 7), *options), "pixel_grad"),
    ]
    for ops in (torch.ops.ops_ext, emulated_ops):
        for op, arguments, message in calls:
            with pytest.raises(RuntimeError, match=message):
                getattr(ops, op)(*arguments)


def test_a_label_outside_the_range_is_named():
    for label in (3, 254, -1, -(2**63)):
        target = torch.zeros(1, 8, 8, dtype=torch.int64)
        target[0, 7, 7] = label
        for loss in (upsample_cross_entropy, ops_ext.upsample_cross_entropy_reference):
            with pytest.raises(
                RuntimeError, match=rf"holds {label}, expected labels from 0 to 2 or 255 \(ignore_index\)"
            ):
                loss(torch.zeros(1, 3, 2, 2), target)


def test_the_cuda_kernel_makes_the_loss_nan_for_such_a_label_and_prints_it(emulated_ops, capfd):
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[0, 7, 7] = 77
    loss, _, grad = losses_of((emulated_ops, "cpu"), torch.zeros(1, 3, 2, 2), target)
    assert loss.isnan() and grad.isnan().any()
    ctypes.CDLL(None).fflush(None)  # what printf keeps until its buffer is full, unless PYTHONUNBUFFERED is set
    assert "target holds 77, expected labels from 0 to 2 or 255" in capfd.readouterr().out


SANITIZERS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
SANITIZED = """
import sys, torch, ops_ext
from kernel_cases import *
from test_kernels import *
for op in ops_ext.OPS:
    torch.library.define(f"ops_emulated::{op}", importlib.import_module(f"ops_ext.{op}").SCHEMA)
for library in sys.argv[1:]:
    torch.ops.load_library(library)
for seed in range(1000, 1040):
    for ops in (torch.ops.ops_ext, torch.ops.ops_emulated):
        check_argmax(ops, torch.device("cpu"), argmax_case(seed))
        check_cross_entropy(ops, torch.device("cpu"), cross_entropy_case(seed))
print("clean")
"""


def run_sanitized(code: str, *sources: str) -> subprocess.CompletedProcess:
    """Runs code whose arguments are the libraries of these sources, compiled with sanitizers."""
    cxx = compiler._compiler()[0][0]
    preload = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
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
    command = [sys.executable, "-c", code, *map(str, build_for_tests(*sources, flags=SANITIZERS))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    done = run_sanitized(SANITIZED, "upsample_argmax.cpp", "upsample_cross_entropy.cpp", "emulated")
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[max(done.stderr.find("ERROR"), 0) :][:3000]
