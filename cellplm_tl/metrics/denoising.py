"""How close denoised expression comes to counts that were hidden, or counted a second time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import xlogy
from sklearn.metrics import roc_auc_score

from cellplm_tl._errors import InputError, OptionError

MIN_ENTRIES = 5  # masked entries of a gene, for its mean to be worth taking off
FLOOR = 1e-6  # smallest expected count: a zero expected and one count seen is not infinitely wrong
ROUNDING = 1e-6  # a spread below this share of the size is what rounding leaves of a constant
BLOCK_VALUES = 2**22  # of each matrix, dense, at a time


def denoising(
    truth: Any,
    predicted: Any = None,
    *,
    lognorm: Any = None,
    masked: Any = None,
    target_sum: float | None = 1e4,
    random_state: int = 0,
    compatible: bool = False,
) -> dict[str, float]:
    r"""Score denoised expression by counts that the method did not see.

    There are two ways to have such counts. With `masked`, entries that were counted have been set
    to 0 (:func:`cellplm_tl.pp.mask_counts`), and those entries are scored. Without it, `truth` is
    a second draw of every count (:func:`cellplm_tl.pp.thin_counts`), and all entries are scored.

    Parameters
    ----------
    truth : array_like or sparse matrix, shape (cells, genes)
        With `masked`: the counts before masking. Without: the held-out counts, of which the method
        has seen none.
    predicted : array_like or sparse matrix, shape (cells, genes), optional
        Expected counts, on any scale: each cell is scaled by its own total. Values below 0 count
        as 0.
    lognorm : array_like or sparse matrix, shape (cells, genes), optional
        The expected log1p per `target_sum`, where the method gives one. By default it is that of
        `predicted`, which is another quantity (the expectation of a logarithm is less than the
        logarithm of the expectation).
    masked : array_like or sparse matrix, shape (cells, genes), optional
        Which entries were hidden: where it is not 0. The hidden counts themselves do as well.
    target_sum : float, optional
        Counts that a cell is scaled to before the logarithm, 10,000 by default; None: values are
        compared as they stand, without scaling and without logarithm.
    random_state : int, default 0
        Seed of the zeros that masked entries are ranked against.
    compatible : bool, default False
        Give what the official code gives instead, for comparison with figures made by it.

    Returns
    -------
    dict of str to float
        With `masked`, over the hidden entries, in log1p per `target_sum`:

        ``rmse_masked``, ``mae_masked``, ``pearson_masked``, ``cosine_masked``
            The paper's. They reward who predicts what a value is *if it is not zero*: see Notes.
        ``pearson_gene_centred``
            Pearson after each gene's mean over its hidden entries is taken off both sides; genes
            with 5 or more. What is constant per gene scores 0.
        ``auroc_masked_vs_zero``
            Whether hidden entries are predicted to be larger than true zeros of the same genes
            and cells.

        Without, over all cells that have counts in `truth`:

        ``poisson_deviance``
            Mean over all entries, the prediction scaled to each cell's total; less is better. Only
            where `predicted` is given.
        ``pearson_per_cell``, ``pearson_per_gene``
            Of log1p per `target_sum`, mean over cells and over genes; a cell or gene without
            variance on either side counts as 0.

        With `compatible`: ``mse``, ``rmse``, ``mae``, ``pearson``, ``cosine``, over the hidden
        entries; without `masked` over all, the last two then cell by cell.

    Raises
    ------
    InputError
        Shapes that do not fit each other, values that are not finite, a truth with values below 0
        or nothing else than 0, or hidden entries that are 0 in it.
    OptionError
        Neither `predicted` nor `lognorm` is given, `target_sum` is not above 0, or `lognorm`
        together with `compatible`.

    Notes
    -----
    Hidden entries are known not to be zero. The mean of a gene's non-zero values, into which no
    cell enters, is therefore hard to beat on ``rmse_masked``, while an expected count, which has to
    allow for seeing nothing, looks poor. ``auroc_masked_vs_zero`` and held-out counts have no such
    preference; ``pearson_gene_centred`` gives a constant 0, but scores non-zero entries as well.

    With b a count and m what is expected of it, at least :math:`10^{-6}`, the deviance is
    :math:`2 (b \log(b / m) - (b - m))`.

    Zeros are drawn by shuffling the rows, and then the columns, of the hidden entries; of the pairs
    those are kept that are zero in `truth`.

    The official code scores ``log1p(10,000 x / sum)`` of both sides with negative values set to 0;
    the same is done here.

    Examples
    --------
    Two kinds of cells; half of the counts predict the other half, by the mean of each kind:

    >>> import numpy as np
    >>> import cellplm_tl as cp
    >>> rng = np.random.default_rng(0)
    >>> is_t = np.arange(100) < 50
    >>> expected = np.where(is_t[:, None], rng.gamma(1, 4, 30), rng.gamma(1, 4, 30))
    >>> seen, held_out = rng.poisson(expected), rng.poisson(expected)
    >>> by_kind = np.where(is_t[:, None], seen[is_t].mean(axis=0), seen[~is_t].mean(axis=0))
    >>> by_gene = np.tile(seen.mean(axis=0), (100, 1))
    >>> scores, constant = (cp.metrics.denoising(held_out, p) for p in (by_kind, by_gene))
    >>> scores["poisson_deviance"] < constant["poisson_deviance"]
    True
    >>> constant["pearson_per_gene"]
    0.0
    """
    if compatible:
        if lognorm is not None:
            raise OptionError(
                "lognorm cannot be scored with compatible=True: the official code takes the "
                "logarithm of predicted. Leave one of the two out."
            )
        scores = _official_scores(truth, predicted, masked, target_sum)
    elif masked is not None:
        entries = masked_entries(
            truth,
            predicted,
            masked,
            lognorm=lognorm,
            target_sum=target_sum,
            random_state=random_state,
        )
        scores = score_entries(entries)
    else:
        per_cell, per_gene = held_out_scores(
            truth, predicted, lognorm=lognorm, target_sum=target_sum
        )
        scores = {**per_cell.mean(), "pearson_per_gene": per_gene.mean()}
    return {name: float(score) for name, score in scores.items()}


def masked_entries(
    truth: Any,
    predicted: Any,
    masked: Any,
    *,
    lognorm: Any = None,
    target_sum: float | None = 1e4,
    random_state: int = 0,
) -> pd.DataFrame:
    """List hidden entries, and as many true zeros, with what was predicted for them.

    Parameters
    ----------
    truth, predicted, masked, lognorm : array_like or sparse matrix, shape (cells, genes)
        As of :func:`denoising`.
    target_sum : float, optional
        As of :func:`denoising`; 10,000 by default.
    random_state : int, default 0
        Seed of the zeros.

    Returns
    -------
    pandas.DataFrame, shape (entries, 5)
        ``cell`` and ``gene`` (numbers), ``is_masked`` (else a true zero), ``truth`` and
        ``predicted`` in log1p per `target_sum`; hidden entries first, cell by cell.

    Examples
    --------
    >>> import numpy as np
    >>> from cellplm_tl.metrics.denoising import masked_entries
    >>> entries = masked_entries([[3, 0], [0, 1]], np.ones((2, 2)), [[1, 0], [0, 1]])
    >>> entries[["cell", "gene", "is_masked"]].to_numpy()[:2].tolist()
    [[0, 0, True], [1, 1, True]]
    """
    counts = _counts(truth)
    cells, genes = _hidden(masked, counts.shape)
    is_zero = _at(counts, cells, genes) == 0
    if is_zero.any():
        raise InputError(
            f"masked names {is_zero.sum():,} of {is_zero.size:,} entries that are 0 in truth, the "
            f"first in row {cells[is_zero.argmax()]}, column {genes[is_zero.argmax()]}. truth must "
            "be the counts before masking, and only counts can be hidden."
        )
    guess = _guess(predicted, lognorm, counts.shape, target_sum)
    rng = np.random.default_rng(random_state)
    zeros = np.stack([rng.permutation(cells), rng.permutation(genes)])
    zeros = zeros[:, _at(counts, *zeros) == 0]
    n_hidden = len(cells)
    cells, genes = np.concatenate([[cells, genes], zeros], axis=1)
    return pd.DataFrame(
        {
            "cell": cells,
            "gene": genes,
            "is_masked": np.arange(len(cells)) < n_hidden,
            "truth": _scaled(counts, target_sum).at(cells, genes),
            "predicted": guess.at(cells, genes),
        }
    )


def score_entries(entries: pd.DataFrame) -> dict[str, float]:
    """Score what :func:`masked_entries` lists.

    Parameters
    ----------
    entries : pandas.DataFrame
        Some or all of the rows, also several times: a bootstrap draws them by cell.

    Returns
    -------
    dict of str to float
        Those of :func:`denoising` with `masked`; NaN where there is nothing to score.

    Examples
    --------
    >>> from cellplm_tl.metrics.denoising import masked_entries, score_entries
    >>> entries = masked_entries([[3, 0], [0, 1]], [[1, 1], [1, 1]], [[1, 0], [0, 1]])
    >>> round(score_entries(entries)["rmse_masked"], 2)
    0.69
    """
    hidden = entries[entries["is_masked"]]
    truth, guess = hidden["truth"].to_numpy(), hidden["predicted"].to_numpy()
    is_masked = entries["is_masked"].to_numpy()
    can_rank = 0 < is_masked.sum() < is_masked.size
    rank = roc_auc_score(is_masked, entries["predicted"]) if can_rank else np.nan
    return {
        "rmse_masked": float(np.sqrt(_mean((truth - guess) ** 2))),
        "mae_masked": _mean(np.abs(truth - guess)),
        "pearson_masked": float(_pearson(truth, guess)) if truth.size else np.nan,
        "pearson_gene_centred": _gene_centred(truth, guess, hidden["gene"].to_numpy()),
        "cosine_masked": float(_cosine(truth, guess)) if truth.size else np.nan,
        "auroc_masked_vs_zero": float(rank),
    }


def held_out_scores(
    truth: Any, predicted: Any, *, lognorm: Any = None, target_sum: float | None = 1e4
) -> tuple[pd.DataFrame, pd.Series]:
    """Score each cell, and each gene, by held-out counts.

    Parameters
    ----------
    truth, predicted, lognorm : array_like or sparse matrix, shape (cells, genes)
        As of :func:`denoising`.
    target_sum : float, optional
        As of :func:`denoising`; 10,000 by default.

    Returns
    -------
    per_cell : pandas.DataFrame
        ``poisson_deviance`` (mean over the genes; where `predicted` is given) and
        ``pearson_per_cell``; the index is the numbers of the cells that have counts in `truth`.
    per_gene : pandas.Series, shape (genes,)
        Pearson over those cells.

    Examples
    --------
    >>> from cellplm_tl.metrics.denoising import held_out_scores
    >>> per_cell, per_gene = held_out_scores([[2, 0], [0, 0], [1, 3]], [[4, 1], [1, 1], [1, 2]])
    >>> per_cell.index.tolist(), per_gene.round(1).tolist()
    ([0, 2], [1.0, 1.0])
    """
    counts = _counts(truth)
    shape = counts.shape
    expected = None if predicted is None else _matrix(predicted, "predicted", shape)
    guess = _guess(expected, lognorm, shape, target_sum)
    is_counted = _totals(counts) > 0
    if not is_counted.all():
        counts = counts[is_counted]
        expected = None if expected is None else expected[is_counted]
        guess = guess.of_cells(is_counted)
    found = _scaled(counts, target_sum)

    names = ["pearson_per_cell"] if expected is None else ["poisson_deviance", "pearson_per_cell"]
    per_cell = pd.DataFrame(index=np.flatnonzero(is_counted), columns=names, dtype=float)
    for rows in _blocks(*counts.shape):
        correlation = _pearson(found.block(rows), guess.block(rows))
        per_cell.iloc[rows, names.index("pearson_per_cell")] = correlation
        if expected is not None:
            per_cell.iloc[rows, 0] = _deviance(_dense(counts, rows), _dense(expected, rows))
    per_gene = pd.Series(0.0, index=range(shape[1]))
    found, guess = found.by_gene(), guess.by_gene()
    for genes in _blocks(*counts.shape[::-1]):
        pair = (side.block(slice(None), genes).T for side in (found, guess))
        per_gene.iloc[genes] = _pearson(*pair)
    return per_cell, per_gene


def _official_scores(
    truth: Any, predicted: Any, masked: Any, target_sum: float | None
) -> dict[str, float]:
    """Give the scores of the official code, by its names for them."""
    counts = _counts(truth)
    found = _scaled(counts, target_sum)
    guess = _guess(predicted, None, counts.shape, target_sum)
    if masked is not None:
        entries = _hidden(masked, counts.shape)
        x, y = found.at(*entries), guess.at(*entries)
        squares, distances = (x - y) ** 2, np.abs(x - y)
        pearson, cosine = _pearson(x, y), _cosine(x, y)
    else:
        per_cell = []
        for rows in _blocks(*counts.shape):
            x, y = found.block(rows), guess.block(rows)
            of_cells = [((x - y) ** 2).mean(1), np.abs(x - y).mean(1), _pearson(x, y)]
            per_cell.append([*of_cells, _cosine(x, y)])
        squares, distances, pearson, cosine = np.concatenate(per_cell, axis=1)
    mse = np.mean(squares)
    return {
        "mse": mse,
        "rmse": np.sqrt(mse),
        "mae": np.mean(distances),
        "pearson": np.mean(pearson),
        "cosine": np.mean(cosine),
    }


# ------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class _Side:
    """Truth or prediction, as log1p of what each cell is scaled to, a block at a time."""

    matrix: Any  # (cells, genes), dense or CSR; by gene: CSC
    factor: NDArray[np.float64] | None  # (cells,); None: the values stand as they are

    def block(self, rows: slice, genes: slice = slice(None)) -> NDArray[np.float64]:
        values = _dense(self.matrix, rows, genes)
        return values if self.factor is None else np.log1p(values * self.factor[rows, None])

    def at(self, cells: NDArray, genes: NDArray) -> NDArray[np.float64]:
        values = np.maximum(_at(self.matrix, cells, genes), 0)
        return values if self.factor is None else np.log1p(values * self.factor[cells])

    def of_cells(self, is_chosen: NDArray[np.bool_]) -> _Side:
        factor = None if self.factor is None else self.factor[is_chosen]
        return _Side(self.matrix[is_chosen], factor)

    def by_gene(self) -> _Side:
        return replace(self, matrix=self.matrix.tocsc()) if sp.issparse(self.matrix) else self


def _scaled(matrix: Any, target_sum: float | None) -> _Side:
    if target_sum is None:
        return _Side(matrix, None)
    if not target_sum > 0:
        raise OptionError(f"target_sum must be above 0, or None; got {target_sum!r}.")
    totals = _totals(matrix)
    return _Side(matrix, target_sum / np.where(totals > 0, totals, np.inf))


def _guess(predicted: Any, lognorm: Any, shape: tuple[int, int], target_sum: float | None) -> _Side:
    """Give the predicted log1p: the method's own, else that of its expected counts."""
    if lognorm is not None:
        return _Side(_matrix(lognorm, "lognorm", shape), None)
    if predicted is None:
        raise OptionError("nothing to score: give predicted (expected counts), lognorm, or both.")
    return _scaled(_matrix(predicted, "predicted", shape), target_sum)


def _counts(truth: Any) -> sp.csr_matrix:
    """Give the true counts as CSR in canonical form."""
    counts = sp.csr_matrix(_matrix(truth, "truth"))
    if not counts.data.any():
        raise InputError(f"truth, of shape {counts.shape}, has no counts: nothing can be scored.")
    if counts.data.min() < 0:
        raise InputError(
            f"truth must be counts; its smallest value is {counts.data.min():.4g}. Pass the raw "
            "counts, not scaled values."
        )
    return _canonical(counts)


def _hidden(masked: Any, shape: tuple[int, int]) -> tuple[NDArray, NDArray]:
    """Give rows and columns of the hidden entries, row by row."""
    entries = _canonical(sp.csr_matrix(_matrix(masked, "masked", shape))).nonzero()
    if not entries[0].size:
        raise InputError("masked names no entry: there is nothing to score.")
    return entries


def _matrix(values: Any, name: str, shape: tuple[int, int] | None = None) -> Any:
    """Give a dense array or CSR matrix of finite numbers, of the shape that truth has."""
    matrix = sp.csr_matrix(values) if sp.issparse(values) else np.asarray(values)
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise InputError(
            f"{name} must be numbers of shape (cells, genes); got {matrix.dtype} of shape "
            f"{matrix.shape}."
        )
    if shape is not None and matrix.shape != shape:
        raise InputError(
            f"{name} must have the shape of truth, {shape}; got {matrix.shape}. Choose the same "
            "cells and genes, in the same order."
        )
    stored: Any = matrix.data if sp.issparse(matrix) else matrix
    if stored.size and not np.isfinite([stored.min(), stored.max()]).all():
        raise InputError(
            f"{name} has NaN or infinite values. Leave out the cells or genes that have them."
        )
    return matrix


def _canonical(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Give it with ascending columns and no entry twice; the caller's stays as it is."""
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix


# --------------------------------------------------------------------------------------- numbers


def _blocks(n: int, n_across: int) -> Iterator[slice]:
    step = max(1, BLOCK_VALUES // n_across)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _dense(matrix: Any, rows: slice, genes: slice = slice(None)) -> NDArray[np.float64]:
    """Give a block as it stands, but for values below 0, which are 0."""
    block = matrix[rows, genes]
    block = block.toarray() if sp.issparse(block) else block
    return np.maximum(block, 0, dtype=np.float64)


def _at(matrix: Any, cells: NDArray, genes: NDArray) -> NDArray[np.float64]:
    return np.asarray(matrix[cells, genes], dtype=np.float64).ravel()


def _totals(matrix: Any) -> NDArray[np.float64]:
    """Sum each cell; values below 0 are 0."""
    if sp.issparse(matrix):
        return np.asarray(matrix.maximum(0).sum(axis=1, dtype=np.float64)).ravel()
    sums = [_dense(matrix, rows).sum(axis=1) for rows in _blocks(*matrix.shape)]
    return np.concatenate(sums)


def _deviance(counts: NDArray, expected: NDArray) -> NDArray[np.float64]:
    """Mean Poisson deviance of each cell, what is expected being scaled to its total."""
    total = expected.sum(axis=1, keepdims=True)
    scale = counts.sum(axis=1, keepdims=True) / np.where(total > 0, total, np.inf)
    expected = np.maximum(expected * scale, FLOOR)
    return 2 * (xlogy(counts, counts / expected) - counts + expected).mean(axis=1)


def _gene_centred(truth: NDArray, guess: NDArray, genes: NDArray) -> float:
    """Pearson after each gene's mean is taken off both sides."""
    _, gene, n_entries = np.unique(genes, return_inverse=True, return_counts=True)
    is_enough = n_entries[gene] >= MIN_ENTRIES
    if not is_enough.any():
        return np.nan
    centred = []
    for values in (truth, guess):
        mean = (np.bincount(gene, values) / n_entries)[gene]
        is_same = np.abs(values - mean) <= ROUNDING * np.abs(mean)
        centred.append(np.where(is_same, 0.0, values - mean)[is_enough])
    return float(_pearson(*centred))


def _pearson(x: NDArray, y: NDArray) -> NDArray[np.float64]:
    """Correlate along the last axis; 0 where a side does not vary."""
    sides = [values - values.mean(axis=-1, keepdims=True) for values in (x, y)]
    for values, centred in zip((x, y), sides, strict=True):
        size, spread = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (values, centred))
        centred *= spread > ROUNDING * size
    return _cosine(*sides)


def _cosine(x: NDArray, y: NDArray) -> NDArray[np.float64]:
    """Cosine along the last axis; 0 where a side is 0."""
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.sum(x * y, axis=-1) / np.where(lengths > 0, lengths, np.inf)


def _mean(values: NDArray) -> float:
    return float(values.mean()) if values.size else np.nan
