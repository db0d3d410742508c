"""The choice of `mini`: whole tissues held out of spectrum and network, one thing changed a time.

    ./dev bench default_model
    ./dev bench default_model --folds C --variants "as shipped" "no network" --steps 200

Four groups of tissues (`FOLDS`) are left out of the pretraining pool in turn. The spectrum is built
without them (scripts/build_spectrum.py), the network is trained without them (scripts/mini.toml for
fewer steps at a higher learning rate), and their labelled sets are embedded by `cp.tl.embed` and
scored by `cp.metrics.clustering`: whole, with counts thinned to 20 %, and on 300 genes. Two sets
come a second time with two made-up technologies. No figure here is of a tissue that the model has
seen, so variants may be chosen by them, and the development sets stay for the judgement.

Scores are appended to ``default_model.csv`` as they come. A row that is there is not made again, so
that an interrupted run goes on; a change of scripts/mini.toml or of the options makes new rows, a
change of the package's code does not (remove the file then). Spectra are kept in build/folds.
``default_model.md`` is written from the rows of this configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from embed import BOOTSTRAP_DRAWS, SCORES, SPLITS, THINNED_TO, Case, markdown, pca, zero_shot

import cellplm_tl as cp
from cellplm_tl import _genes
from cellplm_tl._inference import encode
from cellplm_tl._weights import NO_CARD, Model, write_directory
from cellplm_tl.models import CellPLM
from cellplm_tl.train.contexts import Source
from cellplm_tl.train.fit import fit
from cellplm_tl.train.pretrain import (
    PretrainConfig,
    _plain,
    _sources,
    bound,
    build,
    place_components,
    validation_loss,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "scripts"))
from store_linear_transfer import floor_network  # noqa: E402

NAME = "default_model"
MAX_CELLS = 1_500
PANEL_GENES = 300
PANEL_SHARE = 0.01  # of the cells, in which a gene of a panel is seen
TECHNOLOGY_SPREAD, TECHNOLOGY_DEPTH = 0.4, 0.4  # of the second made-up technology
# Of the short runs.
LEARNING_RATE, AVERAGE, WARMUP, KL_WARMUP = 5e-4, 0.99, 50, 100


@dataclass(frozen=True)
class Labelled:
    """A labelled set of the pool."""

    name: str
    file: str
    labels_key: str = "cell_type"
    batch_key: str | None = None
    is_split: bool = False  # into two made-up technologies


@dataclass(frozen=True)
class Fold:
    """Sets that are held out together, and what is scored."""

    held_out: tuple[str, ...]
    labelled: tuple[Labelled, ...]


def _labelled(name: str, **options: str) -> Labelled:
    return Labelled(name, name, **options)


FOLDS = {
    "A": Fold(  # liver, embryo
        ("liver_he2020", "gastrula_tyser2021", "embryo_blakeley2015"),
        (
            _labelled("liver_he2020", labels_key="cell_type_merged"),
            _labelled("gastrula_tyser2021"),
            Labelled("liver_2", "liver_he2020", labels_key="cell_type_merged", is_split=True),
        ),
    ),
    "B": Fold(  # lung, breast and other cell lines
        (
            "nsclc_immune_zilionis2019",
            "nsclc_dendritic_zilionis2019",
            "lung_control_ipfatlas_001C",
            "a549_metastasis_vision",
            "breast_cell_lines_gambardella2022",
            "cell_lines_pollen2014",
            "sorted_cell_lines_cimseq",
        ),
        (
            _labelled("nsclc_immune_zilionis2019"),
            _labelled("lung_control_ipfatlas_001C"),
            _labelled("breast_cell_lines_gambardella2022"),
            _labelled("cell_lines_pollen2014"),
            Labelled("breast_2", "breast_cell_lines_gambardella2022", is_split=True),
        ),
    ),
    "C": Fold(  # brain, pancreas
        (
            "fetal_cortex_camp2015",
            "fetal_cortex_pollen2014",
            "gbm_darmanis2017",
            "pancreas_celseq_grun_muraro_panc8",
            "fetal_pancreas_cimseq",
        ),
        (
            _labelled("fetal_cortex_camp2015", batch_key="batch"),
            _labelled("pancreas_celseq_grun_muraro_panc8", batch_key="assay"),
        ),
    ),
    "D": Fold(  # some sets of blood; others stay
        ("pbmc_4k_10x_v2", "pbmc_5prime_10x", "pbmc_hao2021", "t_cells_treg_tconv_deconvseq"),
        (_labelled("t_cells_treg_tconv_deconvseq", batch_key="condition"),),
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to embed."""

    name: str
    run: dict | None = None  # what differs from scripts/mini.toml; None: no network
    read: dict = field(default_factory=dict)  # config fields of the network that embeds


PCA = "PCA"
START = "no network: panel sums and unit length (start of mini)"
SHIPPED = "as shipped"
VARIANTS = (
    Variant(PCA),
    Variant("no network: linear_transfer"),
    Variant("no network: panel sums", read={"target_sum": "panel"}),
    Variant("no network: unit length", read={"unit_length": True}),
    Variant(START, read={"target_sum": "panel", "unit_length": True, "residual_weight": 0.5}),
    Variant(SHIPPED, {}),
    Variant("latent alone", {}, read={"factor_share": 0.0}),
    Variant("agreement 0", {"agreement": 0.0}),
    Variant(
        "Gaussian latent (Table 10: w/o mixture of Gaussian)", {"network": {"latent": "gaussian"}}
    ),
    Variant("linear latent (Table 10: w/o latent distribution)", {"network": {"latent": "linear"}}),
    Variant("MLP encoder (Table 10: w/o transformer encoder)", {"network": {"encoder": "mlp"}}),
    Variant("paper's masks alone, so no agreement", {"corruption": {"thin": 0.0}}),
    Variant("no platform effects", {"corruption": {"platform": 0.0}}),
    Variant("no panels, no further thinning", {"corruption": {"panel": 0.0, "depth": 0.0}}),
)


# ------------------------------------------------------------------------------------------ cases


def cases(fold: Fold, pool: Path) -> Iterator[Case]:
    """Yield the labelled sets of a fold in every split."""
    for labelled in fold.labelled:
        adata = ad.read_h5ad(pool / f"{labelled.file}.h5ad")
        if adata.n_obs > MAX_CELLS:
            rows = np.random.default_rng(0).choice(adata.n_obs, MAX_CELLS, replace=False)
            adata = adata[np.sort(rows)]
        labels = adata.obs[labelled.labels_key].astype(str).to_numpy(dtype=str)
        counts, genes = counts_of_genes(adata)
        batches = None
        if labelled.is_split:
            counts, batches = two_technologies(counts)
        elif labelled.batch_key is not None:
            batches = adata.obs[labelled.batch_key].astype(str).to_numpy(dtype=str)
        for split in SPLITS:
            rng = np.random.default_rng(sum(labelled.name.encode()))
            matrix, columns = counts.copy(), np.arange(len(genes))
            if split == "thin20":
                matrix.data = rng.binomial(matrix.data.astype(int), THINNED_TO).astype(np.float32)
                matrix.eliminate_zeros()
            elif split == "panel300":
                seen = np.flatnonzero(matrix.getnnz(axis=0) / matrix.shape[0] > PANEL_SHARE)
                columns = np.sort(rng.choice(seen, min(PANEL_GENES, seen.size), replace=False))
                matrix = matrix[:, columns]
            kept = np.asarray(matrix.sum(axis=1)).ravel() > 0
            case = ad.AnnData(matrix[kept], var=pd.DataFrame(index=genes[columns]))
            case.obs_names = np.flatnonzero(kept).astype(str)
            if batches is not None:
                case.obs["batch"] = batches[kept]
            yield Case(
                labelled.name,
                split,
                case,
                labels[kept],
                None if batches is None else batches[kept],
                None if batches is None else "batch",
            )


def counts_of_genes(adata: ad.AnnData) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return counts (cells, genes), columns of one gene summed, and the genes' Ensembl ids."""
    names, _ = _genes.choose_gene_names(adata.var)
    ids = _genes.resolve(names).gene_ids.astype(str)
    found = np.flatnonzero(ids != "")
    genes, position = np.unique(ids[found], return_inverse=True)
    to_genes = sp.csr_matrix(
        (np.ones(found.size, np.float32), (found, position)), shape=(ids.size, genes.size)
    )
    counts = sp.csr_matrix(sp.csr_matrix(adata.X, dtype=np.float32) @ to_genes)
    counts.data = np.rint(counts.data)
    return counts, genes


def two_technologies(counts: sp.csr_matrix) -> tuple[sp.csr_matrix, np.ndarray]:
    """Let a random half of the cells be measured by another technology: (counts, technologies).

    It catches a share of a gene's molecules that is log-normal over the genes.
    """
    rng = np.random.default_rng(1)
    is_second = rng.integers(0, 2, counts.shape[0]) == 1
    factors = np.exp(rng.normal(0, TECHNOLOGY_SPREAD, counts.shape[1])).astype(np.float32)
    caught = np.clip(TECHNOLOGY_DEPTH * factors, 0, 1)
    of_second = np.repeat(is_second, np.diff(counts.indptr))
    counts = counts.copy()
    counts.data[of_second] = rng.binomial(
        counts.data[of_second].astype(int), caught[counts.indices[of_second]]
    )
    counts.eliminate_zeros()
    return counts, is_second.astype(int).astype(str)


# ----------------------------------------------------------------------------------------- models


def floor_of(name: str, pool: Path, folds: Path) -> Path:
    """Return the model `linear_transfer` of the pool without a fold; it is made where it lacks."""
    folder = folds / name
    held_out = FOLDS[name].held_out
    if not (folder / "spectrum.npz").is_file():
        command = [sys.executable, str(ROOT / "scripts/build_spectrum.py")]
        command += ["--pool", str(pool), "--out", str(folder), "--exclude", *held_out]
        subprocess.run(command, check=True)
    spectrum = np.load(folder / "spectrum.npz")
    expected = sorted({file.stem for file in pool.glob("*.h5ad")} - set(held_out))
    if sorted(spectrum["set_names"]) != expected:
        raise SystemExit(f"{folder} holds the spectrum of other sets: remove it.")
    path = folder / "floor"
    if path.exists():
        return path
    network = floor_network(spectrum)
    return write_directory(path, network, {}, NO_CARD, "float16", shared=None)


def configured(shipped: PretrainConfig, change: dict, steps: int) -> PretrainConfig:
    """Return the run with a change, for fewer steps."""
    values = dict(change)
    values["network"] = shipped.network | change.get("network", {})
    values["corruption"] = replace(shipped.corruption, **change.get("corruption", {}))
    values["train"] = replace(
        shipped.train, steps=steps, learning_rate=LEARNING_RATE, average=AVERAGE, warmup=WARMUP
    )
    return replace(shipped, kl_warmup=KL_WARMUP, **values)


def train(config: PretrainConfig, sources: Sequence[Source]) -> CellPLM:
    """Pretrain as `cellplm_tl.train.pretrain` does; the last averaged weights are kept."""
    network = build(config)
    if network.config.latent == "mixture":
        place_components(network, sources, config)
    return fit(network, partial(bound, sources=sources, config=config, panels={}), config.train)


def reread(network: CellPLM, fields: dict) -> CellPLM:
    """Return a network of the same weights with other fields of its config."""
    changed = CellPLM(replace(network.config, **fields))
    changed.load_state_dict(network.state_dict())
    return changed.eval()


def components_in_use(network: CellPLM, sources: Sequence[Source]) -> float:
    """Return exp of the entropy of the mean q(y|z), every set at weight 1; NaN without mixture."""
    if network.config.latent != "mixture":
        return np.nan
    with torch.no_grad():
        usage = torch.stack(
            [
                network.latent.components(
                    torch.from_numpy(encode(network, source.cells).latent)
                ).mean(0)
                for source in sources
            ]
        ).mean(0)
    return float(torch.special.entr(usage).sum().exp())


def likelihood_gained(
    network: CellPLM, held_out: Sequence[Source], shipped: PretrainConfig
) -> float:
    """Return nats per hidden count above the context's mean; the same examples for all networks."""
    halves = replace(shipped, corruption=replace(shipped.corruption, thin=1.0), agreement=0.0)
    with torch.no_grad():
        return -validation_loss(network, sources=held_out, config=halves)


# ------------------------------------------------------------------------------------------- runs


def run_of(variant: Variant, shipped: PretrainConfig, options: argparse.Namespace) -> str:
    """Return a short name of all that the configuration says of a variant's figures."""
    config = None
    if variant.run is not None:
        config = _plain(configured(shipped, variant.run, options.steps))
        del config["files"], config["out"], config["start"], config["validation"]
    text = json.dumps([config, variant.read, options.seeds], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


KEY = ["fold", "dataset", "split", "variant", "run"]
FACTS = ["likelihood", "components", "train_seconds"]
COLUMNS = [*KEY, "score", *SCORES, *FACTS]


def shipped_config(options: argparse.Namespace) -> PretrainConfig:
    """Read scripts/mini.toml, on the pool of the shared folder."""
    pool = sorted((options.shared / "data/pretrain").glob("*.h5ad"))
    shipped = PretrainConfig.from_toml(ROOT / "scripts/mini.toml")
    return replace(shipped, files=tuple(map(str, pool)), validation=())


def run_fold(name: str, options: argparse.Namespace) -> None:
    """Make the rows of a fold that are not in the table yet."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cp.settings.verbosity = 0
    fold, table = FOLDS[name], options.out / f"{NAME}.csv"
    done = set(pd.read_csv(table)[KEY].itertuples(index=False, name=None))
    shipped = shipped_config(options)
    all_cases = list(cases(fold, options.shared / "data/pretrain"))

    # What has to be made, by training: variants that only read a network otherwise share it.
    missing: dict[str, list[tuple[Variant, str, list[Case]]]] = {}
    for variant in options.chosen:
        run = run_of(variant, shipped, options)
        todo = [c for c in all_cases if (name, c.dataset, c.split, variant.name, run) not in done]
        if todo:
            missing.setdefault(json.dumps(variant.run), []).append((variant, run, todo))
    if not missing:
        return

    floor = floor_of(name, options.shared / "data/pretrain", options.folds_folder)
    shipped = replace(shipped, start=str(floor), validation=fold.held_out)
    start = cp.models.load(floor).network
    sources, held_out = [], []
    if set(missing) - {"null"}:
        sources, held_out = _sources(shipped, start.config.genes)
    for variants in missing.values():
        network, facts = start, {}
        change = variants[0][0].run
        if change is not None:
            began = time.perf_counter()
            network = train(configured(shipped, change, options.steps), sources)
            facts = {
                "train_seconds": round(time.perf_counter() - began, 1),
                "likelihood": round(likelihood_gained(network, held_out, shipped), 4),
                "components": round(components_in_use(network, sources), 2),
            }
        for variant, run, todo in variants:
            model = Model(reread(network, variant.read), variant.name)
            for case in todo:
                method = pca if variant.name == PCA else zero_shot(model, case.batch_key)
                scores = scored(method(case.adata.copy()), case, options.seeds)
                key = (name, case.dataset, case.split, variant.name, run)
                row = dict(zip(KEY, key, strict=True)) | scores | facts
                line = pd.DataFrame([row]).reindex(columns=COLUMNS)
                with table.open("a") as file:  # lines of several folds do not mix
                    file.write(line.to_csv(index=False, header=False))
                print(
                    f"{name} {case.dataset:34} {case.split:9} {scores['score']:.3f} {variant.name}",
                    flush=True,
                )


def scored(points: np.ndarray, case: Case, n_seeds: int) -> dict[str, float]:
    """Return the scores of a representation, and their mean."""
    found = cp.metrics.clustering(points, case.labels, case.batches, leiden_seeds=range(n_seeds))
    scores = {name: round(found[name], 5) for name in SCORES if name in found}
    return scores | {"score": round(float(np.nanmean(list(scores.values()))), 5)}


# ------------------------------------------------------------------------------------------- page


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over cases: the bootstrap."""
    rng = np.random.default_rng(0)
    draws = rng.choice(differences, (BOOTSTRAP_DRAWS, len(differences))).mean(1)
    return tuple(np.quantile(draws, [0.025, 0.975]))


def number(value: float, form: str = ".3f") -> str:
    """Write a number, or a dot for none."""
    return "·" if np.isnan(value) else format(value, form)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return texts, variants × measures."""
    by_case = rows.pivot_table(
        index="variant", columns=["dataset", "split"], values="score", observed=True
    )
    lines = {}
    for variant, own in rows.groupby("variant", observed=True):
        line = {"score": number(own["score"].mean())}
        if START in by_case.index and variant != START:
            differences = (by_case.loc[variant] - by_case.loc[START]).to_numpy()
            low, high = interval(differences)
            line["to start of mini"] = f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        for split in SPLITS:
            line[split] = number(own.loc[own["split"] == split, "score"].mean())
        for metric, title in {
            "knn_accuracy": "kNN accuracy",
            "ari": "ARI",
            "nmi": "NMI",
            "silhouette_label": "silhouette",
            "batch_mixing": "mixing",
        }.items():
            line[title] = number(own[metric].mean())
        of_fold = own.groupby("fold")[FACTS].first().mean()
        line["likelihood"] = number(of_fold["likelihood"])
        line["components in use"] = number(of_fold["components"], ".1f")
        line["training, s"] = number(of_fold["train_seconds"], ".0f")
        lines[variant] = line
    return pd.DataFrame.from_dict(lines, orient="index").fillna("·")


def page(rows: pd.DataFrame, options: argparse.Namespace) -> str:
    """Write the page of results from the rows of this configuration."""
    n_cases = len(rows.drop_duplicates(["dataset", "split"]))
    count = rows.groupby("variant")["score"].size()
    whole = [v.name for v in VARIANTS if count.get(v.name, 0) == n_cases]
    partly = [v.name for v in VARIANTS if 0 < count.get(v.name, 0) < n_cases]
    left_out = f"Not on all cases yet, so left out: {'; '.join(partly)}.\n\n" if partly else ""
    rows = rows[rows["variant"].isin(whole)].copy()
    rows["variant"] = pd.Categorical(rows["variant"], whole)
    by_set = rows.pivot_table(
        index="variant", columns="dataset", values="score", observed=True, sort=False
    )
    names = [labelled.name for fold in FOLDS.values() for labelled in fold.labelled]
    by_set = by_set.reindex(whole)[[n for n in names if n in by_set]].map(number)
    folds = "; ".join(
        f"{name}: {', '.join(FOLDS[name].held_out)}" for name in sorted(rows["fold"].unique())
    )
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
    return f"""# The choice of the default model

Made by `./dev bench {NAME}` ({machine}); every score is in `{NAME}.csv`.
Tissues are held out of spectrum and network together, and their labelled sets are scored:
{n_cases} cases, a set of at most {MAX_CELLS:,} cells whole, thinned to {THINNED_TO:.0%}, or on
{PANEL_GENES} genes. Networks: scripts/mini.toml for {options.steps} steps at a learning rate of
{LEARNING_RATE}, one seed, with the change that the name tells. Held out ({folds}).

## Variants

Score: mean of ARI and NMI ({options.seeds} Leiden seeds), kNN accuracy and macro F1, silhouette,
and batch mixing where there are batches; means over the cases. Difference to the start of mini:
95 % interval of a paired bootstrap over cases (the three splits of a set are no independent cases:
the intervals are rather too narrow). Likelihood: nats per hidden count above the context's mean, on
the held-out sets. Components in use: exp of the entropy of the mean q(y|z) over the pool.

{left_out}{markdown(summary(rows), "variant")}
## Sets

Mean score over the splits; `liver_2` and `breast_2` have two made-up technologies.

{markdown(by_set, "variant")}"""


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", nargs="*", choices=list(FOLDS), default=list(FOLDS))
    parser.add_argument(
        "--variants", nargs="*", default=[""], help="parts of names; all by default"
    )
    parser.add_argument("--steps", type=int, default=1200, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="of Leiden")
    parser.add_argument("--workers", type=int, default=2, help="folds at a time, a thread each")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--folds-folder", type=Path, default=ROOT / "build/folds")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    options.chosen = [v for v in VARIANTS if any(part in v.name for part in options.variants)]
    if not options.chosen:
        parser.error(f"no such variant; there are: {'; '.join(v.name for v in VARIANTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / f"{NAME}.csv"
    if not table.exists():
        table.write_text(",".join(COLUMNS) + "\n")

    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    os.environ.update(dict.fromkeys(threads, "1"))  # for the processes that are started now
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as processes:
        for result in [processes.submit(run_fold, name, options) for name in options.folds]:
            result.result()

    shipped = shipped_config(options)
    runs = {(v.name, run_of(v, shipped, options)) for v in VARIANTS}
    rows = pd.read_csv(table).drop_duplicates(KEY, keep="last")
    is_current = [pair in runs for pair in zip(rows["variant"], rows["run"], strict=True)]
    text = page(rows[is_current], options)
    (options.out / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
