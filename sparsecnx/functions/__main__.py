"""Print the table that ends docs/functions.md: `python -m sparsecnx.functions`."""

from sparsecnx.functions.table import ENTRIES


def table() -> str:
    """Return the table of functions in Markdown. Those of one meaning share a line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for entry in ENTRIES:
        lines.setdefault((entry.meaning, entry.limits), []).extend(entry.names)
    rows = [("functions", "on visible sites", "not"), ("---", "---", "---")]
    for (meaning, limits), names in lines.items():
        rows.append((", ".join(f"`{name}`" for name in names), meaning, limits))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
