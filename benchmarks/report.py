"""One table: for each measurement the median ratio to plain Celery, its spread, and the target."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("ours", "plain", "procrastinate", "potatoq-pg", "outbox")


@dataclass
class Line:
    """What was measured: for each arm one figure per round, or a word that says why not."""

    what: str
    target: float
    higher: bool = False
    unit: str = "x"
    found: dict[str, list[float] | str] = field(default_factory=dict)
    base: str = "1"
    notes: list[str] = field(default_factory=list)

    def cell(self, arm: str) -> str:
        figures = self.found.get(arm, "-")
        if isinstance(figures, str):
            return figures
        low, high = min(figures), max(figures)
        spread = f" ({number(low)}-{number(high)})" if len(figures) > 1 else ""
        return f"{number(statistics.median(figures))}{spread}"

    def verdict(self) -> str:
        """Say whether ours reaches the target, and by how much it does not."""
        ours = self.found.get("ours", "-")
        if isinstance(ours, str):
            return "-"
        figure = statistics.median(ours)
        short = self.target / figure if self.higher else figure / self.target
        return "met" if short <= 1 else f"missed by {100 * (short - 1):.0f} %"


def number(value: float) -> str:
    """Return three significant digits."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def ratios(rounds: list[dict[str, float]], *, higher: bool, base: str = "plain") -> dict[str, Any]:
    """Return per arm the ratio to plain Celery in each round."""
    found: dict[str, list[float]] = {}
    for seconds in rounds:
        for arm, value in seconds.items():
            ratio = seconds[base] / value if higher else value / seconds[base]
            found.setdefault(arm, []).append(ratio)
    return dict(found)


def show(console: Console, title: str, lines: list[Line]) -> None:
    """Print the table and its notes."""
    table = Table(title=title, title_justify="left")
    table.add_column("what", min_width=36, max_width=44)
    for column in COLUMNS:
        table.add_column("plain Celery" if column == "plain" else column, justify="right")
    table.add_column("target", no_wrap=True)
    table.add_column("ours", no_wrap=True)
    for line in lines:
        sign = ">=" if line.higher else "<="
        unit = "" if line.unit == "x" else f" {line.unit}"
        cells = [line.base if arm == "plain" else line.cell(arm) for arm in COLUMNS]
        target = f"{sign} {number(line.target)}{unit}"
        table.add_row(f"{line.what}{unit and ',' + unit}", *cells, target, line.verdict())
    console.print(table)
    for line in lines:
        for note in line.notes:
            console.print(f"- {line.what}: {note}")
