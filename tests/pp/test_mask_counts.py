"""`cp.pp.mask_counts`: what is hidden, by which rule, and what is refused."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse, stats

import cellplm_tl as cp
from cellplm_tl._errors import CountsError, OptionError, SlotError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "dropout_mask.npz"


@pytest.fixture
def cells(pbmc_counts):
    return pbmc_counts[::6].copy()


def dense(adata: ad.AnnData, key: str) -> np.ndarray:
    return adata.layers[key].toarray()


# The masks of the official code.
@pytest.mark.parametrize(
    ("case", "kernel", "validation"),
    [
        ("mar_v10_t10", "exponential", 0.1),
        ("mar_v0_t10", "exponential", 0.0),
        ("mcar_v10_t10", "uniform", 0.1),
    ],
)
def test_the_masks_of_the_official_code(case, kernel, validation):
    golden = np.load(GOLDEN)
    counts = golden["counts"].astype(np.float32)
    adata = ad.AnnData(counts)
    cp.pp.mask_counts(
        adata, validation_fraction=validation, kernel=kernel, min_genes=6, random_state=10
    )
    keys = {"train": "masked", "test": "masked_truth", "valid": "masked_validation"}
    if not validation:
        assert keys.pop("valid") not in adata.layers
        assert not golden[f"{case}_valid_packed"].any()
    for part, key in keys.items():
        packed = golden[f"{case}_{part}_packed"]
        expected = np.unpackbits(packed, axis=1)[:, : counts.shape[1]].astype(bool)
        np.testing.assert_array_equal(dense(adata, key), np.where(expected, counts, 0))


def test_the_rule_of_the_paper_written_out(cells):
    """The lines by which the benchmark's splits are made."""
    cp.pp.mask_counts(cells, random_state=2)
    x = cells.X.copy()
    x.sort_indices()
    rng = np.random.default_rng(2)
    hidden = np.zeros(x.nnz, dtype=bool)
    for start, end in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        if end - start >= 5:
            weights = np.exp(-x.data[start:end] / 20) / 20
            n = int(0.1 * (end - start))
            drawn = rng.choice(end - start, n, replace=False, p=weights / weights.sum())
            hidden[start + drawn] = True
    truth = sparse.csr_matrix((np.where(hidden, x.data, 0), x.indices, x.indptr), x.shape)
    np.testing.assert_array_equal(dense(cells, "masked_truth"), truth.toarray())


def test_nothing_is_lost_and_each_cell_hides_its_share(cells):
    before = cells.X.toarray()
    cp.pp.mask_counts(cells, fraction=0.2, validation_fraction=0.15, key_added="part")
    parts = [dense(cells, key) for key in ("part", "part_truth", "part_validation")]
    np.testing.assert_array_equal(sum(parts), before)
    assert (np.sum([part > 0 for part in parts], axis=0) <= 1).all()
    n = (before > 0).sum(axis=1)
    for part, share in ((parts[1], 0.2), (parts[2], 0.15)):
        expected = np.where(n >= 5, np.floor(share * n), 0)
        np.testing.assert_array_equal((part > 0).sum(axis=1), expected)
    for key in ("part", "part_truth", "part_validation"):
        assert cells.layers[key].data.all()  # no zeros among the entries
        assert cells.layers[key].has_sorted_indices
    record = cells.uns["cellplm"]["part"]
    assert record["n_masked"] == (parts[1] > 0).sum()
    assert record["n_validation"] == (parts[2] > 0).sum()
    assert record["n_cells_masked"] == (n >= 5).sum()


def test_small_cells_are_left_alone():
    counts = np.zeros((3, 60), dtype=np.float32)
    for cell, n_genes in enumerate((4, 5, 6)):
        counts[cell, :n_genes] = 1
    for min_genes, expected in ((5, [0, 2, 3]), (6, [0, 0, 3]), (1, [2, 2, 3])):
        adata = ad.AnnData(counts)
        cp.pp.mask_counts(adata, fraction=0.5, min_genes=min_genes)
        assert (dense(adata, "masked_truth") > 0).sum(axis=1).tolist() == expected


def test_large_counts_are_hidden_more_rarely_by_the_exponential_kernel():
    counts = np.tile(np.r_[np.ones(50), np.full(50, 40)], (400, 1)).astype(np.float32)
    shares = {}
    for kernel in ("exponential", "uniform"):
        adata = ad.AnnData(counts)
        cp.pp.mask_counts(adata, fraction=0.02, kernel=kernel)
        hidden = dense(adata, "masked_truth")
        shares[kernel] = (hidden == 40).sum() / (hidden > 0).sum()
    odds = np.exp(-39 / 20)  # of two counts that are hidden nearly the same as of one
    expected = {"exponential": odds / (1 + odds), "uniform": 0.5}
    for kernel, share in shares.items():
        low, high = stats.binom(800, expected[kernel]).ppf([1e-4, 1 - 1e-4]) / 800
        assert low < share < high


def test_the_hidden_counts_are_a_mask_for_the_metric(cells):
    cp.pp.mask_counts(cells)
    hidden = cells.layers["masked_truth"]
    scores = cp.metrics.denoising(cells.X, cells.layers["masked"], masked=hidden)
    x = cells.X.toarray()
    expected = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))[hidden.toarray() > 0]
    assert scores["rmse_masked"] == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-6)
    assert scores["auroc_masked_vs_zero"] == 0.5  # the input: it knows nothing of what is hidden


def test_counts_are_recovered_only_where_all_of_them_can_be(pbmc, pbmc_counts):
    lognorm, counts = pbmc[:50].copy(), pbmc_counts[:50].copy()
    cp.pp.mask_counts(lognorm)
    cp.pp.mask_counts(counts)
    np.testing.assert_array_equal(dense(lognorm, "masked"), dense(counts, "masked"))
    assert lognorm.uns["cellplm"]["masked"]["input"]["counts"] == "recovered"
    assert counts.uns["cellplm"]["masked"]["input"]["counts"] == "as stored"


@pytest.mark.parametrize("function", [cp.pp.mask_counts, cp.pp.thin_counts])
@pytest.mark.parametrize("kind", ["smoothed", "fractions", "one cell"])
def test_what_is_no_count_is_refused(function, kind, cells):
    rng = np.random.default_rng(0)
    if kind == "smoothed":  # log-normalised, on no grid
        cells.X.data = np.log1p(rng.gamma(1.0, 1.0, cells.X.nnz)).astype(np.float32)
        message = "adata.X holds no counts: .*pass raw counts, in X or with layer="
    elif kind == "fractions":
        cells.X.data[::5] += 0.5
        message = "adata.X holds no counts: 20.0% of the values"
    else:
        cells = ad.concat([cells] * 8, index_unique="-")  # more than are looked at
        wrong = 700
        assert cells.n_obs > wrong
        cells.X.data[cells.X.indptr[wrong]] += 0.25
        message = f"no counts in 1 of 936 cells: '{cells.obs_names[wrong]}' .row {wrong}."
    before = cells.copy()
    with pytest.raises(CountsError, match=message):
        function(cells)
    assert list(cells.layers) == []
    assert list(cells.uns) == []
    assert (cells.X != before.X).nnz == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction must be a number above 0 and below 1; got 0"),
        ({"fraction": 1.0}, "fraction must be a number above 0"),
        ({"fraction": "much"}, "fraction must be a number above 0 and below 1; got 'much'"),
        ({"validation_fraction": -0.1}, "validation_fraction must be a number 0 or above"),
        ({"fraction": 0.5, "validation_fraction": 0.5}, "must leave something to see"),
        ({"kernel": "square"}, "kernel must be one of 'exponential', 'uniform'; got 'square'"),
        ({"min_genes": 0}, "min_genes must be a positive integer; got 0"),
        ({"min_genes": 2.5}, "min_genes must be a positive integer; got 2.5"),
        ({"random_state": "now"}, "random_state must be an integer .*'now'"),
    ],
)
def test_options_out_of_range(cells, options, message):
    with pytest.raises(OptionError, match=message):
        cp.pp.mask_counts(cells, **options)
    assert list(cells.layers) == []


def test_the_layer_that_is_read_is_not_written(cells):
    cells.layers["masked"] = cells.X.copy()
    with pytest.raises(SlotError, match=r"'masked'\] is an input of this call"):
        cp.pp.mask_counts(cells, layer="masked")
    cp.pp.mask_counts(cells, layer="masked", key_added="other")
    assert dense(cells, "other_truth").any()
