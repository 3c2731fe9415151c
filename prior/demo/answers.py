"""What the page answers, as HTML. Every answer follows from what is sent alone: nothing is kept for a visitor."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

from prior.completions import complete
from prior.demo.analysis import analyse, bits_at_random
from prior.demo.codebook import NUM_IMAGES, Codebook, collect_codes, colours, find_places
from prior.demo.drawing import read_url
from prior.demo.html import refuse, show_analysis, show_codebook, show_completions, show_places, show_samples
from prior.pair import Pair
from vqvae.data.dataset import Dataset
from vqvae.errors import InputError
from vqvae.gaussian import draw_gaussian

ANY = "(any)"  # label
NUM_COMPLETIONS, NUM_SAMPLES = 6, 25


def answered(answer: Callable[..., str]) -> Callable[..., str]:
    """The same answer, with a sentence in place of an `InputError`."""

    @wraps(answer)
    def told(*arguments: Any) -> str:
        try:
            return answer(*arguments)
        except InputError as error:
            return refuse(str(error))

    return told


class Answers:
    """The answers about a model.

    Args:
        load_data: gives the images that the model has learned, or raises InputError. It is called when the codes are
            first looked at.
    """

    def __init__(self, pair: Pair, load_data: Callable[[], Dataset]) -> None:
        self.pair, self.load_data = pair, load_data
        self.colours = colours(pair.vqvae.quantizer.codebook.detach())
        self.scale = {"codes at random": bits_at_random(pair)}
        # Of the validation split, with labels told, which save a few bits.
        if "bits_per_image" in pair.prior_header.metrics:
            self.scale = {"mean of real ones": pair.prior_header.metrics["bits_per_image"], **self.scale}

    @answered
    def picture(self, url: str) -> str:
        """What the model says of a picture."""
        analysis = analyse(self.pair, read_url(url, self.pair.vqvae.image_shape))
        return show_analysis(analysis, self.colours, self.scale)

    @answered
    def completions(self, url: str, num_rows: int, seed: int) -> str:
        """A picture of which some rows of codes are kept, and the others are drawn."""
        images = read_url(url, self.pair.vqvae.image_shape)[None]
        completed = complete(self.pair, images, num_rows, NUM_COMPLETIONS, seed=seed)
        return show_completions(completed, self.pair.info.class_names)

    @answered
    def samples(self, label: str, guidance: float, temperature: float, top_k: int, top_p: float, seed: int) -> str:
        """Samples of the prior beside those of Gaussian noise. The label is the name of a class, or `ANY`."""
        options: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        labels = None if label == ANY else [label]
        samples = self.pair.draw(NUM_SAMPLES, labels=labels, seed=seed, **options)
        gaussian = draw_gaussian(self.pair.vqvae, "latent", NUM_SAMPLES, seed)
        return show_samples(samples, gaussian, self.colours, self.pair.info.class_names)

    @answered
    def codes(self) -> str:
        """The codebook, and what its codes were counted in."""
        codebook, counted_in = self._counted
        num_codes = self.pair.vqvae.config.num_codes
        return f"<p>{len(codebook.codes)} of {num_codes} codes, counted in {counted_in}.</p>{show_codebook(codebook)}"

    @answered
    def places(self, code: object) -> str:
        """Where a code is used."""
        codebook, _ = self._counted
        if not isinstance(code, int) or code not in codebook.codes.tolist():
            raise InputError(f"expected a code that is shown, found {code!r:.20}; click one")
        use = float(codebook.uses[codebook.codes == code])
        return show_places(find_places(codebook, code), code, use, self.pair.vqvae.map_shape)

    @cached_property
    def _counted(self) -> tuple[Codebook, str]:
        """The codebook, and what it was counted in, in words."""
        try:
            images = self.load_data().train.images[:NUM_IMAGES]
        except InputError:
            drawn = "pictures that the prior draws, because the training images are not in the data folder"
            return collect_codes(self.pair), drawn
        return collect_codes(self.pair, images), f"{len(images)} training images"
