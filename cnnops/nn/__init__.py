"""Modules made of cnnops' ops: torch's own arguments, state_dict keys and results, and the fused ones of ours."""

from cnnops.nn.blocks import ConvBNAct
from cnnops.nn.conv import Conv2d, Conv2dAct
from cnnops.nn.norm import BatchNorm2d, BatchNormAct2d, BatchNormActMaxPool2d
from cnnops.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from cnnops.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "BatchNormActMaxPool2d",
    "Conv2d",
    "Conv2dAct",
    "ConvBNAct",
    "MaxPool2d",
    "SqueezeExcite",
]
