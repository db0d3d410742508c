"""Files of cells, for training: no AnnData leaves this floor."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import anndata as ad

from cellplm_tl._anndata.read import Cells, read_cells
from cellplm_tl._genes import choose_gene_names, resolve


def read_file(
    path: str | PathLike[str],
    genes: Sequence[str],
    *,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
) -> Cells:
    """Read the cells of an h5ad file into memory.

    Parameters
    ----------
    path
        The file.
    genes
        Ensembl ids that the model knows.
    batch_key
        Column of ``obs`` that names the contexts; a file without it is one context.
    spatial_key
        Where coordinates are, if anywhere.
    """
    adata = ad.read_h5ad(path)
    if batch_key not in adata.obs:
        batch_key = None
    return read_cells(adata, genes, batch_key=batch_key, spatial_key=spatial_key)


def read_gene_ids(path: str | PathLike[str]) -> set[str]:
    """Return the Ensembl ids of the genes that an h5ad file measures."""
    adata = ad.read_h5ad(path, backed="r")
    try:
        names, _ = choose_gene_names(adata.var, None)
        return set(resolve(names).gene_ids) - {""}
    finally:
        adata.file.close()
