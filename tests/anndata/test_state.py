"""What state values are in, and the way back to counts: arrays in, arrays out."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from cellplm_tl._anndata.state import NOMINAL_TOTAL, find_grid, find_precision, find_state

LOGS = {
    "natural log": np.log1p,
    "log2": lambda x: np.log2(1 + x),
    "log10": lambda x: np.log10(1 + x),
}


def simulate(n_cells: int = 60, n_genes: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Give counts above 0, cell after cell, and the offsets of the cells; one cell is empty."""
    rng = np.random.default_rng(seed)
    means = rng.gamma(0.3, 1.0, n_genes) * rng.lognormal(1.0, 0.5, (n_cells, 1))
    counts = rng.poisson(means).astype(np.float64)
    counts[3] = 0
    counts = sparse.csr_matrix(counts)
    return counts.data, counts.indptr


def normalise(counts: np.ndarray, offsets: np.ndarray, target: float) -> np.ndarray:
    """Scale each cell to a total."""
    per_cell = np.diff(offsets)
    totals = np.array([part.sum() for part in np.split(counts, offsets[1:-1])])
    return counts / np.repeat(totals, per_cell) * target


def test_integers_are_counts_whatever_their_type():
    counts, offsets = simulate()
    for dtype in (np.int64, np.uint8, np.float16, np.float32, np.float64):
        state = find_state(counts.astype(dtype), offsets)
        assert (state.kind, state.way, state.facts) == ("counts", "as stored", {})
        found, has_counts = state.to_counts(counts.astype(dtype), offsets)
        assert found.dtype == np.float32
        assert np.array_equal(found, counts)
        assert has_counts.all()


def test_a_block_with_fractions_among_counts_is_told():
    counts, offsets = simulate()
    state = find_state(counts, offsets)
    counts[offsets[5]] += 0.5
    _, has_counts = state.to_counts(counts, offsets)
    assert np.flatnonzero(~has_counts).tolist() == [5]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("transform", ["none", *LOGS])
def test_counts_are_recovered_exactly(transform, target, dtype):
    counts, offsets = simulate()
    values = normalise(counts, offsets, target).astype(dtype)
    values = LOGS.get(transform, np.copy)(values)
    assert values.dtype == dtype
    state = find_state(values, offsets)
    assert (state.way, state.transform) == ("recovered", transform)
    assert state.kind == ("library-normalised" if transform == "none" else "log-normalised")
    assert state.facts["median_total"] == pytest.approx(target, rel=1e-4)
    assert state.facts["on_grid_share"] == 1.0
    assert "lost" not in state.facts
    found, has_counts = state.to_counts(values, offsets)
    assert np.array_equal(found, counts)
    assert has_counts.all()


@pytest.mark.parametrize("decimals", [2, 3, 4, 5, 6])
def test_counts_are_recovered_from_rounded_logs(decimals):
    counts, offsets = simulate()
    values = np.log1p(normalise(counts, offsets, 1e4)).round(decimals)
    # Six decimals are what single precision has at this size: nothing is left to see.
    for stored in (values, values.astype(np.float32), values.round(decimals + 2).round(decimals)):
        state = find_state(stored, offsets)
        assert state.precision.decimals == (decimals if decimals < 6 else None)
        found, has_counts = state.to_counts(stored, offsets)
        assert has_counts.all()
        assert np.array_equal(found, counts)


def test_counts_are_recovered_from_half_precision():
    counts, offsets = simulate()
    values = np.log1p(normalise(counts, offsets, 1e4)).astype(np.float16)
    state = find_state(values, offsets)
    found, _ = state.to_counts(values, offsets)
    assert state.way == "recovered"
    assert np.array_equal(found, counts)


def test_counts_too_large_for_the_precision_are_near_and_told():
    counts, offsets = simulate()
    counts[offsets[1]] = 5000
    values = np.log1p(normalise(counts, offsets, 1e4)).round(3)
    state = find_state(values, offsets)
    found, has_counts = state.to_counts(values, offsets)
    assert has_counts.all()
    is_large = counts == 5000
    assert np.array_equal(found[~is_large], counts[~is_large])
    assert found[is_large] == pytest.approx(5000, rel=1e-3)
    assert state.facts["lost"].startswith("1 of ")
    assert 0.99 < state.facts["exact_share"] < 1


def test_log_of_plain_counts_is_recovered():
    counts, offsets = simulate()
    state = find_state(np.log1p(counts), offsets)
    assert (state.way, state.transform) == ("recovered", "natural log")
    assert np.array_equal(state.to_counts(np.log1p(counts), offsets)[0], counts)


def test_size_factors_other_than_totals_are_recovered():
    counts, offsets = simulate()
    factors = np.random.default_rng(1).lognormal(0, 0.7, len(offsets) - 1)
    values = np.log2(counts / np.repeat(factors, np.diff(offsets)) + 1)
    state = find_state(values, offsets)
    assert (state.way, state.transform) == ("recovered", "log2")
    assert np.array_equal(state.to_counts(values, offsets)[0], counts)


def test_what_scanpy_makes_is_recovered():
    counts, offsets = simulate()
    columns = np.concatenate([np.arange(n) for n in np.diff(offsets)])
    adata = ad.AnnData(sparse.csr_matrix((counts.astype(np.float32), columns, offsets)))
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    state = find_state(adata.X.data, offsets)
    assert state.way == "recovered"
    assert np.array_equal(state.to_counts(adata.X.data, offsets)[0], counts)


def test_the_pbmc_of_scanpy_are_recovered_every_one(pbmc):
    """Three decimals; the truth is known from the library sizes that the file keeps apart."""
    with_sizes = sc.datasets.pbmc68k_reduced().obs["n_counts"].to_numpy(np.float64)
    values, offsets = pbmc.X.data, pbmc.X.indptr
    truth = np.expm1(values.astype(np.float64)) / 1e4 * np.repeat(with_sizes, np.diff(offsets))
    assert np.abs(truth - np.rint(truth)).max() < 0.25
    state = find_state(values, offsets)
    assert (state.kind, state.way, state.transform) == (
        "log-normalised",
        "recovered",
        "natural log",
    )
    assert state.facts["decimals"] == 3
    found, has_counts = state.to_counts(values, offsets)
    assert has_counts.all()
    assert np.array_equal(found, np.rint(truth))


def test_a_smallest_value_that_is_no_single_count():
    rng = np.random.default_rng(0)
    counts = np.concatenate([[3.0, 4.0, 5.0, 7.0, 11.0], rng.integers(4, 60, 200)])
    offsets = np.array([0, len(counts)])
    x = counts * 0.731
    grid = find_grid(x, 1e-6 * x, offsets)
    assert grid.fits.all()
    assert grid.step == pytest.approx([0.731], rel=1e-5)


def test_counts_with_a_common_divisor_come_back_divided():
    counts, offsets = simulate()
    counts[offsets[7] : offsets[8]] *= 2
    values = np.log1p(normalise(counts, offsets, 1e4))
    found, _ = find_state(values, offsets).to_counts(values, offsets)
    counts[offsets[7] : offsets[8]] /= 2
    assert np.array_equal(found, counts)


def test_cells_on_no_grid_among_others_are_scaled_as_those_are():
    counts, offsets = simulate()
    rng = np.random.default_rng(1)
    is_odd = np.repeat(np.arange(len(offsets) - 1) % 5 == 1, np.diff(offsets))
    noise = np.where(is_odd, rng.lognormal(0, 0.1, len(counts)), 1.0)
    values = np.log1p(normalise(counts, offsets, 1e4) * noise)
    state = find_state(values, offsets)
    assert state.way == "recovered"
    assert 0.7 < state.facts["on_grid_share"] < 0.9
    found, has_counts = state.to_counts(values, offsets)
    assert np.array_equal(~has_counts, np.arange(len(offsets) - 1) % 5 == 1)
    assert np.array_equal(found[~is_odd], counts[~is_odd])
    totals = np.add.reduceat(counts, offsets[:-1][np.diff(offsets) > 0])
    assert found[is_odd] == pytest.approx(
        np.expm1(values[is_odd]) * np.median(totals) / 1e4, rel=0.3
    )


def continuous(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Give values on no grid, of cells of one total."""
    counts, offsets = simulate(seed=seed)
    noise = np.random.default_rng(seed).lognormal(0, 0.3, len(counts))
    return normalise(counts * noise, offsets, 1e5), offsets


@pytest.mark.parametrize("transform", ["none", *LOGS])
def test_one_total_shows_the_log_where_there_is_no_grid(transform):
    x, offsets = continuous()
    values = LOGS.get(transform, np.copy)(x).astype(np.float32)
    state = find_state(values, offsets)
    assert (state.way, state.transform) == ("inverted", transform)
    assert state.facts["chosen_because"] == "all cells have one total"
    assert state.facts["scaled_to_total"] == NOMINAL_TOTAL
    assert "library sizes" in state.facts["lost"]
    found, has_counts = state.to_counts(values, offsets)
    assert not has_counts.any()
    assert found == pytest.approx(x * NOMINAL_TOTAL / 1e5, rel=1e-4)


def test_small_fractions_without_a_clue_are_taken_for_natural_logs():
    x, offsets = continuous()
    x *= np.repeat(np.random.default_rng(0).lognormal(0, 0.5, len(offsets) - 1), np.diff(offsets))
    state = find_state(np.log1p(x), offsets)
    assert (state.way, state.transform) == ("inverted", "natural log")
    assert state.facts["chosen_because"].startswith("assumed")


def test_some_processed_cells_among_counts_do_not_change_the_others():
    """A cell of even counts must not come back halved, as it would from a grid."""
    counts, offsets = simulate()
    counts[offsets[7] : offsets[8]] *= 2
    values = counts.copy()
    values[: offsets[3]] *= 0.37
    state = find_state(values, offsets)
    assert (state.kind, state.way) == ("counts", "as stored")
    assert state.facts["fractional_share"] > 0.02
    assert np.array_equal(state.to_counts(values, offsets)[0], values.astype(np.float32))


def test_log2_of_plain_counts_is_no_count():
    """Most values of shallow cells are then integers: the log2 of 1 + 1, 1 + 3 and 1 + 7."""
    counts, offsets = simulate()
    counts = np.where(counts > 1, np.minimum(counts, 5), counts)
    values = np.log2(1 + counts)
    assert (values == np.rint(values)).mean() > 0.5
    state = find_state(values, offsets)
    assert (state.way, state.transform) == ("recovered", "log2")
    assert np.array_equal(state.to_counts(values, offsets)[0], counts)


@pytest.mark.parametrize("is_mostly_integer", [True, False])
def test_fractional_counts_are_used_as_they_stand(is_mostly_integer):
    counts, offsets = simulate()
    rng = np.random.default_rng(0)
    if is_mostly_integer:  # as expected counts of reads that map to several genes
        values = counts + np.where(rng.random(len(counts)) < 0.2, rng.random(len(counts)), 0)
    else:  # as counts with an ambient profile taken off; too large for logs
        values = counts * 50 * rng.random(len(counts))
    state = find_state(values, offsets)
    assert (state.kind, state.way) == ("counts", "as stored")
    assert "no integers" in state.facts["lost"]
    assert not state.promises_counts
    assert np.array_equal(state.to_counts(values, offsets)[0], values.astype(np.float32))


def test_values_on_no_grid_are_hardly_ever_taken_for_counts():
    """Every way to store them: rounding makes a fit by chance easier."""
    for seed in range(5):
        x, offsets = continuous(seed)
        logs = np.log1p(x)
        for values in (logs, logs.astype(np.float32), logs.astype(np.float16), logs.round(3)):
            assert find_state(values, offsets).way == "inverted"


def test_one_decimal_is_too_coarse_to_claim_counts():
    counts, offsets = simulate()
    values = np.log1p(normalise(counts, offsets, 1e4)).round(1)
    assert find_state(values, offsets).way == "inverted"


def test_nothing_at_all_counts_as_counts():
    for n_cells in (0, 3):
        offsets = np.zeros(n_cells + 1, dtype=np.int32)
        state = find_state(np.zeros(0, np.float32), offsets)
        assert (state.kind, state.way) == ("counts", "as stored")
        found, has_counts = state.to_counts(np.zeros(0, np.float32), offsets)
        assert (found.shape, has_counts.shape) == ((0,), (n_cells,))


def test_one_cell_shows_its_grid():
    counts, offsets = simulate(n_cells=4)
    one = counts[: offsets[1]]
    values = np.log1p(normalise(one, offsets[:2], 1e4)).astype(np.float32)
    state = find_state(values, offsets[:2])
    assert state.way == "recovered"
    assert np.array_equal(state.to_counts(values, offsets[:2])[0], one)


@pytest.mark.parametrize(
    ("values", "decimals", "eps"),
    [
        (np.array([0.123, 4.567], np.float32), 3, 2.0**-24),
        (np.array([0.12, 4.5]), 2, 2.0**-24),
        (np.array([np.pi, np.e]), None, 2.0**-24),
        (np.array([np.pi, np.e], np.float16), None, 2.0**-11),
        (np.array([np.pi, 1e6], np.float32), None, 2.0**-24),
        (np.array([]), None, 2.0**-11),
    ],
)
def test_precision(values, decimals, eps):
    assert find_precision(values) == (decimals, eps)


@given(
    counts=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=30), min_size=1, max_size=8),
    target=st.sampled_from([1e3, 1e4, 123456.0]),
    decimals=st.sampled_from([None, 3, 4]),
)
def test_a_grid_explains_what_it_was_made_from(counts, target, decimals):
    """Up to a common divisor, which nothing in the values shows."""
    offsets = np.cumsum([0, *map(len, counts)])
    counts = [np.array([1, *cell[1:]]) for cell in counts]
    flat = np.concatenate(counts).astype(np.float64)
    values = np.log1p(normalise(flat, offsets, target))
    error = 1e-12 * values if decimals is None else np.full(len(values), 0.5 * 10.0**-decimals)
    values = values if decimals is None else values.round(decimals)
    x = np.expm1(values)
    grid = find_grid(x, error * 1.01 * (1 + x), offsets)
    assert grid.fits.all()
    totals = np.array([cell.sum() for cell in counts])
    assert grid.step == pytest.approx(target / totals, rel=0.05)
