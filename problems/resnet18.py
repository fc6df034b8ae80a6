"""ResNet18 on CIFAR-10 with the usual 3x3 stem and no first pooling (11,173,962 parameters)."""

from pathlib import Path

from torch import nn
from torchvision.models import resnet18

from moodistill.data.cifar10 import load_cifar10
from moodistill.teacher.task import Task, TrainConfig


def build() -> nn.Module:
    """torchvision's ResNet18 with a stem for 32x32 images."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


TASK = Task(
    name="resnet18",
    build=build,
    load_data=load_cifar10,
    weights=Path(__file__).parent / "teachers" / "resnet18_cifar10.safetensors",
    train=TrainConfig(phases=((4, 16), (6, 24), (12, 32)), batch_size=500, pad=4, cutout=8),
)
