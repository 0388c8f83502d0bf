"""The registered ops, ``torch.ops.cnnops.*``: schema, fake function and gradient of each."""

from . import (
    batch_norm,
    bn_act_max_pool2d,
    conv2d,
    conv2d_act,
    conv2d_bn_act,
    conv_transpose2d,
    max_unpool2d,
    pool2d,
    squeeze_excite,
)

__all__ = [
    "batch_norm",
    "bn_act_max_pool2d",
    "conv2d",
    "conv2d_act",
    "conv2d_bn_act",
    "conv_transpose2d",
    "max_unpool2d",
    "pool2d",
    "squeeze_excite",
]
