"""Build the gene table of the package from the compiled source table.

The source is ``human_genes.tsv.gz`` of the project's shared folder: HGNC symbols joined with the
gene lists of Ensembl/GENCODE and 10x Genomics. This script checks what the resolver relies on,
leaves out the columns that it does not use, and writes

* ``cellplm_tl/data/genes.tsv.xz``: one row per gene,
* ``cellplm_tl/data/genes.json``: where the rows come from, versions, licences, digests.

The same source gives the same bytes. Run it from the root of the repository::

    python scripts/build_gene_table.py [--source ../shared/genes/human_genes.tsv.gz]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "cellplm_tl" / "data" / "genes.tsv.xz"
CARD = TARGET.with_name("genes.json")
SIZE_LIMIT = 1_500_000

COLUMNS = (
    "ensembl_id",
    "symbol",
    "locus_group",
    "previous_symbols",
    "alias_symbols",
    "other_ensembl_ids",
)

# Where each list was read: repository, path, commit. Only names, ids and kinds of loci were taken.
ENSEMBL = "Ensembl and GENCODE data: no restriction on use"
SOURCES = [
    {
        "source": "HGNC complete set: symbols, previous symbols, aliases, locus types, Ensembl ids",
        "version": "2024-10-18",
        "licence": "CC0 1.0",
        "from": "maximilianh/phenotypes data/hgnc_complete_set.txt.gz 0236d05",
    },
    {
        "source": "HGNC of a year later: renamed symbols, newer entries",
        "version": "2025-10-07",
        "licence": "CC0 1.0 (HGNC; the repository itself is AGPL-3)",
        "from": "cBioPortal/datahub-study-curation-tools gene-table-update, "
        "Gene_Table_v7_HGNC_Oct_07_2025/gene-info-Oct-07-2025.txt d8d2fc2",
    },
    {
        "source": "GENCODE 48 (Ensembl 114), 44 and 38: ids, names, biotypes",
        "version": "2025, 2023, 2021",
        "licence": ENSEMBL,
        "from": "chanzuckerberg/single-cell-curation genes_homo_sapiens.csv.gz 65b419f, eb8e5480, "
        "24b50945 (MIT)",
    },
    {
        "source": "Ensembl 112 or so: ids, also those on alternative haplotypes and patches",
        "version": "2024-08",
        "licence": ENSEMBL + " (the repository itself is GPL-3)",
        "from": "cantinilab/scPRINT data/main/biomart_pos.parquet 4acc1a4",
    },
    {
        "source": "GENCODE 30, by its size: ids, names",
        "version": "2019",
        "licence": ENSEMBL,
        "from": "lattias/ml4fg_final_project genes.tsv c7a193f (MIT)",
    },
    {
        "source": "10x Genomics hg19 1.2.0: names given to ids",
        "version": "2016",
        "licence": ENSEMBL,
        "from": "biocswirl-dev-team/BiocSwirl_scRNAseq features.tsv.gz d22ec53",
    },
    {
        "source": "a GRCh38 list between Ensembl 84 and 91: names given to ids",
        "version": "about 2017",
        "licence": ENSEMBL,
        "from": "june-zhang-bioinfo/donor-demux-nf data/genes.tsv 925dd2e",
    },
    {
        "source": "10x Genomics GRCh38 3.0.0: names given to ids",
        "version": "2018",
        "licence": ENSEMBL,
        "from": "SIAT-Fang/scCAE_data data/features.tsv.gz 1be76e6",
    },
    {
        "source": "10x Genomics GRCh38-2020-A: names given to ids",
        "version": "2020",
        "licence": ENSEMBL,
        "from": "jeong2624/scRNA-seq-project filtered_feature_bc_matrix/features.tsv.gz 590d80d",
    },
    {
        "source": "10x Genomics GRCh38-2024-A: names given to ids",
        "version": "2024",
        "licence": ENSEMBL,
        "from": "merve-ozdemir/10x-practice filtered_feature_bc_matrix/features.tsv.gz a02a5e2",
    },
]

CITATION = [
    "Seal RL et al., Genenames.org: the HGNC resources in 2023, Nucleic Acids Research 2023",
    "Mudge JM et al., GENCODE 2025, Nucleic Acids Research 2025",
]


def read_source(path: Path) -> list[dict[str, str]]:
    """Rows of the source table as dictionaries of its columns."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        header, *lines = file.read().splitlines()
    names = header.split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def check(rows: list[dict[str, str]]) -> None:
    """Stop with a sentence if the rows break what the resolver takes for granted."""
    ids = [row["ensembl_id"] for row in rows if row["ensembl_id"]]
    others = [i for row in rows for i in row["other_ensembl_ids"].split("|") if i]
    symbols = [row["symbol"].casefold() for row in rows if row["symbol"]]
    wrong = [i for i in ids + others if not re.fullmatch(r"ENSG\d{11}", i)]
    if wrong:
        raise SystemExit(f"{len(wrong)} ids are no Ensembl gene ids, the first is {wrong[0]!r}")
    if len(set(ids + others)) < len(ids + others):
        raise SystemExit("an Ensembl id stands in two places; it must lead to one gene")
    if len(set(symbols)) < len(symbols):
        raise SystemExit("two genes have the same symbol when case is ignored")
    if not all(row["ensembl_id"] or row["symbol"] for row in rows):
        raise SystemExit("a row has neither id nor symbol")


def digest(data: bytes) -> str:
    """Hexadecimal sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Read, check, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, default=ROOT.parent / "shared" / "genes" / "human_genes.tsv.gz"
    )
    source = parser.parse_args().source
    rows = read_source(source)
    check(rows)
    lines = ["\t".join(COLUMNS), *("\t".join(row[name] for name in COLUMNS) for row in rows)]
    plain = ("\n".join(lines) + "\n").encode()
    packed = lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > SIZE_LIMIT:
        raise SystemExit(f"the table takes {len(packed):,} bytes, more than {SIZE_LIMIT:,}")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(packed)
    card = {
        "file": TARGET.name,
        "rows": len(rows),
        "rows_with_id": sum(bool(row["ensembl_id"]) for row in rows),
        "columns": list(COLUMNS),
        "sources": SOURCES,
        "licence": "a compilation of names and ids; no part of it is under copyleft",
        "citation": CITATION,
        "built_by": "scripts/build_gene_table.py",
        "sha256_source": digest(source.read_bytes()),
        "sha256_plain": digest(plain),
    }
    CARD.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(rows):,} genes, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
