"""`cp.pp.thin_counts`: two parts that add up, drawn as the benchmark's splits are."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import stats

import cellplm_tl as cp
from cellplm_tl._errors import OptionError, SlotError


@pytest.fixture
def cells(pbmc_counts):
    return pbmc_counts[::6].copy()


def dense(adata: ad.AnnData, key: str) -> np.ndarray:
    return adata.layers[key].toarray()


@pytest.mark.parametrize(("share", "seed"), [(0.5, 0), (0.2, 1)])
def test_the_rule_of_the_splits_written_out(cells, share, seed):
    expected = cells.X.copy()
    expected.sort_indices()
    expected.data = np.random.default_rng(seed).binomial(expected.data.astype(int), share)
    cp.pp.thin_counts(cells, share=share, random_state=seed)
    np.testing.assert_array_equal(dense(cells, "thinned"), expected.toarray())
    rest = cells.X.toarray() - expected.toarray()
    np.testing.assert_array_equal(dense(cells, "thinned_truth"), rest)


def test_parts_hold_no_zeros_among_their_entries(cells):
    cp.pp.thin_counts(cells, key_added="half")
    for key in ("half", "half_truth"):
        assert cells.layers[key].data.all()
        assert cells.layers[key].has_sorted_indices
        assert cells.layers[key].dtype == np.float32


def test_parts_are_poisson_counts_that_know_nothing_of_each_other():
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(4.0, (500, 200)).astype(np.float32))
    cp.pp.thin_counts(adata, share=0.25)
    thinned, rest = dense(adata, "thinned").ravel(), dense(adata, "thinned_truth").ravel()
    n = thinned.size
    for part, mean in ((thinned, 1.0), (rest, 3.0)):
        assert abs(part.mean() - mean) < 4 * np.sqrt(mean / n)
        assert part.var() == pytest.approx(mean, rel=0.03)
    assert abs(stats.pearsonr(thinned, rest)[0]) < 4 / np.sqrt(n)


def test_record(cells):
    counts = cells.X.toarray()
    counts[:2] = 0
    counts[1, 5] = 1  # one count is on one side
    cells.X = counts
    cp.pp.thin_counts(cells)
    record = cells.uns["cellplm"]["thinned"]
    assert record["n_counts"] == cells.X.sum()
    assert record["n_thinned"] == cells.layers["thinned"].sum()
    assert record["n_cells_with_both"] == cells.n_obs - 2
    assert record["parameters"]["share"] == 0.5


@pytest.mark.parametrize("share", [0, 1, -0.5, True, None, "half"])
def test_a_share_is_between_0_and_1(cells, share):
    with pytest.raises(OptionError, match=f"share must be a number above 0 .* got {share!r}"):
        cp.pp.thin_counts(cells, share=share)
    assert list(cells.layers) == []


def test_the_layer_that_is_read_is_not_written(cells):
    cells.layers["other_truth"] = cells.X.copy()
    with pytest.raises(SlotError, match="'other_truth'. is an input of this call"):
        cp.pp.thin_counts(cells, layer="other_truth", key_added="other")
