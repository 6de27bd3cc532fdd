"""Fast-SCNN in the kernels of blocks.cpp gives what the module gives, at any size; what is no Fast-SCNN runs in PyTorch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ops_ext
from model import VARIANTS, FastSCNN
from ops_ext import accelerate, compiler
from ops_ext.fused import FusedFastSCNN

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    try:
        compiler.build("cpu")
    except compiler.BuildError as error:
        pytest.skip(f"no kernels: {error}")
    ops_ext.implementations("cpu")


def network(num_classes: int = 19, seed: int = 0, variant: str = "paper") -> FastSCNN:
    """A network whose batch normalisations have seen something, as a trained one's have."""
    torch.manual_seed(seed)
    model = FastSCNN(num_classes, variant=variant)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def scores_of(model: FastSCNN, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        return model.double()((images.permute(0, 3, 1, 2).double() / 255 - mean) / std, upsample=False)


def images_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_classes", [1, 5, 19, 32])
@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 97, 131), (1, 33, 400), (3, 64, 96), (1, 255, 257)])
def test_scores_are_the_networks(shape, num_classes):
    model, images = network(num_classes), images_of(*shape)
    with torch.inference_mode():
        scores = FusedFastSCNN(model, MEAN, STD, half=False).logits(images)
    expected = scores_of(model, images)
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 97, 131)])
def test_scores_in_bfloat16_are_close_to_the_networks(shape):
    if not torch.ops.ops_ext.has_bfloat16():
        pytest.skip("no AVX512-BF16 on this CPU")
    model, images = network(), images_of(*shape)
    with torch.inference_mode():
        scores = FusedFastSCNN(model, MEAN, STD, half=True).logits(images)
    expected = scores_of(model, images)
    assert (scores - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 97, 131), (1, 98, 130), (1, 160, 1100)])
def test_every_stage_is_the_networks(shape, half, variant):
    # What a wrong tap in the stem adds drowns in the scores of random weights: each stage is compared by itself.
    if half and not torch.ops.ops_ext.has_bfloat16():
        pytest.skip("no AVX512-BF16 on this CPU")
    model, images, expected = network(variant=variant), images_of(*shape), []
    features = model.global_feature_extractor
    bottlenecks = [*features.bottleneck1, *features.bottleneck2, *features.bottleneck3]
    stages = [model.learning_to_downsample, *bottlenecks, features.pyramid_pooling, model.classifier]
    fused = FusedFastSCNN(model, MEAN, STD, half)
    for stage in stages:
        stage.register_forward_hook(lambda _module, _inputs, output: expected.append(output))
    scores_of(model, images)
    with torch.inference_mode():
        maps = fused._maps(*shape)
        fused._run(images, maps)
    assert len(maps) == len(expected)
    layer = model.feature_fusion.depthwise
    if layer.conv.groups == 1:  # done before the resizing, with which it commutes
        with torch.inference_mode():
            expected[-2] = layer.bn(layer.conv(expected[-2]))
    for stage, got, want in zip(stages, maps, expected):
        assert not got[:, want.shape[1] :].any()
        error = (got[:, : want.shape[1]] - want).abs().max() / want.abs().max()
        most = (0.01 if variant == "paper" else 0.02) if half else 2e-5
        assert error < most, type(stage).__name__


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, None])
def test_labels_are_the_networks_when_sizes_change(precision):
    model = network()
    segment = accelerate(model, precision=precision)
    for shape in ((1, 64, 96), (2, 97, 131), (1, 64, 96), (1, 40, 40)):
        images = images_of(*shape)
        labels = segment(images)
        expected = ops_ext.upsample_argmax_reference(scores_of(model, images), shape[1:])
        assert (labels == expected).float().mean() > (0.999 if precision == torch.float32 else 0.97)


def test_threads_may_call_at_once_and_in_any_number():
    model, images = network(), [images_of(1, 64 + 8 * k, 96) for k in range(4)]
    segment = accelerate(model, precision=torch.float32)
    expected = [segment(each) for each in images]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(segment, images), expected))
    torch.set_num_threads(3)
    results = [segment(each) for each in images]
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_a_network_put_together_otherwise_is_noticed_and_runs_as_it_is():
    class Other(FastSCNN):
        def forward(self, x, upsample=True):
            return super().forward(x.flip(1), upsample)

    torch.manual_seed(0)
    model = Other(5).eval()
    images = images_of(1, 64, 96)
    labels = accelerate(model, precision=torch.float32)(images)
    expected = ops_ext.upsample_argmax_reference(scores_of(model, images), (64, 96))
    assert (labels == expected).float().mean() > 0.999


def test_any_other_network_runs_in_pytorch():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 8)

        def forward(self, x, upsample=True):
            return self.conv(x)

    segment = accelerate(Tiny(), precision=torch.float32)
    assert segment(images_of(1, 64, 96)).shape == (1, 64, 96) and segment.precision == "fp32"


@pytest.mark.parametrize("shape", [(1, 20, 20, 4), (1, 20, 20), (0, 32, 32, 3)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, 3\), not empty"):
        accelerate(network())(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_an_image_that_is_too_small_is_refused(precision):
    with pytest.raises(ValueError, match=r"31.*expected at least 32"):
        accelerate(network(), precision=precision)(images_of(1, 64, 31))


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"precision is torch.int8, expected float32, bfloat16, float16 or None"):
        accelerate(network(), precision=torch.int8)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_in_the_kernels(variant, precision):
    if precision == torch.bfloat16 and not torch.ops.ops_ext.has_bfloat16():
        pytest.skip("no AVX512-BF16 on this CPU")
    model, images = network(variant=variant), images_of(1, 98, 131)
    segment = accelerate(model, precision=precision)
    assert "bottlenecks" in segment.stages_ms(images, 1)
    expected = ops_ext.upsample_argmax_reference(scores_of(model, images), (98, 131), model.align_corners)
    assert (segment(images) == expected).float().mean() > (0.999 if precision == torch.float32 else 0.97)


@pytest.mark.parametrize("half", [False, True])
def test_relu6_has_its_ceiling(half):
    if half and not torch.ops.ops_ext.has_bfloat16():
        pytest.skip("no AVX512-BF16 on this CPU")
    # Activations of random weights seldom reach 6: scaled up, most of them do.
    model, images = network(variant="segmentron"), images_of(1, 97, 131)
    for block in model.global_feature_extractor.bottleneck1:
        for layer in (block.expand, block.depthwise):
            layer.bn.weight.data *= 20
    with torch.inference_mode():
        scores = FusedFastSCNN(model, MEAN, STD, half).logits(images)
    expected = scores_of(model, images)
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.max_val = 1e9
    assert (scores_of(model, images) - expected).norm() > 0.05 * expected.norm()  # else this shows nothing
    assert (scores - expected).norm() < (0.02 if half else 1e-4) * expected.norm()


def test_folded_batch_normalisation_changes_nothing():
    model, images = network(), images_of(2, 97, 131)
    expected = scores_of(model, images)
    ops_ext.fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (scores_of(model, images) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_layers_beside_each_other_that_do_not_follow_each_other_stay_apart():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 8, 8), nn.BatchNorm2d(3)

        def forward(self, x, upsample=True):
            return self.conv(self.bn(x))

    torch.manual_seed(0)
    model, images = Sneaky(), images_of(1, 64, 96)
    nn.init.uniform_(model.bn.running_mean, -2, 2)
    model.eval()
    for precision, least in ((torch.float32, 0.999), (torch.bfloat16, 0.9)):
        labels = accelerate(model, precision=precision)(images)
        expected = ops_ext.upsample_argmax_reference(scores_of(copy.deepcopy(model), images), (64, 96))
        assert (labels == expected).float().mean() > least


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.BatchNorm2d(4),
    ],
)
@pytest.mark.parametrize("change", [lambda conv: conv, nn.utils.parametrizations.weight_norm])
def test_what_cannot_be_folded_runs_all_the_same(norm, change):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = change(nn.Conv2d(3, 4, 8, 8)), norm()

        def forward(self, x, upsample=True):
            assert x.shape[2] % 32 == 0
            return self.bn(self.conv(x))

    model, images = Odd().eval(), images_of(1, 96, 128)
    labels = accelerate(model, precision=torch.float32)(images)
    expected = ops_ext.upsample_argmax_reference(scores_of(model, images), (96, 128))
    assert (labels == expected).float().mean() > 0.999


def test_mean_and_deviation_may_be_whole_numbers():
    model, images = network(), images_of(1, 64, 96)
    whole, decimal = (accelerate(model, precision=torch.float32, mean=mean, std=std)
                      for mean, std in (((0, 0, 0), (1, 1, 1)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))  # fmt: skip
    assert torch.equal(whole(images), decimal(images)) and len(whole.stages_ms(images, 1)) > 1


def test_bfloat16_without_tiles(tmp_path):
    # As on AMD's CPUs. A kernel that refuses the tiles, played by a library loaded before libc.
    if not torch.ops.ops_ext.has_bfloat16() or not torch.cpu.get_capabilities().get("amx_bf16"):
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
import torch, ops_ext, test_fused
assert not torch.ops.ops_ext.has_fast_bfloat16() if ops_ext.implementations("cpu") else False
for half in (False, True):
    for shape in ((1, 64, 96), (2, 97, 131)):
        test_fused.test_every_stage_is_the_networks(shape, half, "paper")
        test_fused.test_every_stage_is_the_networks(shape, half, "segmentron")
print("fine")
"""
    folders = os.pathsep.join(str(Path(__file__).parent / each) for each in ("..", "."))
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "refuse.so"), "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_recorded_graphs_give_the_networks_labels_whatever_comes_between():
    model = network()
    segment = accelerate(model, device="cuda", precision=torch.float32)
    for seed in range(3):
        for height in (64, 97, 64, 160, 64):
            images = torch.randint(0, 256, (1, height, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            expected = ops_ext.upsample_argmax_reference(scores_of(model, images), (height, 96))
            assert (segment(images).cpu() == expected).float().mean() > 0.995


def arguments_of(op: str) -> list:
    """Arguments of an operator that fit, of 32 channels and 16 hidden ones."""
    m = torch.zeros(1, 32, 6, 7).contiguous(memory_format=torch.channels_last)
    v16, v32 = torch.zeros(16), torch.zeros(32)
    nine, square = torch.zeros(9, 32), torch.zeros(32, 32)
    separable, twice = [nine, v32, square, v32], m.repeat(1, 2, 1, 1)
    hidden = [torch.zeros(32, 16), v16, torch.zeros(9, 16), v16, torch.zeros(16, 32), v32]
    pyramid = [torch.zeros(256, 16), torch.zeros(64), torch.zeros(64, 32), torch.zeros(64, 32), v32]
    return {
        "stem_block": [
            images_of(1, 48, 56),
            torch.zeros(3),
            torch.zeros(27, 32),
            v32,
            *separable,
            *separable,
            1,
            False,
            m.clone(),
        ],
        "bottleneck_block": [m, *hidden, 1, True, False, m.clone()],
        "pyramid_block": [twice.contiguous(memory_format=torch.channels_last), *pyramid, False, m.clone()],
        "head_block": [
            m,
            m[:, :, :2, :2],
            nine,
            v32,
            square.repeat(2, 1),
            v32,
            4,
            *separable,
            *separable,
            square,
            v32,
            False,
            False,
            m.clone(),
        ],
    }[op]


@pytest.mark.parametrize("op", ["stem_block", "bottleneck_block", "pyramid_block", "head_block"])
def test_the_raw_operators_refuse_what_would_leave_memory(op):
    operator, arguments = getattr(torch.ops.ops_ext, op), arguments_of(op)
    operator(*arguments)
    for position, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor):
            continue
        wrong = [argument.double(), argument.repeat(*[2] * argument.ndim), argument[..., :-1]]
        for each in wrong[:1] if (op, position) == ("head_block", 1) else wrong:  # the context may have any size
            with pytest.raises(RuntimeError, match="expected"):
                operator(*arguments[:position], each, *arguments[position + 1 :])


def test_the_sanitizers_find_nothing():
    from test_kernels import SANITIZERS, build_for_tests, run_sanitized

    code = """
import sys, torch, ops_ext
torch.ops.load_library(sys.argv[1])
from ops_ext.fused import FusedFastSCNN
from test_fused import MEAN, STD, images_of, network
for threads in (1, 2):
    torch.set_num_threads(threads)
    for half in {False, bool(torch.ops.ops_ext.has_bfloat16())}:
        with torch.inference_mode():
            for variant in ("paper", "segmentron"):
                fused = FusedFastSCNN(network(variant=variant), MEAN, STD, half)
                for shape in ((1, 32, 32), (2, 97, 131), (1, 33, 400)):
                    assert fused(images_of(*shape)).shape == shape
print("clean")
"""
    done = run_sanitized(code, build_for_tests("cpu", *SANITIZERS))
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[max(done.stderr.find("ERROR"), 0) :][:3000]


def test_the_raw_operators_refuse_an_absurd_stride_or_padding():
    arguments = arguments_of("bottleneck_block")
    for stride in (0, -1, 3, 2**62):
        with pytest.raises(RuntimeError, match="stride is"):
            torch.ops.ops_ext.bottleneck_block(*arguments[:7], stride, False, False, arguments[-1])
    for padding in (-1, 2, 2**62):
        arguments = arguments_of("stem_block")
        with pytest.raises(RuntimeError, match="padding is"):
            torch.ops.ops_ext.stem_block(*arguments[:-3], padding, False, arguments[-1])
