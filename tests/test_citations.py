"""Docstrings, comments and configurations cite papers, official code and files of this repository, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("vlprompt", "tests", "configs", "datasets", "tools", "bench")
ENDINGS = {".py", ".pyi", ".yaml", ".md", ".cfg", ".toml", ""}

#: Documents that contributors had and readers have not, and numbers of their sections.
PRIVATE = re.compile(r"\bseed_methods|(?<!golden_)\bprompt_learners|\btest_time_and_cache|\bspec [0-9]|\.\./shared\b")
DOCUMENT = re.compile(r"[\w./-]*\w\.md\b")


def texts() -> Iterator[tuple[str, str]]:
    """Yield the names and contents of all text files but this one."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")] + list(ROOT.iterdir())
    for path in sorted(paths):
        name = path.relative_to(ROOT).as_posix()
        private = any(part.startswith(".") or part.endswith(".egg-info") for part in path.relative_to(ROOT).parts)
        if path.is_file() and path.suffix in ENDINGS and path != Path(__file__) and not private:
            yield name, path.read_text(encoding="utf-8")


def test_no_private_document_is_cited() -> None:
    lines = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert lines == []


def test_every_document_that_is_named_is_here() -> None:
    known = {path.name for path in ROOT.rglob("*.md")}
    absent = {
        f"{name}: {document}"
        for name, text in texts()
        for line in text.splitlines()
        for document in DOCUMENT.findall(line)
        if document.rpartition("/")[2] not in known and not re.search(r"https://|\w's \S+\.md", line)
    }
    assert sorted(absent) == []
