"""A real browser for tests, and the demo in it; how fast the demo is, and its picture for the README.

    python -m tests.browser [--picture checkpoints/demo.png]

prints the seconds from the command to the page, and those from the end of a stroke to its answer.
"""

import argparse
import math
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FIXTURE, ROOT, SHIPPED

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
UPPER, LOWER = ([turn * math.pi / 8 for turn in turns] for turns in (range(-3, 9), range(1, 12)))
THREE = [(0.46 + 0.18 * math.sin(t), 0.31 - 0.17 * math.cos(t)) for t in UPPER]
THREE += [(0.46 + 0.21 * math.sin(t), 0.67 - 0.19 * math.cos(t)) for t in LOWER]
SEVEN = [(0.28, 0.22), (0.5, 0.2), (0.72, 0.2), (0.6, 0.5), (0.5, 0.85)]
PAIR = ("--vqvae", SHIPPED / "vqvae.safetensors", "--prior", SHIPPED / "prior.safetensors", "--device", "cpu")


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def demo(*arguments: object) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command in a process of its own: the page's address, and the process, which is ended."""
    words = [sys.executable, ROOT / "cli.py", "demo", "--port", free_port(), *PAIR, *arguments]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            line = next((line for line in lines if line.startswith("demo at ")), "")
            assert line, "the demo ended before it served"
            yield line.removeprefix("demo at ").partition(";")[0], process
        finally:
            process.terminate()


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window. Skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def stroke(page: Any, points: list[tuple[float, float]], *, lift: bool = True) -> None:
    """Draw on the page's canvas, from point to point, each (x, y) in 0..1."""
    box = page.locator("canvas").bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if number == 0:
            page.mouse.down()
    if lift:
        page.mouse.up()


def codes_of(page: Any) -> list[str]:
    """The numbers in the map of codes beside the drawing."""
    return page.locator(".analysis .map span").all_inner_texts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--picture", type=Path, help="write the page with a drawn digit to it")
    picture = parser.parse_args().picture
    start = time.perf_counter()
    with demo("--data-folder", FIXTURE) as (address, _):
        print(f"from the command to the page's address: {time.perf_counter() - start:.1f} s")
        with browser() as found:
            page = found.new_page(viewport={"width": 1280, "height": 640})
            page.goto(address)
            page.wait_for_selector(".analysis")
            print(f"and to the page in a browser: {time.perf_counter() - start:.1f} s")
            seconds = []
            for points in [THREE, SEVEN] * 5:
                page.locator(".clear").click()
                page.wait_for_selector(".refusal")
                stroke(page, points, lift=False)
                page.wait_for_selector(".analysis")  # the beginning of the stroke is answered
                page.wait_for_timeout(1000)
                before = codes_of(page)
                page.mouse.move(640, 400)
                start = time.perf_counter()
                while codes_of(page) == before:
                    pass
                seconds.append(time.perf_counter() - start)
                page.mouse.up()
            print(f"from a stroke to its answer: {statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s")
            if picture:
                page.locator(".clear").click()
                page.wait_for_selector(".refusal")
                stroke(page, THREE)
                page.wait_for_timeout(2000)
                page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": 1280, "height": 600})


if __name__ == "__main__":
    main()
