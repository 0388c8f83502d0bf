"""Networks made of cnnops' modules, and the same networks made of torch's."""

from cnnops.models import torch_layers
from cnnops.models.registry import Layers, create_model, list_models, register_model
from cnnops.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    torchvision_state_dict,
)
from cnnops.models.simple_cnn import SimpleCNN, simple_cnn
from cnnops.models.vgg_style import VGGStyleCNN, vgg_style

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Layers",
    "ResNet",
    "SimpleCNN",
    "VGGStyleCNN",
    "create_model",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "simple_cnn",
    "torch_layers",
    "torchvision_state_dict",
    "vgg_style",
]
