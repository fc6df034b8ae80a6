"""VGG16-BN on CIFAR-10 in the form the pruning literature uses (14,991,946 parameters)."""

from pathlib import Path

from torch import nn
from torchvision.models import vgg16_bn

from moodistill.data.cifar10 import load_cifar10
from moodistill.teacher.task import Task, TrainConfig


def build() -> nn.Module:
    """torchvision's features, then 512 -> 512 -> BN -> ReLU -> 10."""
    model = vgg16_bn(num_classes=10)
    # Rounding up changes nothing at 32x32; it lets the teacher train on smaller images first.
    model.features[43].ceil_mode = True
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 10)
    )
    return model


TASK = Task(
    name="vgg16",
    build=build,
    load_data=load_cifar10,
    weights=Path(__file__).parent / "teachers" / "vgg16_cifar10.safetensors",
    train=TrainConfig(phases=((6, 20), (8, 24), (16, 32)), batch_size=500, pad=4, cutout=8),
)
