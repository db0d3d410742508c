"""Human gene names to Ensembl ids, offline.

The table that ships with the package (``data/genes.tsv.xz``; ``data/genes.json`` tells its sources)
holds one row per gene: its Ensembl id, its approved symbol, and every previous symbol, alias and
older id that leads to it. A name is taken through these steps. The first that finds anything
decides, and two genes found in one step mean that the name is ambiguous:

1. an Ensembl id, without its version;
2. a symbol, else a previous symbol, as written;
3. a symbol ignoring case and punctuation (R's ``HLA.A``);
4. an alias as written;
5. a previous symbol ignoring case and punctuation, else an alias ignoring case;
6. what Excel made of SEPT2, MARCH3 or DEC1: a date;
7. the name without ``-1`` or ``.1`` at its end (``var_names_make_unique``), from step 1 on.

This file knows names and the table. It has never heard of AnnData.
"""

from __future__ import annotations

import lzma
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._errors import GenesError, GenesWarning, SlotError

#: How a name was found, in the order in which they are reported.
STATUSES = (
    "ensembl",  # an Ensembl id of today, with or without version
    "retired",  # an older Ensembl id: leads to a gene, or is kept as itself if none succeeded it
    "symbol",  # approved symbol (or the newest clone name of a gene that has none)
    "previous",  # previous symbol
    "alias",  # alias
    "repaired",  # found after mending case, prefix, suffix, punctuation or an Excel date
    "no_id",  # an approved name of a locus that has no Ensembl gene
    "ambiguous",  # leads to several genes
    "unknown",  # leads nowhere
)

Strings: TypeAlias = NDArray[np.object_]


# ------------------------------------------------------------------------------------ the table


class _Table(NamedTuple):
    gene_ids: list[str]  # (rows,) Ensembl id, "" for a locus without one
    symbols: list[str]  # (rows,) "" where none
    locus_groups: list[str]  # (rows,)
    names: dict[str, list[str]]  # kind of name -> (rows,) names separated by "|"
    row_of_id: dict[str, int]  # current and older Ensembl ids


@cache
def _table() -> _Table:
    packed = (files("cellplm_tl") / "data" / "genes.tsv.xz").read_bytes()
    header, _, body = lzma.decompress(packed).decode().partition("\n")
    n_columns = header.count("\t") + 1
    fields = body.rstrip("\n").replace("\n", "\t").split("\t")
    gene_ids, symbols, locus_groups, previous, alias, others = (
        fields[column::n_columns] for column in range(n_columns)
    )
    row_of_id = {i: row for row, ids in enumerate(others) if ids for i in ids.split("|")}
    row_of_id.update((gene_id, row) for row, gene_id in enumerate(gene_ids) if gene_id)
    names = {"symbol": symbols, "previous": previous, "alias": alias}
    return _Table(gene_ids, symbols, locus_groups, names, row_of_id)


def _as_written(text: str) -> str:
    return text


def _plain(text: str) -> str:
    # one sign for one sign, so that "HLA.A" is HLA-A while "HBA1/2" is not HBA12
    return _PUNCTUATION.sub("-", text.casefold())


_PUNCTUATION = re.compile(r"[^\w|\n]|_")  # the table's own separators stay


@cache
def _index(kind: str, spelling: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Return the rows that each name of a kind leads to, all names in the given spelling."""
    # spelling the whole column at once is ten times as fast as name by name
    column = spelling("\n".join(_table().names[kind])).split("\n")
    index: dict[str, tuple[int, ...]] = {}
    for row, names in enumerate(column):
        if names:
            for name in names.split("|"):
                rows = index.setdefault(name, (row,))
                if row not in rows:
                    index[name] = (*rows, row)
    return index


# ------------------------------------------------------------------- one name, step after step


class _Found(NamedTuple):
    status: str
    rows: tuple[int, ...] = ()  # none: nothing was found; several: ambiguous


_UNKNOWN = _Found("unknown")

_ENSEMBL_ID = re.compile(r"ENSG(R?)(\d{10,11})(?:\.\d+)?(?:_PAR_Y)?", re.IGNORECASE)


def _gene_id(name: str) -> str | None:
    """Return the bare id if `name` is written like a human Ensembl gene id."""
    match = _ENSEMBL_ID.fullmatch(name)
    if match is None or len(match[1]) + len(match[2]) != 11:
        return None
    # Y copies of pseudo-autosomal genes were once called ENSGR0000182378
    return "ENSG" + ("0" if match[1] else "") + match[2]


def _find_id(gene_id: str) -> _Found:
    table = _table()
    row = table.row_of_id.get(gene_id)
    if row is None:
        return _UNKNOWN
    is_current = gene_id == table.gene_ids[row] and table.locus_groups[row] != "retired"
    return _Found("ensembl" if is_current else "retired", (row,))


# status, kind of name, spelling. A symbol in any spelling comes before every alias: "Met" is MET
# although SLTM has the alias Met, and R's "NKX6.1" is NKX6-1 although NKX6-2 has that alias.
_LOOKUPS: tuple[tuple[str, str, Callable[[str], str]], ...] = (
    ("symbol", "symbol", _as_written),
    ("previous", "previous", _as_written),
    ("repaired", "symbol", _plain),
    ("alias", "alias", _as_written),
    ("repaired", "previous", _plain),
    ("repaired", "alias", str.casefold),
)


def _find_name(name: str) -> _Found:
    for status, kind, spelling in _LOOKUPS:
        rows = _index(kind, spelling).get(spelling(name))
        if rows:
            return _Found(status, rows)
    return _UNKNOWN


_DATE = re.compile(
    r"X?0?(?P<day>\d{1,2})[-./ ](?P<month>mar|sep|oct|dec)"
    r"|(?P<month_first>mar|sep|oct|dec)[-./ ]0?(?P<number>\d{1,2})",
    re.IGNORECASE,
)
_GENES_OF_MONTH = {
    "mar": ("MARCH", "MARC"),
    "sep": ("SEPT", "SEP"),
    "oct": ("OCT",),
    "dec": ("DEC",),
}


def _find_date(date: re.Match[str]) -> _Found:
    month = (date["month"] or date["month_first"]).lower()
    names = [stem + (date["day"] or date["number"]) for stem in _GENES_OF_MONTH[month]]
    for kinds in (("symbol", "previous"), ("alias",)):
        indexes = [_index(kind, _as_written) for kind in kinds]
        rows = {row for index in indexes for name in names for row in index.get(name, ())}
        if rows:
            return _Found("repaired", tuple(rows))
    return _UNKNOWN


_NO_NAME = frozenset({"", "-", "nan", "na", "n/a", "<na>", "none", "null"})
_HUMAN_GENOME = re.compile(r"^(?:GRCh3[78]|hg(?:18|19|38))[_-]+", re.IGNORECASE)
_MOUSE_GENOME = re.compile(r"(?:GRCm3[89]|mm(?:9|10|39))[_-]+", re.IGNORECASE)
_SUFFIX = re.compile(r"[-.]\d{1,2}$")  # of var_names_make_unique and of R's make.unique
_CONTROL = re.compile(
    r"""neg(ative)?[ ._-]?(control|ctrl|prb|probe)?[ ._-]?(probe|codeword)?[ ._-]?\d+
    |   (blank|system[ ._-]?control|false[ ._-]?code)[ ._-]?\d+
    |   (unassigned|deprecated)[ ._-]?codeword[ ._-]?\d+
    |   (antisense|intergenic[ ._-]region|hto|hashtag)[ ._-].+
    |   ERCC[ ._-]\d{5}
    |   .+[ ._-]total(seq)?[ ._-]?[abcd]
    |   Ig[AGM]\w*[ ._-](control|isotype).*
    """,
    re.IGNORECASE | re.VERBOSE,
)


def _find(name: str) -> _Found:
    """Take one name, without blanks around it, through all steps."""
    if _is_missing(name):
        return _UNKNOWN
    genome = _HUMAN_GENOME.match(name)
    if genome:
        return _repaired(_find(name[genome.end() :]))
    gene_id = _gene_id(name)
    if gene_id:
        return _find_id(gene_id)
    found = _find_name(name)
    if found.rows:
        return found
    date = _DATE.fullmatch(name)
    if date:
        return _find_date(date)
    stem = _SUFFIX.sub("", name)
    return _UNKNOWN if stem == name else _repaired(_find(stem))


def _repaired(found: _Found) -> _Found:
    return _Found("repaired", found.rows) if found.rows else _UNKNOWN


def _is_missing(name: str) -> bool:
    return name.casefold() in _NO_NAME


def _is_control(name: str) -> bool:
    return _CONTROL.fullmatch(name) is not None


# ----------------------------------------------------------------------------- many names at once


@dataclass(frozen=True)
class Resolution:
    """What became of a list of names.

    Attributes
    ----------
    gene_ids
        Ensembl id of each name, without version; ``""`` where none was found. Shape ``(names,)``.
    status
        How each was found, a word of :data:`STATUSES`. Shape ``(names,)``.
    """

    gene_ids: Strings
    status: Strings

    def counts(self) -> dict[str, int]:
        """How many names have each status; statuses that do not occur are left out."""
        found = self.status.tolist()
        return {status: found.count(status) for status in STATUSES if status in found}


def resolve(names: Iterable[Any]) -> Resolution:
    """Find the Ensembl ids of human gene names.

    Parameters
    ----------
    names
        Ensembl ids (any version), symbols, previous symbols, aliases, in any mixture. Anything
        that is not text (missing values, numbers, bytes) is taken as it would be printed.

    Returns
    -------
    Resolution
        Ids and statuses, each of shape ``(names,)``, in the order of `names`.

    Examples
    --------
    >>> from cellplm_tl._genes import resolve
    >>> found = resolve(["CD3E", "IL8", "ENSG00000111640.15", "HLA.A", "1-Mar"])
    >>> list(found.gene_ids)
    ['ENSG00000198851', 'ENSG00000169429', 'ENSG00000111640', 'ENSG00000206503', '']
    >>> list(found.status)
    ['symbol', 'previous', 'ensembl', 'repaired', 'ambiguous']
    """
    outcomes = [_outcome(_find(text)) for text in as_texts(names)]
    return Resolution(
        _strings(gene_id for gene_id, _ in outcomes), _strings(status for _, status in outcomes)
    )


def as_texts(names: Iterable[Any]) -> list[str]:
    """`names` as text without blanks around it; ``""`` for what is missing (None, NaN, NA)."""
    return [name.strip() if type(name) is str else _as_text(name) for name in names]


def _as_text(name: Any) -> str:
    if isinstance(name, bytes):
        return name.decode(errors="replace").strip()
    if isinstance(name, float | np.floating):
        return ""  # no name, least of all infinity: INF is an alias of CBLIF
    if pd.api.types.is_scalar(name) and pd.isna(name):
        return ""
    return str(name).strip()


def _outcome(found: _Found) -> tuple[str, str]:
    if not found.rows:
        return "", "unknown"
    if len(found.rows) > 1:
        return "", "ambiguous"
    gene_id = _table().gene_ids[found.rows[0]]
    return gene_id, found.status if gene_id else "no_id"


def _strings(values: Iterable[str]) -> Strings:
    return np.fromiter(values, dtype=object)


# ------------------------------------------------------------------------ what is known of an id


def canonical(gene_ids: Iterable[Any]) -> Strings:
    """Turn Ensembl ids of any age into those under which the table keeps the genes.

    Two lists of ids can be compared only after both went through here: a gene may stand in one of
    them under the id of another release.

    Parameters
    ----------
    gene_ids
        Ensembl ids, any version.

    Returns
    -------
    numpy.ndarray
        Ids of shape ``(gene_ids,)``; those that the table does not know stay as they are.

    Examples
    --------
    >>> list(canonical(["ENSG00000268500", "ENSG00000111640.15", "ENSG99999999999"]))
    ['ENSG00000105501', 'ENSG00000111640', 'ENSG99999999999']
    """
    table = _table()
    texts = as_texts(gene_ids)
    rows = (_row(text) for text in texts)
    return _strings(
        text if row is None else table.gene_ids[row] for text, row in zip(texts, rows, strict=True)
    )


def symbols(gene_ids: Iterable[Any]) -> Strings:
    """Symbol of each gene; the id itself where it has none or is unknown.

    Parameters
    ----------
    gene_ids
        Ensembl ids, any version.

    Returns
    -------
    numpy.ndarray
        Names of shape ``(gene_ids,)``, as different from each other as the genes are.

    Examples
    --------
    >>> list(symbols(["ENSG00000198851", "ENSG99999999999"]))
    ['CD3E', 'ENSG99999999999']
    """
    table = _table()
    texts = as_texts(gene_ids)
    rows = (_row(text) for text in texts)
    return _strings(
        text if row is None else table.symbols[row] or table.gene_ids[row]
        for text, row in zip(texts, rows, strict=True)
    )


def biotype(gene_ids: Iterable[Any]) -> Strings:
    """Kind of locus of each gene, in the words of the table; ``""`` for unknown ids.

    The words are ``protein_coding``, ``lncRNA``, ``pseudogene``, ``ncRNA``, ``IG_TR``,
    ``IG_TR_pseudogene``, ``other``, ``artifact`` (false duplications of an assembly) and
    ``retired`` (an id of an older release that nothing succeeded).

    Parameters
    ----------
    gene_ids
        Ensembl ids, any version.

    Returns
    -------
    numpy.ndarray
        Words of shape ``(gene_ids,)``.

    Examples
    --------
    >>> list(biotype(["ENSG00000198851", "ENSG00000229807"]))
    ['protein_coding', 'lncRNA']
    """
    rows = (_row(text) for text in as_texts(gene_ids))
    return _strings("" if row is None else _table().locus_groups[row] for row in rows)


def _row(text: str) -> int | None:
    gene_id = _gene_id(text)
    return None if gene_id is None else _table().row_of_id.get(gene_id)


# ----------------------------------------------------------------- which names a matrix goes by


_ID_COLUMNS = frozenset(
    {
        "accession",
        "ensembl",
        "ensemblgeneid",
        "ensemblgeneids",
        "ensemblid",
        "ensemblids",
        "featureid",
        "featureids",
        "geneid",
        "geneids",
    }
)


def choose_gene_names(var: pd.DataFrame, gene_key: str | None = None) -> tuple[Strings, str]:
    """Choose the column of `var` in which the genes are named.

    Parameters
    ----------
    var
        One row per gene, as ``adata.var``.
    gene_key
        Column to be used as it is; ``"var_names"`` for the index. ``None``: a column that is called
        like one of Ensembl ids (``gene_ids``, ``ensembl_id``, ``feature_id``, …) if most of what it
        holds are ids of human genes, and else the index. Where such a column has a gap, the index
        fills it.

    Returns
    -------
    names : numpy.ndarray
        Names of shape ``(genes,)``; ``""`` where none is given.
    where : str
        Where they were read, in words for a message: ``"var_names"`` or ``"var['gene_ids']"``.

    Raises
    ------
    SlotError
        `gene_key` is no column of `var`.

    Examples
    --------
    >>> import pandas as pd
    >>> var = pd.DataFrame({"gene_ids": ["ENSG00000198851", None]}, index=["CD3E", "CD4"])
    >>> names, where = choose_gene_names(var)
    >>> list(names), where
    (['ENSG00000198851', 'CD4'], "var['gene_ids']")
    """
    index = _strings(as_texts(var.index))
    if gene_key is None:
        gene_key = next((column for column in var.columns if _holds_ids(var, column)), None)
        if gene_key is None:
            return index, "var_names"
        ids = _strings(as_texts(var[gene_key]))
        has_gap = np.array([_is_missing(gene_id) for gene_id in ids], dtype=bool)
        # symbols of a mouse beside the ids of human orthologs must not fill the gaps
        if has_gap.any() and mouse_share(index) < MOUSE_LIMIT:
            ids[has_gap] = index[has_gap]
        return ids, f"var[{gene_key!r}]"
    if gene_key in var.columns:
        return _strings(as_texts(var[gene_key])), f"var[{gene_key!r}]"
    if gene_key == "var_names":
        return index, "var_names"
    raise SlotError(
        f"gene_key={gene_key!r} is no column of adata.var; the columns are "
        f"{', '.join(map(repr, var.columns)) or 'none'}. "
        "Name the one that holds Ensembl ids or gene symbols, or 'var_names'."
    )


def _holds_ids(var: pd.DataFrame, column: Any) -> bool:
    if re.sub(r"[^a-z]", "", str(column).casefold()) not in _ID_COLUMNS:
        return False
    texts = [_HUMAN_GENOME.sub("", t) for t in as_texts(var[column]) if not _is_missing(t)]
    return 2 * sum(_gene_id(text) is not None for text in texts) > len(texts)


# ------------------------------------------------------------------ names of a matrix as a whole


#: A matrix whose names are spelled like mouse genes to this share is taken for mouse.
MOUSE_LIMIT = 0.5
#: Share of names that only mouse genes in upper case have, from which on they are remarked on.
UPPER_CASE_MOUSE_LIMIT = 0.01
#: Fewer matched genes than this are no basis for a result,
MIN_GENES = 50
#: nor is a smaller share of the counts;
MIN_COVERAGE = 0.1
#: below this share there is a warning.
GOOD_COVERAGE = 0.5

_MOUSE_NAME = re.compile(r"[A-Z][a-z]|Gm\d|\d.*Rik$|ENSMUSG|" + _MOUSE_GENOME.pattern)
_UPPER_CASE_MOUSE_NAME = re.compile(r"GM\d+|\d.*RIK|H2-.+")


def mouse_share(names: Iterable[Any]) -> float:
    """Share of the names that are spelled like mouse genes, between 0 and 1.

    One mouse name cannot be told from a human one in the wrong case (``Cd3e``); a matrix can:
    96 % of the names of a mouse list are spelled so, and none of the human ones. Missing names
    and control probes do not count.

    Parameters
    ----------
    names
        Symbols or Ensembl ids.

    Returns
    -------
    float
        The share; 0 if there is no name at all.

    Examples
    --------
    >>> mouse_share(["Xkr4", "Gm1992", "Sox17", "CD3E"])
    0.75
    """
    texts = _without_controls(as_texts(names))
    return len(_like_mouse(texts)) / len(texts) if texts else 0.0


def _without_controls(names: Iterable[str]) -> list[str]:
    return [name for name in names if not (_is_missing(name) or _is_control(name))]


def _like_mouse(names: Iterable[str]) -> list[str]:
    return [name for name in names if _MOUSE_NAME.match(name)]


def is_control_probe(names: Iterable[Any]) -> NDArray[np.bool_]:
    """Which names are those of controls, tags and spike-ins, which are no genes.

    Parameters
    ----------
    names
        Names of features.

    Returns
    -------
    numpy.ndarray
        Booleans of shape ``(names,)``.

    Examples
    --------
    >>> is_control_probe(["CD3E", "NegPrb3", "BLANK_0037", "ERCC-00002"]).tolist()
    [False, True, True, True]
    """
    return np.fromiter(map(_is_control, as_texts(names)), dtype=bool)


def check_names(
    names: Strings,
    is_matched: NDArray[np.bool_],
    where: str,
    *,
    wanted: str = "known human genes",
    at_least: int = MIN_GENES,
) -> None:
    """Judge the names of a matrix as a whole.

    Parameters
    ----------
    names
        What the genes are called, shape ``(genes,)``.
    is_matched
        Whether each was found among the genes that are wanted, shape ``(genes,)``.
    where
        Where the names were read, as :func:`choose_gene_names` says it.
    wanted
        What was looked for, in words.
    at_least
        How many have to be matched.

    Raises
    ------
    GenesError
        The names are spelled like mouse genes, or fewer than `at_least` are matched.

    Warns
    -----
    GenesWarning
        The names look like those of mouse genes in upper case.
    """
    n_matched = int(is_matched.sum())
    mouse = _like_mouse(_without_controls(names))
    if mouse_share(names) >= MOUSE_LIMIT and (n_matched or "ENSMUSG" in mouse[0]):
        raise GenesError(
            f"{len(mouse):,} of {len(names):,} {where} are spelled like mouse genes, for example "
            f"{_quoted(mouse)}; CellPLM models are human. Map to human orthologs first, or name "
            "the column of adata.var that holds them: gene_key='…'. If these are human symbols, "
            "write them in upper case."
        )
    misses = unmatched(names, is_matched)
    if n_matched < at_least:
        raise GenesError(
            f"{n_matched:,} of {len(names):,} {where} are {wanted}; at least {at_least} "
            f"{'is' if at_least == 1 else 'are'} needed. {_advice(misses)} If genes were left out, "
            "adata.raw.to_adata() may have them."
        )
    upper = [name for name in misses if _UPPER_CASE_MOUSE_NAME.fullmatch(name)]
    if len(upper) > UPPER_CASE_MOUSE_LIMIT * len(names):
        warnings.warn(
            f"{len(upper):,} of {len(names):,} {where} are names of mouse genes in upper case, for "
            f"example {_quoted(upper)}. Upper case finds about three quarters of the orthologs; "
            "an ortholog table finds them all.",
            GenesWarning,
            stacklevel=3,
        )


def check_coverage(
    names: Strings,
    is_matched: NDArray[np.bool_],
    where: str,
    counts: NDArray[Any] | None,
    *,
    wanted: str = "known human genes",
) -> float:
    """Judge how much of the counts the matched genes hold.

    Parameters
    ----------
    names, is_matched, where, wanted
        As in :func:`check_names`.
    counts
        Counts of each gene over all cells, or a sample of them, shape ``(genes,)``; ``None`` if
        there are none to be had: each name weighs the same.

    Returns
    -------
    float
        The matched share, between 0 and 1; 1 if there are no counts at all.

    Raises
    ------
    GenesError
        It is less than a tenth.

    Warns
    -----
    GenesWarning
        It is less than half.
    """
    weights = np.ones(len(names)) if counts is None else np.asarray(counts, dtype=float)
    total = weights.sum()
    coverage = float(weights[is_matched].sum() / total) if total > 0 else 1.0
    if coverage >= GOOD_COVERAGE:
        return coverage
    found = (
        f"{int(is_matched.sum()):,} of {len(names):,} {where} are {wanted}; they hold "
        f"{coverage:.1%} of the {'names' if counts is None else 'counts'}"
    )
    advice = _advice(unmatched(names, is_matched, weights))
    if coverage < MIN_COVERAGE:
        raise GenesError(f"{found}, and at least {MIN_COVERAGE:.0%} are needed. {advice}")
    warnings.warn(f"{found}. {advice}", GenesWarning, stacklevel=3)
    return coverage


def unmatched(
    names: Strings, is_matched: NDArray[np.bool_], counts: NDArray[Any] | None = None
) -> list[str]:
    """Return the names without a match that should have one, those with most counts first."""
    order = np.arange(len(names)) if counts is None else np.argsort(-counts, kind="stable")
    return _without_controls(names[order[~is_matched[order]]])


def _advice(misses: Sequence[str]) -> str:
    return (f"Without a match are {_quoted(misses)}. " if misses else "") + (
        "Human gene symbols or Ensembl ids are expected in adata.var_names, or in the column of "
        "adata.var that gene_key='…' names."
    )


def _quoted(names: Sequence[str], at_most: int = 5) -> str:
    return ", ".join(map(repr, names[:at_most])) + (", …" if len(names) > at_most else "")
