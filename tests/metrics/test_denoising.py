"""Scores of denoised expression, against lines written from their definitions."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.metrics import mean_poisson_deviance, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from cellplm_tl._errors import InputError, OptionError
from cellplm_tl.metrics import denoising
from cellplm_tl.metrics.denoising import held_out_scores, masked_entries, score_entries

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "metrics.npz"
N_CELLS, N_GENES = 40, 30


@pytest.fixture
def draws():
    """Two draws of the same cells, what is expected of them, and entries of the first to hide."""
    rng = np.random.default_rng(0)
    expected = rng.gamma(0.7, 2.0, N_GENES) * rng.gamma(4, 0.25, (N_CELLS, 1))
    expected[: N_CELLS // 2] = expected[: N_CELLS // 2][:, rng.permutation(N_GENES)]
    first, second = rng.poisson(expected), rng.poisson(expected)
    first[:, 0] += 1  # no cell is empty
    second[:, 0] += 1
    second[:, 3] = 0  # a gene without variance
    masked = (rng.random(first.shape) < 0.3) & (first > 0)
    guess = rng.gamma(5, 0.2, expected.shape) * expected
    return first, second, guess, masked


def lognorm_of(counts: np.ndarray, target: float = 1e4) -> np.ndarray:
    return np.log(1 + target * counts / counts.sum(axis=1, keepdims=True))


# ---------------------------------------------------------------------------------- hidden entries


def test_scores_of_hidden_entries(draws):
    counts, _, guess, masked = draws
    x, y = lognorm_of(counts)[masked], lognorm_of(guess)[masked]
    scores = denoising(counts, guess, masked=masked)
    assert scores["rmse_masked"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
    assert scores["mae_masked"] == pytest.approx(np.mean(np.abs(x - y)))
    assert scores["pearson_masked"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert scores["cosine_masked"] == pytest.approx(cosine_similarity([x], [y]).item())


def test_gene_centred_pearson_of_genes_with_five_hidden_entries(draws):
    counts, _, guess, masked = draws
    hidden = pd.DataFrame(
        {
            "gene": np.nonzero(masked)[1],
            "x": lognorm_of(counts)[masked],
            "y": lognorm_of(guess)[masked],
        }
    )
    sizes = hidden["gene"].value_counts()
    assert sizes.min() < 5 <= sizes.max()
    assert 5 in sizes.to_numpy()
    hidden = hidden[hidden["gene"].map(sizes) >= 5]
    centred = hidden[["x", "y"]] - hidden.groupby("gene")[["x", "y"]].transform("mean")
    expected = stats.pearsonr(centred["x"], centred["y"]).statistic
    found = denoising(counts, guess, masked=masked)["pearson_gene_centred"]
    assert found == pytest.approx(expected)
    few = np.zeros_like(masked)
    few[np.nonzero(masked)[0][:1], np.nonzero(masked)[1][:1]] = True
    assert np.isnan(denoising(counts, guess, masked=few)["pearson_gene_centred"])


def test_hidden_entries_are_ranked_against_zeros_of_the_same_genes_and_cells(draws):
    counts, _, guess, masked = draws
    rows, columns = np.nonzero(masked)
    rng = np.random.default_rng(107)
    other_rows = rng.permutation(rows)
    other_columns = rng.permutation(columns)
    is_zero = counts[other_rows, other_columns] == 0
    y = lognorm_of(guess)
    hidden, zeros = y[masked], y[other_rows, other_columns][is_zero]
    above = (hidden[:, None] > zeros).mean() + 0.5 * (hidden[:, None] == zeros).mean()
    found = denoising(counts, guess, masked=masked, random_state=107)["auroc_masked_vs_zero"]
    assert found == pytest.approx(above)

    entries = masked_entries(counts, guess, masked, random_state=107)
    truth = entries["truth"].to_numpy()
    assert entries["is_masked"].tolist() == (truth > 0).tolist()
    assert len(entries) == len(rows) + is_zero.sum()
    assert np.allclose(entries["predicted"], y[entries["cell"], entries["gene"]])
    assert np.allclose(truth[: len(rows)], lognorm_of(counts)[masked])
    assert roc_auc_score(entries["is_masked"], entries["predicted"]) == pytest.approx(above)


def test_a_constant_per_gene_wins_the_error_and_nothing_else(draws):
    counts, _, guess, masked = draws
    seen = np.where(masked, 0, counts)
    x = lognorm_of(np.maximum(seen, 1e-12))
    mean_of_nonzero = np.array(
        [x[seen[:, g] > 0, g].mean() if seen[:, g].any() else 0 for g in range(N_GENES)]
    )
    constant = np.tile(mean_of_nonzero, (N_CELLS, 1))
    by_constant = denoising(counts, lognorm=constant, masked=masked)
    by_guess = denoising(counts, guess, masked=masked)
    assert by_constant["rmse_masked"] < by_guess["rmse_masked"]
    assert by_constant["pearson_gene_centred"] == 0.0
    assert by_guess["pearson_gene_centred"] > 0.2
    in_single = denoising(counts, lognorm=constant.astype(np.float32), masked=masked)
    assert in_single["pearson_gene_centred"] == 0.0


def test_entries_are_drawn_again_by_a_bootstrap(draws):
    counts, _, guess, masked = draws
    entries = masked_entries(counts, guess, masked, random_state=3)
    assert score_entries(entries) == denoising(counts, guess, masked=masked, random_state=3)
    twice = pd.concat([entries, entries])
    for name, score in score_entries(entries).items():
        if name != "pearson_gene_centred":  # now more genes have five entries
            assert score_entries(twice)[name] == pytest.approx(score)
    assert np.isnan(score_entries(entries[entries["is_masked"]])["auroc_masked_vs_zero"])
    assert np.isnan(list(score_entries(entries[:0]).values())).all()


# --------------------------------------------------------------------------------- held-out counts


def test_deviance_of_held_out_counts(draws):
    _, counts, guess, _ = draws
    scaled = guess * (counts.sum(axis=1) / guess.sum(axis=1))[:, None]
    expected = mean_poisson_deviance(counts.ravel(), np.maximum(scaled, 1e-6).ravel())
    assert denoising(counts, guess)["poisson_deviance"] == pytest.approx(expected)
    assert denoising(counts, 7 * guess)["poisson_deviance"] == pytest.approx(expected)
    per_cell, _ = held_out_scores(counts, guess)
    of_first = mean_poisson_deviance(counts[0], np.maximum(scaled[0], 1e-6))
    assert per_cell["poisson_deviance"][0] == pytest.approx(of_first)


def test_what_is_expected_to_be_zero_is_floored(draws):
    _, counts, guess, _ = draws
    guess[:, 5] = 0
    scaled = guess * (counts.sum(axis=1) / guess.sum(axis=1))[:, None]
    assert counts[:, 5].any()
    expected = mean_poisson_deviance(counts.ravel(), np.maximum(scaled, 1e-6).ravel())
    assert denoising(counts, guess)["poisson_deviance"] == pytest.approx(expected)
    guess[2] = 0  # a whole cell
    deviance = held_out_scores(counts, guess)[0]["poisson_deviance"]
    assert deviance[2] == pytest.approx(mean_poisson_deviance(counts[2], np.full(N_GENES, 1e-6)))


def test_pearson_per_cell_and_per_gene(draws):
    _, counts, guess, _ = draws
    x, y = lognorm_of(counts), lognorm_of(guess)
    per_cell, per_gene = held_out_scores(counts, guess)
    for i in (0, 11, 39):
        assert per_cell["pearson_per_cell"][i] == pytest.approx(stats.pearsonr(x[i], y[i])[0])
    for g in (0, 7, 29):
        assert per_gene[g] == pytest.approx(stats.pearsonr(x[:, g], y[:, g])[0])
    assert per_gene[3] == 0.0  # never counted
    scores = denoising(counts, guess)
    assert scores["pearson_per_cell"] == pytest.approx(per_cell["pearson_per_cell"].mean())
    assert scores["pearson_per_gene"] == pytest.approx(per_gene.mean())
    assert list(scores) == ["poisson_deviance", "pearson_per_cell", "pearson_per_gene"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_does_not_vary_correlates_with_nothing(draws, dtype):
    _, counts, guess, _ = draws
    profile, depth = guess.mean(axis=0), counts.sum(axis=1)
    constant = (profile / profile.sum() * depth[:, None]).astype(dtype)  # up to rounding
    scores = denoising(counts, constant)
    assert scores["pearson_per_gene"] == 0.0
    assert scores["pearson_per_cell"] > 0
    assert denoising(counts, np.ones(counts.shape))["pearson_per_cell"] == 0.0


def test_the_methods_own_logarithm_is_what_correlates(draws):
    _, counts, guess, _ = draws
    own = np.sqrt(lognorm_of(guess))
    both, alone, without = (
        denoising(counts, guess, lognorm=own),
        denoising(counts, lognorm=own),
        denoising(counts, guess),
    )
    x = lognorm_of(counts)
    expected = np.mean([stats.pearsonr(a, b)[0] for a, b in zip(x, own, strict=True)])
    assert both["pearson_per_cell"] == pytest.approx(expected)
    assert both["poisson_deviance"] == without["poisson_deviance"]
    assert "poisson_deviance" not in alone
    assert alone.items() <= both.items()


def test_cells_without_held_out_counts_are_left_out(draws):
    _, counts, guess, _ = draws
    counts[[4, 9]] = 0
    others = np.delete(np.arange(N_CELLS), [4, 9])
    per_cell, _ = held_out_scores(counts, guess, lognorm=lognorm_of(guess))
    assert per_cell.index.tolist() == others.tolist()
    without = denoising(counts[others], guess[others])
    assert denoising(counts, guess) == pytest.approx(without)
    assert denoising(counts, guess, lognorm=lognorm_of(guess)) == pytest.approx(without)


# ----------------------------------------------------------------------------------- official code


@pytest.mark.parametrize(
    ("case", "target_sum"), [("masked", 1e4), ("all", 1e4), ("raw_masked", None)]
)
def test_the_scores_of_the_official_code(case, target_sum):
    golden = np.load(GOLDEN)
    masked = golden["den_mask"] if "masked" in case else None
    scores = denoising(
        golden["den_true"],
        golden["den_pred"],
        masked=masked,
        target_sum=target_sum,
        compatible=True,
    )
    names = {"pearson": "corr", "cosine": "cos"}
    for name, score in scores.items():
        expected = golden[f"den_{case}_{names.get(name, name)}"]
        assert score == pytest.approx(float(expected), rel=1e-6, abs=1e-7)
    assert list(scores) == ["mse", "rmse", "mae", "pearson", "cosine"]


def test_what_the_official_code_calls_by_the_same_name_is_the_same(draws):
    counts, _, guess, masked = draws
    ours = denoising(counts, guess, masked=masked)
    theirs = denoising(counts, guess, masked=masked, compatible=True)
    for name in ("rmse", "mae", "pearson", "cosine"):
        assert theirs[name] == pytest.approx(ours[f"{name}_masked"])


# ------------------------------------------------------------------------------------------- forms


def _unsorted(counts):
    matrix = sparse.csr_matrix(counts).tocsc().tocsr()
    for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        matrix.indices[start:end] = matrix.indices[start:end][::-1]
        matrix.data[start:end] = matrix.data[start:end][::-1]
    matrix.has_sorted_indices = False
    return matrix


@pytest.mark.parametrize(
    "form",
    [sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix, _unsorted, np.asfortranarray],
)
def test_forms_of_the_input_do_not_matter(draws, form):
    first, second, guess, masked = draws
    hidden = form(np.where(masked, first, 0))  # the hidden counts themselves as the mask
    expected = denoising(first, guess, masked=masked)
    assert denoising(form(first), form(guess), masked=hidden) == pytest.approx(expected)
    own = form(lognorm_of(guess))
    assert denoising(form(first), lognorm=own, masked=hidden) == pytest.approx(expected)
    expected = denoising(second, guess)
    assert denoising(form(second), form(guess)) == pytest.approx(expected)
    assert denoising(form(second), form(guess), lognorm=own) == pytest.approx(expected)


def test_values_below_zero_count_as_zero(draws):
    first, second, guess, masked = draws
    below = np.where(guess < 0.3, -guess, guess)
    cut = np.maximum(below, 0)
    assert (below < 0).any()
    for form in (np.asarray, sparse.csr_matrix):
        assert denoising(second, form(below)) == pytest.approx(denoising(second, cut))
        found = denoising(first, form(below), masked=masked)
        assert found == pytest.approx(denoising(first, cut, masked=masked))


def test_the_input_stays_as_it_is(draws):
    first, second, guess, masked = draws
    for matrix in (first, second, guess, masked):
        matrix.flags.writeable = False
    counts = _unsorted(second)
    before = counts.indices.copy()
    denoising(first, guess, masked=masked)
    denoising(counts, guess)
    assert counts.indices.tolist() == before.tolist()


def test_blocks_do_not_show_and_bound_the_memory(draws, monkeypatch):
    first, second, guess, _ = draws
    module = sys.modules[denoising.__module__]
    expected = [denoising(second, guess), denoising(first, guess, compatible=True)]
    monkeypatch.setattr(module, "BLOCK_VALUES", 70)
    assert denoising(second, guess) == pytest.approx(expected[0])
    assert denoising(first, guess, compatible=True) == pytest.approx(expected[1])

    monkeypatch.setattr(module, "BLOCK_VALUES", 2**14)
    rng = np.random.default_rng(0)
    large = rng.random((2000, 500), dtype=np.float32)
    counts = sparse.random(2000, 500, 0.05, random_state=0, format="csr")
    counts.data = np.ceil(3 * counts.data)
    tracemalloc.start()
    denoising(counts, large)
    denoising(counts, large, masked=counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * large.nbytes  # in double precision each copy would be two


# ------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_scored(draws):
    counts, _, guess, masked = draws
    with pytest.raises(OptionError, match="give predicted .* lognorm, or both"):
        denoising(counts)
    with pytest.raises(OptionError, match="target_sum must be above 0, or None; got 0"):
        denoising(counts, guess, target_sum=0)
    with pytest.raises(OptionError, match="lognorm cannot be scored with compatible=True"):
        denoising(counts, guess, lognorm=guess, compatible=True)
    with pytest.raises(InputError, match=r"shape of truth, \(40, 30\); got \(40, 29\)"):
        denoising(counts, guess[:, 1:])
    with pytest.raises(InputError, match=r"masked must have the shape of truth"):
        denoising(counts, guess, masked=masked[1:])
    with pytest.raises(InputError, match="truth must be numbers of shape"):
        denoising(counts[0], guess)
    with pytest.raises(InputError, match="smallest value is -2"):
        denoising(np.where(counts == 1, -2, counts), guess)
    with pytest.raises(InputError, match="has no counts"):
        denoising(0 * counts, guess)
    with pytest.raises(InputError, match="masked names no entry"):
        denoising(counts, guess, masked=0 * masked)
    with pytest.raises(InputError, match="predicted has NaN or infinite values"):
        denoising(counts, np.where(masked, np.nan, guess))
    with pytest.raises(InputError, match="lognorm has NaN or infinite values"):
        denoising(counts, lognorm=sparse.csr_matrix(np.where(masked, np.inf, guess)))


def test_hidden_entries_must_be_counts(draws):
    counts, _, guess, masked = draws
    seen = np.where(masked, 0, counts)  # not the truth
    row, column = (axis[0] for axis in np.nonzero(masked))
    with pytest.raises(InputError, match=f"0 in truth, the first in row {row}, column {column}"):
        denoising(seen, guess, masked=masked)
