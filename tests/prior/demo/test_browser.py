"""The demo in a real browser: drawn on, uploaded to, left, and used by several at once, without a network."""

import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.browser import SEVEN, THREE, browser, codes_of, demo, stroke
from tests.helpers import FIXTURE, mnist, save_pair
from vqvae.pictures import grid_png

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo is not installed"),
]
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def address(chromium: Any) -> Iterator[str]:
    with demo("--data-folder", FIXTURE) as (address, _):
        yield address


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    with chromium.new_context(viewport={"width": 1280, "height": 860}) as context:
        yield open_page(context, address)


def open_page(context: Any, address: str) -> Any:
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".analysis")
    return page


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def wait_for_label(page: Any, label: str) -> None:
    """Wait until it is the likeliest of the drawing."""
    likeliest = "document.querySelectorAll('.facts .own')[1]?.innerText"
    page.wait_for_function(f"label => {likeliest}.startsWith(label)", arg=label)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_without_a_network_on_a_desktop_and_on_a_phone(
    chromium: Any, address: str, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    asked, wrong = [], []
    with chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        context.on("request", lambda request: asked.append(request.url))
        context.on("weberror", lambda error: wrong.append(str(error)))
        page = open_page(context, address)
        assert len(codes_of(page)) == 49
        stroke(page, THREE)
        wait_for_label(page, "3")
        open_tab(page, "Complete")
        page.wait_for_selector(".completed")
        assert page.locator(".completed img").count() == 8
        open_tab(page, "Sample")
        page.wait_for_selector(".panels")
        filling = page.locator(".filling span")
        assert filling.count() == 49
        seen = "spans => spans.filter((span) => getComputedStyle(span).visibility == 'visible').length"
        assert filling.evaluate_all(seen) < 49  # it fills
        page.wait_for_timeout(3500)
        assert filling.evaluate_all(seen) == 49
        open_tab(page, "Codebook")
        page.locator("[data-code]").first.click()
        page.wait_for_selector(".places")
        assert page.get_by_text("training images").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert wrong == []


def test_a_sample_follows_its_options_and_the_same_seed_gives_the_same(page: Any) -> None:
    open_tab(page, "Sample")
    page.wait_for_selector(".panels")

    def maps_after(change: Any) -> str:
        shown = "[...document.querySelectorAll('.panels .coded span')].map((cell) => cell.textContent).join()"
        before = page.evaluate(shown)
        change()
        page.wait_for_function(f"before => {shown} != before", arg=before)
        return str(page.evaluate(shown))

    seed = page.get_by_label("Seed").last
    second = maps_after(lambda: page.get_by_role("button", name="25 others").click())
    maps_after(lambda: seed.fill("0"))
    assert maps_after(lambda: seed.fill("1")) == second


def test_files_are_read_and_bad_ones_are_told_in_a_sentence(page: Any, tmp_path: Path) -> None:
    good, bad, large = (tmp_path / name for name in ("digit.png", "text.png", "large.png"))
    good.write_bytes(grid_png(mnist().train.images[:1] / 255))
    bad.write_text("no image")
    large.write_bytes(bytes(9 * 2**20))
    chooser = page.locator("input[type=file]")
    chooser.set_input_files(bad)
    page.wait_for_selector(".refusal")
    assert "Expected an image, found a file that is cut short" in page.locator(".refusal").inner_text()
    chooser.set_input_files(large)
    page.get_by_text("The file is too large: at most 8 MB can be read.").wait_for()
    chooser.set_input_files(good)
    page.wait_for_selector(".analysis")
    assert not page.get_by_text("The file is too large").is_visible()
    page.locator(".clear").click()
    page.wait_for_selector(".refusal")
    assert "found an empty picture" in page.locator(".refusal").inner_text()


def test_several_visitors_get_their_own_answers_and_one_may_leave_in_the_middle(chromium: Any, address: str) -> None:
    with chromium.new_context() as one, chromium.new_context() as other, chromium.new_context() as third:
        pages = [open_page(context, address) for context in (one, other, third)]
        stroke(pages[2], THREE[:4], lift=False)
        third.close()
        for page, points in zip(pages, (THREE, SEVEN), strict=False):
            page.locator(".clear").click()
            stroke(page, points)
        for page, label in zip(pages, ("3", "7"), strict=False):
            wait_for_label(page, label)


def test_a_model_of_colour_images_without_classes_has_its_page_too(chromium: Any, tmp_path: Path) -> None:
    save_pair(tmp_path, (3, 16, 12), 0)
    pair = ("--vqvae", tmp_path / "vqvae.safetensors", "--prior", tmp_path / "prior.safetensors")
    with demo(*pair, "--data-folder", "nowhere") as (address, _), chromium.new_context() as context:
        page = open_page(context, address)
        page.wait_for_timeout(1000)
        pixel = "canvas => canvas.getContext('2d').getImageData(9, 9, 1, 1).data[3]"
        assert page.locator("canvas").evaluate(pixel) == 255  # what the model drew is shown
        assert not page.locator(".clear").is_visible()
        open_tab(page, "Sample")
        page.wait_for_selector(".panels")
        assert not page.get_by_label("Guidance").first.is_visible()


def test_ctrl_c_ends_the_demo_in_its_usual_way_while_a_page_is_open(chromium: Any) -> None:
    with demo("--data-folder", "nowhere") as (address, process), chromium.new_context() as context:
        page = open_page(context, address)
        open_tab(page, "Codebook")
        page.get_by_text("because the training images are not in the data folder").wait_for(timeout=60_000)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=20) == 130
        except subprocess.TimeoutExpired:
            pytest.fail("the demo did not end")
