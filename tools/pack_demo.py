"""Build the packaged demo benchmark from the emoji drawings of the demo assets.

    python tools/pack_demo.py --source ../shared/demo

writes vlprompt/assets/demo/{images.zip, split_demo.json, LICENCES.md}; with the same Pillow the bytes reproduce. The
benchmark (README.md of the assets, "MIX-100"): 50 names that the demo CLIP saw in training and 50 that it never saw, in
alternation, so that base and new classes hold both kinds. Training, validation and test images are drawings of
different designers: EmojiOne 1 and Streamline; OpenMoji; Microsoft's three Fluent renderings.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import random
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

TRAIN_STYLES = ("emojione-v1", "streamline-emojis")
VAL_STYLES = ("openmoji",)
TEST_STYLES = ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast")
NAMES_A_KIND, TRAIN_IMAGES, VAL_IMAGES, TEST_IMAGES = 50, 16, 4, 9
SIDE, QUALITY, SEED = 64, 90, 0
FIXED_TIME = (2026, 1, 1, 0, 0, 0)


def eligible(source: Path) -> list[dict[str, Any]]:
    """Return the emoji in all six held-out styles whose names consist of tokens the demo CLIP was trained on."""
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors import safe_open

    with safe_open(str(source / "demo_clip.safetensors"), framework="np") as file:
        trained = set(file.get_tensor("token_ids").tolist())
    encode = SimpleTokenizer().encode
    needed = {*TRAIN_STYLES, *VAL_STYLES, *TEST_STYLES}
    entries = []
    for entry in json.loads((source / "emoji_names.json").read_text(encoding="utf-8"))["names"]:
        name = entry["label"].lower()
        if needed <= set(entry["styles"]) and entry["subgroup"] not in ("country-flag", "subdivision-flag"):
            if re.fullmatch(r"[a-z0-9' -]+", name) and set(encode(name)) <= trained:
                entries.append({"key": entry["key"], "name": name, "novel": entry["novel"]})
    return entries


def choose(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw 50 seen and 50 novel names and return them in alternation."""
    generator = random.Random(SEED)
    seen = generator.sample([entry for entry in entries if not entry["novel"]], NAMES_A_KIND)
    novel = generator.sample([entry for entry in entries if entry["novel"]], NAMES_A_KIND)
    return [entry for pair in zip(seen, novel, strict=True) for entry in pair]


def mild_view(picture: Any, generator: random.Random) -> Any:
    """Return the drawing a little turned, scaled, shifted and brightened or darkened, on white."""
    from PIL import Image, ImageEnhance

    turn, zoom = generator.uniform(-14, 14), generator.uniform(0.75, 1.05)
    right, down = generator.uniform(-4, 4), generator.uniform(-4, 4)
    light = generator.uniform(0.85, 1.1)
    side = max(8, round(SIDE * zoom))
    turned = picture.rotate(turn, Image.Resampling.BICUBIC, fillcolor="white").resize(
        (side, side), Image.Resampling.BICUBIC
    )
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(turned, (round((SIDE - side) / 2 + right), round((SIDE - side) / 2 + down)))
    return ImageEnhance.Brightness(canvas).enhance(light)


def webp(picture: Any) -> bytes:
    """Encode a picture."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=QUALITY, method=6)
    return stream.getvalue()


def build(source: Path) -> tuple[dict[str, bytes], dict[str, list[list[Any]]]]:
    """Return image bytes by path and the split."""
    from PIL import Image

    images: dict[str, bytes] = {}
    split: dict[str, list[list[Any]]] = {"train": [], "val": [], "test": []}
    plan = (("train", TRAIN_STYLES, TRAIN_IMAGES), ("val", VAL_STYLES, VAL_IMAGES), ("test", TEST_STYLES, TEST_IMAGES))
    with zipfile.ZipFile(source / "emoji_styles.zip") as archive:

        @functools.cache
        def drawing(style: str, key: str) -> Any:
            return Image.open(io.BytesIO(archive.read(f"{style}/{key}.webp"))).convert("RGB")

        for label, entry in enumerate(choose(eligible(source))):
            slug = re.sub(r"[^a-z0-9]+", "-", entry["name"]).strip("-")
            for part, styles, count in plan:
                for index in range(count):
                    style = styles[index % len(styles)]
                    picture = drawing(style, entry["key"])
                    if index >= len(styles):  # the first of each style is the drawing as it is
                        picture = mild_view(picture, random.Random(f"demo {SEED} {part} {entry['key']} {index}"))
                    path = f"{part}/{slug}/{index:02d}_{style}.webp"
                    images[path] = webp(picture)
                    split[part].append([path, label, entry["name"]])
    return images, split


def write(folder: Path, images: dict[str, bytes], split: dict[str, list[list[Any]]]) -> None:
    """Write the three files, each under a temporary name first."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(images):
            info = zipfile.ZipInfo(path, FIXED_TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, images[path])
    rows = {part: ",\n".join("    " + json.dumps(item) for item in items) for part, items in split.items()}
    text = "{\n" + ",\n".join(f'  "{part}": [\n{body}\n  ]' for part, body in rows.items()) + "\n}\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        ("images.zip", stream.getvalue()),
        ("split_demo.json", text.encode()),
        ("LICENCES.md", LICENCES.encode()),
    ):
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
        print(f"{folder / name}: {len(data):,} bytes")


LICENCES = """\
# Licences of the demo images

The images in `images.zip` are small versions (64 x 64 pixels, on white, WebP) of emoji drawings by others, taken from
the npm packs `@iconify-json/*`. The last part of a file's name is the drawing's style. Changes: each drawing was scaled
down; all but the first image of each style were also turned, scaled, shifted and brightened or darkened a little, by
`tools/pack_demo.py`. Images made from works under CC BY-SA 4.0 stay under CC BY-SA 4.0.

- `openmoji`: OpenMoji, https://github.com/hfg-gmuend/openmoji. CC BY-SA 4.0.
- `emojione-v1`: Emoji One (version 1), https://github.com/joypixels/emojione-legacy. CC BY-SA 4.0.
- `streamline-emojis`: Streamline, https://github.com/webalys-hq/streamline-vectors. CC BY 4.0.
- `fluent-emoji`, `fluent-emoji-flat`, `fluent-emoji-high-contrast`: Fluent Emoji by Microsoft Corporation,
  https://github.com/microsoft/fluentui-emoji. MIT License, below.
- Class names: emojibase-data by Miles Johnson, https://github.com/milesj/emojibase. MIT License, below.

The texts of the Creative Commons licences: https://creativecommons.org/licenses/by-sa/4.0/ and
https://creativecommons.org/licenses/by/4.0/.

## MIT License

Copyright (c) Microsoft Corporation (Fluent Emoji). Copyright (c) 2017 Miles Johnson (emojibase-data).

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> int:
    """Build the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with emoji_styles.zip and emoji_names.json")
    home = Path(__file__).resolve().parent.parent / "vlprompt" / "assets" / "demo"
    parser.add_argument("--output", type=Path, default=home, help="where to write (the package's assets)")
    options = parser.parse_args()
    for name in ("emoji_styles.zip", "emoji_names.json", "demo_clip.safetensors"):
        if not (options.source / name).is_file():
            print(f"error: {options.source / name} does not exist", file=sys.stderr)
            return 2
    write(options.output, *build(options.source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
