"""Checks of what a caller gives: each failure is one sentence with the value, the expectation and the way out."""

import difflib
from collections.abc import Iterable
from numbers import Integral


def one_of(what: str, value, options: Iterable[str]) -> str:
    """Return `value` if it is among `options`; else raise `ValueError` with the closest match and the whole list."""
    options = list(options)
    if value in options:
        return value
    close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown {what} {value!r}: {hint}Choose one of {', '.join(map(repr, options))}.")


def at_least(what: str, value, minimum: int) -> int:
    """Return `value` if it is a whole number >= `minimum`; `TypeError` for another type, `ValueError` if smaller."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} must be a whole number >= {minimum}, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{what} must be >= {minimum}, got {value}.")
    return int(value)


def a_flag(what: str, value) -> bool:
    """Return `value` if it is True or False: "no" is neither, and would count as yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, got {value!r} of type {type(value).__name__}.")
    return value


def run_command(main) -> None:
    """Call `main` as a command: what its user can mend is told in one line, without a traceback."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raise `ValueError` unless `small` divides `large`; the message names the nearest sizes that would do."""
    if large % small == 0:
        return
    below, above = large // small * small, (large // small + 1) * small
    ways = f"{below} or {above}" if below else f"{above}"
    raise ValueError(
        f"{large_name} = {large} is not divisible by {small_name} = {small}: "
        f"take {large_name} = {ways}, or another {small_name}."
    )
