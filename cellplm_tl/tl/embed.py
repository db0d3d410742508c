"""`cp.tl.embed`: the zero-shot embedding."""

from __future__ import annotations

import os
import time
import warnings
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from cellplm_tl import _weights
from cellplm_tl._anndata import (
    build_record,
    check_slots,
    copy_in_memory,
    read_cells,
    read_record,
    write_slots,
)
from cellplm_tl._errors import ContextWarning, OptionError, check_option
from cellplm_tl._inference import ContextSums, encode, progress_bar
from cellplm_tl._random import generator
from cellplm_tl._rotation import (
    N_PASSES,
    Frame,
    between_share,
    find_frame,
    known_share,
    project,
)
from cellplm_tl._settings import logger, settings
from cellplm_tl._stored import context_from_tensors, frame_from_tensors, frame_to_tensors

if TYPE_CHECKING:
    from anndata import AnnData

ENCODING_SHARE = 0.3  # of the time of a call, roughly
N_COMPONENTS = 30  # of spectrum models; chosen on the development sets of the pool
SMALL_CONTEXT = 10  # cells; a smaller context has a mean that says little
# Share of the factors' variance between contexts, above which they look like types of cells:
# samples of a tissue have 0.03 to 0.20, cell types 0.19 to 0.66 (docs/benchmarks/contexts.md).
TYPE_LIKE_SHARE = 0.3


def embed(
    adata: AnnData,
    *,
    reference: AnnData | None = None,
    n_components: int | None = None,
    model: str | os.PathLike[str] | _weights.Model = "mini",
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    context: str = "data",
    key_added: str = "X_cellplm",
    device: str | None = None,
    random_state: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Embed cells with a pretrained model, without training (Wen et al., ICLR 2024).

    Give the raw counts of a sample, and go on with :func:`scanpy.pp.neighbors` on the result. Cells
    of one context see each other: name your samples with `batch_key`.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Counts of human genes in `X`, `layers["counts"]` or `layer`; log-normalised values are led
        back to counts where that can be done (the record says how). In memory or backed.
    reference : AnnData, optional
        Data that :func:`embed` has written `obsm[key_added]` and its record into, with this model
        and `context`. `adata` is put into the same space, so that its cells can be compared with
        those of the reference: the principal components are the reference's, contexts are each
        data set's own. Genes may differ.
    n_components : int, optional
        Width of the embedding for models with a spectrum (`"mini"`, `"linear_transfer"`); 30 by
        default. Other models return their latent as it is.
    model : str, path or Model, default "mini"
        A name of :func:`cellplm_tl.models.available`, a path, or a loaded model.
    layer : str, optional
        Layer to read instead.
    gene_key : str, optional
        Column of `var` with gene names; by default one of Ensembl ids, else `var_names`.
    batch_key : str, optional
        Column of `obs` that names each cell's context: a tissue sample, a library, a field of view.
        By default all cells are one context. Never a cell type: what a context has in common is
        taken off its cells.
    spatial_key : str, default "spatial"
        Key of `obsm` with coordinates, for models with positions.
    context : {"data", "model"}, default "data"
        Whose sums a cell is compared with. `"data"`: those of its context, and the principal
        components of `adata`. `"model"`: all of a context that is stored with the model, so that a
        cell's embedding depends on that cell alone, whatever else is in the file; contexts are
        not centred then, and differences of technology stay.
    key_added : str, default "X_cellplm"
        Key of the result; the share known goes to `obs` under the same name without `X_`.
    device : str, optional
        `"cpu"`, `"cuda"`, …; by default `cp.settings.device`.
    random_state : int or numpy generator, default 0
        Start of the iteration that finds the principal components.
    copy : bool, default False
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        With `copy=True` the new object; else `adata` is changed:

        `obsm[key_added]` : numpy.ndarray, shape (cells, n_components), float32
            The embedding; Euclidean distances are meant.
        `obs["cellplm_known"]` : float32, in [0, 1]
            Models with a spectrum: the share of a cell's (scaled, centred) expression that the
            factors of the pretraining pool explain. Counting noise is never explained: 0.04 to 0.17
            is usual for whole transcriptomes, 0.2 to 0.4 for hundreds of genes. Compare cells and
            data sets of like depth and genes.
        `uns["cellplm"][key_added]` : dict
            The record: what was done, on what, with what; its `frame` (the principal components) is
            what a later call with `reference=` reads.

    Raises
    ------
    InputError
        Not an AnnData, or it holds no counts (:class:`CountsError`), too few known human genes
        (:class:`GenesError`), or contexts that cannot be read (:class:`ContextError`).
    SlotError
        A slot that was named does not exist, or `key_added` is that of an input.
    OptionError
        `n_components` is not a positive number, or more than the reference has; the model has no
        spectrum, or no stored context; the reference was embedded with another model or context.
    ModelError
        The model cannot be found or read.

    Notes
    -----
    Released checkpoints: the latent mean of the paper's encoder over each context; the released
    mixture draws its component at random, here its expectation is taken.

    Models with a spectrum: with z the latent at unit prior variance, f the posterior factors of the
    measured genes and r what they leave of the scaled expression, the embedding is the principal
    components over `adata` of [c z, w r], c giving z the total variance of f, and w being 0.7
    (`"mini"`: 0.5). So what the model does not know still separates cells. `"mini"` brings z and r
    of every cell to one length first, so that depth does not set distances, and takes the mean of
    the directions of z and f for z. The whole is a map per cell and sums over contexts; memory does
    not grow with cells × genes. See the method page.

    Examples
    --------
    >>> import scanpy as sc, cellplm_tl as cp
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> cp.tl.embed(adata)
    >>> adata.obsm["X_cellplm"].shape
    (700, 30)
    >>> sc.pp.neighbors(adata, use_rep="X_cellplm")
    """
    start = time.perf_counter()
    parameters = {name: value for name, value in locals().items() if name not in ("adata", "start")}
    parameters["reference"] = None if reference is None else "AnnData"
    if n_components is not None and not (isinstance(n_components, Integral) and n_components > 0):
        raise OptionError(f"n_components must be a positive integer, not {n_components!r}.")
    check_option("context", context, ("data", "model"))
    rng = generator(random_state)
    known_key = f"{str(key_added).removeprefix('X_')}_known"
    loaded = model if isinstance(model, _weights.Model) else _weights.load(model)
    has_spectrum = loaded.config.embedder == "spectrum"
    if not has_spectrum:
        _refuse_frames(loaded, n_components, reference, context)
    sums, frame = _stored_context(loaded) if context == "model" else (None, None)
    usual = N_COMPONENTS
    if reference is not None:
        found = _frame_of(reference, loaded, context, key_added)
        frame, usual = (frame, usual) if found is None else (found, len(found.rotation.mean))
    width = _width(n_components, frame, usual)
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
    check_slots(adata, [("obsm", key_added), ("obs", known_key)], cells.slots_read)
    target = settings.torch_device(device)
    logger.info(
        "embedding %d cells in %d contexts with %s: %d genes matched",
        cells.n_cells,
        len(cells.contexts),
        loaded.name,
        len(cells.genes),
    )

    slots: dict[tuple[str, str], Any] = {}
    findings: dict[str, Any] = {}
    network = loaded.network
    with progress_bar(cells.n_cells) as bar:
        share = ENCODING_SHARE if has_spectrum else 1.0
        encoding = encode(network, cells, stored=sums, device=target, bar=bar, bar_share=share)
        slots["obsm", key_added] = encoding.latent
        if has_spectrum:
            step = (1 - share) / (1 if frame else N_PASSES + 1)
            advance = lambda n_cells: bar.update(step * n_cells)  # noqa: E731
            if frame is None:
                frame = find_frame(network, cells, encoding, width, rng, advance)
            slots["obsm", key_added] = project(network, cells, encoding, frame, width, advance)
    if has_spectrum:
        slots["obs", known_key], findings["known"] = known_share(encoding)
    if frame is not None and context == "data":
        kept = frame_to_tensors(frame)
        findings["frame"] = {name: tensor.numpy() for name, tensor in kept.items()}
        findings["share_between_contexts"] = between_share(network, encoding)
        _warn_of_contexts(cells, findings["share_between_contexts"])

    record = build_record(
        "embed",
        model=loaded,
        parameters=parameters | {"model": loaded.name},
        cells=cells,
        device=target,
        precision=settings.precision,
        random_state=random_state,
        seconds=time.perf_counter() - start,
        **findings,
    )
    result = copy_in_memory(adata) if copy else adata
    write_slots(result, slots, record, key_added)
    return result if copy else None


def _refuse_frames(
    model: _weights.Model, n_components: int | None, reference: AnnData | None, context: str
) -> None:
    """Say no to what only models with a spectrum can do."""
    asked = {
        "n_components": n_components is not None,
        "reference": reference is not None,
        "context='model'": context == "model",
    }
    for option in (option for option, is_asked in asked.items() if is_asked):
        raise OptionError(
            f"{option} is for models with a spectrum; {model.name!r} returns its latent of "
            f"{model.config.latent_size}. Leave it out."
        )


def _stored_context(model: _weights.Model) -> tuple[ContextSums, Frame]:
    if "embedder.0" not in model.context:
        raise OptionError(
            f"context='model' needs a model that keeps a context, which {model.name!r} does not; "
            "'mini' does."
        )
    return context_from_tensors(model.context, model.config.encoder_layers)


def _frame_of(reference: Any, model: _weights.Model, context: str, key_added: str) -> Frame | None:
    """Read the frame that `embed` left in a reference; None where it is the model's own."""
    record = read_record(reference, "embed", key_added, "reference")
    used = record["parameters"].get("context", "data")
    if not model.sha256:
        raise OptionError(
            f"the model {model.name!r} was never stored: nothing tells whether the reference was "
            "embedded with it. Save it (cp.models.save), load it, and embed both."
        )
    if record["model"]["sha256"] != model.sha256 or used != context:
        raise OptionError(
            f"reference was embedded with the model {record['model']['name']!r} "
            f"({record['model']['sha256'][:12]}) and context={used!r}, adata would be with "
            f"{model.name!r} ({model.sha256[:12]}) and context={context!r}: embed both alike."
        )
    if used == "model":
        return None
    if "frame" not in record:
        raise OptionError(
            "the reference's record holds no frame, an earlier version wrote it: embed it again."
        )
    return frame_from_tensors({k: torch.tensor(v) for k, v in record["frame"].items()})


def _width(n_components: int | None, frame: Frame | None, usual: int) -> int:
    """Return how many components the embedding has: by default the usual number."""
    width = int(n_components or usual)
    if frame is None:
        return width
    n_stored = len(frame.rotation.mean)
    if n_components is None:
        return min(width, n_stored)
    if width > n_stored:
        raise OptionError(
            f"n_components={width} is more than the {n_stored} of the space that was asked for."
        )
    return width


def _warn_of_contexts(cells: Any, between_share: float) -> None:
    """Say when contexts are too small, or look like cell types."""
    small = sum(len(rows) < SMALL_CONTEXT for rows in cells.contexts)
    if small:
        warnings.warn(
            f"{small} of {len(cells.contexts)} contexts have fewer than {SMALL_CONTEXT} cells. A "
            "cell is compared with the mean of its context, which says little there (a single cell "
            "is that mean): join small samples, or leave batch_key out.",
            ContextWarning,
            stacklevel=3,
        )
    if len(cells.contexts) > 2 and between_share > TYPE_LIKE_SHARE:
        warnings.warn(
            f"{between_share:.0%} of what the model knows of these cells lies between the "
            "contexts, and is taken off. If batch_key names cell types or clusters, their "
            "differences are gone from the embedding: use a column of samples, or none.",
            ContextWarning,
            stacklevel=3,
        )
