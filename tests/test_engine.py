"""Fast-SCNN in the CPU engine gives what the module gives, at any size; another network runs in PyTorch and says so."""

import copy
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ops_ext
from model import VARIANTS, FastSCNN
from ops_ext import accelerate, compiler
from ops_ext.accelerate import fold_batch_norm
from ops_ext.engine import FusedFastSCNN

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    try:
        compiler.load("cpu")
    except compiler.BuildError as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture(params=DTYPES)
def dtype(request):
    return available(request.param)


def available(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("no AVX512-BF16 on this CPU")
    return dtype


def network(num_classes: int = 19, variant: str = "paper") -> FastSCNN:
    """A network whose batch normalisations have seen something, as a trained one's have."""
    torch.manual_seed(0)
    model = FastSCNN(num_classes, variant=variant)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def engine_of(model: FastSCNN, dtype: torch.dtype) -> FusedFastSCNN:
    model = copy.deepcopy(model).requires_grad_(False)
    fold_batch_norm(model)
    return FusedFastSCNN(model, MEAN, STD, dtype)


def scores_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    mean, std = (each.double().view(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        return copy.deepcopy(model).double()((images.permute(0, 3, 1, 2).double() / 255 - mean) / std, upsample=False)


def labels_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    align_corners = getattr(model, "align_corners", False)
    return ops_ext.upsample_argmax_reference(scores_of(model, images), images.shape[1:3], align_corners)


def images_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_networks(dtype):
    for num_classes in (1, 5, 19, 32):
        model = network(num_classes)
        engine = engine_of(model, dtype)
        for shape in ((1, 32, 32), (2, 97, 131), (1, 33, 400), (3, 64, 96), (1, 255, 257)):
            images = images_of(*shape)
            scores, expected = engine.logits(images), scores_of(model, images)
            assert scores.shape == expected.shape
            if dtype == torch.float32:
                assert (scores - expected).abs().max() < 2e-5 * expected.abs().max()
            else:
                assert (scores - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stage_is_the_networks(variant, dtype):
    # What a wrong tap in the stem adds drowns in the scores of random weights: each stage is compared by itself.
    model, expected = network(variant=variant).double(), []
    features, layer = model.global_feature_extractor, model.feature_fusion.depthwise
    bottlenecks = [*features.bottleneck1, *features.bottleneck2, *features.bottleneck3]
    stages = [model.learning_to_downsample, *bottlenecks, features.pyramid_pooling, model.classifier]
    engine = engine_of(model.float(), dtype)
    for stage in stages:
        stage.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    most = 2e-5 if dtype == torch.float32 else 0.01 if variant == "paper" else 0.02
    for shape in ((1, 64, 96), (2, 97, 131), (1, 98, 130), (1, 160, 1100)):
        images = images_of(*shape)
        buffers = engine.buffers(images)
        engine.run(images, buffers)
        expected.clear()
        scores_of(model, images)
        if layer.conv.groups == 1:  # done before the resizing, with which it commutes
            with torch.inference_mode():
                layer.double()
                expected[-2] = layer.bn(layer.conv(expected[-2]))
                layer.float()
        maps = [buffers.detail, *buffers.bottlenecks, buffers.context, buffers.scores]
        assert len(maps) == len(expected)
        for stage, got, want in zip(stages, maps, expected):
            assert not got[:, want.shape[1] :].any()
            error = (got[:, : want.shape[1]] - want).abs().max() / want.abs().max()
            assert error < most, (type(stage).__name__, shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_in_the_engine_when_sizes_change(variant, dtype):
    model = network(variant=variant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by which accelerate would say that it does not
        segment = accelerate(model, precision=dtype)
    assert segment.precision == ("fp32" if dtype == torch.float32 else "bf16")
    for shape in ((1, 64, 96), (2, 97, 131), (1, 64, 96), (1, 40, 40)):
        images = images_of(*shape)
        expected = labels_of(model, images)
        assert (segment(images) == expected).float().mean() > (0.999 if dtype == torch.float32 else 0.97)


def test_threads_may_call_at_once_and_in_any_number():
    segment, images = accelerate(network(), precision=torch.float32), [images_of(1, 64 + 8 * k, 96) for k in range(4)]
    expected = [segment(each) for each in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(segment, images), expected))
    torch.set_num_threads(3)
    results = [segment(each) for each in images]
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


class Flipped(FastSCNN):
    """The same submodules, put together otherwise."""

    def forward(self, x, upsample=True):
        return super().forward(x.flip(1), upsample)


class Tiny(nn.Module):
    """Another network, whose neighbouring layers are not called in their order."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 8, 8), nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.running_mean, -2, 2)

    def forward(self, x, upsample=True):
        return self.conv(self.bn(x))


@pytest.mark.parametrize(
    "network, precision, cause",
    [
        (Flipped, torch.float32, "its scores differ from the module's by"),
        (Tiny, torch.float32, "no attribute 'learning_to_downsample'"),
        (FastSCNN, torch.float16, "not in torch.float16"),
    ],
)
def test_what_the_engine_cannot_run_runs_in_pytorch_and_a_warning_names_the_cause(network, precision, cause):
    torch.manual_seed(0)
    model, images = network().eval(), images_of(1, 64, 96)
    with pytest.warns(RuntimeWarning, match=cause):
        segment = accelerate(model, precision=precision)
    least = 0.999 if precision == torch.float32 else 0.97
    assert (segment(images) == labels_of(model, images)).float().mean() > least


def test_images_of_numpy_are_taken():
    segment, images = accelerate(network()), images_of(1, 64, 96)
    assert torch.equal(segment(images.numpy()), segment(images))


def test_what_is_no_batch_of_images_of_some_size_is_refused():
    segment = accelerate(network())
    for shape in ((1, 20, 20, 4), (1, 20, 20), (0, 32, 32, 3)):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, 3\), not empty"):
            segment(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"31.*expected at least 32"):
        segment(images_of(1, 64, 31))
    with pytest.raises(ValueError, match=r"precision is torch.int8, expected float32, bfloat16, float16 or None"):
        accelerate(network(), precision=torch.int8)


def test_relu6_has_its_ceiling(dtype):
    # Activations of random weights seldom reach 6: scaled up, most of them do.
    model, images = network(variant="segmentron"), images_of(1, 97, 131)
    for block in model.global_feature_extractor.bottleneck1:
        for layer in (block.expand, block.depthwise):
            layer.bn.weight.data *= 20
    scores, expected = engine_of(model, dtype).logits(images), scores_of(model, images)
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.max_val = 1e9
    assert (scores_of(model, images) - expected).norm() > 0.05 * expected.norm()  # else this shows nothing
    assert (scores - expected).norm() < (1e-4 if dtype == torch.float32 else 0.02) * expected.norm()


def test_folded_batch_normalisation_changes_nothing():
    model, images = network(), images_of(2, 97, 131)
    expected = scores_of(model, images)
    fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (scores_of(model, images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_cannot_be_folded_stays():
    for change in (lambda conv: conv, nn.utils.parametrizations.weight_norm):
        for norm in (nn.BatchNorm2d(4, track_running_stats=False), nn.SyncBatchNorm(4), nn.BatchNorm2d(4)):
            model = nn.Sequential(change(nn.Conv2d(3, 4, 8, 8)), norm).eval()
            x = torch.randn(1, 3, 32, 32)
            expected = model(x)
            fold_batch_norm(model)
            torch.testing.assert_close(model(x), expected)


def test_mean_and_deviation_may_be_whole_numbers():
    whole = accelerate(network(), precision=torch.float32, mean=(0, 0, 0), std=(1, 1, 1))
    decimal = accelerate(network(), precision=torch.float32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert torch.equal(whole(images_of(1, 64, 96)), decimal(images_of(1, 64, 96)))


def test_weights_that_do_not_fit_each_other_are_refused():
    x = torch.zeros(1, 32, 6, 7).contiguous(memory_format=torch.channels_last)
    v32, nine, square = torch.zeros(32), torch.zeros(9, 32), torch.zeros(32, 32)
    block = torch.ops.ops_ext.bottleneck_block
    block(x, [square, v32, nine, v32, square, v32], 1, True, False, x.clone())
    for wrong in (
        [square, v32, nine, v32, square[:, :16], v32],
        [square, v32, nine[:8], v32, square, v32],
        [square[:, :20], v32[:20], nine[:, :20], v32[:20], square[:20], v32],
        [square, v32, nine, v32],
    ):
        with pytest.raises(RuntimeError, match="expected"):
            block(x, wrong, 1, True, False, x.clone())
    with pytest.raises(RuntimeError, match="out has another shape"):
        block(x, [square, v32, nine, v32, square, v32], 1, True, False, x[:, :, :5].clone())


def test_bfloat16_without_tiles(tmp_path):
    # As on AMD's CPUs. A kernel that refuses the tiles, played by a library loaded before libc.
    available(torch.bfloat16)
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        pytest.skip("no AMX on this CPU: the other tests run without it")
    source = tmp_path / "refuse.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <stdarg.h>\n"
        "long syscall(long number, ...) {\n  long a[6]; va_list list; va_start(list, number);\n"
        "  for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);\n  va_end(list);\n"
        "  if (number == 158 && a[0] == 0x1023) return -1;\n"
        '  long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");\n'
        "  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);\n}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "refuse.so", "-ldl"], check=True)
    code = """
import torch, ops_ext, test_engine
torch.set_num_threads(1)
assert not torch.ops.ops_ext.has_fast_bfloat16() if ops_ext.implementations("cpu") else False
for dtype in test_engine.DTYPES:
    for variant in ("paper", "segmentron"):
        test_engine.test_every_stage_is_the_networks(variant, dtype)
print("fine")
"""
    folders = os.pathsep.join(str(Path(__file__).parent / each) for each in ("..", "."))
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "refuse.so"), "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_labels_are_the_networks():
    model, images = network(), images_of(1, 97, 131)
    labels = accelerate(model, device="cuda", precision=torch.float32)(images)
    assert (labels.cpu() == labels_of(model, images)).float().mean() > 0.995


def test_the_sanitizers_find_nothing():
    from test_kernels import run_sanitized

    code = """
import sys, torch, ops_ext
for library in sys.argv[1:]:
    torch.ops.load_library(library)
from test_engine import DTYPES, engine_of, images_of, network
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in DTYPES[: 1 + bool(torch.cpu.get_capabilities().get("avx512_bf16"))]:
        with torch.inference_mode():
            for variant in ("paper", "segmentron"):
                engine = engine_of(network(variant=variant), dtype)
                for shape in ((1, 32, 32), (2, 97, 131), (1, 33, 400)):
                    assert engine(images_of(*shape), shape[1:]).shape == shape
print("clean")
"""
    done = run_sanitized(code, "upsample_argmax.cpp", "engine/blocks.cpp")
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[max(done.stderr.find("ERROR"), 0) :][:3000]
