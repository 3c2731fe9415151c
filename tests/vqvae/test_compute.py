from contextlib import suppress

import pytest
import torch
from torch import nn

from vqvae.compute import (
    derive_seed,
    eval_mode,
    in_batches,
    memory_for,
    multiplies_bfloat16,
    pick_device,
    require_memory,
    seed_globally,
)
from vqvae.errors import InputError

CUDA = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_cuda_without_a_device_and_another_name_are_errors_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda in ("cuda", *CUDA):
        with pytest.raises(InputError, match="expected a CUDA device for `device=cuda`, found none; use `device=cpu`"):
            pick_device(cuda)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("meta")) == torch.device("meta")  # which stands for itself
    for name in ("gpu", "", "cuda:x", "CPU"):
        with pytest.raises(InputError, match=f"expected `device` to be auto, cpu or cuda, found '{name}'; try"):
            pick_device(name)


def test_auto_takes_cuda_where_there_is_one_and_each_process_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [pick_device("auto"), pick_device("cpu")] == [CUDA[0], torch.device("cpu")]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == CUDA[1]
    assert current == CUDA
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="expected a CUDA device for each process, found 2; start at most 2 on"):
        pick_device("cuda")


@pytest.mark.parametrize("there", [{}, {"avx2": True, "avx512_bf16": False}, {"amx_bf16": True}, {"avx512_bf16": True}])
def test_a_device_multiplies_bfloat16_if_it_says_so(monkeypatch: pytest.MonkeyPatch, there: dict[str, bool]) -> None:
    expected = there in ({"amx_bf16": True}, {"avx512_bf16": True})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)
    assert multiplies_bfloat16(torch.device("cpu")) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in an older torch
    assert not multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: expected or including_emulation)
    assert multiplies_bfloat16(CUDA[0]) is expected


def test_seeds_differ_by_every_key_and_seeding_globally_is_what_torch_does() -> None:
    seeds = [derive_seed(seed, use, i) for seed in range(3) for use in ("order", "step") for i in range(50)]
    assert len({*seeds, derive_seed(11, 1), derive_seed(1, 11)}) == len(seeds) + 2
    for seed in seeds:
        seed_globally(seed)
        assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("num", "sizes"), [(10, [3, 3, 3, 1]), (9, [3, 3, 3]), (2, [2]), (0, [])])
def test_batches_cover_everything_once_and_in_order(num: int, sizes: list[int]) -> None:
    slices = list(in_batches(num, 3))
    assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(num))
    assert [rows.stop - rows.start for rows in slices] == sizes


def test_eval_mode_records_no_gradients_and_restores_every_mode_after_an_error_too() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))).train(), nn.Dropout()
    model[1].eval()
    modules = [*model.modules(), other.eval()]
    modes = [module.training for module in modules]
    for raised in (False, True):
        with suppress(KeyError), eval_mode(model, other):
            assert not any(module.training for module in modules)
            assert not model(torch.zeros(1, 2)).requires_grad
            if raised:
                raise KeyError
        assert [module.training for module in modules] == modes
        assert model(torch.zeros(1, 2)).requires_grad


def test_memory_that_cannot_be_had_is_refused_by_the_name_of_the_argument() -> None:
    for ask in (lambda: torch.empty(10**14), lambda: bytearray(10**15)):
        with (
            pytest.raises(InputError, match="found too little; choose a smaller `batch_size`"),
            memory_for("batch_size"),
        ):
            ask()
    with pytest.raises(RuntimeError, match="size"), memory_for("batch_size"):
        torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(InputError), memory_for("batch_size"):
        raise torch.OutOfMemoryError  # of CUDA
    require_memory(2**20, "num_samples", 7)
    with pytest.raises(InputError, match=r"found 7, which needs 1048576; choose a smaller `num_"):
        require_memory(2**50, "num_samples", 7)
