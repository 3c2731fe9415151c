"""The command line: flags in, one call of the library, a report of what was written.

Every command imports what it needs itself, so that --help answers at once.
"""
# ruff: noqa: E402  # signals are answered before the imports that take time

import sys
from pathlib import Path

if __name__ == "__main__" and sys.flags.safe_path:  # python -I, which does not look for modules beside the script
    sys.path.insert(0, str(Path(__file__).parent))

from vqvae.stopping import BY_A_SIGNAL, Stopped, end_on_signals, ending

end_on_signals()

import os
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from vqvae.console import be_quiet, guard_streams, progress, remark, say
from vqvae.errors import InputError, Interrupted
from vqvae.shell import as_typed, command_line, program, require_extra, tell_version
from vqvae.storage.shipped import RECIPES
from vqvae.threads import choose_threads, spin_briefly

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DATA = Path("data")
File = Path | None


def path(typed: str | Path) -> Path:
    """A path as it is typed, in which ~ is the home folder."""
    if not str(typed):
        raise typer.BadParameter("expected a name, found ''")
    return Path(os.path.expanduser(typed))  # noqa: PTH111  # Path's own raises where there is no such user


PathOption = partial(Option, parser=path)
Config = Annotated[Path, PathOption(help="TOML recipe; flags override it, it overrides the defaults.")]
RunFolder = Annotated[Path | None, PathOption(help="Weights and logs [default: the VQ-VAE's, or a new one's]")]
Dataset = Annotated[str | None, Option(help="A name such as fashion-mnist, a folder of images, or an .npz file.")]
OtherDataset = Annotated[str | None, Option("--dataset", help="As for train-vqvae [default: the model's own]")]
ImageSize = Annotated[str | None, Option(help="Resize images to it: 32 or HEIGHTxWIDTH [default: the set's own]")]
DataFolder = Annotated[Path, PathOption(help="Where datasets are, or are to be put.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option(callback=choose_threads, help="auto: CUDA if there is one.")]
Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="Same seed, device and number of threads: same result.")]
StartFrom = Annotated[Path | None, PathOption(help="Begin with these weights of the same network [default: random]")]
Resume = Annotated[bool, Option("--resume", help="Go on with the run in the output folder.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the run in the output folder.")]
Download = Annotated[bool, Option(" /--no-download", show_default=False, help="Stop if data is missing.")]
Quiet = Annotated[bool, Option("--quiet", callback=be_quiet, help="No progress; results, remarks and errors stay.")]
BatchSize = Annotated[int | None, Option(min=1, help="Samples a step [default: the recipe's]")]
NumEpochs = Annotated[int | None, Option(min=1, help="Passes over the data [default: the recipe's]")]
LearningRate = Annotated[float | None, Option("--lr", help="Learning rate [default: the recipe's]")]
VQVAEFile = Annotated[Path | None, PathOption("--vqvae", help="VQ-VAE weights [default: your newest, or the shipped]")]
PriorFile = Annotated[Path | None, PathOption("--prior", help="Prior weights [default: your newest, or the shipped]")]
Guidance = Annotated[float | None, Option(min=0, max=100, help="How strongly to follow labels; 1: the prior itself.")]
Output = Annotated[Path, PathOption(help=".png for a picture, .npz for arrays.")]
Images = Annotated[Path | None, PathOption(help="Your own: a file, a folder or an .npz [default: a test split's]")]
NumImages = Annotated[int | None, Option(min=1, help="How many test images [default: the first 100; complete: 8]")]
Label = Annotated[str | None, Option("--label", help="Draw this class: its name or its number.")]
Temperature = Annotated[float | None, Option(help="Below 1 safer, above 1 wilder [default: 1]")]
TopK = Annotated[int | None, Option(min=1, help="Draw among the k likeliest codes [default: all]")]
TopP = Annotated[float | None, Option(help="Draw among the likeliest codes of this mass [default: 1]")]


@app.command(help="Stage one: train the VQ-VAE.")
def train_vqvae(
    output_folder: RunFolder = None,
    dataset: Dataset = None,
    image_size: ImageSize = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    code_dim: Annotated[
        int | None, Option("--hidden-size", help="Size of a latent vector [default: the recipe's]")
    ] = None,
    num_codes: Annotated[int | None, Option("--k", help="Number of codes [default: the recipe's]")] = None,
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    beta: Annotated[float | None, Option(help="Weight of the commitment term [default: the recipe's]")] = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    start_from: StartFrom = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from vqvae import VQVAEConfig, VQVAETraining
    from vqvae.data.load import DatasetChoice
    from vqvae.storage.recipe import read_recipe, resolve
    from vqvae.storage.runs import folder_for, relative
    from vqvae.train import summarise, train_vqvae

    flags: dict[str, Any] = {"code_dim": code_dim, "num_codes": num_codes, "beta": beta, "lr": lr}
    flags |= {"batch_size": batch_size, "num_epochs": num_epochs, "dataset": dataset, "image_size": image_size}
    classes = (VQVAEConfig, VQVAETraining, DatasetChoice)
    *settings, data = resolve(classes, read_recipe(config, "vqvae"), flags, config)
    named_after = config if dataset is None else Path(os.path.abspath(dataset))  # noqa: PTH100  # links are kept
    written = (output_folder or folder_for(named_after)) / "vqvae.safetensors"
    run: dict[str, Any] = {"data_folder": data_folder, "output_folder": written.parent, "download": download}
    run |= {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite, **asdict(data)}
    run["start_from"] = start_from
    say(f"test: {summarise(train_vqvae(*settings, **run), settings[0].num_codes)}")
    following = ("train-prior", "--vqvae", written, "--config", relative(config))
    _say_what_is_next(written, *following, data_folder=data_folder)


@app.command(help="Stage two: train the prior on a VQ-VAE's code maps.")
def train_prior(
    vqvae: VQVAEFile = None,
    output_folder: RunFolder = None,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    batch_size: BatchSize = None,
    num_epochs: NumEpochs = None,
    lr: LearningRate = None,
    config: Config = RECIPES / "mnist.toml",
    seed: Seed = 0,
    start_from: StartFrom = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior.model import PriorConfig
    from prior.train import PriorTraining, summarise, train_prior
    from vqvae.storage.recipe import read_recipe, resolve
    from vqvae.storage.runs import describe, find_vqvae, folder_for

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr}
    settings = resolve((PriorConfig, PriorTraining), read_recipe(config, "prior"), flags, config)
    file = find_vqvae(vqvae)
    written = (output_folder or folder_for(config, file)) / "prior.safetensors"
    say(f"VQ-VAE: {describe(file)}")
    run: dict[str, Any] = {"data_folder": data_folder, "output_folder": written.parent, "download": download}
    run |= {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite, "dataset": dataset}
    run["start_from"] = start_from
    say(f"test: {summarise(train_prior(*settings, vqvae_path=file, **run))}")
    pair = ("--vqvae", file, "--prior", written)
    _say_what_is_next(written, "sample", "--mode", "pixelcnn", *pair, "--output", "samples.png")


@app.command(help="Train the classifier whose features `evaluate` measures with.")
def train_classifier(
    output_folder: Annotated[Path, PathOption(help="Gets the weights and the logs.")] = Path("checkpoints/classifier"),
    dataset: Dataset = None,
    image_size: ImageSize = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    batch_size: Annotated[int | None, Option(min=1, help="Samples a step [default: 128]")] = None,
    num_epochs: Annotated[int | None, Option(min=1, help="Passes over the data [default: 12]")] = None,
    lr: Annotated[float | None, Option("--lr", help="Learning rate [default: 4e-3]")] = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior.evaluation.classifier import ClassifierConfig
    from prior.evaluation.classifier_training import ClassifierTraining, train_classifier
    from vqvae.data.load import DatasetChoice
    from vqvae.storage.recipe import resolve

    flags = {"batch_size": batch_size, "num_epochs": num_epochs, "lr": lr, "dataset": dataset, "image_size": image_size}
    *settings, data = resolve((ClassifierConfig, ClassifierTraining, DatasetChoice), {}, flags)
    written = output_folder / "classifier.safetensors"
    run: dict[str, Any] = {"data_folder": data_folder, "output_folder": output_folder, "download": download}
    run |= {"seed": seed, "device": device, "resume": resume, "overwrite": overwrite, **asdict(data)}
    figures = train_classifier(*settings, **run)
    say(f"test: {1 - figures['error']:.2%} right, cross-entropy {figures['cross_entropy']:.4f}")
    _say_what_is_next(written, "evaluate", "--classifier", written, data_folder=data_folder)


@app.command(help="Draw new images, as a grid or as arrays. The gaussian mode takes no labels and no prior.")
def sample(
    mode: Annotated[Literal["gaussian", "pixelcnn"], Option(help="Codes by Gaussian noise, or drawn from the prior.")],
    gaussian_input: Annotated[
        Literal["latent", "image"] | None, Option(help="gaussian only: z ~ N(0, 1), the default, or x ~ N(0, 1).")
    ] = None,
    num_samples: Annotated[int, Option(min=1, help="How many images.")] = 100,
    label: Label = None,
    labels: Annotated[str | None, Option(help="Draw these in turn, as cat,dog or 0-9 or 1,3,5 [default: any]")] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    device: Device = "auto",
    gif: Annotated[bool, Option("--gif", help="Show how they are drawn, code by code, in <mode>.gif.")] = False,
    output: Annotated[
        Path | None, PathOption(help=".png, .npz, or .gif or .webp for the drawing [default: <mode>.png]")
    ] = None,
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    quiet: Quiet = False,
) -> None:
    options: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    of_the_prior = {"label": label, "labels": labels, **options, "gif": gif or None, "prior": prior}
    for name, value in of_the_prior.items() if mode == "gaussian" else [("gaussian_input", gaussian_input)]:
        if value is not None:
            raise InputError(f"expected no `{name}` with `mode={mode}`, found {value}; leave it out or change the mode")
    if label is not None and labels is not None:
        raise InputError("expected `label` or `labels`, found both; give one of them")

    from vqvae.output import ANIMATIONS, check_output, save_images

    output = output or Path(f"{mode}.gif" if gif else f"{mode}.png")
    shown: dict[str, Any] = {}
    if mode == "gaussian":
        from vqvae.gaussian import draw_gaussian

        check_output(output)
        model, _ = _load_vqvae(vqvae, device, output)
        arrays = draw_gaussian(model, gaussian_input or "latent", num_samples, seed)
    else:
        from prior.animation import require_few, stages
        from prior.labels import names_of, parse_label, parse_labels
        from prior.sampling import check_options
        from vqvae.pictures import columns_for

        check_output(output, *ANIMATIONS if gif else (".png", *ANIMATIONS, ".npz"))
        check_options(**options)
        if output.suffix in ANIMATIONS:
            require_few(num_samples)
        pair = _load_pair(vqvae, prior, device, output)
        names = pair.info.class_names
        chosen = parse_labels(labels, names) if label is None else [parse_label(label, names)]
        with progress(num_samples, "map") as bar:
            samples = pair.draw(num_samples, labels=chosen, seed=seed, progress=bar.update, **options)
        arrays, columns = samples._asdict(), columns_for(num_samples, len(chosen or "?"))
        shown = {"columns": columns, "captions": names_of(samples.labels, names), "stages": stages(samples)}
    save_images(output, arrays, arrays["images"], **shown)
    say(f"wrote {output}")


@app.command(help="Pass images through stage one and back. The picture shows each one above its reconstruction.")
def reconstruct(
    images: Images = None,
    num_images: NumImages = None,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    output: Output = Path("reconstruct.png"),
    vqvae: VQVAEFile = None,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    import torch

    from vqvae.codec import reconstruct
    from vqvae.data.chosen import ImageChoice
    from vqvae.output import check_output, save_images

    choice = ImageChoice(images, dataset, num_images, data_folder, download)
    check_output(output)
    model, info = _load_vqvae(vqvae, device, output, dataset, images)
    pixels, names = choice.read(info, num_images=100)
    arrays = reconstruct(model, pixels)
    pairs = torch.stack([arrays["images"], arrays["reconstructions"]], dim=1)
    save_images(output, {**arrays, "names": names}, pairs)
    error, psnr = (arrays[name].mean() for name in ("squared_error", "psnr_db"))
    say(f"mean of {len(pixels)} images: squared error {error:.5f}, PSNR {psnr:.2f} dB\nwrote {output}")


@app.command(
    help="Keep the first rows of the codes of images and draw the others. Each code is drawn given those before it in "
    "raster order (row by row, from the top left), so only what comes after can be drawn."
)
def complete(
    images: Images = None,
    num_images: NumImages = None,
    num_rows: Annotated[int | None, Option("--rows", min=0, help="Rows to keep, from the top [default: half]")] = None,
    num_samples: Annotated[int, Option("--samples", min=1, help="Completions of each image.")] = 8,
    labels: Label = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    output: Output = Path("complete.png"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior.completions import as_grid, complete
    from prior.labels import parse_label
    from prior.sampling import check_options
    from vqvae.data.chosen import ImageChoice
    from vqvae.output import check_output, save_images

    choice = ImageChoice(images, dataset, num_images, data_folder, download)
    options: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_options(**options)
    check_output(output)
    pair = _load_pair(vqvae, prior, device, output, dataset, images)
    options["label"] = None if labels is None else parse_label(labels, pair.info.class_names)
    pixels, names = choice.read(pair.info, num_images=8)
    with progress(len(pixels) * num_samples, "map") as bar:
        completions = complete(pair, pixels, num_rows, num_samples, seed=seed, progress=bar.update, **options)
    save_images(output, {**completions._asdict(), "names": names}, **as_grid(completions, pair.info.class_names))
    say(f"wrote {output}")


@app.command(help="Say how likely images are under the prior, without a label told, and which label fits each best.")
def score(
    images: Images = None,
    num_images: NumImages = None,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    output: Annotated[Path | None, PathOption(help=".csv for a table, .npz for arrays [default: none]")] = None,
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior.scores import as_text, save_scores, score
    from vqvae.data.chosen import ImageChoice
    from vqvae.output import check_output

    choice = ImageChoice(images, dataset, num_images, data_folder, download)
    if output is not None:
        check_output(output, ".csv", ".npz")
    pair = _load_pair(vqvae, prior, device, output, dataset, images)
    pixels, names = choice.read(pair.info, num_images=100)
    with progress(len(pixels) * max(pair.info.num_classes, 1), "map") as bar:
        scores = score(pair, pixels, names, bar.update)
    if output is not None:
        save_scores(scores, output)
    say(as_text(scores) if output is None else f"{as_text(scores)}\nwrote {output}")


@app.command(help="Real images, reconstructions, both Gaussian baselines and the prior's samples, side by side.")
def compare(
    num_samples: Annotated[int | None, Option(min=1, help="Images of each mode [default: three rows]")] = None,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    seed: Seed = 0,
    output: Output = Path("compare.png"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior.evaluation.comparison import as_text, compare_modes, save_comparison
    from vqvae.data.load import load_like
    from vqvae.output import check_output

    check_output(output)
    pair = _load_pair(vqvae, prior, device, output, dataset)
    data = load_like(pair.info, dataset, data_folder, download=download)
    modes = compare_modes(pair, data, num_samples=num_samples, seed=seed)
    save_comparison(modes, output, data.info.class_names)
    say(f"{as_text(modes)}\nwrote {output}")


@app.command(help="Measure both stages: FID, KID, coverage, agreement with labels, memorisation, likelihood.")
def evaluate(
    num_samples: Annotated[int | None, Option(min=1, help="Images in each set [default: all of the split's]")] = None,
    split: Annotated[Literal["test", "validation"], Option(help="test to report, validation to choose by.")] = "test",
    guidance: Guidance = None,
    cas: Annotated[bool, Option("--cas", help="Also the classification accuracy score, which takes minutes.")] = False,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    seed: Seed = 0,
    output_folder: Annotated[Path, PathOption(help="Gets the report, metrics.json, pictures.")] = Path("evaluation"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    classifier: Annotated[
        Path | None, PathOption(help="Classifier weights [default: your newest, or the shipped]")
    ] = None,
    download: Download = True,
    quiet: Quiet = False,
) -> None:
    from prior import load
    from prior.evaluation.measure import fits
    from prior.evaluation.report import evaluate_and_report
    from vqvae.data.chosen import require_apart
    from vqvae.data.load import load_like
    from vqvae.storage.runs import describe, find_classifier, is_shipped

    pair = load(vqvae, prior, device)
    require_apart(output_folder / "real.png", pair.info, dataset)
    file = find_classifier(classifier, partial(fits, info=pair.info), pair.files[0])
    say(f"weights: {pair.origin}" + (f", measured with {describe(file)}" if file else ""))
    if file is None and pair.info.class_names:
        _, height, width = pair.info.image_shape
        kind = ("--dataset", dataset or pair.info.source or pair.info.name, "--image-size", f"{height}x{width}")
        words = kind if is_shipped(pair.files[0]) else (*kind, "--output-folder", pair.files[0].parent)
        first = command_line("train-classifier", *words, *_data_flag(data_folder))
        remark(f"found no classifier of these images and classes; to measure FID too, first run: {program()} {first}")
    data = partial(load_like, dataset=dataset, data_folder=data_folder, download=download)
    options: dict[str, Any] = {"split": split, "num_samples": num_samples, "guidance": guidance, "seed": seed}
    say(evaluate_and_report(pair, file, data, output_folder, accuracy_score=cas, **options))
    say(f"\nwrote {output_folder / 'report.html'}, and beside it metrics.json, the tables and the pictures")


@app.command(help="Write encoder, decoder and the prior's logits for other programs, checked against the weights.")
def export(
    format: Annotated[Literal["onnx", "torch"], Option(help="For onnxruntime, or for torch.export.load.")] = "onnx",
    output: Annotated[Path, PathOption(help="A new folder, which gets the networks and a README.")] = Path("exported"),
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
    quiet: Quiet = False,
) -> None:
    from prior.export import export_pair

    pair = _load_pair(vqvae, prior, "cpu", None)
    with progress(3, "network", doing=format) as bar:
        differences = export_pair(pair, output, format, bar.update)
    found = ", ".join(f"{name} {difference:.1g}" for name, difference in differences.items())
    say(f"largest difference from the weights: {found}\nwrote {output}")


@app.command(help="Draw the training curves of runs as one picture, in which several runs lie over one another.")
def plot(
    runs: Annotated[list[Path], Argument(parser=path, metavar="RUN", help="Output folders of trainings.")],
    output: Annotated[Path, PathOption(help="A .png file.")] = Path("plot.png"),
    quiet: Quiet = False,
) -> None:
    from vqvae.curves import plot_runs
    from vqvae.output import check_output

    plot_runs(runs, check_output(output, ".png"))
    say(f"wrote {output}")


@app.command(help="Show the model in a browser page: draw, complete, sample, look at the codes. It needs no network.")
def demo(
    host: Annotated[
        str, Option(help="Who is served: 127.0.0.1 this machine, 0.0.0.0 all that reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Where the page is.")] = 7860,
    dataset: OtherDataset = None,
    data_folder: DataFolder = DATA,
    device: Device = "auto",
    vqvae: VQVAEFile = None,
    prior: PriorFile = None,
) -> None:
    require_extra("demo", "gradio")

    from prior.demo.serve import require_address, serve
    from vqvae.data.load import load_like

    require_address(host, port)
    pair = _load_pair(vqvae, prior, device, None)
    serve(pair, partial(load_like, pair.info, dataset, data_folder, download=False), host, port)


def _load_vqvae(vqvae: File, device: str, output: Path, dataset: str | None = None, images: File = None) -> Any:
    """Stage one and the facts about its data, after a check that the output takes the place of no image."""
    from vqvae.compute import pick_device
    from vqvae.data.chosen import require_apart
    from vqvae.data.dataset import DatasetInfo
    from vqvae.model import load_vqvae
    from vqvae.storage.recipe import from_dict
    from vqvae.storage.runs import describe, find_vqvae

    file = find_vqvae(vqvae)
    model, header = load_vqvae(file, pick_device(device))
    info = from_dict(DatasetInfo, header.data)
    require_apart(output, info, dataset, images)
    say(f"weights: {describe(file)}")
    return model, info


def _load_pair(
    vqvae: File, prior: File, device: str, output: File, dataset: str | None = None, images: File = None
) -> Any:
    """Both stages, after a check that the output, if there is one, takes the place of no image."""
    from prior import load
    from vqvae.data.chosen import require_apart

    pair = load(vqvae, prior, device)
    if output is not None:
        require_apart(output, pair.info, dataset, images)
    say(f"weights: {pair.origin}")
    return pair


def _say_what_is_next(weights: Path, *following: str | Path, data_folder: Path = DATA) -> None:
    """Say where a run's best weights are, which may be older than the run's last part, and what to type next."""
    say(f"best weights: {weights}; next: {program()} {command_line(*following, *_data_flag(data_folder))}")


def _data_flag(data_folder: Path) -> tuple[str | Path, ...]:
    """The flag that names the data folder, if it is not the default."""
    return () if data_folder == DATA else ("--data-folder", data_folder)


@app.callback(help="A VQ-VAE turns images into small maps of codes and back; a gated PixelCNN learns to draw such maps")
def _app(version: Annotated[bool, Option("--version", callback=tell_version, is_eager=True)] = False) -> None: ...


def as_flags(message: str) -> str:
    """A message of the library, with the Python in its backticks turned into what is typed here."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    params = [param for name in sorted(commands, key=sys.argv[1:2].__contains__) for param in commands[name].params]
    return as_typed(message, {param.name: (param.opts or param.secondary_opts)[0] for param in params})


def main() -> None:
    """Run the app. A mistake ends in one sentence and status 1 or, with its usage, 2; a signal in its usual status."""
    guard_streams()
    spin_briefly()
    with ending(as_flags):
        try:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                app(prog_name=program())
            else:  # torchrun started this process
                from vqvae.distributed import process_group

                with process_group():
                    app(prog_name=program())
        except Interrupted as interrupted:
            arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
            again = f"all of it is saved; go on with: {program()} {command_line(*arguments, '--resume')}"
            saved = again if arguments[0].startswith("train-") else "what was measured before is written"
            raise Stopped(interrupted.signal, f"{BY_A_SIGNAL} after step {interrupted.step}; {saved}") from None


if __name__ == "__main__":
    main()
