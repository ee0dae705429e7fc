"""Comparison of a data set as read with the facts on its card."""

from __future__ import annotations

from vlprompt._files import sha256_lines
from vlprompt.datasets.card import Card
from vlprompt.datasets.records import SPLITS, SplitLists
from vlprompt.datasets.report import Report

_CUSTOM = "results on it cannot be compared with published ones"


def compare_with_card(card: Card, lists: SplitLists, report: Report, file_sha256: str = "") -> None:
    """Rules S13, S14 and S20: different sizes or content are a warning, different classes an error."""
    check_classes(card, lists.class_names, report)
    facts = card.facts
    sizes = {split: len(getattr(lists, split)) for split in SPLITS}
    wrong = [
        f"{split} has {sizes[split]:,} images, the card states {size:,}"
        for split, size in (card.sizes or {}).items()
        if sizes[split] != size
    ]
    content = lists.content_sha256() if facts.content_sha256 or facts.file_sha256 else ""
    known = {facts.content_sha256: content, facts.file_sha256: file_sha256}
    published = any(expected is not None and expected == actual for expected, actual in known.items())
    report.facts["published"] = published if content else None
    if published:
        return
    for text in wrong:
        report.warn("S13", f"{text} ({card.split}); {_CUSTOM}")
    if content and not wrong:
        report.warn("S14", f"the split differs from the published one; {_CUSTOM}")


def check_classes(card: Card, names: list[str], report: Report) -> None:
    """Rule S20: the count, the names and their order match those that the card states."""
    facts = card.classes
    if facts.count is not None and len(names) != facts.count:
        report.error("S20", f"{len(names):,} classes; {card.name} has {facts.count:,}")
        return
    order = f" (order: {facts.order})" if facts.order else ""
    pairs = enumerate(zip(names, facts.names, strict=False))
    differ = [
        f"label {label} is {name!r}; the card states {expected!r}{order}"
        for label, (name, expected) in pairs
        if name != expected
    ]
    report.errors("S20", differ)
    if not facts.names and facts.names_sha256 not in (None, sha256_lines(names)):
        report.error("S20", f"the class names or their order differ from the card's{order}")
