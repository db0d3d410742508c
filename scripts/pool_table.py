"""The table of the pool's data sets that goes into model cards."""

from __future__ import annotations

import re
from pathlib import Path


def pool_table(readme: Path, names: list[str]) -> str:
    """Read the pool's README and return a Markdown table of the sets, with source and licence."""
    rows = {}
    for line in readme.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = cells[0].removesuffix(".h5ad")
        if name in names and len(cells) >= 10:
            source, study, licence = cells[7], cells[8], cells[9]
            repository = re.split(r",\s", source)[0]
            if re.match(r"none given|none", licence):
                licence = re.sub(r"^none( given)?", "no licence seen", licence)
            cells = [_without_memory(cell) for cell in cells]
            study, licence = _without_memory(study), _without_memory(licence)
            rows[name] = (
                f"| {name} | {cells[1]} | {cells[3]} | {repository} | {study} | {licence} |"
            )
    missing = sorted(set(names) - set(rows))
    if missing:
        raise SystemExit(f"{readme} does not describe {missing}")
    head = "| set | cells × genes | tissue, assay | source | study | licence (repository / data) |"
    return "\n".join([head, "| --- " * 6 + "|", *(rows[name] for name in names)])


def _without_memory(text: str) -> str:
    """Say of what its writer had only from memory that it is not verified."""
    text = re.sub(r"(from memory( of the study)?, )?not verified( here)?", "not verified", text)
    text = text.replace(" from memory,", ",").replace(" from memory)", ", not verified)")
    return text.replace(" from memory ", " ").replace("(from memory", "(not verified")


if __name__ == "__main__":
    import sys

    print(pool_table(Path(sys.argv[1]), sys.argv[2:]))
