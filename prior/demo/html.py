"""What a visitor sees, as HTML: maps of codes, pictures, and what is said of them (page.css says how it looks)."""

import secrets
from collections.abc import Sequence
from html import escape

from torch import Tensor

from prior.completions import Completions
from prior.demo.analysis import Analysis
from prior.demo.codebook import Codebook
from prior.demo.drawing import to_url
from prior.labels import names_of
from prior.pair import Samples
from vqvae.pictures import grid

Colours = Sequence[tuple[int, int, int]]  # of each code
COLUMNS = 5  # of a grid of samples
MOST_COLUMNS = 12  # of a map whose numbers can be read


def show_analysis(analysis: Analysis, colours: Colours, scale: dict[str, float]) -> str:
    """An image as the model reads it, its codes, what they bring back, its likelihood and the likeliest labels.

    Args:
        scale: what to compare the likelihood with, in bits, by what it is.
    """
    most = max(scale.values())
    facts = "<h3>Bits: fewer, likelier</h3>" + _bar("this picture", f"{analysis.bits:.0f}", analysis.bits / most, "own")
    facts += "".join(_bar(name, f"{bits:.0f}", bits / most) for name, bits in scale.items())
    if analysis.likeliest:
        facts += "<h3>Likeliest labels</h3>"
        facts += "".join(_bar(name, f"{chance:.1%}", chance, "own") for name, chance in analysis.likeliest)
    return _row(
        _picture(analysis.image, "as the model sees it"),
        show_map(analysis.indices, colours, "its codes"),
        _picture(analysis.reconstruction, "drawn again from the codes"),
        f'<div class="facts">{facts}</div>',
        kind="analysis",
    )


def show_completions(completions: Completions, class_names: Sequence[str]) -> str:
    """One image, what was kept of it, and its completions with their labels."""
    images = completions.completions[0]
    names = names_of(completions.labels[0], class_names) or map(str, range(1, len(images) + 1))
    drawn = map(_picture, images, names)
    return _row(
        _picture(completions.images[0], "your picture"), _picture(completions.kept[0], "kept"), *drawn, kind="completed"
    )


def show_samples(samples: Samples, gaussian: dict[str, Tensor], colours: Colours, class_names: Sequence[str]) -> str:
    """Samples of the prior, the first one as it was drawn, beside those of Gaussian noise.

    The map is drawn in raster order, and no code changes later. So the page shows the finished map code by code, and
    the visitors' animations take no time here.
    """
    name = f", label “{names_of(samples.labels[:1], class_names)[0]}”" if class_names else ""
    # Gradio changes what differs and keeps other elements, whose animations would not start again. It puts an element
    # of another name in the place of the old one, with all that it holds.
    fresh = f"drawn-{secrets.token_hex(4)}"
    panels = _row(
        _panel(
            "Codes drawn by the prior", samples.images, samples.indices[0], colours, f"code by code{name}", "filling"
        ),
        _panel("Codes picked by Gaussian noise", gaussian["images"], gaussian["indices"][0], colours, "all at once"),
        kind="panels",
    )
    return f"<{fresh}>{panels}</{fresh}>"


def show_codebook(codebook: Codebook) -> str:
    """The patch of every code, brightened, the most used first, as buttons that say which code they stand for."""
    buttons = (
        f'<button data-code="{code}" title="code {code}: {use:.2%} of all"><img src="{to_url(patch.sqrt())}" alt=""/>'
        f"<span>{code}</span></button>"
        for code, use, patch in zip(codebook.codes.tolist(), codebook.uses.tolist(), codebook.patches, strict=True)
    )
    return f'<div class="codebook">{"".join(buttons)}</div>'


def show_places(places: Sequence[tuple[Tensor, int, int]], code: int, use: float, map_shape: tuple[int, int]) -> str:
    """Images in which a code is used, each with a frame around one of its cells."""
    height, width = (100 / side for side in map_shape)
    shown = (
        f'<div class="picture"><img src="{to_url(image)}" alt="an image with code {code}"/><i style="'
        f'top:{row * height}%;left:{column * width}%;height:{height}%;width:{width}%"></i></div>'
        for image, row, column in places
    )
    return f'<h3>Code {code}, {use:.2%} of all codes, is used here</h3><div class="places">{"".join(shown)}</div>'


def show_map(indices: Tensor, colours: Colours, caption: str, kind: str = "") -> str:
    """A map of codes (H, W) as coloured cells with their numbers."""
    size = "" if indices.shape[1] <= MOST_COLUMNS else "small"
    cells = "".join(
        f'<span style="--n:{place};background:rgb{colours[code]};color:{_readable(colours[code])}" '
        f'title="code {code}">{code}</span>'
        for place, code in enumerate(indices.flatten().tolist())
    )
    return (
        f'<figure class="coded"><div class="map {kind} {size}" style="{_sides(indices)}">{cells}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def refuse(message: str) -> str:
    """A sentence in place of a result. The marks around the Python in it are left out."""
    sentence = message.replace("`", "")
    return f'<p class="refusal">{escape(sentence[:1].upper() + sentence[1:])}.</p>'


def _panel(title: str, images: Tensor, indices: Tensor, colours: Colours, caption: str, kind: str = "") -> str:
    """A first map and its picture, above a grid of all. Where the map fills, a veil leaves the picture with it."""
    veil = "".join(f'<span style="--n:{place}"></span>' for place in range(indices.numel())) if kind else ""
    drawn = to_url(grid(images, COLUMNS) / 255)
    return (
        f'<section class="panel"><h3>{title}</h3><div class="shown pair">'
        f"{show_map(indices, colours, caption, kind)}"
        f'<figure><div class="picture"><img src="{to_url(images[0])}" alt="{title}, decoded"/>'
        f'<div class="veil map" style="{_sides(indices)}">{veil}</div></div>'
        "<figcaption>decoded</figcaption></figure>"
        f'</div><div class="grid"><img class="{kind}" src="{drawn}" alt="{title}: all"/></div>'
        "</section>"
    )


def _row(*parts: str, kind: str) -> str:
    return f'<div class="shown {kind}">{"".join(parts)}</div>'


def _picture(image: Tensor, caption: str) -> str:
    caption = escape(caption)
    return (
        f'<figure><div class="picture"><img src="{to_url(image)}" alt="{caption}"/></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _bar(name: str, value: str, share: float, kind: str = "") -> str:
    share = min(max(share, 0), 1)
    return (
        f'<div class="bar {kind}"><span>{escape(name)}</span><b>{value}</b>'
        f'<i><i style="width:{100 * share:.1f}%"></i></i></div>'
    )


def _sides(indices: Tensor) -> str:
    height, width = indices.shape
    return f"--rows:{height};--columns:{width};--cells:{height * width}"


def _readable(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
