"""Signals that ask a training run to end. The run answers between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """The number of the signal that came, or None."""

    signal: int | None = None


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is only recorded. A second one acts as it would outside.

    A signal that is ignored outside, as SIGINT is under `nohup ... &`, stays ignored. Python gives signals to its main
    thread alone, so in another thread nothing is caught.
    """
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}

    def record(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, record)
    try:
        yield request
    finally:
        restore()
