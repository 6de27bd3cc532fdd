"""The network is the paper's, takes any size, and its checkpoints are read safely."""

import math
import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

from model import (
    CheckpointError,
    DSConv,
    FastSCNN,
    FeatureFusion,
    PyramidPooling,
    load_weights,
    read_checkpoint,
    undilated,
)
from train import keep_freed_memory


def test_parameter_count_is_that_of_the_tables():
    def conv(c_in, c_out, k=1, groups=1):
        return c_in // groups * c_out * k * k + 2 * c_out  # no bias; scale and shift of the batch normalisation

    def dsconv(c_in, c_out):
        return conv(c_in, c_in, 3, c_in) + conv(c_in, c_out)

    def bottleneck(c_in, c_out, t=6):
        return conv(c_in, t * c_in) + conv(t * c_in, t * c_in, 3, t * c_in) + conv(t * c_in, c_out)

    down = conv(3, 32, 3) + dsconv(32, 48) + dsconv(48, 64)
    blocks = [(64, 64), (64, 64), (64, 64), (64, 96), (96, 96), (96, 96), (96, 128), (128, 128), (128, 128)]
    features = sum(bottleneck(*b) for b in blocks) + 4 * conv(128, 32) + conv(256, 128)
    fusion = conv(128, 128, 3, 128) + conv(128, 128) + conv(64, 128)
    classifier = 2 * dsconv(128, 128) + 128 * 19 + 19
    expected = down + features + fusion + classifier
    assert expected == 1_137_795
    assert sum(p.numel() for p in FastSCNN(19).parameters()) == expected


def test_stages_have_the_shapes_of_table_1():
    with torch.device("meta"):
        model, x = FastSCNN(19).eval(), torch.empty(1, 3, 1024, 2048)
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    model(x, upsample=False)
    assert shapes["learning_to_downsample.conv"] == (32, 512, 1024)
    assert shapes["learning_to_downsample.dsconv1"] == (48, 256, 512)
    assert shapes["learning_to_downsample.dsconv2"] == (64, 128, 256)
    assert shapes["global_feature_extractor.bottleneck1"] == (64, 64, 128)
    assert shapes["global_feature_extractor.bottleneck2"] == (96, 32, 64)
    assert shapes["global_feature_extractor.bottleneck3"] == (128, 32, 64)
    assert shapes["global_feature_extractor.pyramid_pooling"] == (128, 32, 64)
    assert shapes["feature_fusion"] == (128, 128, 256)
    assert shapes["classifier"] == (19, 128, 256)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 65), (360, 480), (1024, 2048), (1025, 2049)])
def test_any_size_from_32_pixels_runs(height, width):
    model = FastSCNN(19).eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, height, width)
        assert model(x).shape == (1, 19, height, width)
        assert model(x, upsample=False).shape == (1, 19, math.ceil(height / 8), math.ceil(width / 8))


@pytest.mark.parametrize("height, width", [(31, 64), (64, 31)])
def test_31_pixels_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} pixels, expected at least 32x32"):
        FastSCNN(19)(torch.randn(1, 3, height, width))


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant is 'fancy', expected one of paper"):
        FastSCNN(19, variant="fancy")


def test_training_gives_the_auxiliary_outputs_and_evaluation_does_not():
    model = FastSCNN(5, aux=True)
    x = torch.randn(2, 3, 65, 97)
    assert [tuple(y.shape) for y in model(x)] == [(2, 5, 65, 97)] * 3
    assert [tuple(y.shape[2:]) for y in model(x, upsample=False)] == [(9, 13), (9, 13), (3, 4)]
    assert model.eval()(x).shape == (2, 5, 65, 97)
    assert FastSCNN(5).train()(x).shape == (2, 5, 65, 97)


def test_upsampled_scores_are_the_bilinear_resize_of_the_others():
    model, x = FastSCNN(7).eval(), torch.randn(2, 3, 70, 90)
    expected = F.interpolate(model(x, upsample=False), (70, 90), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (3, 3), (7, 11), (12, 15), (32, 64), (33, 65)])
def test_pyramid_equals_adaptive_average_pooling(height, width):
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    for n, pooled in zip((1, 2, 3, 6), PyramidPooling(8, 8).pool(x)):
        torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(x, n), rtol=0, atol=1e-14)


def test_no_non_linearity_between_depthwise_and_pointwise():
    torch.manual_seed(0)
    block = DSConv(8, 8).eval()
    x = torch.randn(1, 8, 16, 16)
    between = block.depthwise(x)
    assert between.min() < 0 < between.max()
    torch.testing.assert_close(block.depthwise(-x), -between)  # linear
    assert block(x).min() >= 0


@pytest.mark.parametrize("size", [(9, 12), (45, 60), (5, 7), (4, 8)])
def test_the_dilated_kernel_in_training_is_the_plain_convolution(size):
    torch.manual_seed(0)
    layer = FeatureFusion().double().train().depthwise.conv
    x = torch.randn(2, 128, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    got, expected = undilated(layer, x), F.conv2d(x, layer.weight, padding=4, dilation=4, groups=128)
    torch.testing.assert_close(got, expected)
    direction, inputs = torch.randn_like(expected), [x, layer.weight]
    for mine, plain in zip(*(torch.autograd.grad(output, inputs, direction) for output in (got, expected))):
        torch.testing.assert_close(mine, plain)


def test_mixed_precision_on_the_cpu_runs_a_depthwise_kernel_with_a_stride_in_float32():
    torch.manual_seed(0)
    layer = DSConv(32, 48, stride=2).train().depthwise
    x = torch.randn(2, 32, 90, 121).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    layer.conv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert seen[0].dtype == torch.float32
    assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
    rounded = F.conv2d(x.float(), layer.conv.weight, stride=2, padding=1, groups=32).bfloat16()
    torch.testing.assert_close(got, F.batch_norm(rounded, None, None, training=True), rtol=0.02, atol=1e-3)


def test_compilers_get_the_plain_dilated_convolution():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(FeatureFusion().train(), backend=backend)(torch.randn(1, 64, 9, 12), torch.randn(1, 128, 3, 3))
    assert len(graphs) == 1 and "(4, 4)" in graphs[0] and "unflatten" not in graphs[0]


def test_mixed_precision_gradients_on_the_cpu_are_those_of_float32():
    # oneDNN's own bfloat16 gradient of the dilated depthwise kernel reads memory that it never wrote.
    keep_freed_memory()
    torch.manual_seed(0)
    fusion, context = FeatureFusion(), torch.randn(6, 128, 9, 12).contiguous(memory_format=torch.channels_last)
    detail = torch.randn(6, 64, 34, 46).contiguous(memory_format=torch.channels_last)
    gradients = []
    for enabled in (False, True, True, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = fusion(detail, context).float()
        leftovers = [
            torch.full((n,), math.nan) for n in (100, 1000, 4000, 10**4, 10**5, 10**6, 10**7) for _ in range(6)
        ]
        del leftovers
        gradients += torch.autograd.grad((output * torch.linspace(-1, 1, 46)).sum(), fusion.depthwise.conv.weight)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 0.1 * gradients[0].norm()


def save_checkpoint(path, **changes):
    model = FastSCNN(3)
    torch.save({"model": model.state_dict(), "model_args": model.args, **changes}, path)
    return model


def refused(path, message):
    """Asserts that the file is refused in one line that names it and says `message`."""
    with pytest.raises(CheckpointError, match=re.escape(path.name) + ".*" + message) as caught:
        load_weights(path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 800


def test_checkpoint_rebuilds_the_network(tmp_path):
    model = save_checkpoint(tmp_path / "a.pth", epoch=3).eval()
    loaded, x = load_weights(tmp_path / "a.pth", num_classes=3), torch.randn(1, 3, 64, 64)
    assert not loaded.training and read_checkpoint(tmp_path / "a.pth")["epoch"] == 3
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_checkpoint_of_another_class_count_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: has 3 classes, expected 19"):
        load_weights(tmp_path / "a.pth", num_classes=19)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    for changes, message in (
        ({"model_args": FastSCNN(4).args}, "does not fit .*size mismatch for classifier.conv.weight"),
        ({"model_args": {"colour": "red"}}, "does not fit .*unexpected keyword argument 'colour'"),
        ({"model_args": {"num_classes": 3, "variant": "fancy"}}, "variant is 'fancy', expected one of paper"),
        ({"model_args": None}, "does not fit the network of None"),
        ({"model": {}}, 'Missing key.*"learning_to_downsample.conv.conv.weight", ("[^"]*", ){4}\\.\\.\\.'),
        ({"model": {"x": 1}}, "does not fit"),
        ({"model": [1]}, "holds no state dict"),
    ):
        save_checkpoint(tmp_path / "a.pth", **changes)
        refused(tmp_path / "a.pth", message)


def test_values_that_are_not_finite_are_refused(tmp_path):
    for value in (math.nan, math.inf):
        state = {**FastSCNN(3).state_dict(), "classifier.conv.bias": torch.tensor([0, value, 0])}
        save_checkpoint(tmp_path / "a.pth", model=state)
        refused(tmp_path / "a.pth", "classifier.conv.bias has values that are not finite")
        torch.save({"state_dict": state}, tmp_path / "b.pth")
        refused(tmp_path / "b.pth", "classifier.conv.bias has values that are not finite")


def test_a_checkpoint_with_one_wrong_bit_is_refused(tmp_path):
    model = save_checkpoint(tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    weight = model.state_dict()["classifier.conv.weight"].numpy().tobytes()
    for place in (content.index(weight) + 5, content.index(b"model_args")):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "a.pth").write_bytes(damaged)
        refused(tmp_path / "a.pth", "damaged, truncated or not a checkpoint .wrong checksum of")


def test_truncated_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    for length in (0, 1, 10, 100, 1000, 5000, 20000, 65536, len(content) // 2, len(content) - 1000, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        refused(tmp_path / "cut.pth", "damaged, truncated or not a checkpoint")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    for content in (
        b"text",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        bytes(1000),
        pickle.dumps([1, 2], 2),
        b"a: 1",
        b".",
        b"e",
    ):
        (tmp_path / "x.pth").write_bytes(content)
        refused(tmp_path / "x.pth", "")


def test_checkpoint_of_something_else_names_what_it_holds(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds tensors weight, expected a file of train.py or weights of paper, tramac")
    torch.save(FastSCNN(3), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds a _ForeignObject; save the network's state dict instead")


def test_missing_checkpoint_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: no such checkpoint"):
            load_weights(path)


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_file_cannot_run_code(tmp_path):
    harm = tmp_path / "harm"
    shell, python = Call(os.system, f"touch {harm}"), Call(eval, f"open({str(harm)!r}, 'w')")
    save_checkpoint(tmp_path / "a.pth", model=shell)
    refused(tmp_path / "a.pth", "damaged, truncated or not a checkpoint .*posix.system whose module posix is blocked")
    save_checkpoint(tmp_path / "a.pth", model=python)
    refused(tmp_path / "a.pth", "holds no state dict")
    save_checkpoint(tmp_path / "a.pth", model_args=python)
    refused(tmp_path / "a.pth", "does not fit")
    for call in (shell, python):  # as torch wrote files before 1.6
        (tmp_path / "old.pth").write_bytes(pickle.dumps({"state_dict": call}, 2))
        refused(tmp_path / "old.pth", "damaged, truncated or not a checkpoint .*GLOBAL")
    save_checkpoint(tmp_path / "a.pth", note=python)  # beside the weights it has no effect
    assert load_weights(tmp_path / "a.pth") and not harm.exists()
