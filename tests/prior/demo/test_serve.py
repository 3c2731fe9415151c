import json
import socket
import sys
from contextlib import closing
from importlib.util import find_spec

import pytest

from prior.demo.drawing import MOST_BYTES
from prior.demo.serve import require_address
from tests.browser import demo
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
    with pytest.raises(InputError, match=r"try `host=127\.0\.0\.1`"):
        require_address(host, 7860)


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    told = run("demo")
    assert told.status == 1
    assert "found no gradio; install them with: pip install" in told.stderr
    assert "[demo]" in told.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo is not installed")
def test_requests_that_make_no_sense_get_a_sentence_or_a_status_and_leave_no_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx  # comes with gradio

    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")  # of another page
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere")
    with (
        demo("--data-folder", "nowhere", "--host", "::1") as (address, _),
        httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
    ):
        functions = client.get("/config").json()["dependencies"]
        (samples,) = (function["id"] for function in functions if function["api_name"] == "samples")
        for wrong in (-1, None, "<b>", 1e300, [1]):
            session = json.dumps(wrong)
            sent = {"fn_index": samples, "session_hash": session, "data": ["(any)", 1, 1, 16, 1, wrong]}
            assert client.post("/gradio_api/queue/join", json=sent).status_code == 200
            told = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
            assert "Expected seed " in told
        join, nobody = "/gradio_api/queue/join", {"session_hash": "nobody", "fn_index": 0, "data": []}
        assert (
            httpx.post(f"{address}{join}", json={**nobody, "fn_index": 99}, trust_env=False).status_code == 500
        )  # closes connections
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 403
        assert client.get("/gradio_api/file=pyproject.toml").status_code == 403
        assert client.post("/gradio_api/run/picture", json={"data": [""]}).status_code == 404  # past the queue
        assert client.post(join, json={**nobody, "data": ["x" * 2 * MOST_BYTES]}).status_code == 413
        assert capfd.readouterr().err == ""
