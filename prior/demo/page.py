"""The page: what it says, what can be done on it, and which function answers (Gradio)."""

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr

from prior.completions import complete
from prior.demo.analysis import analyse, bits_at_random
from prior.demo.codebook import NUM_IMAGES, Codebook, colours, count_codes, find_places
from prior.demo.drawing import MOST_BYTES, read_url, to_url
from prior.demo.html import refuse, show_analysis, show_codebook, show_completions, show_places, show_samples
from prior.pair import Pair
from prior.sampling import GUIDANCE
from vqvae.data.dataset import Dataset
from vqvae.errors import InputError
from vqvae.gaussian import draw_gaussian

HERE = Path(__file__).parent
CANVAS_SIDE = 280  # pixels, the longer one
NUM_COMPLETIONS, NUM_SAMPLES = 6, 25
# One answer at a time computes, for all visitors. Of a visitor's requests that wait, only the last is kept.
ANSWER: dict[str, Any] = {"concurrency_id": "model", "trigger_mode": "always_last", "api_visibility": "private"}
ANY = "(any)"
ON_CLICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-code]");
  if (button) trigger("click", { code: Number(button.dataset.code) });
});"""


def build_page(pair: Pair, load_data: Callable[[], Dataset]) -> gr.Blocks:
    """The page of a model.

    Args:
        load_data: gives the images that the model has learned, or raises InputError. It is called when the codes are
            first looked at.
    """
    info, config, (rows, columns) = pair.info, pair.vqvae.config, pair.vqvae.map_shape
    of_codes = colours(pair.vqvae.quantizer.codebook.detach())
    scale = {"codes at random": bits_at_random(pair)}
    if "bits_per_image" in pair.prior_header.metrics:
        scale = {"mean of real ones": pair.prior_header.metrics["bits_per_image"], **scale}

    @answered
    def on_picture(url: str) -> str:
        return show_analysis(analyse(pair, read_url(url, info.image_shape)), of_codes, scale)

    @answered
    def on_completion(url: str, num_rows: int, seed: int) -> str:
        images = read_url(url, info.image_shape)[None]
        return show_completions(complete(pair, images, num_rows, NUM_COMPLETIONS, seed=seed), info.class_names)

    @answered
    def on_sample(label: str, temperature: float, top_k: int, top_p: float, guidance: float | None, seed: int) -> str:
        labels = None if label == ANY else [label]
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        samples = pair.draw(NUM_SAMPLES, labels=labels, seed=seed, **options)
        gaussian = draw_gaussian(pair.vqvae, "latent", NUM_SAMPLES, seed)
        return show_samples(samples, gaussian, of_codes, info.class_names)

    @cache
    def codebook() -> tuple[Codebook, str]:
        try:
            images = load_data().train.images[:NUM_IMAGES]
        except InputError:
            said = "The training images are not in the data folder, so pictures that the prior draws stand for them."
            return count_codes(pair), said
        return count_codes(pair, images), f"They are counted in {len(images)} training images."

    @answered
    def on_codes() -> str:
        counted, said = codebook()
        return f"<p>{len(counted.codes)} of {config.num_codes} codes. {said}</p>{show_codebook(counted)}"

    @answered
    def on_code(event: gr.EventData) -> str:
        counted, _ = codebook()
        code = event.code
        if code not in counted.codes.tolist():
            raise InputError(f"expected a code that is shown, found {code!r:.20}; choose one by a click")
        use = float(counted.uses[counted.codes == code])
        return show_places(find_places(counted, code), code, use, pair.vqvae.map_shape)

    with gr.Blocks(title="VQ-VAE + PixelCNN", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Pictures as codes, and codes drawn by a network\n"
            f"**Stage one** turns a picture into a map of {rows}x{columns} codes, each one of {config.num_codes}, and "
            f"back. **Stage two** has learned which codes go together: it tells how likely a map is, completes one, "
            f"and draws new ones."
        )
        with gr.Tab("Draw"):
            what = (
                "Draw a digit" if info.name == "mnist" else "Draw" if info.image_shape[0] == 1 else "Choose a picture"
            )
            gr.Markdown(
                f"{what}, or look at what the model drew first. The decoder sees nothing but the codes, so what it "
                f"draws again shows what they keep. Scribble, and the bits go up: stage two has not learned such codes."
            )
            with gr.Row():
                with gr.Column(scale=3, min_width=240):
                    picture = _canvas(pair)
                with gr.Column(scale=9, min_width=300):
                    analysis = gr.HTML(on_picture(picture.value))
            picture.input(on_picture, picture, analysis, show_progress="hidden", **ANSWER)
        with gr.Tab("Complete") as completing:
            gr.Markdown(
                "The first rows of your picture's codes are kept, and stage two draws the others, six times: each code "
                "from those before it, row by row. It never sees the rest of your picture."
            )
            with gr.Row():
                num_rows = gr.Slider(0, rows, rows // 2, step=1, label="Rows of codes to keep", scale=3)
                seed, another = _seed("Six others")
            completions = gr.HTML()
            gr.on(
                [completing.select, num_rows.change, seed.change],
                *(on_completion, [picture, num_rows, seed], completions),
                show_progress="hidden",
                **ANSWER,
            )
            another.click(None, seed, seed, js="(seed) => seed + 1", api_visibility="private")
        with gr.Tab("Sample") as sampling:
            gr.Markdown(
                "Twice the same decoder. First, stage two draws each code given those before it, and pictures come "
                "out. Then noise picks the codes: each is a piece of a picture, but nothing makes them fit together."
            )
            with gr.Row():
                label = gr.Dropdown([ANY, *info.class_names], value=ANY, label="Label", visible=bool(info.class_names))
                guidance = gr.Slider(
                    *(0, 4, GUIDANCE if info.class_names else 1),
                    step=0.25,
                    label="Guidance: how strongly to follow the label",
                    visible=bool(info.class_names),
                )
                temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature: below 1 safer, above 1 wilder")
            with gr.Row():
                top_k = gr.Slider(1, config.num_codes, config.num_codes, step=1, label="Top-k: the k likeliest codes")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p: the likeliest codes of this mass")
                seed, another = _seed("Draw others")
            samples = gr.HTML()
            options: list[Any] = [label, temperature, top_k, top_p, guidance, seed]
            gr.on(
                [sampling.select, *(option.change for option in options)],
                *(on_sample, options, samples),
                show_progress="hidden",
                **ANSWER,
            )
            another.click(None, seed, seed, js="(seed) => seed + 1", api_visibility="private")
        with gr.Tab("Codebook") as looking:
            gr.Markdown(
                "Every code as the decoder draws it, on average, with a cell's width around it, brightened. The most "
                "used come first: they are background, nearer or farther from a stroke. Click one to see where it is "
                "used: the same piece, in different pictures."
            )
            codes = gr.HTML(js_on_load=ON_CLICK)
            places = gr.HTML()
            looking.select(on_codes, None, codes, **ANSWER)
            codes.click(on_code, None, places, show_progress="hidden", **ANSWER)
        gr.Markdown(f"The model: {pair.origin}. It has learned {info.name}.", elem_classes="model")
    return page.queue(max_size=100, default_concurrency_limit=1)


def answered(function: Callable[..., str]) -> Callable[..., str]:
    """The function, with a sentence for its visitor in place of an `InputError`."""

    @wraps(function)
    def answer(*arguments: Any) -> str:
        try:
            return function(*arguments)
        except InputError as error:
            return refuse(str(error))

    return answer


def _canvas(pair: Pair) -> gr.HTML:
    """Where a picture is drawn or chosen. At first it shows one that the model drew."""
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


def _seed(words: str) -> tuple[gr.Number, gr.Button]:
    """A seed, and the button that goes on to the next one."""
    with gr.Column(min_width=160):
        return gr.Number(0, precision=0, minimum=0, label="Seed: the same one, the same pictures"), gr.Button(words)
