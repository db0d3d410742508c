"""How well a representation of cells keeps cell types apart and technical batches together."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from cellplm_tl._errors import InputError, OptionError

FOLDS = 5  # of the cross-validated nearest-neighbour classifier
MIN_CELLS = 10  # of a label that the classifier is asked for: two in every fold
SILHOUETTE_CELLS = 3_000  # the silhouette needs all pairs of cells
MIXING_NEIGHBORS = 30
LEIDEN_ITERATIONS = 2


def clustering(
    representation: ArrayLike,
    labels: ArrayLike,
    batches: ArrayLike | None = None,
    *,
    resolution: float = 1.0,
    n_neighbors: int = 15,
    random_state: int = 0,
    leiden_seeds: Sequence[int] | None = None,
) -> dict[str, float]:
    r"""Score a representation of cells by the labels that are known of them.

    Parameters
    ----------
    representation : array_like, shape (cells, dimensions)
        What to judge, for example ``adata.obsm["X_cellplm"]``; distances are Euclidean.
    labels : array_like, shape (cells,)
        Label of every cell, for example ``adata.obs["cell_type"]``; none may be missing.
    batches : array_like, shape (cells,), optional
        Technical batch of every cell. Without it there is no ``batch_mixing`` in the result.
    resolution : float, default 1.0
        Of the Leiden clustering. It is not searched for: a search would use the labels.
    n_neighbors : int, default 15
        Of the graph that Leiden cuts, and of the classifier.
    random_state : int, default 0
        Seed of the graph, the folds, and the cells drawn for the silhouette; of Leiden where
        `leiden_seeds` is not given.
    leiden_seeds : sequence of int, optional
        Cluster once with each of these seeds: ``ari`` and ``nmi`` become means, and ``ari_sd`` and
        ``nmi_sd`` tell their spread. On one and the same representation ARI can move by 0.1.

    Returns
    -------
    dict of str to float
        A score is NaN where it is not defined: nothing can be told apart with a single label.

        ``ari``, ``nmi``
            Adjusted Rand index and normalised mutual information (over the arithmetic mean of the
            entropies) of Leiden clusters and labels.
        ``ari_sd``, ``nmi_sd``
            Standard deviations over the seeds (``ddof=1``), with two or more `leiden_seeds`.
        ``knn_accuracy``, ``knn_macro_f1``
            Of the labels that :func:`~cellplm_tl.metrics.clustering.predict_from_neighbors` gives.
        ``silhouette_label``
            Silhouette *s* of the labels as (s + 1) / 2, in [0, 1], on at most 3,000 cells.
        ``batch_mixing``
            1: neighbours come from the batches as if these were shuffled within every label; 0:
            only from a cell's own batch. With `batches` only.

    Raises
    ------
    InputError
        Shapes that do not fit each other, missing labels, values that are not finite, or fewer
        cells than a neighbour graph needs.
    OptionError
        `n_neighbors` below 2, `resolution` not above 0, or no seed in `leiden_seeds`.

    Notes
    -----
    Clusters are those of :func:`scanpy.pp.neighbors` and :func:`scanpy.tl.leiden` with
    ``flavor="igraph"`` and 2 iterations.

    The batch mixing of cell :math:`i` with label :math:`l` and batch :math:`b` is
    :math:`\min(1, s_i / e_i)`: :math:`s_i` is the share of other batches among its 30 nearest
    neighbours, :math:`e_i = (n_l - n_{lb}) / (n_l - 1)` what this share would be if the neighbours
    were drawn from the other cells of its label. It is averaged over the cells for which
    :math:`e_i > 0`. Neighbours of another label count too, so the number means little where the
    labels are not kept apart: read it together with ``knn_accuracy``.

    Examples
    --------
    Two cell types in two batches; the second batch is shifted, less than the types are apart:

    >>> import numpy as np
    >>> import cellplm_tl as cp
    >>> rng = np.random.default_rng(0)
    >>> labels, batches = np.repeat(["B", "T"], 60), np.tile(["x", "y"], 60)
    >>> representation = rng.normal(size=(120, 5))
    >>> representation[:, 0] += 20 * (labels == "T")
    >>> representation[:, 1] += 4 * (batches == "y")
    >>> scores = cp.metrics.clustering(representation, labels, batches, resolution=0.1)
    >>> scores["ari"], scores["knn_accuracy"]
    (1.0, 1.0)
    >>> scores["batch_mixing"] < 0.5
    True
    """
    points, names, of_batch = _checked(representation, labels, batches)
    if n_neighbors < 2:
        raise OptionError(f"n_neighbors must be 2 or more; got {n_neighbors!r}.")
    if not resolution > 0:
        raise OptionError(f"resolution must be above 0; got {resolution!r}.")
    seeds = [random_state] if leiden_seeds is None else list(leiden_seeds)
    if not seeds:
        raise OptionError("leiden_seeds must hold one seed or more; got none.")

    partitions = _leiden(points, resolution, n_neighbors, random_state, seeds)
    ari = [adjusted_rand_score(names, clusters) for clusters in partitions]
    nmi = [normalized_mutual_info_score(names, clusters) for clusters in partitions]
    scores = {"ari": np.mean(ari), "nmi": np.mean(nmi)}
    if len(seeds) > 1:
        scores |= {"ari_sd": np.std(ari, ddof=1), "nmi_sd": np.std(nmi, ddof=1)}

    predicted, is_scored = predict_from_neighbors(
        points, names, n_neighbors=n_neighbors, random_state=random_state
    )
    truth, guess = names[is_scored], predicted[is_scored]
    can_be_wrong = np.unique(truth).size > 1
    scores["knn_accuracy"] = np.mean(truth == guess) if can_be_wrong else np.nan
    scores["knn_macro_f1"] = f1_score(truth, guess, average="macro") if can_be_wrong else np.nan
    scores["silhouette_label"] = _silhouette(points, names, random_state)
    if of_batch is not None:
        scores["batch_mixing"] = _batch_mixing(points, names, of_batch)
    return {name: float(score) for name, score in scores.items()}


def predict_from_neighbors(
    representation: ArrayLike,
    labels: ArrayLike,
    *,
    n_neighbors: int = 15,
    random_state: int = 0,
) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
    """Predict each cell's label from the nearest cells of the other folds.

    Parameters
    ----------
    representation : array_like, shape (cells, dimensions)
        Where the cells lie; distances are Euclidean.
    labels : array_like, shape (cells,)
        Label of every cell.
    n_neighbors : int, default 15
        How many neighbours vote.
    random_state : int, default 0
        Seed of the 5 stratified folds.

    Returns
    -------
    predicted : numpy.ndarray, shape (cells,)
        Label that most neighbours have; ``""`` for cells that are not scored.
    is_scored : numpy.ndarray, shape (cells,)
        Whether a cell's label has at least 10 cells; others take no part, as neighbours neither.

    Raises
    ------
    InputError
        As :func:`~cellplm_tl.metrics.clustering`.

    Examples
    --------
    >>> import numpy as np
    >>> from cellplm_tl.metrics.clustering import predict_from_neighbors
    >>> representation, labels = np.arange(40.0)[:, None], np.repeat(["left", "right"], 20)
    >>> predicted, is_scored = predict_from_neighbors(representation, labels, n_neighbors=3)
    >>> print(predicted[0], predicted[-1], is_scored.all())
    left right True
    """
    points, names, _ = _checked(representation, labels, None)
    kinds, number = np.unique(names, return_counts=True)
    is_scored = np.isin(names, kinds[number >= MIN_CELLS])
    predicted = np.full_like(names, "")
    if is_scored.any():
        smallest_training_set = is_scored.sum() - -(-is_scored.sum() // FOLDS)
        predicted[is_scored] = cross_val_predict(
            KNeighborsClassifier(min(n_neighbors, smallest_training_set)),
            points[is_scored],
            names[is_scored],
            cv=StratifiedKFold(FOLDS, shuffle=True, random_state=random_state),
        )
    return predicted, is_scored


def _checked(
    representation: ArrayLike, labels: ArrayLike, batches: ArrayLike | None
) -> tuple[NDArray[np.floating], NDArray[np.str_], NDArray[np.str_] | None]:
    """Return the inputs as arrays that fit each other, names as text."""
    points = np.asarray(representation)
    if points.ndim != 2 or points.dtype.kind not in "fiu":
        raise InputError(
            "representation must be numbers of shape (cells, dimensions); "
            f"got {points.dtype} of shape {points.shape}."
        )
    if len(points) < 3:
        raise InputError(f"representation must hold 3 cells or more; got {len(points)}.")
    is_bad = ~np.isfinite(points).all(axis=1)
    if is_bad.any():
        raise InputError(
            f"representation must be finite; {is_bad.sum():,} of {len(points):,} cells are not, "
            f"the first in row {is_bad.argmax()}."
        )
    names = _names(labels, "labels", len(points))
    return points, names, None if batches is None else _names(batches, "batches", len(points))


def _names(values: ArrayLike, parameter: str, n_cells: int) -> NDArray[np.str_]:
    column = pd.Series(np.asarray(values).ravel())
    if np.ndim(values) != 1 or len(column) != n_cells:
        raise InputError(
            f"{parameter} must have one entry for each of the {n_cells:,} cells of representation; "
            f"got shape {np.shape(values)}."
        )
    if column.isna().any():
        raise InputError(
            f"{parameter} must be known of every cell; {column.isna().sum():,} of {n_cells:,} are "
            "missing. Leave these cells out of all arguments."
        )
    return column.astype(str).to_numpy(dtype=str)


def _leiden(
    points: NDArray, resolution: float, n_neighbors: int, random_state: int, seeds: Sequence[int]
) -> list[NDArray]:
    """Return one clustering, (cells,), for each seed; the graph is the same for all."""
    graph = ad.AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(points)).astype(str)))
    graph.obsm["X"] = points
    sc.pp.neighbors(
        graph,
        n_neighbors=min(n_neighbors, len(points) - 1),
        use_rep="X",
        random_state=random_state,
    )
    clusterings = []
    for seed in seeds:
        sc.tl.leiden(
            graph,
            resolution=resolution,
            flavor="igraph",
            n_iterations=LEIDEN_ITERATIONS,
            directed=False,
            random_state=seed,
        )
        clusterings.append(graph.obs["leiden"].to_numpy())
    return clusterings


def _silhouette(points: NDArray, names: NDArray[np.str_], random_state: int) -> float:
    if len(points) > SILHOUETTE_CELLS:
        rng = np.random.default_rng(random_state)
        drawn = rng.choice(len(points), SILHOUETTE_CELLS, replace=False)
        points, names = points[drawn], names[drawn]
    if not 1 < np.unique(names).size < len(names):
        return np.nan
    return (silhouette_score(points, names) + 1) / 2


def _batch_mixing(points: NDArray, names: NDArray[np.str_], batches: NDArray[np.str_]) -> float:
    n_cells = len(points)
    n_neighbors = min(MIXING_NEIGHBORS, n_cells - 1)
    search = NearestNeighbors(n_neighbors=n_neighbors).fit(points)
    neighbors = search.kneighbors(return_distance=False)  # of each cell, itself left out
    found = (batches[neighbors] != batches[:, None]).mean(axis=1)  # (cells,)

    frame = pd.DataFrame({"label": names, "batch": batches})
    of_label = frame.groupby("label")["batch"].transform("size").to_numpy()  # (cells,)
    of_both = frame.groupby(["label", "batch"])["batch"].transform("size").to_numpy()
    expected = (of_label - of_both) / np.maximum(of_label - 1, 1)
    can_mix = expected > 0
    if not can_mix.any():
        return np.nan
    return float(np.minimum(found[can_mix] / expected[can_mix], 1.0).mean())
