"""Tables on the console: no word or number is cut, whatever the width of the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show(table: Table) -> None:
    """Prints a table of strings. In a terminal that is too narrow for it, cells wrap, at blanks only."""
    console = Console()
    table.box, table.show_edge, table.pad_edge, table.padding = SIMPLE_HEAD, False, False, (0, 1, 0, 0)
    need = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        widest, longest_word = max(map(len, cells)), max(len(word) for cell in cells for word in cell.split())
        if console.is_terminal and (cut := min(widest - longest_word, need - console.width)) > 0:
            column.width = widest - cut
            need -= cut
    Console(width=max(console.width, need)).print(table)
