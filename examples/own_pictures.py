"""Your own network and your own images, from Python: about three minutes on two cores.

python examples/own_pictures.py --out results/own

Writes scikit-learn's digits as PNG files, one folder a class, trains a small CNN on them, searches
for smaller ones, chooses one and exports it. Put your folder and your trained network in place.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import moodistill
from moodistill.data.folders import load_image_folder


def write_pictures(folder: Path) -> None:
    """`folder/<digit>/<number>.png`, 16x16 grey pixels."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(image / 16.0 * 255.0, np.ones((2, 2))).astype(np.uint8)
        Image.fromarray(pixels).save(path)


def network() -> nn.Module:
    """Any CNN that torch.fx can trace."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Plain SGD; yours is trained already."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/own"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--distill-steps", type=int, default=100)
    arguments = parser.parse_args()
    pictures = arguments.out.with_name(f"{arguments.out.name}-pictures")
    write_pictures(pictures)
    data = load_image_folder(pictures, size=(16, 16), channels=1)

    torch.manual_seed(0)
    teacher = network()
    labels = torch.from_numpy(data.train.labels)
    train(teacher, data.normalise(data.train.images), labels, arguments.epochs)

    run = moodistill.search(
        teacher.eval(), data, out=arguments.out, population=16, generations=arguments.generations,
        distill_steps=arguments.distill_steps,
        flip=False,  # a mirrored digit is none
    )  # fmt: skip
    student = run.choose(knee=True)
    print(f"\n{student.row.student}: {student.reason}")
    smaller = student.to_torch()
    print(f"as a torch module: {sum(p.numel() for p in smaller.parameters()):,} parameters")
    print(f"exported: {student.export(arguments.out.with_name(arguments.out.name + '-student'))}")


if __name__ == "__main__":
    main()
