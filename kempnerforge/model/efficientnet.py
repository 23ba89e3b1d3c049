"""EfficientNet-Lite0 as a vision encoder: a convolutional network whose last feature map is read as a
sequence, one token per cell.

Lite0 (github.com/tensorflow/tpu, models/official/efficientnet/lite) is EfficientNet-B0 (Tan and Le 2019,
table 1) without squeeze-and-excitation and with ReLU6, so nothing in it looks further than its convolutions.

Shapes: N images, H x H pixels, C channels, F cells of the last map.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kempnerforge.config import registry
from kempnerforge.config.vision import EfficientNetLite0Config
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import regular

STEM, HEAD = 32, 1280
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""Blocks, kernel, stride of the first, expansion, channels (Tan and Le 2019, table 1)."""
BATCH_NORM_EPS = 1e-3
CLASSIFIER = ("_fc.weight", "_fc.bias")


class Conv(nn.Conv2d):
    """A convolution with bias whose output has ``ceil(size / stride)`` cells a side: TensorFlow's "same"
    padding, one more at the end when it is odd. What batch normalisation did after it in training is part of
    its weights.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__(channels, out, kernel, stride, groups=channels if depthwise else 1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, H) -> (N, C', ceil(H / stride), ceil(H / stride))."""
        kernel, stride, size = self.kernel_size[0], self.stride[0], input.shape[-1]
        padding = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        return super().forward(F.pad(input, [padding // 2, padding - padding // 2] * 2))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow again (Sandler et al. 2018, figure 4b); the input is added where the
    shape stays.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = Conv(channels, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, depthwise=True)
        self.project = Conv(wide, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, H) -> (N, C', H / stride, H / stride)."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(wide)))
        return x + y if self.residual else y


@registry.register_vision_encoder("efficientnet_lite0")
class EfficientNetLite0(VisionEncoder):
    """The network up to its last feature map of 1280 channels, (H / 32) x (H / 32) cells: 49 tokens at 224
    pixels. The classifier is left out.

    Raises:
        ValueError: the weights cannot be read or are not of this network.
    """

    def __init__(self, cfg: EfficientNetLite0Config) -> None:
        super().__init__(num_tokens=cfg.num_tokens(), dim=HEAD, image_size=cfg.image_size, mean=cfg.mean, std=cfg.std)
        self.stem = Conv(3, STEM, 3, stride=2)
        blocks, channels = [], STEM
        for count, kernel, stride, expansion, out in STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(channels, out, kernel, stride if index == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = Conv(channels, HEAD, 1)
        if cfg.pretrained and torch.get_default_device().type != "meta":
            self.load_state_dict(_read(Path(cfg.path), self.state_dict()))

    def check_files(self, cfg: EfficientNetLite0Config) -> None:
        if cfg.pretrained:
            _read(Path(cfg.path), self.state_dict())

    @property
    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) uint8 -> (N, F, 1280), row by row."""
        x = F.relu6(self.stem(self.normalise(images)))  # (N, 32, H / 2, H / 2)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).flatten(2).transpose(1, 2)  # (N, 1280, H / 32, H / 32) -> (N, F, 1280)


def published_names() -> dict[str, tuple[str, str]]:
    """Each of our convolutions -> the convolution of the published network, and the batch normalisation after
    it.
    """
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
    for index in range(sum(stage[0] for stage in STAGES)):
        block = f"_blocks.{index}."
        names |= {
            f"blocks.{index}.{part}": (block + conv, block + norm) for part, (conv, norm) in parts.items() if index or part != "expand"
        }
    return names


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights from a safetensors file of the published ones: each batch normalisation is folded into the
    convolution before it (Jacob et al. 2018, section 3.2, eq. 14).
    """
    try:
        published = load_file(regular(path, "path"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"path = {str(path)!r}: cannot be read; {error}; kempnerforge data fetch efficientnet-lite0 makes it") from None
    names = published_names()
    expected = {f"{conv}.weight" for conv, _ in names.values()}
    expected |= {f"{norm}.{part}" for _, norm in names.values() for part in ("weight", "bias", "running_mean", "running_var")}
    found = {name for name in published if not name.endswith("num_batches_tracked") and name not in CLASSIFIER}
    if different := sorted(found ^ expected):
        raise InputError(f"path = {str(path)!r}: is no EfficientNet-Lite0; {', '.join(different[:4])} missing or unknown")
    tensors = {}
    for name, (conv, norm) in names.items():
        scale = published[f"{norm}.weight"] * (published[f"{norm}.running_var"] + BATCH_NORM_EPS).rsqrt()  # (C,)
        weight = published[f"{conv}.weight"]
        if weight.shape != wanted[f"{name}.weight"].shape:
            raise InputError(f"path = {str(path)!r}: {conv}.weight is {tuple(weight.shape)}, not {tuple(wanted[f'{name}.weight'].shape)}")
        tensors[f"{name}.weight"] = weight * scale[:, None, None, None]
        tensors[f"{name}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale
    return tensors
