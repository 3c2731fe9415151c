"""The state that a run goes on from. Its file may come from anybody, so all of it is checked before it is used."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.errors import InputError
from vqvae.storage.checkpoint import load_resume_state
from vqvae.threads import go_on_with_threads
from vqvae.training.settings import Training

KEYS = {"model", "optimizer", "step", "averages", "best", "figures", "log_from", "unlogged", "settings", "threads"}
AVERAGES = {"exp_avg", "exp_avg_sq"}  # AdamW's, of a parameter's gradient and of its square
MOMENTUM = {"momentum"}  # Muon's
LARGEST_COUNT = 2**24  # where the optimiser's own count of steps, a float32, stops
MAX_SHOWN = 80  # characters of a setting in a message
ANEW = "start anew with `overwrite=True`"


class _Foreign(Exception):
    """The state is not one that this run saved. The text says what was found."""


def load_state(
    file: Path,
    settings: Mapping[str, Any],
    training: Training,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_samples: int,
) -> dict[str, Any]:
    """The state in a file. The weights and the optimiser's averages are put in their place, and threads set as before.

    Args:
        settings: those that the run is to go on with.
        num_samples: of an epoch.
    Raises:
        MissingFileError: there is no file.
        InputError: it is damaged; it holds what this run did not save; the run was started with other settings; or more
            epochs are done than `training.num_epochs`. Model and optimiser are then unchanged.
    """
    state = load_resume_state(file)
    epoch_steps = math.ceil(num_samples / training.batch_size)
    # In the order by which the optimiser's state numbers them.
    parameters = [
        (parameter, MOMENTUM if group.get("orthogonal", False) else AVERAGES)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    try:
        _require(state.keys() == KEYS, "other data")
        _check_settings(state["settings"], settings)
        step, best, figures = state["step"], state["best"], state["figures"]
        _require(_is_count(step, 1), "a number of steps that is none")
        position = step % epoch_steps
        _check_model(state["model"], model)
        _check_optimizer(state["optimizer"], parameters, step)
        _check_averages(state["averages"], position, min(position * training.batch_size, num_samples))
        # Before the first evaluation the best is infinity.
        _require(type(best) is float and (math.isfinite(best) if step >= epoch_steps else best == math.inf), "no best")
        _require(_are_scalars(figures), "figures that are none")
        _require(not figures or (position == 0 and best in figures.values()), "figures of another epoch")
        _check_log(state["log_from"], state["unlogged"], step, epoch_steps)
        _require(_is_count(state["threads"], 1), "a number of threads that is none")
    except _Foreign as found:
        raise InputError(f"expected this run's state in {file}, found {found}; {ANEW}") from None
    if step > training.num_epochs * epoch_steps:
        raise InputError(
            f"expected a run of at most {training.num_epochs} epochs in {file}, found one that has done "
            f"{step / epoch_steps:.4g}; resume with a larger `num_epochs`"
        )
    model.load_state_dict(dict(state["model"]))
    for i, (parameter, names) in enumerate(parameters):
        for name in names & state["optimizer"].get(i, {}).keys():  # two tensors of a file may share their memory
            state["optimizer"][i][name] = torch.empty_like(parameter).copy_(state["optimizer"][i][name])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
    go_on_with_threads(state["threads"])
    return state


def require_same_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other settings. `load_state` does so too; this is for what comes before it.

    Raises:
        MissingFileError: there is no file.
        InputError: it is damaged, or the run was started with other settings.
    """
    try:
        _check_settings(load_resume_state(file).get("settings"), settings)
    except _Foreign as found:
        raise InputError(f"expected this run's state in {file}, found {found}; {ANEW}") from None


def require_same_losses(averages: Mapping[str, Any], losses: Mapping[str, Any], file: Path) -> None:
    """Refuse averages of an epoch so far that are not of these losses. Only the first losses tell their names.

    Raises:
        InputError: the names differ.
    """
    known = averages.keys() - {"num"}
    if known and known != losses.keys():
        raise InputError(f"expected this run's state in {file}, found averages of other losses; {ANEW}")


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise _Foreign(found)


def _check_settings(saved: Any, given: Mapping[str, Any]) -> None:
    plain = (str, int, float, bool, type(None))
    _require(type(saved) is dict and all(map(_is_name, saved)), "settings that are none")
    _require(all(type(value) in plain for value in saved.values()), "settings that are none")
    for name in sorted({*saved, *given} - {"num_epochs"}):
        if saved.get(name) != given.get(name):
            if name == "data":  # a digest, which nobody can type
                raise InputError(
                    f"expected the data that the run was started with, found other data; resume with the "
                    f"first, or {ANEW}"
                )
            raise InputError(
                f"expected the settings that the run was started with, {_shown(name, saved)}, found "
                f"{_shown(name, given)}; resume with the first, or {ANEW}"
            )


def _check_model(saved: Any, model: nn.Module) -> None:
    expected = model.state_dict()
    _require(isinstance(saved, dict) and saved.keys() == expected.keys(), "another network's")
    for name, tensor in expected.items():
        _require(_fits(saved[name], tensor), f"another network's {name}")


def _check_optimizer(saved: Any, parameters: list[tuple[Tensor, set[str]]], step: int) -> None:
    """Check the optimiser's averages for each parameter, by their names. Its settings are no part of the state."""
    trained = {i for i, (parameter, _) in enumerate(parameters) if parameter.requires_grad}
    _require(type(saved) is dict and saved.keys() == trained, "another optimiser's")
    count = torch.tensor(float(min(step, LARGEST_COUNT)))
    for i, moments in saved.items():
        parameter, names = parameters[i]
        fits = type(moments) is dict and moments.keys() == {"step", *names} and _fits(moments["step"], count)
        fits = fits and all(_fits(moments[name], parameter) for name in names)
        _require(fits and bool(moments["step"] == count), "another optimiser's")
        squares = moments.get("exp_avg_sq", count)
        _require(bool((squares >= 0).all()), "an average of squares below 0")


def _check_averages(saved: Any, num_batches: int, num_samples: int) -> None:
    """Check the losses of the epoch so far. Their names are compared with the first ones that follow (loop.py)."""
    _require(type(saved) is dict and all(type(name) is str for name in saved), "averages that are none")
    _require(all(type(values) is list for values in saved.values()), "averages that are none")
    counts = saved.get("num", [])
    losses = [values for name, values in saved.items() if name != "num"]
    _require(bool(losses) == (num_batches > 0), "averages of another step")
    _require(all(_is_count(count, 1) for count in counts), "averages over no samples")
    _require(len(counts) >= num_batches and sum(counts) == num_samples, "averages of another step")
    for values in losses:
        fits = len(values) == len(counts) and all(type(value) is float and math.isfinite(value) for value in values)
        _require(fits, "averages that are none")


def _check_log(log_from: Any, unlogged: Any, step: int, epoch_steps: int) -> None:
    _require(_is_count(log_from, 0) and log_from <= step and type(unlogged) is list, "another log's")
    last = max(log_from - 1, 0)
    for row in unlogged:
        _require(type(row) is tuple and len(row) == 2 and _is_count(row[0], 1), "another log's")
        epoch = row[0] // epoch_steps if row[0] % epoch_steps == 0 else None
        _require(last < row[0] <= step and _are_scalars(row[1]), "another log's")
        _require(row[1].get("epoch") == epoch and (epoch is None or row[0] == step), "another log's")
        last = row[0]


def _fits(found: Any, expected: Tensor) -> bool:
    """Whether a tensor of a file can stand for another. Its values are read only when its shape is known to be right:
    a tensor whose strides are 0 can have any size in a file of a few bytes."""
    return (
        type(found) is Tensor
        and not found.is_nested  # which has a strided layout, but no shape
        and (found.layout, found.device.type) == (torch.strided, "cpu")
        and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        and bool(found.isfinite().all())
    )


def _is_name(value: Any) -> bool:
    return type(value) is str and value.isprintable()


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**53


def _are_scalars(values: Any) -> bool:
    """Whether these are named numbers, as the log takes them."""
    return type(values) is dict and all(
        _is_name(name) and (_is_count(value, 0) or (type(value) is float and math.isfinite(value)))
        for name, value in values.items()
    )


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name} = {settings.get(name)!r}"[:MAX_SHOWN]
