"""Signals that ask a run to end, answered between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Request:
    """Which signal came, None so far."""

    signal: int | None = None


@contextmanager
def listening() -> Iterator[Request]:
    """Inside, the first SIGINT or SIGTERM is only noted; a second one does what it would have done outside."""
    request = Request()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
