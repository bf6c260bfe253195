"""Tables on a terminal of any width, and in files."""

from rich.console import Console
from rich.table import Table

_WIDEST = 100_000  # columns
_NARROWEST = 12  # columns of what is folded: as many as a number takes


def print_table(console: Console, table: Table) -> None:
    """Print a table whole: no cell is cut.

    On a terminal that is too narrow, the columns with ``overflow="fold"`` are folded, and only
    they. What is no terminal has no width.

    Args:
        console: where to print.
        table: what to print; folded columns become narrower.
    """
    width = _natural(console, table)
    if console.is_terminal and width > console.width:
        _fold(console, table)
        width = _natural(console, table)
    wide = Console(file=console.file, force_terminal=console.is_terminal, width=width)
    wide.print(table, soft_wrap=True)


def _natural(console: Console, table: Table) -> int:
    """Columns that the table takes where nothing limits it."""
    options = console.options.update(width=_WIDEST)
    return console.measure(table, options=options).maximum


def _fold(console: Console, table: Table) -> None:
    """Give all folded columns the greatest width at which the table fits."""
    folded = [column for column in table.columns if column.overflow == "fold"]
    for width in range(console.width, _NARROWEST - 1, -1):
        for column in folded:
            column.max_width = width
        if _natural(console, table) <= console.width:
            return
