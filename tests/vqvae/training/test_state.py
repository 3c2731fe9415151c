import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vqvae.training.test_loop import STEPS, Toy, contents, train
from vqvae.errors import InputError, Interrupted
from vqvae.storage.checkpoint import load_resume_state
from vqvae.training import loop, state

HUGE = torch.zeros(1).expand(10**15)  # of four bytes
ODD: list[Any] = [None, "7", -1, 0, 10**18, True, 7.5, math.nan, -math.inf, [], {}, (1,), [1.0], {"a": HUGE}, HUGE]
ODD += [{1: 2.0}, [(6, {"lr": math.nan})], [(3, {"epoch": 1})], [("6", {})], [(10**18, {})], {"a\n": 1.0}, {"a": None}]
# What a true state could say too: another best, the log anew, nothing to log, no best epoch, no averages at its end.
MAY_BE = {("best", "7.5"), ("log_from", "0"), ("unlogged", "[]"), ("figures", "{}"), ("averages", "{}")}
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{"half": Tensor.half, "double": Tensor.double, "complex": lambda x: x.to(torch.complex64)},
    **{"sparse": lambda x: x.float().reshape(1, -1).to_sparse(), "meta": lambda x: x.to("meta")},
    "nested": lambda x: torch._nested_tensor_from_tensor_list([x.float().flatten()]),
    **{"nan": lambda x: x * math.nan, "larger": lambda x: torch.cat([x.flatten()] * 2), "flat": lambda x: x[None]},
    **{"huge": lambda x: HUGE, "a list": Tensor.tolist, "none": lambda x: None, "negative": lambda x: -1 - x.abs()},
}


@pytest.fixture(scope="module", params=[2 * STEPS, STEPS + 2], ids=["an epoch's end", "within an epoch"])
def saved(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run's folder, stopped in a step."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 2)
        patch.setattr(loop, "any_rank", lambda *flags: [toy.model.taken == request.param] * len(flags))
        toy = Toy()
        with pytest.raises(Interrupted):
            train(toy, folder, optimizer="muon")
    return folder


def lies(true: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """States that differ from a true one in one place."""
    found: list[tuple[str, dict[str, Any]]] = []

    def lie(what: str, change: Callable[[dict[str, Any]], object]) -> None:
        changed = copy.deepcopy(true)
        change(changed)
        found.append((what, changed))

    places: list[tuple[str, Any]] = [("", lambda s: s), ("model", lambda s: s["model"])]
    places += [("optimizer", lambda s: s["optimizer"])]
    places += [(f"its {i}", lambda s, i=i: s["optimizer"][i]) for i in (0, 3)]  # a matrix's and a bias's
    places += [("averages", lambda s: s["averages"])] if true["averages"] else []
    for name, place in places:
        for key, value in place(true).items():
            lie(f"no {name} {key}", lambda s, place=place, key=key: place(s).pop(key))
            lie(
                f"{name} {key} renamed", lambda s, place=place, key=key: place(s).update({f"{key}_": place(s).pop(key)})
            )
            odd = ODD
            if isinstance(value, Tensor):
                odd = [CHANGES[what](value) for what in CHANGES if what != "negative" or key in ("step", "exp_avg_sq")]
            for wrong in odd:
                if isinstance(value, Tensor) or (key, repr(wrong)) not in MAY_BE:
                    lie(f"{name} {key} {wrong!r:.60}", lambda s, p=place, k=key, w=wrong: p(s).update({k: w}))
    lie("one key more", lambda s: s.update(more=1))
    lie("another step", lambda s: s.update(step=s["step"] + 1))
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_state_that_lies_anywhere_is_refused_in_a_sentence_and_changes_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(saved)
    for what, lie in lies(load_resume_state(saved / "resume.pt")):
        monkeypatch.setattr(state, "load_resume_state", lambda path, lie=lie: lie)
        print(what)
        with pytest.raises(InputError) as told:
            train(Toy(), saved, resume=True, optimizer="muon")
        assert str(told.value).startswith(("expected this run's state in", "expected the settings that the run"))
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 400
        assert contents(saved) == files


def test_a_run_of_more_epochs_than_asked_for_is_told_apart(tmp_path: Path) -> None:
    train(Toy(), tmp_path, num_epochs=2)
    with pytest.raises(InputError, match=r"expected a run of at most 1 epochs in .*, found one that has done 2; "):
        train(Toy(), tmp_path, num_epochs=1, resume=True)
