"""Rendering of vector drawings to 64 x 64 pixels, with one file per style so that a build can be resumed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sources import Emoji, Icon, Picture

from vlprompt._files import replacing

SIDE, MARGIN = 64, 2


def render(picture: Picture) -> np.ndarray | None:
    """Return straight (not premultiplied) RGBA pixels ``[64, 64, 4]``, or None if the drawing cannot be rendered."""
    import resvg_py

    side = max(picture.width, picture.height)
    margin = side * MARGIN / (SIDE - 2 * MARGIN)
    box = side + 2 * margin
    left = picture.left - (side - picture.width) / 2 - margin
    top = picture.top - (side - picture.height) / 2 - margin
    document = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{left} {top} {box} {box}" width="{SIDE}" height="{SIDE}">{picture.body}</svg>'
    )
    try:
        data = bytes(resvg_py.svg_to_bytes(svg_string=document, skip_system_fonts=True))
    except BaseException as error:  # a panic of the renderer is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    return pixels if pixels.shape == (SIDE, SIDE, 4) and pixels[..., 3].any() else None


def _silent() -> None:
    """Close a worker's standard error, because a panic of the renderer prints long traces there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _write(folder: Path, style: str, keys: list[str], pictures: list[Picture], pool: Any) -> int:
    rendered = [
        (key, pixels)
        for key, pixels in zip(keys, pool.map(render, pictures, chunksize=32), strict=True)
        if pixels is not None
    ]
    keys, pixels = json.dumps([key for key, _ in rendered]), np.stack([pixels for _, pixels in rendered])
    with replacing(folder / f"{style}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, keys=keys, pixels=pixels)
    return len(rendered)


def render_all(folder: Path, emoji: list[Emoji], icons: list[Icon], report: Callable[[str], None]) -> None:
    """Render every style that has no file in ``folder`` yet.

    The key of an emoji is :attr:`Emoji.key`, that of an icon its words; repeated names give repeated keys.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise SystemExit("error: the renderer resvg_py is not installed; run: pip install 'vlprompt[demo]'")
    folder.mkdir(parents=True, exist_ok=True)
    work: dict[str, tuple[list[str], list[Picture]]] = {}
    for symbol in emoji:
        for style, picture in symbol.pictures.items():
            keys, pictures = work.setdefault(style, ([], []))
            keys.append(symbol.key)
            pictures.append(picture)
    for icon in icons:
        keys, pictures = work.setdefault(icon.style, ([], []))
        keys.append(icon.words)
        pictures.append(icon.picture)
    with Pool(os.cpu_count(), _silent) as pool:
        for number, (style, (keys, pictures)) in enumerate(sorted(work.items()), 1):
            if not (folder / f"{style}.npz").is_file():
                count = _write(folder, style, keys, pictures, pool)
                report(f"render {number}/{len(work)}: {style}, {count} of {len(keys)} drawings")


def load_style(folder: Path, style: str) -> tuple[list[str], np.ndarray]:
    """Return the keys and straight RGBA pixels ``[N, 64, 64, 4]`` of a rendered style."""
    with np.load(folder / f"{style}.npz") as file:
        return json.loads(str(file["keys"])), file["pixels"]
