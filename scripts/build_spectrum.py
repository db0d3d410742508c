"""Build the spectrum of the pretraining pool: what a linear model of all its sets knows.

    python scripts/build_spectrum.py --pool ../shared/data/pretrain --out build/spectrum

The pool is a folder of h5ad files with raw human counts in ``X``. Axes: ``cells`` (of one set),
``genes`` (of the union, "measured" where a set has a column for it), ``factors`` (300).

1. *Names.* Every column is resolved to an Ensembl gene id (`cellplm_tl._genes`; a column of ids in
   ``var`` goes before ``var_names``); columns of one gene are summed, those without one dropped.
2. *Lognorm.* ``y = log1p(counts / library_size * 10,000)``, natural logarithm; the library size is
   the sum over all resolved genes of the set.
3. *Genes.* Coding, lncRNA and immune-receptor genes that at least 4 sets measure and that are seen
   in at least 1 % of the cells of one set.
4. *Scale.* ``s²``: the mean, over the sets that measure a gene, of its variance within the set,
   plus 0.001. The divisor is the *root* of the standard deviation, ``√s``: dividing by ``s`` would
   give housekeeping and hardly expressed genes one weight.
5. *Rows.* ``x = clip((y − mean of the set) / √s, −5, 10)``, 0 for a gene that the set does not
   measure; every set weighs 1, whatever its number of cells (rows × cells of the set ^ −½).
6. *Spectrum.* The first right singular vectors ``V (genes, factors)`` of all rows and
   ``Λ = (singular value)² / sets``, the variance along each.

The randomised decomposition (Halko, Martinsson & Tropp, SIAM Rev. 2011) multiplies a random block
of 330 directions by the genes × genes covariance again and again, orthonormalising in between.
A pass goes through the pool in blocks of cells, of which one is dense at a time, over the genes of
its set: the matrix of all cells × all genes never exists. For the pool of 44,034 cells that is
a minute and a half and 3 GB on two cores.

Written to ``--out``: ``spectrum.npz`` (arrays below) and ``spectrum.json`` (what went in).

==================  =====================  =========================================================
``genes``           (genes,) str           Ensembl ids, sorted
``locus_group``     (genes,) str           of the gene table
``V``               (genes, factors) f4    orthonormal columns, their largest entries positive
``eigenvalues``     (factors,) f8          Λ, descending
``scale``           (genes,) f4            √s, the divisor
``mean``            (genes,) f4            mean lognorm: over the cells of a set, then over its sets
``n_sets``          (genes,) i8            sets that measure the gene
``set_names``       (sets,) str            file names without ending
==================  =====================  =========================================================
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellplm_tl import _genes

TARGET_SUM = 1e4  # counts per cell after normalising
LOCUS_GROUPS = ("protein_coding", "lncRNA", "IG_TR")
MIN_SETS = 4  # a gene of fewer sets says more about annotation releases than about cells
MIN_SHARE = 0.01  # of the cells of one set
MIN_VARIANCE = 1e-3  # keeps the scale of nearly silent genes finite
CLIP = (-5.0, 10.0)  # in units of the scale
N_FACTORS = 300
N_DIRECTIONS = 330  # random directions; the surplus sharpens the last factors
N_PASSES = 7  # through the pool; more move the last eigenvalues by less than a tenth
BLOCK_ENTRIES = 40_000_000  # of a dense block of cells (float32: 160 MB)


@dataclass(frozen=True)
class PoolSet:
    """One data set of the pool: lognorm values of the genes that it measures."""

    name: str
    lognorm: sp.csr_matrix  # (cells, measured genes) float32
    gene_ids: np.ndarray  # (measured genes,) str, unique
    report: dict  # how its columns were resolved

    @property
    def n_cells(self) -> int:
        return self.lognorm.shape[0]


def read_set(path: Path) -> PoolSet:
    """Read a file, resolve its columns, sum those of one gene, normalise."""
    adata = ad.read_h5ad(path)
    names, read_from = _genes.choose_gene_names(adata.var)
    resolution = _genes.resolve(names)
    ids = resolution.gene_ids.astype(str)
    found = np.flatnonzero(ids != "")
    gene_ids, position = np.unique(ids[found], return_inverse=True)

    to_genes = sp.csr_matrix(
        (np.ones(found.size, np.float32), (found, position)), shape=(ids.size, gene_ids.size)
    )
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    total = counts.sum(dtype=np.float64)
    counts = counts @ to_genes  # (cells, measured genes)
    library_size = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()  # (cells,)
    lognorm = counts
    lognorm.data *= np.repeat(TARGET_SUM / library_size, np.diff(counts.indptr)).astype(np.float32)
    np.log1p(lognorm.data, out=lognorm.data)

    report = {
        "names": read_from,
        "n_cells": int(adata.n_obs),
        "n_columns": int(adata.n_vars),
        "n_genes_resolved": int(gene_ids.size),
        "coverage": float(library_size.sum() / total),  # share of the counts that has a gene
        "statuses": resolution.counts(),
    }
    return PoolSet(path.stem, lognorm, gene_ids, report)


def choose_genes(sets: list[PoolSet]) -> np.ndarray:
    """Return the sorted ids of the genes that the spectrum speaks about."""
    all_ids = np.unique(np.concatenate([s.gene_ids for s in sets]))
    n_sets = np.zeros(all_ids.size, dtype=int)
    largest_share = np.zeros(all_ids.size)
    for s in sets:
        at = np.searchsorted(all_ids, s.gene_ids)
        n_sets[at] += 1
        share = s.lognorm.getnnz(axis=0) / s.n_cells
        largest_share[at] = np.maximum(largest_share[at], share)
    kind = np.isin(_genes.biotype(all_ids).astype(str), LOCUS_GROUPS)
    return all_ids[kind & (n_sets >= MIN_SETS) & (largest_share >= MIN_SHARE)]


def restrict(s: PoolSet, genes: np.ndarray) -> tuple[PoolSet, np.ndarray]:
    """Return the set on the chosen genes, and their positions among these."""
    kept = np.isin(s.gene_ids, genes)
    ids = s.gene_ids[kept]
    lognorm = s.lognorm[:, np.flatnonzero(kept)]
    lognorm.sort_indices()
    return PoolSet(s.name, lognorm, ids, s.report), np.searchsorted(genes, ids)


def moments(s: PoolSet) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of every measured gene within the set, (measured genes,) float64."""
    mean = np.asarray(s.lognorm.mean(axis=0, dtype=np.float64)).ravel()
    squared = s.lognorm.copy()
    squared.data **= 2
    return mean, np.asarray(squared.mean(axis=0, dtype=np.float64)).ravel() - mean**2


def dense_blocks(s: PoolSet, mean: np.ndarray, scale: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of a set, centred, scaled and clipped: (cells of a block, measured genes)."""
    block_size = max(1, BLOCK_ENTRIES // s.lognorm.shape[1])
    shift = (mean / scale).astype(np.float32)
    factor = (1.0 / scale).astype(np.float32)
    for start in range(0, s.n_cells, block_size):
        rows = s.lognorm[start : start + block_size].toarray()
        rows *= factor
        rows -= shift
        yield np.clip(rows, *CLIP, out=rows)


def build(paths: list[Path], seed: int) -> tuple[dict, dict]:
    """Return the arrays and the report of the spectrum of these files."""
    sets = [read_set(path) for path in tqdm(paths, desc="reading")]
    genes = choose_genes(sets)
    restricted = [restrict(s, genes) for s in sets]
    sets = [s for s, _ in restricted]
    columns = [positions for _, positions in restricted]

    # Scale and mean profile: over sets, so that a large set does not speak for all.
    within = [moments(s) for s in sets]
    n_sets, variance, profile = np.zeros((3, genes.size))
    for at, (mean, var) in zip(columns, within, strict=True):
        n_sets[at] += 1
        variance[at] += var
        profile[at] += mean
    scale = (variance / n_sets + MIN_VARIANCE) ** 0.25  # √s: the fourth root of the variance

    def visit(visitor, description: str) -> None:
        """Call ``visitor(rows, positions of their genes, weight)`` for every block of the pool."""
        bar = tqdm(total=sum(s.n_cells for s in sets), desc=description, unit="cell")
        for s, at, (mean, _) in zip(sets, columns, within, strict=True):
            for rows in dense_blocks(s, mean, scale[at]):
                visitor(rows, at, np.float32(1.0 / (s.n_cells * len(sets))))
                bar.update(rows.shape[0])
        bar.close()

    # Range of the covariance (genes × genes) by repeated products with a random block.
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((genes.size, N_DIRECTIONS)).astype(np.float32)
    for i in range(N_PASSES):
        product = np.zeros_like(basis)  # (genes, directions)

        def add_product(rows, at, weight, basis=basis, product=product):
            product[at] += rows.T @ (rows @ basis[at] * weight)

        visit(add_product, f"pass {i + 1} of {N_PASSES}")
        basis = np.linalg.qr(product)[0]

    # The covariance within that range, and its eigenvectors.
    inner = np.zeros((N_DIRECTIONS, N_DIRECTIONS))

    def add_inner(rows, at, weight):
        projected = rows @ basis[at]
        inner[...] += (projected.T @ projected).astype(np.float64) * weight

    visit(add_inner, "eigenvalues")
    eigenvalues, rotation = np.linalg.eigh(inner)
    first = np.argsort(eigenvalues)[::-1][:N_FACTORS]
    factors = basis.astype(np.float64) @ rotation[:, first]  # (genes, factors)
    factors *= np.sign(factors[np.abs(factors).argmax(axis=0), np.arange(N_FACTORS)])

    arrays = {
        "genes": genes.astype(str),
        "locus_group": _genes.biotype(genes).astype(str),
        "V": factors.astype(np.float32),
        "eigenvalues": eigenvalues[first],
        "scale": scale.astype(np.float32),
        "mean": (profile / n_sets).astype(np.float32),
        "n_sets": n_sets.astype(np.int64),
        "set_names": np.array([s.name for s in sets]),
    }
    report = {
        "seed": seed,
        "n_sets": len(sets),
        "n_cells": sum(s.n_cells for s in sets),
        "n_genes": int(genes.size),
        "n_factors": N_FACTORS,
        "target_sum": TARGET_SUM,
        "clip": list(CLIP),
        "sets": {
            s.name: s.report | {"n_genes_used": int(at.size)}
            for s, at in zip(sets, columns, strict=True)
        },
    }
    return arrays, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, default=Path("../shared/data/pretrain"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--exclude", nargs="*", default=[], help="names of sets to leave out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    paths = sorted(p for p in options.pool.glob("*.h5ad") if p.stem not in options.exclude)
    if not paths:
        parser.error(f"no h5ad file in {options.pool}")
    arrays, report = build(paths, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez(options.out / "spectrum.npz", **arrays)
    (options.out / "spectrum.json").write_text(json.dumps(report, indent=1) + "\n")
    values = arrays["eigenvalues"]
    print(
        f"{report['n_sets']} sets, {report['n_cells']:,} cells, {report['n_genes']:,} genes; "
        f"eigenvalues {values[0]:.2f} … {values[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
