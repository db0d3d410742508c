"""Types of cells: a model learns them from a labelled reference, and tells them of a query.

Cells are compared with the mean of their context. Where the types of a query are to be told, that
mean must not depend on which types the query holds: of nothing but B cells, each is like the mean.
So the reference stands for the context of every query, thinned to the query's depth.

Axes: `cells`, `genes` (measured by reference and query), `features`, `types`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplm_tl._anndata import Cells, CountBlock
from cellplm_tl._errors import GenesError
from cellplm_tl._inference import ContextSums, Encoding, blocks, encode, read_block
from cellplm_tl._rotation import Frame, find_frame, latent_part, project
from cellplm_tl._settings import logger
from cellplm_tl._weights import Model
from cellplm_tl.models import CellPLM
from cellplm_tl.models.representation import Columns, Rotation
from cellplm_tl.train import TrainConfig
from cellplm_tl.train.annotation import (
    FittedHead,
    View,
    baseline_prediction,
    compare,
    conformal_quantile,
    fine_tune,
    fit_head,
    make_folds,
    set_sizes,
    set_thresholds,
    validation_record,
)

KIND = "annotation"  # of a model's outputs
PREFIX = "annotation."  # of the tensors that a model keeps beside its own context
SHARES = (1.0, 0.5, 0.2)  # of its counts that a reference cell is learned from, once each
BLOCK_CELLS = 4096  # that are read in one go
MOST_CELLS = 10_000  # of a reference, that a head is fitted on
N_RESIDUAL = 100  # directions of the residual that a head reads
MIN_GENES = 5  # that query and reference must share
SHIFT_QUANTILE = 0.25  # of the unknown scores: this share of a query is taken to be of known types
STANDARD_ERRORS = 2  # by which fine-tuning must be better to be kept
SHIFT_CELLS = 50  # of a context, from which on its scores are compared with the reference's
SMALLEST_SHARE = 1e-6  # of the reference's counts that a query's genes are taken to have
ABSENT = -30.0  # log share of a gene that the reference does not measure; never read
FIRST_OF_UNKNOWN = 1.0  # by which the score of a cell without counts passes every other
OUTPUTS = ("latent", "factors", "explained", "total")  # of an encoding, per cell


@dataclass(frozen=True)
class Panel:
    """Cells, of whose genes some are read; the library is counted over these.

    It can be used as :class:`Cells` are.
    """

    cells: Any = field(repr=False)
    gene_index: NDArray[np.int64] = field(repr=False)  # (genes,) of the model, ascending
    contexts: tuple[NDArray[np.int64], ...] = field(repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.cells.n_cells)

    @property
    def genes(self) -> NDArray[np.int64]:
        """Positions of the genes in the model's list."""
        return self.gene_index

    @property
    def coordinates(self) -> NDArray[np.float64] | None:
        """Coordinates of the cells."""
        coordinates: NDArray[np.float64] | None = self.cells.coordinates
        return coordinates

    def matrix(self, rows: NDArray[np.int64]) -> sp.csr_matrix:
        """Read counts of some cells, (cells, genes)."""
        block = self.cells.counts(rows)
        shape = (len(rows), len(self.cells.gene_index))
        whole = sp.csr_matrix((block.values, block.columns, block.offsets), shape=shape)
        if len(self.gene_index) == shape[1]:
            return whole
        return whole[:, np.searchsorted(self.cells.gene_index, self.gene_index)]

    def counts(self, rows: NDArray[np.int64]) -> CountBlock:
        """Read counts of some cells."""
        return _as_block(self.matrix(rows))


@dataclass(frozen=True)
class Sample:
    """Cells in memory, sparse. It can be used as :class:`Cells` are."""

    values: sp.csr_matrix = field(repr=False)  # (cells, genes)
    gene_index: NDArray[np.int64] = field(repr=False)
    coordinates: NDArray[np.float64] | None = field(repr=False)
    contexts: tuple[NDArray[np.int64], ...] = field(repr=False)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.values.shape[0])

    @property
    def genes(self) -> NDArray[np.int64]:
        """Positions of the genes in the model's list."""
        return self.gene_index

    def counts(self, rows: NDArray[np.int64]) -> CountBlock:
        """Give counts of some cells."""
        return _as_block(self.values[rows])

    def thinned(self, share: float, rng: np.random.Generator) -> Sample:
        """Draw a binomial share of every count."""
        if share == 1.0:
            return self
        values = self.values.copy()
        whole = np.rint(values.data).astype(np.int64)
        values.data = rng.binomial(whole, share).astype(np.float32)
        values.eliminate_zeros()
        return replace(self, values=values)


def restrict(cells: Cells, genes: NDArray[np.int64]) -> Panel:
    """See cells through those of their genes that are among `genes` (positions, ascending)."""
    return Panel(cells, np.intersect1d(cells.gene_index, genes), cells.contexts)


def draw(panel: Panel, rows: NDArray[np.int64]) -> Sample:
    """Read some cells into memory, as one context."""
    parts = [
        panel.matrix(rows[start : start + BLOCK_CELLS])
        for start in range(0, len(rows), BLOCK_CELLS)
    ]
    coordinates = None if panel.coordinates is None else panel.coordinates[rows]
    values = sp.vstack(parts, format="csr").astype(np.float32)
    return Sample(values, panel.gene_index, coordinates, (np.arange(len(rows)),))


def sums_of_model(encoding: Encoding, network: CellPLM, genes: NDArray[np.int64]) -> ContextSums:
    """Return the sums of an encoding's one context, over all genes of the model."""
    index, n_genes = torch.from_numpy(genes), network.config.n_genes
    embedder = tuple(
        total if not total.ndim else torch.zeros(n_genes).index_copy(0, index, total)
        for total in encoding.context_sums[0]
    )
    return ContextSums(embedder, encoding.layer_sums[0])


def encode_against(
    network: CellPLM,
    cells: Panel | Sample,
    sums: Sequence[ContextSums],
    depth_of_context: Sequence[int],
    device: torch.device | None = None,
) -> Encoding:
    """Encode cells with the sums of the reference in the place of those of their contexts.

    Parameters
    ----------
    network
        Stays as it is.
    cells
        The query.
    sums
        Of the reference at each depth.
    depth_of_context
        Which of them each context is compared with.
    """
    merged: dict[str, NDArray[np.float32]] = {}
    of_context: dict[int, Any] = {}
    panel: Any = None
    for depth in sorted(set(depth_of_context)) or [0]:
        numbers = [n for n, d in enumerate(depth_of_context) if d == depth]
        part = replace(cells, contexts=tuple(cells.contexts[n] for n in numbers))
        encoding = encode(network, _as_cells(part), stored=sums[depth], device=device)
        panel = encoding.panel
        of_context |= dict(zip(numbers, encoding.context_sums, strict=False))
        rows = np.concatenate([*part.contexts, np.empty(0, np.int64)])
        for name in OUTPUTS:
            values = getattr(encoding, name)
            if values is not None:
                merged.setdefault(name, values)[rows] = values[rows]
    context_sums = tuple(of_context[number] for number in sorted(of_context))
    return Encoding(panel=panel, context_sums=context_sums, layer_sums=(), **merged)


def read_features(
    network: CellPLM, cells: Panel | Sample, encoding: Encoding, frame: Frame | None
) -> NDArray[np.float32]:
    """Return what the head reads of each cell: its latent, and its residual in a frame."""
    latent = latent_part(network, encoding, slice(None)).numpy()
    if frame is None or not len(frame.rotation.mean):
        return latent
    residual = project(network, _as_cells(cells), encoding, frame, len(frame.rotation.mean))
    return np.concatenate((latent, residual), axis=1)


def library_sizes(network: CellPLM, cells: Panel) -> NDArray[np.float64]:
    """Count every cell, block by block."""
    sizes = np.zeros(cells.n_cells)
    for _, rows in blocks(_as_cells(cells), network):
        sizes[rows] = cells.counts(rows).library_size
    return sizes


def _as_block(matrix: sp.csr_matrix) -> CountBlock:
    library_size = np.asarray(matrix.sum(axis=1), np.float64).ravel()
    values = matrix.data.astype(np.float32, copy=False)
    return CountBlock(values, matrix.indices, matrix.indptr, library_size)


# --------------------------------------------------------------------------------- from a reference


class Reference(NamedTuple):
    """What is learned from."""

    cells: Cells
    codes: NDArray[np.int64]  # (cells,) type of each
    labels: tuple[str, ...]  # of the types
    batches: NDArray[Any] | None  # (cells,)


def learn(
    model: Model,
    reference: Reference,
    genes: NDArray[np.int64],
    *,
    colors: Sequence[str] = (),
    coverage: float,
    train: TrainConfig | None,
    device: torch.device | None,
    rng: np.random.Generator,
) -> Model:
    """Give a model a head for the types of a reference.

    Parameters
    ----------
    model
        Stays as it is.
    reference
        Labelled cells.
    genes
        Positions of the genes that the query measures.
    colors
        Of the types, if they have some.
    coverage
        Of prediction sets, and share of cells of known types that are not to be called unknown.
    train
        What to train; None is `strategy="head"`.
    device, rng
        Where to compute; what draws.

    Returns
    -------
    Model
        With a head, whose `outputs` say what it means (:func:`validation_of` how good it is).
    """
    panel = restrict(reference.cells, genes)
    if len(panel.gene_index) < MIN_GENES:
        raise GenesError(
            f"reference and adata share {len(panel.gene_index)} genes that the model knows; at "
            f"least {MIN_GENES} are needed. Are the names of both of one kind?"
        )
    rows = _some_of_each(reference.codes, rng)
    codes = reference.codes[rows]
    batches = None if reference.batches is None else reference.batches[rows]
    sample = draw(panel, rows)
    samples = [sample.thinned(share, rng) for share in SHARES]
    folds, unit = make_folds(codes, batches, rng)

    state = _look(model.network, samples, device, rng)
    n_latent = model.config.latent_size
    fitted = fit_head(state.views, codes, n_latent, folds)
    network = _with_head(model.network, state, fitted)
    strategy, tried = "head", {"head": float(_losses(fitted, codes).mean())}
    reason = "asked for, or by default"
    if train is not None and train.strategy != "head":
        fold = _validation_fold(folds, codes, unit, train.validation_share, rng)
        tuned = fine_tune(model.network, state.views, panel.gene_index, codes, fold, train)
        tuned_state = _look(tuned, samples, device, rng)
        tuned_fit = fit_head(tuned_state.views, codes, n_latent, [fold])
        both = pd.DataFrame({"head": _losses(fitted, codes), "full": _losses(tuned_fit, codes)})
        both = both.dropna()
        tried = {name: float(both[name].mean()) for name in both}
        gain = both["head"] - both["full"]
        # Fine-tuning was stopped by these cells, so that it looks better on them than it is.
        is_better = gain.mean() > STANDARD_ERRORS * gain.std(ddof=0) / max(1, len(gain)) ** 0.5
        if train.strategy == "full" or is_better:
            strategy, fitted, state, folds = "full", tuned_fit, tuned_state, [fold]
            network = _with_head(tuned, state, fitted)
        if train.strategy == "auto":
            reason = "log loss on the same held-out cells, beyond its error"

    thresholds = set_thresholds(fitted.held_out, codes, coverage)
    unknown = conformal_quantile(fitted.held_out.unknown.ravel(), coverage)
    validation = validation_record(
        fitted.held_out,
        codes,
        reference.labels,
        set_threshold=thresholds,
        unknown_threshold=unknown,
    )
    held_out = fitted.held_out
    baseline = baseline_prediction(sample.values, codes, folds)
    ours = held_out.log_p[0].argmax(axis=1)
    baseline_f1, ahead = compare(codes[held_out.rows], ours, baseline, rng)
    validation |= {
        "unit": unit,
        "n_folds": len(folds),
        "baseline": {
            "name": "logistic regression on 50 principal components",
            "macro_f1": baseline_f1,
            "ahead_share": ahead,  # of bootstrap draws of the held-out cells
        },
        "strategy": {"chosen": strategy, "because": reason, "log_loss": tried},
    }
    outputs = {
        "kind": KIND,
        "labels": list(reference.labels),
        "colors": list(colors),
        "coverage": coverage,
        "set_thresholds": [float(t) for t in thresholds],
        "unknown_threshold": min(unknown, float(fitted.held_out.unknown.max()) + 1),
        "unknown_quartile": float(np.quantile(fitted.held_out.unknown, SHIFT_QUANTILE)),
        "unknown_largest": float(fitted.held_out.unknown.max()),
        "penalty": fitted.penalty,
        "reference": {"n_cells": len(reference.codes), "n_cells_fitted": len(codes)},
        "validation": _to_plain(validation),
    }
    return replace(
        model,
        network=network,
        sha256="",
        context=({} if strategy == "full" else model.context) | _to_tensors(state),
        outputs=outputs,
    )


class _State(NamedTuple):
    """A reference in the eyes of a network."""

    views: list[View]
    sums: list[ContextSums]
    depths: Tensor  # (views,): log of the median library size
    frame: Frame | None
    genes: NDArray[np.int64]


def _look(
    network: CellPLM,
    samples: Sequence[Sample],
    device: torch.device | None,
    rng: np.random.Generator,
) -> _State:
    """Encode a reference at each depth, each in its own context."""
    views, sums, frame = [], [], None
    for sample in samples:
        encoding = encode(network, _as_cells(sample), keep_layer_sums=True, device=device)
        if frame is None and network.config.embedder == "spectrum":
            frame = find_frame(
                network, _as_cells(sample), encoding, N_RESIDUAL, rng, residual_only=True
            )
        views.append(View(read_features(network, sample, encoding, frame), sample.values))
        sums.append(sums_of_model(encoding, network, sample.gene_index))
    depths = [_log_depth(view.library_size) for view in views]
    return _State(views, sums, torch.tensor(depths), frame, samples[0].gene_index)


def _log_depth(library_size: NDArray[np.float64]) -> float:
    """Return the log of the median library size of the cells that have counts."""
    seen = library_size[library_size > 0]
    return float(np.log(np.median(seen))) if len(seen) else 0.0


def _some_of_each(codes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose the rows that are learned from: all, or as many of each type as there is room for."""
    if len(codes) <= MOST_CELLS:
        return np.arange(len(codes))
    shuffled = rng.permutation(len(codes))
    within = pd.Series(codes[shuffled]).groupby(codes[shuffled]).cumcount().to_numpy()
    chosen = shuffled[np.argsort(within, kind="stable")[:MOST_CELLS]]
    logger.info("the head is fitted on %d of %d reference cells", MOST_CELLS, len(codes))
    return np.sort(chosen)


def _validation_fold(
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    codes: NDArray[np.int64],
    unit: str,
    share: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what fine-tuning is fitted on, and what it is chosen by: a share, or one fold."""
    if unit == "batch":
        return folds[0]
    held_out = np.zeros(len(codes), bool)
    for code in np.unique(codes):
        of_type = rng.permutation(np.flatnonzero(codes == code))
        held_out[of_type[: round(share * len(of_type))]] = True
    if not held_out.any():
        return folds[0]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _losses(fitted: FittedHead, codes: NDArray[np.int64]) -> pd.Series:
    """Return the log loss of each held-out cell at its own depth, by its row."""
    held_out = fitted.held_out
    index = np.arange(len(held_out.rows))
    losses = -held_out.log_p[0][index, codes[held_out.rows]]
    return pd.Series(losses, index=held_out.rows)


def _with_head(network: CellPLM, state: _State, fitted: FittedHead) -> CellPLM:
    """Return the network with a fitted head in the place of its decoder."""
    n_residual = 0 if state.frame is None else len(state.frame.rotation.mean)
    n_types = len(fitted.arrays["log_prior"])
    config = replace(network.config, head="types", head_outputs=n_types, residual_inputs=n_residual)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten
        headed = CellPLM(config)
    own = {n: t for n, t in network.state_dict().items() if not n.startswith(("decoder.", "head."))}
    tensors = {
        f"head.{name}": torch.from_numpy(np.asarray(array)).float()
        for name, array in fitted.arrays.items()
    }
    tensors["head.log_profiles"] = _of_all_genes(
        tensors["head.log_profiles"], state.genes, config.n_genes, ABSENT
    )
    if state.frame is not None:
        (_, directions), mean = state.frame.rotation
        of_all = _of_all_genes(directions, state.frame.genes, config.n_genes, 0.0)
        tensors["head.residual_directions"] = of_all
        tensors["head.residual_mean"] = mean
        tensors["head.residual_length"] = torch.tensor(state.frame.residual_length)
    unused = {n: t for n, t in headed.state_dict().items() if n.startswith("head.residual_")}
    headed.load_state_dict(unused | own | tensors)
    return headed.eval()


def _of_all_genes(rows: Tensor, genes: NDArray[np.int64], n_genes: int, elsewhere: float) -> Tensor:
    """Put rows of some genes, (genes, columns), into a table of all that the model knows."""
    table = torch.full((n_genes, rows.shape[1]), elsewhere)
    table[torch.from_numpy(genes)] = rows
    return table


# ------------------------------------------------------------------------------------ as it is kept


def _to_tensors(state: _State) -> dict[str, Tensor]:
    """Give what a model keeps of its reference as tensors by name, for `Model.context`."""
    tensors = {
        f"{PREFIX}genes": torch.from_numpy(state.genes).float(),
        f"{PREFIX}depths": state.depths,
    }
    for depth, (embedder, layers) in enumerate(state.sums):
        for number, total in enumerate(embedder):
            tensors[f"{PREFIX}{depth}.embedder.{number}"] = total
        for layer, totals in enumerate(layers):
            for number, total in enumerate(totals):
                tensors[f"{PREFIX}{depth}.layers.{layer}.{number}"] = total
    return tensors


class _Kept(NamedTuple):
    """What a model keeps of its reference."""

    genes: NDArray[np.int64]  # measured by it
    depths: Tensor
    sums: list[ContextSums]
    frame: Frame | None


def _from_tensors(model: Model) -> _Kept:
    """Make of tensors by name what :func:`_to_tensors` was given."""
    kept = {n.removeprefix(PREFIX): t for n, t in model.context.items() if n.startswith(PREFIX)}

    def totals(prefix: str) -> tuple[Tensor, ...]:
        n_totals = sum(name.startswith(prefix) for name in kept)
        return tuple(kept[f"{prefix}{number}"] for number in range(n_totals))

    sums = [
        ContextSums(
            totals(f"{depth}.embedder."),
            tuple(totals(f"{depth}.layers.{n}.") for n in range(len(model.network.encoder))),
        )
        for depth in range(len(kept["depths"]))
    ]
    head, frame = model.network.head, None
    if model.config.residual_inputs:
        nothing = torch.zeros(model.config.latent_size, model.config.residual_inputs)
        rotation = Rotation(Columns(nothing, head.residual_directions), head.residual_mean)
        every = np.arange(model.config.n_genes)
        frame = Frame(rotation, every, 0.0, float(head.residual_length))
    return _Kept(kept["genes"].long().numpy(), kept["depths"], sums, frame)


def _to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a record as JSON keeps it: frames as dicts of lists."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, pd.DataFrame):
            table = value.reset_index() if value.index.name else value
            plain[key] = {"frame": table.to_dict("split"), "index": value.index.name}
        else:
            plain[key] = _to_plain(value) if isinstance(value, Mapping) else value
    return plain


def validation_of(model: Model) -> dict[str, Any]:
    """Return the record of the validation that a model with such a head was fitted with."""
    return _from_plain(model.outputs["validation"])


def _from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "frame" in value:
            table = pd.DataFrame(**value["frame"])
            record[key] = table.set_index(value["index"]) if value["index"] else table
        else:
            record[key] = _from_plain(value) if isinstance(value, Mapping) else value
    return record


# --------------------------------------------------------------------------------------- of a query


class Annotation(NamedTuple):
    """What a model says of cells."""

    proba: NDArray[np.float64]  # (cells, types)
    set_size: NDArray[np.int64]  # (cells,) types of the prediction set
    unknown_score: NDArray[np.float32]  # (cells,) above the threshold: of no type of the reference
    is_unknown: NDArray[np.bool_]  # (cells,)
    is_empty: NDArray[np.bool_]  # (cells,) without counts of the genes that were read
    n_genes: int  # that were read
    thresholds: NDArray[np.float64]  # (contexts,) of the score
    depths: list[float]  # (contexts,) share of its counts that the reference was thinned to


def tell(model: Model, cells: Cells, device: torch.device | None = None) -> Annotation:
    """Tell the types of cells.

    A cell's probabilities depend on that cell alone, but for the depth that its context is compared
    at. Whether it is called unknown depends on its context once more: where a context as a whole is
    further from the reference than the reference's own cells, as that of another technology is, the
    threshold rises by as much (by a quartile, so that a query of mostly known types is meant).
    """
    network, head, outputs = model.network, model.network.head, model.outputs
    kept = _from_tensors(model)
    panel = restrict(cells, kept.genes)
    if len(panel.gene_index) < MIN_GENES:
        raise GenesError(
            f"adata measures {len(panel.gene_index)} of the {len(kept.genes):,} genes that the "
            f"types were learned from; at least {MIN_GENES} are needed. Are the names of one kind?"
        )
    library = library_sizes(network, panel)
    in_reference = _share_measured(network, panel.gene_index)
    depth_of_context = [
        int((kept.depths - (_log_depth(library[rows]) - np.log(in_reference))).abs().argmin())
        for rows in panel.contexts
    ]
    encoding = encode_against(network, panel, kept.sums, depth_of_context, device)
    features = torch.from_numpy(read_features(network, panel, encoding, kept.frame))
    n_types = model.config.head_outputs
    log_p, score = torch.zeros(panel.n_cells, n_types), torch.zeros(panel.n_cells)
    genes = torch.from_numpy(panel.gene_index)
    with torch.no_grad():
        for _, rows in blocks(_as_cells(panel), network):
            counts = read_block(_as_cells(panel), rows)
            of_counts = head.likelihood(counts, genes)
            log_p[rows] = head(features[rows], of_counts, counts.library_size)
            score[rows] = head.unknown_score(features[rows], log_p[rows])
    is_empty = library == 0
    score[torch.from_numpy(is_empty)] = outputs["unknown_largest"] + FIRST_OF_UNKNOWN

    scores = score.numpy()
    thresholds = np.array(
        [
            outputs["unknown_threshold"]
            + _shift(scores[rows[~is_empty[rows]]], outputs["unknown_quartile"])
            for rows in panel.contexts
        ]
    )
    is_unknown = is_empty.copy()
    for rows, threshold in zip(panel.contexts, thresholds, strict=True):
        is_unknown[rows] |= scores[rows] > threshold
    proba = log_p.double().softmax(1).numpy()
    return Annotation(
        proba=proba,
        set_size=set_sizes(proba, np.array(outputs["set_thresholds"])),
        unknown_score=scores,
        is_unknown=is_unknown,
        is_empty=is_empty,
        n_genes=len(panel.gene_index),
        thresholds=thresholds,
        depths=[SHARES[depth] for depth in depth_of_context],
    )


def _share_measured(network: CellPLM, genes: NDArray[np.int64]) -> float:
    """Return the share of the reference's counts that lies on some genes."""
    head = network.head
    of_types = head.log_profiles[torch.from_numpy(genes)].exp().sum(0)  # (types,)
    return float((of_types * head.log_prior.exp()).sum().clamp(SMALLEST_SHARE, 1.0))


def _shift(scores: NDArray[np.float32], quartile: float) -> float:
    """Return by how much the scores of a context lie above those of the reference."""
    if len(scores) < SHIFT_CELLS:
        return 0.0
    return max(0.0, float(np.quantile(scores, SHIFT_QUANTILE)) - quartile)


def _as_cells(cells: Any) -> Cells:
    """Take for cells what is read like them."""
    typed: Cells = cells
    return typed
