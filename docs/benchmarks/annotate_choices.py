"""How `annotate` was set: on parts of references, none of them a cell of the fixed splits' queries.

    ./dev bench annotate_choices

Sorted PBMC: the reference half of the fixed split (two seeds), cut in two once more. Pancreas: one
donor of the inDrop reference tells the other's types; the whole tells those of CEL-seq cells of the
pretraining pool, which measure 219 of its genes. Reads ../shared; writes annotate_choices.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import cellplm_tl as cp
from cellplm_tl import _annotation
from cellplm_tl._inference import encode
from cellplm_tl.models.decoder import TypeHead
from cellplm_tl.train import annotation as fitting

HERE = Path(__file__).parent
KEY = "cellplm_annotation"
Pair = tuple[str, ad.AnnData, ad.AnnData]
Patch = tuple[Any, str, Any]


def whole_counts(path: Path) -> ad.AnnData:
    """Read a file, and make its counts whole."""
    adata = ad.read_h5ad(path)
    adata.X = sp.csr_matrix(adata.X).astype(np.float32)
    adata.X.data = np.rint(adata.X.data)
    return adata


def thinned(adata: ad.AnnData, seed: int) -> ad.AnnData:
    """Keep a fifth of the counts."""
    result = adata.copy()
    draws = np.random.default_rng(seed).binomial(result.X.data.astype(int), 0.2)
    result.X.data = draws.astype(np.float32)
    result.X.eliminate_zeros()
    return result


def panel(reference: ad.AnnData, query: ad.AnnData, seed: int) -> ad.AnnData:
    """Keep 300 of the genes that 1 % of the reference's cells express."""
    share = np.asarray((reference.X > 0).mean(axis=0)).ravel()
    rng = np.random.default_rng(seed)
    genes = np.sort(rng.choice(np.flatnonzero(share > 0.01), 300, replace=False))
    return query[:, genes].copy()


def pairs(shared: Path) -> Iterator[Pair]:
    """Give references and queries."""
    pbmc = whole_counts(shared / "data/dev/pbmc_sorted_zheng2017.h5ad")
    splits = json.loads((shared / "bench/splits/annotate_pbmc_sorted.json").read_text())["seeds"]
    for seed in (0, 1):
        is_query = np.zeros(pbmc.n_obs, bool)
        is_query[splits[str(seed)]["query_rows"]] = True
        half = pbmc[~is_query].copy()
        halves = train_test_split(
            np.arange(half.n_obs),
            test_size=0.5,
            stratify=half.obs["cell_type"],
            random_state=100 + seed,
        )
        reference, query = (half[np.sort(rows)].copy() for rows in halves)
        yield "sorted, full", reference, query
        yield "sorted, thin20", reference, thinned(query, 500 + seed)
        yield "sorted, panel300", reference, panel(reference, query, 700 + seed)
        one_type = query[query.obs["cell_type"] == "CD19+ B"].copy()
        yield "sorted, B cells only", reference, one_type
    pancreas = whole_counts(shared / "data/dev/pancreas_reference_baron2016.h5ad")
    for number, donor in enumerate(sorted(set(pancreas.obs["donor"]))):
        is_query = (pancreas.obs["donor"] == donor).to_numpy()
        reference, query = pancreas[~is_query].copy(), pancreas[is_query].copy()
        yield "islets, full", reference, query
        yield "islets, panel300", reference, panel(reference, query, 800 + number)
    celseq = whole_counts(shared / "data/pretrain/pancreas_celseq_grun_muraro_panc8.h5ad")
    yield "islets, CEL-seq", pancreas, celseq
    yield "islets, CEL-seq, thin20", pancreas, thinned(celseq, 5)


def own_context(network: Any, cells: Any, sums: Any, depths: Any, device: Any) -> Any:
    """Encode a query with the sums of its own cells, as `embed` does."""
    return encode(network, cells, device=device)


def flat_profiles(counts: sp.csr_matrix, codes: Any, n_types: int) -> Any:
    """Take all types for alike in their counts, so that the linear map decides alone."""
    return np.full((counts.shape[1], n_types), -np.log(counts.shape[1]))


CHOICES: dict[str, list[Patch]] = {
    "as it is": [],
    "linear map alone": [(fitting, "fit_profiles", flat_profiles)],
    "one view, nothing thinned": [(_annotation, "SHARES", (1.0,))],
    "no residual": [(_annotation, "N_RESIDUAL", 1)],
    "the query's own context": [(_annotation, "encode_against", own_context)],
}


def part_of_score(*parts: int) -> Callable[[TypeHead, Any, Any], Any]:
    """Make an unknown score of some of the three."""

    def score(head: TypeHead, features: Any, log_p: Any) -> Any:
        scores = (head.distances(features, log_p) - head.score_mean) / head.score_scale
        return scores[:, list(parts)].mean(1)

    return score


SCORES = {
    "odds": (0,),
    "Mahalanobis": (1,),
    "cosine": (2,),
    "odds + Mahalanobis": (0, 1),
    "odds + cosine": (0, 2),
    "all three": (0, 1, 2),
}


def annotated(
    reference: ad.AnnData | None, query: ad.AnnData, patches: list[Patch], **options: Any
) -> ad.AnnData:
    """Annotate a copy of a query, with other choices."""
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        result = cp.tl.annotate(query, reference, copy=True, **options)
    assert result is not None
    return result


def scores_of_choices(shared: Path) -> pd.DataFrame:
    """Score every choice on every pair."""
    rows = []
    for name, reference, query in pairs(shared):
        for choice, patches in CHOICES.items():
            result = annotated(reference, query, patches)
            proba, truth = result.obsm[f"{KEY}_proba"], result.obs["cell_type"].astype(str)
            known = truth.isin(proba.columns).to_numpy()
            guess = proba.idxmax(axis=1)[known]
            found = cp.metrics.annotation(truth[known], guess, proba[known])
            scored = "accuracy" if name.endswith("only") else "macro_f1"
            rows.append({"data": name, "choice": choice, "F1": found[scored], "ECE": found["ece"]})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["choice", "data"], sort=False).mean()
    text = table["F1"].map("{:.3f}".format) + " (" + table["ECE"].map("{:.3f}".format) + ")"
    return text.unstack("choice", sort=False)


def scores_of_unknown(shared: Path) -> pd.DataFrame:
    """Take each type out of the reference in turn; score what tells its cells from the others."""
    rows = []
    chosen = {"sorted, full", "sorted, panel300", "islets, full", "islets, CEL-seq"}
    seen: set[str] = set()
    for name, reference, query in pairs(shared):
        if name not in chosen or name in seen:
            continue
        seen.add(name)
        of_query = query.obs["cell_type"].astype(str)
        for kind in sorted(set(reference.obs["cell_type"].astype(str))):
            if (of_query == kind).sum() < 10:
                continue
            others = reference[reference.obs["cell_type"].astype(str) != kind].copy()
            row: dict[str, Any] = {"data": name}
            with tempfile.TemporaryDirectory() as folder:
                model = f"{folder}/types"
                result = annotated(others, query, [], save_model=model)
                called = (result.obs[KEY] == "Unknown").to_numpy()
                known = of_query.isin(result.obsm[f"{KEY}_proba"].columns).to_numpy()
                row["false alarms"], row["found"] = called[known].mean(), called[~known].mean()
                for what, parts in SCORES.items():
                    patch = (TypeHead, "unknown_score", part_of_score(*parts))
                    result = annotated(None, query, [patch], model=model)
                    row[what] = roc_auc_score(~known, result.obs[f"{KEY}_unknown_score"])
                patch = (_annotation, "_shift", lambda *_: 0.0)
                result = annotated(None, query, [patch], model=model)
            called = (result.obs[KEY] == "Unknown").to_numpy()
            row["false alarms, fixed threshold"] = called[known].mean()
            row["found, fixed threshold"] = called[~known].mean()
            rows.append(row)
            print(kind, row, flush=True)
    return pd.DataFrame(rows).groupby("data", sort=False).mean().round(3)


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE / "../../../shared")
    shared = parser.parse_args().shared
    cp.settings.verbosity = 0
    warnings.simplefilter("ignore")
    choices, unknown = scores_of_choices(shared), scores_of_unknown(shared)
    text = f"""# How `annotate` was set

`./dev bench annotate_choices` wrote this page. Parts of references alone; see the script.

Macro F1 (ECE); of the query of one type, accuracy.

{choices.to_markdown()}

Unknown cells, each type taken out of the reference in turn: AUROC of each score, then the share of
cells called unknown at a coverage of 0.9, among those of known types and of the one taken out.

{unknown.T.to_markdown()}
"""
    (HERE / "annotate_choices.md").write_text(text)


if __name__ == "__main__":
    main()
