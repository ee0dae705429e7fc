"""Resolution of data set names: names, aliases, and groups that the cards define."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.datasets.catalogue import find_card, list_datasets, list_groups
from vlprompt.errors import ConfigError, did_you_mean

GROUP = "group:"


def dataset_names(names: Sequence[str], key: str = "datasets", leave_out: Sequence[str] = ()) -> list[str]:
    """Return the data set names for ``names``, which may be aliases or ``group:NAME``.

    Args:
        names: Names, aliases or groups.
        key: The option or key of the names, for messages.
        leave_out: Data sets to skip in groups; explicit names are kept.

    Raises:
        ConfigError: There are no names, unknown names or duplicates; the text lists all problems.
    """
    datasets, problems = [], []
    for name in names:
        if name.startswith(GROUP):
            group, known = name.removeprefix(GROUP), list_groups()
            datasets += [dataset for dataset in known.get(group, ()) if dataset not in leave_out]
            if group not in known:
                problems.append(f"no data set's card names the group {group!r}.{did_you_mean(group, known)}")
            continue
        try:
            datasets.append(find_card(name).name)
        except ConfigError:
            problems.append(f"{name!r} is no data set.{did_you_mean(str(name), list_datasets())}")
    problems += [f"{name!r} is named twice." for name in dict.fromkeys(datasets) if datasets.count(name) > 1]
    if problems or not datasets:
        raise ConfigError(f"{key}: " + (" ".join(problems) or "none is named; accepted: names with commas, demo,dtd"))
    return datasets
