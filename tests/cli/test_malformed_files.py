"""Every file that a command reads, damaged in every way: in its place, in its bytes and in each of its fields.

A :class:`Kind` is a valid file and the command that reads it. Every damaged form has to end with an error status and
one screen that names the file or the key, without a traceback and without control characters, and no file may appear,
change or vanish. The forms that are accepted are listed, and must give what the valid file gives.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures import malformed
from tests.fixtures.malformed import CONTROLS, assert_refused, everything_in, remove
from tests.fixtures.valid_files import (
    CARDS,
    INDEX,
    META,
    PROTOCOL,
    RECIPE,
    SPLIT,
    TEXTS,
    Result,
    coco,
    command,
    place,
)
from vlprompt._files import file_checksum
from vlprompt.protocols.compare import _OPTIONAL, _OTHER, _PROTOCOL

__all__ = ["place"]
TRAIN = ["train", "--config", "recipe.yaml"]
PICS = ["train", "--data.name", "folder", "--data.root", "pics", "--trainer.progress", "false"]
ZEROSHOT = [*PICS, "--method", "zeroshot"]
PREDICT = ["predict", "again", "pics/apple/0.png"]
INSPECT = ["meta-train", "--config", "meta.yaml", "--inspect", "--pairs.source"]
CUT = ("half", "cut short")
TEXT = ("byte order mark", "CRLF")


@dataclass(frozen=True)
class Kind:
    """A valid file and the command that reads it.

    Attributes:
        file: The file's path; ``RUN`` is the run's folder, a pattern names the only file of that form.
        words: The command.
        names: Texts of which the message has to contain one, such as the name of the file; the name of the damaged
            field is accepted as well.
        tree: The content as plain values, to damage its fields; a function reads it from the file.
        count: Number of damaged forms of a content that is known at run time only.
        text: Whether the file is text, and is damaged as text is.
        accepted: Patterns of the forms that are accepted, and must give the result of the valid file.
        valid: Patterns of the forms that are other valid contents, and must give another result.
        refused: Patterns of the forms that are refused although they match one of these.
        excluded: Patterns of the forms that are valid contents of which nothing shows that they are damaged.
        optional: Whether the command works without the file.
        same: A command whose output is compared for accepted forms, if that of ``words`` does not show the content.
        wrong_values, depth: Number of wrong values of each field, and how deep fields are damaged.
        unfinished: Whether the run is not finished.
    """

    file: str
    words: list[str]
    names: tuple[str, ...]
    tree: Any = None
    count: int = 0
    text: bool = True
    accepted: tuple[str, ...] = TEXT
    valid: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    optional: bool = False
    same: tuple[str, ...] = ()
    wrong_values: int = 2
    depth: int = 6
    unfinished: bool = False


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def head_facts(path: Path) -> Any:
    """Return the configuration of a head; which packages have a version depends on what is installed."""
    return read(path) | {"versions": {}}


def shots(name: str, *words: str) -> list[str]:
    return ["data", "shots", name, "--shots", "1", *words]


def check(name: str, *words: str) -> tuple[str, ...]:
    return ("data", "check", name, "--json", *words)


def binary(file: str, words: list[str], *names: str, **values: Any) -> Kind:
    return Kind(file, words, names, text=False, accepted=(), **values)


#: Fields of the meta-training that have their default.
DEFAULTS = ("method", "pairs.source", "tasks.labels", "meta.order", "meta.gate_bias", "seed")
#: Fields of a card that may be left out, or empty.
FREE = ("aliases", "group", "licence*", "notes", "sources", "*.page", "*.unpack", "templates.ensembles*", "splits*")
CARD: dict[str, Any] = {
    "accepted": (
        *TEXT,
        "aliases = 'text'",
        *(f"{name} left out" for name in FREE),
        *(f"{name} = ''" for name in ("licence.*", "notes", "sources.0.page", "sources.0.unpack", "*.image_dir")),
        *("*.image_dir left out", "*.first_label left out", "*.suffix left out", "classes.names_from left out"),
        *("splits.own.train = None", "classes.count = None", "classes.count left out"),
    ),
    "valid": ("reader_options.splits.* left out",),
    "refused": ("sources.0.what left out",),
    "names": (".yaml", "is not there", "Unknown data set", "own-"),
}
KINDS: dict[str, Kind] = {
    # configurations
    "recipe": Kind(
        "recipe.yaml",
        [*TRAIN, "--print-config"],
        ("recipe.yaml",),
        RECIPE,
        valid=("* left out", "*pretrained = nan", "output = 'xxx*", "output = '../*", "data.root = '..*"),
        refused=("method left out",),
    ),
    "protocol": Kind(
        "protocol.yaml",
        ["eval", "--protocol", "protocol.yaml", "--config", "recipe.yaml", "--dry-run"],
        ("protocol.yaml",),
        PROTOCOL,
    ),
    "meta recipe": Kind(
        "meta.yaml",
        ["meta-train", "--config", "meta.yaml", "--print-config"],
        ("meta.yaml",),
        META,
        accepted=(*TEXT, *(f"{key} left out" for key in DEFAULTS)),
        valid=("* left out", "meta.gate_bias = -1e+300", "name = None"),
        refused=("meta.save_every left out",),
    ),
    "recipe of a run": Kind("RUN/config.yaml", ["eval", "RUN"], ("config.yaml",), excluded=("half",), optional=True),
    # data sets
    "card": Kind("cards/split.yaml", shots("own-split-json"), tree=CARDS["split"], **CARD),
    "card of lists": Kind(
        "cards/lines.yaml", shots("own-lines"), tree=CARDS["lines"], **CARD | {"refused": ("classes.count*",)}
    ),
    "card of shards": Kind("cards/shards.yaml", shots("own-shards"), tree=CARDS["shards"], **CARD),
    "split": Kind(
        "mine/split.json",
        shots("own-split-json"),
        ("split.json", "train", "val", "test"),
        SPLIT,
        accepted=("CRLF",),
        same=check("own-split-json"),
    ),
    "list": Kind("mine/train.txt", shots("own-lines"), ("train.txt",), same=check("own-lines")),
    "list of names": Kind("mine/names_of.txt", shots("own-names"), ("names_of.txt",), same=check("own-names")),
    "JSON lines": Kind("mine/train.jsonl", shots("own-jsonl"), ("train.jsonl",), same=check("own-jsonl")),
    "list of a class": Kind(
        "mine/apple_train.txt",
        shots("own-per-class"),
        ("apple_train.txt", "class 'apple'"),
        accepted=(*TEXT, "half"),  # it holds what the lists of other classes hold as well
        same=check("own-per-class"),
    ),
    "COCO": Kind(
        "mine/train.coco.json",
        shots("own-coco"),
        ("train.coco.json",),
        coco("train"),
        accepted=(*TEXT, "unknown field"),
        same=check("own-coco"),
    ),
    "shard": binary("mine/shards/train/0.tar", shots("own-shards"), "train/0.tar", "shards/train"),
    "number of shards": Kind(
        "mine/shards/train/nshards.txt",
        shots("own-shards"),
        ("nshards.txt",),
        accepted=("half", "cut short", "CRLF"),  # the end of the line is cut off
    ),
    "names of shards": Kind("mine/classnames.txt", shots("own-shards"), ("classnames.txt",), same=check("own-shards")),
    "index of shards": Kind(  # it is made again
        "cache/shards/*.json",
        shots("own-shards"),
        (".json",),
        read,
        30,
        accepted=("*",),
        same=("data", "check", "own-shards", "--decode"),
    ),
    "parquet": binary("mine/train.parquet", shots("own-parquet"), "train.parquet"),
    "zip": binary("mine/pictures.zip", shots("own-zip"), "pictures.zip"),
    "classes.json": Kind(
        "named/classes.json",
        shots("folder", "--root", "named"),
        ("classes.json",),
        {"apple": "red apple", "bell": "bell"},
        optional=True,
        same=check("folder", "--root", "named"),
    ),
    "names.txt": Kind(
        "numbered/names.txt",
        shots("folder", "--root", "numbered"),
        ("names.txt",),
        optional=True,
        same=check("folder", "--root", "numbered"),
    ),
    "kept split": Kind(
        "RUN/split.json",
        shots("folder", "--root", "pics", "--split", "RUN"),
        ("split.json",),
        read,
        26,
        accepted=("CRLF", "unknown field"),
    ),
    "shot list": Kind(
        "drawn.jsonl", [*TRAIN, "--data.shots_file", "drawn.jsonl", "--dry-run"], ("drawn.jsonl",), accepted=("CRLF",)
    ),
    "index of shots": Kind(
        "shot_3-seed_1.json",
        ["data", "import-shots", "shot_3-seed_1.json", "--name", "own-split-json", "--export", "imported.jsonl"],
        ("shot_3-seed_1.json",),
        INDEX,
        accepted=("CRLF", "unknown field"),
    ),
    "archive": binary("pictures.zip", ["data", "get", "own-split-json", "--from", "pictures.zip"], "pictures.zip"),
    # texts and pairs
    "texts of classes": Kind(
        "texts.json",
        [*ZEROSHOT, "--backbone.name", "demo", "--settings.templates", "[file:texts.json]", "--dry-run"],
        ("texts.json",),
        TEXTS,
        valid=("bell = 'text'", "a list of it"),
    ),
    "descriptors": Kind(
        "texts.json",
        [*ZEROSHOT, "--backbone.name", "demo", "--settings.templates", "[descriptors:texts.json]", "--dry-run"],
        ("texts.json",),
        TEXTS,
        valid=("bell = 'text'",),
    ),
    "pairs": Kind("mine/pairs.jsonl", [*INSPECT, "mine/pairs.jsonl"], ("pairs.jsonl",)),
    "table of pairs": Kind("mine/pairs.csv", [*INSPECT, "mine/pairs.csv"], ("pairs.csv",), excluded=CUT),
    "shard of pairs": binary("pairs/0.tar", [*INSPECT, "pairs"], "0.tar", "/pairs"),
    # runs
    "head": Kind(
        "again/config.json",
        PREDICT,
        ("config.json", "again holds", "'again'", "the head in again", "again was trained"),
        head_facts,
        67,
        accepted=(
            "CRLF",
            "settings.* left out",
            "objectives l*",
            "decomposition l*",
            "backbone.image_size l*",
            "training.*",
        ),
        refused=("settings.context_length left out",),
        wrong_values=1,
        depth=2,
    ),
    "tensors of a head": binary("again/head.safetensors", PREDICT, "head.safetensors"),
    "results": Kind("RUN/results.json", ["compare", "RUN", "other.json"], ("results.json",), accepted=("CRLF",)),
    "results of a finished run": Kind("RUN/results.json", TRAIN, ("results.json",), accepted=("CRLF",), optional=True),
    "environment of a run": Kind("RUN/env.json", TRAIN, ("env.json",), accepted=("CRLF",)),
    "checkpoint": binary("RUN/last.ckpt", TRAIN, "last.ckpt", optional=True, unfinished=True),
    "metrics": binary("RUN/metrics.jsonl", TRAIN, "metrics.jsonl", excluded=("empty",), optional=True, unfinished=True),
    "record of a search": Kind(
        "runs/selection.json", [*TRAIN, "--force"], ("selection.json",), text=False, accepted=(), optional=True
    ),
    "stored features": Kind(  # they are computed again
        "cache/features/*.safetensors",
        ["eval", "RUN"],
        (".safetensors",),
        text=False,
        accepted=("missing", "a dangling link", *malformed.BYTES),
    ),
    "initial head": binary("meta/head/config.json", [*TRAIN, "--init_from", "meta"], "config.json", "meta holds"),
    "regulator": binary("meta/regulator.safetensors", [*TRAIN, "--init_from", "gram:meta"], "regulator.safetensors"),
    # backbones and banks
    "weights": binary(
        "weights.safetensors",
        [*ZEROSHOT, "--backbone.name", "from-file", "--backbone.pretrained", "weights.safetensors"],
        "weights.safetensors",
        "token embeddings",
    ),
    "weights of torch": binary(
        "weights.pt", [*ZEROSHOT, "--backbone.name", "from-file", "--backbone.pretrained", "weights.pt"], "weights.pt"
    ),
    "weights in a folder": binary(
        "clip/open_clip_model.safetensors", [*ZEROSHOT, "--backbone.name", "local-dir:clip"], "open_clip_model", "clip"
    ),
    "architecture in a folder": binary(
        "clip/open_clip_config.json", [*ZEROSHOT, "--backbone.name", "local-dir:clip"], "clip"
    ),
    "recipe of a bank": binary(
        "bank/*/recipe.json",
        [*PICS, "--method", "difftpt", "--backbone.name", "demo", "--data.bank", "bank"],
        "recipe.json",
        "data.bank",
    ),
}
Put = Callable[[Path, bytes], None]


def written(change: Callable[[bytes], bytes]) -> Put:
    def put(path: Path, data: bytes) -> None:
        path.write_bytes(change(data))

    return put


def forms_of(kind: Kind, tree: Any) -> dict[str, Put]:
    """Return what puts each damaged form in the place of the file, whose bytes it gets; by name."""
    forms = {name: put for name, put in malformed.PLACES.items() if name != "missing" or not kind.optional}
    changes = {**malformed.BYTES, **(malformed.TEXT if kind.text else {})}
    forms |= {name: written(change) for name, change in changes.items()}
    if tree is not None:
        fields = malformed.damaged(tree, kind.wrong_values, kind.depth)
        forms |= {name: written(lambda data, text=text: text.encode()) for name, text in fields}
    return {name: put for name, put in forms.items() if name not in kind.excluded}


def cases() -> Iterator[Any]:
    for name, kind in KINDS.items():
        for form in forms_of(kind, None if callable(kind.tree) else kind.tree):
            yield pytest.param(name, form, id=ascii(f"{name}: {form}")[1:-1])
        for number in range(kind.count):
            yield pytest.param(name, number, id=f"{name}: field {number}")


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Result]:
    """What commands print with valid files."""
    return {}


def found(folder: Path, run: Path, pattern: str) -> Path:
    """Return the file of a kind; of stored features those of test images, of indices one of labelled images."""
    place = pattern.replace("RUN", str(run))
    if "*" not in place:
        return folder / place
    paths = sorted(folder.glob(place))
    markers = (b'split\\":\\"test', b'"widths"')
    return next(path for path in paths if "bank" in place or any(marker in path.read_bytes() for marker in markers))


def matching(form: str) -> Callable[[str], bool]:
    return lambda pattern: fnmatch.fnmatchcase(form, pattern.replace("[", "[[]"))


@pytest.mark.parametrize(("name", "form"), list(cases()))
def test_a_damaged_file_is_refused_or_changes_nothing(
    name: str, form: str | int, place: tuple[Path, Path], references: dict[tuple[str, ...], Result]
) -> None:
    (folder, run), kind = place, KINDS[name]
    words, same = ([word.replace("RUN", str(run)) for word in line] for line in (kind.words, kind.same))
    path = found(folder, run, kind.file)
    if not path.exists():
        path.write_text('{"oracle": false}')
    moved = {path: folder / "moved"}
    if kind.unfinished:
        moved |= {folder / run / name: folder / f"moved-{name}" for name in ("head", "results.json")}
    forms = forms_of(kind, kind.tree(path) if callable(kind.tree) else kind.tree)
    if isinstance(form, int):
        fields = [name for name in forms if name not in forms_of(kind, None)]
        form = fields[form]
    accepted, valid, refused = (any(map(matching(form), kinds)) for kinds in (kind.accepted, kind.valid, kind.refused))
    usable = (accepted or valid) and not refused
    if usable:
        for line in (words, same):
            if line and tuple(line) not in references:
                references[tuple(line)] = command(line)
    for original, hidden in moved.items():
        original.rename(hidden)
    try:
        forms[form](path, moved[path].read_bytes())
        before = everything_in(folder)
        result = command(words)
        assert everything_in(folder) == before, f"{form}: files changed"
        if usable:
            assert result.status == 0 and not CONTROLS.search(result.out + result.err), (form, result)
            assert (result.out == references[tuple(words)].out) is accepted, (form, result)
            assert not same or command(same).out == references[tuple(same)].out, form
        else:
            field = re.split(" = | left out| twice", form)[0].rpartition(".")[2]
            assert_refused(result, (*kind.names, *([field] if len(field) > 3 else [])))
    finally:
        for original, hidden in moved.items():
            remove(original)
            hidden.rename(original)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.count])
def test_every_field_of_a_written_file_is_damaged(name: str, place: tuple[Path, Path]) -> None:
    kind = KINDS[name]
    assert len(forms_of(kind, kind.tree(found(*place, kind.file)))) - len(forms_of(kind, None)) == kind.count


def overlaps(field: str) -> Callable[[str], bool]:
    """Return whether a key is ``field``, inside it or around it."""
    return lambda key: f"{key}.".startswith(f"{field}.") or f"{field}.".startswith(f"{key}.")


def test_compare_shows_or_refuses_every_damaged_field_that_it_compares(place: tuple[Path, Path]) -> None:
    folder, run = place
    words, path = ["compare", str(run), "other.json"], folder / run / "results.json"
    same, valid = command(words), path.read_bytes()
    assert same.status == 0
    keys = (*_PROTOCOL, *_OTHER, "versions")
    compared, optional = ([key for key in keys if key.startswith(_OPTIONAL) is flag] for flag in (False, True))
    texts = dict(malformed.damaged(read(path), wrong_values=2, depth=3))
    try:
        for form, text in texts.items():
            path.write_text(text)
            result = command(words)
            field = re.split(" = | left out| twice", form)[0]
            if result.status == 2:
                assert_refused(result, ("results.json", "is no results file"))
            elif any(map(overlaps(field), compared)):
                assert result.out != same.out and not CONTROLS.search(result.out + result.err), form
            elif not any(map(overlaps(field), optional)):
                assert result == same, form
    finally:
        path.write_bytes(valid)
    assert len(texts) > 200


# -- tensors ----------------------------------------------------------------------------------------------------------
TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fewer rows": lambda tensor: tensor[:-1],
    "one more dimension": lambda tensor: tensor[None],
    "one row": lambda tensor: tensor[0],
    "a scalar": lambda tensor: tensor.sum(),
    "nothing": lambda tensor: tensor[:0],
    "whole numbers": lambda tensor: tensor.long(),
    "booleans": lambda tensor: tensor > 0,
    "complex numbers": lambda tensor: tensor.to(torch.complex64),
    "a NaN": lambda tensor: torch.where(torch.arange(tensor.numel()).reshape(tensor.shape) == 0, torch.nan, tensor),
    "all infinite": lambda tensor: tensor / 0,
}
OF_TENSORS: dict[str, tuple[str, ...]] = {
    "tensors of a head": ("learnable.prompt.ctx", "class_weights"),
    "weights": ("visual.conv1.weight", "token_embedding.weight", "transformer.resblocks.1.mlp.c_fc.bias"),
    "weights in a folder": ("visual.proj", "positional_embedding", "ln_final.weight"),
}


@pytest.mark.parametrize("form", [*TENSORS, "left out", "another name"])
@pytest.mark.parametrize(("name", "tensor"), [(name, tensor) for name in OF_TENSORS for tensor in OF_TENSORS[name]])
def test_tensors_of_another_form_are_refused(name: str, tensor: str, form: str, place: tuple[Path, Path]) -> None:
    folder, kind = place[0], KINDS[name]
    path = folder / kind.file
    config = path.with_name("config.json")
    moved = {one: folder / f"moved-{one.name}" for one in (path, config) if one.exists()}
    for original, hidden in moved.items():
        original.rename(hidden)
    try:
        tensors = load_file(moved[path])
        value = tensors.pop(tensor)
        if form != "left out":
            change = TENSORS.get(form, torch.clone)
            tensors["other" if form == "another name" else tensor] = change(value).contiguous()
        save_file(tensors, path)
        if config in moved:
            config.write_text(json.dumps(read(moved[config]) | {"tensors_sha256": file_checksum(path)}))
        before = everything_in(folder)
        result = command(kind.words)
        assert everything_in(folder) == before and not result.out
        assert_refused(result, (tensor, tensor.removeprefix("learnable."), *kind.names))
    finally:
        for original, hidden in moved.items():
            remove(original)
            hidden.rename(original)
