"""Expected counts of cells and what judges them, against numpy and against simulated truths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import cellplm_tl as cp
from cellplm_tl import _denoising, _weights
from cellplm_tl._anndata import read_cells
from cellplm_tl._denoising import (
    DECODER_SHARES,
    POISSON_THETA,
    Denoiser,
    _coverage,
    _dispersion,
    _Neighbors,
    invented_correlation,
    judge,
)
from cellplm_tl._inference import encode
from cellplm_tl.train.held_out import divide

GOLDEN = Path(__file__).parent / "data" / "golden"
CPU = torch.device("cpu")
SHARES = (0.8, 0.1, 0.1)


@pytest.fixture
def network(spectrum_network):
    return spectrum_network(decoder="profile", decoder_hidden=16, unit_length=True)


def matrix(cells) -> np.ndarray:
    block = cells.counts(np.arange(cells.n_cells))
    shape = (cells.n_cells, len(cells.genes))
    return sparse.csr_matrix((block.values, block.columns, block.offsets), shape).toarray()


def fractions_of(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def denoiser_of(network, cells, seed=0) -> Denoiser:
    return Denoiser(network, cells, device=CPU, rng=np.random.default_rng(seed))


# --- fractions ------------------------------------------------------------------------------------


def test_fractions_sum_to_one(network, spectrum_cells):
    denoiser = denoiser_of(network, spectrum_cells(batch_key="sample"))
    for fractions in denoiser.fractions(np.arange(160)):
        assert (fractions >= 0).all()
        np.testing.assert_allclose(fractions.sum(1), 1, rtol=1e-5)


def test_decoded_is_what_the_network_decodes_of_each_context(network, spectrum_cells):
    cells = spectrum_cells(genes=slice(None, 250), batch_key="sample")
    encoding = encode(network, cells, device=CPU)
    genes = torch.from_numpy(cells.gene_index)
    expected = np.empty((160, len(genes)))
    for rows, sums in zip(cells.contexts, encoding.context_sums, strict=True):
        profile = network.embedder.background(network.embedder.profile(sums), genes, genes)
        with torch.no_grad():
            mean = network.decode(torch.from_numpy(encoding.latent[rows]), genes, profile=profile)
        expected[rows] = mean.mean / mean.mean.sum(1, keepdim=True)
    denoiser = denoiser_of(network, cells)
    np.testing.assert_allclose(denoiser.fractions(np.arange(160))[0], expected, rtol=1e-4)
    np.testing.assert_allclose(
        denoiser.theta, network.decoder.log_theta[genes].exp().detach(), rtol=1e-5
    )


def test_neighbours_are_the_nearest_of_the_own_context(network, spectrum_cells):
    cells = spectrum_cells(batch_key="sample")
    denoiser = denoiser_of(network, cells)
    counts, points = matrix(cells), denoiser._points.astype(np.float64)
    expected = np.empty(counts.shape)
    for rows in cells.contexts:
        anchors = rows[counts[rows].sum(1) > 0]  # cell 0 has no counts
        n = min(60, int(0.25 * len(anchors)))
        distances = ((points[rows, None] - points[None, anchors]) ** 2).sum(2)
        nearest = anchors[np.argsort(distances, 1)[:, :n]]
        expected[rows] = fractions_of(counts)[nearest].mean(1)
    found = denoiser.fractions(np.arange(160))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_of_many_cells_some_are_looked_among(monkeypatch, spectrum_cells):
    monkeypatch.setattr(_denoising, "MAX_ANCHORS", 30)
    cells = spectrum_cells(slice(1, 100))
    points = np.random.default_rng(1).standard_normal((99, 3))
    neighbors = _Neighbors(cells, np.arange(99), points, np.random.default_rng(0))
    drawn = np.random.default_rng(0).choice(99, 30, replace=False)
    distances = ((points[:, None] - points[None, drawn]) ** 2).sum(2)
    nearest = drawn[np.argsort(distances, 1)[:, :10]]
    expected = fractions_of(matrix(cells))[nearest].mean(1)
    np.testing.assert_allclose(neighbors.mean(points), expected, rtol=1e-5, atol=1e-8)


def test_expected_counts_are_a_weighted_mean_at_the_cells_depth(network, spectrum_cells):
    cells = spectrum_cells()
    denoiser = denoiser_of(network, cells)
    denoiser.decoder_share = 0.3
    rows = np.array([5, 0, 77])
    decoded, smoothed = denoiser.fractions(rows)
    totals = matrix(cells)[rows].sum(1)
    found = denoiser.expected(rows)
    expected = totals[:, None] * (0.3 * decoded + 0.7 * smoothed).numpy()
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(found.totals, totals)
    assert (found.mean[1] == 0).all()


def test_blocks_of_any_size_are_the_same(network, spectrum_cells):
    denoiser = denoiser_of(network, spectrum_cells(batch_key="sample"))
    whole = denoiser.expected(np.arange(160)).mean
    for size in (1, 37):
        parts = [
            denoiser.expected(np.arange(b, min(b + size, 160))).mean for b in range(0, 160, size)
        ]
        np.testing.assert_allclose(torch.cat(parts), whole, rtol=2e-4, atol=1e-6)


def test_block_cells_keep_to_the_budget(network, spectrum_cells):
    denoiser = denoiser_of(network, spectrum_cells())
    with cp.settings.override(memory_budget=100 * 2**20):
        large = denoiser.block_cells()
    with cp.settings.override(memory_budget=2**20):
        small = denoiser.block_cells()
    assert large == 1024
    assert 1 <= small < 100
    assert small * 300 * 4 * 12 <= 2**20


def test_what_a_context_decodes_to_does_not_depend_on_the_others(network, spectrum_cells):
    both = spectrum_cells(batch_key="sample")
    alone = spectrum_cells(batch_key="sample")
    object.__setattr__(alone, "contexts", both.contexts[:1])
    rows = both.contexts[0]
    encoded = denoiser_of(network, both).fractions(rows)[0]
    latent = encode(network, both, device=CPU).latent[rows]
    with_one = encode(network, alone, device=CPU)
    np.testing.assert_allclose(latent, with_one.latent[rows], atol=1e-5)
    genes = torch.from_numpy(both.gene_index)
    profile = network.embedder.background(
        network.embedder.profile(with_one.context_sums[0]), genes, genes
    )
    with torch.no_grad():
        mean = network.decode(torch.from_numpy(latent), genes, profile=profile).mean
    np.testing.assert_allclose(encoded, mean / mean.sum(1, keepdim=True), rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_contexts_of_few_cells(network, spectrum_cells, n):
    cells = spectrum_cells(slice(1, 1 + n))
    decoded, smoothed = denoiser_of(network, cells).fractions(np.arange(n))
    assert decoded.isfinite().all()
    # So few cells are all neighbours of each other.
    mean = fractions_of(matrix(cells)).mean(0)
    np.testing.assert_allclose(smoothed, np.tile(mean, (n, 1)), atol=1e-6)


def test_a_context_without_counts_gives_zeros(network, spectrum_cells):
    cells = spectrum_cells(batch_key="sample")
    empty = (np.array([0]), np.arange(1, 160))
    object.__setattr__(cells, "contexts", empty)
    expected = denoiser_of(network, cells).expected(np.arange(3))
    assert (expected.mean[0] == 0).all()
    assert expected.mean.isfinite().all()


def test_released_models_have_neighbours_in_their_latent(spectrum_cells, pbmc_counts):
    model = _weights.load(GOLDEN / "golden_vae.best.ckpt")
    cells = _cells_of(model, pbmc_counts)
    denoiser = denoiser_of(model.network, cells)
    np.testing.assert_array_equal(denoiser._points, encode(model.network, cells).latent)
    sums = denoiser.expected(np.arange(40)).mean.sum(1)
    np.testing.assert_allclose(sums, matrix(cells).sum(1), rtol=1e-5)


def _cells_of(model, pbmc_counts):
    """Real counts under the names of a model's genes."""
    adata = pbmc_counts[:40, :120].copy()
    adata.var_names = list(model.genes[:120])
    return read_cells(adata, model.genes)


# --- judging --------------------------------------------------------------------------------------


def deviance(counts: np.ndarray, fractions: np.ndarray) -> float:
    """Mean Poisson deviance per entry, expectations scaled to each cell's counts."""
    mean = fractions / fractions.sum(1, keepdims=True) * counts.sum(1, keepdims=True)
    mean = np.maximum(mean, 1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where(counts > 0, counts * np.log(counts / mean), 0)
    return float((2 * (log - (counts - mean))).mean())


def test_the_weight_is_the_best_on_one_half_and_the_scores_are_of_the_other_part_and_half(
    network, spectrum_cells
):
    cells = spectrum_cells(slice(0, 300))
    found = judge(network, cells, shares=SHARES, level=0.9, device=CPU, seed=4)
    read, held_out, second = divide(cells, SHARES, 4)
    decoded, smoothed = (
        f.double().numpy() for f in denoiser_of(network, read, seed=4).fractions(np.arange(300))
    )
    counts, judged_by = (matrix(part).astype(float) for part in (held_out, second))
    has_counts = [m.sum(1) > 0 for m in (counts, judged_by, matrix(read))]
    seen = np.flatnonzero(np.logical_and.reduce(has_counts))
    choosing, judging = seen[::2], seen[1::2]
    tried = {
        w: deviance(counts[choosing], (w * decoded + (1 - w) * smoothed)[choosing])
        for w in DECODER_SHARES
    }
    share = min(tried, key=tried.get)
    assert found.decoder_share == share
    assert found.n_cells == len(judging)
    by_gene = np.tile(fractions_of(matrix(read).astype(float)).mean(0), (300, 1))
    for name, fractions in {
        "denoised": share * decoded + (1 - share) * smoothed,
        "decoder": decoded,
        "neighbors": smoothed,
        "gene_mean": by_gene,
    }.items():
        score = found.scores.loc[name, "poisson_deviance"]
        assert score == pytest.approx(deviance(judged_by[judging], fractions[judging]), rel=1e-3)


def test_too_few_cells_are_not_judged(network, spectrum_cells):
    arguments = {"shares": SHARES, "level": 0.9, "device": CPU, "seed": 0}
    assert judge(network, spectrum_cells(slice(1, 20)), **arguments) is None
    assert judge(network, spectrum_cells(slice(1, 42)), **arguments).n_cells == 20


def test_no_more_cells_are_judged_than_there_is_time_for(monkeypatch, network, spectrum_cells):
    monkeypatch.setattr(_denoising, "MAX_JUDGED", 50)
    found = judge(network, spectrum_cells(), shares=SHARES, level=0.9, device=CPU, seed=0)
    assert found.n_cells <= 25


def test_the_dispersion_by_moments_and_prior():
    rng = np.random.default_rng(0)
    counts, expected = rng.poisson(2.0, (50, 4)).astype(float), rng.uniform(1, 3, (50, 4))
    counts[:, 1] *= 3  # more than a Poisson's
    expected[:, 3], counts[:, 3] = 0, 0  # nothing is known but the prior

    class Model:
        theta = torch.tensor([5.0, 5.0, 0.001, 2.0])

    found = _dispersion(counts, expected, Model()).numpy()
    for gene in range(4):
        excess = sum(
            (counts[i, gene] - expected[i, gene]) ** 2 - counts[i, gene] for i in range(50)
        )
        weight = sum(expected[i, gene] ** 2 for i in range(50))
        inverse = (excess + 1 / float(Model.theta[gene])) / (weight + 1)
        assert found[gene] == pytest.approx(1 / min(max(inverse, 1e-4), 100), rel=1e-4)
    assert found[3] == pytest.approx(2.0, rel=1e-4)


def test_the_dispersion_of_simulated_counts_is_found():
    rng = np.random.default_rng(1)
    expected = rng.uniform(1, 6, (4000, 3))
    theta = np.array([0.8, 4.0, 1e6])
    counts = rng.poisson(expected * rng.gamma(theta, 1 / theta, (4000, 3)))

    class Model:
        theta = torch.full((3,), 1.0)

    found = _dispersion(counts.astype(float), expected, Model()).numpy()
    np.testing.assert_allclose(found[:2], theta[:2], rtol=0.15)
    assert 50 < found[2] <= POISSON_THETA


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_of_simulated_counts(level):
    """Of many values a count can take, the interval holds the level; never much less."""
    rng = np.random.default_rng(2)
    expected = rng.uniform(20, 60, (2000, 3))
    expected[:, 2] = 0.2
    theta = np.array([2.0, 10.0, 1.0])
    counts = rng.poisson(expected * rng.gamma(theta, 1 / theta, (2000, 3)))
    mean, r = torch.from_numpy(expected).float(), torch.from_numpy(theta).float()
    found = _coverage(counts, mean, r, level)
    assert found["level"] == level
    assert level - 0.02 < found["of_entries_expected_above_1"] < level + 0.05
    assert found["of_all_entries"] > level  # of few values, it cannot be met to the point


def test_coverage_where_nothing_much_is_expected():
    found = _coverage(np.zeros((5, 2)), torch.full((5, 2), 0.01), torch.ones(2), 0.9)
    assert found == {"level": 0.9, "of_all_entries": 1.0}


# --- smoothing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    """Fractions of cells with correlated genes, and three parts of counts drawn from them."""
    rng = np.random.default_rng(3)
    n_cells, n_genes, n_programmes = 3000, 40, 8
    programmes = rng.standard_normal((n_programmes, n_genes)) * 0.5
    own = 0.4 * rng.standard_normal((n_cells, n_genes))
    truth = np.exp(rng.standard_normal((n_cells, n_programmes)) @ programmes * 0.5 + own)
    truth /= truth.sum(1, keepdims=True)
    parts = [sparse.csr_matrix(rng.poisson(truth * n)) for n in (1600, 400, 400)]
    return truth, parts


def test_the_truth_has_invented_nothing(simulated):
    truth, parts = simulated
    found = invented_correlation(truth, *parts)
    assert found["n_genes"] == 40
    assert found["invented"] == pytest.approx(0, abs=0.06)
    assert len(found["pairs"]) == 40 * 39 // 2
    pair = np.triu_indices(40, 1)
    expected = np.corrcoef(truth.T)[pair]
    np.testing.assert_allclose(found["pairs"]["denoised"], expected, atol=1e-5)
    np.testing.assert_allclose(found["pairs"]["held_out"], expected, atol=0.15)


def test_a_smoother_invents_and_raw_counts_lose(simulated):
    truth, parts = simulated
    read = fractions_of(parts[0].toarray().astype(float))
    u, s, v = np.linalg.svd(read - read.mean(0), full_matrices=False)
    rank_1 = read.mean(0) + s[0] * u[:, :1] @ v[:1]
    assert invented_correlation(rank_1, *parts)["invented"] > 0.5
    # Few counts: their noise hides correlation that is there.
    rng = np.random.default_rng(4)
    shallow = fractions_of(rng.poisson(truth * 300).astype(float))
    assert invented_correlation(shallow, *parts)["invented"] < -0.1


def test_genes_without_a_signal_say_nothing(simulated):
    truth, _ = simulated
    rng = np.random.default_rng(5)
    noise = [sparse.csr_matrix(rng.poisson(np.full(truth.shape, 0.5))) for _ in range(3)]
    found = invented_correlation(truth, *noise)
    assert set(found) == {"n_genes"}
    assert found["n_genes"] < 10


def test_constants_after_denoising_are_no_division_by_zero(simulated):
    truth, parts = simulated
    found = invented_correlation(np.tile(truth.mean(0), (len(truth), 1)), *parts)
    assert np.isfinite(found["pairs"]["denoised"]).all()
    assert np.isfinite(found["invented"])
