"""The command line: flags in, one call of the library, a report of what was written.

Every command imports what it needs itself, so that --help answers at once.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from vqvae.errors import InputError, Interrupted
from vqvae.storage.shipped import RECIPES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A VQ-VAE turns images into small maps of codes and back; a gated PixelCNN learns to draw such maps.",
)

DATA = Path("data")

Config = Annotated[Path, Option(help="TOML recipe; flags override it, it overrides the defaults.")]
RunFolder = Annotated[Path | None, Option(help="For weights and logs [default: the VQ-VAE's or checkpoints/<recipe>]")]
DataFolder = Annotated[Path, Option(help="Where MNIST is, or is to be put.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option(help="auto: CUDA where there is a device.")]
Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="The same seed gives the same result.")]
Resume = Annotated[bool, Option("--resume", help="Go on with the run in the output folder.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the run in the output folder.")]
Download = Annotated[bool, Option(" /--no-download", show_default=False, help="Stop if data is missing.")]
CodeDim = Annotated[int | None, Option("--hidden-size", help="Size of the latent vectors [default: the recipe's]")]
NumCodes = Annotated[int | None, Option("--k", help="Number of codes [default: the recipe's]")]
Beta = Annotated[float | None, Option(help="Weight of the commitment term, 0.1 to 2.0 [default: the recipe's]")]
BatchSize = Annotated[int | None, Option(min=1, help="Samples a step [default: the recipe's]")]
NumEpochs = Annotated[int | None, Option(min=1, help="Passes over the data [default: the recipe's]")]
LearningRate = Annotated[float | None, Option("--lr", help="Learning rate [default: the recipe's]")]
VQVAEFile = Annotated[Path | None, Option("--vqvae", help="VQ-VAE weights [default: your newest, or the shipped]")]
PriorFile = Annotated[Path | None, Option("--prior", help="Prior weights [default: your newest, or the shipped]")]
ClassifierFile = Annotated[
    Path | None, Option("--classifier", help="Classifier weights [default: your newest, or the shipped]")
]
Mode = Annotated[
    Literal["gaussian", "pixelcnn"], Option(help="Codes picked by unit-Gaussian noise, or drawn from the prior.")
]
GaussianInput = Annotated[
    Literal["latent", "image"] | None,
    Option(help="gaussian only: z ~ N(0, 1) quantised (the default), or x ~ N(0, 1) through the whole model."),
]
NumSamples = Annotated[int, Option(min=1, help="How many images.")]
Label = Annotated[int | None, Option(min=0, help="pixelcnn only: draw this class.")]
Labels = Annotated[str | None, Option(help="pixelcnn only: draw these in turn, as 0-9 or 1,3,5 [default: any class]")]
Guidance = Annotated[
    float | None, Option(min=0, max=100, help="How strongly labels are followed; 1: the prior itself.")
]
Temperature = Annotated[float | None, Option(help="pixelcnn only: below 1 safer, above 1 wilder.")]
TopK = Annotated[int | None, Option(min=1, help="pixelcnn only: draw among the k likeliest codes.")]
TopP = Annotated[float | None, Option(help="pixelcnn only: draw among the likeliest codes of this mass.")]
Output = Annotated[Path, Option(help=".png for a picture, .npz for arrays.")]
SplitName = Annotated[Literal["test", "validation"], Option(help="test to report figures, validation to choose by.")]
AccuracyScore = Annotated[bool, Option("--cas", help="Also the classification accuracy score, by two new classifiers.")]
ReportFolder = Annotated[Path, Option(help="Gets report.html, metrics.json, the tables and the pictures.")]


@app.command()
def train_vqvae(
    output_folder: RunFolder = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    code_dim: CodeDim = None,
    num_codes: NumCodes = None,
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    beta: Beta = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
) -> None:
    """Stage one: train the VQ-VAE."""
    from vqvae import VQVAEConfig, VQVAETraining
    from vqvae import train_vqvae as train
    from vqvae.storage.recipe import read_recipe, resolve
    from vqvae.storage.runs import folder_for, relative
    from vqvae.train import summarise

    flags = {"code_dim": code_dim, "num_codes": num_codes, "beta": beta}
    flags |= {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    settings = resolve((VQVAEConfig, VQVAETraining), read_recipe(config, "vqvae"), flags, config)
    folder = output_folder or folder_for(config)
    run: dict[str, Any] = {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite}
    figures = train(*settings, data_folder=data_folder, output_folder=folder, download=download, **run)
    print(f"test: {summarise(figures, settings[0].num_codes)}")
    written = folder / "vqvae.safetensors"
    _print_written(written, data_folder, "train-prior", "--vqvae", written, "--config", relative(config))


@app.command()
def train_prior(
    vqvae: VQVAEFile = None,
    output_folder: RunFolder = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
) -> None:
    """Stage two: train the prior on a VQ-VAE's code maps."""
    from prior import PriorConfig, PriorTraining
    from prior import train_prior as train
    from prior.train import summarise
    from vqvae.storage.recipe import read_recipe, resolve
    from vqvae.storage.runs import describe, find_vqvae, folder_for

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    settings = resolve((PriorConfig, PriorTraining), read_recipe(config, "prior"), flags, config)
    file = find_vqvae(vqvae)
    folder = output_folder or folder_for(config, file)
    print(f"VQ-VAE: {describe(file)}")
    run: dict[str, Any] = {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite}
    figures = train(*settings, vqvae_path=file, data_folder=data_folder, output_folder=folder, download=download, **run)
    print(f"test: {summarise(figures)}")
    written = folder / "prior.safetensors"
    pair = ("--vqvae", file, "--prior", written)
    _print_written(written, DATA, "sample", "--mode", "pixelcnn", *pair, "--output", "samples.png")


@app.command()
def train_classifier(
    output_folder: Annotated[Path, Option(help="Gets the weights and the logs.")] = Path("checkpoints/classifier"),
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    batch_size: Annotated[int | None, Option(min=1, help="Samples a step [default: 128]")] = None,
    num_epochs: Annotated[int | None, Option(min=1, help="Passes over the data [default: 12]")] = None,
    lr: Annotated[float | None, Option("--lr", help="Learning rate [default: 4e-3]")] = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
) -> None:
    """Train the classifier whose features `evaluate` measures with."""
    from prior.evaluation.classifier import ClassifierConfig
    from prior.evaluation.classifier_training import ClassifierTraining
    from prior.evaluation.classifier_training import train_classifier as train
    from vqvae.storage.recipe import resolve

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    settings = resolve((ClassifierConfig, ClassifierTraining), {}, flags)
    run: dict[str, Any] = {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite}
    figures = train(*settings, data_folder=data_folder, output_folder=output_folder, download=download, **run)
    print(f"test: {1 - figures['error']:.2%} right, cross-entropy {figures['cross_entropy']:.4f}")
    written = output_folder / "classifier.safetensors"
    _print_written(written, data_folder, "evaluate", "--classifier", written)


@app.command()
def sample(
    mode: Mode,
    gaussian_input: GaussianInput = None,
    num_samples: NumSamples = 100,
    label: Label = None,
    labels: Labels = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    device: Device = "auto",
    output: Annotated[Path | None, Option(help=".png for a grid, .npz for arrays [default: <mode>.png]")] = None,
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
) -> None:
    """Draw new images, as a grid or as arrays."""
    from vqvae.output import check_output, save_images

    output = check_output(output or Path(f"{mode}.png"))
    options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    not_for_mode: dict[str, Any] = {"gaussian_input": gaussian_input}
    if mode == "gaussian":
        not_for_mode = {"label": label, "labels": labels, **options, "prior": prior}
    for name, value in not_for_mode.items():
        if value is not None:
            raise InputError(f"expected no `{name}` with `mode={mode}`, found {value}; leave it out or change the mode")
    if label is not None and labels is not None:
        raise InputError("expected `label` or `labels`, found both; give one of them")
    if mode == "gaussian":
        from vqvae import load
        from vqvae.gaussian import draw_gaussian
        from vqvae.storage.runs import describe, find_vqvae

        file = find_vqvae(vqvae)
        model = load(file, device)
        print(f"weights: {describe(file)}")
        arrays = draw_gaussian(model, gaussian_input or "latent", num_samples, seed)
    else:
        from prior import load as load_pair
        from prior.sampling import parse_labels
        from vqvae.console import progress

        chosen = [label] if label is not None else parse_labels(labels)
        pair = load_pair(vqvae, prior, device)
        print(f"weights: {pair.origin}")
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        with progress(num_samples, "map") as bar:
            arrays = pair.draw(num_samples, labels=chosen, seed=seed, progress=bar.update, **given)._asdict()
    save_images(output, arrays)
    print(f"wrote {output}")


@app.command()
def reconstruct(
    num_images: Annotated[int, Option(min=1, help="How many test images, from the first on.")] = 100,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    output: Output = Path("reconstruct.png"),
    vqvae: VQVAEFile = None,
    download: Download = True,
) -> None:
    """Pass test images through stage one and back. A picture gets the originals beside it, as <name>-original.png."""
    from vqvae import load
    from vqvae.codec import reconstruct_split
    from vqvae.data.mnist import load_mnist
    from vqvae.output import check_output, save_reconstructions
    from vqvae.storage.runs import describe, find_vqvae

    check_output(output)
    file = find_vqvae(vqvae)
    model = load(file, device)
    print(f"weights: {describe(file)}")
    arrays = reconstruct_split(model, load_mnist(data_folder, download).load_test(), num_images)
    for written in save_reconstructions(output, arrays):
        print(f"wrote {written}")


@app.command()
def compare(
    num_samples: Annotated[int | None, Option(min=1, help="Images of each mode [default: 3 of each class]")] = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    seed: Seed = 0,
    output: Output = Path("compare.png"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    download: Download = True,
) -> None:
    """Real images, reconstructions, both Gaussian baselines and the prior's samples, side by side."""
    from prior import load
    from prior.evaluation.comparison import as_text, compare_modes, save_comparison
    from vqvae.data.mnist import load_mnist
    from vqvae.output import check_output

    check_output(output)
    pair = load(vqvae, prior, device)
    print(f"weights: {pair.origin}")
    modes = compare_modes(pair, load_mnist(data_folder, download), num_samples=num_samples, seed=seed)
    save_comparison(modes, output)
    print(f"{as_text(modes)}\nwrote {output}")


@app.command()
def evaluate(
    num_samples: Annotated[int | None, Option(min=1, help="Images in each set [default: all of the split's]")] = None,
    split: SplitName = "test",
    guidance: Guidance = None,
    cas: AccuracyScore = False,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    seed: Seed = 0,
    output_folder: ReportFolder = Path("evaluation"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    classifier: ClassifierFile = None,
    download: Download = True,
) -> None:
    """Measure both stages: FID, KID, coverage, agreement with labels, memorisation, likelihood."""
    from prior import load
    from prior.evaluation.report import evaluate_and_report
    from vqvae.data.mnist import load_mnist
    from vqvae.storage.runs import describe, find_classifier

    pair, file = load(vqvae, prior, device), find_classifier(classifier)
    print(f"weights: {pair.origin}, measured with {describe(file)}")
    dataset = load_mnist(data_folder, download)
    options: dict[str, Any] = {"split": split, "num_samples": num_samples, "guidance": guidance, "seed": seed}
    print(evaluate_and_report(pair, file, dataset, output_folder, accuracy_score=cas, **options))
    print(f"\nwrote {output_folder / 'report.html'}, and beside it metrics.json, the tables and the pictures")


def _print_written(written: Path, data_folder: Path, *following: str | Path) -> None:
    """What was written, and the command to type next, quoted for a shell."""
    data = () if data_folder == DATA else ("--data-folder", data_folder)
    print(f"wrote {written}; next: python cli.py {shlex.join(map(str, (*following, *data)))}")


def as_flags(message: str) -> str:
    """A message of the library, with the Python in its backticks turned into what is typed here."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    flags = {param.name: param for command in commands for param in command.params}

    def translate(match: re.Match[str]) -> str:
        name, call, value = match.groups()
        if call:
            return f"python cli.py {name.replace('_', '-')}"
        if name not in flags:
            return match[0].strip("`")  # a setting that only a recipe has
        flag = (flags[name].opts or flags[name].secondary_opts)[0]
        if value in (None, "True", "False"):  # a bare name, or a switch such as --resume or --no-download
            return flag
        return f"{flag} {value}"

    return re.sub(r"`([\w\[\]]+)(\(\))?(?:=([^`]*))?`", translate, message)


def main() -> None:
    """Run the app. A user's mistake ends in one sentence and status 1, a signal in its usual status."""
    try:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            app()
        else:  # torchrun started this process
            from vqvae.distributed import process_group

            with process_group():
                app()
    except InputError as error:
        print(f"error: {as_flags(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as interrupted:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
        again = f"all of it is saved; go on with: python cli.py {shlex.join([*arguments, '--resume'])}"
        saved = again if arguments[0].startswith("train-") else "nothing was written"
        print(f"stopped by a signal after step {interrupted.step}; {saved}", file=sys.stderr)
        raise SystemExit(128 + interrupted.signal) from None


if __name__ == "__main__":
    main()
