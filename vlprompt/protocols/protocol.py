"""What the protocols of several runs share: means and deviations, labelled rows, and the file kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlprompt._dist import is_main_process
from vlprompt._files import sha256_json, write_json
from vlprompt.config.run import RunConfig
from vlprompt.runs.folder import config_sha256
from vlprompt.runs.run import Run
from vlprompt.runs.selection import is_oracle, stamped

ZERO_SHOT = "zero-shot"


def keep(stem: str, results: dict[str, Any], configs: Sequence[RunConfig], *more: Any) -> None:
    """Write ``results`` as ``<stem>-<hash>.json`` beside the runs; the hash is over ``configs`` and ``more``."""
    if is_main_process():
        key = sha256_json([[config_sha256(config) for config in configs], *more])[:8]
        write_json(Path(configs[0].output) / f"{stem}-{key}.json", results)


def result_parts(method: str) -> dict[str, str]:
    """Return the labels of a cell's rows and the part of a run's results that each is made from."""
    return {method: "results", ZERO_SHOT: "zeroshot"}


def marks(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what a cell keeps of its runs beside their scores: another metric, and how test images were used."""
    metric = runs[0].results["data"].get("metric", "accuracy")
    found: dict[str, Any] = {} if metric == "accuracy" else {"metric": metric}
    if used := runs[0].results.get("test_images"):
        found["test_images"] = used
    return found | ({"oracle": True} if is_oracle(one.results for one in runs) else {})


def shared_marks(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the average of ``cells`` keeps of :func:`marks`: whatever any of them used test images for."""
    found: dict[str, Any] = {"oracle": True} if any(cell.get("oracle") for cell in cells) else {}
    used = [cell["test_images"] for cell in cells if cell.get("test_images")]
    return found | ({"test_images": used[0]} if used else {})


def table_rows(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield cell and label of each row: zero-shot once per data set, then its methods.

    Data sets stand in the order in which ``cells`` first have them. Zero-shot with chosen templates has its own row.
    """
    for data in dict.fromkeys(cell["data"] for cell in cells):
        own = [cell for cell in cells if cell["data"] == data]
        yield own[0], ZERO_SHOT
        yield from ((cell, cell["method"]) for cell in own if cell["method"] != "zeroshot" or cell.get("oracle"))


def row_name(cell: dict[str, Any], label: str) -> str:
    """Return how a table calls the row ``label`` of ``cell``: marked where test images were used."""
    own = label != ZERO_SHOT
    return stamped(label, own and bool(cell.get("oracle")), cell.get("test_images") if own else None)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and population deviation of ``values``."""
    return {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}


def spread_text(part: dict[str, float] | None, several: bool) -> str:
    """Return a mean, with its deviation where it is one of ``several`` values, and a dash for nothing."""
    if part is None:
        return "-"
    return f"{part['mean']:.2f} ± {part['deviation']:.2f}" if several else f"{part['mean']:.2f}"


def over_seeds(seeds: Sequence[int]) -> str:
    """Return what a table's title says of its seeds."""
    return f"mean and deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
