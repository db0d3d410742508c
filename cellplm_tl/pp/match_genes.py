"""Match the genes of an AnnData to Ensembl ids."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from anndata import AnnData

from cellplm_tl._anndata import check_slots, read_gene_counts, read_gene_names, write_slots
from cellplm_tl._genes import Resolution, check_coverage, check_names, resolve, unmatched
from cellplm_tl._settings import logger

KEYS = ("cellplm_gene_id", "cellplm_gene_status")
# So many names without a gene go into the record.
N_UNMATCHED_KEPT = 100


def match_genes(
    adata: AnnData, *, gene_key: str | None = None, copy: bool = False
) -> AnnData | None:
    """Find the Ensembl id of every gene and say how it was found.

    All tools of the package do the same by themselves; call this to see what they see. Nothing is
    downloaded: the names are looked up in a table of human genes that ships with the package (HGNC
    and GENCODE, 2025).

    Parameters
    ----------
    adata : AnnData
        Cells × genes, with human gene names. Ensembl ids (any version), symbols, previous symbols
        and aliases may be mixed.
    gene_key : str, optional
        Column of ``adata.var`` that names the genes, or ``"var_names"``. By default a column of
        Ensembl ids (called ``gene_ids``, ``ensembl_id``, ``feature_id`` or alike, most of it human
        ids; its gaps are filled from ``var_names``), and if there is none, ``var_names``.
    copy : bool, default False
        Write to a copy of `adata` and return it.

    Returns
    -------
    AnnData or None
        The copy, or nothing; written are

        ``adata.var["cellplm_gene_id"]``, texts of shape ``(genes,)``
            Ensembl id without version; ``""`` where there is none. Several columns may have one
            id; tools sum them.
        ``adata.var["cellplm_gene_status"]``, texts of shape ``(genes,)``
            How the id was found: ``"ensembl"`` (an id), ``"retired"`` (an older id), ``"symbol"``,
            ``"previous"`` (a previous symbol), ``"alias"``, ``"repaired"`` (after mending case,
            prefix, suffix, punctuation or an Excel date); or why none was: ``"no_id"`` (a locus
            without an Ensembl gene), ``"ambiguous"`` (several genes), ``"unknown"``.
        ``adata.uns["cellplm"]["match_genes"]``, dict
            The record: numbers, the share of the counts that matched genes hold (`coverage`), the
            names without a gene, those with most counts first (`unmatched`, at most 100).

    Raises
    ------
    InputError
        `adata` is no AnnData.
    SlotError
        ``adata.var`` has no column `gene_key`, or it is one of those to be written.
    GenesError
        The names are spelled like mouse genes, fewer than 50 are matched, or the matched ones hold
        less than a tenth of the counts. Nothing is written then.

    Warns
    -----
    GenesWarning
        The matched genes hold less than half of the counts, or the names look like those of mouse
        genes in upper case.

    Notes
    -----
    Coverage is found on the counts of up to 512 cells, as the tools read them. If there are none
    (scaled data), each name weighs the same.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> import scanpy as sc
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> cp.pp.match_genes(adata)
    >>> adata.var.loc[["CD79A", "FYB"], ["cellplm_gene_id", "cellplm_gene_status"]]
           cellplm_gene_id cellplm_gene_status
    index
    CD79A  ENSG00000105369              symbol
    FYB    ENSG00000082074            previous
    """
    names, where = read_gene_names(adata, gene_key)
    slots_read = () if where == "var_names" else (where,)
    check_slots(adata, [("var", key) for key in KEYS], slots_read)
    found = resolve(names)
    is_matched = found.gene_ids != ""
    check_names(names, is_matched, where)
    counts = read_gene_counts(adata)
    coverage = check_coverage(names, is_matched, where, counts)

    misses = unmatched(names, is_matched, counts)
    n_matched = int(is_matched.sum())
    n_summed = n_matched - len(set(found.gene_ids[is_matched]))
    logger.info("%s", _report(found, where, misses, n_summed))
    record = {
        "tool": "match_genes",
        "package_version": version("cellplm_tl"),
        "parameters": {} if gene_key is None else {"gene_key": gene_key},
        "slots_read": np.array(slots_read, dtype=object),
        "genes": {
            "read_from": where,
            "n_vars": len(names),
            "n_matched": n_matched,
            "n_unmatched": len(names) - n_matched,
            "n_duplicated_columns": n_summed,
            "statuses": found.counts(),
            "coverage": coverage,
            "coverage_of": "names" if counts is None else "counts",
            "unmatched": np.array(misses[:N_UNMATCHED_KEPT], dtype=object),
        },
    }
    target = adata.copy() if copy else adata
    slots = {
        ("var", key): values
        for key, values in zip(KEYS, (found.gene_ids, found.status), strict=True)
    }
    write_slots(target, slots, record, "match_genes")
    return target if copy else None


def _report(found: Resolution, where: str, misses: list[str], n_summed: int) -> str:
    """Say in words what was found."""
    numbers = found.counts()
    failures = [
        f"{numbers.pop(s):,} {s}" for s in ("no_id", "ambiguous", "unknown") if s in numbers
    ]
    ways = ", ".join(f"{n:,} {status}" for status, n in numbers.items())
    text = (
        f"{sum(numbers.values()):,} of {len(found.status):,} {where} are known human genes: {ways}."
    )
    if failures:
        text += f" Without a gene: {', '.join(failures)}"
        text += f", first {', '.join(map(repr, misses[:5]))}." if misses else "."
    if n_summed:
        text += f" Columns of a gene that has another column: {n_summed:,}; tools sum them."
    return text
