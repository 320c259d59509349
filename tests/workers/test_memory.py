"""What is predicted of memory is what training takes, within a factor that planning can live with."""

from pathlib import Path

import pytest
import torch

from tests.workers.tiny_bases import FAMILIES, make_model
from workers.memory import SLACK, BaseShape, Memory, _cgroup_room, bank_bytes, free_bytes, is_out_of_memory, shape_of

CPU = torch.device("cpu")


def kept_bytes(model: torch.nn.Module, num_tokens: int) -> int:
    """Return what autograd keeps of one forward whose inputs need a gradient everywhere, the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # alive, so that no address is used twice
        return tensor

    held: list[torch.Tensor] = []
    embedded = model.get_input_embeddings()(torch.arange(num_tokens)[None] % 64).detach().requires_grad_()  # type: ignore[operator]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model(inputs_embeds=embedded, use_cache=False)  # type: ignore[operator]
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_token_are_predicted_within_a_factor_of_two(family: str) -> None:
    model = make_model(family, max_position_embeddings=512, n_positions=512)
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.requires_grad_(True)  # a linear that is adapted keeps its input, as A's gradient needs it
    shape = shape_of(model)
    measured = kept_bytes(model, 512) / 512
    predicted = shape.bytes_per_token(checkpointing=False) / SLACK
    assert 0.5 < predicted / measured < 2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_base_are_those_of_its_tensors_tied_ones_once(family: str) -> None:
    model = make_model(family)
    own = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert own <= shape_of(model).num_bytes <= own * 1.1


def test_checkpointing_takes_less_and_a_narrow_type_too() -> None:
    shape = BaseShape(0, hidden=64, intermediate=128, keys=32, num_layers=8, vocabulary=100, element_bytes=4)
    narrow = BaseShape(0, hidden=64, intermediate=128, keys=32, num_layers=8, vocabulary=100, element_bytes=2)
    assert shape.bytes_per_token(checkpointing=True) < shape.bytes_per_token(checkpointing=False) / 3
    assert narrow.bytes_per_token(checkpointing=False) < shape.bytes_per_token(checkpointing=False)


def test_a_limit_bounds_base_banks_and_passes_together() -> None:
    shape = BaseShape(1000, hidden=64, intermediate=128, keys=32, num_layers=8, vocabulary=100, element_bytes=4)
    per_token = shape.bytes_per_token(checkpointing=False)
    memory = Memory(shape, CPU, limit_bytes=1000 + bank_bytes(50) + shape.head_bytes + 10 * per_token)
    assert memory.tokens_that_fit(bank_bytes(50), checkpointing=False) == 10
    assert memory.tokens_that_fit(bank_bytes(50) + 3 * per_token, checkpointing=False) == 7
    assert memory.tokens_that_fit(0, bank_bytes(50), checkpointing=False) == 10
    assert memory.tokens_that_fit(10**12, checkpointing=False) == 0
    assert memory.refuses(bank_bytes(50), 11, checkpointing=False)
    assert not memory.refuses(bank_bytes(50), 10, checkpointing=False)


def test_without_a_limit_the_machine_bounds() -> None:
    shape = shape_of(make_model("llama"))
    assert 0 < Memory(shape, CPU).room(0) < free_bytes(CPU) * 1.5
    assert Memory(shape, CPU).refuses(0, 1 << 50, checkpointing=True)
    assert not Memory(shape, CPU).refuses(0, 1, checkpointing=False)


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 100\n"}, 400),
        ({"memory.max": "1000", "memory.current": "1700", "memory.stat": "anon 5\n"}, 0),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
        (
            {
                "memory/memory.limit_in_bytes": "500",
                "memory/memory.usage_in_bytes": "100",
                "memory/memory.stat": "total_inactive_file 50",
            },
            450,
        ),
        ({}, None),
    ],
)
def test_what_a_container_may_still_take_is_read_from_its_group(tmp_path: Path, files: dict[str, str], room: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _cgroup_room(tmp_path) == room


def test_an_allocator_that_refuses_is_told_from_a_defect() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
