"""How a command ends: in one line and its usual status, whatever goes wrong for its user."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vqvae.errors import InputError, is_out_of_memory

BY_A_SIGNAL = "stopped by a signal"


class Stopped(SystemExit):
    """A signal came. Unlike KeyboardInterrupt, which libraries catch, this passes to the end of the program."""

    def __init__(self, number: int, line: str = BY_A_SIGNAL) -> None:
        super().__init__(128 + number)
        self.line = line


def end_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `Stopped`, but not where they are ignored, as under nohup."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:
            signal.signal(number, _stop)


@contextmanager
def ending(as_typed: Callable[[str], str]) -> Iterator[None]:
    """Inside, a command runs. An error of its user's ends the program in one sentence and status 1, and `Stopped` in
    its line and status. Other errors are bugs, and keep their traceback.

    Args:
        as_typed: turns the Python in a message into what the user types.
    """
    try:
        Path.cwd()
    except OSError:  # torch would end the process without a word of it
        _end(1, "error: expected a current folder, found that it is gone or closed; change to another")
    try:
        yield
    except InputError as error:
        _end(1, f"error: {as_typed(str(error))}")
    except Stopped as stopped:
        _end(stopped.code, stopped.line)
    except (ImportError, MemoryError, RuntimeError) as error:  # an import may find no memory for a library
        if not is_out_of_memory(error):
            raise
        _end(1, "error: expected enough memory, found too little; choose smaller numbers, or end other programs")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # C code that imports a module may catch an exception, or abort. Nothing is being written: end at once.
            with suppress(OSError):
                if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tells
                    os.write(2, f"{BY_A_SIGNAL}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise Stopped(number)


def _end(status: object, line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(status) from None
