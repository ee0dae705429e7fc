"""Sources of the demo's drawings and names, and the selection of those held out of training.

All sources are npm packages of fixed versions (``package.json``, ``package-lock.json``): twelve packs of emoji
drawings, five packs of icons, the names and keywords of emoji, and GloVe word vectors.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

#: Emoji styles for training (Apache-2.0 and CC BY 4.0).
TRAINING = ("noto", "noto-v1", "twemoji", "emojione", "emojione-monotone", "fxemoji")
#: Emoji styles held out of training, for evaluation and benchmarks.
HELD_OUT = (
    "fluent-emoji-flat",
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "openmoji",
    "streamline-emojis",
    "emojione-v1",
)
#: Held-out styles under CC BY-SA 4.0, with separate archives.
SHARE_ALIKE = ("openmoji", "emojione-v1")
#: Icon packs for training, with the endings of the used variants (an empty ending: the plain icon).
ICONS = {
    "game-icons": ("",),
    "icon-park": ("",),
    "flat-color-icons": ("",),
    "ph": ("-duotone", "-fill"),
}

#: Names of the subgroups of emoji in captions and in the benchmark of kinds.
KINDS = {
    "face-smiling": "smiling face",
    "face-affection": "affectionate face",
    "face-tongue": "face with tongue",
    "face-hand": "face with hand",
    "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face",
    "face-unwell": "sick face",
    "face-hat": "face with hat",
    "face-glasses": "face with glasses",
    "face-concerned": "worried face",
    "face-negative": "angry face",
    "face-costume": "monster face",
    "cat-face": "cat face",
    "monkey-face": "monkey face",
    "heart": "heart",
    "emotion": "emotion symbol",
    "hand-fingers-open": "open hand",
    "hand-fingers-partial": "hand sign",
    "hand-single-finger": "pointing finger",
    "hand-fingers-closed": "fist",
    "hands": "two hands",
    "hand-prop": "hand with object",
    "body-parts": "body part",
    "person": "person",
    "person-gesture": "person gesturing",
    "person-role": "worker",
    "person-fantasy": "fantasy creature",
    "person-activity": "person doing activity",
    "person-sport": "person doing sport",
    "person-resting": "person resting",
    "family": "family",
    "person-symbol": "silhouette",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "amphibian",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "asian food",
    "food-sweet": "dessert",
    "drink": "drink",
    "dishware": "dishware",
    "place-map": "map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "religious building",
    "place-other": "place",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "hotel": "hotel",
    "time": "clock",
    "sky-weather": "weather",
    "event": "celebration",
    "award-medal": "medal",
    "sport": "sport",
    "game": "game",
    "arts-crafts": "arts and crafts",
    "clothing": "clothing",
    "sound": "sound",
    "music": "music",
    "musical-instrument": "musical instrument",
    "phone": "phone",
    "computer": "computer",
    "light-video": "camera",
    "book-paper": "book",
    "money": "money",
    "mail": "mail",
    "writing": "writing",
    "office": "office",
    "lock": "lock",
    "tool": "tool",
    "science": "science",
    "medical": "medical",
    "household": "household",
    "other-object": "object",
    "transport-sign": "sign",
    "warning": "warning",
    "arrow": "arrow",
    "religion": "religion",
    "zodiac": "zodiac",
    "av-symbol": "media button",
    "gender": "gender",
    "math": "math",
    "punctuation": "punctuation",
    "currency": "currency",
    "other-symbol": "symbol",
    "keycap": "keycap",
    "alphanum": "letters button",
    "geometric": "geometric shape",
    "flag": "flag",
    "country-flag": "country flag",
    "subdivision-flag": "subdivision flag",
}
FLAGS = ("country-flag", "subdivision-flag")
_NOVEL_SHARE, _SEED = 0.1, 0


@dataclass
class Picture:
    """One vector drawing: SVG body and bounding box."""

    body: str
    left: float
    top: float
    width: float
    height: float


@dataclass
class Emoji:
    """One emoji: name, keywords, and drawings by style."""

    key: str
    label: str
    hexcode: str
    group: str
    subgroup: str
    tags: list[str]
    novel: bool = False
    pictures: dict[str, Picture] = field(default_factory=dict)


@dataclass
class Icon:
    """One icon: pack and variant, name in words, and drawing."""

    style: str
    words: str
    picture: Picture


def fetch(build: Path) -> Path:
    """Install the packages under ``build`` with npm unless they are present, and return their folder."""
    folder = build / "npm"
    done = folder / "installed"
    lock = (HERE / "package-lock.json").read_bytes()
    if not done.is_file() or done.read_bytes() != lock:
        if shutil.which("npm") is None:
            raise SystemExit("error: npm is not installed; version 7 or later is needed to fetch the packages")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(HERE / name, folder / name)
        # Scripts of packages do not run; the hashes in the lock file verify the archives.
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)
        done.write_bytes(lock)
    return folder / "node_modules"


def load_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def slug(text: str) -> str:
    """Return ``text`` in ASCII lower case with hyphens, the spelling of names in the packs."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not 0x300 <= ord(c) <= 0x36F)
    plain = re.sub(r"[’'`.“”\"!,():]", "", plain.lower().replace("&", " and "))
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _code(hexcode: str) -> str:
    return "-".join(point for point in hexcode.upper().split("-") if point != "FE0F")


def _resolved(pack: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return an icon's entry; aliases count only if they are not mirrored or rotated."""
    if name in pack["icons"]:
        return pack["icons"][name]
    alias = pack.get("aliases", {}).get(name)
    if alias and not any(alias.get(change) for change in ("hFlip", "vFlip", "rotate")):
        return pack["icons"].get(alias["parent"])
    return None


def _picture(pack: dict[str, Any], icon: dict[str, Any]) -> Picture:
    def size(side: str) -> float:
        return icon.get(side) or pack.get(side) or 16

    return Picture(icon["body"], icon.get("left", 0), icon.get("top", 0), size("width"), size("height"))


def _emoji_names(modules: Path) -> list[Emoji]:
    names = load_json(modules / "emojibase-data/en/data.json")
    meta = load_json(modules / "emojibase-data/meta/groups.json")
    emoji = []
    for entry in names:
        group = entry.get("group")
        if group is None or group == 2 or "skin tone" in entry["label"] or "facing right" in entry["label"]:
            continue
        emoji.append(
            Emoji(
                key=f"{slug(entry['label'])}_{entry['hexcode']}",
                label=entry["label"].lower(),
                hexcode=entry["hexcode"],
                group=meta["groups"][str(group)],
                subgroup=meta["subgroups"][str(entry["subgroup"])],
                tags=[tag.lower() for tag in entry.get("tags", [])],
            )
        )
    return emoji


def _spellings(modules: Path, emoji: list[Emoji], packs: dict[str, Any]) -> dict[str, int]:
    """Return every known spelling of an emoji's name; earlier sources win."""
    by_code = {_code(symbol.hexcode): index for index, symbol in enumerate(emoji)}
    spellings: dict[str, int] = {}
    for index, symbol in enumerate(emoji):
        spellings[slug(symbol.label)] = index

    def add(name: str, code: str) -> None:
        if _code(code) in by_code:
            spellings.setdefault(name, by_code[_code(code)])

    for style in ("noto", "openmoji", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast"):
        for code, name in packs[style][1].items():
            add(name, code)
    for source in ("cldr", "emojibase", "github", "joypixels", "iamcal"):
        for code, names in load_json(modules / f"emojibase-data/en/shortcodes/{source}.json").items():
            for name in [names] if isinstance(names, str) else names:
                add(slug(name), code)
    for symbol in emoji:
        if symbol.subgroup == "country-flag":
            country = slug(symbol.label.removeprefix("flag: "))
            for name in (f"flag-for-{country}", f"flag-{country}", f"flag-for-flag-{country}"):
                add(name, symbol.hexcode)
        if "-" not in _code(symbol.hexcode):  # a single character also has a Unicode name
            add(slug(unicodedata.name(chr(int(_code(symbol.hexcode), 16)), "")), symbol.hexcode)
    return spellings


def read_emoji(modules: Path) -> list[Emoji]:
    """Join the twelve packs by code point or name, and mark the novel names.

    A tenth of every subgroup except flags is novel: its drawings and captions are never used in training.
    """
    emoji = _emoji_names(modules)
    packs = {}
    for style in (*TRAINING, *HELD_OUT):
        folder = modules / "@iconify-json" / style
        codes = folder / "chars.json"
        packs[style] = load_json(folder / "icons.json"), load_json(codes) if codes.is_file() else {}
    spellings = _spellings(modules, emoji, packs)
    joined: dict[str, int] = {}
    for name, index in spellings.items():
        joined.setdefault(name.replace("-", ""), index)
    by_code = {_code(symbol.hexcode): index for index, symbol in enumerate(emoji)}
    for style, (pack, codes) in packs.items():

        def put(index: int | None, name: str, style: str = style, pack: dict[str, Any] = pack) -> None:
            icon = _resolved(pack, name)
            if index is not None and icon is not None and style not in emoji[index].pictures:
                emoji[index].pictures[style] = _picture(pack, icon)

        for code, name in codes.items():
            put(by_code.get(_code(code)), name)
        for name in (*pack["icons"], *pack.get("aliases", {})):
            index = spellings.get(name, joined.get(name.replace("-", "")))
            numbered = re.fullmatch(r"(.*)-\d+", name)
            if index is None and style == "streamline-emojis" and numbered:
                index = spellings.get(numbered[1], joined.get(numbered[1].replace("-", "")))
            put(index, name)
    for index in _novel(emoji):
        emoji[index].novel = True
    return emoji


def _novel(emoji: list[Emoji]) -> set[int]:
    generator = random.Random(_SEED)
    groups: dict[str, list[int]] = {}
    for index, symbol in enumerate(emoji):
        groups.setdefault(symbol.subgroup, []).append(index)
    novel: set[int] = set()
    for subgroup, members in sorted(groups.items()):
        if subgroup not in FLAGS:
            generator.shuffle(members)
            novel.update(members[: round(len(members) * _NOVEL_SHARE)])
    return novel


def read_icons(modules: Path, emoji: list[Emoji]) -> list[Icon]:
    """Read the icon packs without icons whose names contain the name of a novel emoji."""
    held_back = {tuple(slug(symbol.label).split("-")) for symbol in emoji if symbol.novel}
    icons = []
    for style, endings in ICONS.items():
        pack = load_json(modules / "@iconify-json" / style / "icons.json")
        for name, icon in pack["icons"].items():
            ending = next((suffix for suffix in endings if name.endswith(suffix)), None)
            if ending is None:
                continue
            words = re.sub(r"(-(one|two|three|four|five|\d+|logo))+$", "", name.removesuffix(ending)).split("-")
            spoken = {tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
            if not spoken & held_back:
                icons.append(Icon(style + ending, " ".join(words), _picture(pack, icon)))
    return icons
