"""What the program tells a person: results on standard output, remarks and progress on standard error.

Telling never ends the work. A character that the stream cannot encode is escaped, and a stream that is closed or full
is left alone. Of several processes the main one tells.
"""

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from vqvae.errors import printable

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 60.0  # between two lines of progress, where there is no terminal


class LenientStream:
    """A text stream on which writing never raises. It has everything else from the stream, except for its `buffer`,
    past which somebody would write bytes that this class does not see.

    Args:
        stream: None, as `sys.stdout` is where it was closed from the start, stands for nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: TextIO | None = stream.stream if isinstance(stream, LenientStream) else stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:  # it is closed
            return False

    def _try(self, method: str, *arguments: str) -> None:
        try:
            if self.stream is not None:
                getattr(self.stream, method)(*arguments)
        except BlockingIOError:  # the reader is slow; the next line may find space
            pass
        except (OSError, ValueError):  # it is full, its reader is gone, or it was closed
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        """Give up the stream. What its buffer still holds would otherwise fail once more when the interpreter ends."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)

    def __eq__(self, other: object) -> bool:
        return self.stream is getattr(other, "stream", other)  # tqdm looks for its bars' streams by ==

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.stream, name)


def guard_streams() -> None:
    """From now on nothing that this process prints can raise, whoever prints it.

    A standard descriptor that is closed is opened on nothing. The next file would otherwise get its number, and the
    file would then receive what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = (cast(TextIO, LenientStream(stream)) for stream in (sys.stdout, sys.stderr))


def be_quiet(quiet: bool) -> None:
    """Turn progress off, if it is asked for, in this process and in those that it starts."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"


def say(line: str) -> None:
    """Print a line, or a text of several, on standard output, above the progress bar if there is one."""
    _print("\n".join(map(printable, line.split("\n"))), sys.stdout)  # a file's name could control the terminal


def remark(line: str) -> None:
    """Print a line on standard error, whatever it quotes: what is no result, and no error either."""
    _print(printable(line), sys.stderr)


def progress(total: int, unit: str, *, initial: int = 0, doing: str | None = None) -> "tqdm[Any]":
    """A progress bar on standard error. Without a terminal it is a plain line a minute.

    The environment variable TQDM_DISABLE turns it off.

    Args:
        total, initial: number of units, and how many of them are done already.
        doing: what stands before the bar.
    """
    from tqdm import tqdm

    from vqvae.distributed import is_main

    off = not is_main() or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    common: dict[str, Any] = {"total": total, "unit": unit, "initial": initial, "desc": doing, "disable": off}
    stream = LenientStream(sys.stderr)
    if stream.isatty():
        return tqdm(file=stream, dynamic_ncols=True, **common)
    every: dict[str, Any] = {"mininterval": LINE_EVERY_S, "delay": LINE_EVERY_S, "miniters": 1}  # by time alone
    return tqdm(file=_Lines(stream), ncols=0, **every, **common)


class _Lines:
    """Where tqdm writes if there is no terminal. What would be drawn over the line before becomes a line of its own."""

    encoding = "ascii"  # so that tqdm draws its bar with plain characters

    def __init__(self, stream: LenientStream) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if line := text.strip():
            self.stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def _print(line: str, stream: TextIO | None) -> None:
    from tqdm import tqdm

    from vqvae.distributed import is_main

    if is_main():
        with tqdm.external_write_mode(file=stream):
            print(line, file=LenientStream(stream), flush=True)
