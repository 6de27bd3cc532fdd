"""Fast-SCNN: Fast Semantic Segmentation Network (Poudel, Liwicki, Cipolla, 2019, arXiv 1902.04502).

    model = FastSCNN(num_classes=19).eval()
    logits = model(images)              # (N, 3, H, W) normalised RGB -> (N, 19, H, W), any H, W >= 32
    model = load_weights("theirs.pth")  # this project's checkpoints, and those of three others

This file needs torch alone, and may be copied into another project as it is. From top to bottom: the layers, the paper's
four stages (learning to downsample, global feature extractor, feature fusion, classifier), the network, its checkpoints.

Where the paper is silent, this is what was chosen:
  - padding 1 in every 3x3 convolution, so that a stride of 2 gives ceil(size / 2) at any size;
  - no bias in a convolution that batch normalisation follows; the layer that gives the logits has one;
  - bilinear resizing with align_corners=False, always to the size that is needed rather than by a fixed factor;
  - batch normalisation also between the depthwise and the pointwise convolution of a DSConv, but no non-linearity there;
  - PyTorch's own initialisation of weights and momentum (0.1) of batch normalisation.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import stat
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """Where published implementations differ. The defaults are the paper's network."""

    stem_padding: int = 1  # of the first convolution
    depthwise_relu: bool = False  # after the depthwise convolution of a DSConv
    relu6: bool = False  # in the bottlenecks
    pyramid_kernel: int = 1  # of the convolution after pyramid pooling
    fusion_kernel: int = 3  # of the convolution of the context: 3 depthwise, 1 dense
    fusion_dilation: int = 4
    fusion_bias: bool = False  # of the 1x1 convolutions before the addition
    align_corners: bool = False  # of every resizing
    aux_context: bool = True  # whether there is a second auxiliary head


_SEGMENTRON = {"stem_padding": 0, "depthwise_relu": True, "relu6": True, "fusion_kernel": 1, "fusion_dilation": 1}
VARIANTS = {
    "paper": Variant(),
    # Tramac/Fast-SCNN-pytorch
    "tramac": Variant(
        stem_padding=0, depthwise_relu=True, fusion_dilation=1, fusion_bias=True, align_corners=True, aux_context=False
    ),
    # LikeLy-Journey/SegmenTron and its port Ascend/ModelZoo-PyTorch
    "segmentron": Variant(**_SEGMENTRON, fusion_bias=True, align_corners=True),
    # open-mmlab/mmsegmentation, since its pull request 606 and before
    "mmseg": Variant(pyramid_kernel=3, fusion_dilation=1),
    "mmseg-old": Variant(**_SEGMENTRON),
}
MIN_SIZE = 32  # pixels; the smallest side that still leaves one pixel at 1/32 of the resolution


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this network, or not one that fits; the message names the file and a remedy."""


# ---------------------------------------------------------------------------------------------------------------- layers


class ConvBN(nn.Sequential):
    """Convolution, batch normalisation, ReLU.

    Args:
        relu: the class of the non-linearity, None for none.
        options: of nn.Conv2d. The default padding gives ceil(size / stride); there is no bias by default.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, relu=nn.ReLU, **options):
        super().__init__()
        padding = options.get("dilation", 1) * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **{"padding": padding, "bias": False, **options})
        self.bn = nn.BatchNorm2d(out_channels)
        if relu is not None:
            self.relu = relu(inplace=True)


class DilatedConvBN(ConvBN):
    """ConvBN of a dilated depthwise 3x3 convolution, which is computed without dilation in training on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        # oneDNN's gradient of a dilated depthwise kernel takes ten times as long as that of a plain one, and in bfloat16 is
        # wrong, at times NaN (seen in its 3.13). A dilation of d is the plain kernel on each of the d x d images made of
        # every d-th pixel of every d-th row. torch.compile fails on these reshapes at a second size, and gets the original.
        conv, d = self.conv, self.conv.dilation[0]
        differentiated = self.training or (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled())
        if d == 1 or x.device.type != "cpu" or not differentiated or torch.compiler.is_compiling():
            return super().forward(x)
        n, _, h, w = x.shape
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -w % d, 0, -h % d))  # (N, H, W, C), now multiples of d
        x = x.unflatten(2, (-1, d)).unflatten(1, (-1, d)).permute(0, 2, 4, 1, 3, 5)  # (N, d, d, H/d, W/d, C)
        x = F.conv2d(x.flatten(0, 2).permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=conv.groups)
        x = x.permute(0, 2, 3, 1).unflatten(0, (n, d, d)).permute(0, 3, 1, 4, 2, 5)  # (N, H/d, d, W/d, d, C)
        x = x.flatten(3, 4).flatten(1, 2)[:, :h, :w].permute(0, 3, 1, 2)  # (N, C, H, W)
        return self.relu(self.bn(x.contiguous(memory_format=torch.channels_last)))


class DSConv(nn.Sequential):
    """Depthwise separable convolution (section 3.1): the non-linearity between its two convolutions is left out."""

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


def pooling_matrix(size: int, bins: tuple[int, ...], like: Tensor) -> Tensor:
    """`F.adaptive_avg_pool1d` to each of `bins` as one matrix, (sum(bins), size).

    Row i of n bins averages the half-open range [floor(i size / n), ceil((i + 1) size / n)).
    """
    position = torch.arange(size, device=like.device)
    row = torch.cat([torch.arange(n, device=like.device) for n in bins])
    count = torch.cat([torch.full((n,), n, device=like.device) for n in bins])
    start = row * size // count
    end = ((row + 1) * size + count - 1) // count  # not -(-a // b), which the legacy ONNX exporter truncates
    member = (position >= start[:, None]) & (position < end[:, None])
    return member.to(like.dtype) / (end - start)[:, None]


class PyramidPooling(nn.Module):
    """Pyramid pooling of PSPNet: the input beside its averages over 1, 2, 3 and 6 bins, then a 1x1 convolution.

    The averages equal `F.adaptive_avg_pool2d`. They are taken for all bins at once by two small matrix products, which,
    unlike adaptive pooling, export to ONNX and other runtimes at any input size.
    """

    bins = (1, 2, 3, 6)

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 1, align_corners: bool = False):
        super().__init__()
        self.reduce = nn.ModuleList(ConvBN(in_channels, in_channels // len(self.bins)) for _ in self.bins)
        self.project = ConvBN(in_channels * 2, out_channels, kernel_size)
        self.align_corners = align_corners

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


def resize(x: Tensor, like: Tensor, align_corners: bool = False) -> Tensor:
    """Bilinear resizing of (N, C, h, w) to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=align_corners)


# -------------------------------------------------------------------------------------------------------- the four stages


class LearningToDownsample(nn.Module):
    """Section 3.2.1: three layers of stride 2. (N, 3, H, W) -> (N, 64, H/8, W/8)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.conv = ConvBN(3, 32, 3, stride=2, padding=variant.stem_padding)
        self.dsconv1 = DSConv(32, 48, stride=2, depthwise_relu=variant.depthwise_relu)
        self.dsconv2 = DSConv(48, 64, stride=2, depthwise_relu=variant.depthwise_relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.dsconv2(self.dsconv1(self.conv(x)))


class GlobalFeatureExtractor(nn.Module):
    """Section 3.2.2: bottlenecks and pyramid pooling. (N, 64, H/8, W/8) -> (N, 128, H/32, W/32)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.bottleneck1 = bottlenecks(64, 64, stride=2, relu6=variant.relu6)
        self.bottleneck2 = bottlenecks(64, 96, stride=2, relu6=variant.relu6)
        self.bottleneck3 = bottlenecks(96, 128, stride=1, relu6=variant.relu6)
        self.pyramid_pooling = PyramidPooling(
            128, 128, kernel_size=variant.pyramid_kernel, align_corners=variant.align_corners
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pyramid_pooling(self.bottleneck3(self.bottleneck2(self.bottleneck1(x))))


class FeatureFusion(nn.Module):
    """Section 3.2.3, table 3: detail (N, 64, H/8, W/8) + context (N, 128, H/32, W/32) -> (N, 128, H/8, W/8)."""

    def __init__(self, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        kernel = variant.fusion_kernel
        groups = 128 if kernel == 3 else 1
        # The dilation is the factor between the two resolutions, as in the table.
        self.depthwise = DilatedConvBN(128, 128, kernel, groups=groups, dilation=variant.fusion_dilation)
        self.context = ConvBN(128, 128, relu=None, bias=variant.fusion_bias)
        self.detail = ConvBN(64, 128, relu=None, bias=variant.fusion_bias)
        self.align_corners = variant.align_corners

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        context = self.context(self.depthwise(resize(context, detail, self.align_corners)))
        return F.relu(self.detail(detail) + context)


class Classifier(nn.Module):
    """Section 3.2.4: (N, 128, H/8, W/8) -> (N, num_classes, H/8, W/8) logits. Softmax is left to the loss."""

    def __init__(self, num_classes: int, dropout: float, variant: Variant = VARIANTS["paper"]):
        super().__init__()
        self.dsconv1 = DSConv(128, 128, depthwise_relu=variant.depthwise_relu)
        self.dsconv2 = DSConv(128, 128, depthwise_relu=variant.depthwise_relu)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(128, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(self.dsconv2(self.dsconv1(x))))


class AuxiliaryHead(nn.Sequential):
    """A small classifier on inner features, for training alone (section 4.1: auxiliary losses of weight 0.4)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.hidden = ConvBN(in_channels, 32, 3)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(32, num_classes, 1)


# ------------------------------------------------------------------------------------------------------------ the network


class FastSCNN(nn.Module):
    """Fast-SCNN (table 1).

    Args:
        num_classes: number of classes, each one output channel.
        variant: one of VARIANTS; "paper" is the network of the paper's tables, the others are those of published weights.
        aux: also build the two auxiliary heads, on the outputs of learning to downsample (1/8) and of the global
            feature extractor (1/32); "tramac" has the first alone.
        dropout: probability before the last layer of each head.
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

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Class scores (logits) of a batch of images.

        Args:
            x: (N, 3, H, W) floating point RGB, normalised; any H, W >= 32.
            upsample: return logits at the size of the input, else at 1/8 of it.

        Returns:
            (N, num_classes, H, W), or (N, num_classes, ceil(H/8), ceil(W/8)) with `upsample=False`; variants without
            padding in the first convolution: ceil((H - 2)/8), ceil((W - 2)/8).
            In training mode with aux=True a tuple (main, auxiliary at 1/8, auxiliary at 1/32), "tramac" without the last.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"input has shape {tuple(x.shape)}, expected (N, 3, H, W)")
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


# ---------------------------------------------------------------------------------------------------------- peers' weights

# What the layers are called here, and in the peers' files their convolution and their batch normalisation, where there is one.
# {n} counts 1, 2; {m} the same from 0; {b} counts 1 to 3; {i} 0 to 2; {k} 0 to 3; {l} the same from 1.
_DOWN, _GLOBAL, _FUSION = "learning_to_downsample", "global_feature_extractor", "feature_fusion"
_PEERS = {
    "tramac": (
        (f"{_DOWN}.conv", f"{_DOWN}.conv.conv.0", f"{_DOWN}.conv.conv.1"),
        (f"{_DOWN}.dsconv{{n}}.depthwise", f"{_DOWN}.dsconv{{n}}.conv.0", f"{_DOWN}.dsconv{{n}}.conv.1"),
        (f"{_DOWN}.dsconv{{n}}.pointwise", f"{_DOWN}.dsconv{{n}}.conv.3", f"{_DOWN}.dsconv{{n}}.conv.4"),
        *(
            (
                f"{_GLOBAL}.bottleneck{{b}}.{{i}}.{layer}",
                *(f"{_GLOBAL}.bottleneck{{b}}.{{i}}.block.{at}" for at in places),
            )
            for layer, places in (
                ("expand", ("0.conv.0", "0.conv.1")),
                ("depthwise", ("1.conv.0", "1.conv.1")),
                ("project", "23"),
            )
        ),
        (
            f"{_GLOBAL}.pyramid_pooling.reduce.{{k}}",
            f"{_GLOBAL}.ppm.conv{{l}}.conv.0",
            f"{_GLOBAL}.ppm.conv{{l}}.conv.1",
        ),
        (f"{_GLOBAL}.pyramid_pooling.project", f"{_GLOBAL}.ppm.out.conv.0", f"{_GLOBAL}.ppm.out.conv.1"),
        (f"{_FUSION}.depthwise", f"{_FUSION}.dwconv.conv.0", f"{_FUSION}.dwconv.conv.1"),
        (f"{_FUSION}.context", f"{_FUSION}.conv_lower_res.0", f"{_FUSION}.conv_lower_res.1"),
        (f"{_FUSION}.detail", f"{_FUSION}.conv_higher_res.0", f"{_FUSION}.conv_higher_res.1"),
        ("classifier.dsconv{n}.depthwise", "classifier.dsconv{n}.conv.0", "classifier.dsconv{n}.conv.1"),
        ("classifier.dsconv{n}.pointwise", "classifier.dsconv{n}.conv.3", "classifier.dsconv{n}.conv.4"),
        ("classifier", "classifier.conv.1", None),
        ("aux_detail.hidden", "auxlayer.0", "auxlayer.1"),
        ("aux_detail", "auxlayer.4", None),
    ),
    "segmentron": (
        (f"{_DOWN}.conv", f"{_DOWN}.conv.conv", f"{_DOWN}.conv.bn"),
        (
            f"{_DOWN}.dsconv{{n}}.depthwise",
            f"{_DOWN}.dsconv{{n}}.block.depthwise",
            f"{_DOWN}.dsconv{{n}}.block.bn_depth",
        ),
        (
            f"{_DOWN}.dsconv{{n}}.pointwise",
            f"{_DOWN}.dsconv{{n}}.block.pointwise",
            f"{_DOWN}.dsconv{{n}}.block.bn_point",
        ),
        *(
            (
                f"{_GLOBAL}.bottleneck{{b}}.{{i}}.{layer}",
                *(f"{_GLOBAL}.bottleneck{{b}}.{{i}}.conv.{at}" for at in places),
            )
            for layer, places in (("expand", ("0.conv", "0.bn")), ("depthwise", ("1.conv", "1.bn")), ("project", "23"))
        ),
        (f"{_GLOBAL}.pyramid_pooling.reduce.{{k}}", f"{_GLOBAL}.ppm.convs.{{k}}.conv", f"{_GLOBAL}.ppm.convs.{{k}}.bn"),
        (f"{_GLOBAL}.pyramid_pooling.project", f"{_GLOBAL}.out.conv", f"{_GLOBAL}.out.bn"),
        (f"{_FUSION}.depthwise", f"{_FUSION}.dwconv.conv", f"{_FUSION}.dwconv.bn"),
        (f"{_FUSION}.context", f"{_FUSION}.conv_lower_res.0", f"{_FUSION}.conv_lower_res.1"),
        (f"{_FUSION}.detail", f"{_FUSION}.conv_higher_res.0", f"{_FUSION}.conv_higher_res.1"),
        (
            "classifier.dsconv{n}.depthwise",
            "classifier.dsconv{n}.block.depthwise",
            "classifier.dsconv{n}.block.bn_depth",
        ),
        (
            "classifier.dsconv{n}.pointwise",
            "classifier.dsconv{n}.block.pointwise",
            "classifier.dsconv{n}.block.bn_point",
        ),
        ("classifier", "classifier.conv.1", None),
        ("aux_detail.hidden", "auxlayer1.0", "auxlayer1.1"),
        ("aux_detail", "auxlayer1.4", None),
        ("aux_context.hidden", "auxlayer2.0", "auxlayer2.1"),
        ("aux_context", "auxlayer2.4", None),
    ),
    "mmseg": (
        *(
            (ours, f"{theirs}.conv", f"{theirs}.bn")
            for ours, theirs in (
                (f"{_DOWN}.conv", f"backbone.{_DOWN}.conv"),
                (f"{_DOWN}.dsconv{{n}}.depthwise", f"backbone.{_DOWN}.dsconv{{n}}.depthwise_conv"),
                (f"{_DOWN}.dsconv{{n}}.pointwise", f"backbone.{_DOWN}.dsconv{{n}}.pointwise_conv"),
                (f"{_GLOBAL}.bottleneck{{b}}.{{i}}.expand", f"backbone.{_GLOBAL}.bottleneck{{b}}.{{i}}.conv.0"),
                (f"{_GLOBAL}.bottleneck{{b}}.{{i}}.depthwise", f"backbone.{_GLOBAL}.bottleneck{{b}}.{{i}}.conv.1"),
                (f"{_GLOBAL}.bottleneck{{b}}.{{i}}.project", f"backbone.{_GLOBAL}.bottleneck{{b}}.{{i}}.conv.2"),
                (f"{_GLOBAL}.pyramid_pooling.reduce.{{k}}", f"backbone.{_GLOBAL}.ppm.{{k}}.1"),
                (f"{_GLOBAL}.pyramid_pooling.project", f"backbone.{_GLOBAL}.out"),
                (f"{_FUSION}.depthwise", f"backbone.{_FUSION}.dwconv"),
                (f"{_FUSION}.context", f"backbone.{_FUSION}.conv_lower_res"),
                (f"{_FUSION}.detail", f"backbone.{_FUSION}.conv_higher_res"),
                ("classifier.dsconv{n}.depthwise", "decode_head.convs.{m}.depthwise_conv"),
                ("classifier.dsconv{n}.pointwise", "decode_head.convs.{m}.pointwise_conv"),
                ("aux_context.hidden", "auxiliary_head.0.convs.0"),
                ("aux_detail.hidden", "auxiliary_head.1.convs.0"),
            )
        ),
        ("classifier", "decode_head.conv_seg", None),
        ("aux_context", "auxiliary_head.0.conv_seg", None),
        ("aux_detail", "auxiliary_head.1.conv_seg", None),
    ),
}
_PEERS["mmseg-old"] = _PEERS["mmseg"]


def peer_names(model: FastSCNN, variant: str) -> dict[str, str]:
    """What each entry of the network's state dict is called in the files of the peer that a variant is named after."""
    folders = {}
    for ours, conv, bn in _PEERS[variant]:
        for n, b, i, k in itertools.product((1, 2), (1, 2, 3), (0, 1, 2), (0, 1, 2, 3)):
            counts = {"n": n, "m": n - 1, "b": b, "i": i, "k": k, "l": k + 1}
            folders[f"{ours}.conv.".format(**counts)] = f"{conv}.".format(**counts)
            folders[f"{ours}.bn.".format(**counts)] = f"{bn}.".format(**counts)
    names = {}
    for name in model.state_dict():
        folder, _, kind = name.rpartition(".")
        names[name] = folders[f"{folder}."] + kind
    return names


def _from_peer(tensors: dict[str, Tensor], path: str | os.PathLike) -> dict:
    """A checkpoint as train.py saves it, out of a peer's state dict, recognised by its names and shapes.

    Raises:
        CheckpointError: names or shapes that are nobody's, or that do not all fit.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    fits = []
    for variant in _PEERS:
        with torch.device("meta"):
            whole = FastSCNN(1, variant=variant, aux=True)
        names = peer_names(whole, variant)
        shapes = {
            names[name]: tensor.shape[1:] for name, tensor in whole.state_dict().items()
        }  # whatever the class count
        fits.append((sum(name in tensors and tensors[name].shape[1:] == shapes[name] for name in shapes), variant))
    matching, variant = max(fits, key=lambda fit: fit[0])  # of equals the first
    if matching < 20:
        some = ", ".join(list(tensors)[:4])
        raise CheckpointError(
            f"{path}: holds {some or 'nothing'}, expected the entries model and model_args that train.py saves, or the weights "
            f"of {', '.join(_PEERS)}"
        )
    head = next((name for name in ("classifier.conv.1.weight", "decode_head.conv_seg.weight") if name in tensors), None)
    aux = any(name.startswith(("auxlayer", "auxiliary_head")) for name in tensors)
    args = {"num_classes": len(tensors[head]) if head else 1, "variant": variant, "aux": aux, "dropout": 0.1}
    with torch.device("meta"):
        model = FastSCNN(**args)
    names, state = peer_names(model, variant), {}
    missing, misshapen = [], []
    for name, empty in model.state_dict().items():
        theirs = tensors.get(names[name])
        if theirs is None and name.endswith((".conv.bias", ".num_batches_tracked")):
            theirs = torch.zeros(empty.shape, dtype=empty.dtype)  # without a bias is with one of 0
        if theirs is None:
            missing.append(names[name])
        elif theirs.shape != empty.shape:
            misshapen.append(f"{names[name]} {tuple(theirs.shape)}, expected {tuple(empty.shape)}")
        else:
            state[name] = theirs.to(empty.dtype)
    stray = sorted(tensors.keys() - set(names.values()))
    problems = (("lacks", missing), ("has other shapes:", misshapen), ("has besides", stray))
    text = "; ".join(
        f"{what} {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}" for what, keys in problems if keys
    )
    if text:
        raise CheckpointError(f"{path}: looks like weights of {variant}, but {text}; take another file")
    return {"model": state, "model_args": args}


# ------------------------------------------------------------------------------------------------------------ checkpoints


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dict that train.py saved at `path`, on the CPU, without unpickling code.

    Its checksums are right, `model` (and `trained`, where it is there) fits `model_args` and is finite, and the entries that
    train.py and eval.py read are of the types that they expect.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        CheckpointError: the file is truncated, damaged, not a checkpoint, or a checkpoint of something else.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would wait for who writes to it
            what = (
                "a folder; give the path of a .pth file in it"
                if stat.S_ISDIR(mode)
                else "no regular file; give a .pth file"
            )
            raise CheckpointError(f"{path}: is {what}")
        zipped = _check_archive(path)
        return _checked(torch.load(path, map_location="cpu", weights_only=True), zipped, path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such checkpoint; give the path of a .pth file that train.py wrote"
        ) from None
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # there is no kind of error that a damaged pickle cannot raise
        forbidden = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:  # weights are plain tensors and numbers
            raise CheckpointError(
                f"{path}: would run {forbidden[1]} when it is read, and was not; save its state dict alone"
            ) from error
        reason = (
            "not the plain tensors of a checkpoint" if isinstance(error, pickle.UnpicklingError) else f"{error!r:.100}"
        )
        reason = " ".join(reason.split())
        raise CheckpointError(f"{path}: damaged, truncated or no checkpoint ({reason}); take another file") from error


def _checked(checkpoint: object, zipped: bool, path: str | os.PathLike) -> dict:
    """What a file holds, if it is a checkpoint; one that is made of a peer's weights."""
    if isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys():
        if not zipped:
            raise CheckpointError(
                f"{path}: is in torch's old format, which has no checksums; save it again with torch.save"
            )
        _check_entries(checkpoint, path)
        return checkpoint
    for wrapping in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(wrapping), dict):
            checkpoint = checkpoint[wrapping]
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds {type(checkpoint).__name__}, expected a checkpoint or a state dict")
    tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    _check_tensors("it", tensors, path)
    return _from_peer(tensors, path)


def _check_archive(path: str | os.PathLike) -> bool:
    """Whether a file is a zip archive, as torch.save writes it; its checksums, which torch.load leaves out, are compared.

    Raises CheckpointError, and what zipfile raises, for one that is damaged or takes more memory than its own size.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > os.path.getsize(path):
            raise CheckpointError(f"{path}: is compressed, which torch.save never does; take another file")
        if len({entry.filename for entry in entries}) < len(entries):
            raise zipfile.BadZipFile("two entries of one name")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return True


def _check_tensors(what: str, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raises CheckpointError for a tensor that is not dense, or holds what is no finite number in float32."""
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
        # A tensor of strides 0 may be larger than the file that it came in.
        if not dense or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(
                f"{path}: {what} holds {name:.60}, which is no dense tensor of numbers; take another file"
            )
        finite = not tensor.is_floating_point() or tensor.float().isfinite().all()
        if not finite or (name.endswith("running_var") and (tensor < 0).any()):
            problem = "below 0" if finite else "no finite numbers"
            raise CheckpointError(f"{path}: {what} holds {name:.60} with values that are {problem}; take another file")


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_state(value: object) -> bool:
    return _is_dict(value) and all(isinstance(each, Tensor) for each in value.values())


def _are_classes(value: object) -> bool:
    """Whether a dict holds the fields of data.Classes."""
    if not _is_dict(value) or not all(isinstance(value.get(key), list) for key in ("names", "colours", "categories")):
        return False
    texts = [*value["names"], *value["categories"]]
    return (
        all(isinstance(text, str) and text.isprintable() for text in texts)
        and len(value["colours"]) == len(value["names"])
        and len(value["categories"]) in (0, len(value["names"]))
        and all(isinstance(colour, list) and len(colour) == 3 for colour in value["colours"])
        and all(type(level) is int and 0 <= level <= 255 for colour in value["colours"] for level in colour)
    )


def _is_optimizer_state(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    numbered = all(type(key) is int and _is_dict(each) for key, each in value["state"].items())
    return numbered and isinstance(value.get("param_groups"), list)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_tally(value: object) -> bool:
    """Whether a dict holds what train.py counts between two lines of its log."""
    if not _is_dict(value) or not _is_count(value.get("steps")):
        return False
    sums, skipped = value.get("loss_sums"), value.get("skipped")
    return (
        isinstance(sums, Tensor)
        and sums.ndim == 1
        and sums.is_floating_point()
        and isinstance(skipped, Tensor)
        and skipped.dtype == torch.int64
        and skipped.shape == (4,)
    )


def _is_scaler_state(value: object) -> bool:
    """Whether a dict is what torch.amp.GradScaler saves, which is nothing where it is off."""
    keys = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    return value == {} or (_is_dict(value) and value.keys() == keys and all(map(_is_number, value.values())))


def _are_flags(value: object) -> bool:
    """Whether a dict holds of train.py's flags those that resuming looks at."""
    texts = _is_dict(value) and isinstance(value.get("data"), str) and isinstance(value.get("amp", ""), str)
    return texts and _is_count(value.get("epochs")) and value["epochs"] > 0


# What each entry of a checkpoint has to be, in words and as a test; all but the first two may be missing.
_ENTRIES = {
    "model": ("a state dict", _is_state),
    "model_args": ("the arguments of FastSCNN", _is_dict),
    "trained": ("a state dict", _is_state),
    "classes": ("names, an RGB for each, and categories", _are_classes),
    "epoch": ("a number of epochs", _is_count),
    "steps": ("a number of steps", _is_count),
    "steps_per_epoch": ("a number of steps", lambda value: _is_count(value) and value > 0),
    "launches": ("names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
    "world_size": ("a number of processes", lambda value: _is_count(value) and value > 0),
    "tally": ("sums of losses and counts of steps", _is_tally),
    "optimizer": ("an optimiser's state", _is_optimizer_state),
    "scaler": ("the state of a GradScaler", _is_scaler_state),
    "best_miou": ("a number", _is_number),
    "validated": ("true or false", lambda value: isinstance(value, bool)),
    "args": ("the flags of a training run", _are_flags),
}


def _check_entries(checkpoint: dict, path: str | os.PathLike) -> None:
    """Raises CheckpointError where an own checkpoint holds what nobody saved there."""
    for name, (expected, fits) in _ENTRIES.items():
        if name in checkpoint and not fits(checkpoint[name]):
            raise CheckpointError(
                f"{path}: entry {name} of type {type(checkpoint[name]).__name__}, expected {expected}; take another file"
            )
    if checkpoint.get("steps", 0) and checkpoint["steps"] >= checkpoint.get("steps_per_epoch", 0):
        raise CheckpointError(
            f"{path}: has done {checkpoint['steps']} steps of an epoch, more than it has; take another file"
        )
    args, classes = checkpoint["model_args"], checkpoint.get("classes")
    types = {"num_classes": int, "variant": str, "aux": bool, "dropout": float}
    for name, value in args.items():
        if name in types and type(value) is not types[name] and not (name == "dropout" and type(value) is int):
            kind = f"{type(value).__name__}, expected {types[name].__name__}"
            raise CheckpointError(f"{path}: does not fit this network ({name} is of type {kind}); take another file")

    def kind(tensor: Tensor) -> tuple:
        return tuple(tensor.shape), tensor.is_floating_point()

    states = [checkpoint["model"], *([checkpoint["trained"]] if "trained" in checkpoint else [])]
    for state in states:
        _check_tensors("the network", state, path)
        try:
            with torch.device("meta"):  # sizes alone: whatever model_args say, nothing larger than the file is made
                wanted = {name: kind(tensor) for name, tensor in FastSCNN(**args).state_dict().items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise _misfit(error, path) from error
        differing = [name for name in {**wanted, **state} if name not in state or wanted.get(name) != kind(state[name])]
        if differing:
            raise _misfit(f"{len(differing)} entries differ, such as {differing[0]:.60}", path)
    count = len(checkpoint["model"]["classifier.conv.bias"])
    if classes is not None and len(classes["names"]) != count:
        raise CheckpointError(
            f"{path}: names {len(classes['names'])} classes, but its network has {count}; take another file"
        )
    for each in checkpoint.get("optimizer", {}).get("state", {}).values():
        _check_tensors(
            "the optimiser", {name: value for name, value in each.items() if isinstance(value, Tensor)}, path
        )


def _misfit(error: Exception | str, path: str | os.PathLike) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path}: does not fit this network ({reason[:200]}); take another file")


def load_weights(path: str | os.PathLike, num_classes: int | None = None, *, new_head: bool = False) -> FastSCNN:
    """The trained network of a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: a file that train.py wrote, numbered or best_model.pth, or one of Tramac/Fast-SCNN-pytorch, SegmenTron (and
            Ascend/ModelZoo-PyTorch) or MMSegmentation, which are recognised by their names and shapes.
        num_classes: the class count that the caller needs; None takes the checkpoint's.
        new_head: where the checkpoint has another class count, begin the layers that give the classes anew.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, is damaged, or has another class count.
    """
    return build_from_checkpoint(read_checkpoint(path), path, num_classes, new_head=new_head)


def build_from_checkpoint(
    checkpoint: dict, path: str | os.PathLike, num_classes: int | None = None, *, new_head: bool = False
) -> FastSCNN:
    """`load_weights` for a checkpoint already read; `path` is named in errors."""
    try:
        model = FastSCNN(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise _misfit(error, path) from error
    found = model.args["num_classes"]
    if num_classes is not None and found != num_classes:
        if not new_head:
            raise CheckpointError(
                f"{path}: has {found} classes, expected {num_classes}; choose the dataset that it was trained on, or train anew"
            )
        model = FastSCNN(**{**model.args, "num_classes": num_classes})
        heads = ("classifier.conv.", "aux_detail.conv.", "aux_context.conv.")
        model.load_state_dict({k: v for k, v in checkpoint["model"].items() if not k.startswith(heads)}, strict=False)
    return model.eval()


def save_for_peer(model: FastSCNN, path: str | os.PathLike, variant: str) -> None:
    """Writes the weights as a state dict with the names of another project.

    Args:
        model: a network of that very variant: no other computes the same there.
        path: the file.
        variant: one of VARIANTS but "paper".

    Raises:
        ValueError: the network is of another variant.
    """
    own = model.args["variant"]
    if variant not in _PEERS or variant != own:
        raise ValueError(
            f"a network of variant {own!r} cannot be saved as {variant!r}: there it would compute something else"
        )
    names = peer_names(model, variant)
    torch.save({names[name]: tensor for name, tensor in model.state_dict().items()}, path)
