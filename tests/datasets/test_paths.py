"""No text of a card, a list, an archive or an index opens or writes a file outside the folders that it belongs to.

The texts are found by introspection of the option classes and of the files of miniature data sets. Every file that
Python opens is seen by an audit hook.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import re
import shutil
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest

from tests.datasets.layouts import encoded, write_layout
from tests.fixtures.audit import touching
from vlprompt.config.run import RunConfig
from vlprompt.config.types import field_hints, literals
from vlprompt.datasets import card_files
from vlprompt.datasets.acquire import download
from vlprompt.datasets.acquire.transfer import Network
from vlprompt.datasets.card import Card, describe
from vlprompt.datasets.card_files import _NOT_IN_FILE
from vlprompt.datasets.options import OPTIONS
from vlprompt.datasets.readers import new_report, read_into
from vlprompt.datasets.records import SPLITS
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.pairs import load
from vlprompt.runs.folder import run_folder

# -- texts of an option class -----------------------------------------------------------------------------------------
Steps = tuple[str | type, ...]
ITEM, VALUE, KEY = list, dict, set


def texts(hint: Any, reader: str) -> Iterator[Steps]:
    """Yield the steps to every text in a value of ``hint``: names of fields, and ITEM, VALUE and KEY."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from texts(args[0], reader)
    elif hint is str or hint is Any:
        yield ()
    elif origin in (Union, types.UnionType):
        for option in {OPTIONS[reader]} if set(args) & set(OPTIONS.values()) else args:
            yield from texts(option, reader)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        for name, inner in field_hints(hint).items():
            if not (hint is Card and name in _NOT_IN_FILE and name != "options"):
                own = "reader_options" if hint is Card and name == "options" else name
                yield from ((own, *steps) for steps in texts(inner, reader))
    elif origin is tuple:
        yield from ((ITEM, *steps) for steps in texts(args[0], reader))
    elif origin in (dict, Mapping):
        yield from ((KEY, *steps) for steps in texts(args[0], reader))
        yield from ((VALUE, *steps) for steps in texts(args[1], reader))
    else:
        assert origin is Literal or hint in (int, float, bool, type(None)), hint


def put(content: Any, steps: Steps, change: Callable[[str], str], default: str) -> Any:
    """Return ``content`` with the first text that ``steps`` lead to changed; what is absent is added as ``default``."""
    if not steps:
        return change(content if isinstance(content, str) else default)
    step, rest = steps[0], steps[1:]
    if step is ITEM:
        first, *others = content if isinstance(content, list) and content else [None if content is None else content]
        return [put(first, rest, change, default), *others]
    table = dict(content) if isinstance(content, dict) and content else {}
    if isinstance(step, str):
        return {**table, step: put(table.get(step), rest, change, default)}
    key, *keys = table or {default: None}
    if step is KEY:
        renamed = {put(key, rest, change, default): table.get(key, default)}
        return renamed | {other: table[other] for other in keys}
    return {**table, key: put(table.get(key), rest, change, default)}


# -- fragments --------------------------------------------------------------------------------------------------------
class Places(NamedTuple):
    """The data root, a copy of the data set outside of it, and the cache."""

    root: Path
    outside: Path
    cache: Path

    @property
    def base(self) -> Path:
        """Folder of the data set."""
        return self.root / "toy"


def fragments(places: Places, value: str) -> list[str]:
    """Return texts in place of ``value`` that would lead to its copy outside, and others that are no paths."""
    up = [f"{'../' * steps}outside/{value}" for steps in (1, 2, 3, 4)]
    absolute = f"{places.outside}/{value}"
    braces = [f"{{0[0]}}{{0[0]}}/outside/{value}", f".{{domain}}/{value}", "{class}", "{a}", "{", "{}{}", "{!z}"]
    linked = [f"door/{value}"] if (places.base / value).is_file() else []  # a folder may be a link of the user
    controls = [f"{value}\0", f"\x1b]0;{value}\x07", f"{value}\n../../outside/{value}", "\ud800", "\u202e"]
    return [
        *up, absolute, f"/{absolute}", f"file://{absolute}", f"~/outside/{value}", f"~root/{value}",
        f"x/../../../outside/{value}", f"x/../../../../outside/{value}", "..", "../..", ".", "", "/", "~", "*",
        f"{value}/../../../outside/{value}", f"{value}#..", f"..\\..\\outside\\{value}", f"C:\\{value}", "C:x",
        f"%2e%2e/%2e%2e/outside/{value}", f"https://x.org/..%2f..%2foutside%2f{value}", "NUL", "-", "[/b]", "a" * 300,
        *braces, *linked, *controls,
    ]  # fmt: skip


# -- miniature data sets ----------------------------------------------------------------------------------------------
def _card(reader: str, options: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {
        "schema": 1, "name": "toy", "task": "multiclass", "folders": ["toy"], "aliases": ["toys"], "group": ["own"],
        "reader": reader, "reader_options": options, "metric": "accuracy", "notes": "none",
        "classes": {"count": 2, "names_from": "list", "names": ["ant", "cup"], "keys": ["ant", "cup"]},
        "templates": {"single": "a {}.", "ensembles": {"two": ["the {}.", "ensemble:single"]}},
        "splits": {"mine": {"train": 4}}, "excluded": ["gone.png"], **facts,
    }  # fmt: skip


SOURCE = {"what": "toy.tar", "url": "https://x.org/toy.tar", "unpack": "new", "strip": "top", "inner": "in.tar"}


RUN = RunConfig("zeroshot", output="runs")
TWO, DOMAINS = ["train", "test"], {"art": "a", "photo": "p"}
LISTS = {split: [f"{split}.txt"] for split in TWO}
OWN = _card("folder", {}, classes={"names_from": "folders"}, splits={}, excluded=[])
CARDS = {
    "split_json": _card("split_json", {"split_file": "s.json", "image_dir": "images"}),
    "split_json, archives": _card(
        "split_json", {"split_file": "s.json", "archive": "zips/{}.zip"}, domains=DOMAINS, same_images=True
    ),
    "folder": _card(
        "folder", {"image_dir": "images", "splits": {s: [f"{s}/{{domain}}"] for s in TWO}}, domains=DOMAINS,
        sources=[SOURCE, {"what": "list.txt", "url": "https://x.org/list.txt", "to": "list.txt"}],
    ),
    "folder of the user": OWN,
    "folder of the user, cut": OWN,
    "list_file, lines": _card(
        "list_file", {"splits": {s: [f"{s}_{{domain}}.txt"] for s in TWO}, "image_dir": "pics", "names_file": "n.txt"},
        domains=DOMAINS,
    ),
    "list_file, per_class": _card(
        "list_file", {"splits": {s: [f"{s}/{{class}}.txt"] for s in TWO}, "format": "per_class", "suffix": ".png"},
        task="multilabel", metric="map",
    ),
    "list_file, coco": _card(
        "list_file", {"splits": {s: [f"{s}.json"] for s in TWO}, "format": "coco", "folders": {s: s for s in TWO}},
        task="multilabel", metric="map",
    ),
    "list_file, jsonl": _card("list_file", {"splits": LISTS, "format": "jsonl", "label": "name"}),
    "torchvision": _card(
        "torchvision",
        {"dataset": "CLEVRClassification", "splits": {"train": {"split": "train"}, "test": {"split": "val"}}},
    ),
    "shards, webdataset": _card("shards", {"splits": {s: [s] for s in TWO}}),
    "shards, parquet": _card("shards", {"splits": {s: [f"{s}-*.parquet"] for s in TWO}, "format": "parquet"}),
    "pairs": _card("pairs", {"split_file": "pairs.jsonl", "image_dir": "images"}),
}  # fmt: skip


def test_every_reader_and_format_is_among_the_cards() -> None:
    cards = [(card["reader"], card["reader_options"].get("format")) for card in CARDS.values()]
    formats = {
        (reader, value) for reader, kind in OPTIONS.items() for value in literals(field_hints(kind).get("format"))
    }
    assert {reader for reader, _ in cards} == set(OPTIONS)
    defaults = {"list_file": "lines", "shards": "webdataset"}
    assert formats <= {(reader, value or defaults.get(reader)) for reader, value in cards}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A data root with links that lead out of it, ``door``."""
    made = Places(tmp_path / "data", tmp_path / "outside", tmp_path / "cache")
    for folder in (made.base / "images", made.cache):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VLPROMPT_CACHE", str(made.cache))
    monkeypatch.setenv("TMPDIR", str(made.cache))
    monkeypatch.setattr("tempfile.tempdir", str(made.cache))
    monkeypatch.chdir(made.cache)
    monkeypatch.setattr(download, "download", _pretend)
    return made


def _pretend(url: str, partial: Path, *others: Any) -> None:
    """Write what a download would: an archive with an archive in it."""
    inner, outer = io.BytesIO(), io.BytesIO()
    for stream, name, data in ((inner, "a.txt", b"a"), (outer, "top/in.tar", None)):
        with tarfile.open(fileobj=stream, mode="w") as archive:
            info = tarfile.TarInfo(name)
            data = inner.getvalue() if data is None else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    partial.write_bytes(outer.getvalue())


def write_data(kind: str, places: Places) -> None:
    """Write the data set of a kind of card, and its copy outside."""
    content, cut = CARDS[kind], kind.endswith(", cut")
    card = _read(content, places)
    if card.reader == "pairs":
        lines = [{"image": f"{name}.png", "caption": f"a {name}"} for name in ("ant", "cup")]
        (places.base / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("ant", "cup"):
            (places.base / "images" / f"{name}.png").write_bytes(encoded(".png"))
    elif content is OWN:
        for folder in ("train/ant", "train/cup", "test/ant", "test/cup") if cut else ("ant", "cup"):
            for number in range(3):
                path = places.base / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(".png", number))
        names = "ant an ant\ncup a cup\n" if cut else json.dumps({"ant": "an ant", "cup": "a cup"})
        (places.base / ("names.txt" if cut else "classes.json")).write_text(names)
    else:
        write_layout(card, places.root, per_class=(1, 0, 1))
    shutil.copytree(places.base, places.outside)
    images = places.base / "images"
    for folder in (places.root, *((images, places.base) if any(images.iterdir()) else ())):
        (folder / "door").symlink_to(places.outside)
    if not any(images.iterdir()):
        images.rmdir()


def _read(content: dict[str, Any], places: Places) -> Card:
    """Return the card of a YAML file with this content."""
    problems: list[str] = []
    card = card_files._card(content, places.cache / "card.yaml", True, problems)
    if card is None or problems:
        raise ConfigError(problems[0])
    return card


def use(card: Card, places: Places, fetch: bool) -> None:
    """Do all that a user may do with a card."""
    describe(card)
    for ensemble in ("single", *card.templates.ensembles):
        card.texts().resolve([f"ensemble:{ensemble}"], "data.template")
    for name in {card.name, *card.aliases} - {"toy", "toys"}:
        assert run_folder(replace(RUN, data=replace(RUN.data, name=name))).parent.parent == Path("runs/zeroshot")
    if card.reader == "pairs":
        _open(pair.source for pair in load.load_pairs(card.name, root=places.root))
    for split in () if card.reader == "pairs" else ("", *card.splits):
        chosen = replace(card, split="").with_split(split or None)
        report = new_report(chosen, places.root)
        lists = read_into(chosen, places.root, report)
        _open(sample.source for part in SPLITS for sample in getattr(lists, part))
    if fetch and card.sources:
        fetched = places.cache / "fetched"
        try:
            download.get(card, fetched, report=lambda _: None, network=Network(pause=0))
        finally:
            shutil.rmtree(fetched, ignore_errors=True)


def _open(sources: Iterable[Any]) -> None:
    for source in sources:
        source.encoded() if hasattr(source, "encoded") else source.open()


def touched(
    content: dict[str, Any], places: Places, monkeypatch: pytest.MonkeyPatch, *, fetch: bool = False
) -> tuple[list[str], bool]:
    """Return what the use of a card touches outside, and whether it was accepted."""
    accepted = False
    with warnings.catch_warnings(), touching(places.root, places.cache) as outside:
        warnings.simplefilter("ignore")
        try:
            card = _read(content, places)
            monkeypatch.setattr(load, "_card", lambda _: card)
            use(card, places, fetch)
            accepted = True
        except VlpromptError:
            pass
    return outside, accepted


#: Of the fragments for texts in these fields of a card, each kind tries one in so many; of those in others, one in all.
EVERY = {"reader_options": 1, "folders": 1, "domains": 1, "classes": 3, "splits": 3}


@pytest.mark.parametrize("kind", CARDS)
def test_no_text_of_a_card_leads_out(kind: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the reader are tried with all fragments; those that all readers share, with some in each kind."""
    content, number = CARDS[kind], list(CARDS).index(kind)
    write_data(kind, places)
    assert touched(content, places, monkeypatch, fetch=True) == ([], True)
    file = min(path.relative_to(places.base).as_posix() for path in places.base.rglob("*") if path.is_file())
    for steps in dict.fromkeys(texts(Card, content["reader"])):
        given: list[str] = []
        put(content, steps, lambda text, given=given: given.append(text) or text, file)  # type: ignore[misc]
        every = EVERY.get(str(steps[0]), len(CARDS))
        for fragment in fragments(places, given[0])[number % every :: every]:
            changed = put(copy.deepcopy(content), steps, lambda _, fragment=fragment: fragment, file)  # type: ignore[misc]
            fetch = steps[0] in ("name", "folders", "sources")
            assert touched(changed, places, monkeypatch, fetch=fetch)[0] == [], (steps, fragment)


# -- files of a data set ----------------------------------------------------------------------------------------------
def changed_files(path: Path, change: Callable[[str], list[str]]) -> Iterator[tuple[Any, str, bytes]]:
    """Yield contents of a file with one text changed: where, the new text and the new content.

    Of texts in the same place of a list, such as all paths, only the first is changed.
    """
    data = path.read_bytes()
    if zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
        for name in (name for first in _names(data)[:1] for name in change(first)):
            yield "a member", name, _renamed(data, name)
        return
    try:
        text = data.decode()
        lines = text.splitlines()
    except UnicodeDecodeError:
        return  # an image
    if path.suffix in (".json", ".jsonl"):
        content, *others = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else [json.loads(text)]
        for steps, old in _leaves(content, ()):
            for new in change(old):
                values = [_with(content, steps, new), *others]
                yield steps, new, "\n".join(map(json.dumps, values)).encode()
        return
    for position, found in enumerate(re.finditer(r"[^ ,\t]+", lines[-1])):
        for new in change(found[0]):
            last = lines[-1][: found.start()] + new + lines[-1][found.end() :]
            yield position, new, "\n".join([*lines[:-1], last]).encode(errors="surrogatepass")


def _leaves(value: Any, steps: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield the texts of a JSON value with the steps to them: of a list of lists or objects only those of the first."""
    if isinstance(value, str):
        yield steps, value
    if isinstance(value, dict) and value and all(isinstance(inner, str) for inner in value.values()):
        yield (*steps, KEY), next(iter(value))
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        short = isinstance(value, dict) or not isinstance(inner, list | dict)
        if short or step == 0:
            yield from _leaves(inner, (*steps, step))


def _with(value: Any, steps: tuple[Any, ...], new: str) -> Any:
    if not steps:
        return new
    if steps[0] is KEY:
        first = next(iter(value))
        return {new if key == first else key: inner for key, inner in value.items()}
    changed = copy.copy(value)
    changed[steps[0]] = _with(value[steps[0]], steps[1:], new)
    return changed


def _names(data: bytes) -> list[str]:
    stream = io.BytesIO(data)
    return zipfile.ZipFile(stream).namelist() if zipfile.is_zipfile(stream) else tarfile.open(fileobj=stream).getnames()


def _renamed(data: bytes, name: str) -> bytes:
    """Return an archive whose first member has another name."""
    source, target = io.BytesIO(data), io.BytesIO()
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for number, info in enumerate(old.infolist()):
                changed = name.encode(errors="replace").decode() or "_"
                new.writestr(info.filename if number else changed, old.read(info))
    else:
        with tarfile.open(fileobj=source) as old, tarfile.open(fileobj=target, mode="w", errors="surrogatepass") as new:
            for number, member in enumerate(old.getmembers()):
                stream = old.extractfile(member)
                member.name = member.name if number else name
                new.addfile(member, stream)
    return target.getvalue()


@pytest.mark.parametrize("kind", CARDS)
def test_no_text_of_a_file_leads_out(kind: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    content = CARDS[kind]
    write_data(kind, places)
    tried = set()
    kinds: dict[Any, Path] = {}  # one file of each form
    for path in sorted(path for path in places.base.rglob("*") if path.is_file() and "door" not in path.parts):
        kinds.setdefault((path.suffix, len(path.read_bytes().partition(b"\n")[0].split())), path)
    for path in kinds.values():
        before = path.read_bytes()
        for where, new, data in changed_files(path, lambda old: fragments(places, old)):
            tried.add(where)
            path.write_bytes(data)
            assert touched(content, places, monkeypatch)[0] == [], (path.name, where, new)
        path.write_bytes(before)
    assert tried or kind == "shards, parquet" or kind == "folder"


@pytest.mark.parametrize("kind", CARDS)
def test_no_file_that_is_a_link_leads_out(kind: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    content = CARDS[kind]
    write_data(kind, places)
    files = [path for path in places.base.rglob("*") if path.is_file() and "door" not in path.parts]
    for path in files:
        path.rename(aside := places.cache / "aside")
        path.symlink_to(places.outside / path.relative_to(places.base))
        assert touched(content, places, monkeypatch)[0] == [], path.name
        path.unlink()
        aside.rename(path)
    assert touched(content, places, monkeypatch) == ([], True)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.jsonl", "folder", "shards"])
def test_no_text_of_captioned_images_of_the_user_leads_out(name: str, places: Places) -> None:
    source = places.base / name
    rows = [("images/ant.png", "an ant"), ("images/cup.png", "a cup")]
    if name.startswith("pairs"):
        separator = "\t" if name.endswith("tsv") else ","
        lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
        table = [separator.join(row) for row in (("image", "caption"), *rows)]
        source.write_text("\n".join(lines if name.endswith("jsonl") else table) + "\n")
    for image, caption in rows:
        (places.base / image).write_bytes(encoded(".png"))
        if name == "folder":
            source = places.base / "images"
            (places.base / image).with_suffix(".txt").write_text(caption)
    if name == "shards":
        source = places.base / "a.tar"
        with tarfile.open(source, "w") as archive:
            for key in ("ant", "cup"):
                for ending, data in (("png", encoded(".png")), ("txt", b"text"), ("json", b'{"caption": "text"}')):
                    info = tarfile.TarInfo(f"images/{key}.{ending}")
                    info.size = len(data)
                    if ending != "json" or key == "cup":
                        archive.addfile(info, io.BytesIO(data))
    shutil.copytree(places.base, places.outside)
    for folder in (places.base, places.base / "images"):
        (folder / "door").symlink_to(places.outside)

    def touched() -> list[str]:
        with warnings.catch_warnings(), touching(places.base, places.cache) as outside:
            warnings.simplefilter("ignore")
            with contextlib.suppress(VlpromptError):
                _open(pair.source for pair in load.load_pairs(source))
        return outside

    files = [path for path in places.base.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert touched() == [] and files
    for path in files:
        before = path.read_bytes()
        for where, new, data in changed_files(path, lambda old: fragments(places, old)):
            path.write_bytes(data)
            assert touched() == [], (path.name, where, new)
        path.write_bytes(before)
    for path in [path for path in places.base.rglob("*") if path.is_file() and path != source]:
        path.rename(aside := places.cache / "aside")
        path.symlink_to(places.outside / path.relative_to(places.base))
        assert touched() == [], path.name
        path.unlink()
        aside.rename(path)
