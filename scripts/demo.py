"""The main job on real cells: counts in; embedding, neighbours, UMAP and clusters out.

    ./dev demo

Embeds the PBMCs that scanpy ships (700 cells × 765 genes of 10x 68k PBMC, labelled by bulk
profiles), beside PCA of the same cells, and draws both. No network, no other file.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import scanpy as sc
from anndata import AnnData
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import cellplm_tl as cp

RESOLUTION = 1.0  # of Leiden, for both embeddings
LABELS = "bulk_labels"


def main() -> None:
    """Embed, cluster, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    cp.settings.verbosity = 0
    pbmc = sc.datasets.pbmc68k_reduced()

    print("The X of this data set is scaled, and no counts can be had from it:")
    try:
        cp.tl.embed(pbmc)
    except cp.CellPLMError as error:
        print(f"  {type(error).__name__}: {error}\n")

    adata = pbmc.raw.to_adata()  # log-normalised, as the error says
    start = time.perf_counter()
    cp.tl.embed(adata)
    seconds = time.perf_counter() - start
    record = adata.uns["cellplm"]["X_cellplm"]
    print(f"cp.tl.embed(adata): {adata.n_obs} cells × {adata.n_vars} genes in {seconds:.1f} s")
    print(f"  model {record['model']['name']}, {record['genes']['n_used']} genes matched")
    print(f"  input: {record['input']}")
    print(f"  known to the model: {record['known']:.1%} of the scaled expression\n")

    pca(adata, pbmc)
    print(f"Leiden at resolution {RESOLUTION} against obs['{LABELS}']:")
    for key in ("X_pca", "X_cellplm"):
        ari, nmi, n_clusters = cluster(adata, key)
        print(f"  {key:10} ARI {ari:.3f}  NMI {nmi:.3f}  ({n_clusters} clusters)")
    draw(adata, out / "umap.png")
    adata.write_h5ad(out / "pbmc.h5ad")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of the process, libraries included: {peak:.0f} MB")
    print(f"picture: {out / 'umap.png'}\ndata: {out / 'pbmc.h5ad'}")
    print("slots: obsm['X_cellplm'], obs['cellplm_known'], uns['cellplm']['X_cellplm']")


def pca(adata: AnnData, scaled: AnnData) -> None:
    """Write scanpy's PCA of the scaled values of the same cells and genes."""
    sc.pp.pca(scaled, n_comps=50, random_state=0)
    adata.obsm["X_pca"] = scaled.obsm["X_pca"]


def cluster(adata: AnnData, key: str) -> tuple[float, float, int]:
    """Neighbours, UMAP and Leiden of an embedding; ARI, NMI and number of clusters."""
    sc.pp.neighbors(adata, use_rep=key, n_neighbors=15, key_added=key)
    sc.tl.umap(adata, neighbors_key=key, random_state=0)
    adata.obsm[f"{key}_umap"] = adata.obsm["X_umap"]
    sc.tl.leiden(
        adata,
        resolution=RESOLUTION,
        neighbors_key=key,
        key_added=f"leiden_{key}",
        flavor="igraph",
        n_iterations=2,
        directed=False,
    )
    clusters, labels = adata.obs[f"leiden_{key}"], adata.obs[LABELS]
    ari = adjusted_rand_score(labels, clusters)
    nmi = normalized_mutual_info_score(labels, clusters)
    return ari, nmi, clusters.nunique()


def draw(adata: AnnData, path: Path) -> None:
    """Draw labels and clusters on the UMAP of both embeddings."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for row, key, name in zip(
        axes, ("X_pca", "X_cellplm"), ("PCA", "cp.tl.embed, zero-shot"), strict=True
    ):
        for axis, color in zip(row, (LABELS, f"leiden_{key}"), strict=True):
            sc.pl.embedding(
                adata,
                basis=f"{key}_umap",
                color=color,
                ax=axis,
                show=False,
                frameon=False,
                title=f"{name}: {'labels' if color == LABELS else 'Leiden clusters'}",
            )
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
