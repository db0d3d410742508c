"""Gene embeddings of `mini`: do genes of one kind lie together, as HLA genes do in the paper?

    ./dev bench gene_embeddings

Appendix H.2 of the paper shows the HLA genes of class I and of class II as two clusters. Here:
cosines within and between sets of genes that were named beforehand, beside correlations of
expression in the pretraining pool. Reads the pool of ../shared; writes gene_embeddings.png and
gene_embeddings.md beside this file.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.axes import Axes
from scipy import sparse

import cellplm_tl as cp
from cellplm_tl._anndata import read_file
from cellplm_tl._genes import symbols
from cellplm_tl.models.embedder import CLIP_HIGH, CLIP_LOW, TARGET_SUM

HERE = Path(__file__).parent
SETS = {  # patterns of gene names
    "HLA class I": r"HLA-[A-G]",
    "HLA class II": r"HLA-D([PQR][AB]\d|[MO][AB]|RA)",
    "ribosomal": r"RP[LS]\d+[AX]?|RPLP[0-2]|RPSA",
    "mitochondrial": r"MT-(ND\dL?|CO\d|CYB|ATP\d)",
    "T cell": r"CD3[DEG]|TRAC",
    "B cell": r"CD79[AB]|MS4A1",
    "haemoglobin": r"HB[ABDG][12]?",
}
CLASSES = tuple(SETS)[:2]
COLORS = dict(zip(SETS, ("C3", "C0", "C8", "C5", "C2", "C4", "C1"), strict=True))
N_EXPRESSED = 5000  # genes with the largest share of the pool's counts
N_RANDOM = 1000  # of these, to compare with
N_DRAWS = 1000  # sets of a set's size, of the random genes
NEAREST_OF = ("HLA-A", "HLA-DRA", "HLA-DOB", "CD3E", "MS4A1", "GAPDH")
N_NEAREST = 6

PAGE = """# Gene embeddings

`./dev bench gene_embeddings` wrote this page and its picture. What the vectors are stands in
[the method](../methods/gene_embeddings.md).

![cosines of HLA genes, and a map of genes](gene_embeddings.png)

Left: cosines of the vectors of HLA genes in `mini`. Right: UMAP, by cosine, of the
{n_expressed:,} genes with most counts in the pool and the sets below.

## Sets of genes

Mean cosine of the pairs of genes. Random genes: {n_random:,} of the {n_expressed:,}. Random sets:
the mean that {n_draws:,} sets of as many random genes stay below, but for 1 %. The last two
columns: the plain correlation of the same expression in the pool, noise included.

{sets}

Between the two classes of HLA: cosine {between:.2f}, correlation {plain_between:.2f}.

## HLA genes one by one

Mean cosine with the other genes of each class; squared length, and the share of the gene's
variance in the pool that it is. The mean is larger with the own class for {n_with_own} of the
{n_hla} genes.

{one_by_one}

## Nearest genes

Of all {n_genes:,}, by cosine.

{nearest}

## Inner products are covariances

All pairs of the {n_compared:,} genes above: inner products of the vectors against covariances of
scaled expression within the sets of the pool, computed from the counts. Correlation
{correlation:.3f}, slope {slope:.3f}. The vector of the median gene carries {explained:.2f} of its
variance; the rest is counting noise, and what {n_factors} factors leave out.
"""


def main() -> None:
    """Look the vectors up, draw, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, default=HERE / "../../../shared/data/pretrain")
    pool = parser.parse_args().pool
    cp.settings.verbosity = 0
    model = cp.models.load("mini")
    genes = ad.AnnData(var=pd.DataFrame(index=list(model.genes)))  # no cells, no counts
    cp.tl.gene_embeddings(genes, model=model)
    vectors = genes.varm["cellplm_gene"].astype(float)

    names = symbols(model.genes)
    sets = {
        kind: np.array([i for i in np.argsort(names) if re.fullmatch(pattern, names[i])])
        for kind, pattern in SETS.items()
    }
    named = np.concatenate(list(sets.values()))
    expressed = np.argsort(-model.network.embedder.pool_profile.numpy())[:N_EXPRESSED]
    others = np.setdiff1d(expressed, named)
    drawn = np.random.default_rng(0).choice(others, N_RANDOM, replace=False)

    draw(vectors, names, sets, np.union1d(expressed, named))
    covariance = pool_covariance(pool, model, np.concatenate([named, drawn]))
    (HERE / "gene_embeddings.md").write_text(report(vectors, names, sets, drawn, covariance))


def pool_covariance(pool: Path, model: cp.models.Model, genes: np.ndarray) -> np.ndarray:
    """Return the covariance of scaled expression within the sets of the pool, (genes, genes).

    With the weights of the spectrum: each set counts once, and a gene that it does not measure is
    at its mean.
    """
    paths = sorted(pool.glob("*.h5ad"))
    scale = model.network.embedder.scale.numpy()
    covariance = np.zeros((len(genes), len(genes)))
    for path in paths:
        cells = read_file(path, model.genes)
        values, columns, offsets, library_size = cells.counts(slice(None))
        counts = sparse.csr_matrix((values, columns, offsets), (cells.n_cells, len(cells.genes)))
        found = pd.Index(cells.gene_index).get_indexer(genes)  # -1: not measured
        here = np.flatnonzero(found >= 0)
        fractions = counts[:, found[here]].toarray() / library_size[:, None].clip(min=1)
        y = np.log1p(TARGET_SUM * fractions)
        x = np.clip((y - y.mean(0)) / scale[genes[here]], CLIP_LOW, CLIP_HIGH)
        covariance[np.ix_(here, here)] += x.T @ x / len(x) / len(paths)
    return covariance


# -------------------------------------------------------------------------------------- the figures


def report(
    vectors: np.ndarray,
    names: np.ndarray,
    sets: dict[str, np.ndarray],
    drawn: np.ndarray,
    covariance: np.ndarray,
) -> str:
    """Write the page; `covariance` is that of the sets' genes and those drawn, in this order."""
    genes = np.concatenate([*sets.values(), drawn])
    inner = vectors[genes] @ vectors[genes].T
    cosine, correlation = unit_diagonal(inner), unit_diagonal(covariance)
    at = np.split(np.arange(len(genes)), np.cumsum([len(rows) for rows in sets.values()]))
    random, of = at[-1], dict(zip(sets, at, strict=False))  # positions in `genes`
    rows = [
        {
            "set": kind,
            "genes": len(here),
            "cosine within": within(cosine, here),
            "random sets": random_within(cosine, random, len(here)),
            **{f"to {c}": "" if c == kind else between(cosine, here, of[c]) for c in CLASSES},
            "to random": between(cosine, here, random),
            "correlation within": within(correlation, here),
            "correlation to random": between(correlation, here, random),
        }
        for kind, here in of.items()
    ]
    share = inner.diagonal() / covariance.diagonal()
    one_by_one = [
        {
            "gene": names[genes[i]],
            "class": kind,
            **{c: cosine[i, np.setdiff1d(of[c], i)].mean() for c in CLASSES},
            "squared length": inner[i, i],
            "share of variance": share[i],
        }
        for kind in CLASSES
        for i in of[kind]
    ]
    pairs = np.triu_indices(len(genes), 1)
    return PAGE.format(
        n_expressed=N_EXPRESSED,
        n_random=len(drawn),
        n_draws=N_DRAWS,
        sets=table(rows),
        between=between(cosine, *(of[c] for c in CLASSES)),
        plain_between=between(correlation, *(of[c] for c in CLASSES)),
        n_with_own=sum(max(CLASSES, key=row.__getitem__) == row["class"] for row in one_by_one),
        n_hla=len(one_by_one),
        one_by_one=table(one_by_one),
        n_genes=len(vectors),
        nearest=table([{"gene": g, "nearest": nearest(vectors, names, g)} for g in NEAREST_OF]),
        n_compared=len(genes),
        correlation=np.corrcoef(inner[pairs], covariance[pairs])[0, 1],
        slope=np.polyfit(covariance[pairs], inner[pairs], 1)[0],
        explained=np.median(share),
        n_factors=vectors.shape[1],
    )


def unit_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Return cosines of inner products, correlations of covariances."""
    length = np.sqrt(matrix.diagonal())
    return matrix / np.outer(length, length)


def within(matrix: np.ndarray, genes: np.ndarray) -> float:
    """Return the mean over the pairs of a set."""
    return matrix[np.ix_(genes, genes)][np.triu_indices(len(genes), 1)].mean()


def between(matrix: np.ndarray, genes: np.ndarray, others: np.ndarray) -> float:
    """Return the mean over the pairs of two sets."""
    return matrix[np.ix_(genes, others)].mean()


def random_within(matrix: np.ndarray, genes: np.ndarray, size: int) -> float:
    """Return what the mean within a set stays below for 99 % of random sets."""
    rng = np.random.default_rng(0)
    draws = (rng.choice(genes, size, replace=False) for _ in range(N_DRAWS))
    return np.quantile([within(matrix, draw) for draw in draws], 0.99)


def nearest(vectors: np.ndarray, names: np.ndarray, gene: str) -> str:
    """Name the genes of largest cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[names == gene][0]
    return ", ".join(f"{names[i]} {cosine[i]:.2f}" for i in np.argsort(-cosine)[1 : N_NEAREST + 1])


def table(rows: list[dict[str, Any]]) -> str:
    """Write a table with two decimals."""
    texts = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    return pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True)


# -------------------------------------------------------------------------------------- the picture


def draw(
    vectors: np.ndarray, names: np.ndarray, sets: dict[str, np.ndarray], shown: np.ndarray
) -> None:
    """Draw cosines of the HLA genes, and a map of the genes shown."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.4), layout="constrained", width_ratios=(1, 1.1)
    )
    draw_cosines(left, vectors, names, [sets[kind] for kind in CLASSES])
    draw_map(right, vectors[shown], {k: np.searchsorted(shown, s) for k, s in sets.items()})
    figure.savefig(HERE / "gene_embeddings.png", dpi=110)
    plt.close(figure)


def draw_cosines(
    axis: Axes, vectors: np.ndarray, names: np.ndarray, classes: list[np.ndarray]
) -> None:
    """Draw a heat map, class after class."""
    genes = np.concatenate(classes)
    cosine = unit_diagonal(vectors[genes] @ vectors[genes].T)
    image = axis.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(genes)), names[genes], rotation=90, fontsize=7)
    axis.set_yticks(range(len(genes)), names[genes], fontsize=7)
    for line in (axis.axhline, axis.axvline):
        line(len(classes[0]) - 0.5, color="black", linewidth=1)
    axis.set_title("HLA class I (above) and class II", fontsize=10)
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.7, ticks=(-1, 0, 1))
    bar.set_label("cosine", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def draw_map(axis: Axes, vectors: np.ndarray, sets: dict[str, np.ndarray]) -> None:
    """Draw a UMAP of genes by cosine, with the sets in colour."""
    genes = ad.AnnData(vectors.astype(np.float32))
    sc.pp.neighbors(genes, use_rep="X", metric="cosine", transformer="sklearn")
    sc.tl.umap(genes, random_state=0)
    x, y = genes.obsm["X_umap"].T
    axis.scatter(x, y, s=2, color="0.8", linewidths=0)
    for kind, rows in sets.items():
        axis.scatter(x[rows], y[rows], s=16, color=COLORS[kind], label=kind, linewidths=0)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel("UMAP 1", fontsize=9)
    axis.set_ylabel("UMAP 2", fontsize=9)
    axis.set_title(f"{len(x):,} genes", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    main()
