"""The embedding's frame, found and used block by block, against the matrix written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellplm_tl import _inference, _rotation
from cellplm_tl._inference import encode
from cellplm_tl._rotation import (
    N_PASSES,
    find_frame,
    known_share,
    latent_scale,
    project,
    representation_blocks,
    residual_length,
)
from cellplm_tl.models.representation import OVERSAMPLING, Columns

FIELDS = {
    "lengths as they are": {},
    "lengths as they are, panel": {"target_sum": "panel"},
    "unit length": {"unit_length": True},
    "half factors": {"unit_length": True, "factor_share": 0.5},
    "mostly factors": {"unit_length": True, "factor_share": 0.8, "target_sum": "panel"},
    "all factors": {"unit_length": True, "factor_share": 1.0},
    "no network": {
        "encoder": "none",
        "encoder_layers": 0,
        "hidden": 12,
        "latent": "none",
        "unit_length": True,
    },
}
each_network = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def joined(network, parts, c=None, length=None) -> tuple[np.ndarray, float, float]:
    """Put [c z, w r] together; c and the residuals' length are those of the cells by default."""
    latent, residual, factors, _, left = parts
    c = np.sqrt(factors.var(0).sum() / latent.var(0).sum()) if c is None else c
    length = np.sqrt(left.mean()) if length is None else length
    scaled = residual * length if network.config.unit_length else residual
    return np.hstack([c * latent, network.config.residual_weight * scaled]), c, length


def dense_blocks(network, cells, encoding, *scales) -> np.ndarray:
    """Multiply every block with the unit vectors: (cells, latent + genes)."""
    n_latent, n_genes = network.config.latent_size, len(cells.genes)
    one_by_one = Columns(*torch.eye(n_latent + n_genes).split((n_latent, n_genes)))
    result = np.full((cells.n_cells, n_latent + n_genes), np.nan)
    for rows, block in representation_blocks(network, cells, encoding, *scales):
        result[rows] = block.times(one_by_one)
    return result


@each_network
@pytest.mark.parametrize("batch_key", [None, "sample"])
def test_the_representation_written_out(
    fields, batch_key, spectrum_network, spectrum_cells, representation, monkeypatch
):
    monkeypatch.setattr(_rotation, "ROWS", 50)
    monkeypatch.setitem(_inference.BLOCK_CELLS, "cpu", 40)
    network, cells = spectrum_network(**fields), spectrum_cells(batch_key=batch_key)
    encoding = encode(network, cells)
    parts = representation(network, cells, encoding.latent)
    expected, c, length = joined(network, parts)
    assert latent_scale(network, encoding) == pytest.approx(c, rel=1e-4)
    assert residual_length(encoding) == pytest.approx(length, rel=1e-4)
    actual = dense_blocks(network, cells, encoding, c, length)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    _, _, _, total, left = parts
    share, overall = known_share(encoding)
    known = np.divide(total - left, total, out=np.zeros_like(total), where=total > 0)
    np.testing.assert_allclose(share, known, atol=1e-4)
    assert overall == pytest.approx(1 - left.sum() / total.sum(), abs=1e-4)


def test_lengths_of_the_parts(spectrum_network, spectrum_cells):
    """At one length all cells with counts have the same, in the latent and in the residual."""
    network = spectrum_network(unit_length=True, factor_share=0.5)
    cells = spectrum_cells()
    encoding = encode(network, cells)
    matrix = dense_blocks(network, cells, encoding, 3.0, 5.0)
    assert (matrix[0, 12:] == 0).all()  # no counts, no residual
    np.testing.assert_allclose(np.linalg.norm(matrix[:, :12], axis=1), 3, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(matrix[1:, 12:], axis=1), 0.7 * 5, rtol=1e-3)


@each_network
def test_principal_components(fields, spectrum_network, spectrum_cells, representation):
    network, cells = spectrum_network(**fields), spectrum_cells(batch_key="sample")
    encoding = encode(network, cells)
    frame = find_frame(network, cells, encoding, 8, rng())
    scores = project(network, cells, encoding, frame, 8)
    assert scores.dtype == np.float32
    expected, c, length = joined(network, representation(network, cells, encoding.latent))
    assert frame.latent_scale == pytest.approx(c, rel=1e-4)
    assert frame.residual_length == pytest.approx(length, rel=1e-4)
    np.testing.assert_array_equal(frame.genes, cells.gene_index)
    u, s, _ = np.linalg.svd(expected - expected.mean(0), full_matrices=False)
    expected = u[:, :8] * s[:8]
    expected *= np.sign((expected * scores).sum(0))
    # The iteration tells components apart as their variances differ; the first are well apart.
    np.testing.assert_allclose(scores[:, :3], expected[:, :3], atol=2e-3 * np.abs(expected).max())
    assert 0.997 < (scores.astype(float) ** 2).sum() / (expected**2).sum() < 1.0001


@each_network
def test_cells_of_other_genes_in_a_frame(fields, spectrum_network, spectrum_cells, representation):
    """Scales, directions and mean are the frame's; a gene that one side lacks takes no part."""
    network = spectrum_network(**fields)
    reference = spectrum_cells(slice(0, 160), slice(0, 240))
    query = spectrum_cells(slice(160, 260), slice(60, 300))
    frame = find_frame(network, reference, encode(network, reference), 8, rng())
    encoding = encode(network, query)
    parts = representation(network, query, encoding.latent)
    matrix, _, _ = joined(network, parts, frame.latent_scale, frame.residual_length)
    (latent, directions), mean = frame.rotation
    assert directions.shape == (240, 8)
    on_query = np.zeros((240, 8))
    on_query[:180] = directions[60:]  # genes 60 to 239
    expected = matrix @ np.concatenate([latent, on_query]) - mean.numpy()
    actual = project(network, query, encoding, frame, 8)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    own = find_frame(network, query, encoding, 8, rng())
    assert np.abs(project(network, query, encoding, own, 8) - actual).max() > 0.1


def test_genes_apart(spectrum_network, spectrum_cells, representation):
    """No gene in common, and one gene more on either side: the latent alone is left."""
    network = spectrum_network()
    reference = spectrum_cells(slice(0, 100), slice(100, 200))
    frame = find_frame(network, reference, encode(network, reference), 5, rng())
    for genes in (slice(0, 100), slice(200, 300)):
        query = spectrum_cells(slice(100, 160), genes)
        encoding = encode(network, query)
        expected = frame.latent_scale * encoding.latent @ frame.rotation.components.latent.numpy()
        actual = project(network, query, encoding, frame, 5)
        np.testing.assert_allclose(actual, expected - frame.rotation.mean.numpy(), atol=1e-4)


def test_widths(spectrum_network, spectrum_cells):
    network, cells = spectrum_network(), spectrum_cells()
    encoding = encode(network, cells)
    frame = find_frame(network, cells, encoding, 6, rng())
    assert len(frame.rotation.mean) == 6
    six = project(network, cells, encoding, frame, 6)
    np.testing.assert_allclose(
        project(network, cells, encoding, frame, 2), six[:, :2], rtol=1e-4, atol=1e-4
    )
    wide = project(network, cells, encoding, frame, 9)
    np.testing.assert_array_equal(wide[:, :6], six)
    assert (wide[:, 6:] == 0).all()


def test_no_more_components_than_there_are_directions(spectrum_network, spectrum_cells):
    network, cells = spectrum_network(), spectrum_cells(slice(0, 20), slice(0, 60))
    frame = find_frame(network, cells, encode(network, cells), 500, rng())
    assert len(frame.rotation.mean) == 12 + 60
    components = frame.rotation.components.joined().numpy()
    np.testing.assert_allclose(components.T @ components, np.eye(72), atol=1e-4)


def test_every_pass_is_told_of(spectrum_network, spectrum_cells, monkeypatch):
    monkeypatch.setitem(_inference.BLOCK_CELLS, "cpu", 30)
    network, cells = spectrum_network(), spectrum_cells(batch_key="sample")
    encoding, told = encode(network, cells), []
    frame = find_frame(network, cells, encoding, 3, rng(), told.append)
    assert len(told) > N_PASSES
    assert sum(told) == N_PASSES * 160
    told.clear()
    project(network, cells, encoding, frame, 3, told.append)
    assert sum(told) == 160


def test_the_start_of_a_gene_does_not_depend_on_the_others(
    spectrum_network, spectrum_cells, monkeypatch
):
    network, starts = spectrum_network(), []
    monkeypatch.setattr(_rotation, "find_rotation", lambda sweep, start, *_: starts.append(start))
    for genes in (slice(0, 300), slice(60, 200)):
        cells = spectrum_cells(genes=genes)
        find_frame(network, cells, encode(network, cells), 4, rng())
    whole, part = starts
    assert whole.genes.shape == (300, 4 + OVERSAMPLING)
    assert torch.equal(whole.latent, part.latent)
    assert torch.equal(whole.genes[60:200], part.genes)


@each_network
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), slice(0, 2), slice(0, 3)])
def test_few_cells(fields, rows, spectrum_network, spectrum_cells):
    """One cell, with counts or without, has nothing to differ from."""
    network, cells = spectrum_network(**fields), spectrum_cells(rows)
    encoding = encode(network, cells)
    frame = find_frame(network, cells, encoding, 4, rng())
    scores = project(network, cells, encoding, frame, 4)
    assert np.isfinite(scores).all()
    assert np.isfinite([frame.latent_scale, frame.residual_length]).all()
    if cells.n_cells == 1:
        np.testing.assert_allclose(scores, 0, atol=1e-5)
