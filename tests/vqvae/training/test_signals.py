import signal
import threading

from vqvae.training.signals import SIGNALS, catch_signals


def test_a_signal_that_is_ignored_outside_stays_ignored_and_one_that_came_is_told() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.signal is None
            signal.raise_signal(signal.SIGTERM)
            assert request.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_caught_and_nothing_fails() -> None:
    handlers: list[list[object]] = [[signal.getsignal(number) for number in SIGNALS]]

    def work() -> None:
        with catch_signals() as request:
            handlers.append([signal.getsignal(number) for number in SIGNALS])
            assert request.signal is None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == handlers[:1] * 2
