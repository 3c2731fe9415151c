import socket
import sys
from contextlib import closing

import pytest

from prior.demo.serve import require_address
from tests.helpers import run
from vqvae.errors import InputError


def test_a_port_that_is_taken_is_refused_and_another_is_named() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = run("demo", "--port", port)
        assert told.status == 1
        assert told.stderr == (
            f"error: expected a free --port at 127.0.0.1, found that {port} is not: Address already in use; "
            f"try --port {port + 1}\n"
        )
    require_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "", "a" * 70 + ".b", "203.0.113.1"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="try `host=127"):
        require_address(host, 7860)


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    told = run("demo")
    assert told.status == 1
    assert "found no gradio; install them with: pip install" in told.stderr
    assert "[demo]" in told.stderr
