"""Fit a head that tells types of cells: cross entropy, calibration, conformal thresholds.

Everything that is to hold for other cells is found on cells that were held out: the reference is
cut into folds (whole batches where there are some), and what was fitted on the others scores each
of them. Afterwards the head is fitted once more, on all cells.

Axes: `cells` (of the reference), `views` (of each of them, at several depths), `genes` (measured),
`features`, `types`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.model_selection import GroupKFold, StratifiedKFold
from torch import Tensor, nn

from cellplm_tl.metrics.annotation import expected_error, reliability
from cellplm_tl.models import CellPLM, Counts
from cellplm_tl.train.fit import Terms, TrainConfig, fit

N_FOLDS = 5
COVERED_BY_BATCHES = 0.8  # share of the cells whose type another batch must hold, to hold it out
PENALTIES = (0.01, 0.03, 0.1)  # inverse strengths C, the log loss on the first fold chooses
SMOOTHING = 0.1  # of a type's profile: weight of the mean profile, in mean types
SLOPE_PENALTY = 1e-3  # on the change of the two weights with depth
MIN_OF_TYPE = 20  # held-out cells, from which on a type has a conformal threshold of its own
DEPTH_QUANTILES = (0.01, 0.99)  # of the views' depths: the head extrapolates no further
UNSEEN = -30.0  # log probability of a type that no cell of a fold's training part has
SMALLEST = 1e-12
STEP_CELLS = 256  # of a step of fine-tuning
FINE_TUNING: dict[str, Any] = {
    "steps": 300,
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "warmup": 30,
    "average": 0.98,
    "validate_every": 25,
    "patience": 6,
}
N_DRAWS = 200  # of the cells, to compare with the baseline
BASELINE_GENES, BASELINE_COMPONENTS = 2000, 50

Floats = NDArray[np.float64]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows to fit on, rows held out


class View(NamedTuple):
    """The reference at one depth."""

    features: NDArray[np.float32]  # (cells, features)
    counts: sp.csr_matrix  # (cells, genes)

    @property
    def library_size(self) -> Floats:
        """Counts of each cell."""
        return np.asarray(self.counts.sum(axis=1), np.float64).ravel()


class Linear(NamedTuple):
    """A linear map of the features as they are, (features, types) and (types,)."""

    weight: Floats
    bias: Floats

    def __call__(self, features: NDArray[np.float32]) -> Floats:
        """Return log odds up to a constant per cell, (cells, types)."""
        return features @ self.weight + self.bias


@dataclass(frozen=True)
class HeldOut:
    """What the folds say of the cells that they were not fitted on.

    Attributes
    ----------
    rows
        Cells that were held out and whose type some cell of their training part has.
    log_p
        Calibrated log probabilities, (views, rows, types).
    unknown
        Scores of :class:`~cellplm_tl.models.TypeHead`, (views, rows).
    """

    rows: NDArray[np.int64]
    log_p: Floats = field(repr=False)
    unknown: Floats = field(repr=False)


@dataclass(frozen=True)
class FittedHead:
    """Tensors of a `TypeHead` by name, as arrays, and the held-out cells behind its calibration."""

    arrays: dict[str, NDArray[Any]] = field(repr=False)
    held_out: HeldOut
    penalty: float


def make_folds(
    codes: NDArray[np.int64], batches: NDArray[Any] | None, rng: np.random.Generator
) -> tuple[list[Fold], str]:
    """Cut cells into folds, and say what was held out: `"batch"` or `"cell"`.

    Batches are held out whole where nearly all cells have their type in another batch as well;
    batches that hold types of their own (sorted fractions) say nothing about the types.
    """
    unit: str = "cell"
    folds: Any = None
    if batches is not None:
        table = pd.crosstab(batches, codes).to_numpy() > 0
        is_elsewhere = table.sum(0) > 1  # (types,)
        if is_elsewhere[codes].mean() >= COVERED_BY_BATCHES:
            unit = "batch"
            folds = GroupKFold(min(N_FOLDS, len(table))).split(codes, codes, batches)
    if folds is None:
        n_folds = min(N_FOLDS, len(codes))
        stratified = StratifiedKFold(n_folds, shuffle=True, random_state=int(rng.integers(2**31)))
        with warnings.catch_warnings():  # a type with fewer cells than folds is no fault
            warnings.simplefilter("ignore", UserWarning)
            try:
                folds = list(stratified.split(codes, codes))
            except ValueError:  # no type has as many cells as there are folds
                order = rng.permutation(len(codes))
                folds = [
                    (np.setdiff1d(order, part), np.sort(part))
                    for part in np.array_split(order, n_folds)
                ]
    return [(np.asarray(a), np.asarray(b)) for a, b in folds], unit


def fit_head(
    views: Sequence[View], codes: NDArray[np.int64], n_latent: int, folds: Sequence[Fold]
) -> FittedHead:
    """Fit and calibrate a head.

    Parameters
    ----------
    views
        The reference at each depth; the first is as it was counted.
    codes
        Type of each cell, 0, 1, …
    n_latent
        How many of the features are latent; the others are residual.
    folds
        What is held out in turn. A single one will do.
    """
    n_types = int(codes.max()) + 1
    rows = np.concatenate([_testable(codes, *fold) for fold in folds])
    penalty = _choose_penalty(views, codes, folds)
    of_folds = [_FoldFit(views, codes, train, n_latent, n_types, penalty) for train, _ in folds]
    tested = [_testable(codes, *fold) for fold in folds]

    def over_folds(score: Any) -> Floats:
        """Score each view's held-out cells by their fold's fit, (views, rows, …)."""
        parts = [
            np.stack([score(fit, View(v.features[t], v.counts[t])) for v in views])
            for fit, t in zip(of_folds, tested, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    read = log_softmax(over_folds(lambda fit, view: fit.linear(view.features)), axis=2)
    counted = log_softmax(over_folds(lambda fit, view: view.counts @ fit.log_profiles), axis=2)
    depths = np.log(np.maximum(np.stack([view.library_size for view in views]), 1))
    bounds = np.quantile(depths, (0.5, *DEPTH_QUANTILES))
    d = np.clip(depths, bounds[1], bounds[2])[:, rows] - bounds[0]
    weights = _fit_weights(read, counted, d, codes[rows])
    log_p = _combine(weights, read, counted, d)

    apart = over_folds(lambda fit, view: fit.apart(view.features))  # (views, rows, 2)
    top = np.exp(log_p.max(axis=2))
    scores = np.concatenate((_log_odds(top)[..., None], apart), axis=2)
    mean, scale = scores.mean(axis=(0, 1)), np.maximum(scores.std(axis=(0, 1)), 1e-6)
    unknown = ((scores - mean) / scale).mean(axis=2)

    whole = _FoldFit(views, codes, np.arange(len(codes)), n_latent, n_types, penalty)
    arrays = {
        "linear.weight": whole.linear.weight.T,
        "linear.bias": whole.linear.bias,
        "log_profiles": whole.log_profiles,
        "log_prior": np.log(np.bincount(codes, minlength=n_types) / len(codes)),
        "weights": weights,
        "depth": bounds,
        # The mean of the folds' distances: as far from new cells as a fold's is from those it
        # has not seen; a distance of all cells together would be short for none but its own.
        "precision": np.mean([fit.precision for fit in of_folds], axis=0),
        "toward": np.mean([fit.precision @ fit.means.T for fit in of_folds], axis=0),
        "offset": np.mean([fit.offset for fit in of_folds], axis=0),
        "centres": whole.centres,
        "score_mean": mean,
        "score_scale": scale,
    }
    return FittedHead(arrays, HeldOut(rows, log_p, unknown), penalty)


class _FoldFit:
    """What is fitted on some cells."""

    def __init__(
        self,
        views: Sequence[View],
        codes: NDArray[np.int64],
        rows: NDArray[np.int64],
        n_latent: int,
        n_types: int,
        penalty: float,
    ):
        features = np.concatenate([view.features[rows] for view in views])
        labels = np.tile(codes[rows], len(views))
        self.linear = fit_linear(features, labels, n_types, penalty / len(views))
        self.log_profiles = fit_profiles(views[0].counts[rows], codes[rows], n_types)
        self.means, self.precision, self.offset = _fit_distance(features, labels, n_types)
        latent = _unit(views[0].features[rows, :n_latent])
        self.centres = _unit(_type_means(latent, codes[rows], n_types)).T  # (latent, types)
        self._n_latent = n_latent

    def apart(self, features: NDArray[np.float32]) -> Floats:
        """Return log Mahalanobis and log cosine distance to the nearest type, (cells, 2)."""
        square = (features @ self.precision * features).sum(axis=1, keepdims=True)
        mahalanobis = square - 2 * features @ (self.precision @ self.means.T) + self.offset
        cosine = _unit(features[:, : self._n_latent]) @ self.centres
        nearest = np.stack((mahalanobis.min(axis=1), 1 - cosine.max(axis=1)), axis=1)
        return np.log(np.maximum(nearest, 1e-6))


def fit_linear(
    features: NDArray[np.float32], labels: NDArray[np.int64], n_types: int, penalty: float
) -> Linear:
    """Minimise the cross entropy of a linear map, features standardised; undo the standards."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    present = np.unique(labels)
    weight = np.zeros((features.shape[1], n_types))
    bias = np.full(n_types, UNSEEN)
    if len(present) == 1:
        bias[present] = 0.0
        return Linear(weight, bias)
    model = LogisticRegression(C=penalty, max_iter=300, tol=1e-3)
    with warnings.catch_warnings():  # that it has not converged to the last digit
        warnings.simplefilter("ignore")
        model.fit((features - mean) / std, labels)
    coefficients, intercept = model.coef_, model.intercept_
    if len(present) == 2:  # one row for the second of the two
        coefficients = np.concatenate((np.zeros_like(coefficients), coefficients))
        intercept = np.concatenate(([0.0], intercept))
    weight[:, present] = coefficients.T / std[:, None]
    bias[present] = intercept - (mean / std) @ coefficients.T
    return Linear(weight, bias)


def fit_profiles(counts: sp.csr_matrix, codes: NDArray[np.int64], n_types: int) -> Floats:
    """Return the log of each type's mean profile, smoothed towards that of all, (genes, types)."""
    membership = np.eye(n_types)[codes]
    summed = np.asarray(counts.T @ membership).T  # (types, genes)
    library = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    pooled = np.asarray((sp.diags(1 / library) @ counts).mean(axis=0)).ravel()
    profile = summed + SMOOTHING * max(1.0, summed.sum(axis=1).mean()) * pooled + SMALLEST
    log_profile = np.log(profile)
    normed: Floats = (log_profile - logsumexp(log_profile, axis=1, keepdims=True)).T
    return normed


def _fit_distance(
    features: NDArray[np.float32], labels: NDArray[np.int64], n_types: int
) -> tuple[Floats, Floats, Floats]:
    """Fit means (types, features) and one precision within types; with m^T P m of each type.

    A type without cells is nowhere: infinitely far, in the numbers of float32.
    """
    scale = features.std(axis=0) + 1e-6
    means = _type_means(features, labels, n_types)
    within = (features - means[labels]) / scale
    precision = LedoitWolf(assume_centered=True).fit(within).precision_ / np.outer(scale, scale)
    offset = np.einsum("tf,fg,tg->t", means, precision, means)
    offset[np.bincount(labels, minlength=n_types) == 0] = 1e12
    return means, precision, offset


def _type_means(rows: NDArray[Any], codes: NDArray[np.int64], n_types: int) -> Floats:
    membership = np.eye(n_types)[codes]
    n_cells = np.maximum(membership.sum(axis=0), 1)[:, None]
    means: Floats = membership.T @ rows / n_cells
    return means


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _log_odds(top: Floats) -> Floats:
    """Return the log odds against the likeliest type, from its probability."""
    odds: Floats = np.log((1 - top + 1e-6) / top)
    return odds


def _testable(
    codes: NDArray[np.int64], train: NDArray[np.int64], test: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the held-out cells whose type was there to be learned; all, if none was."""
    known = test[np.isin(codes[test], codes[train])]
    return known if len(known) else test


def _choose_penalty(
    views: Sequence[View], codes: NDArray[np.int64], folds: Sequence[Fold]
) -> float:
    """Return the inverse strength with the lowest log loss on the first fold."""
    train, test = folds[0]
    test = _testable(codes, train, test)
    features = np.concatenate([view.features[train] for view in views])
    labels = np.tile(codes[train], len(views))
    n_types = int(codes.max()) + 1
    losses = []
    for penalty in PENALTIES:
        linear = fit_linear(features, labels, n_types, penalty / len(views))
        log_p = np.stack([log_softmax(linear(view.features[test]), axis=1) for view in views])
        losses.append(-log_p[:, np.arange(len(test)), codes[test]].mean())
    return PENALTIES[int(np.argmin(losses))]


def _combine(weights: Floats, read: Floats, counted: Floats, d: Floats) -> Floats:
    """Weigh both readings by depth; see `TypeHead`."""
    of_read = np.exp(weights[0] + weights[1] * d)[..., None]
    of_counts = np.exp(weights[2] + weights[3] * d)[..., None]
    log_p: Floats = log_softmax(of_read * read + of_counts * counted, axis=-1)
    return log_p


def _fit_weights(read: Floats, counted: Floats, d: Floats, codes: NDArray[np.int64]) -> Floats:
    """Fit the two weights and their slopes by cross entropy on held-out cells.

    Temperature scaling is the first of them alone; the gradient is written out.
    """
    n_types = read.shape[2]
    truth = np.tile(codes, len(read))
    read, counted, d = read.reshape(-1, n_types), counted.reshape(-1, n_types), d.ravel()
    index = np.arange(len(truth))

    def loss(weights: Floats) -> tuple[float, Floats]:
        of_read, of_counts = np.exp(weights[::2, None] + weights[1::2, None] * d)
        log_p = log_softmax(of_read[:, None] * read + of_counts[:, None] * counted, axis=1)
        error = np.exp(log_p)
        error[index, truth] -= 1
        by_read = of_read * (error * read).sum(axis=1)
        by_counts = of_counts * (error * counted).sum(axis=1)
        gradient = np.array([by_read, by_read * d, by_counts, by_counts * d]).mean(axis=1)
        slopes = weights * [0, 1, 0, 1]
        value = -log_p[index, truth].mean() + SLOPE_PENALTY * (slopes**2).sum()
        return value, gradient + 2 * SLOPE_PENALTY * slopes

    bounds = [(-5.0, 3.0), (-2.0, 2.0), (-12.0, 2.0), (-2.0, 2.0)]
    start = np.array([0.0, 0.0, -2.0, -0.5])
    fitted: Floats = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return fitted


# -------------------------------------------------------------------------------------- fine-tuning


def fine_tune(
    network: CellPLM,
    views: Sequence[View],
    genes: NDArray[np.int64],
    codes: NDArray[np.int64],
    fold: Fold,
    config: TrainConfig,
) -> CellPLM:
    """Train encoder and latent by the cross entropy of a linear map, from the head's solution on.

    Each step reads cells of one view, drawn at random, as a context. The spectrum is not trained;
    the residual is read as it was. Best by the log loss on the held-out cells.

    Parameters
    ----------
    network
        Stays as it is.
    views, codes
        The reference.
    genes
        Positions of the measured genes in the model's list.
    fold
        Rows to train on, and rows held out.
    config
        What it leaves open is :data:`FINE_TUNING`.
    """
    config = config.filled(**FINE_TUNING)
    train, test = fold
    test = _testable(codes, train, test)
    n_latent = network.config.latent_size
    start = fit_linear(
        np.concatenate([view.features[train] for view in views]),
        np.tile(codes[train], len(views)),
        int(codes.max()) + 1,
        PENALTIES[1] / len(views),
    )
    tuned = copy.deepcopy(network).train()
    tuned.decoder = None
    tuned.head = nn.Linear(*start.weight.shape)
    with torch.no_grad():
        tuned.head.weight.copy_(torch.from_numpy(start.weight.T))
        tuned.head.bias.copy_(torch.from_numpy(start.bias))
    measured, labels = torch.from_numpy(genes), torch.from_numpy(codes)
    panel = None
    if network.config.embedder == "spectrum":  # which no step changes
        with torch.no_grad():
            panel = network.embedder.panel(measured)

    def loss(network: CellPLM, view: View, rows: NDArray[np.int64]) -> Tensor:
        block = view.counts[rows]
        counts = Counts(
            torch.from_numpy(block.data.astype(np.float32)),
            torch.from_numpy(block.indices),
            torch.from_numpy(block.indptr),
            torch.from_numpy(np.asarray(block.sum(axis=1), np.float32).ravel()),
        )
        encoded = network(counts, measured, panel=panel)
        latent = network.direction(encoded.posterior.mean, encoded.factors)
        residual = torch.from_numpy(view.features[rows, n_latent:])
        logits = network.head(torch.cat((latent, residual), 1))
        return F.cross_entropy(logits.float(), labels[torch.from_numpy(rows)])

    def objective(network: CellPLM, step: int) -> Terms:
        rng = np.random.default_rng([config.seed, step])
        view = views[int(rng.integers(len(views)))]
        rows = np.sort(rng.choice(train, min(len(train), STEP_CELLS), replace=False))
        return {"loss": loss(network, view, rows)}

    def validate(network: CellPLM) -> float:
        parts = np.array_split(test, max(1, -(-len(test) // STEP_CELLS)))
        return float(np.mean([loss(network, views[0], part) for part in parts]))

    fit(tuned, objective, config, validate=validate)
    result = copy.deepcopy(network)
    own = {n: t for n, t in tuned.state_dict().items() if not n.startswith("head.")}
    result.load_state_dict(own, strict=False)
    return result.eval()


# ----------------------------------------------------------------------------- what can be promised


def conformal_quantile(scores: Floats, coverage: float) -> float:
    """Return the value that a new score stays below with probability `coverage`, or more.

    The ceil((n + 1) coverage)-th smallest of n scores that are exchangeable with it (Vovk,
    Gammerman & Shafer, 2005); infinite where n is too small to promise that.
    """
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def set_thresholds(held_out: HeldOut, codes: NDArray[np.int64], coverage: float) -> Floats:
    """Return the least probability with which each type belongs to a prediction set, (types,).

    By type where enough cells were held out, so that rare types are covered as well as frequent
    ones; else by all cells.
    """
    truth = codes[held_out.rows]
    n_types = held_out.log_p.shape[2]
    wrong = 1 - np.exp(held_out.log_p[:, np.arange(len(truth)), truth])  # (views, rows)
    everywhere = conformal_quantile(wrong.ravel(), coverage)
    quantiles = [
        conformal_quantile(wrong[:, truth == code].ravel(), coverage)
        if (truth == code).sum() >= MIN_OF_TYPE
        else everywhere
        for code in range(n_types)
    ]
    return np.maximum(0.0, 1 - np.array(quantiles))


def set_sizes(proba: Floats, thresholds: Floats) -> NDArray[np.int64]:
    """Return how many types each cell's prediction set has; the likeliest is always in it."""
    inside = proba >= thresholds
    inside[np.arange(len(proba)), proba.argmax(axis=1)] = True
    sizes: NDArray[np.int64] = inside.sum(axis=1)
    return sizes


def validation_record(
    held_out: HeldOut,
    codes: NDArray[np.int64],
    labels: Sequence[str],
    *,
    set_threshold: Floats,
    unknown_threshold: float,
) -> dict[str, Any]:
    """Score the held-out cells, each at its own depth (the first view)."""
    names = np.array(labels, dtype=object)
    truth = codes[held_out.rows]
    proba = np.exp(held_out.log_p[0])
    guess = proba.argmax(axis=1)
    precision, recall, f1, n_cells = precision_recall_fscore_support(
        truth, guess, labels=np.arange(len(names)), zero_division=0
    )
    occurs = n_cells > 0
    bins = reliability(names[truth], proba, classes=names)
    inside = proba[np.arange(len(truth)), truth] >= set_threshold[truth]
    scores = pd.DataFrame(
        {"precision": precision, "recall": recall, "f1": f1, "n_cells": n_cells},
        index=pd.Index(names, dtype=object, name="type"),
    )
    confusion = pd.crosstab(pd.Categorical(truth), pd.Categorical(guess)).reindex(
        index=range(len(names)), columns=range(len(names)), fill_value=0
    )
    confusion = pd.DataFrame(confusion.to_numpy(), index=names, columns=names)
    return {
        "n_cells": len(truth),
        "accuracy": float((truth == guess).mean()),
        "macro_f1": float(f1[occurs].mean()),
        "log_loss": float(-held_out.log_p[0][np.arange(len(truth)), truth].mean()),
        "ece": expected_error(bins),
        "set_coverage": float((inside | (guess == truth)).mean()),
        "false_alarms": float((held_out.unknown[0] > unknown_threshold).mean()),
        "types": scores,
        "confusion": confusion,
        "reliability": bins,
    }


def baseline_prediction(
    counts: sp.csr_matrix, codes: NDArray[np.int64], folds: Sequence[Fold]
) -> NDArray[np.int64]:
    """Predict the folds' held-out cells by logistic regression on principal components.

    log1p of counts per 10,000, the 2,000 genes whose values vary most relative to their mean,
    standardised; 50 components of the training part. In the order of :class:`HeldOut`.
    """
    library = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    lognorm = (sp.diags(1e4 / library) @ counts).tocsr().log1p()
    mean = np.asarray(lognorm.mean(axis=0)).ravel()
    variance = np.asarray(lognorm.multiply(lognorm).mean(axis=0)).ravel() - mean**2
    chosen = np.sort(np.argsort(-variance / (mean + 0.05), kind="stable")[:BASELINE_GENES])
    values = lognorm[:, chosen].toarray().astype(np.float32)
    predicted = []
    for train, test in folds:
        test = _testable(codes, train, test)
        centre, scale = values[train].mean(axis=0), values[train].std(axis=0) + 1e-6
        standard = np.clip((values - centre) / scale, -10, 10)
        n_components = min(BASELINE_COMPONENTS, len(train) - 1, len(chosen))
        labels = np.unique(codes[train])
        if n_components < 1 or len(labels) < 2:
            predicted.append(np.full(len(test), labels[0]))
        else:
            pca = PCA(n_components, svd_solver="randomized", random_state=0, iterated_power=2)
            scores = pca.fit_transform(standard[train])
            model = LogisticRegression(max_iter=200, tol=1e-3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(scores, codes[train])
            predicted.append(model.predict(pca.transform(standard[test])))
    return np.concatenate(predicted)


def compare(
    truth: NDArray[np.int64],
    ours: NDArray[np.int64],
    theirs: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return their macro F1, and in which share of bootstrap draws of cells it is the higher."""

    def macro_f1(guess: NDArray[np.int64], rows: NDArray[np.int64]) -> float:
        right = np.bincount(truth[rows][truth[rows] == guess[rows]], minlength=n_types)
        both = np.bincount(truth[rows], minlength=n_types)
        occurs = both > 0
        both = both + np.bincount(guess[rows], minlength=n_types)
        return float((2 * right[occurs] / both[occurs]).mean())

    n_types = int(max(truth.max(), ours.max(), theirs.max())) + 1
    everyone = np.arange(len(truth))
    draws = [rng.integers(len(truth), size=len(truth)) for _ in range(N_DRAWS)]
    ahead = [macro_f1(theirs, rows) > macro_f1(ours, rows) for rows in draws]
    return macro_f1(theirs, everyone), float(np.mean(ahead))
