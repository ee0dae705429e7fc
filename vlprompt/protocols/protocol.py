"""Shared parts of protocols: means and deviations, labelled rows, and the results file."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json
from vlprompt.config.run import RunConfig
from vlprompt.runs.folder import config_sha256
from vlprompt.runs.run import Run
from vlprompt.runs.seeds import CROPS, ORDER
from vlprompt.runs.selection import is_oracle, stamped
from vlprompt.runs.tables import ZERO_SHOT, classifier_of, zero_shot_name


def keep(stem: str, results: dict[str, Any], configs: Sequence[RunConfig], *more: Any) -> None:
    """Write ``results`` as ``<stem>-<hash>.json`` next to the runs.

    The hash covers ``configs``, ``more`` and the metrics that were asked for.
    """
    if is_main_process():
        more = (*more, *([list(results["metrics"])] if "metrics" in results else ()))
        key = sha256_json([[config_sha256(config) for config in configs], *more])[:8]
        write_json(Path(configs[0].output) / f"{stem}-{key}.json", results)


def result_parts(method: str) -> dict[str, str]:
    """Return the row labels of a cell, each with the key of its results in a run."""
    return {method: "results", ZERO_SHOT: "zeroshot"}


def by_metric(
    build: Callable[[str | None], tuple[dict[str, Any], str]], metrics: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Return the results by headline metric, with those of each of ``metrics`` under ``metrics``, and the tables.

    Args:
        build: From a metric, or None for the headline metric of each data set, to results and table.
        metrics: The metrics to show, a table each; empty for the headline metric.
    """
    results, table = build(None)
    if not metrics:
        return results, table
    found = {metric: build(metric) for metric in metrics}
    results["metrics"] = {metric: _averages(part) for metric, (part, _) in found.items()}
    return results, "\n\n".join(text for _, text in found.values())


def _averages(part: Any) -> Any:
    """Return the results ``part`` without the scores of single runs, which the results by headline metric hold."""
    if isinstance(part, dict):
        return {key: _averages(value) for key, value in part.items() if key not in ("per_seed", "runs")}
    return [_averages(value) for value in part] if isinstance(part, list) else part


def marks(runs: Sequence[Run], metric: str | None = None) -> dict[str, Any]:
    """Return the marks of a cell: a metric other than accuracy, its classifier, and how its runs used test images."""
    metric = metric or runs[0].results["data"].get("metric", "accuracy")
    cell_marks: dict[str, Any] = {} if metric == "accuracy" else {"metric": metric}
    if used := runs[0].results.get("test_images"):
        cell_marks["test_images"] = used
    cell_marks |= classifier_mark([classifier_of(runs[0].results)])
    cell_marks |= seed_mark([runs[0].results])
    return cell_marks | ({"oracle": True} if is_oracle(run.results for run in runs) else {})


def seed_mark(results: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the mark of a cell with what the seeds of its runs draw; none if a run of an older version has no record.

    Args:
        results: The results of a run of each kind, such as one for each data set.
    """
    draws = [found.get("seed_draws") for found in results]
    known = [names for names in draws if isinstance(names, list)]
    return {"seed_draws": list(dict.fromkeys(itertools.chain(*known)))} if len(known) == len(draws) else {}


def shared_marks(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the marks of the average of ``cells``: their classifiers, and every use of test images in any of them."""
    cell_marks: dict[str, Any] = {"oracle": True} if any(cell.get("oracle") for cell in cells) else {}
    used = [cell["test_images"] for cell in cells if cell.get("test_images")]
    cell_marks |= classifier_mark([cell.get("zero_shot", "") for cell in cells]) | seed_mark(cells)
    cell_marks |= {name: cells[0][name] for name in ("variant",) if name in cells[0]}
    return cell_marks | ({"test_images": used[0]} if used else {})


def classifier_mark(names: Sequence[str]) -> dict[str, str]:
    """Return the mark of a cell whose zero-shot classifiers have these names, empty for the data set's template."""
    distinct = list(dict.fromkeys(names))
    return {"zero_shot": ", ".join(name or "the data set's template" for name in distinct)} if any(distinct) else {}


def table_rows(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield cell and label of each row: zero-shot once per data set and classifier, then the methods with it.

    Data sets and classifiers are in the order of their first cell. Zero-shot with templates that were selected on test
    images has only the row of the method, which is marked.
    """
    for data in dict.fromkeys(cell["data"] for cell in cells):
        of_data = [cell for cell in cells if cell["data"] == data]
        for classifier in dict.fromkeys(cell.get("zero_shot") for cell in of_data):
            group = [cell for cell in of_data if cell.get("zero_shot") == classifier]
            others = [cell for cell in group if cell["method"] != "zeroshot" or cell.get("oracle")]
            if unmarked := [cell for cell in group if cell["method"] != "zeroshot" or not cell.get("oracle")]:
                yield unmarked[0], ZERO_SHOT
            yield from ((cell, cell["method"]) for cell in others)


def row_name(cell: dict[str, Any], label: str) -> str:
    """Return the name of the row ``label`` of ``cell`` in a table, with marks for the use of test images.

    Zero-shot is named after its classifier, unless that is the template of the data set's card.
    """
    if label == ZERO_SHOT:
        return zero_shot_name(cell.get("zero_shot", ""))
    return stamped(cell.get("variant", label), bool(cell.get("oracle")), cell.get("test_images"))


def named(cell: dict[str, Any], variant: str) -> dict[str, Any]:
    """Return ``cell`` with its name in tables, if that is not its method (:attr:`Plan.variants`)."""
    return cell if variant == cell["method"] else {**cell, "variant": variant}


def varies(cell: Mapping[str, Any], label: str, seeds: Sequence[int]) -> bool:
    """Return whether there are several seeds and the row ``label`` of ``cell`` depends on them."""
    return len(seeds) > 1 and label != ZERO_SHOT and cell.get("seed_draws") != []


def seed_text(cell: Mapping[str, Any], label: str, part: dict[str, float] | None, seeds: Sequence[int]) -> str:
    """Return a mean over seeds as text (:func:`spread_text`), without the deviation of what no seed changes."""
    differs = part is not None and len(seeds) > 1 and part["deviation"] > 0
    return spread_text(part, differs or varies(cell, label, seeds))


def seed_note(rows: Iterable[tuple[dict[str, Any], str]], seeds: Sequence[int]) -> str:
    """Return a line for a table with ``rows`` (:func:`table_rows`) about those whose seeds draw little or nothing."""
    if len(seeds) < 2:
        return ""
    rows = list(rows)
    same = dict.fromkeys(row_name(cell, label) for cell, label in rows if not varies(cell, label, seeds))
    few = {
        row_name(cell, label): " and ".join(cell["seed_draws"])
        for cell, label in rows
        if varies(cell, label, seeds) and set(cell.get("seed_draws", [""])) <= {ORDER, CROPS}
    }
    lines = [f"no deviation: the results of {', '.join(same)} do not depend on the seed"] if same else []
    return "\n".join([*lines, *(f"{name}: the seeds draw {words} only" for name, words in few.items())])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and population deviation of ``values``."""
    return {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}


def spread_text(part: dict[str, float] | None, several: bool) -> str:
    """Return a mean as text, with its deviation if it covers ``several`` values; a dash for None."""
    if part is None:
        return "-"
    return f"{part['mean']:.2f} ± {part['deviation']:.2f}" if several else f"{part['mean']:.2f}"


def over_seeds(seeds: Sequence[int]) -> str:
    """Return the part of a table's title about seeds."""
    return f"mean and deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
