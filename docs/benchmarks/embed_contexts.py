"""Two ways to embed a cell: among the cells of its file, or by itself; and a query in a reference.

    ./dev bench embed_contexts

`context="data"` compares a cell with its context and finds the principal components on the file;
`context="model"` takes both from the model. Measured for both, on the labelled development sets:

* how much the embedding of a cell changes when its file is cut down to a random tenth, to one cell
  type, or to the cell alone: correlation over the coordinates with its embedding in the whole file,
  as it stands, and after the best rotation of the subset;
* what that costs: accuracy of nearest neighbours among the cells of the subset, beside that of the
  same cells as the whole file embeds them;
* the quality of the whole file's embedding;
* labels carried over from a reference to a query by `reference=`, by both ways, beside principal
  components that were found on the reference and ones found on both together.

Reads the sets of ../shared; writes embed_contexts.md beside this file.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from scipy.linalg import orthogonal_procrustes
from sklearn.neighbors import KNeighborsClassifier

import cellplm_tl as cp
from cellplm_tl.metrics.clustering import predict_from_neighbors

HERE = Path(__file__).parent
SETS = {  # name: (files, key of labels, key of batches)
    "sorted PBMC": (("dev/pbmc_sorted_zheng2017",), "cell_type", None),
    "pancreas": (
        ("dev/pancreas_reference_baron2016", "dev/pancreas_query_segerstolpe2016"),
        "cell_type",
        "donor",
    ),
    "lung lines": (("dev/lung_cell_lines_3_tian2019",), "cell_type", "batch"),
    "breast tumour": (("spatial/breast_reference",), "cell_type", None),
}
TRANSFERS = {  # query ← reference
    "pancreas: Smart-seq2 ← inDrop": (
        "dev/pancreas_query_segerstolpe2016",
        "dev/pancreas_reference_baron2016",
    ),
    "pancreas: inDrop ← Smart-seq2": (
        "dev/pancreas_reference_baron2016",
        "dev/pancreas_query_segerstolpe2016",
    ),
    "pancreas: CEL-seq ← inDrop": (
        "pretrain/pancreas_celseq_grun_muraro_panc8",
        "dev/pancreas_reference_baron2016",
    ),
}
WAYS = ("data", "model")
SINGLE_CELLS = 25  # of each set
NEIGHBORS = 15
FEW = 20  # cells that a subset needs


def read(shared: Path, files: tuple[str, ...]) -> ad.AnnData:
    """Read files and join their columns."""
    parts = [ad.read_h5ad(shared / "data" / f"{name}.h5ad") for name in files]
    whole = ad.concat(parts, join="inner", index_unique="-") if len(parts) > 1 else parts[0]
    whole.X = sp.csr_matrix(whole.X).astype(np.float32)
    return whole


def embedded(adata: ad.AnnData, batch_key: str | None, way: str) -> np.ndarray:
    """Embed in one of the two ways."""
    adata = adata.copy()
    cp.tl.embed(adata, batch_key=batch_key if way == "data" else None, context=way)
    return adata.obsm["X_cellplm"]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over cells of the correlation over coordinates; 0 where one is constant."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.where(lengths > 0, lengths, np.inf)).mean())


def rotated(a: np.ndarray, b: np.ndarray) -> float:
    """Return the same after `a` was centred and rotated to fit `b` best."""
    a, b = a - a.mean(0), b - b.mean(0)
    return correlation(a @ orthogonal_procrustes(a, b)[0], b)


def accuracy(x: np.ndarray, labels: np.ndarray) -> float:
    """Return the 5-fold accuracy of 15 nearest neighbours."""
    predicted, is_scored = predict_from_neighbors(x, labels)
    return float((predicted == labels)[is_scored].mean())


def subsets(labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Give the rows of each subset, by kind."""
    rng = np.random.default_rng(0)
    n_cells = len(labels)
    tenths = [np.sort(rng.choice(n_cells, n_cells // 10, replace=False)) for _ in range(3)]
    types = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    singles = rng.choice(n_cells, SINGLE_CELLS, replace=False)
    return {
        "a tenth": tenths,
        "one cell type": [rows for rows in types if len(rows) >= FEW],
        "one cell": [np.array([row]) for row in singles],
    }


def stability(name: str, shared: Path) -> list[dict]:
    """Compare subsets with the whole file."""
    files, labels_key, batch_key = SETS[name]
    adata = read(shared, files)
    labels = adata.obs[labels_key].astype(str).to_numpy(dtype=str)
    batches = None if batch_key is None else adata.obs[batch_key].to_numpy(dtype=str)
    rows = []
    for way in WAYS:
        whole = embedded(adata, batch_key, way)
        scores = cp.metrics.clustering(whole, labels, batches, leiden_seeds=range(3))
        about = {"data": name, "context": way}
        rows.append(
            about
            | {"cells": "whole file", "kNN": scores["knn_accuracy"], "ARI": scores["ari"]}
            | {"mixing": scores.get("batch_mixing", np.nan)}
        )
        for kind, parts in subsets(labels).items():
            found = []
            for part in parts:
                x = embedded(adata[part], batch_key, way)
                result = {"correlation": correlation(x, whole[part])}
                if len(part) > 1:
                    result["rotated"] = rotated(x, whole[part])
                if kind == "a tenth":
                    result["kNN"] = accuracy(x, labels[part])
                    result["kNN lost"] = accuracy(whole[part], labels[part]) - result["kNN"]
                found.append(result)
            rows.append(about | {"cells": kind} | pd.DataFrame(found).mean().to_dict())
        print(pd.DataFrame(rows[-4:]).round(3).to_string(), flush=True)
    return rows


def transfer(name: str, shared: Path) -> list[dict]:
    """Predict the query's labels from the reference's nearest cells."""
    query, reference = (read(shared, (file,)) for file in TRANSFERS[name])
    known = reference.obs["cell_type"].astype(str).to_numpy(dtype=str)
    truth = query.obs["cell_type"].astype(str).to_numpy(dtype=str)
    asked = np.isin(truth, known)
    spaces = {}
    for way in WAYS:
        r, q = reference.copy(), query.copy()
        cp.tl.embed(r, context=way)
        cp.tl.embed(q, reference=r, context=way)
        spaces[f"embed, context={way!r}"] = r.obsm["X_cellplm"], q.obsm["X_cellplm"]
    spaces["PCA of the reference"], spaces["PCA of both"] = principal_components(reference, query)
    rows = []
    for method, (x, y) in spaces.items():
        predicted = KNeighborsClassifier(NEIGHBORS).fit(x, known).predict(y)
        right = (predicted == truth)[asked]
        spread = 1.96 * right.std() / len(right) ** 0.5
        rows.append({"query ← reference": name, "space": method, "accuracy": right.mean()})
        rows[-1]["±"] = spread
        print(rows[-1], flush=True)
    return rows


def principal_components(
    reference: ad.AnnData, query: ad.AnnData
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """50 components of standardised lognorm values of the shared genes: of one set, of both."""
    both = ad.concat([reference, query], join="inner", index_unique="-")
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    x = both.X.toarray()
    n = reference.n_obs
    result = []
    for fitted in (slice(0, n), slice(None)):
        mean, std = x[fitted].mean(0), x[fitted].std(0)
        scaled = np.clip((x - mean) / np.where(std > 0, std, 1), -10, 10)
        _, _, directions = np.linalg.svd(scaled[fitted], full_matrices=False)
        scores = scaled @ directions[:50].T
        result.append((scores[:n], scores[n:]))
    return result[0], result[1]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    cp.settings.verbosity = 0
    changes = pd.DataFrame([row for name in SETS for row in stability(name, options.shared)])
    carried = pd.DataFrame([row for name in TRANSFERS for row in transfer(name, options.shared)])
    text = f"""# One cell, one embedding

`./dev bench embed_contexts` wrote this page. `context="data"`: the cells of the file are the
context, and the principal components are theirs. `context="model"`: both are the model's. The sets
are no part of the pool, but for the CEL-seq pancreas.

## The same cells in a smaller file

Correlation over the coordinates of a cell's embedding with that in the whole file: as it stands,
and after the best rotation. kNN lost: accuracy of nearest neighbours within the subset, against the
same cells as the whole file embeds them.

{changes.round(3).fillna("").to_markdown(index=False)}

## A query in the space of a reference

Labels of the 15 nearest cells of the reference, with half the width of a 95 % interval.

{carried.round(3).to_markdown(index=False)}
"""
    (HERE / "embed_contexts.md").write_text(text)


if __name__ == "__main__":
    main()
