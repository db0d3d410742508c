"""What `cp.tl.denoise` was chosen by: development sets that are not those of the benchmark.

    ./dev bench denoise_choices

Four sets of the shared folder's ``data/dev`` (up to 1,000 cells, 6,000 genes): half of the counts
predicts the other half, and a tenth of the non-zero entries is hidden, as in ``denoise.py``. Tried
are: no training, training of the decoder alone, training of all. Beside them the mean of 31
neighbours, and the gene-gene correlation that each invents. Written: ``denoise_choices.md``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import peers
import scipy.sparse as sp
from embed import markdown

import cellplm_tl as cp
from cellplm_tl._denoising import invented_correlation

SETS = ("pbmc_1k_10x_v2", "pbmc_sorted*", "pancreas_reference_baron2016", "lung_cell_lines_3*")
N_CELLS, N_GENES = 1000, 6000
SEED = 11
WAYS = {
    "zero-shot": None,
    "head": cp.train.TrainConfig(strategy="head"),
    "full": cp.train.TrainConfig(strategy="full"),
}
KEY = "cellplm_denoised"


def read(shared: Path, pattern: str) -> ad.AnnData:
    """Read a set, and take some of its cells and its most counted genes."""
    adata = ad.read_h5ad(sorted((shared / "data/dev").glob(f"{pattern}.h5ad"))[0])
    rows = np.random.default_rng(7).permutation(adata.n_obs)[:N_CELLS]
    adata = adata[np.sort(rows)].copy()
    adata.X = sp.csr_matrix(adata.X, dtype=np.float32)
    totals = np.asarray(adata.X.sum(0)).ravel()
    return adata[:, np.sort(np.argsort(-totals, kind="stable")[:N_GENES])].copy()


def scores(adata: ad.AnnData, way: cp.train.TrainConfig | None) -> dict[str, float]:
    """Denoise the thinned and the masked counts of a set, and score both."""
    start = time.perf_counter()
    options = {"scale": ("counts", "lognorm"), "train": way}
    cp.tl.denoise(adata, layer="thinned", **options)
    seconds = time.perf_counter() - start
    thinned = cp.metrics.denoising(
        adata.layers["thinned_truth"], adata.layers[KEY], lognorm=adata.layers[f"{KEY}_lognorm"]
    )
    record = adata.uns["cellplm"][KEY]
    coverage = record["held_out"]["coverage"]
    cp.tl.denoise(adata, layer="masked", train=way)
    masked = cp.metrics.denoising(
        adata.X, adata.layers[KEY], masked=adata.layers["masked_truth"], random_state=SEED + 100
    )
    return {
        **{name: thinned[name] for name in ("poisson_deviance", "pearson_per_cell")},
        "pearson_per_gene": thinned["pearson_per_gene"],
        "auroc": masked["auroc_masked_vs_zero"],
        "centred": masked["pearson_gene_centred"],
        "decoder_share": record["held_out"]["decoder_share"],
        "coverage_of_0.9": coverage.get("of_entries_expected_above_1", np.nan),
        "invented": record["smoothing"].get("invented", np.nan),
        "seconds": seconds,
    }


def neighbors(adata: ad.AnnData) -> dict[str, float]:
    """Score the mean of 31 neighbours, as the benchmark has it."""
    found = {}
    for layer in ("thinned", "masked"):
        counts = ad.AnnData(adata.layers[layer], obs=adata.obs, var=adata.var)
        found[layer] = peers.run("knn", "denoise", {"input": counts}, 0).arrays["denoised"]
    thinned = cp.metrics.denoising(adata.layers["thinned_truth"], found["thinned"])
    masked = cp.metrics.denoising(
        adata.X, found["masked"], masked=adata.layers["masked_truth"], random_state=SEED + 100
    )
    rng = np.random.default_rng(SEED)
    whole = adata.layers["thinned_truth"]
    first = whole.copy()
    first.data = rng.binomial(whole.data.astype(int), 0.5).astype(np.float32)
    smoothed = found["thinned"] / np.maximum(found["thinned"].sum(1, keepdims=True), 1e-12)
    smoothing = invented_correlation(smoothed, adata.layers["thinned"], first, whole - first)
    return {
        "poisson_deviance": thinned["poisson_deviance"],
        "pearson_per_cell": thinned["pearson_per_cell"],
        "pearson_per_gene": thinned["pearson_per_gene"],
        "auroc": masked["auroc_masked_vs_zero"],
        "centred": masked["pearson_gene_centred"],
        "invented": smoothing.get("invented", np.nan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cp.settings.verbosity = 0
    rows = {}
    for pattern in SETS:
        adata = read(options.shared, pattern)
        cp.pp.thin_counts(adata, random_state=SEED)
        cp.pp.mask_counts(adata, random_state=SEED)
        name = pattern.rstrip("*")
        rows[f"{name}, 31 neighbours"] = neighbors(adata)
        for way, config in WAYS.items():
            rows[f"{name}, {way}"] = scores(adata, config)
            print(f"{name}, {way}", rows[f"{name}, {way}"], flush=True)
    table = pd.DataFrame(rows).T.map(lambda v: "·" if pd.isna(v) else f"{v:.3f}")
    (options.out / "denoise_choices.md").write_text(
        f"""# Choices of denoising

Made by `./dev bench denoise_choices` on sets that the benchmark does not use ({N_CELLS} cells and
{N_GENES:,} genes at most). Half of the counts predicts the other half (deviance, less is better;
correlations of the expected log1p, for 31 neighbours of the log1p of their counts); a tenth of the
non-zero entries is hidden (AUROC against true zeros, gene-centred Pearson). `decoder_share`: weight
of the decoder beside the neighbours, chosen on held-out counts. `coverage_of_0.9`: of the 90 %
interval, over held-out entries of which a count or more is expected. `invented`: share of the
gene-gene correlation after denoising that held-out counts do not show.

{markdown(table, "set, way")}"""
    )


if __name__ == "__main__":
    main()
