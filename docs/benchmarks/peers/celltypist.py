"""CellTypist (Domínguez Conde et al., Science 2022), trained on the reference."""

import celltypist
import numpy as np
import scanpy as sc

MANY_GENES = 3_000  # above, it chooses the genes first, as its tutorials do; a random choice


def annotate(method, reference, query, seed):
    for cells in (reference, query):
        cells.X = cells.X.astype(np.float32)
        sc.pp.normalize_total(cells, target_sum=1e4)  # it refuses anything else
        sc.pp.log1p(cells)
    np.random.seed(seed)  # noqa: NPY002  (it draws from the global generator)
    many = reference.n_vars > MANY_GENES
    model = celltypist.train(reference, labels="label", n_jobs=1, feature_selection=many)
    found = celltypist.annotate(query, model=model)
    each = found.probability_matrix  # of one label against the rest: they do not sum to one
    proba = each.to_numpy() / each.to_numpy().sum(axis=1, keepdims=True)
    return {
        "predicted": found.predicted_labels["predicted_labels"].to_numpy(dtype=str),
        "proba": proba,
        "labels": each.columns.to_numpy(dtype=str),
    }
