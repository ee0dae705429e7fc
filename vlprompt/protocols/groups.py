"""Names of data sets as users and protocols give them: own names, aliases, and groups that the cards name."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.datasets.catalogue import find_card, list_datasets, list_groups
from vlprompt.errors import ConfigError, did_you_mean

GROUP = "group:"


def dataset_names(names: Sequence[str], key: str = "datasets", leave_out: Sequence[str] = ()) -> list[str]:
    """Return the data sets' own names for ``names``, which may be aliases or ``group:NAME``.

    Args:
        names: What was asked for.
        key: What the names were given as, for the texts.
        leave_out: Data sets that a group does not bring in; to name one itself is another matter.

    Raises:
        ConfigError: None is named, one is unknown, or one is named twice; all problems are listed.
    """
    found, problems = [], []
    for name in names:
        if name.startswith(GROUP):
            own, known = name.removeprefix(GROUP), list_groups()
            found += [one for one in known.get(own, ()) if one not in leave_out]
            if own not in known:
                problems.append(f"no data set's card names the group {own!r}.{did_you_mean(own, known)}")
            continue
        try:
            found.append(find_card(name).name)
        except ConfigError:
            problems.append(f"{name!r} is no data set.{did_you_mean(str(name), list_datasets())}")
    problems += [f"{name!r} is named twice." for name in dict.fromkeys(found) if found.count(name) > 1]
    if problems or not found:
        raise ConfigError(f"{key}: " + (" ".join(problems) or "none is named; accepted: names with commas, demo,dtd"))
    return found
