"""Fast-SCNN: Fast Semantic Segmentation Network (Poudel, Liwicki, Cipolla, 2019, arXiv 1902.04502).

This file needs only torch and can be copied into another project:

    model = load_weights("best_model.pth")  # or FastSCNN(num_classes=19).eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    images = torch.randint(0, 256, (1, 3, 360, 480))  # (N, 3, H, W), RGB from 0 to 255, any H, W >= 32
    labels = model((images / 255 - mean) / std).argmax(1)  # (N, H, W)

From top to bottom: layers, the paper's four stages, the network, checkpoints, weights of other projects.

Where the paper is silent:
  - padding 1 in every 3x3 convolution, so that a stride of 2 gives ceil(size / 2) at any size;
  - no bias in a convolution that batch normalisation follows;
  - bilinear resizing with align_corners=False, to an explicit size, not by a scale factor;
  - batch normalisation also between the depthwise and the pointwise convolution of a DSConv;
  - PyTorch's default weight initialisation and batch normalisation momentum (0.1).
"""

from __future__ import annotations

import itertools
import os
import re
import textwrap
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """Options in which published implementations differ. The defaults are the paper's network."""

    stem_padding: int = 1  # padding of the first convolution
    depthwise_relu: bool = False  # after the depthwise convolution of a DSConv
    relu6: bool = False  # ReLU6 in the bottlenecks
    pyramid_kernel: int = 1  # kernel of the convolution after pyramid pooling
    fusion_kernel: int = 3  # kernel of the context convolution: 3 is depthwise, 1 dense
    fusion_dilation: int = 4
    fusion_bias: bool = False  # bias in the 1x1 convolutions before the addition
    align_corners: bool = False  # for all bilinear resizing
    aux_context: bool = True  # whether there is a second auxiliary head


_LEGACY = {"stem_padding": 0, "depthwise_relu": True, "fusion_dilation": 1}
# The paper's network; those of Tramac/Fast-SCNN-pytorch, LikeLy-Journey/SegmenTron (also Ascend/ModelZoo-PyTorch), and
# open-mmlab/mmsegmentation since its pull request 606 and before it.
VARIANTS = {
    "paper": Variant(),
    "tramac": Variant(**_LEGACY, fusion_bias=True, align_corners=True, aux_context=False),
    "segmentron": Variant(**_LEGACY, relu6=True, fusion_kernel=1, fusion_bias=True, align_corners=True),
    "mmseg": Variant(pyramid_kernel=3, fusion_dilation=1),
    "mmseg-old": Variant(**_LEGACY, relu6=True, fusion_kernel=1),
}
MIN_SIZE = 32  # pixels; minimum side of the input, one full pixel at 1/32 of the resolution


class CheckpointError(ValueError):
    """A file is no checkpoint or does not match the network; the message names the file and the remedy."""


class ConvBN(nn.Sequential):
    """Convolution, batch normalisation, ReLU. (nn.Sequential runs its attributes in the order of their assignment.)

    relu: the activation's class, or None. options: passed to nn.Conv2d; by default the padding gives
    ceil(size / stride), and there is no bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, relu=nn.ReLU, **options):
        super().__init__()
        padding = options.get("dilation", 1) * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **{"padding": padding, "bias": False, **options})
        self.bn = nn.BatchNorm2d(out_channels)
        if relu is not None:
            self.relu = relu(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        conv, *others = self
        autocast = torch.is_autocast_enabled("cpu")
        needs_grad = self.training or (autocast and torch.is_grad_enabled())
        # On the CPU, avoid slow gradients of oneDNN 3.13; torch.compile fails on the reshapes of `undilated`.
        if x.device.type != "cpu" or conv.groups == 1 or not needs_grad or torch.compiler.is_compiling():
            x = conv(x)
        elif conv.dilation[0] > 1:
            x = undilated(conv, x)
        elif autocast and conv.stride[0] > 1:  # 4 to 12 times as fast as in bfloat16
            with torch.autocast("cpu", enabled=False):
                x = conv(x.float()).to(x.dtype)
        else:
            x = conv(x)
        for layer in others:
            x = layer(x)
        return x


def undilated(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A dilated depthwise 3x3 convolution as a plain one on the d x d images made of every d-th pixel and row.

    oneDNN's gradient of the dilated one takes ten times as long and is wrong in bfloat16.
    """
    d = conv.dilation[0]
    n, _, h, w = x.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -w % d, 0, -h % d))  # (N, H, W, C), now multiples of d
    x = x.unflatten(2, (-1, d)).unflatten(1, (-1, d)).permute(0, 2, 4, 1, 3, 5)  # (N, d, d, H/d, W/d, C)
    x = F.conv2d(x.flatten(0, 2).permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=conv.groups)
    x = x.permute(0, 2, 3, 1).unflatten(0, (n, d, d)).permute(0, 3, 1, 4, 2, 5)  # (N, H/d, d, W/d, d, C)
    x = x.flatten(3, 4).flatten(1, 2)[:, :h, :w].permute(0, 3, 1, 2)  # (N, C, H, W)
    return x.contiguous(memory_format=torch.channels_last)


class DSConv(nn.Sequential):
    """Depthwise separable convolution (section 3.1); no ReLU in between unless `depthwise_relu`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, depthwise_relu: bool = False):
        super().__init__()
        relu = nn.ReLU if depthwise_relu else None
        self.depthwise = ConvBN(in_channels, in_channels, 3, stride=stride, groups=in_channels, relu=relu)
        self.pointwise = ConvBN(in_channels, out_channels)


class Bottleneck(nn.Module):
    """Inverted residual of MobileNetV2 (table 2): expand by 6, depthwise 3x3, project without a non-linearity."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, relu6: bool = False):
        super().__init__()
        hidden, relu = in_channels * 6, nn.ReLU6 if relu6 else nn.ReLU
        self.expand = ConvBN(in_channels, hidden, relu=relu)
        self.depthwise = ConvBN(hidden, hidden, 3, stride=stride, groups=hidden, relu=relu)
        self.project = ConvBN(hidden, out_channels, relu=None)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def bottlenecks(in_channels: int, out_channels: int, stride: int, *, relu6: bool) -> nn.Sequential:
    """Three bottlenecks, a row of table 1: the first has the stride and changes the number of channels."""
    first = Bottleneck(in_channels, out_channels, stride, relu6=relu6)
    return nn.Sequential(first, *(Bottleneck(out_channels, out_channels, relu6=relu6) for _ in range(2)))


def resize(x: Tensor, like: Tensor, align_corners: bool = False) -> Tensor:
    """Bilinear resizing of (N, C, h, w) to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=align_corners)


def pooling_matrix(size: int, bins: tuple[int, ...], like: Tensor) -> Tensor:
    """`F.adaptive_avg_pool1d` to each of `bins` as one matrix, (sum(bins), size).

    Row i of n bins averages the half-open range [floor(i size / n), ceil((i + 1) size / n)).
    """
    position = torch.arange(size, device=like.device)
    row = torch.cat([torch.arange(n, device=like.device) for n in bins])
    count = torch.cat([torch.full((n,), n, device=like.device) for n in bins])
    start = row * size // count
    end = ((row + 1) * size + count - 1) // count  # not -(-a // b), which the legacy ONNX exporter truncates
    mask = (position >= start[:, None]) & (position < end[:, None])
    return mask.to(like.dtype) / (end - start)[:, None]


class PyramidPooling(nn.Module):
    """Pyramid pooling of PSPNet: a 1x1 convolution of the input beside its averages over 1, 2, 3 and 6 bins.

    The averages equal `F.adaptive_avg_pool2d`. They are taken for all bins at once by two small matrix products, which,
    unlike adaptive pooling, export to ONNX and other runtimes at any input size.
    """

    bins = (1, 2, 3, 6)

    def __init__(self, in_channels: int, out_channels: int, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.reduce = nn.ModuleList(ConvBN(in_channels, in_channels // len(self.bins)) for _ in self.bins)
        self.project = ConvBN(in_channels * 2, out_channels, variant.pyramid_kernel)
        self.align_corners = variant.align_corners

    def pool(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> one (N, C, n, n) per n of `bins`."""
        rows = pooling_matrix(x.shape[-2], self.bins, x)
        columns = pooling_matrix(x.shape[-1], self.bins, x)
        pooled = rows @ x @ columns.T  # (N, C, 12, 12); the levels of the pyramid are the blocks on its diagonal
        ends = itertools.accumulate(self.bins)
        return [pooled[..., end - n : end, end - n : end] for n, end in zip(self.bins, ends)]

    def forward(self, x: Tensor) -> Tensor:
        levels = [resize(reduce(level), x, self.align_corners) for reduce, level in zip(self.reduce, self.pool(x))]
        return self.project(torch.cat([x, *levels], dim=1))


class LearningToDownsample(nn.Sequential):
    """Section 3.2.1: three layers of stride 2. (N, 3, H, W) -> (N, 64, H/8, W/8)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.conv = ConvBN(3, 32, 3, stride=2, padding=variant.stem_padding)
        self.dsconv1 = DSConv(32, 48, stride=2, depthwise_relu=variant.depthwise_relu)
        self.dsconv2 = DSConv(48, 64, stride=2, depthwise_relu=variant.depthwise_relu)


class GlobalFeatureExtractor(nn.Sequential):
    """Section 3.2.2: bottlenecks and pyramid pooling. (N, 64, H/8, W/8) -> (N, 128, H/32, W/32)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.bottleneck1 = bottlenecks(64, 64, stride=2, relu6=variant.relu6)
        self.bottleneck2 = bottlenecks(64, 96, stride=2, relu6=variant.relu6)
        self.bottleneck3 = bottlenecks(96, 128, stride=1, relu6=variant.relu6)
        self.pyramid_pooling = PyramidPooling(128, 128, variant)


class FeatureFusion(nn.Module):
    """Section 3.2.3, table 3: detail (N, 64, H/8, W/8) + context (N, 128, H/32, W/32) -> (N, 128, H/8, W/8)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        kernel = variant.fusion_kernel
        groups = 128 if kernel == 3 else 1
        # In table 3 the dilation is the upsampling factor, 4.
        self.depthwise = ConvBN(128, 128, kernel, groups=groups, dilation=variant.fusion_dilation)
        self.context = ConvBN(128, 128, relu=None, bias=variant.fusion_bias)
        self.detail = ConvBN(64, 128, relu=None, bias=variant.fusion_bias)
        self.align_corners = variant.align_corners

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        context = self.context(self.depthwise(resize(context, detail, self.align_corners)))
        return F.relu(self.detail(detail) + context)


class Classifier(nn.Sequential):
    """Section 3.2.4: (N, 128, H/8, W/8) -> (N, num_classes, H/8, W/8) logits. Softmax is left to the loss."""

    def __init__(self, num_classes: int, dropout: float, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.dsconv1 = DSConv(128, 128, depthwise_relu=variant.depthwise_relu)
        self.dsconv2 = DSConv(128, 128, depthwise_relu=variant.depthwise_relu)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(128, num_classes, 1)


class AuxiliaryHead(nn.Sequential):
    """A small classifier on intermediate features, for training only (section 4.1: auxiliary losses of weight 0.4)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.hidden = ConvBN(in_channels, 32, 3)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(32, num_classes, 1)


class FastSCNN(nn.Module):
    """Fast-SCNN (table 1).

    Args:
        num_classes: number of output channels.
        variant: one of VARIANTS; "paper" is the network of the paper, the others match published weights.
        aux: build the auxiliary heads too, after learning to downsample and after the global feature extractor.
        dropout: dropout probability before the last layer of each head.
    """

    def __init__(self, num_classes: int = 19, *, variant: str = "paper", aux: bool = False, dropout: float = 0.1):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        self.args = {"num_classes": num_classes, "variant": variant, "aux": aux, "dropout": dropout}
        choice = VARIANTS[variant]
        self.learning_to_downsample = LearningToDownsample(choice)
        self.global_feature_extractor = GlobalFeatureExtractor(choice)
        self.feature_fusion = FeatureFusion(choice)
        self.classifier = Classifier(num_classes, dropout, choice)
        self.aux_detail = AuxiliaryHead(64, num_classes, dropout) if aux else None
        self.aux_context = AuxiliaryHead(128, num_classes, dropout) if aux and choice.aux_context else None
        self.align_corners = choice.align_corners

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor | tuple[Tensor, ...]:
        """(N, 3, H, W) normalised RGB, H and W >= 32 -> (N, num_classes, H, W) logits.

        With `upsample=False` the size is ceil(H/8), ceil(W/8), from H - 2 and W - 2 without stem padding. In training
        mode with aux=True the result is a tuple of logits: main, from the 1/8 detail, from the 1/32 context (which
        "tramac" does not have).
        """
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            size = f"{x.shape[2]}x{x.shape[3]}"
            raise ValueError(f"input is {size} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}: pad or enlarge it")
        detail = self.learning_to_downsample(x)  # (N, 64, H/8, W/8)
        context = self.global_feature_extractor(detail)  # (N, 128, H/32, W/32)
        outputs = [self.classifier(self.feature_fusion(detail, context))]  # (N, num_classes, H/8, W/8)
        if self.training:
            heads = ((self.aux_detail, detail), (self.aux_context, context))
            outputs += [head(features) for head, features in heads if head is not None]
        if upsample:
            outputs = [resize(output, x, self.align_corners) for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---------------------------------------------------------------------------------------------------- checkpoints


class _ForeignObject:
    """Inert stand-in for pickled classes and functions that torch.load does not allow."""

    def __init__(self, *_args):
        pass

    __setstate__ = __init__


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Loads a checkpoint on the CPU without running pickled code.

    The dict holds `model` (a state dict), `model_args` (the arguments of FastSCNN) and what train.py saved beside them.
    A bare state dict or the file of another project is converted to these two keys.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged, no checkpoint, or not finite.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .pth file")
    try:
        foreign = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_ForeignObject, name) for name in foreign]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged data can raise any exception
        cause = (str(error) or repr(error)).split("\n\n")[-2:][0]  # torch.load ends with a paragraph of advice
        reason = textwrap.shorten(cause.rpartition("WeightsUnpickler error:")[2], 150, placeholder=" ...")
        raise CheckpointError(f"{path}: damaged, truncated or not a checkpoint ({reason}); use another file") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}; save the network's state dict instead")
    if "model_args" not in checkpoint or not isinstance(checkpoint.get("model"), dict):
        checkpoint = _from_state_dict(_find_state_dict(checkpoint), path)
    for name, tensor in checkpoint["model"].items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite; use an earlier checkpoint")
    return checkpoint


def build_from_checkpoint(checkpoint: dict, path: str | os.PathLike, num_classes: int | None = None) -> FastSCNN:
    """Builds the network of a loaded checkpoint, in evaluation mode; `path` is for error messages."""
    try:
        model = FastSCNN(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = re.sub(r'((?:"[^"]*", ){5})(?:"[^"]*"(?:, )?)+', r"\1...", str(error))  # the first five names
        reason = textwrap.shorten(reason.rpartition("FastSCNN:")[2], 400, placeholder=" ...")
        network = f"the network of {checkpoint['model_args']}"
        raise CheckpointError(f"{path}: does not fit {network} ({reason}); use another file") from None
    found = model.args["num_classes"]
    if num_classes not in (None, found):
        remedy = "choose the dataset that it was trained on, or train on yours with --init-weights"
        raise CheckpointError(f"{path}: has {found} classes, expected {num_classes}; {remedy}")
    return model.eval()


def load_weights(path: str | os.PathLike, num_classes: int | None = None) -> FastSCNN:
    """Loads a network saved by train.py or another project, on the CPU and in evaluation mode.

    Raises FileNotFoundError, or CheckpointError, also if the class count is not `num_classes`.
    """
    return build_from_checkpoint(read_checkpoint(path), path, num_classes)


# ---------------------------------------------------------------------------------------- weights of other projects

# Column of _PEER_LAYERS.
_PEERS = {"tramac": 0, "segmentron": 1, "mmseg": 2, "mmseg-old": 2}
# Pattern of a layer here, and its name in tramac, segmentron and mmseg. All rows are applied, in order.
_PEER_LAYERS = (
    (r"(downsample\.conv)$", r"\1.conv.0", r"\1.conv", r"\1.conv"),
    (r"(dsconv.)\.depthwise$", r"\1.conv.0", r"\1.block.depthwise", r"\1.depthwise_conv.conv"),
    (r"(dsconv.)\.pointwise$", r"\1.conv.3", r"\1.block.pointwise", r"\1.pointwise_conv.conv"),
    (r"(neck.\..)\.expand$", r"\1.block.0.conv.0", r"\1.conv.0.conv", r"\1.conv.0.conv"),
    (r"(neck.\..)\.depthwise$", r"\1.block.1.conv.0", r"\1.conv.1.conv", r"\1.conv.1.conv"),
    (r"(neck.\..)\.project$", r"\1.block.2", r"\1.conv.2", r"\1.conv.2.conv"),
    (r"pyramid_pooling\.reduce\.0", "ppm.conv1.conv.0", "ppm.convs.0.conv", "ppm.0.1.conv"),
    (r"pyramid_pooling\.reduce\.1", "ppm.conv2.conv.0", "ppm.convs.1.conv", "ppm.1.1.conv"),
    (r"pyramid_pooling\.reduce\.2", "ppm.conv3.conv.0", "ppm.convs.2.conv", "ppm.2.1.conv"),
    (r"pyramid_pooling\.reduce\.3", "ppm.conv4.conv.0", "ppm.convs.3.conv", "ppm.3.1.conv"),
    (r"pyramid_pooling\.project", "ppm.out.conv.0", "out.conv", "out.conv"),
    (r"fusion\.depthwise", "fusion.dwconv.conv.0", "fusion.dwconv.conv", "fusion.dwconv.conv"),
    (r"fusion\.context", "fusion.conv_lower_res.0", "fusion.conv_lower_res.0", "fusion.conv_lower_res.conv"),
    (r"fusion\.detail", "fusion.conv_higher_res.0", "fusion.conv_higher_res.0", "fusion.conv_higher_res.conv"),
    (r"classifier$", "classifier.conv.1", "classifier.conv.1", "decode_head.conv_seg"),
    (r"classifier\.dsconv1", "classifier.dsconv1", "classifier.dsconv1", "decode_head.convs.0"),
    (r"classifier\.dsconv2", "classifier.dsconv2", "classifier.dsconv2", "decode_head.convs.1"),
    (r"aux_detail\.hidden", "auxlayer.0", "auxlayer1.0", "auxiliary_head.1.convs.0.conv"),
    (r"aux_detail", "auxlayer.4", "auxlayer1.4", "auxiliary_head.1.conv_seg"),
    (r"aux_context\.hidden", "", "auxlayer2.0", "auxiliary_head.0.convs.0.conv"),
    (r"aux_context", "", "auxlayer2.4", "auxiliary_head.0.conv_seg"),
    (r"^(learning|global|feature)", r"\1", r"\1", r"backbone.\1"),
)
# Last component of a convolution's name there: that of its batch normalisation.
_PEER_NORMS = {"conv": "bn", "0": "1", "2": "3", "3": "4", "depthwise": "bn_depth", "pointwise": "bn_point"}


def _peer_name(name: str, variant: str) -> str:
    """Name of a state dict's entry in the project that the variant is named after."""
    if variant not in _PEERS:
        return name
    layer, kind, entry = name.rsplit(".", 2)  # such as feature_fusion.context, bn, weight
    for here, *there in _PEER_LAYERS:
        layer = re.sub(here, there[_PEERS[variant]], layer)
    if kind == "bn":
        layer, _, last = layer.rpartition(".")
        layer = f"{layer}.{_PEER_NORMS[last]}"
    return f"{layer}.{entry}"


def _find_state_dict(content: dict) -> dict[str, Tensor]:
    """The first dict with convolution weights, in the file or one level down, common prefixes removed."""
    entries = [content, *(value for value in content.values() if isinstance(value, dict))]
    states = [{str(k): v for k, v in each.items() if isinstance(v, Tensor)} for each in entries]
    state = next((each for each in states if any(tensor.ndim == 4 for tensor in each.values())), states[0])
    while all("." in name for name in state) and len({name.split(".")[0] for name in state}) == 1:
        state = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}  # module., model., _orig_mod.
    return state


def _from_state_dict(state: dict[str, Tensor], path: str | os.PathLike) -> dict:
    """Converts a state dict; infers the variant from its names and shapes."""
    candidates = []
    for variant in VARIANTS:
        with torch.device("meta"):
            shapes = {name: t.shape[1:] for name, t in FastSCNN(1, variant=variant, aux=True).state_dict().items()}
        ours = {_peer_name(name, variant): name for name in shapes}
        renamed = {ours.get(name, name): tensor for name, tensor in state.items()}
        matches = sum(name in renamed and renamed[name].shape[1:] == shape for name, shape in shapes.items())
        candidates.append((matches, variant, renamed, shapes))
    _, variant, state, shapes = max(candidates, key=lambda each: each[0])
    if "classifier.conv.weight" not in state:
        found = f"tensors {', '.join([*state][:5])}" if state else "no state dict"
        raise CheckpointError(f"{path}: holds {found}, expected a file of train.py or weights of {', '.join(VARIANTS)}")
    aux = all(name in state for name in shapes if name.startswith("aux"))
    if not aux:  # drop incomplete auxiliary heads, which only training needs
        state = {name: tensor for name, tensor in state.items() if not name.startswith("aux")}
    args = {"num_classes": len(state["classifier.conv.weight"]), "variant": variant, "aux": aux}
    return {"model": state, "model_args": args}


def save_for_peer(model: FastSCNN, path: str | os.PathLike, variant: str) -> None:
    """Writes a state dict with the names of the project that the variant is named after.

    Raises ValueError for a network of another variant: the project would compute something else with its weights.
    """
    own = model.args["variant"]
    if variant not in _PEERS or variant != own:
        raise ValueError(f"a network of variant {own!r} cannot be saved as {variant!r}, which computes something else")
    torch.save({_peer_name(name, variant): tensor for name, tensor in model.state_dict().items()}, path)
