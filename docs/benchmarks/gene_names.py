"""How many gene names are found, how many of them wrongly, and how fast.

Prints the tables of ``docs/methods/genes.md``::

    python docs/benchmarks/gene_names.py [--data ../shared/data] [--features FILE …]

``--data`` is a folder of h5ad files (the project's pool by default; left out where it is not
there), ``--features`` are gene lists of 10x Genomics (``features.tsv.gz``: id, name, …). Where a
list gives ids and names, the names are looked up alone and compared with the ids.
"""

from __future__ import annotations

import argparse
import lzma
import statistics
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from cellplm_tl._genes import choose_gene_names, mouse_share, resolve

ROOT = Path(__file__).resolve().parents[2]
TEST_DATA = ROOT / "tests" / "data"

TIMING = """
import random, time
from cellplm_tl import _genes
start = time.process_time()
_genes.resolve(["no such gene"])
loaded = time.process_time()
names = [name for name in _genes._table().symbols if name]
names = random.Random(0).sample(names, 36_000)
begin = time.process_time()
_genes.resolve(names)
print(loaded - start, time.process_time() - begin)
"""


def row(title: str, names: pd.Index, ids: pd.Series | None = None) -> list[str]:
    """Look up names alone; compare with ids where there are some."""
    found = resolve(names)
    numbers = found.counts()
    is_found = found.gene_ids != ""
    wrong = "·"
    if ids is not None:
        truth = resolve(ids).gene_ids
        is_wrong = is_found & (truth != "") & (found.gene_ids != truth)
        wrong = f"{int(is_wrong.sum()):,}"
    return [
        title,
        f"{len(names):,}",
        f"{is_found.mean():.2%}",
        wrong,
        *(f"{numbers.get(s, 0):,}" for s in ("previous", "alias", "repaired")),
        *(f"{numbers.get(s, 0):,}" for s in ("no_id", "ambiguous", "unknown")),
    ]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows as a table of Markdown."""
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join(["---"] * len(header)) + " |")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    print()


def rows_of_features(paths: list[Path]) -> list[list[str]]:
    """Rows for gene lists of 10x."""
    lists = [pd.read_csv(path, sep="\t", header=None, na_filter=False) for path in paths]
    lists = [genes[genes[0].str.startswith("ENSG")] for genes in lists]
    return [
        row(path.name.removesuffix(".gz").removesuffix(".tsv"), pd.Index(genes[1]), genes[0])
        for path, genes in zip(paths, lists, strict=True)
    ]


def rows_of_h5ad(paths: list[Path]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows for h5ad files: those with names and ids, those with names only."""
    with_ids, without = [], []
    for path in paths:
        var = ad.read_h5ad(path, backed="r").var
        chosen, where = choose_gene_names(var)
        if where != "var_names":
            with_ids.append(row(path.stem, var.index, pd.Series(chosen)))
        elif not var.index.str.startswith("ENSG").any():
            without.append(row(path.stem, var.index))
    return with_ids, without


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--features", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    columns = ["names", "found", "another gene's", "previous", "alias", "repaired"]
    columns += ["no id", "ambiguous", "unknown"]

    with_ids, without = rows_of_h5ad(sorted(options.data.glob("*/*.h5ad")))
    print("Names looked up alone, compared with the ids of the same list\n")
    print_table(["list", *columns], rows_of_features(options.features) + with_ids)
    print("Names without ids\n")
    pbmc68k = sc.datasets.pbmc68k_reduced().var_names
    print_table(["list", *columns], [row("scanpy pbmc68k_reduced", pbmc68k), *without])
    shares = [float(cells[2].rstrip("%")) for cells in without]
    if shares:
        print(f"median of {len(shares)} files {statistics.median(shares):.2f} %\n")

    packed = (TEST_DATA / "cellplm_85M_gene_ids.txt.xz").read_bytes()
    ids = lzma.decompress(packed).decode().split()
    found = resolve(ids)
    print(
        f"CellPLM 85M: {np.mean(found.gene_ids != ''):.2%} of {len(ids):,} ids, "
        f"{len(set(found.gene_ids)):,} genes; {found.counts()}"
    )
    of_model = set(found.gene_ids)
    for path in options.features:
        names = pd.read_csv(path, sep="\t", header=None, na_filter=False)[1]
        n_shared = len(of_model & set(resolve(names).gene_ids))
        print(f"CellPLM 85M genes found from the names of {path.name}: {n_shared:,}")
    n_shared = len(of_model & set(resolve(pbmc68k).gene_ids))
    print(f"CellPLM 85M genes found from the names of pbmc68k_reduced: {n_shared:,}\n")

    mouse = pd.read_csv(TEST_DATA / "mouse_symbols.tsv", sep="\t")["symbol"]
    print(f"mouse symbols: {mouse_share(mouse):.1%} spelled like mouse genes")
    for title, names in (("as they are", mouse), ("in upper case", mouse.str.upper())):
        print(f"mouse symbols {title}: {np.mean(resolve(names).gene_ids != ''):.1%} found")

    times = [
        [float(t) for t in subprocess.check_output([sys.executable, "-c", TIMING]).split()]
        for _ in range(5)
    ]
    load, look_up = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"\nprocessor seconds: first call {load:.2f}, 36,000 names {look_up:.2f}")


if __name__ == "__main__":
    main()
