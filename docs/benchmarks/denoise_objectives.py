"""Why a constant per gene wins the paper's test of denoising: the picture of the method page.

    ./dev bench denoise_objectives

The masked split of denoise.py (PBMC 1k v3, seed 0), three predictions for the same hidden entries:
the mean of a gene's non-zero values, the same in every cell; expected counts; and the model trained
by the paper's objective, on non-zero entries alone. Writes ``docs/_static/denoise_nonzero.png``
and, beside this file, ``denoise_objectives.md`` with its numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from denoise import METRICS, Case, cases, run
from embed import markdown
from matplotlib.axes import Axes

import cellplm_tl as cp
from cellplm_tl.metrics.denoising import masked_entries, score_entries

DATASET, SEED = "pbmc_1k_v3", 0
PICTURE = Path(__file__).parents[1] / "_static" / "denoise_nonzero.png"
PAGE = Path(__file__).with_suffix(".md")
SHOWN = {  # method: name, colour
    "nonzero_gene_mean": ("mean of the gene's\nnon-zero values", "C7"),
    "fine_tuned": ("expected counts\n(the default)", "C0"),
    "nonzero": ('value if not zero\n(objective="nonzero")', "C1"),
}
# The gene of the first panel: of those seen in so many of the cells, that of the largest spread.
SEEN_SHARE = (0.3, 0.7)
MIN_HIDDEN = 25

TEXT = """# Objectives of denoising

`./dev bench denoise_objectives` wrote this page and its picture: {n_hidden:,} hidden entries of
{n_cells:,} cells ({dataset}, masked split, seed {seed}).

![three predictions of the same hidden entries](../_static/denoise_nonzero.png)

Left: {gene}, seen in {seen:.0%} of the cells; each point is a cell whose count of it was hidden.
All of them are known to be above zero. The mean of the gene's non-zero values lies in the middle of
them and tells no cell from another. An expected count lies below wherever a zero was likely: that
is what it is to say, and the error of hidden entries charges for it. Middle: the error. Right: what
a denoiser is wanted for, telling cells apart by a gene, and counts that were missed from zeros.

{table}
"""


def choose_gene(case: Case, entries: pd.DataFrame) -> int:
    """Give the column of the gene to be shown."""
    seen = np.diff(case.truth.tocsc().indptr) / case.truth.shape[0]
    values = entries[entries["is_masked"]].groupby("gene")["truth"]
    number, spread = values.size(), values.std()
    of_gene = seen[number.index]
    fits = (of_gene > SEEN_SHARE[0]) & (of_gene < SEEN_SHARE[1]) & (number >= MIN_HIDDEN)
    return int(spread[fits].idxmax())


def draw(case: Case, entries: dict[str, pd.DataFrame], gene: int) -> None:
    """Draw one gene's hidden entries, the error of all, and what tells cells apart."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.4), width_ratios=(1.25, 0.7, 1.4), layout="constrained"
    )
    scores = {method: score_entries(table) for method, table in entries.items()}
    for method, table in entries.items():
        name, color = SHOWN[method]
        of_gene = table[table["is_masked"] & (table["gene"] == gene)]
        axes[0].scatter(of_gene["truth"], of_gene["predicted"], s=12, color=color, label=name)
    top = max(axes[0].get_xlim()[1], axes[0].get_ylim()[1])
    axes[0].plot([0, top], [0, top], color="0.6", lw=0.8, ls="--", zorder=0)
    axes[0].set(
        xlim=(0, top),
        ylim=(0, top),
        xlabel="true value",
        ylabel="predicted",
        title=f"{case.input.var_names[gene]}, hidden counts\n(log1p per 10,000)",
    )
    bars(axes[1], scores, {"rmse_masked": "RMSE"}, "error of hidden entries\n(less is better)")
    bars(
        axes[2],
        scores,
        {
            "pearson_gene_centred": "Pearson within genes",
            "auroc_masked_vs_zero": "AUROC, hidden counts\nagainst true zeros",
        },
        "cells told apart\n(more is better)",
    )
    chance = 0.5
    axes[2].plot([0.5, 1.5], [chance, chance], color="0.3", lw=0.8, ls=":")
    axes[2].text(1.52, chance, "chance", va="center", color="0.3", fontsize=8)
    axes[2].set_xlim(right=1.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=160)


def bars(axis: Axes, scores: dict[str, dict], metrics: dict[str, str], title: str) -> None:
    """Draw the metrics side by side, a bar for each method, with its number on top."""
    width = 0.9 / len(scores)
    for place, (method, found) in enumerate(scores.items()):
        at = np.arange(len(metrics)) + (place - (len(scores) - 1) / 2) * width
        heights = [found[metric] for metric in metrics]
        drawn = axis.bar(at, heights, 0.9 * width, color=SHOWN[method][1])
        axis.bar_label(drawn, fmt="%.2f", fontsize=8, padding=1)
    axis.set_xticks(range(len(metrics)), metrics.values())
    axis.set(title=title, xlim=(-0.6, len(metrics) - 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    options = parser.parse_args()
    cp.settings.verbosity = 0
    (case,) = cases(options.shared, [DATASET], ["masked"], [SEED])
    entries = {}
    for method in SHOWN:
        arrays = run(method, case).arrays
        # The default is judged as it is written: by the logarithm of expected counts.
        denoised = arrays.get("denoised")
        lognorm = arrays["lognorm"] if denoised is None else None
        entries[method] = masked_entries(
            case.truth, denoised, case.hidden, lognorm=lognorm, random_state=SEED + 100
        )
    gene = choose_gene(case, entries["nonzero_gene_mean"])
    draw(case, entries, gene)
    table = pd.DataFrame({method: score_entries(e) for method, e in entries.items()}).T
    table = table[list(METRICS["masked"])].map("{:.4f}".format)
    text = TEXT.format(
        n_hidden=int(entries["nonzero_gene_mean"]["is_masked"].sum()),
        n_cells=case.input.n_obs,
        dataset=DATASET,
        seed=SEED,
        gene=case.input.var_names[gene],
        seen=case.truth[:, [gene]].nnz / case.input.n_obs,
        table=markdown(table, "method"),
    )
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
