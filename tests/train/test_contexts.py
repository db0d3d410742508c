"""Examples: what is hidden is predicted, what is read is not, all of it by the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellplm_tl._anndata import CountBlock
from cellplm_tl.train.contexts import (
    PLATFORM_QUANTILE,
    PLATFORM_SHARE,
    Corruption,
    Source,
    draw_example,
    hide,
)


class Cells:
    """Cells of a matrix in memory; the second half of the genes of a longer list."""

    def __init__(self, matrix: sp.csr_matrix, contexts: list[np.ndarray]):
        self.matrix, self.contexts = matrix, contexts
        self.n_cells = matrix.shape[0]
        self.genes = np.array([f"G{i}" for i in range(matrix.shape[1])])
        self.gene_index = np.arange(matrix.shape[1]) + 7
        self.coordinates = None

    def counts(self, rows: np.ndarray) -> CountBlock:
        block = self.matrix[rows]
        library = np.asarray(block.sum(1), float).ravel()
        return CountBlock(block.data, block.indices, block.indptr, library)


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    matrix = sp.csr_matrix(rng.poisson(1.5, (40, 30)).astype(np.float32))
    return Cells(matrix, [np.arange(0, 40, 2), np.arange(1, 40, 2)])


def dense(example) -> np.ndarray:
    """What may be read, (cells, genes of the data)."""
    return on_all_genes(example.counts, example.genes)


def other_half(example) -> np.ndarray:
    """The half that is kept for comparison, (cells, genes of the data)."""
    return on_all_genes(example.other, example.other_genes)


def on_all_genes(counts, genes) -> np.ndarray:
    matrix = np.zeros((counts.n_cells, 30), np.float32)
    assert (counts.values > 0).all()
    assert len(counts.values) == counts.offsets[-1]
    columns = genes[counts.columns.long()].numpy() - 7
    matrix[counts.rows().numpy(), columns] = counts.values.numpy()
    return matrix


def in_order(example, values: torch.Tensor) -> np.ndarray:
    """Targets in the order of the data's genes."""
    return values.numpy()[:, np.argsort(example.target_genes.numpy())]


PLAIN = Corruption(panel=0.0, depth=0.0, n_cells=(10, 10))


def test_halves_add_up(cells):
    rows = np.arange(12)
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(0))
    read, hidden = dense(example), in_order(example, example.target)
    np.testing.assert_array_equal(read + hidden, cells.matrix[rows].toarray())
    np.testing.assert_allclose(example.counts.library_size, read.sum(1))
    np.testing.assert_allclose(example.target_total, hidden.sum(1))
    assert example.weights.min() == 1
    assert 0.4 < read.sum() / (read + hidden).sum() < 0.6


def test_what_is_read_is_a_share_drawn_within_its_bounds(cells):
    cells.matrix = cells.matrix * 50
    corruption = {"thin": 1.0, "panel": 0.0, "depth": 0.0, "n_cells": (20, 20)}
    shares = []
    for step in range(40):
        example = draw_example(
            [Source("a", cells, 1.0)], Corruption(**corruption, kept_share=(0.6, 0.9)), 0, step
        )
        read, hidden = float(example.counts.values.sum()), float(example.target.sum())
        shares.append(read / (read + hidden))
    assert 0.595 < min(shares) < 0.65
    assert 0.85 < max(shares) < 0.905


def test_a_fixed_share_draws_nothing(cells):
    """So that runs of before the option are what they were."""
    rows, block = np.arange(6), cells.counts(np.arange(6))
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0)
    assert corruption.kept_share == (0.5, 0.5)
    example = hide(cells, rows, block, corruption, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    rng.permutation(30)
    assert rng.random() < 1
    kept = rng.binomial(block.values.astype(np.int64), 0.5)
    np.testing.assert_array_equal(example.counts.values.numpy(), kept[kept > 0])


def test_masks_hide_what_they_ask_for(cells):
    rows = np.arange(40)
    corruption = Corruption(thin=0.0, panel=0.0, depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(1))
    truth, read = cells.matrix[rows].toarray(), dense(example)
    is_masked = in_order(example, example.weights) == 1
    np.testing.assert_array_equal(read, np.where(is_masked, 0, truth))
    np.testing.assert_array_equal(in_order(example, example.target), truth)
    np.testing.assert_allclose(example.counts.library_size, truth.sum(1))
    masked_cells = is_masked.any(1)
    assert 0.5 < masked_cells.mean() < 0.95  # 75 %
    assert is_masked[masked_cells].mean() == pytest.approx(0.25, abs=0.05)


def test_genes_that_are_no_targets_are_masked_at_the_same_rate(cells):
    rows = np.arange(40)
    corruption = Corruption(thin=0.0, panel=0.0, depth=0.0, cell_mask_rate=1.0, n_targets=10)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(1))
    others = np.setdiff1d(np.arange(30), example.target_genes.numpy() - 7)
    truth = cells.matrix[rows].toarray()[:, others]
    assert (dense(example)[:, others] == 0)[truth > 0].mean() == pytest.approx(0.25, abs=0.05)


def test_a_panel_is_all_that_is_read_and_the_targets_stay_whole(cells):
    rows = np.arange(20)
    corruption = Corruption(thin=1.0, panel=1.0, panel_genes=(5, 5), depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(0))
    assert len(example.genes) == 5
    assert len(example.target_genes) == 30
    np.testing.assert_allclose(example.counts.library_size, dense(example).sum(1))


def test_depth_takes_counts_from_what_is_read_only(cells):
    rows = np.arange(40)
    whole, shallow = (
        hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(2))
        for corruption in (
            Corruption(thin=1.0, panel=0.0, depth=0.0),
            Corruption(thin=1.0, panel=0.0, depth=1.0, depth_range=(0.1, 0.1)),
        )
    )
    assert torch.equal(whole.target, shallow.target)
    assert (dense(shallow) <= dense(whole)).all()
    assert dense(shallow).sum() == pytest.approx(0.1 * dense(whole).sum(), rel=0.3)
    np.testing.assert_allclose(shallow.counts.library_size, dense(shallow).sum(1))


def test_a_step_is_a_function_of_seed_and_number(cells):
    sources = [Source("a", cells), Source("b", cells, weight=2.0)]
    examples = [draw_example(sources, PLAIN, 0, step) for step in (3, 3, 4)]
    assert torch.equal(examples[0].target, examples[1].target)
    assert not torch.equal(examples[0].target, examples[2].target)
    drawn = [draw_example(sources, PLAIN, 0, step).source for step in range(150)]
    assert np.mean(drawn) == pytest.approx(2 / 3, abs=0.12)


def test_deep_cells_are_thinned_to_the_largest_library_size(cells):
    deep = Cells(cells.matrix * 1000, cells.contexts)
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0, max_library_size=5000.0)
    example = draw_example([Source("deep", deep)], corruption, 0, 0)
    total = example.counts.library_size + example.target_total
    np.testing.assert_allclose(total, 5000, rtol=0.1)


def test_only_cells_of_one_context_are_drawn(cells):
    marked = cells.matrix.toarray()
    marked[:, 0] = np.arange(40) % 2 + 1  # names the context
    cells = Cells(sp.csr_matrix(marked), cells.contexts)
    corruption = Corruption(thin=0.0, cell_mask_rate=0.0, panel=0.0, depth=0.0, n_cells=(8, 8))
    for step in range(5):
        example = draw_example([Source("a", cells)], corruption, 0, step)
        assert len(np.unique(dense(example)[:, 0])) == 1


# --- the other half -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "corruption",
    [
        Corruption(thin=1.0, panel=0.0, depth=0.0),
        Corruption(thin=1.0, panel=0.0, depth=0.0, n_targets=4),
        Corruption(thin=1.0, panel=1.0, panel_genes=(5, 5), depth=1.0, platform=0.6, n_targets=4),
    ],
)
def test_the_other_half_is_all_that_was_hidden(corruption, cells):
    """Of every gene of the set, whichever are targets, and whatever becomes of what is read."""
    for seed in range(4):
        rows = np.arange(12)
        truth = cells.matrix[rows].toarray()
        undisturbed = Corruption(thin=1.0, panel=0.0, depth=0.0, n_targets=corruption.n_targets)
        example, kept = (
            hide(cells, rows, cells.counts(rows), how, np.random.default_rng(seed))
            for how in (corruption, undisturbed)
        )
        other = other_half(example)
        np.testing.assert_array_equal(dense(kept) + other, truth)
        np.testing.assert_array_equal(example.other_genes, cells.gene_index)
        np.testing.assert_allclose(example.other.library_size, other.sum(1))
        np.testing.assert_allclose(example.other.library_size, example.target_total)
        targets = example.target_genes.numpy() - 7
        np.testing.assert_array_equal(other[:, targets], example.target)
        assert (dense(example) + other <= truth).all()
        assert 0.4 < other.sum() / truth.sum() < 0.6


def test_masks_have_no_other_half(cells):
    rows = np.arange(12)
    corruption = Corruption(thin=0.0, platform=0.6)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        example = hide(cells, rows, cells.counts(rows), corruption, rng)
        assert example.other is None
        np.testing.assert_array_equal(example.other_genes, cells.gene_index)


def test_a_cell_without_counts_has_two_halves_without(cells):
    empty = cells.matrix.toarray()
    empty[3] = 0
    cells = Cells(sp.csr_matrix(empty), cells.contexts)
    rows, corruption = np.arange(6), Corruption(thin=1.0, panel=0.0, depth=0.0, platform=0.5)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(0))
    for counts in (example.counts, example.other):
        assert counts.n_cells == 6
        assert counts.library_size[3] == 0
        assert counts.offsets[3] == counts.offsets[4]


# --- platforms ------------------------------------------------------------------------------------

SEEDS = range(12)


def pairs(cells, thin: float, platform: float):
    """Examples with and without effects of a platform, from the same draws before."""
    rows = np.arange(40)
    for seed in SEEDS:
        yield tuple(
            hide(
                cells,
                rows,
                cells.counts(rows),
                Corruption(thin=thin, panel=0.0, depth=0.0, platform=value),
                np.random.default_rng(seed),
            )
            for value in (0.0, platform)
        )


@pytest.mark.parametrize("thin", [0.0, 1.0])
def test_a_platform_takes_counts_of_what_is_read_alone(thin, cells):
    changed = []
    for plain, biased in pairs(cells, thin, 0.5):
        read, expected = dense(biased), dense(plain)
        assert (read <= expected).all()
        lost = (expected - read).sum(1)
        np.testing.assert_allclose(
            plain.counts.library_size - biased.counts.library_size, lost, atol=1e-3
        )
        for name in ("target", "weights", "target_total", "target_genes", "genes"):
            assert torch.equal(getattr(biased, name), getattr(plain, name))
        if thin:
            np.testing.assert_array_equal(other_half(biased), other_half(plain))
        changed.append(lost.sum() > 0)
    assert 2 < sum(changed) < 10  # half of the steps


def test_the_cells_of_a_context_share_a_factor_per_gene(cells):
    """Drawn anew in every step: log-normal, those of the largest tenth at 1."""
    deep = Cells(sp.csr_matrix(np.full((40, 30), 40_000, np.float32)), cells.contexts)
    seen = []
    for plain, biased in pairs(deep, 1.0, 0.5):
        share = dense(biased).astype(float) / dense(plain)  # of 20,000 counts each
        factors = share.mean(0)
        np.testing.assert_allclose(share, np.tile(factors, (40, 1)), atol=0.02)
        if (factors == 1).all():
            continue
        assert (factors[share.min(0) == 1] == 1).all()
        assert 3 <= (factors == 1).sum() <= 4  # a tenth of 30 genes, and the quantile itself
        assert factors.min() < 0.6
        seen.append(np.log(np.sort(factors)[:-4]))
    assert 2 < len(seen) < 10
    assert np.ptp([values[0] for values in seen]) > 0.1


def test_the_factors_written_out(cells):
    """The draws after the halves: whether, factors, binomial; then panel and depth as ever."""
    rows, block = np.arange(40), cells.counts(np.arange(40))
    of_entry = np.repeat(rows, np.diff(block.offsets))
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0, platform=0.7)
    n_biased = 0
    for seed in SEEDS:
        used = np.random.default_rng(seed)
        example = hide(cells, rows, block, corruption, used)
        rng = np.random.default_rng(seed)
        rng.permutation(30)
        rng.random()
        kept = rng.binomial(block.values.astype(int), 0.5)
        if rng.random() < PLATFORM_SHARE == 0.5:
            n_biased += 1
            factors = np.exp(rng.normal(0, 0.7, 30))
            chance = np.minimum(1, factors / np.quantile(factors, PLATFORM_QUANTILE))
            kept = rng.binomial(kept, chance[block.columns])
        expected = np.zeros((40, 30))
        expected[of_entry, block.columns] = kept
        np.testing.assert_array_equal(dense(example), expected)
        np.testing.assert_allclose(example.counts.library_size, expected.sum(1))
        rng.random(2)  # no panel, no less depth
        assert used.random() == rng.random()
    assert 2 < n_biased < 10


def test_without_platforms_nothing_is_drawn_for_them(cells):
    """Runs of before, whose configs have no such field, draw what they drew."""
    rows, block = np.arange(40), cells.counts(np.arange(40))
    for thin in (0.0, 1.0):
        used, rng = (np.random.default_rng(3) for _ in range(2))
        hide(cells, rows, block, Corruption(thin=thin, panel=0.0, depth=0.0), used)
        rng.permutation(30)
        rng.random()
        if thin:
            rng.binomial(block.values.astype(int), 0.5)
        else:
            rng.random(40)
            rng.random((40, 30))
            rng.random(len(block.values))
        rng.random(2)  # whether there is a panel, and whether there is less depth
        assert used.random() == rng.random()


def test_a_platform_and_a_panel_and_less_depth(cells):
    """The library is what is read of a panel."""
    rows = np.arange(40)
    corruption = Corruption(
        thin=1.0, panel=1.0, panel_genes=(9, 9), depth=1.0, depth_range=(0.3, 0.3), platform=0.5
    )
    for seed in SEEDS:
        example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(seed))
        assert len(example.genes) == 9
        assert len(example.other_genes) == 30
        np.testing.assert_allclose(example.counts.library_size, dense(example).sum(1))
