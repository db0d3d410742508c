"""`cp.tl.gene_embeddings`: the vector that a model has for each gene."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from cellplm_tl import _weights
from cellplm_tl._anndata import build_record, check_slots, copy_in_memory, read_genes, write_slots
from cellplm_tl._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData


def gene_embeddings(
    adata: AnnData,
    *,
    model: str | os.PathLike[str] | _weights.Model = "mini",
    gene_key: str | None = None,
    key_added: str = "cellplm_gene",
    copy: bool = False,
) -> AnnData | None:
    """Look up the vector that a pretrained model has for each gene (Wen et al., ICLR 2024).

    Genes that vary together in the cells that the model has seen have vectors of like direction.
    The vectors are the model's and do not depend on the cells of `adata`: only the names of its
    genes are read, so that it needs no counts and no cells.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Human genes, by Ensembl id or symbol. In memory or backed.
    model : str, path or Model, default "mini"
        A name of :func:`cellplm_tl.models.available`, a path, or a loaded model.
    gene_key : str, optional
        Column of `var` with gene names; by default one of Ensembl ids, else `var_names`.
    key_added : str, default "cellplm_gene"
        Key of the result.
    copy : bool, default False
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        With `copy=True` the new object; else `adata` is changed:

        `varm[key_added]` : numpy.ndarray, shape (genes, dims), float32
            A vector per column. `dims` is the number of factors of a model with a spectrum
            (`"mini"`, `"linear_transfer"`: 300), or the width of a gene table (released
            checkpoints: 1024). Columns of one gene have the same vector; that of a gene that the
            model lacks is NaN.
        `uns["cellplm"][key_added]` : dict
            The record: which model, how many genes were found and how.

    Raises
    ------
    InputError
        Not an AnnData, or none of its genes is known to the model, or they look like mouse genes
        (:class:`GenesError`).
    SlotError
        `var` has no column `gene_key`, or `key_added` cannot be a key.
    ModelError
        The model cannot be found or read.

    Notes
    -----
    Models with a spectrum hold a factor model of scaled expression in the pretraining pool: x = V f
    + noise, where the factors f have the variances Λ, and x is centred on its data set (see
    :func:`embed`). The vector of gene g is its loading on factors of unit variance,

        u_g = V_g Λ^(1/2).

    So u_g · u_h is the covariance of the genes g and h within the data sets of the pool, as far as
    the factors carry it; the squared length of u_g is the part of the variance of g that they
    explain; and the cosine of u_g and u_h is the correlation of these parts. A longer vector is a
    gene that the model knows more of: where only kinship counts, use the cosine. The network of
    `"mini"` has no part in it.

    Released checkpoints: the row of the table E of the gene expression embedder, in which a cell is
    log(1 + counts) E (paper, section 3); these are the vectors of the paper's appendix H.2.

    Examples
    --------
    >>> import numpy as np, scanpy as sc, cellplm_tl as cp
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> cp.tl.gene_embeddings(adata)
    >>> adata.varm["cellplm_gene"].shape
    (765, 300)
    >>> genes = adata[:, ["CD3D", "CD3E", "CD79A"]].varm["cellplm_gene"]
    >>> genes /= np.linalg.norm(genes, axis=1, keepdims=True)
    >>> genes @ genes.T > 0.5
    array([[ True,  True, False],
           [ True,  True, False],
           [False, False,  True]])
    """
    start = time.perf_counter()
    loaded = model if isinstance(model, _weights.Model) else _weights.load(model)
    parameters = {"model": loaded.name, "gene_key": gene_key, "key_added": key_added, "copy": copy}
    columns = read_genes(adata, loaded.genes, gene_key=gene_key)
    check_slots(adata, [("varm", key_added)], columns.slots_read)

    with torch.no_grad():
        rows = torch.from_numpy(columns.gene_index)
        of_genes = loaded.network.embedder.gene_vectors(rows).float().cpu().numpy()
    n_columns, dims = len(columns.names), of_genes.shape[1]
    vectors = np.full((n_columns, dims), np.nan, dtype=np.float32)
    vectors[columns.selected] = of_genes[columns.gene_of]
    logger.info("%d of %d genes are in %s", len(columns.selected), n_columns, loaded.name)

    record = build_record(
        "gene_embeddings",
        model=loaded,
        parameters=parameters,
        slots_read=np.array(columns.slots_read, dtype=object),
        genes=columns.summary(),
        seconds=time.perf_counter() - start,
    )
    result = copy_in_memory(adata) if copy else adata
    write_slots(result, {("varm", key_added): vectors}, record, key_added)
    return result if copy else None
