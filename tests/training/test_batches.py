"""What a teacher sees: shifted, mirrored in every other epoch, painted over."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moodistill.teacher.task import TrainConfig
from moodistill.training.augment import alternating_flips, augment, cutout
from moodistill.training.batches import TrainBatches


def test_augment_shifts_and_flips_whole_images():
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    moved = augment(images, 2, True, np.random.default_rng(1))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    for image, big in zip(moved, padded, strict=True):
        crops = [big[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)
    assert not np.array_equal(moved, images)
    assert np.array_equal(augment(images, 0, False, np.random.default_rng(1)), images)


def test_an_array_says_which_are_mirrored():
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    which = np.array([True, False, False, True, True, False])
    found = augment(images, 0, which, np.random.default_rng(1))
    assert np.array_equal(found[which], images[which, :, ::-1])
    assert np.array_equal(found[~which], images[~which])


def test_two_epochs_show_every_picture_in_both_forms():
    epochs = [alternating_flips(1000, epoch, 3) for epoch in range(4)]
    assert np.array_equal(epochs[0], ~epochs[1])
    assert np.array_equal(epochs[0], epochs[2]) and np.array_equal(epochs[1], epochs[3])
    assert 430 < epochs[0].sum() < 570
    assert not np.array_equal(epochs[0], alternating_flips(1000, 0, 4))


@pytest.mark.parametrize("size", [1, 4, 5, 8])
def test_cutout_paints_one_square(size):
    images = np.zeros((2000, 9, 12, 3), np.uint8)
    colour = np.array([9, 8, 7], np.uint8)
    painted = cutout(images, size, colour, np.random.default_rng(0))
    where = (painted == colour).all(3)
    assert np.array_equal(where, (painted != 0).any(3))
    heights, widths = where.any(2).sum(1), where.any(1).sum(1)
    assert np.array_equal(where.sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == size
    # Centres lie anywhere in the image, so squares are cut off at the border, at most by half.
    assert heights.min() >= size // 2
    assert where.mean(0).min() > 0


def test_batches_of_the_recipe(random_images):
    """The same arithmetic written out, image by image."""
    data = replace(random_images, mean=(0.4914, 0.4822, 0.4465))
    config = TrainConfig(phases=((2, 32),), batch_size=32, pad=4, cutout=8, seed=5)
    batches = TrainBatches(data, config)
    assert (batches.steps, batches.steps_per_epoch) == (6, 3)
    assert batches.fill.tolist() == [125, 123, 114]
    for step in (1, 5):
        epoch, place = divmod(step, 3)
        order = np.random.default_rng([5, epoch]).permutation(96)[32 * place : 32 * place + 32]
        first = np.random.default_rng([5, 7]).random(96) < 0.5
        rng = np.random.default_rng([5, epoch, place])
        shifts = rng.integers(0, 9, size=(2, 32, 1))
        corners = [rng.integers(-4, 28, size=(32, 1)) for _ in range(2)]
        expected = []
        for i, picture in enumerate(order):
            image = np.pad(data.train.images[picture], ((4, 4), (4, 4), (0, 0)), mode="reflect")
            y, x = shifts[0, i, 0], shifts[1, i, 0]
            image = image[y : y + 32, x : x + 32].copy()
            if first[picture] != (epoch == 1):
                image = image[:, ::-1].copy()
            y, x = corners[0][i, 0], corners[1][i, 0]
            image[max(0, y) : y + 8, max(0, x) : x + 8] = [125, 123, 114]
            expected.append(image)
        images, labels = batches.batch(step)
        assert torch.equal(images, data.normalise(np.stack(expected)))
        assert labels.tolist() == data.train.labels[order].tolist()


def test_small_pictures_first_cost_less(random_images):
    config = TrainConfig(phases=((1, 16), (1, 32)), batch_size=48, flip=False)
    batches = TrainBatches(random_images, config)
    assert batches.sizes == [16, 16, 32, 32] and batches.pixels.tolist() == [12, 12, 48, 48]
    assert [batches.batch(step)[0].shape[2:] for step in (1, 2)] == [(16, 16), (32, 32)]
