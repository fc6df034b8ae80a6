"""Patches are what a convolution reads; the regression and its rank are those of the formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from moodistill.student.patches import as_kernel, as_matrix, output_size, sample_patches
from moodistill.student.regression import gram_matrix, reduce_rank, regress

LAYERS = [
    nn.Conv2d(5, 7, 3, padding=1),
    nn.Conv2d(5, 7, 3, stride=2, padding=1),
    nn.Conv2d(5, 7, 3),
    nn.Conv2d(5, 7, (1, 5), padding=(0, 2)),
    nn.Conv2d(5, 7, 3, padding=2, dilation=2),
    nn.Conv2d(5, 7, 5, padding="same", dilation=2),
    nn.Conv2d(5, 7, 3, padding="valid", stride=3),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lie", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_patch_times_the_kernel_is_the_convolution(layer, lie):
    source = random(3, 5, 9, 11).to(memory_format=lie)
    with torch.no_grad():
        expected = layer(source)
        rows, columns = output_size(layer, (9, 11))
        assert tuple(expected.shape[2:]) == (rows, columns)
        positions = torch.randperm(3 * rows * columns, generator=torch.Generator().manual_seed(1))
        patches = sample_patches(source, layer, positions[:40])
        found = patches @ as_matrix(layer.weight).T + layer.bias
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 7)[positions[:40]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(as_kernel(as_matrix(layer.weight), tuple(layer.weight.shape)), layer.weight)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(5, 7, 5, stride=2, padding=3, dilation=2), (23,)),
        (nn.Conv3d(5, 7, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)), (4, 5, 6)),
    ],
    ids=str,
)
def test_patches_of_signals_and_volumes(layer, size):
    source = random(3, 5, *size)
    with torch.no_grad():
        expected = layer(source)
        assert tuple(expected.shape[2:]) == output_size(layer, size)
        positions = torch.arange(expected[:, 0].numel())
        found = sample_patches(source, layer, positions) @ as_matrix(layer.weight).T + layer.bias
    torch.testing.assert_close(found, expected.movedim(1, -1).reshape(-1, 7), atol=1e-5, rtol=1e-5)
    assert torch.equal(as_kernel(as_matrix(layer.weight), tuple(layer.weight.shape)), layer.weight)


@pytest.mark.parametrize("width", [40, 700])
def test_the_gram_matrix_is_the_product(width):
    rows = random(900, width)
    torch.testing.assert_close(gram_matrix(rows), rows.T @ rows, atol=1e-2, rtol=1e-4)


def least_squares(patches, outputs, anchor, centred, pull):
    """The normal equations, written out in float64."""
    p, y = patches.double().numpy(), outputs.double().numpy()
    mean, level = (p.mean(0), y.mean(0)) if centred else (0.0, 0.0)
    p, y = p - mean, y - level
    gram, cross = p.T @ p / len(p), p.T @ y / len(p)
    ridge = pull * np.diag(gram).mean()
    left = gram + ridge * np.eye(len(gram))
    weight = np.linalg.solve(left, cross + ridge * anchor.double().numpy().T).T
    return weight, level - weight @ mean if centred else np.zeros(len(weight))


@pytest.mark.parametrize("count", [30, 400])
@pytest.mark.parametrize("centred", [False, True])
def test_the_regression_is_ridge_regression(centred, count):
    patches, outputs = random(count, 60) + 0.5, random(count, 6, seed=1) + 2.0
    anchor = random(6, 60, seed=2)
    ridge, scarce = 0.05, 0.3
    weight, constant = regress(patches.clone(), outputs, anchor, centred, ridge, scarce)
    pull = ridge + scarce * (60 / count) ** 2
    expected, offset = least_squares(patches, outputs, anchor, centred, pull)
    # Products may be taken in bfloat16.
    np.testing.assert_allclose(weight.numpy(), expected, atol=0.02)
    np.testing.assert_allclose(constant.numpy(), offset, atol=0.05)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("patches", [torch.zeros(20, 30), torch.ones(20, 30), random(3, 30)])
def test_degenerate_samples_give_finite_weights(patches, centred):
    """Dead or constant channels, and fewer samples than unknowns."""
    outputs = random(len(patches), 4)
    found = regress(patches.clone(), outputs, random(4, 30), centred, 1e-2, 2.0)
    assert all(torch.isfinite(part).all() for part in found)


def test_the_reduced_weights_fit_the_fitted_outputs_best():
    """Of all of their rank: numpy's SVD of the fitted outputs leaves no smaller error."""
    patches, weight = random(500, 24) * torch.linspace(0.1, 3.0, 24), random(9, 24, seed=3)
    fitted = (patches @ weight.T).double().numpy()
    u, s, v = np.linalg.svd(fitted, full_matrices=False)
    for rank in (1, 4, 9):
        basis, rest = reduce_rank(weight, patches, rank)
        assert basis.shape == (9, rank) and rest.shape == (rank, 24)
        found = (patches @ (basis @ rest).T).double().numpy()
        best = u[:, :rank] * s[:rank] @ v[:rank]
        np.testing.assert_allclose(found, best, atol=1e-3 * np.abs(fitted).max())
    np.testing.assert_allclose(basis @ rest, weight, atol=1e-4)
