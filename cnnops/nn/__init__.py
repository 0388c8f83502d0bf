"""Modules made of cnnops' ops: torch's own arguments, state_dict keys and results, and the fused ones of ours."""

from cnnops.nn.blocks import ConvBNAct, conv_bn
from cnnops.nn.conv import Conv2d, Conv2dAct, ConvTranspose2d, DepthwiseConv2d
from cnnops.nn.norm import BatchNorm2d, BatchNormAct2d, BatchNormActMaxPool2d
from cnnops.nn.pool import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d, MaxUnpool2d
from cnnops.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "BatchNormActMaxPool2d",
    "Conv2d",
    "Conv2dAct",
    "ConvBNAct",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "MaxPool2d",
    "MaxUnpool2d",
    "SqueezeExcite",
    "conv_bn",
]
