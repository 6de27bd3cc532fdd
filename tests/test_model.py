"""The network is the paper's, takes any size, and its checkpoints are read safely."""

import math
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F

from model import CheckpointError, DSConv, FastSCNN, FeatureFusion, PyramidPooling, load_weights, read_checkpoint
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


def test_wrong_channels_and_variant_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\), expected \(N, 3, H, W\)"):
        FastSCNN(19)(torch.randn(1, 1, 64, 64))
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
    layer = FeatureFusion().double().train().depthwise
    x = torch.randn(2, 128, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    got, expected = layer(x), torch.nn.Sequential(*layer.children())(x)
    torch.testing.assert_close(got, expected)
    direction, inputs = torch.randn_like(expected), [x, layer.conv.weight]
    for mine, plain in zip(*(torch.autograd.grad(output, inputs, direction) for output in (got, expected))):
        torch.testing.assert_close(mine, plain)


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


def test_exports_with_dynamic_size_and_batch():
    model, dim = FastSCNN(4).eval(), torch.export.Dim
    sizes = {0: dim("n", min=1), 2: dim("h", min=33), 3: dim("w", min=33)}
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes={"x": sizes})
    for shape in ((1, 3, 64, 64), (3, 3, 75, 101)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), model(x))


def save_checkpoint(path, **changes):
    model = FastSCNN(3)
    torch.save({"model": model.state_dict(), "model_args": model.args, **changes}, path)
    return model


def test_checkpoint_rebuilds_the_network(tmp_path):
    model = save_checkpoint(tmp_path / "a.pth").eval()
    loaded, x = load_weights(tmp_path / "a.pth", num_classes=3), torch.randn(1, 3, 64, 64)
    assert not loaded.training
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_checkpoint_of_another_class_count_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: has 3 classes, expected 19"):
        load_weights(tmp_path / "a.pth", num_classes=19)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth", model_args=FastSCNN(4).args)
    with pytest.raises(CheckpointError, match="a.pth: does not fit this network"):
        load_weights(tmp_path / "a.pth")
    save_checkpoint(tmp_path / "b.pth", model_args={"colour": "red"})
    with pytest.raises(CheckpointError, match="b.pth: does not fit this network"):
        load_weights(tmp_path / "b.pth")


def test_a_checkpoint_with_one_wrong_bit_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    numbers = load_weights(tmp_path / "a.pth").state_dict()["classifier.conv.weight"].numpy().tobytes()
    content[content.index(numbers) + 5] ^= 16
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.pth: damaged, .*wrong checksum"):
        load_weights(tmp_path / "a.pth")


def test_truncated_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    for length in (0, 1, 10, 100, 1000, 5000, 20000, 65536, len(content) // 2, len(content) - 1000, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut.pth: damaged, truncated or no checkpoint"):
            load_weights(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), pickle.dumps([1, 2], 2), b"a: 1", b".", b"e"],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pth: "):
        load_weights(tmp_path / "x.pth")


def test_checkpoint_of_something_else_names_what_it_holds(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds weight, expected the entries model and model_args"):
        load_weights(tmp_path / "x.pth")


def test_missing_checkpoint_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth: no such checkpoint"):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_weights(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model": Bomb(str(tmp_path / "harm")), "model_args": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth"):
        load_weights(tmp_path / "x.pth")
    assert not (tmp_path / "harm").exists()


def test_checksums_are_compared_before_anything_is_unpickled(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(b"model_args")] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_args, **_options: pytest.fail("was unpickled"))
    with pytest.raises(CheckpointError, match="a.pth: damaged, .*wrong checksum of .*data.pkl"):
        read_checkpoint(tmp_path / "a.pth")


def test_compressed_and_doubled_entries_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"b.pth: is compressed, which torch.save never does"):
        read_checkpoint(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(iter(entries)), b"another")
    with pytest.raises(CheckpointError, match=r"a.pth: damaged, .*two entries of one name"):
        read_checkpoint(tmp_path / "a.pth")


def test_an_own_checkpoint_in_the_old_format_is_refused(tmp_path):
    model = FastSCNN(3)
    content = {"model": model.state_dict(), "model_args": model.args}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a.pth: is in torch's old format, which has no checksums"):
        read_checkpoint(tmp_path / "a.pth")


def test_checkpoints_that_are_no_regular_file_are_named_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match=f"{path}: is no regular file"):
            read_checkpoint(path)


CLASSES = {"names": ["a", "b", "c"], "colours": [[0, 0, 0]] * 3, "categories": []}
STATE = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": []}
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
TRAINING = {
    "classes": CLASSES,
    "epoch": 3,
    "optimizer": STATE,
    "scaler": SCALER,
    "best_miou": -1.0,
    "validated": False,
    "args": {"data": "x", "epochs": 3, "amp": "off"},
    "steps": 5,
    "steps_per_epoch": 7,
    "world_size": 2,
    "tally": {"loss_sums": torch.zeros(2), "steps": 5, "skipped": torch.zeros(4, dtype=torch.int64)},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": []},
        {"model": {"x": 1}},
        {"model": {1: torch.zeros(1)}},
        {"model_args": None},
        {"model_args": {"num_classes": 3.0}},
        {"model_args": {"num_classes": True}},
        {"model_args": {"num_classes": 10**12}},
        {"model_args": {"num_classes": -1}},
        {"model_args": {"num_classes": 3, "variant": ["paper"]}},
        {"model_args": {"num_classes": 3, "dropout": "0.1"}},
        {"model_args": {"num_classes": 3, "aux": "no"}},
        {"classes": None},
        {"classes": ["a", "b", "c"]},
        {"classes": {**CLASSES, "names": "abc"}},
        {"classes": {**CLASSES, "names": ["a", "b"]}},
        {"classes": {"names": ["a", "b"], "colours": [[0, 0, 0]] * 2, "categories": []}},
        {"classes": {**CLASSES, "names": ["a", "b", 3]}},
        {"classes": {**CLASSES, "colours": [[0, 0]] * 3}},
        {"classes": {**CLASSES, "colours": [[0, 0, 300]] * 3}},
        {"classes": {**CLASSES, "colours": [[0, 0, math.nan]] * 3}},
        {"classes": {**CLASSES, "categories": ["a"]}},
        {"classes": {"names": ["a", "b", "c"]}},
        {"epoch": "3"},
        {"epoch": math.inf},
        {"epoch": -1},
        {"epoch": True},
        {"optimizer": None},
        {"optimizer": {"state": [], "param_groups": []}},
        {"optimizer": {"state": {"0": {}}, "param_groups": []}},
        {"optimizer": {"state": {0: {"momentum_buffer": torch.tensor([math.nan])}}, "param_groups": []}},
        {"scaler": 1},
        {"scaler": {"scale": 1.0}},
        {"scaler": {**SCALER, "scale": math.nan}},
        {"best_miou": None},
        {"best_miou": math.nan},
        {"validated": 1},
        {"args": None},
        {"args": {"epochs": 3}},
        {"args": {"data": "x", "epochs": "3"}},
        {"args": {"data": "x", "epochs": 0}},
        {"args": {"data": "x", "epochs": 3, "amp": []}},
        {"steps": -1},
        {"steps": 1.5},
        {"steps_per_epoch": 0},
        {"world_size": 0},
        {"tally": 1},
        {"tally": {"loss_sums": torch.zeros(2), "steps": 5, "skipped": torch.zeros(4)}},
        {"tally": {"loss_sums": [0.0], "steps": 5, "skipped": torch.zeros(4, dtype=torch.int64)}},
        {"trained": {}},
        {"trained": 3},
    ],
)
def test_entries_of_wrong_types_are_refused_in_one_line(tmp_path, changes):
    save_checkpoint(tmp_path / "a.pth", **TRAINING)
    assert read_checkpoint(tmp_path / "a.pth")["epoch"] == 3
    save_checkpoint(tmp_path / "a.pth", **{**TRAINING, **changes})
    with pytest.raises(CheckpointError, match=r"a.pth: ") as caught:
        load_weights(tmp_path / "a.pth")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("classifier.conv.bias", torch.tensor([0, math.nan, 0]), "no finite numbers"),
        ("classifier.conv.bias", torch.tensor([0, math.inf, 0]), "no finite numbers"),
        (
            "classifier.conv.bias",
            torch.tensor([0, 1e300, 0], dtype=torch.float64),
            "no finite numbers",
        ),  # infinite in float32
        ("classifier.conv.bias", torch.zeros(3, dtype=torch.int64), "does not fit"),
        ("classifier.conv.bias", torch.zeros(3, dtype=torch.complex64), "no dense tensor"),
        ("classifier.conv.bias", torch.zeros(3, dtype=torch.bool), "no dense tensor"),
        ("classifier.conv.bias", torch.zeros(3).to_sparse(), "no dense tensor"),
        ("classifier.conv.bias", torch.zeros(3, device="meta"), "no dense tensor"),
        ("classifier.conv.bias", torch.zeros(1).expand(2**40), "no dense tensor"),  # 4 TiB out of 4 bytes
        ("classifier.conv.bias", torch.zeros(()), "does not fit"),
        ("learning_to_downsample.conv.bn.running_var", torch.full((32,), -1.0), "below 0"),
        ("one.more", torch.zeros(1), "does not fit"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path, name, tensor, message):
    model = FastSCNN(3)
    torch.save({"model": {**model.state_dict(), name: tensor}, "model_args": model.args}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a.pth: .*{message}"):
        load_weights(tmp_path / "a.pth")


def test_weights_of_others_that_are_no_finite_numbers_are_refused(tmp_path):
    torch.save({"state_dict": {"weight": torch.tensor([math.nan])}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: it holds weight with values that are no finite numbers"):
        load_weights(tmp_path / "x.pth")
