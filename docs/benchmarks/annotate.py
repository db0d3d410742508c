"""Cell types on fixed splits, beside other tools on the same cells and their stored figures.

    ./dev bench annotate
    ./dev bench annotate --models mini linear_transfer --strategies head full
    ./dev bench annotate --peers            CellTypist and SCANVI too, in environments of their own
    ./dev bench annotate --unknown          also with each type taken out of the reference in turn
    ./dev bench annotate --redo mini        run our rows with this model again

Two sets, three seeds, three variants (the shared folder's ``bench/README.md``): the reference is
whole; the query is, too (``full``), or has its counts thinned to 20 % (``thin20``), or measures 300
genes (``panel300``). Every cell gets the label with the largest probability; how many of them our
tool would rather call "Unknown" is told apart from that.

Every method runs in a process of its own. Written: ``annotate.csv`` (every score) and
``annotate.md``. What a run predicted is kept under ``build/bench/annotate`` and taken from there
the next time, so that a run can go on where it was stopped.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import peers
import scipy.sparse as sp
from embed import markdown

import cellplm_tl as cp

SPLITS = ("full", "thin20", "panel300")
UNKNOWN_SPLIT = "unknown"
THINNED_TO = 0.2
FEW_CELLS = 10  # of a type in the query: fewer say nothing about a score of ours
BATCH_KEYS = {"pancreas": "batch"}  # of the sorted cells a batch is a type
SIMPLE = ("linear_transfer", "logreg", "logreg_genes", "svm", "knn")  # nothing to install
LARGE = ("celltypist", "scanvi")
SEEDS_OF = {"scanvi": (0,)}  # it takes minutes
CACHE = Path("build/bench/annotate")
N_DRAWS = 1_000  # of the bootstrap
SCORES = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "ece", "brier", "log_loss")


# ------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One variant of one set with one seed."""

    dataset: str
    split: str
    seed: int
    reference: ad.AnnData  # counts in X, labels in obs["label"]
    query: ad.AnnData
    truth: np.ndarray  # (cells of the query,)
    rows: np.ndarray  # (cells of the query,) number of each in its file
    left_out: str | None = None  # type that was taken out of the reference

    @property
    def name(self) -> str:
        type_name = (
            "" if self.left_out is None else "-" + "".join(filter(str.isalnum, self.left_out))
        )
        return f"{self.dataset}-{self.split}{type_name}-{self.seed}"


def cases(
    shared: Path, datasets: Sequence[str], splits: Sequence[str], seeds: Sequence[int]
) -> Iterator[Case]:
    """Yield the splits of ``annotate_*.json``; of ``unknown`` one for each type left out."""
    for file in sorted((shared / "bench/splits").glob("annotate_*.json")):
        dataset = file.stem.removeprefix("annotate_")
        if datasets and dataset not in datasets:
            continue
        recipe = json.loads(file.read_text())
        for seed in seeds:
            reference, query, rows = _halves(shared / "data/dev", recipe, str(seed))
            for adata in (reference, query):
                adata.obs["label"] = adata.obs[recipe["labels_key"]].astype(str)
                if dataset not in BATCH_KEYS:
                    adata.obs = adata.obs.drop(columns="batch")
            truth = query.obs.pop("label").to_numpy(dtype=str)
            for split in splits:
                if split != UNKNOWN_SPLIT:
                    given = _variant(query, split, seed, recipe)
                    yield Case(dataset, split, seed, reference, given, truth, rows)
                    continue
                kinds, n_cells = np.unique(truth, return_counts=True)
                for kind in kinds[n_cells >= FEW_CELLS]:
                    rest = reference[(reference.obs["label"] != kind).to_numpy()].copy()
                    yield Case(dataset, split, seed, rest, query, truth, rows, kind)


def _halves(folder: Path, recipe: dict[str, Any], seed: str) -> tuple[ad.AnnData, ad.AnnData, Any]:
    """Return reference and query, and the rows of the query in its file."""
    whole = ad.read_h5ad(folder / recipe["query"])
    whole.X = sp.csr_matrix(whole.X)
    whole.X.sort_indices()
    rows = np.array(recipe["seeds"][seed].get("query_rows", np.arange(whole.n_obs)))
    if recipe["reference"] == recipe["query"]:
        reference = whole[np.setdiff1d(np.arange(whole.n_obs), rows)].copy()
    else:
        reference = ad.read_h5ad(folder / recipe["reference"])
    labels = recipe["labels_key"]
    rows = rows[whole.obs[labels].isin(reference.obs[labels].unique()).to_numpy()[rows]]
    return reference, whole[rows].copy(), rows


def _variant(query: ad.AnnData, split: str, seed: int, recipe: dict[str, Any]) -> ad.AnnData:
    query = query.copy()
    if split == "thin20":
        query.X.data = np.random.default_rng(seed).binomial(query.X.data, THINNED_TO)
        query.X.eliminate_zeros()
    elif split == "panel300":
        query = query[:, recipe["seeds"][str(seed)]["panel300"]].copy()
    return query


# ---------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """One row of the tables: a peer, or our tool with some options."""

    name: str
    peer: str
    options: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.peer == "cellplm"


def methods(models: Sequence[str], strategies: Sequence[str], large: Sequence[str]) -> list[Method]:
    ours = [
        Method(f"{Path(model).name} {strategy}", "cellplm", {"model": model, "strategy": strategy})
        for model in models
        for strategy in strategies
    ]
    return [*ours, *(Method(name, name, {}) for name in (*SIMPLE, *large))]


def predictions(method: Method, case: Case, redo: Sequence[str]) -> dict[str, np.ndarray]:
    """Run a method on a case, or read what it said the last time."""
    file = CACHE / f"{case.name}-{method.name.replace(' ', '_')}.npz"
    if file.is_file() and not set(method.name.split()) & set(redo):
        return dict(np.load(file))
    options = dict(method.options)
    if method.is_ours:
        options["batch_key"] = BATCH_KEYS.get(case.dataset)
    inputs = {"reference": case.reference, "query": case.query}
    outputs = peers.run(method.peer, "annotate", inputs, case.seed, options)
    found = outputs.arrays | {"seconds": outputs.seconds, "peak_mb": outputs.peak_mb}
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(file.with_suffix(".part.npz"), **found)
    file.with_suffix(".part.npz").rename(file)
    return dict(np.load(file))


# ----------------------------------------------------------------------------------------- scores


def score(found: dict[str, np.ndarray], case: Case) -> dict[str, float]:
    if case.left_out is not None:
        return unknown_scores(found, case)
    proba, classes = found.get("proba"), found.get("labels")
    scores = cp.metrics.annotation(case.truth, found["predicted"], proba, classes=classes)
    scores = {name: scores[name] for name in SCORES if name in scores}
    if "called" in found:
        called = cp.metrics.annotation(case.truth, found["called"])
        scores["false_alarms"] = called["unknown_share"]  # all types are in the reference
        scores["macro_f1_with_unknown"] = called["macro_f1"]
        scores["accuracy_called"] = called["accuracy_called"]
    return scores


def unknown_scores(found: dict[str, np.ndarray], case: Case) -> dict[str, float]:
    is_absent = case.truth == case.left_out
    scores = {}
    if (of_cells := unknown_score(found)) is not None:
        weights = np.ones((1, len(is_absent)))
        scores["unknown_auroc"] = weighted_aurocs(of_cells, is_absent, weights)[0]
    if "called" in found:
        is_unknown = found["called"] == "Unknown"
        scores["false_alarms"] = is_unknown[~is_absent].mean()
        scores["unknown_found"] = is_unknown[is_absent].mean()
    return scores


def unknown_score(found: dict[str, np.ndarray]) -> np.ndarray | None:
    """Return the tool's own score, else minus the largest probability."""
    if "unknown_score" in found:
        return found["unknown_score"]
    return -found["proba"].max(axis=1) if "proba" in found else None


def weighted_aurocs(scores: np.ndarray, is_absent: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the curve for each row of weights, (draws, cells)."""
    order = np.argsort(scores, kind="stable")
    first_of_value = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    above, below = (
        np.add.reduceat(weights[:, order] * part[order], first_of_value, axis=1)
        for part in (is_absent, ~is_absent)
    )  # (draws, values)
    beaten = np.cumsum(below, axis=1) - below / 2  # a draw counts as half
    return (above * beaten).sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1))


def macro_f1s(found: dict[str, np.ndarray], case: Case, weights: np.ndarray) -> np.ndarray:
    """Return the macro F1 for each row of weights, (draws, cells)."""
    kinds = np.unique(case.truth)
    there, called = case.truth[:, None] == kinds, found["predicted"][:, None] == kinds
    hits = weights @ (there & called)  # (draws, kinds)
    return np.nanmean(2 * hits / (weights @ there + weights @ called), axis=1)


def draws_of(found: dict[str, np.ndarray], case: Case) -> np.ndarray | None:
    """Return the score that methods are compared by, for every draw of the bootstrap.

    A cell of the file has the same weight, Poisson(1), in every case and for every method: seeds
    share cells, and differences are paired.
    """
    n_cells = case.rows.max() + 1
    rng = np.random.default_rng(0)
    weights = np.stack([rng.poisson(1.0, n_cells) for _ in range(N_DRAWS)])[:, case.rows]
    if case.left_out is None:
        return macro_f1s(found, case, weights.astype(float))
    of_cells = unknown_score(found)
    if of_cells is None:
        return None
    return weighted_aurocs(of_cells, case.truth == case.left_out, weights.astype(float))


def intervals(scored: pd.DataFrame, chosen: Sequence[Method]) -> pd.DataFrame:
    """Compare every row of ours with every peer: difference, 95 % interval, verdict."""
    found = []
    for (dataset, split), rows in scored.groupby(["dataset", "split"], sort=False):
        by_method = {name: part.set_index("case") for name, part in rows.groupby("method")}
        for ours in (method.name for method in chosen if method.is_ours):
            for peer in (method.name for method in chosen if not method.is_ours):
                if ours not in by_method or peer not in by_method:
                    continue
                one, other = by_method[ours], by_method[peer]
                both = one.index.intersection(other.index)
                if both.empty:
                    continue
                difference = one.loc[both, "score"] - other.loc[both, "score"]
                draws = np.mean(
                    [one.at[case, "draws"] - other.at[case, "draws"] for case in both], axis=0
                )
                low, high = np.nanquantile(draws, [0.025, 0.975])
                verdict = "ahead" if low > 0 else "behind" if high < 0 else "level"
                found.append([dataset, split, ours, peer, difference.mean(), low, high, verdict])
    names = ["dataset", "split", "ours", "peer", "difference", "low", "high", "verdict"]
    return pd.DataFrame(found, columns=names)


# ------------------------------------------------------------------------------------------- page


def stored_figures(shared: Path) -> pd.DataFrame:
    """Read the peers' figures of this benchmark, as rows like ours."""
    rows = pd.read_csv(shared / "bench/peers.csv")
    rows = rows[rows["task"] == "annotate"].drop(columns="task")
    return rows.assign(method="stored: " + rows["method"])


def by_case(rows: pd.DataFrame, metric: str, value: str = "value", digits: int = 3) -> str:
    """Write methods × cases: mean over the seeds (and types), and their standard deviation."""
    rows = rows[rows["metric"] == metric]
    if rows.empty:
        return "Nothing was run.\n"
    order = (
        list(dict.fromkeys(rows["method"])),
        list(dict.fromkeys(rows["dataset"] + " " + rows["split"])),
    )
    over_types = rows.groupby(["method", "dataset", "split", "seed"], sort=False)[value].mean()
    grouped = over_types.groupby(["method", "dataset", "split"], sort=False)
    summary = grouped.agg(["mean", "std", "size"]).reset_index()
    texts = [
        f"{row.mean_:.{digits}f}" + (f" ± {row.std_:.{digits}f}" if row.size_ > 1 else "")
        for row in summary.rename(columns=lambda c: f"{c}_").itertuples()
    ]
    summary["case"] = summary["dataset"] + " " + summary["split"]
    table = summary.assign(text=texts).pivot(index="method", columns="case", values="text")
    return markdown(table.reindex(index=order[0], columns=order[1]).fillna("·"), "method")


def comparison(found: pd.DataFrame) -> str:
    """Write, for each row of ours, cases × peers: difference, interval, verdict."""
    parts = []
    for ours, rows in found.groupby("ours", sort=False):
        texts = [
            f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}] "
            + ("**behind**" if row.verdict == "behind" else row.verdict)
            for row in rows.itertuples()
        ]
        rows = rows.assign(text=texts, case=rows["dataset"] + " " + rows["split"])
        table = rows.pivot(index="case", columns="peer", values="text")
        table = table.reindex(index=rows["case"].unique(), columns=rows["peer"].unique())
        parts.append(f"`{ours}`:\n\n" + markdown(table.fillna("·"), "case"))
    return "\n".join(parts) or "Nothing to compare.\n"


def page(ours: pd.DataFrame, found: pd.DataFrame, stored: pd.DataFrame) -> str:
    """Write the page of results."""
    was_run = set(zip(ours["dataset"], ours["split"], strict=True))
    is_shown = [pair in was_run for pair in zip(stored["dataset"], stored["split"], strict=True)]
    both = pd.concat([ours, stored[is_shown]], ignore_index=True)
    known = both[both["split"] != UNKNOWN_SPLIT]
    unknown = both[both["split"] == UNKNOWN_SPLIT]
    is_unknown = found["split"] == UNKNOWN_SPLIT
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    coverage = inspect.signature(cp.tl.annotate).parameters["coverage"].default
    text = f"""# Cell types

Made by `./dev bench annotate` ({machine}); every score is in `annotate.csv`. Two
sets (sorted blood cells, half of each type for the reference; pancreas, the query by another
technology than the reference), the query whole, with counts thinned to {THINNED_TO:.0%}, or on 300
genes. Mean over the seeds ± their standard deviation. "stored" are figures made before this package
was, those of `linear_transfer` by an independent writing of the same method; the rows of the
same name without "stored" were run here. `linear_transfer head` is this tool on that model;
`linear_transfer` alone is a logistic regression on its factors and 100 components of the residual.

Every cell gets the label with the largest probability. Samples are named to our tool (`batch_key`)
in the pancreas, where donors are; of the sorted cells each sample is a type.

## Macro F1

{by_case(known, "macro_f1")}
Difference to each peer on the same cells, mean over the seeds that both have, with the 95 %
interval of a paired bootstrap over the cells ({N_DRAWS:,} draws; "ahead", "behind": all of it lies
on one side of zero):

{comparison(found[~is_unknown])}
## Calibration: expected calibration error

{by_case(known, "ece")}
## Accuracy

{by_case(known, "accuracy")}
## "Unknown" where all types are in the reference

Share of the cells that are called "Unknown", all of them false alarms. What was asked for is at
most {1 - coverage:.0%} (`coverage={coverage}`):

{by_case(known, "false_alarms")}
Accuracy of the others:

{by_case(known, "accuracy_called")}
## Seconds and memory

Of the whole call, with training, on the cells of one case; in "stored" on another machine.

{by_case(known[known["metric"] == "accuracy"], "accuracy", "seconds", 1)}
Peak memory of the process, MB:

{by_case(known[known["metric"] == "accuracy"], "accuracy", "peak_mb", 0)}"""
    if unknown.empty:
        return text
    return f"""{text}
## Types that the reference lacks

Each type with {FEW_CELLS} or more cells in the query is taken out of the reference in turn. AUROC
of the score for "this type is not in the reference", mean over the types; of the peers, of minus
the largest probability.

{by_case(unknown, "unknown_auroc")}
{comparison(found[is_unknown])}
Share of the cells of the *other* types that are called "Unknown" (false alarms; asked for
is at most {1 - coverage:.0%}):

{by_case(unknown, "false_alarms")}
Share of the cells of the type that was taken out that are called "Unknown":

{by_case(unknown, "unknown_found")}"""


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mini", "linear_transfer"])
    parser.add_argument("--strategies", nargs="*", default=["head"])
    parser.add_argument("--datasets", nargs="*", default=[], help="leave out for both")
    parser.add_argument("--splits", nargs="*", default=SPLITS, choices=SPLITS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=LARGE, help="leave the names out for all")
    parser.add_argument("--unknown", action="store_true")
    parser.add_argument("--redo", nargs="*", default=[], help="parts of names of methods")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    large = () if options.peers is None else (options.peers or LARGE)
    chosen = methods(options.models, options.strategies, large)
    splits = [*options.splits, *([UNKNOWN_SPLIT] if options.unknown else [])]
    options.out.mkdir(parents=True, exist_ok=True)

    rows, scored = [], []
    for case in cases(options.shared, options.datasets, splits, options.seeds):
        for method in chosen:
            if case.seed not in SEEDS_OF.get(method.peer, (case.seed,)):
                continue
            if case.left_out is not None and method.peer == "svm":
                continue  # no probabilities, no score
            found = predictions(method, case, options.redo)
            scores = score(found, case)
            about = {"dataset": case.dataset, "split": case.split, "seed": case.seed}
            about |= {"method": method.name, "left_out": case.left_out}
            cost = {
                "seconds": round(float(found["seconds"]), 2),
                "peak_mb": round(float(found["peak_mb"])),
            }
            rows += [about | {"metric": m, "value": round(v, 5)} | cost for m, v in scores.items()]
            main_score = scores["macro_f1" if case.left_out is None else "unknown_auroc"]
            scored.append(
                about | {"case": case.name, "score": main_score, "draws": draws_of(found, case)}
            )
            print(
                f"{case.name:45} {method.name:25} {main_score:.3f} {cost['seconds']:7.1f} s",
                flush=True,
            )
        ours = pd.DataFrame(rows)
        ours.to_csv(options.out / "annotate.csv", index=False)

    found = intervals(pd.DataFrame(scored), chosen)
    text = page(ours, found, stored_figures(options.shared))
    (options.out / "annotate.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
