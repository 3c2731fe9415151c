"""The errors that a caller can mend, and the end of a run by a signal.

What stands in backticks in a message is Python: an argument, an argument with a value, or a function. The command line
turns it into the flag or the command that does the same (cli.py, `as_flags`).
"""


class InputError(ValueError):
    """An argument, a file or a setting is not what it should be. The message is one sentence: what was expected, what
    was found, what to do about it. It can be printed, whatever the name of a file may hold."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingFileError(InputError, FileNotFoundError):
    """A file that is needed is not there."""


def plain(number: object) -> str:
    """A number in a message, with every digit that it has: 1.0000001, which `:g` would round to 1."""
    return f"{number}".removesuffix(".0")


class Interrupted(Exception):
    """A signal ended a training run, which was saved first.

    Args:
        signal: its number.
        step: how many steps are done and saved.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"interrupted by signal {signal} after step {step}")
        self.signal, self.step = signal, step


def printable(text: str) -> str:
    """The text on one line, with characters that do not print as Python would escape them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
