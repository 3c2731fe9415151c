from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from prior.model import PriorConfig
from prior.train import PriorTraining
from vqvae.common.config import from_dict, read_recipe, require_range, resolve
from vqvae.common.errors import UserError
from vqvae.model import VQVAEConfig
from vqvae.train import VQVAETraining

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Network:
    width: int = 40
    kind: Literal["plain", "gated"] = "plain"


@dataclass(frozen=True)
class Run:
    lr: float = 1e-3
    num_epochs: int = 10
    shuffle: bool = True

    def __post_init__(self) -> None:
        require_range("num_epochs", self.num_epochs, 1, 100)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_flags_override_the_recipe_and_the_recipe_the_defaults() -> None:
    recipe = {"width": 16, "lr": 0.5, "num_epochs": 3}
    flags = {"lr": 0.25, "num_epochs": None, "shuffle": None}
    network, run = resolve((Network, Run), recipe, flags)
    assert network == Network(width=16, kind="plain")
    assert run == Run(lr=0.25, num_epochs=3, shuffle=True)


def test_a_flag_that_is_zero_or_false_counts_as_given() -> None:
    _, run = resolve((Network, Run), {"lr": 0.5, "shuffle": True}, {"lr": 0.0, "shuffle": False})
    assert run == Run(lr=0.0, shuffle=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "unknown key 'widht' in the recipe; did you mean 'width'?"),
        ({"zzz": 3}, "unknown key 'zzz' in the recipe; known: width, kind, lr, num_epochs, shuffle"),
        ({"width": 3.0}, "expected width to be of type int, found 3.0"),
        ({"width": "3"}, "expected width to be of type int, found '3'"),
        ({"width": True}, "expected width to be of type int, found True"),
        ({"shuffle": 1}, "expected shuffle to be of type bool, found 1"),
        ({"lr": "fast"}, "expected lr to be of type float, found 'fast'"),
        ({"lr": True}, "expected lr to be of type float, found True"),
        ({"kind": "gatde"}, "expected kind to be one of 'plain', 'gated', found 'gatde'"),
        ({"kind": []}, r"expected kind to be one of 'plain', 'gated', found \[\]"),
        ({"num_epochs": 0}, "expected num_epochs between 1 and 100, found 0; set it within that range"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        resolve((Network, Run), values, {})
    with pytest.raises(UserError):
        resolve((Network, Run), {}, values)


def test_a_whole_number_will_do_for_a_float() -> None:
    run = from_dict(Run, {"lr": 1})
    assert run.lr == 1.0
    assert type(run.lr) is float


def test_a_key_that_is_no_field_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown key 'num_epoch'; did you mean 'num_epochs'\?"):
        from_dict(Run, {"num_epoch": 3})


@pytest.mark.parametrize("value", [1, 2, 100])
def test_both_ends_of_a_range_are_allowed(value: int) -> None:
    require_range("num_epochs", value, 1, 100)


@pytest.mark.parametrize("value", [0, 101, -1, float("nan"), float("inf")])
def test_what_is_not_in_a_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(UserError, match=f"expected num_epochs between 1 and 100, found {value:g}"):
        require_range("num_epochs", value, 1, 100)


def test_a_recipe_has_a_table_for_each_stage(tmp_path: Path) -> None:
    path = write(tmp_path, "# tiny\n[vqvae]\nk = 8\nlr = 2e-3\n")
    assert read_recipe(path, "vqvae") == {"k": 8, "lr": 2e-3}
    assert read_recipe(path, "prior") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[vqvea]\nk = 8", r"recipe.toml: expected the tables \[vqvae\] and \[prior\], found 'vqvea'; did you mean"),
        ("k = 8", r"recipe.toml: expected the tables \[vqvae\] and \[prior\], found 'k'"),
        ("vqvae = 8", r"recipe.toml: expected the tables \[vqvae\] and \[prior\], found 'vqvae'"),
        ("[vqvae\nk = 8", "expected a TOML recipe at .*recipe.toml, found text that is not TOML: .*line 1"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(write(tmp_path, text), "vqvae")


def test_a_recipe_that_is_not_there_or_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a TOML recipe at .*none.toml, found none; .*configs/mnist.toml"):
        read_recipe(tmp_path / "none.toml", "vqvae")
    with pytest.raises(UserError, match=r"expected a TOML recipe at .*, found what can't be read: Is a directory"):
        read_recipe(tmp_path, "vqvae")
    (tmp_path / "image.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"expected a TOML recipe at .*image.toml, found .* of another kind"):
        read_recipe(tmp_path / "image.toml", "vqvae")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_here_can_be_resolved_and_state_only_what_departs(path: Path) -> None:
    for stage, classes in (("vqvae", (VQVAEConfig, VQVAETraining)), ("prior", (PriorConfig, PriorTraining))):
        recipe = read_recipe(path, stage)
        resolved = resolve(classes, recipe, {})
        for key, value in recipe.items():
            holders = [instance for instance in resolved if hasattr(instance, key)]
            assert len(holders) == 1
            assert getattr(holders[0], key) == value
            assert getattr(type(holders[0])(), key) != value, f"{key} repeats the default"
