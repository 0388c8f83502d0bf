"""The registered ops, ``torch.ops.cnnops.*``: schema, fake function and gradient of each."""

from . import batch_norm, conv2d, conv2d_act, conv_transpose2d, pool2d

__all__ = ["batch_norm", "conv2d", "conv2d_act", "conv_transpose2d", "pool2d"]
