"""Small pieces of Markdown for cards: facts as tables, figures as people read them."""

from typing import Any

from hfkit.masking import mask_secrets

LONGEST_LIST = 20  # rows that one list of facts may take


def render_card(metadata: str, title: str, introduction: str, sections: dict[str, str]) -> str:
    """Return a card: metadata block, title, introduction and sections; empty sections are left out."""
    body = "".join(f"\n## {heading}\n\n{text.strip()}\n" for heading, text in sections.items() if text.strip())
    return mask_secrets(f"---\n{metadata.strip()}\n---\n\n# {title}\n\n{introduction}\n{body}")


def show(value: Any) -> str:
    """Return a value as text: figures to four digits, large counts with separators.

    Example:
        >>> [show(value) for value in (1234567, 0.123456, 12345.6, 3e-4, 2, True, None)]
        ['1,234,567', '0.1235', '12,346', '0.0003', '2', 'yes', 'none']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(facts: dict[str, Any]) -> str:
    """Return facts as a table of two columns; nothing for no facts.

    Example:
        >>> print(table({"steps": 100}), end="")
        | | |
        |---|---|
        | steps | 100 |
    """
    return rows_table(["", ""], [[name, show(value)] for name, value in facts.items()]) if facts else ""


def rows_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table with a header."""
    lines = [header, ["---"] * len(header), *rows]
    first, second, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([first.replace("  ", " "), second.replace(" ", ""), *rest]) + "\n"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested facts as ``a.b`` → value; of a long list, the first ones and a count.

    Example:
        >>> flatten({"files": [{"path": "a.txt", "sha256": "ab"}], "revision": "main"})
        {'files.0.path': 'a.txt', 'files.0.sha256': 'ab', 'revision': 'main'}
    """
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:LONGEST_LIST]))
        if len(value) > LONGEST_LIST:
            items.append(("and more", len(value) - LONGEST_LIST))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def fact_tables(facts: dict[str, Any]) -> str:
    """Return nested facts as tables: one row for each of a list or group of things with facts, the rest in pairs.

    Example:
        >>> print(fact_tables({"revision": "main", "splits": {"train": {"rows": 2000}, "test": {"rows": 10}}}), end="")
        | splits | rows |
        |---|---|
        | train | 2,000 |
        | test | 10 |
        <BLANKLINE>
        | | |
        |---|---|
        | revision | main |
    """
    tables, rest = [], {}
    for name, value in facts.items():
        items = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else []
        rows = [{name: key, **flatten(item)} for key, item in items if isinstance(item, dict)]
        if not rows or len(rows) < len(value):
            rest[name] = value
            continue
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [["" if row.get(column) is None else show(row[column]) for column in columns] for row in rows]
        if len(lines) > LONGEST_LIST:
            lines[LONGEST_LIST:] = [[f"and {len(lines) - LONGEST_LIST} more", *[""] * (len(columns) - 1)]]
        tables.append(rows_table([column.replace("_", " ") for column in columns], lines))
    return "\n".join(part for part in (*tables, table(flatten(rest))) if part)
