"""Source statistics of methods that align test images with those that their prompts were trained on.

They are kept in the head that a run starts from, read from files (``data.statistics``), or measured on the training
images that the head names. The data set of the run is never their source unless the head was trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.datasets import FewShotTask, find_card, load_dataset
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.io.head import find_head, read_config
from vlprompt.methods import PromptMethod, get_method_class
from vlprompt.methods.episodic import ViewsMethod
from vlprompt.runs.session import Session

_FIX = "give --data.statistics FILES, or --init_from a run that keeps its statistics"


def check_initialised(method: PromptMethod) -> None:
    """Raise ConfigError if ``method`` starts from trained prompts and has its random ones."""
    if method.starts_from is not None and not method.initialised:
        raise ConfigError(
            f"{method.name} starts from trained prompts, and this one has random ones: load those of a head of "
            f"{method.starts_from} with method.start_from(load_head(RUN).method.trained_state())"
        )


def source_statistics(session: Session) -> dict[str, Any]:
    """Give the method of ``session`` its source statistics, if it aligns with any, and return the record of a run.

    Returns:
        ``{"source": {"statistics": "files" | "head" | "measured", ...}}``; empty for other methods.

    Raises:
        ConfigError: The images that the start was trained on are unknown or cannot be loaded.
    """
    method, config = session.method, session.config
    if not isinstance(method, ViewsMethod) or not method.aligns:
        return {}
    if not method.wants_source:
        files = list(config.data.statistics)
        return {"source": {"statistics": "files", "files": files} if files else {"statistics": "head"}}
    task = source_task(session)
    method.measure_source(session.data(method, task).images("train"))
    facts = task.describe()
    kept = {name: facts[name] for name in ("name", "classes", "shots", "seed", "train", "shots_sha256")}
    return {"source": {"statistics": "measured", **kept}}


def _reading(pixels: object) -> dict[str, Any]:
    """Return the arguments of ``load_dataset`` for the reading in a head's record; older heads have none."""
    if not isinstance(pixels, Mapping):
        return {}
    return {"orientation": pixels.get("orientation"), "background": pixels.get("background") or "none"}


def source_task(session: Session) -> FewShotTask:
    """Return the task that the start of ``session`` was trained on, with the same training images.

    Raises:
        ConfigError: There is no start, it does not name its training images, or they cannot be loaded.
    """
    config, name = session.config, session.method.name
    if config.initial_head is None:
        raise ConfigError(
            f"{name} has no source statistics, and no init_from says what its prompts were trained on; {_FIX}; or call "
            "method.measure_source(batches of images)"
        )
    head = read_config(find_head(config.initial_head))
    facts = head.training.get("data")
    if get_method_class(head.method).per_target:
        raise ConfigError(
            f"init_from is {config.initial_head!r}, a head of {head.method} without source statistics, which does not "
            f"name the images that its prompts were trained on; {_FIX}, or the run that trained the prompts"
        )
    if not isinstance(facts, Mapping) or not {"name", "shots", "seed", "shots_sha256"} <= facts.keys():
        raise ConfigError(
            f"init_from is {config.initial_head!r}, whose head does not name the images that it was trained on; {_FIX}"
        )
    own = session.drawn
    if (own.name, own.shots_sha256) == (facts["name"], facts["shots_sha256"]):
        return own
    try:
        split = facts.get("split")
        task = load_dataset(
            facts["name"],
            root=config.data.root,
            shots=facts["shots"],
            seed=facts["seed"],
            classes=facts.get("classes", "all"),
            source=facts.get("source", ()),
            target=facts.get("target", ()),
            split=None if split == find_card(facts["name"]).split else split,
            sampler=facts.get("sampler"),
            **_reading(facts.get("pixels")),
        )
    except VlpromptError as error:
        raise ConfigError(
            f"{name} aligns with images of {facts['name']!r}, which its prompts were trained on, and they cannot be "
            f"loaded; {_FIX}.\n{error}"
        ) from error
    if task.shots_sha256 != facts["shots_sha256"]:
        raise ConfigError(
            f"{name} aligns with the images that its prompts were trained on, and {facts['name']!r} here gives others "
            f"than the head in {config.initial_head!r} names; {_FIX}"
        )
    return task
