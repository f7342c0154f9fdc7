"""Numbers and switches of the environment: one line for what is neither, and never the value.

A variable that is empty counts as one that is not set. What is wrong is a ValueError that names the
variable and what it may be; its value is not shown, for people put secrets into the wrong variable.
"""

import math
import os

YES = frozenset(("1", "true", "yes", "on", "y", "ok"))
NO = frozenset(("0", "false", "no", "off", "n"))


def flag(name: str, default: bool = False) -> bool:
    """Return a switch: 1, true, yes or on; 0, false, no or off. Nothing else passes for "off"."""
    text = os.environ.get(name, "").strip()
    return switch(text, name) if text else default


def number(
    name: str, default: float, least: float = 0, most: float = math.inf, *, whole: bool = False
) -> float:
    """Return a number from `least` to `most`, both of them included."""
    text = os.environ.get(name, "").strip()
    try:
        value = float(text or default)
        if least <= value <= most and math.isfinite(value) and not (whole and value % 1):
            return value
    except ValueError:
        pass
    upper = f" to {most:g}" if most < math.inf else " or more"
    kind = "whole number" if whole else "number"
    raise ValueError(f"{name} is no {kind} of {least:g}{upper}")


def switch(text: str, name: str) -> bool:
    """Return whether a text says yes; raise ValueError where it says neither yes nor no."""
    if (word := text.strip().lower()) in YES | NO:
        return word in YES
    raise ValueError(f"{name} says neither yes nor no: write 1 or 0")
