"""The page, served from this machine: without a network, an account or telemetry."""

import errno
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from prior.demo.answers import Answers
from prior.pair import Pair
from vqvae.console import say
from vqvae.data.dataset import Dataset
from vqvae.errors import InputError
from vqvae.storage.files import refusals

# Read by Gradio and what it stands on: nothing is sent to anybody or kept, and no proxy is asked for this machine.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OTEL_SDK_DISABLED": "true",
    "NO_PROXY": "*",
    "no_proxy": "*",  # it would win
}


def require_address(host: str, port: int) -> None:
    """Refuse an address at which this machine cannot serve.

    Raises:
        InputError: the port is taken, or the host is not one of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno != errno.EADDRNOTAVAIL:
            raise _taken(host, port, error.strerror) from None
        raise InputError(
            f"expected `host` to be an address of this machine, found {host!r:.80}; try `host=127.0.0.1`"
        ) from None


def _taken(host: str, port: int, why: str | None) -> InputError:
    other = port + 1 if 1024 <= port < 65535 else 7860  # those below are the system's
    return InputError(f"expected a free `port` at {host}, found that {port} is not: {why}; try `port={other}`")


@contextmanager
def serving(pair: Pair, load_data: Callable[[], Dataset], host: str, port: int) -> Iterator[str]:
    """Inside, the page of a model is served. Gives its address.

    Args:
        load_data: see `Answers`.
        host, port: see `require_address`.
    """
    with refusals("expected to make a folder for a while", "name a place for it by the variable TMPDIR"):
        scratch = tempfile.TemporaryDirectory(prefix="vqvae-pixelcnn-")
    with scratch as folder:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]  # meant for other pages, it could open folders to visitors
        os.environ |= {**QUIET, "GRADIO_TEMP_DIR": folder}
        import gradio as gr  # it takes seconds

        from prior.demo.drawing import MOST_BYTES
        from prior.demo.page import HERE, build_page

        page = build_page(Answers(pair, load_data))
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        try:
            page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                theme=theme,
                css_paths=HERE / "page.css",
                footer_links=[],
                max_file_size=0,  # pictures come with the requests, and no file is kept
                state_session_capacity=8,  # Gradio keeps what a visitor sent last, which the page does not need
                app_kwargs={"max_body_size": 2 * MOST_BYTES},  # of a request, in which a picture takes 4/3 of its bytes
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
            )
        except OSError:
            raise _taken(host, port, "another program was faster") from None
        # A request that makes no sense is answered with its status; a traceback here would tell nobody anything.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        try:
            yield str(page.local_url).rstrip("/")
        finally:
            page.server.should_exit = True  # `page.close()` would wait for visitors whose pages are open


def serve(pair: Pair, load_data: Callable[[], Dataset], host: str, port: int) -> None:
    """Serve the page of a model until a signal ends the process: see `serving`."""
    with serving(pair, load_data, host, port) as address:
        say(f"demo at {address}; stop it with Ctrl-C")
        while True:
            time.sleep(3600)
