"""What `embed` says of a data set: the share it knows, and the share that lies between contexts.

    ./dev bench contexts

The second share tells samples from types, taken for samples by mistake, well enough to warn
(`TYPE_LIKE_SHARE` in cellplm_tl/tl/embed.py). Reads the data of ../shared; writes contexts.md
beside this file.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import anndata as ad
import pandas as pd

import cellplm_tl as cp

HERE = Path(__file__).parent
SETS = (
    ("samples", "dev/pancreas_reference_baron2016", "donor"),
    ("samples", "dev/pancreas_query_segerstolpe2016", "donor"),
    ("samples", "dev/lung_cell_lines_3_tian2019", "batch"),
    ("samples", "pretrain/skin_ctcl_gaydosik2019", "donor"),
    ("samples", "pretrain/nsclc_immune_zilionis2019", "donor"),
    ("samples", "pretrain/pbmc_hao2021", "batch"),
    ("samples", "pretrain/pbmc_covid_combat2022", "donor"),
    ("samples", "pretrain/t_cells_treg_tconv_deconvseq", "batch"),
    ("samples", "pretrain/a549_metastasis_vision", "batch"),
    ("samples", "spatial/lung_cosmx", "fov"),
    ("samples", "spatial/breast_xenium", "fov"),
    ("samples", "pretrain_spatial/pancreas_xenium", "fov"),
    ("types", "dev/pbmc_sorted_zheng2017", "cell_type"),
    ("types", "dev/pancreas_reference_baron2016", "cell_type"),
    ("types", "dev/pancreas_query_segerstolpe2016", "cell_type"),
    ("types", "dev/lung_cell_lines_3_tian2019", "cell_type"),
    ("types", "pretrain/breast_cell_lines_gambardella2022", "cell_type"),
    ("types", "pretrain/liver_he2020", "cell_type"),
)


def main() -> None:
    """Embed each set with each column as contexts, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "../../../shared/data")
    data = parser.parse_args().data
    cp.settings.verbosity = 0
    warnings.simplefilter("ignore")
    rows = []
    for kind, name, key in SETS:
        adata = ad.read_h5ad(data / f"{name}.h5ad")
        cp.tl.embed(adata, batch_key=key)
        record = adata.uns["cellplm"]["X_cellplm"]
        rows.append(
            {
                "contexts are": kind,
                "data": name.split("/")[1],
                "batch_key": key,
                "cells × genes": f"{adata.n_obs:,} × {adata.n_vars:,}",
                "contexts": record["contexts"]["n_contexts"],
                "known": round(record["known"], 2),
                "share between": round(record["share_between_contexts"], 2),
            }
        )
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows).sort_values(["contexts are", "share between"])
    head = "# What is known, and what lies between contexts\n\n"
    head += "`./dev bench contexts` wrote this page.\n\n"
    (HERE / "contexts.md").write_text(head + table.to_markdown(index=False) + "\n")


if __name__ == "__main__":
    main()
