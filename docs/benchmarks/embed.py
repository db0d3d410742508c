"""Zero-shot embedding on fixed splits, beside PCA on the same cells and stored figures of peers.

    ./dev bench embed
    ./dev bench embed --models mini linear_transfer path/to/model --out build/bench

Three development sets (sorted PBMC, pancreas of five donors by two technologies, three lung cancer
lines by two technologies), each at full depth, with counts thinned to 20 %, and on 300 genes. The
splits, and the stored figures (scVI trained on the very set, Harmony, PCA, and the floor
`linear_transfer`, a linear model of the pretraining pool), are those of the shared folder's
``bench``; the sets are in its ``data/dev``.

Every model embeds twice where a set has batches: with them as contexts, and as ``… (one context)``;
there Harmony is run on PCA and on the first model, too.
Scores are those of `cellplm_tl.metrics.clustering`; ARI and NMI at Leiden seed 0, as the stored
figures, and as means over several seeds. Written: ``embed.csv`` (every score) and ``embed.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import harmonypy
import numpy as np
import pandas as pd
import psutil
import scanpy as sc
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

import cellplm_tl as cp
from cellplm_tl.metrics.clustering import predict_from_neighbors

SPLITS = ("full", "thin20", "panel300")
THINNED_TO = 0.2
SCORES = ("ari", "nmi", "knn_accuracy", "knn_macro_f1", "silhouette_label", "batch_mixing")
MIXING_NEIGHBORS = 30
BOOTSTRAP_DRAWS = 10_000
ONE_CONTEXT = " (one context)"

Method = Callable[[ad.AnnData], np.ndarray]  # cells with counts → (cells, dimensions)


@dataclass(frozen=True)
class Case:
    """One data set in one split."""

    dataset: str
    split: str
    adata: ad.AnnData  # counts in X
    labels: np.ndarray  # (cells,)
    batches: np.ndarray | None  # (cells,)
    batch_key: str | None


# ------------------------------------------------------------------------------------------ cases


def cases(shared: Path, datasets: list[str] | None) -> Iterator[Case]:
    """Yield the sets and splits that ``embed.json`` names, in its order."""
    recipes = json.loads((shared / "bench/splits/embed.json").read_text())
    for dataset, recipe in recipes.items():
        if datasets and dataset not in datasets:
            continue
        files = [ad.read_h5ad(shared / "data/dev" / name) for name in recipe["files"]]
        whole = ad.concat(files, join=recipe["join"], index_unique="-")
        whole.X = sp.csr_matrix(whole.X)
        for split in SPLITS:
            adata = whole.copy()
            if split == "thin20":
                adata.X.data = np.random.default_rng(0).binomial(adata.X.data, THINNED_TO)
                adata.X.eliminate_zeros()
            elif split == "panel300":
                adata = adata[:, recipe["panel300"]].copy()
            adata.X = adata.X.astype(np.float32)
            adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
            batch_key = recipe["batch_key"]
            yield Case(
                dataset,
                split,
                adata,
                adata.obs[recipe["labels_key"]].astype(str).to_numpy(dtype=str),
                None if batch_key is None else adata.obs[batch_key].to_numpy(dtype=str),
                batch_key,
            )


# ---------------------------------------------------------------------------------------- methods


def pca(adata: ad.AnnData) -> np.ndarray:
    """50 components of 2,000 highly variable genes, standardised, clipped at 10."""
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > 2_000:
        sc.pp.highly_variable_genes(adata, n_top_genes=2_000, subset=True)
    adata.X = adata.X.toarray()
    sc.pp.scale(adata, max_value=10)
    sc.pp.pca(adata, n_comps=50, random_state=0)
    return adata.obsm["X_pca"]


def zero_shot(model: object, batch_key: str | None) -> Method:
    """`cellplm_tl.tl.embed` with a loaded model."""

    def embed(adata: ad.AnnData) -> np.ndarray:
        cp.tl.embed(adata, model=model, batch_key=batch_key)
        return adata.obsm["X_cellplm"]

    return embed


def harmony_on(method: Method, batch_key: str) -> Method:
    """Harmony (Korsunsky et al., Nature Methods 2019) on a method's result, with its defaults."""

    def embed(adata: ad.AnnData) -> np.ndarray:
        points = method(adata)
        found = harmonypy.run_harmony(points, adata.obs, batch_key, verbose=False)
        return np.asarray(found.Z_corr).reshape(points.shape)

    return embed


def methods(models: dict[str, object], case: Case) -> dict[str, Method]:
    """Give what is run on a case, by name."""
    chosen: dict[str, Method] = {"pca": pca}
    for name, model in models.items():
        chosen[name] = zero_shot(model, case.batch_key)
        if case.batch_key is not None:
            chosen[name + ONE_CONTEXT] = zero_shot(model, None)
    if case.batch_key is not None:
        for name in ("pca", next(iter(models))):
            chosen[f"harmony on {name}"] = harmony_on(chosen[name], case.batch_key)
    return chosen


def measured(method: Method, adata: ad.AnnData) -> tuple[np.ndarray, float, float]:
    """Return the result on a copy, its seconds, and the growth of resident memory in MB.

    Memory is looked at every 5 ms: a shorter peak can be missed. What earlier methods have freed
    is handed back first (glibc keeps it), or it would be used again without being seen.
    """
    process, done = psutil.Process(), threading.Event()
    adata = adata.copy()
    gc.collect()
    if sys.platform == "linux":
        hand_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        hand_back(0)
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        representation = method(adata)
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return representation, seconds, (peak - before) / 2**20


# ----------------------------------------------------------------------------------------- scores


def mixing_as_stored(points: np.ndarray, case: Case) -> float:
    """Batch mixing as the stored figures count it.

    They look at the 2nd to 31st nearest cell (the nearest is left out, as if it were the cell
    itself), and the cell counts among those of its label. That gives 0.005 to 0.03 more than the
    definition, and only like can be compared with like.
    """
    search = NearestNeighbors(n_neighbors=MIXING_NEIGHBORS + 1).fit(points)
    neighbors = search.kneighbors(return_distance=False)[:, 1:]
    found = (case.batches[neighbors] != case.batches[:, None]).mean(axis=1)
    cells = pd.DataFrame({"label": case.labels, "batch": case.batches})
    of_label = cells.groupby("label")["batch"].transform("size").to_numpy()
    of_both = cells.groupby(["label", "batch"])["batch"].transform("size").to_numpy()
    expected = 1 - of_both / of_label
    return float(np.minimum(found[expected > 0] / expected[expected > 0], 1).mean())


def score(points: np.ndarray, case: Case, n_seeds: int) -> dict[str, float]:
    """Score a representation: the stored figures' names, and means over Leiden seeds."""
    scores = cp.metrics.clustering(points, case.labels, case.batches)
    over_seeds = cp.metrics.clustering(points, case.labels, leiden_seeds=range(n_seeds))
    for name in ("ari", "nmi"):
        scores[f"{name}_mean"] = over_seeds[name]
        scores[f"{name}_sd"] = over_seeds[f"{name}_sd"]
    if case.batches is not None:
        scores["batch_mixing_by_definition"] = scores["batch_mixing"]
        scores["batch_mixing"] = mixing_as_stored(points, case)
    return scores


def is_correct(points: np.ndarray, case: Case) -> np.ndarray:
    """Tell of every cell with a scored label whether its neighbours predict it."""
    predicted, is_scored = predict_from_neighbors(points, case.labels)
    return (predicted == case.labels)[is_scored]


def paired_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of two accuracies on the same cells, and its 95 % interval.

    The bootstrap over cells: a cell's difference is −1, 0 or 1, so that a draw of all cells is a
    draw of how many there are of each.
    """
    difference = ours.astype(int) - theirs.astype(int)
    shares = [(difference == value).mean() for value in (-1, 0, 1)]
    draws = np.random.default_rng(0).multinomial(difference.size, shares, BOOTSTRAP_DRAWS)
    means = (draws[:, 2] - draws[:, 0]) / difference.size
    return difference.mean(), *np.quantile(means, [0.025, 0.975])


# ------------------------------------------------------------------------------------------- page


def stored_figures(shared: Path) -> pd.DataFrame:
    """Read the peers' figures of this benchmark, as a table in the form of ours."""
    peers = pd.read_csv(shared / "bench/peers.csv")
    peers = peers[peers["task"] == "embed"]
    return peers.assign(method="stored: " + peers["method"])[
        ["dataset", "split", "method", "metric", "value", "seconds"]
    ]


def markdown(table: pd.DataFrame, first: str) -> str:
    """Write a table of texts as markdown; its index becomes the column called `first`."""
    header = [first, *map(str, table.columns)]
    lines = [header, ["---"] * len(header)]
    lines += [[str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_case(rows: pd.DataFrame, value: str = "value", digits: int = 3, mean: bool = True) -> str:
    """Write methods × cases; with `mean`, first the mean of those that ran on all cases."""
    table = rows.pivot_table(index="method", columns="case", values=value, observed=True)
    table.columns = table.columns.astype(str)
    if mean:
        table.insert(0, "mean", table.mean(axis=1, skipna=False))
    return markdown(table.map(lambda v: "·" if np.isnan(v) else f"{v:.{digits}f}"), "method")


def fill_one_context(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the "one context" methods the figures of sets without batches, where it is the same.

    So their means are over the cases that the others' are over.
    """
    is_one = rows["method"].str.endswith(ONE_CONTEXT)
    names = {name.removesuffix(ONE_CONTEXT) for name in rows.loc[is_one, "method"]}
    same = rows[rows["method"].isin(names) & ~rows["dataset"].isin(rows.loc[is_one, "dataset"])]
    return pd.concat([rows, same.assign(method=same["method"] + ONE_CONTEXT)])


def differences(intervals: pd.DataFrame) -> str:
    """Write cases × methods: difference of kNN accuracy to PCA, its interval, the verdict."""
    texts = [
        f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        + (" **behind**" if row.high < 0 else " ahead" if row.low > 0 else "")
        for row in intervals.itertuples()
    ]
    table = intervals.assign(text=texts).pivot(index="case", columns="method", values="text")
    return markdown(table.fillna("·"), "case")


def page(ours: pd.DataFrame, intervals: pd.DataFrame, stored: pd.DataFrame, n_seeds: int) -> str:
    """Write the page of results."""
    both = pd.concat([fill_one_context(ours), stored], ignore_index=True)
    both["case"] = both["dataset"] + " " + both["split"]
    intervals = intervals.assign(case=intervals["dataset"] + " " + intervals["split"])
    cases_run = list(dict.fromkeys(intervals["case"]))
    both = both[both["case"].isin(cases_run)]
    methods_run = list(dict.fromkeys(both["method"]))
    for table in (both, intervals):  # as categories they keep the order in which they ran
        table["case"] = pd.Categorical(table["case"], cases_run)
        table["method"] = pd.Categorical(table["method"], methods_run)

    def metric(name: str) -> str:
        return by_case(both[both["metric"] == name])

    per_method = both.drop_duplicates(["method", "case"])
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    return f"""# Zero-shot embedding

Made by `./dev bench embed` ({machine}); every score is in `embed.csv`. Three development sets: full
depth, counts thinned to {THINNED_TO:.0%}, 300 genes. Nothing is trained on them, but for the stored
figures of scVI and Harmony, which saw the set; the stored ones of `linear_transfer` are of an
earlier, independent writing of the same linear model. Contexts are the set's batches, or one.
The development sets were looked at while the linear model was made: read small leads with care.

## Mean of the scores

ARI and NMI (Leiden seed 0), kNN accuracy and macro F1, silhouette, and batch mixing where there are
batches.

{by_case(both[both["metric"].isin(SCORES)])}
## kNN accuracy

{metric("knn_accuracy")}
Difference to PCA on the same cells, 95 % interval of a paired bootstrap over cells ("ahead",
"behind": the whole interval lies on one side of zero):

{differences(intervals)}
## ARI, mean over {n_seeds} Leiden seeds

{metric("ari_mean")}
Standard deviation over the seeds:

{metric("ari_sd")}
## ARI, Leiden seed 0

{metric("ari")}
## NMI, Leiden seed 0

{metric("nmi")}
## kNN macro F1

{metric("knn_macro_f1")}
## Silhouette of the labels

{metric("silhouette_label")}
## Batch mixing

Counted as the stored figures are, over the 2nd to 31st nearest cell:

{metric("batch_mixing")}
By the definition of `cellplm_tl.metrics.clustering`, over the 1st to 30th:

{metric("batch_mixing_by_definition")}
## Seconds and memory

Of the embedding alone, the model being loaded. The stored seconds are of another machine.

{by_case(per_method, "seconds", 2, mean=False)}
Growth of resident memory, MB:

{by_case(per_method, "peak_mb", 0, mean=False)}"""


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mini", "linear_transfer"])
    parser.add_argument("--datasets", nargs="*", help="leave out for all three")
    parser.add_argument("--leiden-seeds", type=int, default=10, metavar="N")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    cp.settings.verbosity = 0
    if options.leiden_seeds < 2:
        parser.error("--leiden-seeds must be 2 or more: a spread needs two")

    models = {Path(name).name: cp.models.load(name) for name in options.models}
    is_warm: set[str] = set()
    rows, intervals = [], []
    for case in cases(options.shared, options.datasets):
        correct = {}
        for name, method in methods(models, case).items():
            if name not in is_warm:  # imports and compilation are not the method's seconds
                method(case.adata[:300].copy())
                is_warm.add(name)
            points, seconds, peak_mb = measured(method, case.adata)
            scores = score(points, case, options.leiden_seeds)
            correct[name] = is_correct(points, case)
            about = {"dataset": case.dataset, "split": case.split, "method": name}
            for metric, value in scores.items():
                cost = {"seconds": round(seconds, 2), "peak_mb": round(peak_mb)}
                rows.append(about | {"metric": metric, "value": round(value, 5)} | cost)
            if name != "pca":
                found = paired_interval(correct[name], correct["pca"])
                intervals.append(
                    about | dict(zip(("difference", "low", "high"), found, strict=True))
                )
            known = np.mean([scores[s] for s in SCORES if s in scores])
            print(
                f"{case.dataset:18} {case.split:9} {name:30} mean {known:.3f} "
                f"kNN {scores['knn_accuracy']:.3f} ARI {scores['ari_mean']:.3f} "
                f"{seconds:6.2f} s",
                flush=True,
            )

    ours = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    ours.to_csv(options.out / "embed.csv", index=False)
    text = page(ours, pd.DataFrame(intervals), stored_figures(options.shared), options.leiden_seeds)
    (options.out / "embed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
