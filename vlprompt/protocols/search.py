"""Hyperparameter search: train every candidate of a grid, score it on validation images, and test the best.

Test images are opened only for the best candidate. A selection that uses them, by request (``on="test"``) or because
validation and test images are the same, is refused unless ``oracle`` is set; its results and all tables with them are
marked. The folder ``OUTPUT/search-<hash>`` contains the run folders of the candidates, the record ``selection.json``
and the configuration of the best candidate, ``best.yaml``. All runs from ``best.yaml``, also with other seeds or data,
are saved in that folder and have the same record.
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
from vlprompt.config.run import RecipeConfig, RunConfig
from vlprompt.config.types import convert, field_hints, over_defaults, refusal
from vlprompt.config.types import validate as validate_values
from vlprompt.config.yaml import plain, shown, yaml_text
from vlprompt.engine.metrics import METRICS, headline
from vlprompt.errors import ConfigError, NotFiniteError, bulleted, did_you_mean
from vlprompt.methods import get_method_class
from vlprompt.prompts import get_decomposition_class
from vlprompt.runs.effect import idle_keys, searched_over, without_idle
from vlprompt.runs.folder import RESULTS, config_sha256
from vlprompt.runs.run import Run, run, validate
from vlprompt.runs.selection import SELECTION, Verdict, judge, record, selection_of, stamped
from vlprompt.runs.session import Session, completed
from vlprompt.runs.tables import render, score_text

BEST = "best.yaml"
LARGEST = 1000
"""Maximum number of candidates of a search."""


@dataclasses.dataclass
class Search:
    """A finished search.

    Attributes:
        folder: The folder of its runs, ``selection.json`` and ``best.yaml``.
        selection: Candidates, scores and chosen values; also in the results of the best run.
        run: The tested run of the best candidate.
    """

    folder: Path
    selection: dict[str, Any]
    run: Run

    def table(self, metrics: Sequence[str] = ()) -> str:
        """Return the table of the candidates with their scores, and the best run's (:meth:`Run.table`)."""
        data, oracle = self.run.results["data"], self.selection["oracle"]
        metric = METRICS[data.get("metric", "accuracy")]
        images = "test" if self.selection["on"] == "test" else "validation"
        title = stamped(f"{data['name']}: {metric} in % on the {images} images, by candidate", oracle)
        table = Table(*self.selection["grid"])
        table.add_column(images, justify="right")
        table.add_column("")
        for entry in self.selection["scores"]:
            values = [yaml_text(value, flow=True) for value in entry["values"].values()]
            chosen = "chosen" if entry["values"] == self.selection["chosen"] else ""
            table.add_row(*values, score_text(entry["score"]) if entry["score"] else "failed", chosen)
        reason = f"an oracle's choice: {self.selection['reason']}" if oracle else ""
        return render(table, title, reason) + "\n\n" + self.run.table(metrics)


def search(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    on: str = "val",
    oracle: bool = False,
    *,
    force: bool = False,
    report: Callable[[str], None] | None = None,
) -> Search:
    """Train every candidate of ``grid``, choose the best on the split ``on``, and test it.

    Scored candidates are reused and unfinished runs resumed, so the same call resumes where it stopped. A candidate
    whose training or scores are not finite has failed; it has no score and is not chosen.

    Args:
        config: The base configuration of the candidates.
        grid: Values by key: ``recipe.*``, ``settings.*``, ``data.transform``, ``data.template``, or settings of the
            configuration's decomposition (``decomposition.ept.lr_ratio``). Every combination is a candidate; the values
            of the last key change fastest, and the first of equal candidates is chosen.
        on: ``val``, or ``test`` for an oracle.
        oracle: Whether a selection that uses test images is allowed.
        force: Train everything again.
        report: Called with a line of text after every candidate.

    Raises:
        ConfigError: Keys or values cannot be searched, there are no validation images, or the selection would use
            test images without ``oracle``.
        NotFiniteError: All candidates failed.
        VlpromptError: A single run fails for another reason.
    """
    session = Session(config)
    config = session.config
    candidates = candidates_of(config, grid)
    inherited = selection_of(config.output)
    session.load()
    task = session.drawn
    verdict = judge(task.name, on, [image.id for image in task.val], [image.id for image in task.test], oracle=oracle)
    if inherited is not None and inherited["oracle"]:
        verdict = Verdict(verdict.on, oracle=True, reason=f"it goes on from an oracle's choice: {inherited['reason']}")
    key = sha256_json([config_sha256(config), {name: list(values) for name, values in grid.items()}, on, oracle])[:8]
    folder = Path(config.output) / f"search-{key}"
    configs = [dataclasses.replace(candidate, output=str(folder)) for _, candidate in candidates]
    _keep(folder, record(verdict, grid, [], {}))  # first, so that no result of the search lacks the record
    scores = []
    for (values, _), candidate in zip(candidates, configs, strict=True):
        entry: dict[str, Any] = {"values": values, "score": None}
        try:
            if verdict.on == "val":
                entry["score"] = validate(candidate, force=force, after=session)
            else:
                done = run(candidate, force=force, after=session)
                entry["score"] = done.results["results"][config.data.classes]
        except NotFiniteError as error:
            entry["failed"] = str(error)
        scores.append(entry)
        if report is not None and is_main_process():
            words = ", ".join(f"{name} {yaml_text(value, flow=True)}" for name, value in values.items())
            result = f"failed: {entry['failed'].splitlines()[0]}" if "failed" in entry else score_text(entry["score"])
            report(f"{words}: {result}")
    scored = [index for index, entry in enumerate(scores) if entry["score"] is not None]
    if not scored:
        lines = [f"{entry['values']}: {entry['failed']}" for entry in scores]
        raise NotFiniteError(f"all {len(scores)} candidates failed:\n{bulleted(lines, limit=4)}")
    best = max(scored, key=lambda index: headline(scores[index]["score"]))  # the first of equals
    selection = record(verdict, grid, scores, candidates[best][0])
    _keep(folder, selection)
    done = run(configs[best], after=session)
    if done.results.get("selection") != selection:
        done.results["selection"] = selection
        if is_main_process():
            write_json(done.folder / RESULTS, done.results)
    if is_main_process():
        write_text(folder / BEST, to_yaml(configs[best]))
    return Search(folder, selection, done)


def _keep(folder: Path, selection: dict[str, Any]) -> None:
    if is_main_process():
        write_json(folder / SELECTION, selection)


def candidates_of(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], RunConfig]]:
    """Return the values and the configuration of every candidate, in grid order.

    Raises:
        ConfigError: Keys or values cannot be searched; the text lists all problems.
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
                typed[key].append(plain(convert(hints[key], value)))
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
    candidates = []
    if not problems:
        for combination in itertools.product(*typed.values()):
            chosen = dict(zip(typed, combination, strict=True))
            candidate, wrong = _candidate(config, chosen)
            candidates.append((chosen, candidate))
            problems += [f"{text} (of the candidate {chosen})" for text in wrong]
        problems += [] if problems else _same(candidates)
    if problems:
        raise ConfigError(f"the grid cannot be searched:\n{bulleted(problems)}")
    return candidates


def _same(candidates: Sequence[tuple[dict[str, Any], RunConfig]]) -> list[str]:
    """Return the keys without effect on any candidate, else the first two candidates that are the same run."""
    whole = [completed(candidate) for _, candidate in candidates]
    off = [idle_keys(config) | searched_over(config) for config in whole]
    if unused := [key for key in candidates[0][0] if all(key in reasons for reasons in off)]:
        return [f"{key} has no effect: {off[0][key]}" for key in unused]
    known: dict[str, dict[str, Any]] = {}
    for (values, _), config in zip(candidates, whole, strict=True):
        key = config_sha256(without_idle(config)[0])
        if key in known:
            return [f"the candidates {known[key]} and {values} are the same run: one value switches another one off"]
        known[key] = values
    return []


def searched_keys(config: RunConfig) -> dict[str, Any]:
    """Return the searchable keys for the method and the decomposition of ``config``, with their types."""
    keys = {key: hint for key, hint in RUN_KEYS.items() if key.startswith("recipe.")}
    keys |= {key: RUN_KEYS[key] for key in ("data.transform", "data.template")}
    for name in config.decomposition:
        hints = field_hints(get_decomposition_class(name).Settings)
        keys |= {f"decomposition.{name}.{entry}": hint for entry, hint in hints.items()}
    return {**keys, **settings_keys(get_method_class(config.method).Settings)}


def _candidate(config: RunConfig, values: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """Return ``config`` with ``values``, and its problems."""
    changed = plain(merged(as_plain(config), nest(values)))
    changed["recipe"] = over_defaults(RecipeConfig, nest(values).get("recipe", {}), config.recipe)
    candidate, problems = validate_values(RunConfig, changed)
    settings = {"settings": (get_method_class(config.method).Settings, changed["settings"])}
    for name, inner in changed["decomposition"].items():
        settings[f"decomposition.{name}"] = (get_decomposition_class(name).Settings, inner)
    for where, (kind, inner) in settings.items():
        problems += validate_values(kind, inner, where)[1]
    return candidate or config, [problem.text for problem in problems]
