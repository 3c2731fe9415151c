"""The command line: parse, resolve the settings, call one function, say what was written.

torch is imported by the commands that need it, so that --help answers at once.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqvae.common.errors import Interrupted, UserError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A VQ-VAE turns digits into 7x7 maps of codes and back; a gated PixelCNN learns to draw such maps.",
)

RECIPES = Path(__file__).parent / "configs"
DEFAULT_DATA_FOLDER = Path("data")

Config = Annotated[Path, typer.Option(help="TOML recipe; flags override it, it overrides the defaults.")]
DataFolder = Annotated[Path, typer.Option(help="Where MNIST is, or is to be put.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")]
NoDownload = Annotated[bool, typer.Option("--no-download", help="Use the data that is there, or stop.")]
VQVAEFile = Annotated[
    Path | None, typer.Option("--vqvae", help="VQ-VAE weights [default: your newest, or the shipped]")
]
ClassifierFile = Annotated[
    Path | None, typer.Option("--classifier", help="Classifier weights [default: your newest, or the shipped]")
]
PriorFile = Annotated[Path | None, typer.Option("--prior", help="Prior weights [default: your newest, or the shipped]")]
Guidance = Annotated[
    float | None,
    typer.Option(help="How far labels are heeded; 1 is the prior itself [default: 1.5 with labels]"),
]
BatchSize = Annotated[int | None, typer.Option(help="Samples a step [default: the recipe's]")]
NumEpochs = Annotated[int | None, typer.Option(help="Passes over the data [default: the recipe's]")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate [default: the recipe's]")]


@app.command()
def train_vqvae(
    output_folder: Annotated[
        Path | None, typer.Option(help="Gets the weights and the logs [default: checkpoints/<recipe>]")
    ] = None,
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    hidden_size: Annotated[int | None, typer.Option(help="Size of the latent vectors [default: the recipe's]")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Number of codes [default: the recipe's]")] = None,
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    beta: Annotated[
        float | None, typer.Option(help="Weight of the commitment term, 0.1 to 2.0 [default: the recipe's]")
    ] = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    no_download: NoDownload = False,
) -> None:
    """Stage one: train the VQ-VAE."""
    from vqvae.common.config import read_recipe, resolve
    from vqvae.common.engine import pick_device
    from vqvae.common.runs import claimed, weights_file
    from vqvae.model import VQVAEConfig
    from vqvae.train import VQVAETraining
    from vqvae.train import train_vqvae as train

    flags = {
        "hidden_size": hidden_size,
        "k": k,
        "batch_size": batch_size,
        "num_epochs": num_epochs,
        "lr": lr,
        "beta": beta,
    }
    model_config, training = resolve((VQVAEConfig, VQVAETraining), read_recipe(config, "vqvae"), flags, config)
    folder = output_folder or _folder_named_after(config)
    chosen_device = pick_device(device)
    with claimed(folder, "vqvae", resume, overwrite):
        figures = train(
            model_config,
            training,
            seed=seed,
            data_folder=data_folder,
            output_folder=folder,
            device=chosen_device,
            resume=resume,
            download=not no_download,
        )
    print(
        f"test: squared error {figures['squared_error']:.5f}, PSNR {figures['psnr_db']:.2f} dB, "
        f"{figures['codes_used']:.0f} of {model_config.k} codes used, perplexity {figures['perplexity']:.0f}"
    )
    written = weights_file(folder, "vqvae")
    following = ["train-prior", "--vqvae", written, "--config", _relative(config)]
    _print_written(written, following + _data_flag(data_folder))


@app.command()
def train_prior(
    vqvae: VQVAEFile = None,
    output_folder: Annotated[
        Path | None,
        typer.Option(help="Gets the weights and the logs [default: the VQ-VAE's folder, if it is yours]"),
    ] = None,
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    no_download: NoDownload = False,
) -> None:
    """Stage two: train the prior on a VQ-VAE's code maps."""
    from prior.model import PriorConfig
    from prior.train import PriorTraining
    from prior.train import train_prior as train
    from vqvae.common.config import read_recipe, resolve
    from vqvae.common.engine import pick_device
    from vqvae.common.runs import SHIPPED, claimed, describe, find_vqvae, weights_file

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    model_config, training = resolve((PriorConfig, PriorTraining), read_recipe(config, "prior"), flags, config)
    chosen_device = pick_device(device)
    vqvae_file = find_vqvae(vqvae)
    shipped = vqvae_file.resolve().parent == SHIPPED.resolve()
    folder = output_folder or (_folder_named_after(config) if shipped else vqvae_file.parent)
    print(f"VQ-VAE: {describe(vqvae_file)}")
    with claimed(folder, "prior", resume, overwrite):
        figures = train(
            model_config,
            training,
            vqvae_path=vqvae_file,
            seed=seed,
            data_folder=data_folder,
            output_folder=folder,
            device=chosen_device,
            resume=resume,
            download=not no_download,
        )
    print(
        f"test: {figures['nats_per_code']:.3f} nats per code ({figures['bits_per_image']:.1f} bits an image), "
        f"{figures['nats_per_code'] / figures['unigram']:.3f} of the per-position unigram's {figures['unigram']:.3f}; "
        f"uniform {figures['uniform']:.3f}"
    )
    written = weights_file(folder, "prior")
    following = ["sample", "--mode", "pixelcnn", "--vqvae", vqvae_file, "--prior", written, "--labels", "0-9"]
    following += ["--output", "samples.png"]
    _print_written(written, following)


@app.command()
def train_classifier(
    output_folder: Annotated[Path, typer.Option(help="Gets the weights and the logs.")] = Path(
        "checkpoints/classifier"
    ),
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Samples a step [default: 128]")] = None,
    num_epochs: Annotated[int | None, typer.Option(help="Passes over the data [default: 12]")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate [default: 4e-3]")] = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    no_download: NoDownload = False,
) -> None:
    """Train the digit classifier whose features `evaluate` measures with."""
    from vqvae.common.classifier import ClassifierConfig, ClassifierTraining
    from vqvae.common.classifier import train_classifier as train
    from vqvae.common.config import resolve
    from vqvae.common.engine import pick_device
    from vqvae.common.runs import claimed, weights_file

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    model_config, training = resolve((ClassifierConfig, ClassifierTraining), {}, flags)
    chosen_device = pick_device(device)
    with claimed(output_folder, "classifier", resume, overwrite):
        figures = train(
            model_config,
            training,
            seed=seed,
            data_folder=data_folder,
            output_folder=output_folder,
            device=chosen_device,
            resume=resume,
            download=not no_download,
        )
    print(f"test: {1 - figures['error']:.2%} right, cross-entropy {figures['cross_entropy']:.4f}")
    written = weights_file(output_folder, "classifier")
    _print_written(written, ["evaluate", "--classifier", written, *_data_flag(data_folder)])


@app.command()
def sample(
    mode: Annotated[
        str,
        typer.Option(help="gaussian: codes picked by unit-Gaussian noise. pixelcnn: codes drawn from the prior."),
    ],
    gaussian_input: Annotated[
        str | None,
        typer.Option(
            help="gaussian only. latent: z ~ N(0, 1) through the quantiser and the decoder (the default). "
            "image: x ~ N(0, 1) through the whole model, as the documented grids were made."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="How many images.")] = 100,
    label: Annotated[int | None, typer.Option(help="pixelcnn only: draw this digit.")] = None,
    labels: Annotated[str | None, typer.Option(help="pixelcnn only: draw these in turn, as 0-9 or 1,3,5.")] = None,
    guidance: Guidance = None,
    temperature: Annotated[float | None, typer.Option(help="pixelcnn only: below 1 safer, above 1 wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="pixelcnn only: draw among the k likeliest codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="pixelcnn only: draw among the likeliest codes of this mass.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help=".png for a grid, .npz for arrays [default: <mode>.png]")] = None,
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
) -> None:
    """Draw new images, as a 10x10 grid or as arrays."""
    import torch

    from vqvae.common.engine import pick_device
    from vqvae.common.runs import describe, find_pair, find_vqvae
    from vqvae.model import load_vqvae
    from vqvae.train import decode

    _require_choice("--mode", mode, ("gaussian", "pixelcnn"))
    output = output or Path(f"{mode}.png")
    _require_suffix(output)
    pixelcnn_only = {
        "--label": label,
        "--labels": labels,
        "--guidance": guidance,
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
        "--prior": prior,
    }
    not_for_mode = {"--gaussian-input": gaussian_input} if mode == "pixelcnn" else pixelcnn_only
    for flag, value in not_for_mode.items():
        if value is not None:
            raise UserError(f"expected no {flag} with --mode {mode}, found {value}; leave it out or change the mode")
    if num_samples < 1:
        raise UserError(f"expected --num-samples of at least 1, found {num_samples}; type --num-samples 100")
    chosen_device = pick_device(device)
    generator = torch.Generator().manual_seed(seed)
    drawn_labels = None
    if mode == "gaussian":
        from vqvae.gaussian import gaussian_images, gaussian_latents

        gaussian_input = gaussian_input or "latent"
        _require_choice("--gaussian-input", gaussian_input, ("latent", "image"))
        vqvae_file = find_vqvae(vqvae)
        model, _ = load_vqvae(vqvae_file, chosen_device)
        draw = {"latent": gaussian_latents, "image": gaussian_images}[gaussian_input]
        with torch.inference_mode():
            indices = draw(model, num_samples, generator)
        print(f"weights: {describe(vqvae_file)}")
    else:
        from prior.model import load_prior
        from prior.sampling import GUIDANCE
        from prior.sampling import sample as draw_maps

        if label is not None and labels is not None:
            raise UserError("expected --label or --labels, found both; type one of them")
        if label is not None:
            labels = str(label)
        scale = guidance if guidance is not None else GUIDANCE if labels is not None else 1.0
        if labels is not None:
            cycle = _parse_labels(labels)
            drawn_labels = torch.tensor([cycle[i % len(cycle)] for i in range(num_samples)])
        vqvae_file, prior_file = find_pair(vqvae, prior)
        model, header = load_vqvae(vqvae_file, chosen_device)
        network, _ = load_prior(prior_file, model, header, chosen_device)
        print(f"weights: {describe(vqvae_file)} and {describe(prior_file)}")
        with _progress(num_samples) as bar:
            indices = draw_maps(
                network,
                num_samples,
                generator,
                labels=drawn_labels,
                guidance=scale,
                temperature=1.0 if temperature is None else temperature,
                top_k=top_k,
                top_p=1.0 if top_p is None else top_p,
                progress=bar.update,
            )
    images = decode(model, indices.to(chosen_device))
    _write(output, images, {"images": images, "indices": indices, "labels": drawn_labels})


@app.command()
def reconstruct(
    num_images: Annotated[int, typer.Option(help="How many test images, from the first on.")] = 100,
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    output: Annotated[
        Path, typer.Option(help=".png for two grids (this one and <name>-original.png), .npz for arrays.")
    ] = Path("reconstruct.png"),
    vqvae: VQVAEFile = None,
    no_download: NoDownload = False,
) -> None:
    """Pass test images through stage one and back."""
    from vqvae.common.data import load_test, to_model_range, to_unit_range
    from vqvae.common.engine import pick_device
    from vqvae.common.runs import describe, find_vqvae
    from vqvae.model import load_vqvae
    from vqvae.train import reconstruct as through_the_model

    _require_suffix(output)
    chosen_device = pick_device(device)
    vqvae_file = find_vqvae(vqvae)
    model, _ = load_vqvae(vqvae_file, chosen_device)
    print(f"weights: {describe(vqvae_file)}")
    test = load_test(data_folder, not no_download)
    if not 1 <= num_images <= len(test.labels):
        raise UserError(
            f"expected --num-images between 1 and {len(test.labels)}, found {num_images}; type --num-images 100"
        )
    chosen = test.images[:num_images].to(chosen_device)
    indices, reconstructions = through_the_model(model, chosen)
    originals = to_unit_range(to_model_range(chosen)).cpu()
    arrays = {
        "images": originals,
        "reconstructions": reconstructions,
        "indices": indices.cpu(),
        "labels": test.labels[:num_images],
    }
    if output.suffix == ".png":
        _write(output.with_name(f"{output.stem}-original.png"), originals, {})
    _write(output, reconstructions, arrays)


@app.command()
def compare(
    num_samples: Annotated[int, typer.Option(help="Images of each mode, a multiple of 10.")] = 30,
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help=".png for the picture, .npz for its arrays.")] = Path("compare.png"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    no_download: NoDownload = False,
) -> None:
    """Real digits, reconstructions, both Gaussian baselines and the prior's samples, side by side."""
    import torch

    from prior.compare import compare as side_by_side
    from prior.model import load_prior
    from vqvae.common.data import load_test, load_train_and_validation
    from vqvae.common.engine import pick_device
    from vqvae.common.grids import save_sheet
    from vqvae.common.runs import describe, find_pair
    from vqvae.model import load_vqvae

    _require_suffix(output)
    if num_samples < 10 or num_samples % 10 != 0:
        raise UserError(f"expected --num-samples to be a multiple of 10, found {num_samples}; type --num-samples 30")
    chosen_device = pick_device(device)
    vqvae_file, prior_file = find_pair(vqvae, prior)
    model, header = load_vqvae(vqvae_file, chosen_device)
    network, _ = load_prior(prior_file, model, header, chosen_device)
    print(f"weights: {describe(vqvae_file)} and {describe(prior_file)}")
    _, validation = load_train_and_validation(data_folder, not no_download)
    modes = side_by_side(model, network, load_test(data_folder, not no_download), validation, num_samples, seed)
    print(f"{'':54} {'codes used':>10} {'nats/code':>10} {'distance':>9}")
    for mode in modes:
        print(f"{mode.title:54} {mode.codes_used:10} {mode.nats_per_code:10.2f} {mode.distance:9.3f}")
    print("nats/code: of the maps under the prior; distance: to the nearest validation digit, rms over pixels in 0..1")
    if output.suffix == ".png":
        save_sheet([(mode.title, mode.images) for mode in modes], output)
        print(f"wrote {output}")
        return
    arrays = {name: torch.cat([getattr(mode, name) for mode in modes]) for name in ("images", "indices", "labels")}
    names = [mode.name for mode in modes for _ in mode.labels]
    _write_arrays(output, {**arrays, "modes": names})


@app.command()
def evaluate(
    num_samples: Annotated[
        int | None, typer.Option(help="Images in each set [default: as many as the split has digits]")
    ] = None,
    split: Annotated[str, typer.Option(help="test for figures to report, validation for choices.")] = "test",
    guidance: Guidance = None,
    cas: Annotated[
        bool, typer.Option("--cas", help="Also the classification accuracy score: trains two classifiers.")
    ] = False,
    data_folder: DataFolder = DEFAULT_DATA_FOLDER,
    device: Device = "auto",
    seed: Seed = 0,
    output_folder: Annotated[
        Path, typer.Option(help="Gets report.html, metrics.json, the tables and the pictures.")
    ] = Path("evaluation"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    classifier: ClassifierFile = None,
    no_download: NoDownload = False,
) -> None:
    """Measure both stages: FID, KID, coverage, agreement with labels, memorisation, likelihood."""
    from prior.evaluate import classification_accuracy_score
    from prior.evaluate import evaluate as measure
    from prior.model import load_prior
    from prior.report import as_text, tabulate, write_report
    from prior.sampling import GUIDANCE
    from vqvae.common.classifier import load_classifier
    from vqvae.common.data import load_test, load_train_and_validation
    from vqvae.common.engine import pick_device
    from vqvae.common.files import make_folder
    from vqvae.common.runs import describe, find_classifier, find_pair
    from vqvae.model import load_vqvae

    _require_choice("--split", split, ("test", "validation"))
    make_folder(output_folder)  # before the measuring, which takes minutes
    chosen_device = pick_device(device)
    vqvae_file, prior_file = find_pair(vqvae, prior)
    classifier_file = find_classifier(classifier)
    model, header = load_vqvae(vqvae_file, chosen_device)
    network, prior_header = load_prior(prior_file, model, header, chosen_device)
    eyes, eyes_header = load_classifier(classifier_file, chosen_device)
    print(f"weights: {describe(vqvae_file)}, {describe(prior_file)} and {describe(classifier_file)}")
    train_digits, validation_digits = load_train_and_validation(data_folder, not no_download)
    splits = {"train": train_digits, "validation": validation_digits}
    if split == "test":
        splits["test"] = load_test(data_folder, not no_download)
    scale = GUIDANCE if guidance is None else guidance
    num_samples = len(splits[split].labels) if num_samples is None else num_samples
    evaluation = measure(model, network, eyes, splits, num_samples=num_samples, seed=seed, guidance=scale)
    if cas:
        scores = classification_accuracy_score(evaluation.judged, train_digits, splits[split], seed, chosen_device)
        evaluation.figures["classification_accuracy_score"] = scores
    origin = {
        "split": split,
        "num_samples": num_samples,
        "seed": seed,
        "guidance": scale,
        "vqvae": header.fingerprint,
        "prior": prior_header.fingerprint,
        "classifier": eyes_header.fingerprint,
    }
    for title, rows in tabulate(evaluation.figures):
        print(f"\n{title} (classifier {eyes_header.fingerprint[:12]})\n{as_text(rows)}")
    write_report(evaluation, origin, output_folder)
    print(f"\nwrote {output_folder / 'report.html'}, and beside it metrics.json, the tables and the pictures")


def _write(output: Path, images: "torch.Tensor", arrays: Mapping[str, Any]) -> None:
    """A grid of the images as .png, or the arrays that there are as .npz."""
    if output.suffix == ".npz":
        _write_arrays(output, arrays)
        return
    from vqvae.common.grids import save_grid

    save_grid(images, output)
    print(f"wrote {output}")


def _write_arrays(output: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    from vqvae.common.files import write_arrays

    write_arrays(output, {name: np.asarray(values) for name, values in arrays.items() if values is not None})
    print(f"wrote {output}")


def _folder_named_after(recipe: Path) -> Path:
    if recipe.stem in (".", ".."):
        raise UserError(f"expected a recipe's name to name a folder, found {recipe}; type --output-folder too")
    return Path("checkpoints") / recipe.stem


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _data_flag(folder: Path) -> list[Any]:
    return [] if folder == DEFAULT_DATA_FOLDER else ["--data-folder", folder]


def _print_written(written: Path, following: list[Any]) -> None:
    """What was written, and the command to type next, quoted for a shell."""
    print(f"wrote {written}; next: python cli.py {shlex.join(map(str, following))}")


def _progress(num_samples: int) -> Any:
    from tqdm import tqdm

    from vqvae.common.distributed import is_main

    return tqdm(total=num_samples, unit="map", dynamic_ncols=True, disable=not is_main())


def _require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"expected {flag} to be {' or '.join(choices)}, found {value!r}; type {flag} {choices[0]}")


def _require_suffix(output: Path) -> None:
    if output.suffix not in (".png", ".npz"):
        raise UserError(
            f"expected --output to end in .png (a grid) or .npz (arrays), found {output}; "
            f"type --output {output.stem}.png"
        )


def _parse_labels(text: str) -> list[int]:
    """'0-9' or '1,3,5' or both, as digits."""
    labels: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch("[0-9](-[0-9])?", part) or first > (last or first):
            raise UserError(f"expected digits such as 7, 0-9 or 1,3,5, found {text!r}; type --labels 0-9")
        labels.extend(range(int(first), int(last or first) + 1))
    return labels


def main() -> None:
    """Run the app; a user's mistake ends in one sentence and status 1, a signal in the status that is usual for it."""
    try:
        with _joined():
            app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as interrupted:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
        again = f"go on with: python cli.py {shlex.join([*arguments, '--resume'])}"
        print(
            f"stopped by a signal after step {interrupted.step}; "
            + (f"all of it is saved; {again}" if arguments[0].startswith("train-") else "nothing was written"),
            file=sys.stderr,
        )
        raise SystemExit(128 + interrupted.signal) from None


def _joined() -> AbstractContextManager[None]:
    """The world of torchrun's processes, where it started this one; of those but the main one nothing is printed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return nullcontext()
    from vqvae.common.distributed import joined

    return joined()


if __name__ == "__main__":
    main()
