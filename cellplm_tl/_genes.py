"""Human gene names to Ensembl ids, offline.

The table that ships with the package (``data/genes.tsv.xz``, described in ``data/genes.json``) holds
one row per gene: its Ensembl id, its approved symbol, and every previous symbol, alias and older id
that leads to it. A name is tried in these steps; the first that finds anything
decides, and two genes found in one step mean that the name is ambiguous:

1. an Ensembl id, without its version,
2. a symbol, else a previous symbol, else an alias, exactly as written,
3. the same ignoring case,
4. what Excel made of SEPT2, MARCH1 or DEC1: a date,
5. the name without ``-1`` or ``.1`` at its end (``var_names_make_unique``),
6. a symbol, else a previous symbol, when all punctuation counts as equal (R's ``HLA.A``).

This file knows names and the table. It has never heard of AnnData.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._errors import SlotError

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
    _, *lines = lzma.decompress(packed).decode().splitlines()
    gene_ids, symbols, locus_groups, previous, alias, others = (
        list(column) for column in zip(*(line.split("\t") for line in lines), strict=True)
    )
    row_of_id = {i: row for row, joined in enumerate(others) if joined for i in joined.split("|")}
    row_of_id.update((gene_id, row) for row, gene_id in enumerate(gene_ids) if gene_id)
    names = {"symbol": symbols, "previous": previous, "alias": alias}
    return _Table(gene_ids, symbols, locus_groups, names, row_of_id)


class _Found(NamedTuple):
    status: str
    rows: tuple[int, ...]  # more than one: ambiguous


def _unchanged(name: str) -> str:
    return name


def _without_punctuation(name: str) -> str:
    # one sign for one sign: "HLA.A" is HLA-A, "HBA1/2" is not HBA12
    return _PUNCTUATION.sub("-", name.casefold())


_PUNCTUATION = re.compile(r"[\W_]")


@cache
def _index(spelling: Callable[[str], str], kinds: tuple[str, ...]) -> dict[str, _Found]:
    """Every name of the table in the given spelling; of several kinds the first one counts."""
    index: dict[str, _Found] = {}
    for kind in reversed(kinds):
        level: dict[str, tuple[int, ...]] = {}
        for row, joined in enumerate(_table().names[kind]):
            if not joined:
                continue
            for name in joined.split("|"):
                key = spelling(name)
                rows = level.get(key)
                if rows is None:
                    level[key] = (row,)
                elif row not in rows:
                    level[key] = (*rows, row)
        index.update((key, _Found(kind, rows)) for key, rows in level.items())
    return index


_ALL_KINDS = ("symbol", "previous", "alias")
_SYMBOLS = ("symbol", "previous")


# ------------------------------------------------------------------- one name, step after step


_ENSEMBL = re.compile(r"ENSG(R?)(\d{10,11})(?:\.\d+)?(?:_PAR_Y)?", re.IGNORECASE)


def _gene_id(name: str) -> str | None:
    """Return the bare id if `name` is written like a human Ensembl gene id (any case, any version)."""
    match = _ENSEMBL.fullmatch(name)
    if match is None or len(match[1]) + len(match[2]) != 11:
        return None
    # Y copies of pseudo-autosomal genes were ENSGR0000182378 once
    return "ENSG" + ("0" if match[1] else "") + match[2]


def _as_ensembl_id(name: str) -> _Found | None:
    gene_id = _gene_id(name)
    if gene_id is None:
        return None
    row = _table().row_of_id.get(gene_id)
    if row is None:
        return _Found("unknown", ())
    is_current = gene_id == _table().gene_ids[row] and _table().locus_groups[row] != "retired"
    return _Found("ensembl" if is_current else "retired", (row,))


def _as_written(name: str) -> _Found | None:
    return _index(_unchanged, _ALL_KINDS).get(name)


def _ignoring_case(name: str) -> _Found | None:
    return _repaired(_index(str.casefold, _ALL_KINDS).get(name.casefold()))


_DATE = re.compile(
    r"X?0?(?P<day>\d{1,2})[-./ ](?P<month>mar|sep|oct|dec)"
    r"|(?P<month_first>mar|sep|oct|dec)[-./ ]0?(?P<second>\d{1,2})",
    re.IGNORECASE,
)
_GENES_OF_MONTH = {
    "mar": ("MARCH", "MARC"),
    "sep": ("SEPT", "SEP"),
    "oct": ("OCT",),
    "dec": ("DEC",),
}


def _as_excel_date(name: str) -> _Found | None:
    match = _DATE.fullmatch(name)
    if match is None:
        return None
    month = (match["month"] or match["month_first"]).lower()
    number = match["day"] or match["second"]
    candidates = [f"{stem}{number}" for stem in _GENES_OF_MONTH[month]]
    for kinds in (_SYMBOLS, ("alias",)):
        found = [_index(_unchanged, kinds).get(candidate) for candidate in candidates]
        rows = {row for item in found if item for row in item.rows}
        if rows:
            return _Found("repaired", tuple(sorted(rows)))
    return _Found("unknown", ())  # a date is nothing else either


_SUFFIX = re.compile(r"[-.]\d{1,2}$")


def _without_suffix(name: str) -> _Found | None:
    stem = _SUFFIX.sub("", name)
    if stem == name:
        return None
    return _repaired(_as_ensembl_id(stem) or _as_written(stem) or _ignoring_case(stem))


_R_PREFIX = re.compile(r"^x(?=\d)")


def _ignoring_punctuation(name: str) -> _Found | None:
    index = _index(_without_punctuation, _SYMBOLS)
    spelling = _without_punctuation(name)
    return _repaired(index.get(spelling) or index.get(_R_PREFIX.sub("", spelling)))


def _repaired(found: _Found | None) -> _Found | None:
    return found and _Found("repaired", found.rows)


_STEPS = (
    _as_ensembl_id,
    _as_written,
    _ignoring_case,
    _as_excel_date,
    _without_suffix,
    _ignoring_punctuation,
)

_NO_NAME = frozenset({"", "-", "nan", "na", "n/a", "<na>", "nat", "none", "null"})
_HUMAN_GENOME = re.compile(r"(?:GRCh3[78]|hg(?:18|19|38))[_-]+", re.IGNORECASE)
_MOUSE_GENOME = re.compile(r"(?:GRCm3[89]|mm(?:9|10|39))[_-]+", re.IGNORECASE)
_CONTROL = re.compile(
    r"(?:neg(?:ative)?[ _-]?(?:control|prb|probe|ctrl)?[ _-]?(?:probe|codeword)?[ _-]?\d+)"
    r"|(?:blank|system[ _-]?control|false[ _-]?code)[ _-]?\d+"
    r"|(?:unassigned|deprecated)[ _-]?codeword[ _-]?\d+"
    r"|(?:antisense|intergenic[ _-]region|hto)[ _-].+"
    r"|ERCC-\d{5}"
    r"|.+[ _-]TotalSeq[ABC]?|.+[ _-]Total[ABC]"
    r"|ig[GM]\w*[ _-]control\w*",
    re.IGNORECASE,
)

_UNKNOWN = _Found("unknown", ())


def _find(name: str) -> _Found:
    """All steps for one name without blanks around it."""
    if name.casefold() in _NO_NAME or _MOUSE_GENOME.match(name) or _CONTROL.fullmatch(name):
        return _UNKNOWN
    genome = _HUMAN_GENOME.match(name)
    if genome:
        return _repaired(_find(name[genome.end() :])) or _UNKNOWN
    for step in _STEPS:
        found = step(name)
        if found:
            return found
    return _UNKNOWN


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
    """`names` as text without blanks around it; missing values (None, NaN, NA) become ``""``."""
    return [name.strip() if type(name) is str else _as_text(name) for name in names]


def _as_text(name: Any) -> str:
    if isinstance(name, bytes):
        return name.decode(errors="replace").strip()
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


# ------------------------------------------------------------------------------- whole matrices


_MOUSE_NAME = re.compile(r"[A-Z][a-z]|Gm\d|\d.*Rik$|ENSMUSG|" + _MOUSE_GENOME.pattern)


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
    texts = [t for t in as_texts(names) if t.casefold() not in _NO_NAME and not _is_control(t)]
    return sum(map(bool, map(_MOUSE_NAME.match, texts))) / len(texts) if texts else 0.0


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


def _is_control(text: str) -> bool:
    return _CONTROL.fullmatch(text) is not None


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
        has_gap = ids == ""
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


#: From this share of names on that are spelled like mouse genes, a matrix is taken for mouse.
MOUSE_LIMIT = 0.5


def _holds_ids(var: pd.DataFrame, column: Any) -> bool:
    if re.sub(r"[^a-z]", "", str(column).casefold()) not in _ID_COLUMNS:
        return False
    texts = [text for text in as_texts(var[column]) if text]
    return 2 * sum(_gene_id(text) is not None for text in texts) > len(texts)
