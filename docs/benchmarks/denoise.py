"""Denoising on fixed splits, beside other tools on the same cells and their stored figures.

    ./dev bench denoise
    ./dev bench denoise --peers             MAGIC and scVI too, in environments of their own
    ./dev bench denoise --redo fine_tuned   run a method again; others are taken from the last run

Two sets of blood cells, three seeds, two splits (the shared folder's ``bench/README.md``):

* ``thinned``: every count divided binomially; one half predicts the other. Deviance is scored on
  expected counts, the correlations on log1p: of these counts, and, where a method gives it, on its
  own expected log1p.
* ``masked``: the paper's protocol. A tenth of the non-zero counts is hidden, and these entries
  alone are scored, in log1p per 10,000. That rewards a constant per gene (denoise_objectives.py
  shows it), hence also the gene-centred correlation and the AUROC against true zeros.

Every method runs in a process of its own. Written: ``denoise.csv`` (every score), ``denoise.md``;
what a run found is kept under ``build/bench/denoise``, so that it can go on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import peers
import psutil
import scipy.sparse as sp
from embed import markdown
from sklearn.neighbors import NearestNeighbors

import cellplm_tl as cp
from cellplm_tl.metrics.denoising import held_out_scores, masked_entries, score_entries

TARGET_SUM = 1e4
SPLITS = ("thinned", "masked")
KNN60_NEIGHBORS, KNN60_SHARE_OF_MEAN = 60, 0.02
SIMPLE = ("nothing", "gene_mean", "nonzero_gene_mean", "svd", "knn")  # nothing to install
LARGE = ("magic", "scvi")
SEEDS_OF = {"scvi": (0,)}  # it takes minutes
ONLY_MASKED = {"nonzero_gene_mean", "nonzero"}  # no expected counts
OWN_LOG = ", expected log1p"  # of a method that gives it, next to the log1p of its expected counts
N_DRAWS = 500  # of the bootstrap

# Metrics by split, and whether more is better.
METRICS: dict[str, dict[str, bool]] = {
    "thinned": {"poisson_deviance": False, "pearson_per_cell": True, "pearson_per_gene": True},
    "masked": {
        "auroc_masked_vs_zero": True,
        "pearson_gene_centred": True,
        "rmse_masked": False,
        "mae_masked": False,
        "pearson_masked": True,
        "cosine_masked": True,
    },
}
# What is claimed: which row of ours stands for it, and the peers that it is held against.
EXPECTED_COUNTS = ("magic", "scvi", "svd", "knn", "linear_transfer_knn60", "gene_mean")
WITHOUT_TRAINING = ("svd", "knn", "gene_mean")
CLAIMS: list[tuple[str, str, str, tuple[str, ...]]] = [
    *(
        (method, "thinned", metric, rivals)
        for method, rivals in (("fine_tuned", EXPECTED_COUNTS), ("zero_shot", WITHOUT_TRAINING))
        for metric in METRICS["thinned"]
    ),
    *(
        (method, "masked", metric, rivals)
        for method, rivals in (("fine_tuned", EXPECTED_COUNTS), ("zero_shot", WITHOUT_TRAINING))
        for metric in ("auroc_masked_vs_zero", "pearson_gene_centred")
    ),
    *(
        ("nonzero", "masked", metric, ("nonzero_gene_mean",))
        for metric in ("rmse_masked", "mae_masked")
    ),
]


# ------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One split of one data set with one seed."""

    dataset: str
    split: str
    seed: int
    input: ad.AnnData  # counts in X
    truth: sp.csr_matrix  # thinned: the other half; masked: the counts before masking
    hidden: sp.csr_matrix | None
    rows: np.ndarray  # (cells,) number of each among the cells of the data set
    n_all_cells: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.split}-{self.seed}"


def cases(
    shared: Path, datasets: Sequence[str], splits: Sequence[str], seeds: Sequence[int]
) -> Iterator[Case]:
    """Yield the splits of ``denoise.json``; the package's own functions draw them as it says."""
    recipes = json.loads((shared / "bench/splits/denoise.json").read_text())
    for dataset, recipe in recipes.items():
        if datasets and dataset not in datasets:
            continue
        cells = ad.read_h5ad(shared / "data/dev" / recipe["file"])[:, recipe["genes"]].copy()
        cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
        cells = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
        for split in splits:
            for seed in seeds:
                yield make_case(dataset, split, seed, cells.copy())


def make_case(dataset: str, split: str, seed: int, cells: ad.AnnData) -> Case:
    if split == "masked":
        cp.pp.mask_counts(cells, random_state=seed)
        seen, truth, hidden = cells.layers["masked"], cells.X, cells.layers["masked_truth"]
    else:
        cp.pp.thin_counts(cells, random_state=seed)
        seen, truth, hidden = cells.layers["thinned"], cells.layers["thinned_truth"], None
    rows = np.flatnonzero((np.diff(seen.indptr) > 0) & (np.diff(truth.indptr) > 0))
    given = ad.AnnData(seen[rows], obs=cells.obs.iloc[rows][[]], var=cells.var[[]])
    hidden = None if hidden is None else hidden[rows]
    return Case(dataset, split, seed, given, truth[rows], hidden, rows, cells.n_obs)


# ---------------------------------------------------------------------------------------- methods

Arrays = dict[str, np.ndarray]  # "denoised": expected counts, "lognorm": expected log1p per 10,000
Method = Callable[[ad.AnnData, int], Arrays]


def denoise(adata: ad.AnnData, seed: int, *, is_trained: bool, objective: str) -> Arrays:
    """`cellplm_tl.tl.denoise` with the default model."""
    cp.tl.denoise(
        adata,
        scale="lognorm" if objective == "nonzero" else ("counts", "lognorm"),
        objective=objective,
        train=cp.train.TrainConfig() if is_trained else None,
        random_state=seed,
    )
    key = "cellplm_denoised"
    if objective == "nonzero":
        return {"lognorm": adata.layers[key]}
    return {"denoised": adata.layers[key], "lognorm": adata.layers[f"{key}_lognorm"]}


def linear_transfer_knn60(adata: ad.AnnData, seed: int) -> Arrays:
    """Means over the 60 nearest cells, itself among them, in the floor's embedding."""
    cp.tl.embed(adata, model="linear_transfer", random_state=seed)
    points = adata.obsm["X_cellplm"]
    search = NearestNeighbors(n_neighbors=min(KNN60_NEIGHBORS, len(points))).fit(points)
    to_mean = search.kneighbors_graph(points)
    to_mean /= search.n_neighbors
    depth = np.asarray(adata.X.sum(axis=1))  # (cells, 1)
    fractions = sp.csr_matrix(adata.X / depth)
    mean = np.asarray(fractions.mean(axis=0))
    lognorm = (TARGET_SUM * fractions).log1p()
    smoothed = (to_mean @ fractions).toarray()
    smoothed = (1 - KNN60_SHARE_OF_MEAN) * smoothed + KNN60_SHARE_OF_MEAN * mean
    return {
        "denoised": (smoothed * depth).astype(np.float32),
        "lognorm": (to_mean @ lognorm).toarray().astype(np.float32),
    }


OURS: dict[str, Method] = {
    "zero_shot": partial(denoise, is_trained=False, objective="likelihood"),
    "fine_tuned": partial(denoise, is_trained=True, objective="likelihood"),
    "nonzero": partial(denoise, is_trained=True, objective="nonzero"),
    "linear_transfer_knn60": linear_transfer_knn60,
}


@dataclass(frozen=True)
class Run:
    """What a method gave, and what it cost."""

    arrays: Arrays
    seconds: float  # without imports
    peak_mb: float  # of the whole process


def run(method: str, case: Case) -> Run:
    """Run a method in a process of its own."""
    if method not in OURS:
        found = peers.run(method, "denoise", {"input": case.input}, case.seed)
        return Run(found.arrays, found.seconds, found.peak_mb)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_here, method, case.input, case.seed).result()


def run_here(method: str, adata: ad.AnnData, seed: int) -> Run:
    warnings.filterwarnings("ignore", category=FutureWarning)
    cp.settings.verbosity = 0
    start = time.perf_counter()
    arrays = OURS[method](adata, seed)
    return Run(arrays, time.perf_counter() - start, peak_memory())


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in MB.

    Not by getrusage: what that gives begins with the memory of the parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return psutil.Process().memory_info().rss / 2**20
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


# ----------------------------------------------------------------------------------------- scores


def scored(case: Case, found: Run) -> dict[str, dict[str, np.ndarray]]:
    """Score what a method gave: by variant and metric, the score and its bootstrap draws.

    Variants: by the log1p of its expected counts (``""``), by its own expected log1p.
    """
    denoised, lognorm = (found.arrays.get(name) for name in ("denoised", "lognorm"))
    variants = {"": (denoised, None)} if denoised is not None else {"": (None, lognorm)}
    if denoised is not None and lognorm is not None:
        variants[OWN_LOG] = (denoised, lognorm)
    score = score_thinned if case.split == "thinned" else score_masked
    return {variant: score(case, *arrays) for variant, arrays in variants.items()}


@cache
def weights(n: int) -> np.ndarray:
    """How often each of n cells, or genes, is drawn: (draws, n), the same for all methods."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), N_DRAWS)


def score_thinned(case: Case, denoised: np.ndarray, lognorm: np.ndarray | None) -> dict:
    per_cell, per_gene = held_out_scores(case.truth, denoised, lognorm=lognorm)
    of_cells = weights(case.n_all_cells)[:, case.rows[per_cell.index]]
    found = {
        name: np.r_[values.mean(), of_cells @ values / of_cells.sum(axis=1)]
        for name, values in per_cell.items()
    }
    draws = weights(len(per_gene)) @ per_gene / len(per_gene)
    return found | {"pearson_per_gene": np.r_[per_gene.mean(), draws]}


def score_masked(case: Case, denoised: np.ndarray | None, lognorm: np.ndarray | None) -> dict:
    entries = masked_entries(
        case.truth, denoised, case.hidden, lognorm=lognorm, random_state=case.seed + 100
    )
    rank = Rank(entries)
    centred = Centred(entries)
    of_cells = weights(case.n_all_cells)
    hidden = entries[entries["is_masked"]]
    error = (hidden["predicted"] - hidden["truth"]).to_numpy()
    cell = case.rows[hidden["cell"]]
    size, absolute, square = (
        of_cells @ np.bincount(cell, values, case.n_all_cells)
        for values in (np.ones_like(error), np.abs(error), error**2)
    )
    of_entries = case.rows[entries["cell"]]
    draws = {
        "rmse_masked": np.sqrt(square / size),
        "mae_masked": absolute / size,
        "auroc_masked_vs_zero": np.array([rank(w[of_entries]) for w in of_cells]),
        "pearson_gene_centred": np.array([centred(w[cell]) for w in of_cells]),
    }
    return {
        name: np.r_[score, draws.get(name, np.full(N_DRAWS, np.nan))]
        for name, score in score_entries(entries).items()
    }


class Rank:
    """AUROC of hidden entries against zeros, for entries that are drawn several times."""

    def __init__(self, entries: pd.DataFrame) -> None:
        _, self.place = np.unique(entries["predicted"], return_inverse=True)
        self.is_masked = entries["is_masked"].to_numpy()

    def __call__(self, weight: np.ndarray) -> float:
        hidden = np.bincount(self.place, weight * self.is_masked)
        zeros = np.bincount(self.place, weight * ~self.is_masked)
        below = np.cumsum(zeros) - zeros / 2
        return hidden @ below / (hidden.sum() * zeros.sum())


class Centred:
    """Gene-centred Pearson of hidden entries, likewise."""

    def __init__(self, entries: pd.DataFrame) -> None:
        hidden = entries[entries["is_masked"]]
        number = hidden.groupby("gene")["gene"].transform("size").to_numpy()
        self.is_enough = number >= 5
        hidden = hidden[self.is_enough]
        _, self.gene = np.unique(hidden["gene"], return_inverse=True)
        # about their means, so that sums of squares lose nothing
        means = hidden.groupby("gene")[["truth", "predicted"]].transform("mean")
        x, y = ((hidden - means)[name].to_numpy() for name in ("truth", "predicted"))
        self.x, self.y = (np.where(np.abs(v) < 1e-6, 0, v) for v in (x, y))

    def __call__(self, weight: np.ndarray) -> float:
        weight = weight[self.is_enough]
        size = np.maximum(np.bincount(self.gene, weight), 1)
        x, y = (
            v - (np.bincount(self.gene, weight * v) / size)[self.gene] for v in (self.x, self.y)
        )
        lengths = np.sqrt((weight * x**2).sum() * (weight * y**2).sum())
        return (weight * x * y).sum() / lengths if lengths > 0 else 0.0


# ---------------------------------------------------------------------------------------- keeping


def collect(
    wanted: Iterator[Case], methods: Sequence[str], kept: Path, redo: Sequence[str]
) -> tuple[pd.DataFrame, dict]:
    """Run what has not been run; give all scores as a table, and the bootstrap draws.

    The draws are those of (dataset, split, metric, method), by seed.
    """
    kept.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    draws: dict[tuple[str, str, str, str], dict[int, np.ndarray]] = {}
    for case in wanted:
        for method in methods:
            if case.split == "thinned" and method in ONLY_MASKED:
                continue
            if case.seed not in SEEDS_OF.get(method, (case.seed,)):
                continue
            file = kept / f"{case.name}-{method}.json"
            if method in redo or not file.is_file():
                found = run(method, case)
                variants = scored(case, found)
                content = {
                    "seconds": found.seconds,
                    "peak_mb": found.peak_mb,
                    "scores": {v: {m: list(x) for m, x in s.items()} for v, s in variants.items()},
                }
                file.write_text(json.dumps(content))
            content = json.loads(file.read_text())
            for variant, scores in content["scores"].items():
                name = method + variant
                for metric, values in scores.items():
                    key = (case.dataset, case.split, metric, name)
                    draws.setdefault(key, {})[case.seed] = np.array(values)
                    rows.append(
                        {
                            "dataset": case.dataset,
                            "split": case.split,
                            "seed": case.seed,
                            "method": name,
                            "metric": metric,
                            "value": round(values[0], 5),
                            "seconds": round(content["seconds"], 2),
                            "peak_mb": round(content["peak_mb"]),
                        }
                    )
            first = next(iter(content["scores"].values()))
            shown = ", ".join(f"{m} {first[m][0]:.4f}" for m in METRICS[case.split] if m in first)
            print(f"{case.name:30} {method:22} {shown} {content['seconds']:7.1f} s", flush=True)
    return pd.DataFrame(rows), draws


# ------------------------------------------------------------------------------------------- page


def stored_figures(shared: Path) -> pd.DataFrame:
    table = pd.read_csv(shared / "bench/peers.csv")
    table = table[table["task"] == "denoise"]
    return table.assign(method="stored: " + table["method"])


def table_of(rows: pd.DataFrame, dataset: str, split: str) -> str:
    """Write methods × metrics: mean over the seeds, and their spread where there are several."""
    chosen = rows[(rows["dataset"] == dataset) & (rows["split"] == split)]
    groups = chosen.groupby(["method", "metric"], sort=False)["value"]
    mean, spread, number = groups.mean(), groups.std(), groups.size()
    lines = {}
    for method in dict.fromkeys(chosen["method"]):
        texts = []
        for metric in METRICS[split]:
            key = (method, metric)
            text = f"{mean[key]:.4f}" if key in mean.index else "·"
            texts.append(text + (f" ± {spread[key]:.4f}" if number.get(key, 0) > 1 else ""))
        lines[method] = [*texts, str(int(number.loc[method].max()))]
    names = [f"{m} {'↑' if up else '↓'}" for m, up in METRICS[split].items()]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=[*names, "seeds"])
    return markdown(table, "method")


def verdicts(draws: dict, datasets: Sequence[str]) -> pd.DataFrame:
    """Hold every claim against every peer that ran: difference, 95 % interval, verdict.

    Differences are turned so that above 0 is better, and are means over the seeds both have.
    """
    lines = []
    for method, split, metric, rivals in CLAIMS:
        is_correlation = split == "thinned" and metric != "poisson_deviance"
        ours = method + (OWN_LOG if is_correlation else "")
        sign = 1 if METRICS[split][metric] else -1
        for dataset in datasets:
            for rival in (name for r in rivals for name in (r, r + OWN_LOG)):
                both = [draws.get((dataset, split, metric, name)) for name in (ours, rival)]
                if None in both or (rival.endswith(OWN_LOG) and not is_correlation):
                    continue
                seeds = sorted(both[0].keys() & both[1].keys())
                gain = sign * np.mean([both[0][s] - both[1][s] for s in seeds], axis=0)
                low, high = np.quantile(gain[1:], [0.025, 0.975])
                verdict = "ahead" if low > 0 else "**behind**" if high < 0 else "level"
                lines.append(
                    {
                        "claim": f"{ours}: {metric}",
                        "peer": rival,
                        "dataset": dataset,
                        "text": f"{gain[0]:+.4f} [{low:+.4f}, {high:+.4f}] {verdict}",
                        "verdict": verdict.strip("*"),
                    }
                )
    return pd.DataFrame(lines)


def page(ours: pd.DataFrame, stored: pd.DataFrame, found: pd.DataFrame) -> str:
    datasets = list(dict.fromkeys(ours["dataset"]))
    both = pd.concat([ours, stored[stored["dataset"].isin(datasets)]], ignore_index=True)
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    parts = [
        f"""# Denoising

Made by `./dev bench denoise` ({machine}); every score is in `denoise.csv`. Two sets of blood cells,
the splits of the project's benchmark; means over the seeds ± their standard deviation. `zero_shot`:
`cp.tl.denoise` as it is; `fine_tuned`: trained on the very cells by masked entries, as scVI and the
others are fitted to them; `nonzero`: likewise, by the paper's objective. "{OWN_LOG[2:]}": the
method's own expectation of the logarithm instead of the logarithm of its expected counts. Nothing
was chosen on these splits.
"""
    ]
    for split, title in (
        ("thinned", "Half of the counts predicts the other half"),
        ("masked", "Masked entries (the paper's protocol)"),
    ):
        if not (ours["split"] == split).any():
            continue
        parts.append(f"## {title}\n")
        if split == "masked":
            parts.append(
                "All scored entries are known not to be zero: RMSE and MAE are won by whoever says"
                " what a\nvalue is *if it is not zero*, be it the same in every cell.\n"
            )
        parts += [f"### {d}\n\n{table_of(both, d, split)}" for d in datasets]
    if len(found):
        parts.append(
            f"""## Ahead or behind

Difference to each peer that ran beside ours, turned so that above 0 is better; 95 % interval of a
paired bootstrap ({N_DRAWS} draws) over cells, for `pearson_per_gene` over genes. "Ahead", "behind":
the whole interval lies on one side of zero.
"""
        )
        for claim, lines in found.groupby("claim", sort=False):
            table = lines.pivot(index="peer", columns="dataset", values="text")
            order = dict.fromkeys(lines["peer"])
            parts.append(f"### {claim}\n\n{markdown(table.loc[list(order)].fillna('·'), 'peer')}")
        number = found["verdict"].value_counts()
        parts.append(
            "In all: "
            + ", ".join(f"{number.get(v, 0)} {v}" for v in ("ahead", "level", "behind"))
            + ".\n"
        )
    per_run = ours[~ours["method"].str.endswith(OWN_LOG)].drop_duplicates(
        ["dataset", "split", "seed", "method"]
    )
    per_run = per_run.assign(case=per_run["dataset"] + " " + per_run["split"])
    parts.append(
        "## Seconds and memory\n\nMean over the seeds; without imports. Memory: the most that the"
        " method's process held, libraries\nincluded. Two cores, shared with other work: times are"
        " rough.\n"
    )
    for name, digits in (("seconds", 1), ("peak_mb", 0)):
        table = per_run.pivot_table(index="method", columns="case", values=name, sort=False)
        texts = table.map(lambda v, d=digits: "·" if np.isnan(v) else f"{v:,.{d}f}")
        parts.append(markdown(texts, "seconds" if name == "seconds" else "MB"))
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="run MAGIC and scVI as well")
    parser.add_argument("--methods", nargs="*", help="leave out for all")
    parser.add_argument("--datasets", nargs="*", default=[], help="leave out for both")
    parser.add_argument("--splits", nargs="*", default=SPLITS, choices=SPLITS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--redo", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--kept", type=Path, default=Path("build/bench/denoise"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    cp.settings.verbosity = 0

    methods = options.methods or [*OURS, *SIMPLE, *(LARGE if options.peers else ())]
    wanted = cases(options.shared, options.datasets, options.splits, options.seeds)
    ours, draws = collect(wanted, methods, options.kept, options.redo)
    found = verdicts(draws, list(dict.fromkeys(ours["dataset"])))
    options.out.mkdir(parents=True, exist_ok=True)
    ours.to_csv(options.out / "denoise.csv", index=False)
    text = page(ours, stored_figures(options.shared), found)
    (options.out / "denoise.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
