"""Fast-SCNN: Fast Semantic Segmentation Network (Poudel, Liwicki, Cipolla, 2019, arXiv 1902.04502).

    model = FastSCNN(num_classes=19).eval()
    logits = model(images)              # (N, 3, H, W) normalised RGB -> (N, 19, H, W), any H, W >= 32

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

import os
import pickle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = ("paper",)
MIN_SIZE = 32  # pixels; the smallest side that still leaves one pixel at 1/32 of the resolution


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this network, or not one that fits; the message names the file and a remedy."""


# ---------------------------------------------------------------------------------------------------------------- layers


class ConvBN(nn.Sequential):
    """Convolution, batch normalisation, and ReLU unless `relu=False`. Padding keeps ceil(size / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        relu: bool = True,
    ):
        padding = dilation * (kernel_size // 2)
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        if relu:
            self.relu = nn.ReLU(inplace=True)


class DSConv(nn.Sequential):
    """Depthwise separable convolution (section 3.1): the non-linearity between its two convolutions is left out."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 3, stride, groups=in_channels, relu=False)
        self.pointwise = ConvBN(in_channels, out_channels)


class Bottleneck(nn.Module):
    """Inverted residual of MobileNetV2 (table 2): expand by t, depthwise 3x3, project without a non-linearity."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 6):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = ConvBN(in_channels, hidden)
        self.depthwise = ConvBN(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvBN(hidden, out_channels, relu=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def pooling_matrix(size: int, bins: tuple[int, ...], like: Tensor) -> Tensor:
    """(sum(bins), size) matrix whose rows average the cells that `F.adaptive_avg_pool1d` averages, for each of `bins`.

    Row i of n bins has the weight 1 / length on the half-open range [floor(i size / n), ceil((i + 1) size / n)).
    """
    position = torch.arange(size, device=like.device)
    row = torch.cat([torch.arange(n, device=like.device) for n in bins])
    count = torch.cat([torch.full((n,), n, device=like.device) for n in bins])
    start = row * size // count
    end = -(-(row + 1) * size // count)  # ceil
    member = (position >= start[:, None]) & (position < end[:, None])
    return member.to(like.dtype) / (end - start)[:, None]


class PyramidPooling(nn.Module):
    """Pyramid pooling of PSPNet: the input beside its averages over 1, 2, 3 and 6 bins, then a 1x1 convolution.

    The averages equal `F.adaptive_avg_pool2d`. They are taken for all bins at once by two small matrix products, which,
    unlike adaptive pooling, export to ONNX and other runtimes at any input size.
    """

    bins = (1, 2, 3, 6)

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.reduce = nn.ModuleList(ConvBN(in_channels, in_channels // len(self.bins)) for _ in self.bins)
        self.project = ConvBN(in_channels * 2, out_channels)

    def pool(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> one (N, C, n, n) per n of `bins`."""
        rows = pooling_matrix(x.shape[-2], self.bins, x)
        columns = pooling_matrix(x.shape[-1], self.bins, x)
        pooled = rows @ x @ columns.T  # (N, C, 12, 12); the pyramid's levels are the blocks on its diagonal
        levels, start = [], 0
        for n in self.bins:
            levels.append(pooled[..., start : start + n, start : start + n])
            start += n
        return levels

    def forward(self, x: Tensor) -> Tensor:
        levels = [resize(reduce(level), x) for reduce, level in zip(self.reduce, self.pool(x))]
        return self.project(torch.cat([x, *levels], dim=1))


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear resizing of (N, C, h, w) to the height and width of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


# -------------------------------------------------------------------------------------------------------- the four stages


class LearningToDownsample(nn.Module):
    """Section 3.2.1: three layers of stride 2. (N, 3, H, W) -> (N, 64, H/8, W/8)."""

    def __init__(self):
        super().__init__()
        self.conv = ConvBN(3, 32, 3, stride=2)
        self.dsconv1 = DSConv(32, 48, stride=2)
        self.dsconv2 = DSConv(48, 64, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dsconv2(self.dsconv1(self.conv(x)))


class GlobalFeatureExtractor(nn.Module):
    """Section 3.2.2: bottlenecks and pyramid pooling. (N, 64, H/8, W/8) -> (N, 128, H/32, W/32)."""

    def __init__(self):
        super().__init__()
        self.bottleneck1 = self._stage(64, 64, stride=2)
        self.bottleneck2 = self._stage(64, 96, stride=2)
        self.bottleneck3 = self._stage(96, 128, stride=1)
        self.pyramid_pooling = PyramidPooling(128, 128)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, repeats: int = 3) -> nn.Sequential:
        first = Bottleneck(in_channels, out_channels, stride)
        return nn.Sequential(first, *(Bottleneck(out_channels, out_channels) for _ in range(repeats - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.pyramid_pooling(self.bottleneck3(self.bottleneck2(self.bottleneck1(x))))


class FeatureFusion(nn.Module):
    """Section 3.2.3, table 3: detail (N, 64, H/8, W/8) + context (N, 128, H/32, W/32) -> (N, 128, H/8, W/8)."""

    def __init__(self, detail_channels: int = 64, context_channels: int = 128, out_channels: int = 128):
        super().__init__()
        # The dilation is the factor between the two resolutions, as the table has it.
        self.depthwise = ConvBN(context_channels, context_channels, 3, groups=context_channels, dilation=4)
        self.context = ConvBN(context_channels, out_channels, relu=False)
        self.detail = ConvBN(detail_channels, out_channels, relu=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        context = self.context(self._spread(resize(context, detail)))
        return F.relu(self.detail(detail) + context)

    def _spread(self, context: Tensor) -> Tensor:
        if context.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
            # oneDNN's bfloat16 gradient of a dilated depthwise kernel is wrong, at times NaN (seen in its 3.13 on AVX-512),
            # and slower than the float32 one.
            with torch.autocast("cpu", enabled=False):
                return self.depthwise(context.float())
        return self.depthwise(context)


class Classifier(nn.Module):
    """Section 3.2.4: two DSConv, dropout before the last layer, one score per class. Softmax is left to the loss."""

    def __init__(self, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.dsconv1 = DSConv(channels, channels)
        self.dsconv2 = DSConv(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dropout(self.dsconv2(self.dsconv1(x))))


class AuxiliaryHead(nn.Sequential):
    """A small classifier on inner features, for training alone (section 4.1: auxiliary losses of weight 0.4)."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float, hidden: int = 32):
        super().__init__()
        self.hidden = ConvBN(in_channels, hidden, 3)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(hidden, num_classes, 1)


# ------------------------------------------------------------------------------------------------------------ the network


class FastSCNN(nn.Module):
    """Fast-SCNN (table 1).

    Args:
        num_classes: number of classes, each one output channel.
        variant: one of VARIANTS; "paper" is the network of the paper's tables.
        aux: also build the two auxiliary heads, on the outputs of learning to downsample (1/8) and of the global
            feature extractor (1/32).
        dropout: probability before the last layer of each head.
    """

    def __init__(self, num_classes: int = 19, *, variant: str = "paper", aux: bool = False, dropout: float = 0.1):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, expected at least 1")
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        self.args = {"num_classes": num_classes, "variant": variant, "aux": aux, "dropout": dropout}
        self.learning_to_downsample = LearningToDownsample()
        self.global_feature_extractor = GlobalFeatureExtractor()
        self.feature_fusion = FeatureFusion()
        self.classifier = Classifier(128, num_classes, dropout)
        self.aux_detail = AuxiliaryHead(64, num_classes, dropout) if aux else None
        self.aux_context = AuxiliaryHead(128, num_classes, dropout) if aux else None

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Class scores of a batch of images.

        Args:
            x: (N, 3, H, W) floating point RGB, normalised; H, W >= 32, no multiple of anything.
            upsample: scores at the input's resolution, or at the network's own.

        Returns:
            (N, num_classes, H, W) logits, or (N, num_classes, ceil(H/8), ceil(W/8)) with `upsample=False`.
            In training mode with aux=True a tuple (main, auxiliary at 1/8, auxiliary at 1/32), each upsampled likewise.

        Raises:
            ValueError: the input is not (N, 3, H, W), or smaller than 32 pixels.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"input has shape {tuple(x.shape)}, expected (N, 3, H, W)")
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(
                f"input is {x.shape[2]}x{x.shape[3]} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}: pad or enlarge it"
            )
        detail = self.learning_to_downsample(x)  # (N, 64, H/8, W/8)
        context = self.global_feature_extractor(detail)  # (N, 128, H/32, W/32)
        outputs = [self.classifier(self.feature_fusion(detail, context))]  # (N, num_classes, H/8, W/8)
        if self.training and self.aux_detail is not None:
            outputs += [self.aux_detail(detail), self.aux_context(context)]
        if upsample:
            outputs = [resize(output, x) for output in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ------------------------------------------------------------------------------------------------------------ checkpoints


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dict that train.py saved at `path`, on the CPU, without unpickling code.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, not a checkpoint, or a checkpoint of something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .pth file that train.py wrote") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder; give the path of a .pth file in it") from None
    except PermissionError:
        raise
    except Exception as error:  # there is no kind of error that a damaged pickle cannot raise
        reason = "not the plain tensors of a checkpoint" if isinstance(error, pickle.UnpicklingError) else f"{error!r:.100}"
        reason = " ".join(reason.split())
        raise CheckpointError(f"{path}: truncated or no checkpoint ({reason}); take another file") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        found = ", ".join(map(str, list(checkpoint)[:4])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(
            f"{path}: holds {found or 'nothing'}, expected the entries model and model_args that train.py saves"
        )
    return checkpoint


def load_weights(path: str | os.PathLike, num_classes: int | None = None) -> FastSCNN:
    """The trained network of a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: a file that train.py wrote, numbered or best_model.pth.
        num_classes: the class count that the caller needs; None takes the checkpoint's.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, is damaged, or has another class count.
    """
    return build_from_checkpoint(read_checkpoint(path), path, num_classes)


def build_from_checkpoint(checkpoint: dict, path: str | os.PathLike, num_classes: int | None = None) -> FastSCNN:
    """`load_weights` for a checkpoint already read; `path` is named in errors."""
    try:
        model = FastSCNN(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit this network ({reason[:200]}); take another file") from error
    found = model.args["num_classes"]
    if num_classes is not None and found != num_classes:
        raise CheckpointError(
            f"{path}: has {found} classes, expected {num_classes}; choose the dataset that it was trained on, or train anew"
        )
    return model.eval()
