"""``vlprompt data``: list, locate, check and fetch data sets, and draw few-shot images from them.

Exit statuses: 0 good; 1 warnings, with ``--strict``; 2 data that cannot be used; 3 wrong usage. Nothing here imports
torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlprompt._files import home_path
from vlprompt._terminal import show, show_json, show_problem, text_of
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, read_command_line, refuse
from vlprompt.datasets.card import Card, data_roots, describe
from vlprompt.datasets.catalogue import (
    all_cards,
    card_class_names,
    find_card,
    list_datasets,
    list_groups,
    user_card_folder,
)
from vlprompt.datasets.records import shots_in_words
from vlprompt.errors import ConfigError, DataError, did_you_mean

_SHOWN = 40
DATA_HELP = """\
vlprompt data ACTION [NAME] [--root DIR] ...

  list [PATTERN] [--group G] [--json]    the data sets of vlprompt, and which of them are here
  show NAME [--json]                     classes, sizes, templates, sources, licence and how to get it
  where NAME                             the folders that are searched
  check [NAME...] [--decode] [--strict] [--hash-images] [--split S] [--json]
                                         all problems of a data set; no NAME: all data sets here
  get NAME [--from FILE]                 download it if allowed, or print what to download by hand
  shots NAME [--shots 16] [--seed 1] [--part train|val|test] [--classes all|base|new] [--sampler S] [--split S]
        [--paths] [--print-hash] [--export FILE]
                                         the images of a few-shot run: counts and hashes, or ordered paths
  import-shots FILE --name NAME [--export OUT]
                                         make a few-shot list from an index file of cross_modal_adaptation
  split NAME [--protocol NAME|custom]    list the splits; custom makes one from class folders
  new --from-folder DIR --name NAME [--template T]
                                         make a data set from your images: a card and a split file

DIR is the folder of the data sets (default: VLPROMPT_DATA, else data). Status: 0 good, 1 warnings with
--strict, 2 data that cannot be used, 3 wrong usage.
"""


def data(words: list[str]) -> int:
    """Run ``vlprompt data WORDS`` and return its status."""
    if not words:
        show(DATA_HELP, end="")
        return 3
    try:
        if words[0] not in ACTIONS:
            raise ConfigError(f"there is no `vlprompt data {words[0]}`.{did_you_mean(words[0], ACTIONS)}")
        return ACTIONS[words[0]](words[1:])
    except ConfigError as error:
        show_problem(f"vlprompt: error: {error}")
        return 3


def _read(
    words: list[str], action: str, *, flags: tuple[str, ...] = (), options: tuple[str, ...] = (), names: int | None = 1
) -> CommandLine:
    """Return the command line of an action with ``names`` operands (``None``: any number)."""
    line = read_command_line(words, f"data {action}", flags=flags, options=options, operands=True)
    for key in (*line.overrides, *(["config"] if line.configs else [])):
        line.refuse(key, ())
    if names is not None and len(line.operands) != names:
        wanted = "no NAME" if names == 0 else "one NAME"
        line.problems.append(f"{COMMAND_LINE}: data {action} takes {wanted}, got {len(line.operands)}")
    if line.problems:
        refuse(line.problems, "data")
    return line


def _number(line: CommandLine, key: str, default: int) -> int:
    text = line.options.get(key, str(default))
    if not re.fullmatch(r"-?[0-9]{1,10}", text):
        raise ConfigError(f"--{key} is {text!r}; accepted: a whole number")
    return int(text)


def _root(line: CommandLine) -> str | None:
    return line.options.get("root")


# -- listing ------------------------------------------------------------------------------------------------------
def _list(words: list[str]) -> int:
    line = _read(words, "list", flags=("json",), options=("root", "group"), names=None)
    pattern = line.operands[0] if line.operands else "*"
    names = list_datasets(pattern)
    if group := line.options.get("group"):
        if group not in (groups := list_groups()):
            raise ConfigError(f"there is no group {group!r}.{did_you_mean(group, groups)}")
        names = [name for name in names if name in groups[group]]
    if not names:
        raise ConfigError(f"no data set matches {pattern!r}.{did_you_mean(pattern.strip('*'), list_datasets())}")
    rows = [_row(find_card(name), _root(line)) for name in names]
    if "json" in line.flags:
        show_json(rows)
        return 0
    from rich.table import Table

    table = Table("name", "classes", "train", "val", "test", "groups", "here", box=None, pad_edge=False)
    for row in rows:
        numbers = [f"{row[key]:,}" if row[key] is not None else "-" for key in ("classes", "train", "val", "test")]
        table.add_row(row["name"], *numbers, ", ".join(row["group"]), "yes" if row["here"] else "")
    show(text_of(table))
    return 0


def _row(card: Card, root: str | None) -> dict[str, Any]:
    sizes = card.sizes or {}
    counts = {split: sizes.get(split) for split in ("train", "val", "test")}
    here = card.packaged or (card.folders != (".",) and card.base(root).is_dir()) or card.root is not None
    return {"name": card.name, "classes": card.classes.count, **counts, "group": list(card.group), "here": here}


def _show(words: list[str]) -> int:
    line = _read(words, "show", flags=("json",))
    card = find_card(line.operands[0])
    if "json" in line.flags:
        show_json(describe(card))
        return 0
    names = card_class_names(card) or []
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    rows = [
        ("name", " ".join([card.name, f"(also: {', '.join(card.aliases)})" if card.aliases else ""])),
        ("groups", ", ".join(card.group)),
        ("task", f"{card.task}, scored by {card.metric}"),
        (
            "classes",
            f"{card.classes.count if card.classes.count is not None else 'as you have them'}: {some}".rstrip(": "),
        ),
        ("order", card.classes.order),
        *(("split", f"{name}: {_sizes(split)}") for name, split in card.splits.items()),
        ("domains", ", ".join(card.domains)),
        ("template", card.template),
        *(
            (f"ensemble {name}", f"{len(card.texts().resolve([f'ensemble:{name}'], name))} templates")
            for name in card.templates.ensembles
        ),
        ("reader", f"{card.reader} {_options(card)}"),
        *(
            ("source", f"{source.what}: {source.page}" + (" (vlprompt data get)" if source.url else ""))
            for source in card.sources
        ),
        ("licence", f"{card.licence.text} {card.licence.page}"),
        ("notes", card.notes),
        ("card", card.file),
    ]
    _print_rows(rows)
    return 0


def _sizes(split: Any) -> str:
    sizes = {part: getattr(split, part) for part in ("train", "val", "test")}
    known = ", ".join(f"{size:,} {part}" for part, size in sizes.items() if size is not None)
    return known + (f", content SHA-256 {split.content_sha256}" if split.content_sha256 else "")


def _options(card: Card) -> str:
    options = describe(card).get("options", {})
    return "; ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in options.items())


def _print_rows(rows: list[tuple[str, str]]) -> None:
    import textwrap

    width = max(len(key) for key, _ in rows) + 2
    for key, text in rows:
        if text.strip():
            lines = textwrap.wrap(text.strip(), 118 - width, break_long_words=False, break_on_hyphens=False)
            show("\n".join(f"{key if not at else '':<{width}}{part}" for at, part in enumerate(lines)))


def _where(words: list[str]) -> int:
    line = _read(words, "where", options=("root",))
    card = find_card(line.operands[0])
    for place in card.places(_root(line)):
        show(f"{place}  ({'here' if place.is_dir() else 'not there'})")
    show(f"card: {card.file}")
    show(f"your own cards: {user_card_folder()}")
    return 0


# -- checking -----------------------------------------------------------------------------------------------------
def _check(words: list[str]) -> int:
    flags = ("decode", "strict", "json", "hash-images")
    line = _read(words, "check", flags=flags, options=("root", "split"), names=None)
    from vlprompt.datasets.acquire.check import check
    from vlprompt.datasets.report import problem_lines

    cards = [find_card(name) for name in line.operands] or _present(_root(line))
    strict = "strict" in line.flags
    reports = [
        check(
            card.with_split(line.options.get("split")), _root(line), decode="decode" in line.flags,
            hash_images="hash-images" in line.flags, strict=strict,
        )
        for card in cards
    ]  # fmt: skip
    if "json" in line.flags:
        show_json([report.as_json() for report in reports])
    for report in reports if "json" not in line.flags else ():
        counts = ", ".join(
            f"{report.facts[split]:,} {split}" for split in ("train", "val", "test") if split in report.facts
        )
        status = "cannot be used" if report.failed else "good" if not report.problems else "usable"
        show(
            f"{report.name}: {status}. {report.base}"
            + (f": {counts}, {report.facts['classes']} classes" if counts else "")
        )
        for text in problem_lines(report.problems, _SHOWN):
            show("  - " + text.replace("\n", "\n    "))
        if text := _pixels_in_words(report.facts.get("pixels")):
            show(f"  {text}")
        if report.failed:
            show("  " + report.remedy)
    if any(report.failed for report in reports):
        return 2
    return 1 if strict and any(report.problems for report in reports) else 0


def _pixels_in_words(pixels: dict[str, Any] | None) -> str:
    """Return how turned and transparent images are read; empty if there are none."""
    parts = []
    if pixels and pixels["turned"]:
        how = "they are turned" if pixels["orientation"] == "tag" else "which is ignored, as published"
        parts.append(f"{pixels['turned']:,} with an orientation tag ({how}; data.orientation)")
    if pixels and pixels["transparent"]:
        colour = pixels["background"]
        how = f"read on {colour}" if colour else "read with the stored colours, as published"
        parts.append(f"{pixels['transparent']:,} with transparent pixels ({how}; data.background)")
    return f"images: {', '.join(parts)}" if parts else ""


def _present(root: str | None) -> list[Card]:
    cards = [card for card in all_cards().values() if _row(card, root)["here"] and card.reader != "pairs"]
    if not cards:
        places = ", ".join(map(str, data_roots(root)))
        raise ConfigError(f"no data set was found under {places}; say --root FOLDER or name one")
    return cards


# -- drawing ------------------------------------------------------------------------------------------------------
_DRAW = ("root", "shots", "seed", "part", "sampler", "split", "classes", "export")


def _shots(words: list[str]) -> int:
    line = _read(words, "shots", flags=("paths", "print-hash"), options=_DRAW)
    part = line.options.get("part", "train")
    if part not in ("train", "val", "test"):
        raise ConfigError(f"--part is {part!r}; accepted: train, val or test")
    from vlprompt._files import sha256_lines
    from vlprompt.datasets.shot_lists import shot_list_text
    from vlprompt.datasets.task import load_dataset

    task = load_dataset(
        line.operands[0], root=_root(line), shots=_number(line, "shots", 16), seed=_number(line, "seed", 1),
        classes=line.options.get("classes", "all"), sampler=line.options.get("sampler"),
        split=line.options.get("split"),
    )  # fmt: skip
    chosen = {"train": task.train, "val": task.val, "test": task.test}
    if export := line.options.get("export"):
        if task.classes != "all":
            raise ConfigError(
                "--export writes the draw over all classes; leave --classes away (base and new follow from it)"
            )
        from vlprompt.datasets.acquire.user_data import write_file

        header = {"dataset": task.name, "split_sha256": task.split_sha256, "sampler": task.sampler}
        write_file(Path(export), shot_list_text(task.train, task.val, shots=task.shots, seed=task.seed, **header))
    if "paths" in line.flags:
        show("\n".join(sample.id for sample in chosen[part]))
    elif "print-hash" in line.flags:
        show(sha256_lines(sample.id for sample in chosen[part]))
    else:
        shots = shots_in_words(task.shots, task.shots_per_class())
        show(f"{task.name}, {task.classes} classes, {shots}, seed {task.seed}, {task.sampler}")
        for name, samples in chosen.items():
            show(f"  {name:<5} {len(samples):>7,} images  SHA-256 {sha256_lines(sample.id for sample in samples)}")
        if export:
            show(f"written: {export}; use it with --data.shots_file {export}")
    return 0


def _import_shots(words: list[str]) -> int:
    options = ("root", "name", "shots", "seed", "export", "split")
    line = _read(words, "import-shots", options=options)
    from vlprompt.datasets.acquire.user_data import write_file
    from vlprompt.datasets.shot_lists import import_published

    name = line.options.get("name")
    if name is None:
        raise ConfigError("data import-shots needs --name NAME, the data set that FILE was drawn from")
    file = Path(line.operands[0])
    text = import_published(file, find_card(name).with_split(line.options.get("split")), _root(line))
    target = Path(line.options.get("export") or f"{file.stem}.jsonl")
    write_file(target, text)
    show(f"written: {target}; use it with --data.shots_file {target}")
    return 0


# -- making -------------------------------------------------------------------------------------------------------
def _split(words: list[str]) -> int:
    line = _read(words, "split", options=("root", "protocol"))
    card, protocol = find_card(line.operands[0]), line.options.get("protocol")
    if protocol == "custom":
        from vlprompt.datasets.acquire.user_data import local_split

        path = local_split(card, _root(line))
        show(f"written: {path}\nuse it with --data.split {path.name}; results on it are marked as not published")
        return 0
    if protocol is not None and protocol not in card.splits:
        raise ConfigError(f"--protocol is {protocol!r}; {card.name} has: {', '.join([*card.splits, 'custom'])}")
    for name in [protocol] if protocol else card.splits:
        chosen = card.with_split(name)
        used = "" if name == card.split else f"  (--data.split {name})"
        show(f"{name}: {_sizes(chosen.facts)}, read by {chosen.reader}{used}")
    show("custom: cut 50/20/30 from class folders by --protocol custom; never the published split")
    return 0


def _new(words: list[str]) -> int:
    line = _read(words, "new", options=("from-folder", "name", "template"), names=0)
    missing = [f"--{key}" for key in ("from-folder", "name") if key not in line.options]
    if missing:
        raise ConfigError(f"data new needs {' and '.join(missing)}: vlprompt data new --from-folder DIR --name mine")
    from vlprompt.datasets.acquire.user_data import new_card

    template = line.options.get("template", "a photo of a {}.")
    card_file, split_file, lists = new_card(line.options["name"], line.options["from-folder"], template)
    show(f"card:   {card_file}\nsplit:  {split_file}")
    counts = ", ".join(f"{len(getattr(lists, part))} {part}" for part in ("train", "val", "test"))
    show(f"{len(lists.class_names)} classes; images: {counts}")
    show(f"train:  vlprompt train --config mocoop/folder --data.name {line.options['name']} --data.root null")
    return 0


def _get(words: list[str]) -> int:
    line = _read(words, "get", options=("root", "from"))
    from vlprompt.datasets.acquire.download import get, steps

    card = find_card(line.operands[0])
    source = line.options.get("from")
    file = None if source is None else home_path(source)
    try:
        left = get(card, _root(line), source_file=file, report=print)
    except DataError:
        show("\n".join(steps(card, _root(line))))
        raise
    show("\n".join(left))
    return 0


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "where": _where,
    "check": _check,
    "get": _get,
    "shots": _shots,
    "import-shots": _import_shots,
    "split": _split,
    "new": _new,
}
