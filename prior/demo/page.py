"""The page: what it says, what can be done on it, and which answer it gets (Gradio)."""

from pathlib import Path
from typing import Any

import gradio as gr

from prior.demo.answers import ANY, NUM_COMPLETIONS, NUM_SAMPLES, Answers
from prior.demo.drawing import MOST_BYTES, to_url
from prior.pair import Pair
from prior.sampling import GUIDANCE

HERE = Path(__file__).parent
CANVAS_SIDE = 280  # pixels, the longer one
# One answer at a time is computed, for all visitors. Of a visitor's requests that wait, only the last is kept. Gradio
# hands on whatever is sent, because its own checks would end in a traceback, and those of `Answers` in a sentence.
QUEUED: dict[str, Any] = {
    "concurrency_id": "model",
    "trigger_mode": "always_last",
    "api_visibility": "private",
    "preprocess": False,
}
LIVE: dict[str, Any] = {"show_progress": "hidden", **QUEUED}
ON_CLICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-code]");
  if (button) trigger("click", { code: Number(button.dataset.code) });
});"""


def build_page(answers: Answers) -> gr.Blocks:
    """The page of a model."""
    pair = answers.pair
    info, num_codes, (rows, columns) = pair.info, pair.prior.num_codes, pair.prior.map_shape
    with gr.Blocks(title="VQ-VAE + PixelCNN", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Pictures as codes, and codes drawn by a network\n"
            f"**Stage one** turns a picture into a map of {rows}x{columns} codes, each one of {num_codes}, and back. "
            f"**Stage two** has learned which codes go together: it tells how likely a map is, completes one, and "
            f"draws new ones."
        )
        with gr.Tab("Draw"):
            gr.Markdown(
                f"{_to_do(pair)}, or look at what the model drew first. The decoder sees nothing but the codes, so "
                f"what it draws again shows what they keep. The stranger a picture is to stage two, the more bits."
            )
            with gr.Row():
                with gr.Column(scale=3, min_width=240):
                    picture = _canvas(pair)
                with gr.Column(scale=9, min_width=300):
                    analysis = gr.HTML(answers.picture(picture.value))
            picture.input(answers.picture, picture, analysis, **LIVE)
        with gr.Tab("Complete") as tab:
            gr.Markdown(
                f"The first rows of your picture's codes are kept, and stage two draws the others, {NUM_COMPLETIONS} "
                f"times: a label first, shown below, then each code from those before it. It never sees the rest."
            )
            with gr.Row():
                num_rows = gr.Slider(0, rows, rows // 2, step=1, label="Rows of codes to keep", scale=3)
                seed = _seed(f"{NUM_COMPLETIONS} others")
            completions = gr.HTML()
            changes: list[Any] = [tab.select, num_rows.change, seed.change]
            gr.on(changes, answers.completions, [picture, num_rows, seed], completions, **LIVE)
        with gr.Tab("Sample") as tab:
            gr.Markdown(
                "Twice the same decoder. First, stage two draws each code given those before it, and pictures come "
                "out. Then noise picks the codes: each is a piece of a picture, but nothing makes them fit together."
            )
            has_classes, guidance = bool(info.class_names), GUIDANCE if info.class_names else 1
            with gr.Row():
                options: list[Any] = [
                    gr.Dropdown([ANY, *info.class_names], value=ANY, label="Label", visible=has_classes),
                    gr.Slider(0, 4, guidance, step=0.05, label="Guidance by the label", visible=has_classes),
                    gr.Slider(0.1, 2, 1, step=0.05, label="Temperature: below 1 safer, above 1 wilder"),
                ]
            with gr.Row():
                options.append(gr.Slider(1, num_codes, num_codes, step=1, label="Top-k: the k likeliest codes"))
                options.append(gr.Slider(0.05, 1, 1, step=0.05, label="Top-p: the likeliest of this mass"))
                options.append(_seed(f"{NUM_SAMPLES} others"))
            samples = gr.HTML()
            changes = [tab.select, *(option.change for option in options)]
            gr.on(changes, answers.samples, options, samples, **LIVE)
        with gr.Tab("Codebook") as tab:
            gr.Markdown(
                "Every code as the decoder draws it, on average, with a cell's width around it, brightened. The most "
                "used come first: of drawings they are background, nearer or farther from a stroke. Click one to see "
                "where it is used: the same piece, in different pictures."
            )
            codes, places = gr.HTML(js_on_load=ON_CLICK), gr.HTML()

            def places_of(event: gr.EventData) -> str:
                return answers.places(getattr(event, "code", None))

            tab.select(answers.codes, None, codes, **QUEUED)
            codes.click(places_of, None, places, **LIVE)
        gr.Markdown(f"The model: {pair.origin}. It has learned {info.name}.", elem_classes="model")
    return page.queue(max_size=100, default_concurrency_limit=1, api_open=False)  # or requests could pass the queue by


def _to_do(pair: Pair) -> str:
    if pair.vqvae.image_shape[0] > 1:
        return "Upload a picture"
    return "Draw a digit" if pair.info.name == "mnist" else "Draw a picture"


def _canvas(pair: Pair) -> gr.HTML:
    """Where a picture is drawn or uploaded. At first it shows one that the model drew."""
    channels, height, width = pair.vqvae.image_shape
    longest = max(height, width)
    drawable = channels == 1  # a pen has no colours
    buttons = '<button class="choose">Upload</button>'
    if drawable:
        buttons = f'<button class="clear">Clear</button>{buttons}'
    return gr.HTML(
        to_url(pair.sample(1, seed=0)[0]),
        html_template=(
            f'<canvas width="{CANVAS_SIDE * width // longest}" height="{CANVAS_SIDE * height // longest}"></canvas>'
            f'<div class="buttons">{buttons}</div><input type="file" accept="image/*" hidden><p></p>'
        ),
        js_on_load=(HERE / "canvas.js").read_text(encoding="utf-8"),
        elem_classes="canvas",
        drawable=drawable,
        most=MOST_BYTES,
    )


def _seed(words: str) -> gr.Number:
    """A seed, above a button that goes on to the next one."""
    with gr.Column(min_width=160):
        seed = gr.Number(0, precision=0, minimum=0, label="Seed: the same one, the same pictures")
        gr.Button(words).click(None, seed, seed, js="(seed) => seed + 1", api_visibility="private")
    return seed
