"""`cp.pl.annotation`: which cell types are taken for which, and whether the tool knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellplm_tl._anndata import read_record
from cellplm_tl._errors import InputError, SlotError, check_is_anndata
from cellplm_tl.metrics.annotation import expected_error, reliability

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

UNKNOWN = "Unknown"  # what the tool writes where it does not commit itself
MOST_WRITTEN = 15  # labels; the numbers of more would not be readable
DARK = 0.5  # share from which on a number is written in white
INCH_PER_LABEL, INCH_PER_LETTER = 0.36, 0.09  # of the figure
COLOR = "tab:blue"


def annotation(
    adata: AnnData,
    *,
    key: str = "cellplm_annotation",
    labels_key: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Axes, Axes]:
    """Draw the confusion matrix and the reliability diagram of predicted cell types.

    Without `labels_key` both are of the reference's validation cells, as :func:`cellplm_tl.tl`'s
    ``annotate`` has written them into its record; with it, of the cells of `adata` themselves.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        What ``cp.tl.annotate`` has written into.
    key : str, default "cellplm_annotation"
        Its `key_added`.
    labels_key : str, optional
        Column of `adata.obs` with known labels to compare with; cells without one are left out.
    figsize : tuple of float, optional
        Width and height in inches; by default as the number of labels needs.

    Returns
    -------
    tuple of matplotlib.axes.Axes
        The two panels of a new figure. Confusion: a row for each true label, a column for each
        prediction, ``"Unknown"`` last; the colour is the share of the row, the number (with up to
        15 labels) counts cells. Reliability: how often the largest probability is right, by its
        size, in 15 equal bins (:func:`cellplm_tl.metrics.annotation`), each dot's area in
        proportion to its cells; the expected calibration error is in the title. Cells whose label
        the tool has no probability for are in the confusion matrix alone.

    Raises
    ------
    InputError
        Not an AnnData; no cell has a label; or no label is one that the tool knows.
    SlotError
        A slot is not there: the prediction, the labels, or, without `labels_key`, the record of
        validation cells.

    Notes
    -----
    matplotlib, which scanpy brings along, is imported when something is drawn.

    Examples
    --------
    What ``cp.tl.annotate`` writes, written by hand:

    >>> import anndata as ad, numpy as np, pandas as pd
    >>> import cellplm_tl as cp
    >>> obs = pd.DataFrame({"cell_type": list("BBTT")}, index=list("1234"))
    >>> obs["cellplm_annotation"] = pd.Categorical(["B", "B", "T", "Unknown"])
    >>> adata = ad.AnnData(np.ones((4, 2)), obs=obs)
    >>> adata.obsm["cellplm_annotation_proba"] = pd.DataFrame(
    ...     {"B": [0.9, 0.8, 0.2, 0.5], "T": [0.1, 0.2, 0.8, 0.5]}, index=obs.index
    ... )
    >>> confusion, diagram = cp.pl.annotation(adata, labels_key="cell_type")
    >>> print(diagram.get_title())
    ECE 0.250, 4 cells
    """
    check_is_anndata(adata)
    if labels_key is None:
        table, bins, about = _of_validation(adata, key)
    else:
        table, bins, about = _of_query(adata, key, labels_key)
    table = _in_order(table)

    import matplotlib.pyplot as plt  # here: only who draws needs it

    matrix = [max(2.6, INCH_PER_LABEL * n_labels) for n_labels in table.shape[::-1]]
    names = [INCH_PER_LETTER * axis.str.len().max() for axis in (table.index, table.columns)]
    width, height = (inner + outer for inner, outer in zip(matrix, names, strict=True))
    _, (left, right) = plt.subplots(
        1,
        2,
        figsize=figsize or (width + matrix[1] + 1.6, height + 1),
        width_ratios=matrix,
        layout="constrained",
    )
    _draw_confusion(left, table)
    left.set_title(f"{about}: {int(table.to_numpy().sum()):,} cells")
    _draw_reliability(right, bins)
    return left, right


def _of_validation(adata: AnnData, key: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return confusion (true × predicted) and reliability of the record's validation cells."""
    validation = read_record(adata, "annotate", key, "adata").get("validation", {})
    for part in ("confusion", "reliability"):
        if part not in validation:
            raise SlotError(
                f"the record adata.uns['cellplm'][{key!r}] has no validation[{part!r}]: nothing "
                "was held out. Pass labels_key='…' to compare with labels of adata.obs."
            )
    return validation["confusion"], validation["reliability"], "validation cells"


def _of_query(adata: AnnData, key: str, labels_key: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return confusion (true × predicted) and reliability of the cells that have a label."""
    proba_key = f"{key}_proba"
    for slot, name in (("obs", key), ("obs", labels_key), ("obsm", proba_key)):
        there = getattr(adata, slot)
        if name not in there:
            raise SlotError(
                f"adata.{slot} has no {name!r}; there are {', '.join(map(repr, there)) or 'none'}. "
                "Run cp.tl.annotate(adata, reference, labels_key='…') first, or pass another key."
            )
    has_label = adata.obs[labels_key].notna().to_numpy()
    if not has_label.any():
        raise InputError(f"adata.obs[{labels_key!r}] is missing in all {adata.n_obs:,} cells.")
    labels = adata.obs[labels_key].astype(str).to_numpy()[has_label]
    predicted = adata.obs[key].astype(str).to_numpy()[has_label]
    proba = adata.obsm[proba_key][has_label]
    is_known = np.isin(labels, proba.columns.astype(str))
    if not is_known.any():
        raise InputError(
            f"no label of adata.obs[{labels_key!r}] is one that the tool knows: "
            f"{', '.join(np.unique(labels)[:3])} … against {', '.join(proba.columns[:3])} …. Use "
            "the reference's names."
        )
    table = pd.crosstab(labels, predicted)
    known = [name for name in proba.columns.astype(str) if name in table.index]
    others = [name for name in table.index if name not in known]
    columns = dict.fromkeys([*known, *table.columns])  # a label that nobody is taken for, too
    table = table.reindex(index=[*known, *others], columns=list(columns), fill_value=0)
    return table, reliability(labels[is_known], proba[is_known]), labels_key


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Put the columns into the order of the rows, so that what is right lies on the diagonal."""
    rows, columns = table.index.astype(str), table.columns.astype(str)
    table = table.set_axis(rows, axis=0).set_axis(columns, axis=1)
    right = [name for name in rows if name in columns and name != UNKNOWN]
    wrong = [name for name in columns if name not in rows and name != UNKNOWN]
    return table[[*right, *wrong, *([UNKNOWN] if UNKNOWN in columns else [])]]


def _draw_confusion(axes: Axes, table: pd.DataFrame) -> None:
    counts = table.to_numpy()  # (true, predicted)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=90)
    axes.set_yticks(range(len(table.index)), table.index)
    axes.set(xlabel="predicted", ylabel="true")
    if max(table.shape) > MOST_WRITTEN:
        return
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > DARK else "black"
        number = f"{int(counts[row, column])}"
        axes.text(column, row, number, ha="center", va="center", color=color, fontsize="small")


def _draw_reliability(axes: Axes, bins: pd.DataFrame) -> None:
    n_cells = bins["n_cells"].sum()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="dashed", linewidth=1)
    axes.scatter(bins["confidence"], bins["accuracy"], 10 + 200 * bins["n_cells"] / n_cells, COLOR)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set(xlabel="largest probability", ylabel="share that is right")
    axes.set_title(f"ECE {expected_error(bins):.3f}, {int(n_cells):,} cells")
