"""audit.html: one page about a prepared corpus, that a careful person reads before training on it."""

from html import escape
from pathlib import Path
from typing import Any

from hfkit.charts import bar_list, column_chart, format_short, is_number
from hfkit.files import write_atomic
from hfkit.page import cards, facts_table, fold, page, quote, section, shorten, table

PASSAGE = 400  # characters of a document shown


def write_audit_page(audit: dict[str, Any], path: Path) -> None:
    """Write a page about a prepared corpus.

    Args:
        audit: The content of audit.json. Besides the figures it may hold ``sources`` (a list of rows),
            ``samples`` (rule → list of ``{"where", "text"}`` that it acted on, with what it made or found),
            ``duplicates`` (a list of ``{"kept": text, "removed": [texts], "size": n}``), ``passages`` (a list of
            [source, passage, documents]) and ``lengths`` (a list of [label, documents], the histogram's columns in
            their order).
        path: The page.
    """
    documents = audit.get("documents") or {}
    tokenizer = audit.get("tokenizer") or {}
    figures = [
        ("Documents read", documents.get("read"), ""),
        ("Documents kept", documents.get("kept"), share_text(documents.get("kept"), documents.get("read"))),
        ("Bytes", audit.get("bytes"), "UTF-8, kept"),
        ("Tokens", audit.get("tokens"), ""),
        ("Bytes per token", tokenizer.get("bytes_per_token"), "higher is denser"),
        ("Round-trip failures", tokenizer.get("round_trip_failures"), "decode(encode(text)) ≠ text"),
    ]
    lengths = [(str(label), count) for label, count in audit.get("lengths") or [] if is_number(count)]
    shown_texts = [
        f"<h3>{escape(rule_heading(rule, audit))}</h3>" + "".join(quote(show_sample(row)) for row in rows)
        for rule, rows in (audit.get("samples") or {}).items()
        if rows
    ]
    body = [
        f"<h1>Corpus audit</h1><p class='soft'>{escape(str(audit.get('key', '')))}</p>",
        "".join(f"<p>{escape(note)}</p>" for note in audit.get("notes") or []),
        cards((name, format_short(value), note) for name, value, note in figures if is_number(value)),
        section("Sources", sources_table(audit.get("sources") or [])),
        section("Removed", removed_bars(audit), rules_table(audit.get("sources") or [])),
        section("Document lengths", column_chart(lengths, "Documents by length", "length")),
        section("Tokenizer", facts_table(tokenizer)),
        section(
            "Passages shared with evaluation text",
            table(["source", "passage", "documents"], audit.get("passages") or []),
        ),
        section("What each rule removed or changed", *shown_texts),
        section("Duplicates", *[duplicate_cluster(cluster) for cluster in audit.get("duplicates") or []]),
    ]
    write_atomic(path, page("Corpus audit · hfkit", "".join(body)))


def audit_summary(audit: dict[str, Any]) -> str:
    """Return the corpus in figures, and what was removed from it."""
    facts: dict[str, Any] = {
        name: audit[name] for name in ("documents", "bytes", "tokens", "tokenizer", "key") if name in audit
    }
    return facts_table(facts) + (f"<h3>Removed</h3>{removed}" if (removed := removed_bars(audit)) else "")


def removed_bars(audit: dict[str, Any]) -> str:
    """Return what each rule removed, the most first."""
    removed = [(rule.replace("_", " "), n) for rule, n in (audit.get("removed") or {}).items() if is_number(n) and n]
    read = (audit.get("documents") or {}).get("read")
    return bar_list(sorted(removed, key=lambda row: -row[1]), read if is_number(read) else None) if removed else ""


def sources_table(sources: list[dict[str, Any]]) -> str:
    """Return what each source holds."""
    columns = [name for name, value in sources[0].items() if not isinstance(value, dict)] if sources else []
    return table([name.replace("_", " ") for name in columns], [[row.get(name) for name in columns] for row in sources])


def rules_table(sources: list[dict[str, Any]]) -> str:
    """Return what each rule removed of each source: documents, and bytes."""
    rows = [
        (rule.replace("_", " "), source.get("name"), part["documents"], part["bytes"])
        for source in sources
        for rule, part in (source.get("removed_by_rule") or {}).items()
    ]
    return table(["rule", "source", "documents", "bytes"], sorted(rows, key=lambda row: (row[0], -row[2])))


def rule_heading(rule: str, audit: dict[str, Any]) -> str:
    """Return a rule's name and how many documents it removed or changed."""
    counts = [(audit.get(kind) or {}).get(rule) for kind in ("removed", "changed")]
    told = [f"{kind} {n:,}" for kind, n in zip(("removed", "changed"), counts, strict=True) if n]
    return " · ".join([rule.replace("_", " "), *told])


def show_sample(row: dict[str, Any]) -> str:
    """Return a sample as one passage: where it is from, its text, and what else is known of it."""
    known = [(name, shorten(value, PASSAGE)) for name, value in row.items() if name not in ("where", "text")]
    more = "".join(f"\n→ {name}: {value}" for name, value in known)
    return f"{row.get('where', '')}: {shorten(row.get('text', ''), PASSAGE)}{more}"


def share_text(part: Any, whole: Any) -> str:
    """Return a share in per cent, or empty text."""
    return f"{part / whole:.1%} of them" if is_number(part) and is_number(whole) and whole else ""


def duplicate_cluster(cluster: dict[str, Any]) -> str:
    """Return one group of documents of which the first was kept."""
    removed = [shorten(text, PASSAGE) for text in cluster.get("removed") or []]
    size = cluster.get("size", len(removed))
    told = f"{size:,} removed" + (f", of which the first {len(removed)}" if size > len(removed) else "")
    return quote(shorten(cluster.get("kept", ""), PASSAGE)) + fold(told, "".join(map(quote, removed)))
