"""How well predicted cell types agree with the known ones, and whether the tool knows it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_fscore_support

from cellplm_tl._errors import InputError, OptionError, check_option

N_BINS = 15  # of the calibration error
ROUNDING = 1e-6  # by which a softmax in single precision may pass 1
SMALLEST = float(np.finfo(np.float64).eps)  # probability in the logarithm, as scikit-learn's


def annotation(
    labels: ArrayLike,
    predicted: ArrayLike,
    proba: ArrayLike | pd.DataFrame | None = None,
    *,
    classes: ArrayLike | None = None,
    over: str = "truth",
    unknown: str = "Unknown",
) -> dict[str, float]:
    r"""Score predicted cell types by the labels that are known of the cells.

    Parameters
    ----------
    labels : array_like, shape (cells,)
        Known label of every cell; none may be missing. All arguments go together by position: an
        index is not looked at.
    predicted : array_like, shape (cells,)
        Predicted label of every cell, or `unknown`.
    proba : array_like or DataFrame, shape (cells, classes), optional
        Probabilities, for example ``adata.obsm["cellplm_annotation_proba"]``. They need not sum to
        one. Without them there are no ``ece``, ``brier`` and ``log_loss`` in the result.
    classes : array_like, shape (classes,), optional
        Label of each column of `proba`; by default the columns of a DataFrame.
    over : {"truth", "either"}, default "truth"
        Which labels the macro scores are means over: those that occur in `labels`; or those that
        occur in `labels` or `predicted` (without `unknown`), as the official CellPLM code does:
        there a label that is predicted and never true counts as an F1 of 0.
    unknown : str, default "Unknown"
        What `predicted` holds where the tool does not commit itself. It is no label: such a cell
        is counted as wrong (it lowers the recall of its label and nobody's precision), unless
        `unknown` is also the label that `labels` gives it.

    Returns
    -------
    dict of str to float
        ``accuracy``
            Share of the cells whose prediction is their label.
        ``balanced_accuracy``
            Mean recall over the labels that occur in `labels`, whatever `over` says.
        ``macro_precision``, ``macro_recall``, ``macro_f1``
            Means over labels, each label counting the same; F1 is averaged, not made of the
            averages. The precision of a label that is never predicted is 0, as is the recall of one
            that never occurs. What the official code calls "acc" is ``macro_recall`` with
            ``over="either"``.
        ``unknown_share``
            Share of the cells that are predicted as `unknown`.
        ``accuracy_called``
            Accuracy among the other cells; NaN if there are none.
        ``ece``
            Expected calibration error of the largest probability, in [0, 1]; with `proba` only, as
            the next two.
        ``brier``
            Mean squared distance of the probabilities from the truth, in [0, 2] where they sum to
            one.
        ``log_loss``
            Mean of minus the natural logarithm of the true label's probability, which is taken to
            be 2.2e-16 or more; of a label that is no column it is 0.

    Raises
    ------
    InputError
        Shapes that do not fit each other, no cells, missing labels, or probabilities outside
        [0, 1].
    OptionError
        `over` is neither of the two; `classes` is missing, or given without `proba`.

    Notes
    -----
    The largest probability of a cell is right where its column is the cell's label; `predicted`,
    which may abstain, takes no part. It lies in one of 15 equal bins :math:`(b/15, (b+1)/15]`: an
    edge belongs to the bin below it, and 0 to the first. With :math:`n_b` of :math:`n` cells in bin
    :math:`b`, a share :math:`a_b` of them right and their largest probability :math:`c_b` on
    average, the error is :math:`\sum_b (n_b / n) |a_b - c_b|` (Guo et al., ICML 2017).

    Examples
    --------
    >>> import pandas as pd
    >>> import cellplm_tl as cp
    >>> labels, predicted = ["B", "B", "T", "T"], ["B", "T", "T", "Unknown"]
    >>> proba = pd.DataFrame({"B": [0.9, 0.2, 0.1, 0.5], "T": [0.1, 0.8, 0.9, 0.5]})
    >>> scores = cp.metrics.annotation(labels, predicted, proba)
    >>> scores["accuracy"], scores["unknown_share"], scores["macro_precision"]
    (0.5, 0.25, 0.75)
    >>> round(scores["ece"], 3)  # 0.9 is right twice, 0.8 and 0.5 are wrong
    0.375
    """
    truth = _names(labels, "labels")
    guess = _names(predicted, "predicted", len(truth))
    check_option("over", over, ("truth", "either"))
    if proba is None and classes is not None:
        raise OptionError("classes name the columns of proba, which was not given.")

    kinds = np.unique(truth)
    averaged = kinds
    if over == "either":
        averaged = np.union1d(kinds, guess[guess != unknown])
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, guess, labels=averaged, average="macro", zero_division=0
    )
    is_right, is_called = truth == guess, guess != unknown
    scores = {
        "accuracy": is_right.mean(),
        "balanced_accuracy": np.mean([is_right[truth == kind].mean() for kind in kinds]),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "unknown_share": 1 - is_called.mean(),
        "accuracy_called": is_right[is_called].mean() if is_called.any() else np.nan,
    }
    if proba is not None:
        values, names = _probabilities(proba, classes, len(truth))
        scores["ece"] = expected_error(_reliability(truth, values, names))
        is_label = truth[:, None] == names  # (cells, classes)
        missed = ~is_label.any(axis=1)  # their label is no column: all of it is missing
        scores["brier"] = (((values - is_label) ** 2).sum(axis=1) + missed).mean()
        of_label = (values * is_label).sum(axis=1)
        scores["log_loss"] = -np.log(np.clip(of_label, SMALLEST, 1)).mean()
    return {name: float(score) for name, score in scores.items()}


def reliability(
    labels: ArrayLike, proba: ArrayLike | pd.DataFrame, *, classes: ArrayLike | None = None
) -> pd.DataFrame:
    """Tell how often the largest probability is right, by its size.

    Parameters
    ----------
    labels, proba, classes
        As :func:`~cellplm_tl.metrics.annotation`.

    Returns
    -------
    DataFrame
        One row for each of the 15 equal bins that has cells, in ascending order: ``confidence``
        (mean of the largest probability), ``accuracy`` (share of the cells where it is right) and
        ``n_cells``.

    Raises
    ------
    InputError, OptionError
        As :func:`~cellplm_tl.metrics.annotation`.

    Examples
    --------
    >>> import pandas as pd
    >>> from cellplm_tl.metrics.annotation import reliability
    >>> proba = pd.DataFrame({"B": [0.9, 0.2, 0.1], "T": [0.1, 0.8, 0.9]})
    >>> reliability(["B", "B", "T"], proba)
       confidence  accuracy  n_cells
    0         0.8       0.0        1
    1         0.9       1.0        2
    """
    truth = _names(labels, "labels")
    values, names = _probabilities(proba, classes, len(truth))
    return _reliability(truth, values, names)


def expected_error(table: pd.DataFrame) -> float:
    """Return the expected calibration error of a table that :func:`reliability` made."""
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["n_cells"]).sum() / table["n_cells"].sum())


def _reliability(
    truth: NDArray[np.str_], proba: NDArray[np.float64], classes: NDArray[np.str_]
) -> pd.DataFrame:
    confidence = proba.max(axis=1)
    is_right = classes[proba.argmax(axis=1)] == truth
    edges = np.arange(1, N_BINS) / N_BINS
    bins = np.searchsorted(edges, confidence, side="left")  # an edge belongs to the bin below
    cells = pd.DataFrame({"confidence": confidence, "accuracy": is_right.astype(float)})
    by_bin = cells.groupby(bins)
    return by_bin.mean().assign(n_cells=by_bin.size()).reset_index(drop=True)


def _names(values: ArrayLike, parameter: str, n_cells: int | None = None) -> NDArray[np.str_]:
    """Return labels of cells as text."""
    shape = np.shape(values)
    if len(shape) != 1 or shape == (0,) or n_cells not in (None, shape[0]):
        expected = "one or more cells" if n_cells is None else f"the {n_cells:,} cells of labels"
        raise InputError(
            f"{parameter} must have one entry for each of {expected}; got shape {shape}."
        )
    column = pd.Series(values)  # not an array: numpy makes text of a missing value
    if column.isna().any():
        raise InputError(
            f"{parameter} must be known of every cell; {column.isna().sum():,} of {len(column):,} "
            "are missing. Leave these cells out of all arguments."
        )
    return column.astype(str).to_numpy(dtype=str)


def _probabilities(
    proba: ArrayLike | pd.DataFrame, classes: ArrayLike | None, n_cells: int
) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return probabilities as float64, and the labels of their columns as text."""
    if classes is None:
        if not isinstance(proba, pd.DataFrame):
            raise OptionError(
                "classes must name the columns of proba where that is no DataFrame; got None."
            )
        classes = proba.columns
    names = _names(classes, "classes")
    values = np.asarray(proba)
    if values.shape != (n_cells, len(names)) or values.dtype.kind not in "fiu":
        raise InputError(
            f"proba must be numbers of shape (cells, classes), here {(n_cells, len(names))}; "
            f"got {values.dtype} of shape {values.shape}."
        )
    if len(np.unique(names)) < len(names):
        raise InputError(f"classes must be different; got {', '.join(names)}.")
    is_bad = ~((values >= 0) & (values <= 1 + ROUNDING)).all(axis=1)
    if is_bad.any():
        raise InputError(
            f"proba must lie in [0, 1]; {is_bad.sum():,} of {n_cells:,} cells do not, the first in "
            f"row {is_bad.argmax()}."
        )
    return np.minimum(values.astype(np.float64), 1), names
