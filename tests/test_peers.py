"""Weights of other projects: each parameter lands where it belongs, and what does not fit is refused by name.

The peers' networks are stated here once more, as functions of their own state dicts, and know nothing of model.py.
"""

import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from conftest import last_json
from eval import exit_status
from model import VARIANTS, CheckpointError, FastSCNN, build_from_checkpoint, load_weights, read_checkpoint, save_for_peer

PEERS = ("tramac", "segmentron", "mmseg", "mmseg-old")
CLASSES = 7


class Peer:
    """A peer's forward pass, and the names and shapes of its parameters as a side effect of running it."""

    def __init__(self, name, state=None):
        self.name, self.state, self.seed = name, {} if state is None else state, torch.Generator().manual_seed(0)
        self.making = state is None
        self.old = name in ("tramac", "segmentron")  # align_corners, and a bias before batch normalisation in the fusion
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
        x = self.pair(image, f"{back}learning_to_downsample.conv", conv, bn, 32, 3, stride=2, padding=int(self.name == "mmseg"))
        x = self.dsconv(x, f"{back}learning_to_downsample.dsconv1", 48, 2)
        detail = x = self.dsconv(x, f"{back}learning_to_downsample.dsconv2", 64, 2)
        for b, (channels, stride) in enumerate(((64, 2), (96, 2), (128, 1)), 1):
            for i in range(3):
                x = self.bottleneck(x, f"{back}global_feature_extractor.bottleneck{b}.{i}", channels, stride if i == 0 else 1)
        levels = [x]
        for k, bins in enumerate((1, 2, 3, 6)):
            key = {"tramac": f"conv{k + 1}", "segmentron": f"convs.{k}"}.get(self.name, f"{k}.1")
            pooled = self.pair(F.adaptive_avg_pool2d(x, bins), f"{back}global_feature_extractor.ppm.{key}", conv, bn, 32)
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


@pytest.fixture(scope="module", params=PEERS)
def peer(request):
    """Name and state dict of a peer's checkpoint."""
    made = Peer(request.param)
    made(torch.zeros(1, 3, 97, 97, dtype=torch.float64))
    return request.param, made.state


def write(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("size", [(129, 193), (192, 256), (161, 225)])
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


def test_wrapped_prefixed_and_half_precision_checkpoints_load(peer, tmp_path):
    _, state = peer
    expected = build_from_checkpoint(read_checkpoint(write(tmp_path / "a.pth", state)), "a").state_dict()
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    wrapped = {"meta": {"epoch": 3, "version": "1.0"}, "epoch": 3, "state_dict": parallel, "optimizer": {"state": {}}}
    for content, tolerance in ((parallel, 0), (wrapped, 0), (half, 1e-3)):
        loaded = load_weights(write(tmp_path / "b.pth", content)).state_dict()
        for key, tensor in expected.items():
            assert loaded[key].dtype == tensor.dtype
            torch.testing.assert_close(loaded[key], tensor, rtol=tolerance, atol=tolerance)


def test_without_auxiliary_heads_counters_and_biases(peer, tmp_path):
    name, state = peer
    bare = {k: v for k, v in state.items() if not k.startswith("aux") and not k.endswith("num_batches_tracked")}
    biases = [key for key in bare if key.endswith(("_res.0.bias", "conv.1.bias", "conv_seg.bias")) and "dsconv" not in key
              and "ppm" not in key and "bottleneck" not in key and "downsample" not in key and "dwconv" not in key]  # fmt: skip
    for key in biases:
        del bare[key]
    model = load_weights(write(tmp_path / "a.pth", bare))
    assert model.args["aux"] is False and not model.classifier.conv.bias.any()
    zeros = {**state, **{key: torch.zeros_like(state[key]) for key in biases}}
    image = torch.randn(1, 3, 129, 129, dtype=torch.float64)
    with torch.no_grad():
        expected = Peer(name, zeros)(image)[0]
        assert (model.double()(image) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_renamed_key_wrong_shape_and_truncated_file_are_refused_by_name(peer, tmp_path):
    name, state = peer
    key = next(k for k in state if "bottleneck2.1" in k and k.endswith("weight"))
    renamed = {("odd.name" if k == key else k): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=rf"a.pth: looks like weights of {name}, but lacks {key}; has besides odd.name"):
        load_weights(write(tmp_path / "a.pth", renamed))
    with pytest.raises(CheckpointError, match=rf"has other shapes: {key} \(3,\), expected"):
        load_weights(write(tmp_path / "a.pth", {**state, key: torch.zeros(3)}))
    cut = write(tmp_path / "cut.pth", state)
    cut.write_bytes(cut.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cut.pth: damaged, truncated"):
        load_weights(cut)


def test_a_pickle_that_would_run_code_is_refused_by_its_name(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state_dict": Bomb()}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}, 2))
    for file in ("x.pth", "y.pth"):
        with pytest.raises(CheckpointError, match=rf"{file}: would run posix.mkdir when it is read, and was not"):
            load_weights(tmp_path / file)
    assert not (tmp_path / "harm").exists()


def test_head_of_another_class_count_begins_anew_where_asked(peer, tmp_path):
    _, state = peer
    path = write(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match="a.pth: has 7 classes, expected 19"):
        load_weights(path, 19)
    old, new = load_weights(path), load_weights(path, 19, new_head=True)
    assert new.args["num_classes"] == 19 and new(torch.zeros(1, 3, 64, 64)).shape == (1, 19, 64, 64)
    heads = ("classifier.conv.", "aux_detail.conv.", "aux_context.conv.")
    for key, tensor in new.state_dict().items():
        assert key.startswith(heads) or torch.equal(tensor, old.state_dict()[key])


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
    import ops_ext

    name, _ = peer
    torch.manual_seed(0)
    model = FastSCNN(5, variant=name).eval()
    images = torch.randint(0, 256, (1, 97, 129, 3), dtype=torch.uint8)
    labels = ops_ext.accelerate(model, precision=torch.float32)(images)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (ops_ext.IMAGENET_MEAN, ops_ext.IMAGENET_STD))
    with torch.no_grad():
        expected = model((images.permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1)
    assert (labels == expected).float().mean() > 0.999


def test_evaluation_prediction_and_export_of_a_peers_weights(peer, drawn, tmp_path, capsys):
    name, _ = peer
    torch.manual_seed(0)
    model = FastSCNN(19, variant=name).eval()
    save_for_peer(model, tmp_path / "theirs.pth", name)

    def run(*flags):
        argv = ["--weights", str(tmp_path / "theirs.pth"), "--device", "cpu", "--workers", "0", *map(str, flags)]
        status = exit_status("eval.py", lambda: evaluation.main(argv))
        return status, capsys.readouterr()

    status, printed = run("--data", drawn)
    assert status == 0 and 0 <= last_json(printed.out)["miou"] < 1
    status, _ = run("--predict", drawn / "leftImg8bit/val", "--out", tmp_path / "out")
    assert status == 0 and len(list((tmp_path / "out").rglob("*_overlay.png"))) == 5
    status, _ = run("--export-weights", tmp_path / "sub/again.pth", "--as", name)
    assert status == 0 and load_weights(tmp_path / "sub/again.pth").args["variant"] == name
    status, printed = run("--export-weights", tmp_path / "no.pth")
    assert status == 2 and "--export-weights needs --as" in printed.err
    other = next(each for each in PEERS if each != name)
    status, printed = run("--export-weights", tmp_path / "no.pth", "--as", other)
    assert status == 2 and f"cannot be saved as '{other}'" in printed.err and not (tmp_path / "no.pth").exists()


def test_training_begins_with_a_peers_weights_and_other_classes(peer, drawn, tmp_path, capsys):
    name, state = peer  # of 7 classes
    weights = write(tmp_path / "theirs.pth", state)
    argv = ["--data", str(drawn), "--out", str(tmp_path / "r"), "--device", "cpu", "--epochs", "1", "--batch-size", "4"]
    argv += ["--crop-size", "64", "96", "--amp", "off", "--workers", "0", "--base-lr", "0", "--init-weights", str(weights)]
    assert exit_status("train.py", lambda: train.main(argv)) == 2
    assert f"theirs.pth: is of variant {name}; give --variant {name}" in capsys.readouterr().err
    assert exit_status("train.py", lambda: train.main([*argv, "--variant", name])) == 0
    out = capsys.readouterr().out
    heads = "aux_detail.conv, classifier.conv" if name == "tramac" else "aux_context.conv, aux_detail.conv, classifier.conv"
    assert f"began with {weights}, 7 classes; begun anew: {heads}" in out
    trained, given = load_weights(tmp_path / "r/checkpoints/1.pth").state_dict(), load_weights(weights).state_dict()
    key = "global_feature_extractor.bottleneck2.1.expand.conv.weight"
    assert torch.equal(trained[key], given[key]) and trained["classifier.conv.weight"].shape[0] == 19
