import base64
import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prior.demo.analysis import Analysis
from prior.demo.html import refuse, show_analysis, show_map, show_places, show_samples
from prior.pair import Samples
from tests.helpers import save_pair
from vqvae.pictures import grid

COLOURS = [(0, 0, 0), (250, 250, 250), (10, 200, 10)]
HOSTILE = "<script>alert('&')</script>"


def test_a_map_shows_every_code_in_its_colour_with_a_number_that_can_be_read() -> None:
    shown = show_map(torch.tensor([[0, 1, 2], [2, 2, 1]]), COLOURS, "codes")
    cells = re.findall(r"--n:(\d);background:rgb\((.*?)\);color:(\w+)\" title=\"code (\d)\">(\d)<", shown)
    assert [(int(n), code, number) for n, _, _, code, number in cells] == [
        (place, code, code) for place, code in enumerate("012221")
    ]
    looks = {("0, 0, 0", "white"), ("250, 250, 250", "black"), ("10, 200, 10", "white")}
    assert {(rgb, ink) for _, rgb, ink, _, _ in cells} == looks
    assert "--rows:2;--columns:3;--cells:6" in shown
    assert "small" in show_map(torch.zeros(16, 16, dtype=torch.int64), COLOURS, "codes")


def test_names_of_classes_are_text_whatever_they_hold() -> None:
    image, indices = torch.rand(1, 8, 8), torch.zeros(2, 2, dtype=torch.int64)
    analysis = Analysis(image, indices, image, 12.0, [(HOSTILE, 0.75)])
    samples = Samples(image[None], indices[None], torch.tensor([0]))
    for shown in (
        show_analysis(analysis, COLOURS, {HOSTILE: 20.0}),
        show_samples(samples, samples._asdict(), COLOURS, [HOSTILE]),
        refuse(f"expected a name, found {HOSTILE}"),
    ):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown


def test_a_likelihood_is_shown_beside_what_it_is_compared_with() -> None:
    image, indices = torch.rand(1, 8, 8), torch.zeros(2, 2, dtype=torch.int64)
    shown = show_analysis(Analysis(image, indices, image, 100.4, []), COLOURS, {"typical": 50.0, "random": 200.0})
    assert re.findall(r"<span>(.*?)</span><b>(.*?)</b><i><i style=\"width:(.*?)%", shown) == [
        ("this picture", "100", "50.2"),
        ("typical", "50", "25.0"),
        ("random", "200", "100.0"),
    ]


def test_every_drawing_of_samples_is_a_new_element_so_that_it_is_seen_to_fill_again(tmp_path: Path) -> None:
    samples = save_pair(tmp_path, (1, 16, 12)).draw(25)
    first, second = (show_samples(samples, samples._asdict(), [(9, 9, 9)] * 16, ()) for _ in range(2))
    assert first != second
    names = [re.fullmatch(r"<(drawn-\w+)>.*</\1>", shown)[1] for shown in (first, second)]  # type: ignore[index]
    assert first.replace(names[0], "") == second.replace(names[1], "")
    assert first.count("filling") == 2  # the prior's map and grid, and not those of the noise


def test_all_samples_stand_in_a_grid_with_their_own_values(tmp_path: Path) -> None:
    samples = save_pair(tmp_path, (1, 16, 12)).draw(25)
    shown = show_samples(samples, samples._asdict(), [(9, 9, 9)] * 16, ())
    for encoded in re.findall(r'<div class="grid"><img [^>]*base64,([^"]*)"', shown):
        found = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(encoded)))))
        assert found.permute(2, 0, 1).equal(grid(samples.images, 5))


def test_a_place_is_framed_where_its_cell_is() -> None:
    shown = show_places([(torch.rand(1, 8, 8), 1, 3)], 7, 0.25, (2, 4))
    assert "top:50.0%;left:75.0%;height:50.0%;width:25.0%" in shown
    assert "Code 7, 25.00% of all codes" in shown


def test_a_refusal_is_a_sentence_in_plain_words() -> None:
    assert refuse("expected `top_k` of at least 1, found 0; try `top_k=1`") == (
        '<p class="refusal">Expected top_k of at least 1, found 0; try top_k=1.</p>'
    )
