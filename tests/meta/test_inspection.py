"""The page of topics, domains and tasks: its contents, escaping of captions, and size."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt.errors import ConfigError, DataError
from vlprompt.meta.clustering import Clusters
from vlprompt.meta.inspection import inspection_page
from vlprompt.meta.tasks import TaskSampler

EVIL = '<script>alert(1)</script>" onerror="alert(2)'


def toy(topics: int = 2, domains: int = 3, pairs: int = 12) -> tuple[Clusters, list[str]]:
    cells = [(t, d, c) for t in range(topics) for d in range(domains) for c in range(pairs)]
    topic, domain, _ = torch.tensor(cells).t().contiguous()
    kept = torch.ones(topics, domains, dtype=torch.bool)
    clusters = Clusters(topic, domain, torch.zeros(topics, 4), torch.zeros(topics, domains, 4), kept)
    return clusters, [f"the kind{t} thing number {c} of style{d}" for t, d, c in cells]


def picture(row: int) -> Image.Image:
    pixels = np.random.default_rng(row).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((200, 100))


class Tags(HTMLParser):
    """Collects the start tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_topics_domains_and_tasks_are_shown() -> None:
    clusters, captions = toy()
    sampler = TaskSampler(clusters, captions, support=4, query=5, seed=0)
    page = inspection_page(clusters, sampler, captions, picture, tasks=2)
    assert "72 pairs. Topics: 2; 2 of them can be used for tasks" in page
    assert "Topic 0: 36 pairs" in page and page.count(": 12 pairs</h3>") == 6
    images = [attributes for tag, attributes in Tags(page).found if tag == "img"]
    assert len(images) == 2 * 3 * 8 + 2 * (4 + 5)
    assert {image["title"] for image in images} <= set(captions)
    assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in images)
    assert page.count("Support: domain") == page.count("Query: domain") == 2
    assert page == inspection_page(clusters, sampler, captions, picture, tasks=2)


def test_distinctive_words_come_first() -> None:
    clusters, captions = toy()
    topics = inspection_page(clusters, None, captions, picture).split("<h2>")[2:]
    words = [re.findall(r'(\w+) <span class="note">(\d+)', topic) for topic in topics]
    assert words[0][0] == ("kind0", "36") and words[1][0] == ("kind1", "36")
    assert [word for word, _ in words[0]].index("the") > 0


def test_captions_are_escaped() -> None:
    clusters, captions = toy()
    captions = [f"{EVIL} {row}" for row in range(len(captions))]
    sampler = TaskSampler(
        clusters, captions, support=4, query=4, labels="clusters", classes=2, seed=0,
        caption_features=torch.randn(len(captions), 4),
    )  # fmt: skip
    page = inspection_page(clusters, sampler, captions, picture, title=EVIL)
    tags = Tags(page).found
    assert "script" not in {tag for tag, _ in tags}
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]
    assert f"{EVIL} 0" in {attributes.get("title") for _, attributes in tags}  # shown unchanged
    assert "{{" not in page


def test_the_page_is_self_contained() -> None:
    clusters, captions = toy()
    tags = Tags(inspection_page(clusters, None, captions, picture)).found
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert any(attributes.get("name") == "viewport" for _, attributes in tags)
    sources = [attributes[key] or "" for _, attributes in tags for key in ("src", "href") if key in attributes]
    assert sources and all(source.startswith("data:") for source in sources)


def test_dropped_and_unused_domains_are_marked() -> None:
    clusters, captions = toy()
    clusters.kept[0, 1] = False
    clusters.kept[1, 1:] = False
    sampler = TaskSampler(clusters, captions, support=4, query=4, seed=0)
    page = inspection_page(clusters, sampler, captions, picture)
    assert "Domain 1: 12 pairs, dropped</h3>" in page and page.count(", dropped</h3>") == 3
    assert page.count(", not used</h3>") == 1 and page.count('<div class="out">') == 3


def test_page_without_tasks() -> None:
    clusters, captions = toy()
    page = inspection_page(clusters, None, captions, picture)
    assert "There are no tasks" in page and "0 of them can be used for tasks" in page


def test_unreadable_images_leave_a_gap() -> None:
    clusters, captions = toy()

    def broken(row: int) -> Image.Image:
        if row % 2:
            raise DataError("no picture") if row % 3 else OSError("cut off")
        return picture(row).convert("RGBA")

    page = inspection_page(clusters, None, captions, broken)
    assert page.count(">unreadable</span>") + page.count("<img ") == 2 * 3 * 8
    assert page.count(">unreadable</span>") > 5


def test_the_page_of_many_topics_stays_small() -> None:
    clusters, captions = toy(topics=250, domains=4, pairs=10)
    page = inspection_page(clusters, None, captions, picture)
    assert page.count("<img ") <= 2000 and page.count("<h2>Topic") == 200
    assert "The 200 largest topics are shown" in page and "at most 2 images of 64 pixels" in page
    assert len(page) < 6e6


def test_missing_jinja2_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters, captions = toy()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r'pip install "vlprompt\[meta\]"'):
        inspection_page(clusters, None, captions, picture)
