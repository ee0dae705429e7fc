"""``vlprompt list``: methods, objectives, decompositions, data sets, backbones and protocols."""

from __future__ import annotations

from collections.abc import Callable

from vlprompt._terminal import show, text_of
from vlprompt.cli.parse import COMMAND_LINE, read_command_line, refuse
from vlprompt.cli.protocols import need_no_config
from vlprompt.errors import ConfigError, did_you_mean

KINDS = ("methods", "objectives", "decompositions", "datasets", "backbones", "protocols")


def list_command(words: list[str]) -> int:
    """Run ``vlprompt list`` and return its exit status."""
    line = read_command_line(words, "list", flags=("names", "markdown"), operands=True)
    need_no_config(line)
    kind, pattern = ([*line.operands, "", ""])[:2]
    if not kind:
        line.problems.append(f"{COMMAND_LINE}: list what? Accepted: {', '.join(KINDS)}")
    elif kind not in KINDS:
        line.problems.append(f"{COMMAND_LINE}: there is no list {kind!r}.{did_you_mean(kind, KINDS)}")
    for extra in line.operands[2:]:
        line.problems.append(f"{COMMAND_LINE}: {extra!r} is one word too many (quote the pattern)")
    if line.problems:
        refuse(line.problems, "list")
    names = _names(kind)
    matching = names(pattern or "*")
    if not matching:
        raise ConfigError(f"none of the {kind} matches {pattern!r}.{did_you_mean(pattern.strip('*'), names('*'))}")
    if kind == "methods" and "names" not in line.flags:
        _print_methods(matching, "markdown" in line.flags)
    elif kind in ("objectives", "decompositions"):
        from vlprompt.objectives import get_objective_class
        from vlprompt.prompts import get_decomposition_class

        class_of: Callable[[str], type] = get_objective_class if kind == "objectives" else get_decomposition_class
        rows = [(name, (class_of(name).__doc__ or "").splitlines()[0]) for name in matching]
        show("\n".join(name if "names" in line.flags else f"{name:<20} {about}" for name, about in rows))
    else:
        show("\n".join(matching))
    return 0


def _print_methods(names: list[str], as_markdown: bool) -> None:
    from vlprompt.protocols.capabilities import ARCHITECTURE, HEADINGS, capabilities, cells, markdown

    rows = capabilities(names)
    if as_markdown:
        show(markdown(rows))
        return
    from rich.table import Table

    table = Table(*HEADINGS[:-2], box=None, pad_edge=False)
    table.add_column(f"parameters on {ARCHITECTURE}", justify="right")
    table.add_column(HEADINGS[-1])
    for row in rows:
        table.add_row(*cells(row))
    show(text_of(table, 140))


def _names(kind: str) -> Callable[[str], list[str]]:
    if kind == "methods":
        from vlprompt.methods import list_methods

        return list_methods
    if kind == "datasets":
        from vlprompt.datasets import list_datasets

        return list_datasets
    if kind in ("objectives", "decompositions"):
        import fnmatch

        from vlprompt.objectives import list_objectives
        from vlprompt.prompts import list_decompositions

        known = list_objectives() if kind == "objectives" else list_decompositions()
        return lambda pattern: fnmatch.filter(known, pattern)
    if kind == "protocols":
        from vlprompt.protocols.protocol_files import list_protocols

        return list_protocols
    from vlprompt.backbone import list_backbones

    return list_backbones
