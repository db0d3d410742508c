"""`cp.tl.annotate`: the types of cells, learned from a labelled reference."""

from __future__ import annotations

import os
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_tl import _weights
from cellplm_tl._anndata import (
    Cells,
    build_record,
    cells_frame,
    check_slots,
    copy_in_memory,
    read_cells,
    write_slots,
)
from cellplm_tl._anndata.labels import Labels, if_there, read_batches, read_labels
from cellplm_tl._annotation import KIND, Reference, learn, tell, validation_of
from cellplm_tl._errors import (
    BaselineWarning,
    CellPLMError,
    OptionError,
    check_is_anndata,
)
from cellplm_tl._random import generator
from cellplm_tl._settings import logger, settings
from cellplm_tl.train import TrainConfig

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN, UNKNOWN_COLOR = "Unknown", "#bdbdbd"
BASELINE_AHEAD = 0.95  # share of bootstrap draws of cells, from which on a baseline is warned of


def annotate(
    adata: AnnData,
    reference: AnnData | None = None,
    *,
    labels_key: str = "cell_type",
    reference_layer: str | None = None,
    coverage: float = 0.9,
    unknown: bool = True,
    train: TrainConfig | None = None,
    save_model: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | _weights.Model = "mini",
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    key_added: str = "cellplm_annotation",
    device: str | None = None,
    random_state: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Tell the types of cells, as a labelled reference has them (Wen et al., ICLR 2024, section 4).

    Probabilities are calibrated, and cells whose type the reference lacks are `"Unknown"`. No cell
    of `adata` takes part in training. Genes may differ; those of both are read.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Counts of human genes, or what can be led back to counts. In memory or backed.
    reference : AnnData, optional
        Labelled cells, likewise. Not needed where `model` was saved by this function.
    labels_key : str, default "cell_type"
        Column of `reference.obs` with the types. Every cell must have one.
    reference_layer : str, optional
        Layer of the reference to read; by default `layer`, where the reference has it. In the same
        way `gene_key` and `batch_key` are read from the reference where it has them.
    coverage : float, default 0.9
        Share of cells whose type shall be in their prediction set; and share of cells of the
        reference's types that shall not be called unknown.
    unknown : bool, default True
        Whether cells far from all types are called `"Unknown"`.
    train : TrainConfig, optional
        What is trained. By default the head alone, in seconds. `strategy="full"` fine-tunes encoder
        and latent; `"auto"` does that too, and keeps it where held-out cells show it to be better.
    save_model : str or path, optional
        Directory to write the model with its head to, for later calls with `model=` and without
        reference.
    model : str, path or Model, default "mini"
        A name of :func:`cellplm_tl.models.available`, a path, or a loaded model.
    layer : str, optional
        Layer to read instead.
    gene_key : str, optional
        Column of `var` with gene names; by default one of Ensembl ids, else `var_names`.
    batch_key : str, optional
        Column of `obs` that names samples. Depth and threshold are found for each sample of
        `adata`; of the reference whole samples are held out to validate by, where their types are
        in other samples too.
    spatial_key : str, default "spatial"
        Key of `obsm` with coordinates, for models with positions.
    key_added : str, default "cellplm_annotation"
        Key of the result, and the beginning of the other keys.
    device : str, optional
        `"cpu"`, `"cuda"`, …; by default `cp.settings.device`.
    random_state : int or numpy generator, default 0
        Of thinning and folds.
    copy : bool, default False
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        With `copy=True` the new object; else `adata` is changed:

        `obs[key_added]` : categorical
            Type of each cell, in the reference's order, and `"Unknown"` where it occurs.
        `obs["cellplm_annotation_confidence"]` : float32, in [0, 1]
            Calibrated probability of the likeliest type.
        `obs["cellplm_annotation_set_size"]` : int64
            How many types the prediction set has; 1 is sure.
        `obs["cellplm_annotation_unknown_score"]` : float32
            How far the cell is from all types: about 0 for cells of the reference.
        `obsm["cellplm_annotation_proba"]` : DataFrame, shape (cells, types)
            Calibrated probabilities.
        `uns["cellplm_annotation_colors"]` : list of str
            The reference's colours, where it has some.
        `uns["cellplm"][key_added]` : dict
            The record. `validation` holds what was measured on held-out cells of the reference:
            `unit` (held out by batch or by cell), accuracy, macro F1, `ece`, `set_coverage`,
            `false_alarms`, scores by type, confusion, reliability, strategy, and the baseline's
            macro F1 on the same cells.

    Raises
    ------
    InputError
        No AnnData, cells without label, one label only; no counts (:class:`CountsError`), too few
        genes shared (:class:`GenesError`), or contexts that cannot be read (:class:`ContextError`).
    SlotError
        A slot that was named does not exist, or a key is that of an input.
    OptionError
        Neither a reference nor a model that was saved by this function, or both; a value that is
        not allowed; the reference has a label `"Unknown"`.
    ModelError
        The model cannot be found or read.
    FileExistsError
        `save_model` exists.

    Warns
    -----
    BaselineWarning
        Logistic regression on principal components did better on the held-out cells.

    Notes
    -----
    The head reads latent and residual of a cell linearly, and the likelihood of its counts under
    each type's profile; both are weighed by depth, by cross entropy on held-out cells. With `q` the
    ceil((n + 1) coverage)-th smallest of 1 - p(true type) over n held-out cells, a prediction set
    has the types with p >= 1 - q (split-conformal; by type where there are cells enough). That
    holds for cells that are exchangeable with the reference's; see the method page for what is done
    where technologies differ.

    Examples
    --------
    >>> import scanpy as sc, cellplm_tl as cp
    >>> pbmc = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> reference, adata = pbmc[::2].copy(), pbmc[1::2].copy()
    >>> cp.tl.annotate(adata, reference, labels_key="bulk_labels")
    >>> accuracy = (adata.obs["cellplm_annotation"] == adata.obs["bulk_labels"]).mean()
    >>> bool(accuracy > 0.6)
    True
    """
    start = time.perf_counter()
    parameters = {name: value for name, value in locals().items() if name not in ("adata", "start")}
    _check_options(coverage, unknown, train, save_model)
    rng = generator(random_state)
    loaded = model if isinstance(model, _weights.Model) else _weights.load(model)
    _check_sources(loaded, reference)
    target = settings.torch_device(device)
    needs_coordinates = loaded.config.positions != "none"
    cells = read_cells(
        adata,
        loaded.genes,
        layer=layer,
        gene_key=gene_key,
        batch_key=batch_key,
        spatial_key=spatial_key if needs_coordinates else None,
        need_coordinates=needs_coordinates,
    )
    slots_read = list(cells.slots_read)
    if reference is not None and reference is adata:
        slots_read.append(f"obs[{labels_key!r}]")
    names = {
        "confidence": ("obs", f"{key_added}_confidence"),
        "set_size": ("obs", f"{key_added}_set_size"),
        "unknown_score": ("obs", f"{key_added}_unknown_score"),
        "proba": ("obsm", f"{key_added}_proba"),
        "colors": ("uns", f"{key_added}_colors"),
    }
    check_slots(adata, [("obs", key_added), *names.values()], slots_read)

    fitted = loaded
    if reference is not None:
        labels = _read_labels(reference, labels_key, unknown)
        labelled = _read_reference(
            reference,
            loaded,
            layer=reference_layer or if_there(reference, "layers", layer),
            gene_key=if_there(reference, "var", gene_key),
            spatial_key=spatial_key if needs_coordinates else None,
        )
        logger.info("learning %d types from %d cells", len(labels.names), labelled.n_cells)
        fitted = learn(
            loaded,
            Reference(labelled, labels.codes, labels.names, read_batches(reference, batch_key)),
            cells.gene_index,
            colors=labels.colors,
            coverage=coverage,
            train=train,
            device=target,
            rng=rng,
        )
        if save_model is not None:
            _weights.save(fitted, save_model)
    validation = validation_of(fitted)
    if reference is not None:
        _warn_of_baseline(validation)
    told = tell(fitted, cells, target)

    types = fitted.outputs["labels"]
    guess = told.proba.argmax(axis=1)
    if unknown:
        guess = np.where(told.is_unknown, len(types), guess)
    categories = [*types, UNKNOWN] if (guess == len(types)).any() else types
    slots: dict[tuple[str, str], Any] = {
        ("obs", key_added): pd.Categorical.from_codes(guess, categories),
        names["confidence"]: told.proba.max(axis=1).astype(np.float32),
        names["set_size"]: told.set_size,
        names["unknown_score"]: told.unknown_score,
        names["proba"]: cells_frame(adata, told.proba.astype(np.float32), types),
    }
    if colors := fitted.outputs["colors"]:
        slots[names["colors"]] = [*colors, UNKNOWN_COLOR][: len(categories)]
    record = build_record(
        "annotate",
        model=loaded,
        parameters=parameters | {"model": loaded.name},
        cells=cells,
        device=target,
        precision=settings.precision,
        random_state=random_state,
        seconds=time.perf_counter() - start,
        labels=types,
        reference=fitted.outputs["reference"] | {"n_genes_shared": told.n_genes},
        calibration={
            "weights": fitted.network.head.weights.numpy(),
            "depth": fitted.network.head.depth.numpy(),
        },
        validation=validation,
        unknown={
            "called": int(told.is_unknown.sum()) if unknown else 0,
            "threshold": fitted.outputs["unknown_threshold"],
            "thresholds_of_contexts": told.thresholds,
            "empty_cells": int(told.is_empty.sum()),
        },
        reference_thinned_to=told.depths,
    )
    result = copy_in_memory(adata) if copy else adata
    write_slots(result, slots, record, key_added)
    return result if copy else None


def _check_options(coverage: float, unknown: bool, train: Any, save_model: Any) -> None:
    is_number = isinstance(coverage, int | float | np.number) and not isinstance(coverage, bool)
    if not is_number or not 0 < coverage < 1:
        raise OptionError(f"coverage must be a number between 0 and 1, not {coverage!r}.")
    if not isinstance(unknown, bool):
        raise OptionError(f"unknown must be True or False, not {unknown!r}.")
    if train is not None and not isinstance(train, TrainConfig):
        raise OptionError(
            f"train must be a cp.train.TrainConfig, not {type(train).__name__}: for example "
            "cp.train.TrainConfig(strategy='full')."
        )
    if save_model is not None and Path(save_model).exists():
        raise FileExistsError(f"save_model={os.fspath(save_model)!r} exists; choose another path.")


def _check_sources(model: _weights.Model, reference: Any) -> None:
    """Raise unless there is one thing to tell types by: a reference, or a model that has a head."""
    has_head = model.outputs.get("kind") == KIND
    if reference is None and not has_head:
        raise OptionError(
            f"the model {model.name!r} has no head for cell types: pass a labelled reference, "
            "annotate(adata, reference, labels_key='…'), or a model saved with save_model='…'."
        )
    if reference is not None and has_head:
        raise OptionError(
            f"the model {model.name!r} was saved with a head for {len(model.outputs['labels'])} "
            "types. Leave the reference out to use it, or pass the model it was made from."
        )
    if reference is not None:
        check_is_anndata(reference, "reference")


def _read_labels(reference: AnnData, labels_key: str, unknown: bool) -> Labels:
    labels = read_labels(reference, labels_key, "reference")
    if unknown and UNKNOWN in labels.names:
        n_cells = int((labels.codes == labels.names.index(UNKNOWN)).sum())
        raise OptionError(
            f"reference.obs[{labels_key!r}] has the label {UNKNOWN!r} ({n_cells:,} cells), which "
            "is what cells get whose type the reference lacks. Leave those cells out, rename the "
            "label, or pass unknown=False."
        )
    return labels


def _read_reference(
    reference: AnnData,
    model: _weights.Model,
    *,
    layer: str | None,
    gene_key: str | None,
    spatial_key: str | None,
) -> Cells:
    """Read the reference's cells, as one context; what is wrong with them names the reference."""
    try:
        return read_cells(
            reference,
            model.genes,
            layer=layer,
            gene_key=gene_key,
            spatial_key=spatial_key,
            need_coordinates=spatial_key is not None,
        )
    except CellPLMError as error:
        message = re.sub(r"\badata\b", "reference", str(error))
        raise type(error)(f"The reference: {message}") from None


def _warn_of_baseline(validation: dict[str, Any]) -> None:
    """Say so where logistic regression on principal components would have done better."""
    ours, baseline = validation["macro_f1"], validation["baseline"]["macro_f1"]
    if validation["baseline"]["ahead_share"] >= BASELINE_AHEAD:
        warnings.warn(
            f"On {validation['n_cells']:,} held-out cells of the reference logistic regression on "
            f"principal components has a macro F1 of {baseline:.3f}, this head one of {ours:.3f}. "
            "The model does not help with these types: look at validation in the record, or use "
            "the baseline.",
            BaselineWarning,
            stacklevel=3,
        )
