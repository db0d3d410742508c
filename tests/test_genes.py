"""The resolver of gene names: every known case, properties over the whole table, whole matrices."""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given
from hypothesis import strategies as st

from cellplm_tl import _genes
from cellplm_tl._errors import GenesError, GenesWarning, SlotError
from cellplm_tl._genes import (
    STATUSES,
    biotype,
    canonical,
    check_coverage,
    check_names,
    choose_gene_names,
    is_control_probe,
    mouse_share,
    resolve,
    symbols,
)

DATA = Path(__file__).parent / "data"
SHIPPED = Path(_genes.__file__).parent / "data"

# How the names of each kind of case are found; together with the id this pins every case down.
STATUS_OF_KIND = {
    "approved_symbol": {"symbol"},
    "approved_with_punctuation": {"symbol"},
    "approved_MT": {"symbol"},
    "approved_IG_TR": {"symbol"},
    "approved_lncRNA_pseudogene": {"symbol"},
    "alias_of_other_gene": {"symbol"},
    "previous_symbol_reused": {"symbol"},
    "case_insensitive": {"repaired"},
    "mouse_style_name": {"repaired"},
    "previous_symbol": {"previous"},
    "previous_beats_alias": {"previous"},
    "previous_symbol_wrong_case": {"repaired"},
    "alias": {"alias", "previous", "repaired"},  # EpCAM is EPCAM in the wrong case
    "ambiguous_alias": {"ambiguous"},
    "ambiguous_previous": {"ambiguous"},
    "clone_name": {"previous", "symbol"},
    "clone_name_R": {"repaired"},
    "clone_name_ambiguous": {"ambiguous"},
    "excel_date": {"repaired", "ambiguous"},
    "excel_date_R": {"repaired", "ambiguous"},
    "ensembl_id": {"ensembl"},
    "ensembl_version": {"ensembl"},
    "chr21_artifact_id": {"ensembl"},
    "PAR_Y": {"ensembl", "retired"},
    "second_id_of_symbol": {"retired"},
    "alt_haplotype_id": {"retired"},
    "retired_id": {"retired"},
    "id_without_gene": {"unknown"},
    "R_or_underscore": {"repaired"},
    "make_unique_suffix": {"repaired"},
    "genome_prefix_human": {"repaired"},
    "genome_prefix_mouse": {"unknown"},
    "rfam_family": {"unknown"},
    "control_probe": {"unknown"},
    "multi_gene_probe": {"unknown"},
    "junk": {"unknown"},
    "mouse_only_name": {"unknown"},
    "locus_without_id": {"no_id"},
    "blank_around": {"symbol", "previous"},
}


def read_cases() -> list[dict[str, str]]:
    with (DATA / "resolve_cases.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


CASES = read_cases()


@pytest.fixture(scope="module")
def table():
    return _genes._table()


@pytest.fixture(scope="module")
def approved(table):
    """Ids and symbols of the genes that have both."""
    both = [(i, s) for i, s in zip(table.gene_ids, table.symbols, strict=True) if i and s]
    return np.array(both, dtype=object)


@pytest.fixture(scope="module")
def mouse_symbols():
    """400 protein-coding genes of the mouse (GENCODE M37), drawn at random."""
    return pd.read_csv(DATA / "mouse_symbols.tsv", sep="\t")["symbol"].tolist()


@pytest.fixture(scope="module")
def model_ids():
    """Gene list of the released 85M checkpoint (OmicsML/CellPLM, BSD-2), in its order."""
    return lzma.open(DATA / "cellplm_85M_gene_ids.txt.xz", "rt").read().split()


# ---------------------------------------------------------------------------------------- cases


def test_all_cases_are_there():
    assert len(CASES) == 286
    assert sum(not case["expected_ensembl"] for case in CASES) == 79
    assert {case["kind"] for case in CASES} == set(STATUS_OF_KIND)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}:{case['input']}")
def test_case(case):
    found = resolve([case["input"]])
    assert found.gene_ids[0] == case["expected_ensembl"]
    assert found.status[0] in STATUS_OF_KIND[case["kind"]]


def test_cases_together_give_the_same():
    found = resolve([case["input"] for case in CASES])
    assert found.gene_ids.tolist() == [case["expected_ensembl"] for case in CASES]


@pytest.mark.parametrize(
    ("name", "gene_id", "status"),
    [
        # a symbol in any spelling comes before an alias
        ("Met", "ENSG00000105976", "repaired"),  # SLTM has the alias Met
        ("NKX6.1", "ENSG00000163623", "repaired"),  # NKX6-2 has the alias NKX6.1
        # what make.names of R makes of a hyphen and a number is not a suffix of make.unique
        ("MIR16.1", "ENSG00000208006", "repaired"),  # MIR16 is a previous symbol of GDE1
        # both at once
        ("HLA.A.1", "ENSG00000206503", "repaired"),
        ("HLA-A-1", "ENSG00000206503", "repaired"),
        # ids in other forms
        ("ensg00000198851", "ENSG00000198851", "ensembl"),
        ("ENSGR0000182378.10", "ENSG00000182378", "ensembl"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378", "ensembl"),
        ("ENSG00000198851.15-1", "ENSG00000198851", "repaired"),
        ("ENSG0000019885", "", "unknown"),  # one digit short
        ("GRCh38___ENSG00000198851", "ENSG00000198851", "repaired"),
        ("hg38_nonsense", "", "unknown"),
        ("mm10_CD3E", "", "unknown"),  # of the mouse, whatever it is called
        ("ENSG00000264194", "ENSG00000264194", "retired"),  # nothing succeeded it
        ("ENSG00000213846", "", "unknown"),  # older than all lists
        # dates
        ("12-Mar", "", "unknown"),
        ("16-Sep", "", "unknown"),
        ("Mar-12", "", "unknown"),
        ("1-DEC", "ENSG00000173077", "repaired"),
        ("11/Sep", "ENSG00000138758", "repaired"),
        # words for "nothing" that are names of genes as well
        ("NA", "", "unknown"),
        ("NaN", "", "unknown"),
        ("-", "", "unknown"),
        # tags of probes
        ("CD3_TotalSeqB", "", "unknown"),
        ("ERCC.00002", "", "unknown"),
        ("ERCC1", "ENSG00000012061", "symbol"),
    ],
)
def test_further_case(name, gene_id, status):
    found = resolve([name])
    assert (found.gene_ids[0], found.status[0]) == (gene_id, status)


# ------------------------------------------------------------------------------------ properties


TABLE_NAMES = sorted(
    {
        name
        for names in (*_genes._table().names.values(), _genes._table().row_of_id)
        for joined in names
        for name in joined.split("|")
        if name
    }
)
MANGLES = (
    str.lower,
    str.upper,
    str.title,
    lambda name: name + "-1",
    lambda name: name + ".2",
    lambda name: "GRCh38_" + name,
    lambda name: f" {name}\t",
    lambda name: re.sub(r"\W", ".", name),
    lambda name: name[::-1],
)
table_names = st.sampled_from(TABLE_NAMES)
mangled_names = st.builds(lambda mangle, name: mangle(name), st.sampled_from(MANGLES), table_names)
no_names = st.one_of(
    st.none(),
    st.floats(),
    st.integers(),
    st.sampled_from([pd.NA, pd.NaT, np.float32("nan"), np.float32(2.5), np.inf, True, (), []]),
)
texts = st.one_of(st.text(max_size=20), st.binary(max_size=20), st.just(np.str_("CD3E")))
any_names = st.lists(st.one_of(table_names, mangled_names, texts, no_names))


@given(any_names)
def test_shapes_and_words(names):
    found = resolve(names)
    assert found.gene_ids.shape == found.status.shape == (len(names),)
    assert all(re.fullmatch(r"ENSG\d{11}|", gene_id) for gene_id in found.gene_ids)
    assert set(found.status) <= set(STATUSES)
    has_id = np.isin(found.status, ["no_id", "ambiguous", "unknown"], invert=True)
    assert np.array_equal(found.gene_ids != "", has_id)
    assert sum(found.counts().values()) == len(names)


@given(any_names)
def test_idempotent(names):
    once = resolve(names).gene_ids
    twice = resolve(once)
    assert np.array_equal(twice.gene_ids, once)
    assert set(twice.status[once != ""]) <= {"ensembl", "retired"}
    assert np.array_equal(canonical(once), once)


@given(any_names, st.randoms(use_true_random=False))
def test_each_name_for_itself(names, rng):
    order = list(range(len(names)))
    rng.shuffle(order)
    alone = [resolve([name]) for name in names]
    shuffled = resolve([names[i] for i in order])
    assert shuffled.gene_ids.tolist() == [alone[i].gene_ids[0] for i in order]
    assert shuffled.status.tolist() == [alone[i].status[0] for i in order]


@given(no_names)
def test_what_is_not_text_is_no_gene(value):
    found = resolve([value, "CD3E"])
    assert found.gene_ids.tolist() == ["", "ENSG00000198851"]
    assert found.status.tolist() == ["unknown", "symbol"]


def test_any_container_of_names():
    assert resolve([b"CD3E", np.str_("CD3E")]).gene_ids.tolist() == ["ENSG00000198851"] * 2
    names = ["CD3E", "IL8", None]
    expected = ["ENSG00000198851", "ENSG00000169429", ""]
    for form in (
        names,
        tuple(names),
        np.array(names, dtype=object),
        pd.Index(names),
        pd.Series(names, dtype="category"),
        pd.Series(names, dtype="string"),
        (name for name in names),
    ):
        assert resolve(form).gene_ids.tolist() == expected
    assert resolve([]).gene_ids.shape == (0,)


# ------------------------------------------------------------------------------- the whole table


def test_the_shipped_table_is_what_its_card_says():
    card = json.loads((SHIPPED / "genes.json").read_text())
    packed = (SHIPPED / card["file"]).read_bytes()
    plain = lzma.decompress(packed)
    assert len(packed) <= 1_500_000
    assert hashlib.sha256(plain).hexdigest() == card["sha256_plain"]
    header, *lines = plain.decode().rstrip("\n").split("\n")
    assert header.split("\t") == card["columns"]
    assert len(lines) == card["rows"]
    assert all({"source", "version", "licence"} <= source.keys() for source in card["sources"])


def test_table_is_read_as_it_is_written(table):
    row = table.gene_ids.index("ENSG00000198851")
    assert table.symbols[row] == "CD3E"
    assert table.locus_groups[row] == "protein_coding"
    assert len(table.gene_ids) == len(table.symbols) == len(table.locus_groups) == 81_663
    assert all(len(names) == 81_663 for names in table.names.values())


def test_every_symbol_leads_to_its_gene(approved):
    found = resolve(approved[:, 1])
    assert np.array_equal(found.gene_ids, approved[:, 0])
    assert set(found.status) == {"symbol"}


@pytest.mark.parametrize("mangle", [str.upper, str.lower, str.title, lambda s: f"hg19_{s}"])
def test_no_case_or_prefix_hides_a_symbol(approved, mangle):
    assert np.array_equal(resolve(map(mangle, approved[:, 1])).gene_ids, approved[:, 0])


@pytest.mark.parametrize("sign", [".", "_", "\N{NON-BREAKING HYPHEN}", "\N{MINUS SIGN}"])
def test_no_punctuation_hides_a_symbol(approved, sign):
    names = [re.sub(r"[\W_]", sign, symbol) for symbol in approved[:, 1]]
    assert np.array_equal(resolve(names).gene_ids, approved[:, 0])


@pytest.mark.parametrize("suffix", ["-1", ".1", "-12"])
def test_a_suffix_hides_next_to_no_symbol(approved, suffix):
    found = resolve(symbol + suffix for symbol in approved[:, 1])
    # the rest are names of their own: CAT-1 is an alias of SLC7A1, CAV1.1 one of CACNA1S
    assert (found.gene_ids == approved[:, 0]).mean() > 0.999


def test_every_id_of_the_table_leads_to_a_gene(table):
    found = resolve(table.row_of_id)
    assert set(found.status) == {"ensembl", "retired"}
    assert found.gene_ids.tolist() == [table.gene_ids[row] for row in table.row_of_id.values()]
    versioned = resolve(f"{gene_id}.{i % 30}" for i, gene_id in enumerate(table.row_of_id))
    assert np.array_equal(versioned.gene_ids, found.gene_ids)
    assert np.array_equal(versioned.status, found.status)


def test_an_ambiguous_name_has_several_genes(table):
    name_of = [name for joined in table.names["alias"] for name in joined.split("|") if name]
    status = resolve(name_of).status
    times = Counter(name_of)
    once = [s for name, s in zip(name_of, status, strict=True) if times[name] == 1]
    assert Counter(status)["ambiguous"] > 1000
    assert "ambiguous" in once  # p38 and P38: an alias of one, a previous symbol of another, …
    assert Counter(once)["ambiguous"] < 0.01 * len(once)


def test_no_gene_is_taken_for_a_control_probe():
    assert [n for n, c in zip(TABLE_NAMES, is_control_probe(TABLE_NAMES), strict=True) if c] == []


# --------------------------------------------------------------------------- lists of real data


def test_names_of_pbmc68k_reduced():
    names = sc.datasets.pbmc68k_reduced().var_names
    found = resolve(names)
    assert len(names) == 765
    assert found.counts() == {"symbol": 701, "previous": 62, "repaired": 1, "ambiguous": 1}
    assert names[found.gene_ids == ""].tolist() == ["AC084018.1"]
    assert len(set(found.gene_ids)) == 765  # no gene twice


def test_ids_of_the_released_model(model_ids):
    found = resolve(model_ids)
    assert found.counts() == {"ensembl": 19_370, "retired": 4}
    assert len(set(found.gene_ids)) == 19_372
    assert np.array_equal(found.gene_ids, canonical(model_ids))
    assert Counter(biotype(model_ids)) == {
        "protein_coding": 19_333,
        "lncRNA": 18,
        "artifact": 13,
        "pseudogene": 10,
    }


def test_both_sides_must_be_canonical(model_ids):
    found = set(resolve(sc.datasets.pbmc68k_reduced().var_names).gene_ids)
    assert len(found & set(canonical(model_ids))) == 738
    assert "ENSG00000268500" in model_ids
    assert canonical(["ENSG00000268500"])[0] == resolve(["SIGLEC5"]).gene_ids[0]


def test_it_is_fast(approved):
    names = random.Random(0).sample(approved[:, 1].tolist(), 36_000)
    times = []
    for _ in range(3):  # the best of them: other processes slow it down, none speeds it up
        for cached in (_genes._table, _genes._index):
            cached.cache_clear()
        start = time.process_time()
        resolve(["no such gene"])  # asks every index once
        loaded = time.process_time()
        resolve(names)
        times.append((loaded - start, time.process_time() - loaded))
    load, look_up = np.min(times, axis=0)
    assert load < 0.5
    assert look_up < 1.0


# -------------------------------------------------------------------------- what is known of ids


def test_canonical_leaves_the_unknown_alone():
    ids = ["ENSG00000268500.3", "ENSG99999999999.1", "ENSMUSG00000032093", "CD3E", None]
    expected = ["ENSG00000105501", "ENSG99999999999.1", "ENSMUSG00000032093", "CD3E", ""]
    assert canonical(ids).tolist() == expected


def test_symbols_and_biotypes():
    ids = ["ENSG00000198851.15", "ENSG00000268500", "ENSG00000310577", "ENSG99999999999", ""]
    assert symbols(ids).tolist() == [
        "CD3E",
        "SIGLEC5",
        "ENSG00000310577",  # has no name
        "ENSG99999999999",
        "",
    ]
    assert biotype(ids).tolist() == ["protein_coding", "protein_coding", "lncRNA", "", ""]


# ------------------------------------------------------------------------------- which names


def test_gene_names_are_var_names_by_default():
    var = pd.DataFrame({"symbol": ["A1BG", "A2M"]}, index=["CD3E", " IL8"])
    names, where = choose_gene_names(var)
    assert (names.tolist(), where) == (["CD3E", "IL8"], "var_names")


@pytest.mark.parametrize("column", ["gene_ids", "ensembl_id", "feature_id", "Accession", "ENSEMBL"])
def test_a_column_of_ids_comes_before_names(column):
    var = pd.DataFrame({"n": [1, 2, 3]}, index=["CD3E", "IL8", "CD4"])
    for gap in (None, "", "nan", "<NA>"):
        var[column] = pd.Categorical(["ENSG00000111640.15", gap, "ENSG00000010610"])
        names, where = choose_gene_names(var)
        # the gap is filled with the name of its row
        assert names.tolist() == ["ENSG00000111640.15", "IL8", "ENSG00000010610"]
        assert where == f"var['{column}']"


def test_ids_of_two_genomes_are_ids():
    ids = ["GRCh38_ENSG00000111640", "GRCh38_ENSG00000010610", "mm10___ENSMUSG00000029580"]
    var = pd.DataFrame({"gene_ids": ids}, index=["GRCh38_GAPDH", "GRCh38_CD4", "mm10___Actb"])
    assert choose_gene_names(var)[1] == "var['gene_ids']"


def test_a_column_called_so_but_without_ids_is_passed_over():
    var = pd.DataFrame({"gene_ids": ["60", "914", "ENSG00000010610"]}, index=["ACTB", "CD2", "CD4"])
    assert choose_gene_names(var)[1] == "var_names"
    var["gene_ids"] = [None, None, None]
    assert choose_gene_names(var)[1] == "var_names"
    var["gene_ids"] = ["ENSMUSG00000029580", "ENSMUSG00000027863", "ENSMUSG00000023274"]
    assert choose_gene_names(var)[1] == "var_names"


def test_a_column_of_another_name_is_used_only_when_asked_for():
    var = pd.DataFrame({"hgnc": ["CD3E", None]}, index=["foo", "CD4"])
    assert choose_gene_names(var)[1] == "var_names"
    names, where = choose_gene_names(var, "hgnc")
    assert (names.tolist(), where) == (["CD3E", ""], "var['hgnc']")  # as it is: nothing filled in


def test_var_names_can_be_asked_for():
    var = pd.DataFrame({"gene_ids": ["ENSG00000111640"]}, index=["CD3E"])
    names, where = choose_gene_names(var, "var_names")
    assert (names.tolist(), where) == (["CD3E"], "var_names")


def test_gaps_among_orthologs_are_not_filled_with_mouse_symbols():
    var = pd.DataFrame({"ensembl_id": ["ENSG00000198851", np.nan]}, index=["Cd3e", "Ccl9"])
    assert choose_gene_names(var)[0].tolist() == ["ENSG00000198851", ""]


def test_a_missing_column_is_named():
    with pytest.raises(SlotError, match="gene_key='id' is no column.*'gene_ids', 'n'.*'var_names'"):
        choose_gene_names(pd.DataFrame({"gene_ids": ["x"], "n": [1]}), "id")


# ------------------------------------------------------------------------------ whole matrices


def test_mouse_share(mouse_symbols, approved):
    assert mouse_share(mouse_symbols) > 0.95
    assert mouse_share(["ENSMUSG00000029580", "mm10_Actb", "Gm1992", "1700001C19Rik"]) == 1
    assert mouse_share(approved[:, 1]) < 0.0001
    assert mouse_share(["CD3E", "Cd3e", "", None, "NegPrb3", "Negative01"]) == 0.5
    assert mouse_share([]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "NegControlProbe_00042",
        "NegControlCodeword_0500",
        "UnassignedCodeword_0001",
        "DeprecatedCodeword_0321",
        "antisense_PROKR2",
        "Intergenic_Region_1",
        "BLANK_0037",
        "Blank-1",
        "NegPrb3",
        "Negative01",
        "SystemControl12",
        "FalseCode7",
        "ERCC-00002",
        "HTO_A0251",
        "CD19-TotalC",
        "CD3_TotalSeqB",
        "IgG1_control",
    ],
)
def test_control_probes_are_known(name):
    assert is_control_probe([name]).tolist() == [True]
    assert resolve([name]).status.tolist() == ["unknown"]


def judge(names, **kwargs):
    names = np.array(list(names), dtype=object)
    check_names(names, resolve(names).gene_ids != "", "var_names", **kwargs)


def coverage(names, counts):
    names = np.array(names, dtype=object)
    return check_coverage(names, resolve(names).gene_ids != "", "var_names", counts)


def test_fifty_names_pass_in_silence(approved):
    judge(approved[:50, 1])


def test_mouse_names_are_an_error(mouse_symbols):
    with pytest.raises(GenesError, match=r"39\d of 400 var_names are spelled like mouse genes"):
        judge(mouse_symbols)
    with pytest.raises(GenesError, match="'ENSMUSG00000029580'.*human orthologs.*gene_key='…'"):
        judge(["ENSMUSG00000029580"] * 60)


def test_mouse_names_in_upper_case_are_remarked_on(mouse_symbols):
    with pytest.warns(
        GenesWarning, match=r"of 400 var_names are names of mouse genes in upper case"
    ):
        judge([name.upper() for name in mouse_symbols])


def test_names_of_nothing_are_an_error():
    with pytest.raises(GenesError, match="0 of 100 var_names are known human.*'Gene_0', 'Gene_1'"):
        judge(f"Gene_{i}" for i in range(100))
    with pytest.raises(GenesError, match="0 of 0 var_names"):
        judge([])


def test_too_few_matches_are_an_error(approved):
    names = [*approved[:49, 1], "BLANK_1", "FOO"]  # of a control probe nothing is expected
    with pytest.raises(GenesError, match="49 of 51 var_names are genes of the model; at least 50"):
        judge(names, wanted="genes of the model")
    with pytest.raises(GenesError, match="Without a match are 'FOO'. Human"):
        judge(names)


@pytest.mark.parametrize("scale", [1, 1e-6, 1e9])
def test_coverage_is_judged_by_counts(approved, scale):
    names = [*approved[:100, 1], "FOO", "BAR"]
    counts = np.array([*[1.0] * 100, 300, 601]) * scale
    with pytest.raises(GenesError, match="hold 10.0% of the counts, and .*10% are.*'BAR', 'FOO'"):
        coverage(names, counts)
    counts[100:] = np.array([100, 200]) * scale
    with pytest.warns(GenesWarning, match="100 of 102 var_names.*hold 25.0% .*'BAR', 'FOO'"):
        assert coverage(names, counts) == pytest.approx(0.25)
    counts[100:] = 50 * scale
    assert coverage(names, counts) == pytest.approx(0.5)


def test_coverage_without_counts(approved):
    names = [*approved[:60, 1], *(f"FOO{i}" for i in range(90))]
    with pytest.warns(GenesWarning, match="40.0% of the names"):
        assert coverage(names, None) == 0.4
    assert coverage(names, np.zeros(150)) == 1  # nothing counted, nothing to hold against them
