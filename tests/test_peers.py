"""Weights of other projects: each parameter lands where it belongs, and what does not fit is refused by name.

The peers' networks are stated here once more, as functions of their own state dicts, and know nothing of model.py.
"""

import argparse
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import ops_ext
import train
from conftest import last_json
from model import VARIANTS, CheckpointError, FastSCNN, load_weights, save_for_peer

PEERS = ("tramac", "segmentron", "mmseg", "mmseg-old")
CLASSES = 7


class Peer:
    """A peer's forward pass, and the names and shapes of its parameters as a side effect of running it."""

    def __init__(self, name, state=None):
        self.name, self.state, self.seed = name, {} if state is None else state, torch.Generator().manual_seed(0)
        self.making = state is None
        self.old = name in (
            "tramac",
            "segmentron",
        )  # align_corners, and a bias before batch normalisation in the fusion
        self.relu6 = name in ("segmentron", "mmseg-old")

    def tensor(self, key, *shape, low=-1.0, high=1.0):
        if self.making:
            self.state[key] = torch.rand(shape, generator=self.seed) * (high - low) + low
        assert self.state[key].shape == shape, key
        return self.state[key].double()

    def conv(self, x, key, out, kernel=1, stride=1, padding=0, groups=1, bias=False):
        reach = (3 * groups / (x.shape[1] * kernel**2)) ** 0.5
        weight = self.tensor(f"{key}.weight", out, x.shape[1] // groups, kernel, kernel, low=-reach, high=reach)
        return F.conv2d(x, weight, self.tensor(f"{key}.bias", out) if bias else None, stride, padding, groups=groups)

    def bn(self, x, key):
        c = x.shape[1]
        weight, bias = self.tensor(f"{key}.weight", c, low=0.5, high=1.5), self.tensor(f"{key}.bias", c)
        mean, var = self.tensor(f"{key}.running_mean", c), self.tensor(f"{key}.running_var", c, low=0.5, high=2.0)
        if self.making:
            self.state[f"{key}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, var, weight, bias)

    def resize(self, x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=self.old)

    def dsconv(self, x, prefix, out, stride):
        dw, dw_bn, pw, pw_bn = {
            "tramac": ("conv.0", "conv.1", "conv.3", "conv.4"),
            "segmentron": ("block.depthwise", "block.bn_depth", "block.pointwise", "block.bn_point"),
        }.get(self.name, ("depthwise_conv.conv", "depthwise_conv.bn", "pointwise_conv.conv", "pointwise_conv.bn"))
        x = self.bn(self.conv(x, f"{prefix}.{dw}", x.shape[1], 3, stride, 1, x.shape[1]), f"{prefix}.{dw_bn}")
        if self.name != "mmseg":
            x = F.relu(x)
        return F.relu(self.bn(self.conv(x, f"{prefix}.{pw}", out), f"{prefix}.{pw_bn}"))

    def bottleneck(self, x, prefix, out, stride):
        act = F.relu6 if self.relu6 else F.relu
        names = {
            "tramac": ("block.0.conv.0", "block.0.conv.1", "block.1.conv.0", "block.1.conv.1", "block.2", "block.3"),
            "segmentron": ("conv.0.conv", "conv.0.bn", "conv.1.conv", "conv.1.bn", "conv.2", "conv.3"),
        }.get(self.name, ("conv.0.conv", "conv.0.bn", "conv.1.conv", "conv.1.bn", "conv.2.conv", "conv.2.bn"))
        a, a_bn, b, b_bn, c, c_bn = (f"{prefix}.{name}" for name in names)
        y = act(self.bn(self.conv(x, a, x.shape[1] * 6), a_bn))
        y = act(self.bn(self.conv(y, b, y.shape[1], 3, stride, 1, y.shape[1]), b_bn))
        y = self.bn(self.conv(y, c, out), c_bn)
        return x + y if stride == 1 and x.shape[1] == out else y

    def pair(self, x, key, conv, bn, *shape, act=True, **options):
        x = self.bn(self.conv(x, f"{key}.{conv}", *shape, **options), f"{key}.{bn}")
        return F.relu(x) if act else x

    def aux(self, x, key):
        if self.name.startswith("mmseg"):
            return self.conv(
                self.pair(x, f"{key}.convs.0", "conv", "bn", 32, 3, padding=1), f"{key}.conv_seg", CLASSES, bias=True
            )
        return self.conv(self.pair(x, key, "0", "1", 32, 3, padding=1), f"{key}.4", CLASSES, bias=True)

    def __call__(self, image):
        m = self.name.startswith("mmseg")
        back = "backbone." if m else ""
        conv, bn = ("conv.0", "conv.1") if self.name == "tramac" else ("conv", "bn")
        x = self.pair(
            image, f"{back}learning_to_downsample.conv", conv, bn, 32, 3, stride=2, padding=int(self.name == "mmseg")
        )
        x = self.dsconv(x, f"{back}learning_to_downsample.dsconv1", 48, 2)
        detail = x = self.dsconv(x, f"{back}learning_to_downsample.dsconv2", 64, 2)
        for b, (channels, stride) in enumerate(((64, 2), (96, 2), (128, 1)), 1):
            for i in range(3):
                x = self.bottleneck(
                    x, f"{back}global_feature_extractor.bottleneck{b}.{i}", channels, stride if i == 0 else 1
                )
        levels = [x]
        for k, bins in enumerate((1, 2, 3, 6)):
            key = {"tramac": f"conv{k + 1}", "segmentron": f"convs.{k}"}.get(self.name, f"{k}.1")
            pooled = self.pair(
                F.adaptive_avg_pool2d(x, bins), f"{back}global_feature_extractor.ppm.{key}", conv, bn, 32
            )
            levels.append(self.resize(pooled, x))
        key = "global_feature_extractor.ppm.out" if self.name == "tramac" else f"{back}global_feature_extractor.out"
        kernel = 3 if self.name == "mmseg" else 1
        context = x = self.pair(torch.cat(levels, 1), key, conv, bn, 128, kernel, padding=kernel // 2)
        x, key = self.resize(x, detail), f"{back}feature_fusion"
        depthwise = {"kernel": 3, "padding": 1, "groups": 128} if self.name in ("tramac", "mmseg") else {}
        x = self.pair(x, f"{key}.dwconv", conv, bn, 128, **depthwise)
        conv, bn = ("conv", "bn") if m else ("0", "1")
        low = self.pair(x, f"{key}.conv_lower_res", conv, bn, 128, bias=self.old, act=False)
        x = F.relu(low + self.pair(detail, f"{key}.conv_higher_res", conv, bn, 128, bias=self.old, act=False))
        for n in (0, 1):
            x = self.dsconv(x, f"decode_head.convs.{n}" if m else f"classifier.dsconv{n + 1}", 128, 1)
        main = self.conv(x, "decode_head.conv_seg" if m else "classifier.conv.1", CLASSES, bias=True)
        heads = {"tramac": (("auxlayer", detail),), "segmentron": (("auxlayer1", detail), ("auxlayer2", context))}
        heads = heads.get(self.name, (("auxiliary_head.1", detail), ("auxiliary_head.0", context)))
        return [self.resize(each, image) for each in (main, *(self.aux(features, key) for key, features in heads))]


def state_of(name):
    """The state dict of a peer's network, with random weights and statistics."""
    made = Peer(name)
    made(torch.zeros(1, 3, 97, 97, dtype=torch.float64))
    return made.state


@pytest.fixture(scope="module", params=PEERS)
def peer(request):
    """Name and state dict of a peer's checkpoint."""
    return request.param, state_of(request.param)


def write(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("size", [(97, 129), (128, 192), (113, 161)])
def test_logits_are_the_peers(peer, size, tmp_path):
    name, state = peer
    model = load_weights(write(tmp_path / "theirs.pth", state), CLASSES)
    assert model.args == {"num_classes": CLASSES, "variant": name, "aux": True, "dropout": 0.1} and not model.training
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = model.double()
    with torch.no_grad():
        expected = Peer(name, state)(image)
        assert (model(image) - expected[0]).abs().max() < 1e-9 * expected[0].abs().max()
        # The auxiliary heads too, which show in training mode alone; dropout and batch normalisation as in evaluation.
        for module in model.children():
            module.eval()
        model.training = True
        for got, want in zip(model(image), expected, strict=True):
            assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_parameters_are_as_many_as_the_peers_say():
    counts = {"tramac": 1138051, "segmentron": 1153283, "mmseg-old": 1153027, "mmseg": 1399939}  # 19 classes, PEERS.md
    for name, count in counts.items():
        assert sum(p.numel() for p in FastSCNN(19, variant=name).parameters()) == count


def same_weights(path, expected, tolerance=0):
    """Asserts that a file gives a network of these weights, in their own precision."""
    loaded = load_weights(path).state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert loaded[key].dtype == tensor.dtype
        torch.testing.assert_close(loaded[key], tensor, rtol=tolerance, atol=tolerance)


def test_prefixes_wrappers_and_half_precision(peer, tmp_path):
    _, state = peer
    expected = load_weights(write(tmp_path / "a.pth", state)).state_dict()
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(32, 3, 3, 3)}}, "param_groups": []}
    prefixes = ("module.", "model.", "_orig_mod.", "module.module.")
    for prefix, wrapper in zip(prefixes, ("state_dict", "model", "net", "model_state_dict"), strict=True):
        prefixed = {f"{prefix}{key}": tensor for key, tensor in state.items()}
        content = {"epoch": torch.tensor(3), "optimizer": optimizer, wrapper: prefixed}
        same_weights(write(tmp_path / "a.pth", content), expected)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    same_weights(write(tmp_path / "a.pth", half), expected, tolerance=1e-3)


def test_own_state_dict_without_a_checkpoint_around_it(tmp_path):
    for aux in (False, True):
        state = FastSCNN(CLASSES, aux=aux).state_dict()
        same_weights(write(tmp_path / "a.pth", {f"module.{key}": tensor for key, tensor in state.items()}), state)


def test_files_without_auxiliary_heads_or_counters(peer, tmp_path):
    name, state = peer
    bare = {k: v for k, v in state.items() if not k.startswith("aux") and not k.endswith("num_batches_tracked")}
    model = load_weights(write(tmp_path / "a.pth", bare))
    assert model.args["aux"] is False
    image = torch.randn(1, 3, 129, 129, dtype=torch.float64)
    with torch.no_grad():
        expected = Peer(name, state)(image)[0]
        assert (model.double()(image) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_segmentron_of_2019_with_one_auxiliary_head(tmp_path):
    state = state_of("segmentron")
    first, second = "auxlayer1.", "auxlayer2."
    old = {k.replace(first, "auxlayer."): v for k, v in state.items() if not k.startswith(second)}
    model = load_weights(write(tmp_path / "a.pth", old), CLASSES)
    assert model.args == {"num_classes": CLASSES, "variant": "segmentron", "aux": False, "dropout": 0.1}
    bare = {k: v for k, v in state.items() if not k.startswith("auxlayer")}
    same_weights(write(tmp_path / "b.pth", bare), model.state_dict())


def test_training_files_of_mmsegmentation_1_run_no_foreign_code(tmp_path, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])

        def __setstate__(self, state):
            raise AssertionError("foreign code ran")

    module = types.ModuleType("mmengine.logging.history_buffer")
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    state = state_of("mmseg")
    content = {
        "meta": {
            "epoch": np.float64(3),
            "cfg": argparse.Namespace(lr=np.int64(1)),
            "dataset_meta": {"classes": ("a", "b")},
        },
        "state_dict": state,
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 7}},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": np.float32(0.1)}]},
    }
    with monkeypatch.context() as context:
        for name in ("mmengine", "mmengine.logging"):
            context.setitem(sys.modules, name, types.ModuleType(name))
        context.setitem(sys.modules, module.__name__, module)
        write(tmp_path / "a.pth", content)
        assert load_weights(tmp_path / "a.pth").args["variant"] == "mmseg"  # nor where mmengine is installed
    expected = load_weights(write(tmp_path / "b.pth", state)).state_dict()
    same_weights(tmp_path / "a.pth", expected)


def test_what_does_not_fit_is_named(peer, tmp_path):
    name, state = peer
    key = next(k for k in state if "bottleneck2.1" in k and k.endswith("weight"))
    ours = '"global_feature_extractor.bottleneck2.1.expand.conv.weight"'
    for content, message in (
        ({("odd.name" if k == key else k): v for k, v in state.items()}, rf'Missing .*{ours}. Unexpected .*"odd.name"'),
        ({**state, key: torch.zeros(3)}, rf"size mismatch for {ours[1:-1]}: .*\[3\]"),
        ({k: v for k, v in state.items() if "bottleneck" not in k}, r'Missing key[^:]*: ("[^"]*", ){5}\.\.\.'),
    ):
        with pytest.raises(CheckpointError, match=rf"a.pth: does not fit .*'{name}'.*{message}"):
            load_weights(write(tmp_path / "a.pth", content))


def test_saved_for_the_peer_it_is_what_came(peer, tmp_path):
    name, state = peer
    model = load_weights(write(tmp_path / "a.pth", state))
    save_for_peer(model, tmp_path / "b.pth", name)
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    for variant in (*VARIANTS, "other"):
        if variant != name:
            with pytest.raises(ValueError, match=rf"a network of variant '{name}' cannot be saved as '{variant}'"):
                save_for_peer(model, tmp_path / "c.pth", variant)
    assert not (tmp_path / "c.pth").exists()


def test_deployed_they_give_their_own_labels(peer):
    name, _ = peer
    torch.manual_seed(0)
    model = FastSCNN(5, variant=name).eval()
    images = torch.randint(0, 256, (1, 97, 129, 3), dtype=torch.uint8)
    labels = ops_ext.accelerate(model, precision=torch.float32)(images)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (ops_ext.IMAGENET_MEAN, ops_ext.IMAGENET_STD))
    with torch.no_grad():
        expected = model((images.permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1)
    assert (labels == expected).float().mean() > 0.999


def test_evaluation_of_a_peers_weights(drawn, tmp_path, capsys):
    save_for_peer(FastSCNN(19, variant="mmseg-old"), tmp_path / "theirs.pth", "mmseg-old")
    argv = ["--weights", tmp_path / "theirs.pth", "--data", drawn, "--device", "cpu", "--workers", "0"]
    evaluation.main([str(each) for each in argv])
    assert 0 <= last_json(capsys.readouterr().out)["miou"] < 1


def test_training_starts_from_a_peers_weights_with_other_classes(drawn, tmp_path):
    weights = write(tmp_path / "theirs.pth", state_of("tramac"))  # of 7 classes
    argv = ["--data", str(drawn), "--out", str(tmp_path / "r"), "--device", "cpu", "--epochs", "1", "--batch-size", "4"]
    argv += ["--crop-size", "64", "96", "--amp", "off", "--workers", "0", "--base-lr", "0"]
    argv += ["--init-weights", str(weights)]
    with pytest.raises(CheckpointError, match=r"theirs.pth: is of variant tramac; use --variant tramac"):
        train.main(argv)
    train.main([*argv, "--variant", "tramac"])
    trained, given = load_weights(tmp_path / "r/checkpoints/1.pth").state_dict(), load_weights(weights).state_dict()
    key = "global_feature_extractor.bottleneck2.1.expand.conv.weight"
    assert torch.equal(trained[key], given[key]) and trained["classifier.conv.weight"].shape[0] == 19
