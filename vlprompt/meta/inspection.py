"""An HTML page of clustered pairs: topics, their domains, and some tasks."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.meta.clustering import Clusters
from vlprompt.meta.tasks import Task, TaskSampler

if TYPE_CHECKING:
    from PIL import Image

#: Width and height of a thumbnail, in pixels.
PIXELS = 64
#: Maximum number of thumbnails per domain and per page; a thumbnail has about 1.5 kB.
_OF_DOMAIN, _OF_PAGE = 8, 2000
_TOPICS = 200


def inspection_page(
    clusters: Clusters,
    sampler: TaskSampler | None,
    captions: Sequence[str],
    picture: Callable[[int], Image.Image],
    *,
    tasks: int = 4,
    title: str = "Topics and domains of meta-tasks",
) -> str:
    """Return a self-contained page without scripts or links, of a few MB at most.

    It shows the 200 largest topics, and up to 8 images of each domain, evenly spaced over its pairs. The number per
    domain is reduced if all domains together would show more than 2,000. The page states these limits.

    Args:
        clusters: Clusters of N pairs.
        sampler: Draws the shown tasks; ``None`` if none can be drawn.
        captions: N captions.
        picture: Returns the image of a row. An unreadable image leaves a gap.
        tasks: Number of shown tasks, the first ones of step 0.
        title: Headline.

    Raises:
        ConfigError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            'Writing the page needs jinja2, which is not installed: pip install "vlprompt[meta]"'
        ) from error
    members: dict[int, dict[int, list[int]]] = {}
    for (topic, domain), rows in clusters.members().items():
        members.setdefault(topic, {})[domain] = rows
    sizes = {topic: sum(map(len, domains.values())) for topic, domains in members.items()}
    shown = sorted(sizes, key=lambda topic: -sizes[topic])[:_TOPICS]
    each = max(1, min(_OF_DOMAIN, _OF_PAGE // max(1, sum(len(members[topic]) for topic in shown))))
    usable = {} if sampler is None else sampler.usable
    words = _words(captions, {topic: sum(members[topic].values(), []) for topic in shown})

    def thumbnail(row: int) -> dict[str, str]:
        return {"src": _thumbnail(picture, row), "caption": captions[row]}

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (resources.files("vlprompt") / "assets" / "meta" / "inspect.html").read_text(encoding="utf-8")
    return page.from_string(template).render(
        title=title,
        pairs=len(captions),
        pixels=PIXELS,
        each=each,
        all_topics=len(sizes),
        usable=len(usable),
        topics=[
            {
                "number": topic,
                "size": sizes[topic],
                "words": words[topic],
                "domains": [
                    {
                        "number": domain,
                        "size": len(rows),
                        "kept": bool(clusters.kept[topic, domain]),
                        "usable": domain in usable.get(topic, ()),
                        "pictures": [thumbnail(row) for row in _spread(rows, each)],
                    }
                    for domain, rows in members[topic].items()
                ],
            }
            for topic in shown
        ],
        tasks=[] if sampler is None else [_shown_task(sampler.task(0, slot), thumbnail) for slot in range(tasks)],
    )


def _shown_task(task: Task, thumbnail: Callable[[int], dict[str, str]]) -> dict[str, Any]:
    def pairs(rows: Sequence[int], labels: Sequence[int], classes: Sequence[str]) -> list[dict[str, str]]:
        return [thumbnail(row) | {"label": classes[label]} for row, label in zip(rows, labels, strict=True)]

    support = pairs(task.support, task.support_labels, task.support_classes)
    query = pairs(task.query, task.query_labels, task.query_classes)
    return {
        "topic": task.topic,
        "sides": [("Support", task.source_domain, support), ("Query", task.target_domain, query)],
    }


def _spread(rows: list[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _words(captions: Sequence[str], topics: dict[int, list[int]], count: int = 8) -> dict[int, list[tuple[str, int]]]:
    """Return words of each topic with their number of captions, most distinctive first.

    A word's rank is the number of the topic's captions that hold it, minus the number expected among as many captions
    of all topics. Common words such as "of" and "the" therefore rank low in any language.
    """
    held = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    overall = Counter(word for words in held for word in words)
    distinctive = {}
    for topic, rows in topics.items():
        counts, share = Counter(word for row in rows for word in held[row]), len(rows) / len(captions)
        ranked = sorted(counts, key=lambda word: (overall[word] * share - counts[word], -counts[word], word))
        distinctive[topic] = [(word, counts[word]) for word in ranked[:count]]
    return distinctive


def _thumbnail(picture: Callable[[int], Image.Image], row: int) -> str:
    try:
        image = picture(row).convert("RGB")
    except (VlpromptError, OSError):  # the page does not check the data
        return ""
    image.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=60)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
