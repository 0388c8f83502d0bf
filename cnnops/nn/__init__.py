"""Modules made of cnnops' ops: torch's own arguments, state_dict keys and results, and the fused ones of ours."""

from cnnops.nn.blocks import ConvBNAct, conv_bn
from cnnops.nn.conv import Conv2d, Conv2dAct, DepthwiseConv2d
from cnnops.nn.norm import BatchNorm2d, BatchNormAct2d
from cnnops.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "Conv2d",
    "Conv2dAct",
    "ConvBNAct",
    "DepthwiseConv2d",
    "MaxPool2d",
    "conv_bn",
]
