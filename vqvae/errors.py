"""The errors that a caller can mend, and the end of a run by a signal.

What stands in backticks in a message is Python: an argument, an argument with a value, or a function. The command line
turns it into the flag or the command that does the same (cli.py, `as_flags`).
"""

import re

# What the allocators of torch say, on Linux and macOS, on Windows and of CUDA, and what the loader of libraries says.
NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|failed to map segment from shared object$"
)


class InputError(ValueError):
    """An argument, a file or a setting is not what it should be. The message is one sentence: what was expected, what
    was found, what to do about it. It can be printed, whatever the name of a file may hold."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingFileError(InputError, FileNotFoundError):
    """A file that is needed is not there."""


def plain(number: object) -> str:
    """A number in a message, with every digit that it has: 1.0000001, which `:g` would round to 1."""
    return str(number).removesuffix(".0")


class Interrupted(Exception):
    """A signal ended a training run, which was saved first.

    Args:
        signal: its number.
        step: how many steps are done and saved.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"interrupted by signal {signal} after step {step}")
        self.signal, self.step = signal, step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was memory that ran out, of the machine or of a CUDA device."""
    of_torch = type(error).__name__ == "OutOfMemoryError"  # of a CUDA device; torch is not imported for it
    return isinstance(error, MemoryError) or of_torch or bool(NO_MEMORY.search(str(error)))


def printable(text: str) -> str:
    """The text on one line, with characters that do not print as Python would escape them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
