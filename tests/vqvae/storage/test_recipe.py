import re
from pathlib import Path
from typing import Any

import pytest

from prior.model import PriorConfig
from prior.train import PriorTraining
from tests.helpers import ROOT
from vqvae.data.dataset import DatasetInfo
from vqvae.data.load import DatasetChoice
from vqvae.errors import InputError, MissingFileError
from vqvae.loss import VQVAETraining
from vqvae.model import VQVAEConfig
from vqvae.storage.recipe import MAX_RECIPE, from_dict, read_recipe, require_range, resolve

VQVAE, PRIOR = (VQVAEConfig, VQVAETraining, DatasetChoice), (PriorConfig, PriorTraining)
UTF = ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
INFO = {"name": "made", "image_shape": [3, 8, 12], "class_names": ["a", "b"], "class_counts": [4, 5]}


def test_overrides_replace_the_recipe_and_the_recipe_the_defaults() -> None:
    recipe = {"width": 16, "lr": 0.5, "num_epochs": 3, "mixed_precision": True, "weight_decay": 0.5}
    overrides = {"lr": 0.25, "num_epochs": None, "weight_decay": 0.0, "mixed_precision": False}
    config, training, _ = resolve(VQVAE, recipe, overrides)
    assert config == VQVAEConfig(width=16)
    assert training == VQVAETraining(lr=0.25, num_epochs=3)  # an override that is zero or false counts as given
    for size in (32, "28x36", None):
        assert resolve(VQVAE, {"image_size": size}, {})[2] == DatasetChoice(image_size=size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "unknown key 'widht' in the recipe; did you mean 'width'?"),
        ({"\n" * 999: 3}, "unknown key '" + r"\n" * 39 + "\\... in the recipe; known: width, num_layers, dropout"),
        ({"width": True}, "expected `width` to be of type int, found True"),
        ({"num_layers": 7.0}, "expected `num_layers` to be of type int, found 7.0"),
        ({"lr": "fast"}, "expected `lr` to be of type float, found 'fast'"),
        ({"lr": True}, "expected `lr` to be of type float, found True"),
        ({"schedule": "one-cycel"}, "expected `schedule` to be one of 'constant', 'one-cycle', found 'one-cycel'"),
        ({"warmup": 1}, "expected `warmup` between 0 and 0.9, found 1; set it within that range"),
        ({"dropout": 0.9000001}, "expected `dropout` between 0 and 0.9, found 0.9000001; set it within that range"),
        ({"lr": -(2**63) - 1}, "expected `lr` to be a number of at most 64 bits, found a longer one"),
        ({"schedule": 10**5000}, "expected `schedule` to be one of 'constant', 'one-cycle', found a value too long to"),
    ],
    ids=range(11),
)
def test_a_wrong_value_is_refused_in_a_short_sentence(values: dict[str, Any], message: str) -> None:
    for recipe, overrides in ((values, {}), ({}, values)):
        with pytest.raises(InputError, match=rf"^{re.escape(message)}(?!.*the recipe is)"):
            resolve(PRIOR, recipe, overrides)
    with pytest.raises(InputError, match=rf"^{re.escape(message)}.* \(the recipe is mine.toml\)$"):
        resolve(PRIOR, values, {}, source=Path("mine.toml"))


def test_a_list_becomes_a_tuple_and_a_whole_number_a_float_and_none_stays() -> None:
    info = DatasetInfo("made", (3, 8, 12), ("a", "b"), (4, 5))
    assert from_dict(DatasetInfo, INFO) == from_dict(DatasetInfo, {**INFO, "class_names": ("a", "b")}) == info
    assert from_dict(DatasetInfo, {**INFO, "class_names": [], "class_counts": []}).class_names == ()
    assert type(from_dict(PriorTraining, {"lr": 1}).lr) is float
    assert [from_dict(PriorConfig, {"num_layers": num}).num_layers for num in (None, 3)] == [None, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_shape": [3, 8]}, "expected `image_shape` to be of type tuple[int, int, int], found [3, 8]"),
        ({"image_shape": "abc"}, "expected `image_shape` to be of type tuple[int, int, int], found 'abc'"),
        ({"image_shape": [3, 8, True]}, "expected `image_shape[2]` to be of type int, found True"),
        ({"class_names": {"a": 1}}, "expected `class_names` to be of type tuple[str, ...], found {'a': 1}"),
        ({"class_names": ["a", 3]}, "expected `class_names[1]` to be of type str, found 3"),
        ({"class_counts": [1, 2**63]}, "expected `class_counts[1]` to be a number of at most 64 bits, found a longer"),
        ({"name": ["x" * 5000]}, f"expected `name` to be of type str, found ['{'x' * 78}..."),
        ({"name": None}, "expected `name` to be of type str, found None"),
        ({"nmae": 3}, "unknown key 'nmae'; did you mean 'name'?"),
    ],
    ids=range(9),
)
def test_what_does_not_fit_a_field_is_refused_by_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        from_dict(DatasetInfo, {**INFO, **values})
    with pytest.raises(InputError, match=r"^expected a value for `class_names`, found none; add one$"):
        from_dict(DatasetInfo, {"name": "made", "image_shape": [3, 8, 12]})


def test_both_ends_of_a_range_are_allowed_and_nothing_beyond() -> None:
    for value in (1, 1.5, 100):
        require_range("num_epochs", value, 1, 100)
    for value in (0, 0.999, 101, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"expected `num_epochs` between 1 and 100, found {value:g}; set it"):
            require_range("num_epochs", value, 1, 100)


def test_a_recipe_has_a_table_for_each_stage_which_may_use_former_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("#\n[vqvae]\nhidden_size = 4\nk = 8\nfree_overshoot = true\npredictability = 0.5\nlr = 2e-3")
    new = {"code_dim": 4, "num_codes": 8, "clipped_loss": True, "prediction_weight": 0.5, "lr": 2e-3}
    assert read_recipe(path, "vqvae") == new
    assert read_recipe(path, "prior") == {}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark
    assert read_recipe(path, "vqvae") == new
    resolve(VQVAE, new, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[vqvea]\nk = 8", r"recipe.toml: expected the tables \[vqvae\] and \[prior\], found 'vqvea'; did you mean"),
        (b"k = 8", r"recipe.toml: expected the tables \[vqvae\] and \[prior\], found 'k'"),
        (b"vqvae = 8", r"recipe.toml: expected a table \[vqvae\], found vqvae = 8; write \[vqvae\], and its"),
        (b"[[prior]]\nlr = 1", r"expected a table \[prior\], found a list, as \[\[prior\]\] makes one; write"),
        (b"vqvae = []", r"expected a table \[vqvae\], found a list"),
        (b"[vqvae]\n[vqvae]", r"found text that is not TOML: .*vqvae.* twice"),
        *(("[vqvae]\nk = 8".encode(name), "recipe in UTF-8 at .*, found .* UTF-16; save it as UTF-8") for name in UTF),
        ("# größer".encode("latin-1"), "recipe in UTF-8 at .* in another encoding, .*; save it as UTF-8"),
        (b"[vqvae]\nk = 8\nnum_codes = 9", r"expected 'num_codes' once in \[vqvae\], found 'k' too, .*; leave one out"),
        (b"[vqvae\nk = 8", r"expected a TOML recipe at .*, found text that is not TOML: .*line 1.*; correct it there$"),
        (
            b"\x89PNG\xff\xfe",
            r"expected a TOML recipe in UTF-8 at .*, found a file of another kind .*mnist.toml$",
        ),
        (b"#" * (MAX_RECIPE + 1), "found a file that is .* of another kind .*longer than 16384 bytes"),
    ],
    ids=range(15),
)
def test_a_recipe_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "recipe.toml", "vqvae")
    with pytest.raises(MissingFileError, match=r"expected a TOML recipe at .*/none, found none; name another, such as"):
        read_recipe(tmp_path / "none", "vqvae")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_here_fit_their_settings_and_state_only_what_departs(path: Path) -> None:
    for stage, classes in (("vqvae", VQVAE), ("prior", PRIOR)):
        recipe = read_recipe(path, stage)
        resolved = resolve(classes, recipe, {})
        assert tuple(map(type, resolved)) == classes
        for key, value in recipe.items():
            (holder,) = (instance for instance in resolved if hasattr(instance, key))
            assert getattr(holder, key) == value
            assert getattr(type(holder)(), key) != value, f"{key} repeats the default"
