"""Choosing hyperparameters: every candidate of a grid is trained, scored on validation images, and the best is tested.

Test images are opened for the winner alone. A choice that sees them, because it is asked for (``on="test"``) or because
validation and test images are the same, is refused unless it is asked for as an oracle; its results and every table
that they reach are marked. Everything lies in a folder of the search's own, ``OUTPUT/search-<hash>``: the candidates'
run folders, the stamp ``selection.json`` and the winner's configuration ``best.yaml``. Whatever is run from
``best.yaml``, with other seeds or on other data, is kept in that folder and bears the stamp, too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json, write_text
from vlprompt.config.keys import RUN_KEYS, as_plain, merged, nest, settings_keys, to_yaml
from vlprompt.config.run import RunConfig
from vlprompt.config.types import convert, field_hints, refusal
from vlprompt.config.types import validate as validate_values
from vlprompt.config.yaml import plain, shown, yaml_text
from vlprompt.engine.metrics import METRICS, headline
from vlprompt.errors import ConfigError, bulleted, did_you_mean
from vlprompt.methods import get_method_class
from vlprompt.prompts import get_decomposition_class
from vlprompt.runs.folder import RESULTS, config_sha256
from vlprompt.runs.run import Run, run, validate
from vlprompt.runs.selection import SELECTION, Verdict, judge, record, selection_of, stamped
from vlprompt.runs.session import Session
from vlprompt.runs.tables import render, score_text

BEST = "best.yaml"
LARGEST = 1000
"""Candidates of one search; more are a mistake in the grid."""


@dataclasses.dataclass
class Search:
    """A finished search.

    Attributes:
        folder: Where its runs lie, with ``selection.json`` and ``best.yaml``.
        selection: What was tried, how it scored and what was chosen; also in the winner's results.
        run: The winner's run, tested.
    """

    folder: Path
    selection: dict[str, Any]
    run: Run

    def table(self) -> str:
        """Return the candidates with their scores, and the winner's own table."""
        data, oracle = self.run.results["data"], self.selection["oracle"]
        metric = METRICS[data.get("metric", "accuracy")]
        images = "test" if self.selection["on"] == "test" else "validation"
        title = stamped(f"{data['name']}: {metric} in % on the {images} images, by candidate", oracle)
        table = Table(*self.selection["grid"])
        table.add_column(images, justify="right")
        table.add_column("")
        for one in self.selection["scores"]:
            values = [yaml_text(value, flow=True) for value in one["values"].values()]
            chosen = "chosen" if one["values"] == self.selection["chosen"] else ""
            table.add_row(*values, score_text(one["score"]), chosen)
        reason = f"an oracle's choice: {self.selection['reason']}" if oracle else ""
        return render(table, title, reason) + "\n\n" + self.run.table()


def search(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    on: str = "val",
    oracle: bool = False,
    *,
    force: bool = False,
    report: Callable[[str], None] | None = None,
) -> Search:
    """Train every candidate of ``grid``, choose the best on the images ``on``, and test it.

    What has been scored is reused and what is unfinished resumed, so the same call goes on where it stopped.

    Args:
        config: The configuration that the candidates differ from.
        grid: Values by key: ``recipe.*``, ``settings.*``, ``data.transform``, ``data.template``, or settings of the
            configuration's decomposition (``decomposition.ept.lr_ratio``). Every combination is a candidate, the last
            key's values changing fastest; of equals the first is chosen.
        on: ``val``, or ``test`` for an oracle.
        oracle: Whether a choice that sees test images is wanted; without it, such a search is refused.
        force: Train everything anew.
        report: Called with a line of text after every candidate.

    Raises:
        ConfigError: Keys or values that cannot be searched, no validation images, or a choice that would see test
            images without ``oracle``.
        VlpromptError: Whatever a single run raises.
    """
    session = Session(config)
    config = session.config
    candidates = candidates_of(config, grid)
    inherited = selection_of(config.output)
    session.load()
    task = session.drawn
    verdict = judge(task.name, on, [one.id for one in task.val], [one.id for one in task.test], oracle=oracle)
    if inherited is not None and inherited["oracle"]:
        verdict = Verdict(verdict.on, oracle=True, reason=f"it goes on from an oracle's choice: {inherited['reason']}")
    key = sha256_json([config_sha256(config), {name: list(values) for name, values in grid.items()}, on, oracle])[:8]
    folder = Path(config.output) / f"search-{key}"
    inside = [dataclasses.replace(one, output=str(folder)) for _, one in candidates]
    _keep(folder, record(verdict, grid, [], {}))  # first, so that no result of the search is ever without its stamp
    scores = []
    for (values, _), one in zip(candidates, inside, strict=True):
        if verdict.on == "val":
            found = validate(one, force=force, after=session)
        else:
            found = run(one, force=force, after=session).results["results"][config.data.classes]
        scores.append({"values": values, "score": found})
        if report is not None and is_main_process():
            words = ", ".join(f"{name} {yaml_text(value, flow=True)}" for name, value in values.items())
            report(f"{words}: {score_text(found)}")
    best = max(range(len(scores)), key=lambda index: headline(scores[index]["score"]))  # the first of equals
    selection = record(verdict, grid, scores, candidates[best][0])
    _keep(folder, selection)
    done = run(inside[best], after=session)
    if done.results.get("selection") != selection:
        done.results["selection"] = selection
        if is_main_process():
            write_json(done.folder / RESULTS, done.results)
    if is_main_process():
        write_text(folder / BEST, to_yaml(inside[best]))
    return Search(folder, selection, done)


def _keep(folder: Path, selection: dict[str, Any]) -> None:
    if is_main_process():
        write_json(folder / SELECTION, selection)


def candidates_of(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], RunConfig]]:
    """Return the values and the configuration of every candidate, in grid order.

    Raises:
        ConfigError: Keys or values that cannot be searched; all problems are listed.
    """
    hints = searched_keys(config)
    problems = [] if grid else ["the grid is empty; accepted: keys with values, such as recipe.lr=0.002,0.02"]
    typed: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if key not in hints:
            why = " It says which task is run." if key in RUN_KEYS else ""
            problems.append(f"{shown(key)} cannot be searched.{why}{did_you_mean(key, hints)}")
            continue
        typed[key] = []
        for value in values:
            try:
                typed[key].append(convert(hints[key], value))
            except ValueError:
                problems.append(refusal(key, value, hints[key]))
        if not values:
            problems.append(f"{key} has no values to try")
        if any(values[i] in values[:i] for i in range(len(values))):
            problems.append(f"{key} has a value twice in {list(values)}")
    count = 1
    for values in typed.values():
        count *= len(values)
    if count > LARGEST:
        problems.append(f"the grid has {count:,} candidates; accepted: at most {LARGEST:,}")
    found = []
    if not problems:
        for combination in itertools.product(*typed.values()):
            chosen = dict(zip(typed, combination, strict=True))
            one, wrong = _candidate(config, chosen)
            found.append((chosen, one))
            problems += [f"{text} (of the candidate {chosen})" for text in wrong]
    if problems:
        raise ConfigError(f"the grid cannot be searched:\n{bulleted(problems)}")
    return found


def searched_keys(config: RunConfig) -> dict[str, Any]:
    """Return the keys that may be searched for the method and the decomposition of ``config``, with their types."""
    own = {key: hint for key, hint in RUN_KEYS.items() if key.startswith("recipe.")}
    own |= {key: RUN_KEYS[key] for key in ("data.transform", "data.template")}
    for name in config.decomposition:
        hints = field_hints(get_decomposition_class(name).Settings)
        own |= {f"decomposition.{name}.{entry}": hint for entry, hint in hints.items()}
    return {**own, **settings_keys(get_method_class(config.method).Settings)}


def _candidate(config: RunConfig, values: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """Return ``config`` with ``values``, and what is wrong with it."""
    changed = plain(merged(as_plain(config), nest(values)))
    candidate, problems = validate_values(RunConfig, changed)
    settings = {"settings": (get_method_class(config.method).Settings, changed["settings"])}
    for name, inner in changed["decomposition"].items():
        settings[f"decomposition.{name}"] = (get_decomposition_class(name).Settings, inner)
    for where, (kind, inner) in settings.items():
        problems += validate_values(kind, inner, where)[1]
    return candidate or config, [problem.text for problem in problems]
