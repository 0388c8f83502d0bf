"""Networks made of cnnops' modules, and the same networks made of torch's."""

from cnnops.models import torch_layers
from cnnops.models.registry import Layers, create_model, list_models, register_model
from cnnops.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50
from cnnops.models.simple_cnn import SimpleCNN, simple_cnn

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Layers",
    "ResNet",
    "SimpleCNN",
    "create_model",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "simple_cnn",
    "torch_layers",
]
