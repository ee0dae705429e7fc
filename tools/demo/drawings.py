"""Vector drawings become 64 x 64 pixels; one file of pixels per style, so that an interrupted build goes on."""

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
    """Return straight (not premultiplied) RGBA pixels ``[64, 64, 4]``, or None where the drawing cannot be rendered."""
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
    except BaseException as error:  # a panic inside the renderer is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    return pixels if pixels.shape == (SIDE, SIDE, 4) and pixels[..., 3].any() else None


def _silent() -> None:
    """Close a worker's standard error: a panic of the renderer prints pages there before it is caught."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _write(folder: Path, style: str, keys: list[str], pictures: list[Picture], pool: Any) -> int:
    found = [
        (key, pixels)
        for key, pixels in zip(keys, pool.map(render, pictures, chunksize=32), strict=True)
        if pixels is not None
    ]
    keys, pixels = json.dumps([key for key, _ in found]), np.stack([pixels for _, pixels in found])
    with replacing(folder / f"{style}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, keys=keys, pixels=pixels)
    return len(found)


def render_all(folder: Path, emoji: list[Emoji], icons: list[Icon], tell: Callable[[str], None]) -> None:
    """Render every style that has no file in ``folder`` yet.

    Emoji are keyed by :attr:`Emoji.key`, icons by their words (a name that occurs twice stands twice).
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise SystemExit("error: resvg_py, which draws, is not installed; get it: pip install 'vlprompt[demo]'")
    folder.mkdir(parents=True, exist_ok=True)
    work: dict[str, tuple[list[str], list[Picture]]] = {}
    for one in emoji:
        for style, picture in one.pictures.items():
            keys, pictures = work.setdefault(style, ([], []))
            keys.append(one.key)
            pictures.append(picture)
    for icon in icons:
        keys, pictures = work.setdefault(icon.style, ([], []))
        keys.append(icon.words)
        pictures.append(icon.picture)
    with Pool(os.cpu_count(), _silent) as pool:
        for number, (style, (keys, pictures)) in enumerate(sorted(work.items()), 1):
            if not (folder / f"{style}.npz").is_file():
                made = _write(folder, style, keys, pictures, pool)
                tell(f"render {number}/{len(work)}: {style}, {made} of {len(keys)} drawings")


def load_style(folder: Path, style: str) -> tuple[list[str], np.ndarray]:
    """Return keys and straight RGBA pixels ``[N, 64, 64, 4]`` of a rendered style."""
    with np.load(folder / f"{style}.npz") as file:
        return json.loads(str(file["keys"])), file["pixels"]
