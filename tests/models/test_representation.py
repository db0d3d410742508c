"""Principal components of latent and residual, against the matrix written out in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellplm_tl.models.embedder import ScaledBlock
from cellplm_tl.models.representation import (
    OVERSAMPLING,
    Columns,
    RepresentationBlock,
    find_rotation,
)

N_CELLS, N_GENES, N_LATENT, N_FACTORS = 90, 80, 6, 6
WEIGHT = 0.7 + 0.01 * np.arange(N_CELLS)  # of each cell
WEIGHT[5] = 0


@pytest.fixture
def block() -> RepresentationBlock:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(N_CELLS, 4)) * [9, 7, 5, 3] @ rng.normal(size=(4, N_GENES)) / 8
    entries = sp.random(N_CELLS, N_GENES, 0.3, format="csr", random_state=1)
    entries.data = np.asarray(signal[entries.nonzero()] + rng.normal(size=entries.nnz))
    measured = torch.ones(N_CELLS)
    measured[3] = 0  # a cell without counts
    entries.data[entries.indptr[3] : entries.indptr[4]] = 0
    expression = ScaledBlock(
        torch.from_numpy(rng.normal(size=N_GENES)).float(),
        torch.from_numpy(entries.data).float(),
        torch.from_numpy(entries.indices),
        torch.from_numpy(entries.indptr),
        measured,
    )
    loadings = torch.linalg.qr(torch.from_numpy(rng.normal(size=(N_GENES, N_FACTORS))))[0].float()
    factors = expression.times(loadings) * 0.8
    latent = torch.from_numpy(rng.normal(size=(N_CELLS, N_LATENT))).float() * 3
    weight = torch.from_numpy(WEIGHT).float()
    return RepresentationBlock(latent, expression, factors, loadings, weight)


def written_out(block: RepresentationBlock) -> np.ndarray:
    """[c z, w (x - f V^T)], (cells, latent + genes), in float64."""
    x = block.expression
    entries = sp.csr_matrix(
        (x.differences.double().numpy(), x.columns.numpy(), x.offsets.numpy()), (N_CELLS, N_GENES)
    )
    scaled = x.measured.double().numpy()[:, None] * x.base.double().numpy() + entries.toarray()
    residual = scaled - block.factors.double().numpy() @ block.loadings.double().numpy().T
    return np.hstack([block.latent.double().numpy(), WEIGHT[:, None] * residual])


def part(block: RepresentationBlock, rows: slice) -> RepresentationBlock:
    x = block.expression
    a, b = x.offsets[rows.start], x.offsets[rows.stop]
    expression = ScaledBlock(
        x.base,
        x.differences[a:b],
        x.columns[a:b],
        x.offsets[rows.start : rows.stop + 1] - a,
        x.measured[rows],
    )
    return RepresentationBlock(
        block.latent[rows], expression, block.factors[rows], block.loadings, block.weight[rows]
    )


def start(n_components: int) -> Columns:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(N_LATENT + N_GENES, n_components + OVERSAMPLING, generator=generator)
    return Columns(columns[:N_LATENT], columns[N_LATENT:])


def test_products_are_those_of_the_matrix(block):
    matrix = written_out(block)
    rng = np.random.default_rng(2)
    right, left = rng.normal(size=(N_LATENT + N_GENES, 3)), rng.normal(size=(N_CELLS, 3))
    columns = Columns(*torch.from_numpy(right).float().split((N_LATENT, N_GENES)))
    np.testing.assert_allclose(block.times(columns), matrix @ right, atol=2e-4)
    product = block.transposed_times(torch.from_numpy(left).float()).joined()
    np.testing.assert_allclose(product, matrix.T @ left, atol=2e-4)


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_scores_are_principal_components(block, n_blocks):
    edges = np.linspace(0, N_CELLS, n_blocks + 1).astype(int)
    parts = [part(block, slice(a, b)) for a, b in itertools.pairwise(edges)]
    rotation = find_rotation(lambda: parts, start(5), N_CELLS, 5)
    scores = torch.cat([rotation.scores(p) for p in parts]).numpy()

    matrix = written_out(block)
    centred = matrix - matrix.mean(0)
    u, s, _vt = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :5] * s[:5]
    sign = np.sign((expected * scores).sum(0))
    np.testing.assert_allclose(scores, expected * sign, atol=5e-3 * s[0] / N_CELLS**0.5)
    joined = rotation.components.joined().numpy()
    np.testing.assert_allclose(joined.T @ joined, np.eye(5), atol=1e-5)
    largest = np.abs(joined).argmax(0)
    assert (joined[largest, range(5)] > 0).all()


def test_one_cell_has_nothing_to_differ_from(block):
    one = part(block, slice(0, 1))
    rotation = find_rotation(lambda: [one], start(3), 1, 3)
    np.testing.assert_allclose(rotation.scores(one), np.zeros((1, 3)), atol=1e-4)
