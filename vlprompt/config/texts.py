"""Texts of classes: named ensembles, files of sentences, and what a list of templates and texts refers to.

A setting with templates is a list. Its entries are

- a template, ``"a photo of a {}."``;
- ``ensemble:NAME``: the templates of this name on the data set's card, else of :data:`~.ensembles.ENSEMBLES`;
  ``ensemble:single`` is the template of the data set;
- ``file:PATH``: a JSON file, either templates or ``{class: [sentence, ...]}`` (CuPL: sarahpratt/CuPL), or one of the
  two by data set (LAION-AI/CLIP_benchmark: clip_benchmark/datasets/builder.py, ``custom_template_file``);
- ``descriptors:PATH``: a JSON file ``{class: [descriptor, ...]}``, used as "NAME, which has DESCRIPTOR" (DCLIP:
  sachit-menon/classify_by_description_release, descriptor_strings.py);
- the sentences of every class themselves, ``{class: [sentence, ...]}``;
- a pair ``[entry, weight]``; the texts of a reference share its weight. A text without a weight counts 1.

A path is relative to the configuration file that names it, else to the current folder. Everything is averaged, except
by methods with groups, for which a template or the sentences of a file are one entry each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from vlprompt._files import home_path, parse_json, read_text, sha256_json
from vlprompt.config.ensembles import ENSEMBLES
from vlprompt.config.hints import REFERENCES, ClassTexts, Sentence, Texts, checked_texts
from vlprompt.errors import ConfigError, bulleted, did_you_mean, nearest

ENSEMBLE, FILE, DESCRIPTORS = REFERENCES
SINGLE = f"{ENSEMBLE}single"
"""The template of the data set."""
TEMPLATE = "a photo of a {}."
"""CLIP's prompt: the default for templates that neither the settings nor a data set defines."""
_LARGEST = 64 << 20
_SLOTS = ("{c}", "{}")
"""Spellings of the class name's place; CLIP_benchmark writes ``{c}``."""
Rows: TypeAlias = list[tuple[tuple[str, float], ...]]
"""The sentences of each class, with their weights."""


@dataclass(frozen=True)
class DataTexts:
    """Templates of a data set, with which references are resolved.

    Attributes:
        single: Its template.
        ensembles: Its further templates by name.
        names: Its name and aliases, which files of several data sets use as keys.
    """

    single: str = TEMPLATE
    ensembles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def resolve(self, entries: Sequence[Texts], key: str, class_names: Sequence[str] = ()) -> tuple[Texts, ...]:
        """Return ``entries`` with the templates and sentences in place of references.

        Args:
            entries: Values of a setting with templates.
            key: The setting, for messages.
            class_names: Classes that every file of sentences must have.

        Raises:
            ConfigError: An unknown ensemble, or a file that is missing, is not as described, or lacks a class.
        """
        resolved: list[Texts] = []
        for entry in entries:
            body, weight = weighted(entry)
            found = self._found(body, key, class_names)
            resolved += [entry] if found == (body,) else found if weight is None else _sharing(found, weight)
        return tuple(resolved)

    def _found(self, body: str | ClassTexts, key: str, class_names: Sequence[str]) -> tuple[Texts, ...]:
        """Return what an entry without weight refers to."""
        if not is_reference(body):
            return (body,)
        reference = cast(str, body)
        kind, _, name = reference.partition(":")
        if f"{kind}:" == ENSEMBLE:
            return tuple(self._ensemble(name, key))
        texts = _read(name, f"{key} is {reference!r}", self.names, descriptors=f"{kind}:" == DESCRIPTORS)
        for mapping in (text for text in texts if isinstance(text, Mapping)):
            sentences_of(mapping, class_names, f"{key}: {name}")
        return texts

    def _ensemble(self, name: str, key: str) -> Iterator[str]:
        """Yield the templates of an ensemble, which may contain other ensembles."""
        known = {**ENSEMBLES, **self.ensembles, "single": (self.single,)}
        if name not in known:
            data = f" of {self.names[0]}" if self.names else ""
            meant = did_you_mean(name, known) if nearest(name, known) else ""
            raise ConfigError(
                f"{key}: there is no ensemble {name!r}{data}; accepted: {', '.join(sorted(known))}.{meant}"
            )
        for template in known[name]:
            if is_reference(template):
                yield from self._ensemble(template.removeprefix(ENSEMBLE), key)
            else:
                yield template


def as_data_texts(templates: str | DataTexts) -> DataTexts:
    """Return the templates of a data set that has only one, or ``templates`` itself."""
    return DataTexts(templates) if isinstance(templates, str) else templates


# -- entries ----------------------------------------------------------------------------------------------------------
def is_reference(body: object) -> bool:
    """Return whether the body of an entry names an ensemble or a file."""
    return isinstance(body, str) and body.startswith(REFERENCES)


def weighted(entry: Texts) -> tuple[str | ClassTexts, float | None]:
    """Return the body of an entry and its weight, None without one."""
    return entry if isinstance(entry, tuple) else (entry, None)


def has_references(entries: Iterable[Texts]) -> bool:
    """Return whether the number of templates depends on ensembles or files."""
    return any(is_reference(weighted(entry)[0]) for entry in entries)


def depends_on_data(entries: Iterable[Texts]) -> bool:
    """Return whether ``entries`` may differ by data set: none at all, or references."""
    entries = list(entries)
    return not entries or has_references(entries)


def _sharing(entries: Sequence[Texts], weight: float) -> list[Texts]:
    """Return ``entries`` with weights that add up to ``weight``, in proportion to their own weights."""
    parts = [weighted(entry) for entry in entries]
    total = sum(1.0 if own is None else own for _, own in parts)
    return [(body, weight * (1.0 if own is None else own) / total) for body, own in parts]


def sentences_of(texts: ClassTexts, class_names: Sequence[str], what: str = "texts of classes") -> Rows:
    """Return the sentences of each class with their weights.

    Names are compared without case, and ``_`` and ``-`` are spaces.

    Raises:
        ConfigError: A class has no sentences, or two names fit it; the text lists classes without sentences with the
            nearest names.
    """
    by_plain: dict[str, Any] = {}
    twins: dict[str, list[str]] = {}
    for name, sentences in texts.items():
        by_plain[plain_name(name)] = sentences
        twins.setdefault(plain_name(name), []).append(name)
    unclear = [name for name in class_names if name not in texts and len(twins.get(plain_name(name), ())) > 1]
    if unclear:
        spellings = " and ".join(map(repr, twins[plain_name(unclear[0])]))
        raise ConfigError(f"{what}: {spellings} both fit the class {unclear[0]!r}; accepted: one of them")
    missing = [name for name in class_names if name not in texts and plain_name(name) not in by_plain]
    if missing:
        wanted = {plain_name(name) for name in class_names}
        unused = [name for name in texts if plain_name(name) not in wanted]
        lines = [f"{name!r}{_nearest_words(name, unused)}" for name in dict.fromkeys(missing)]
        raise ConfigError(
            f"{what}: {len(lines)} of {len(class_names)} classes have no sentences:\n{bulleted(lines, limit=8)}\n"
            "accepted: 1 sentence or more for each class, under its name"
        )
    rows = [texts[name] if name in texts else by_plain[plain_name(name)] for name in class_names]
    return [tuple(map(_with_weight, sentences)) for sentences in rows]


def unknown_classes(texts: ClassTexts, class_names: Sequence[str]) -> list[str]:
    """Return a line for each class of ``texts`` that is none of ``class_names``, with the nearest name."""
    known = {plain_name(name) for name in class_names}
    return [
        f"{name!r}{_nearest_words(name, class_names)}" for name in texts if plain_name(name) not in known
    ]  # fmt: skip


def plain_name(name: str) -> str:
    """Return a class name for comparisons between lists of names."""
    return " ".join(re.split(r"[_\-\s]+", name.casefold())).strip()


def _nearest_words(name: str, names: Iterable[str]) -> str:
    near = nearest(name, names, 1)
    return f" (nearest: {near[0]!r})" if near else ""


def _with_weight(sentence: Sentence) -> tuple[str, float]:
    return (sentence, 1.0) if isinstance(sentence, str) else sentence


# -- words ------------------------------------------------------------------------------------------------------------
def described(entries: Sequence[Texts]) -> str:
    """Return a short name of a list of texts: its template, its references, or the number of its templates."""
    parts: list[str] = []
    templates = [body for entry in entries if isinstance(body := weighted(entry)[0], str) and not is_reference(body)]
    if len(templates) == 1:
        parts.append(templates[0])
    elif templates:
        parts.append(f"{len(templates)} templates")
    for entry in entries:
        body, _ = weighted(entry)
        if isinstance(body, Mapping):
            parts.append(f"sentences of {len(body)} classes")
        elif is_reference(body):
            kind, _, name = body.partition(":")
            parts.append(body if f"{kind}:" == ENSEMBLE else f"{kind}:{Path(name).name}")
    return " + ".join(parts)


# -- files ------------------------------------------------------------------------------------------------------------
def located(value: Any, folder: Path) -> Any:
    """Return a value of a configuration file in ``folder`` with paths of texts that exist relative to it."""
    if isinstance(value, list):
        return [located(item, folder) for item in value]
    if isinstance(value, Mapping):
        return {key: located(item, folder) for key, item in value.items()}
    if not isinstance(value, str) or not value.startswith((FILE, DESCRIPTORS)):
        return value
    kind, _, name = value.partition(":")
    path = folder / home_path(name)
    return f"{kind}:{path}" if path.is_file() else value


def identified(value: Any) -> Any:
    """Return a plain value with the checksum of their content in place of the paths of texts."""
    if isinstance(value, list):
        return [identified(item) for item in value]
    if isinstance(value, Mapping):
        return {key: identified(item) for key, item in value.items()}
    if not isinstance(value, str) or not value.startswith((FILE, DESCRIPTORS)):
        return value
    kind, _, name = value.partition(":")
    return f"{kind}{sha256_json(_content(name, f'the value is {value!r}'))}"


def _read(name: str, what: str, names: Sequence[str], *, descriptors: bool) -> tuple[Texts, ...]:
    """Return the entries in a file: its templates, or the sentences of its classes as one entry."""
    content = _content(name, what)
    if isinstance(content, Mapping):
        content = _of_data_set(content, names, what)
    if isinstance(content, Mapping):
        content = {key: [value] if isinstance(value, str) else value for key, value in content.items()}
        if descriptors:
            content = {key: _described(value) for key, value in content.items()}
    elif descriptors:
        raise ConfigError(f"{what}: the file holds no classes; accepted: {{class: [descriptor, ...]}}")
    try:
        entries = checked_texts(_with_slots([content] if isinstance(content, Mapping) else content))
    except ValueError as error:
        why = str(error) or "it holds other values"
        raise ConfigError(
            f"{what}: {why}; accepted: a list of templates, {{class: [sentence, ...]}}, or one of them by data set"
        ) from None
    if not entries or has_references(entries):
        raise ConfigError(f"{what}: the file is empty or names other files; accepted: templates or sentences")
    return entries


def _of_data_set(content: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """Return the content for the data set ``names`` of a file of several data sets, else ``content``."""
    keys = {plain_name(key.rpartition("/")[2]): key for key in content}
    found = next((keys[plain_name(name)] for name in names if plain_name(name) in keys), None)
    nested = any(isinstance(value, Mapping) for value in content.values())
    templates = all(
        isinstance(value, list) and value and all(isinstance(text, str) and _slots(text) for text in value)
        for value in content.values()
    )
    if found is not None and (nested or templates):
        return content[found]
    if nested:
        data = names[0] if names else "the data set"
        raise ConfigError(f"{what}: the file has texts by data set, and none for {data}.{did_you_mean(data, content)}")
    return content


def _slots(text: str) -> int:
    return sum(text.count(slot) for slot in _SLOTS)


def _with_slots(value: Any) -> Any:
    """Return texts with ``{}`` for the class name."""
    if isinstance(value, str):
        return value.replace("{c}", "{}")
    if isinstance(value, Mapping):
        return {key: _with_slots(item) for key, item in value.items()}
    return [_with_slots(item) for item in value] if isinstance(value, list) else value


def _described(descriptors: Any) -> Any:
    """Return descriptors as sentences; a class without any has an empty one, as in the official code."""
    if not isinstance(descriptors, list):
        return descriptors
    return [f"{{}}, {_relative(text)}" if isinstance(text, str) else text for text in descriptors or [""]]


def _relative(descriptor: str) -> str:
    """Return a descriptor as a relative clause (descriptor_strings.py 44-52)."""
    if descriptor.startswith(("a", "used")):
        return f"which is {descriptor}"
    if descriptor.startswith(("has", "often", "typically", "may", "can")):
        return f"which {descriptor}"
    return f"which has {descriptor}"


def _content(name: str, what: str) -> Any:
    """Return the JSON value in the file ``name``.

    Raises:
        ConfigError: The file is missing, too large or no JSON, or a key occurs twice.
    """
    path = home_path(name)
    try:
        status = path.stat()
        return _parsed(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        others = [other.name for other in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise ConfigError(
            f"{what}: the file cannot be read ({error.strerror or error}). A path is relative to the configuration "
            f"file or to the current folder.{did_you_mean(path.name, others) if nearest(path.name, others) else ''}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: the file is not usable JSON: {str(error)[:200]}") from None


@functools.lru_cache(maxsize=16)
def _parsed(path: Path, changed: int, size: int) -> Any:
    """Return the value in ``path``; a changed file is read again."""
    return parse_json(read_text(path, _LARGEST, "utf-8-sig"))
