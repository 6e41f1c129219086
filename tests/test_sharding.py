"""A model in slices: what each of two processes holds, and that it comes together again bit by bit."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from two_processes import in_two_processes

from blip2rt.model.config import OPTConfig
from blip2rt.model.opt import OPT
from blip2rt.training.sharding import bring_together, full, shard, spread
from blip2rt.training.tasks import Language, Task

SIZES = OPTConfig(vocab_size=37, hidden_size=24, ffn_dim=50, num_hidden_layers=3, num_attention_heads=4)


def language_model() -> Task:
    torch.manual_seed(3)
    return Language(OPT(SIZES))


def held(task: Task) -> int:
    """Numbers of the task that lie in this process."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in task.parameters())


def in_slices(rank: int) -> dict[str, Tensor]:
    """What one of two processes sees on the way."""
    task = language_model()
    total = held(task)
    shard(task, torch.device("cpu"))
    share = held(task) / total
    row = next(p.detach() for p in task.parameters() if p.shape[0] == 50)
    again = spread(full(row), row)
    assert isinstance(row, DTensor)
    assert isinstance(again, DTensor)
    is_same = torch.equal(again.to_local(), row.to_local())
    bring_together(task, keep=rank == 0)
    whole = {name: p.detach() for name, p in task.model.named_parameters()} if rank == 0 else {}
    return {"share": torch.tensor(share), "is_same": torch.tensor(is_same), "held": torch.tensor(held(task)), **whole}


def test_each_process_holds_half_and_the_first_gets_all_of_it(tmp_path: Path) -> None:
    first, second = in_two_processes(__file__, "in_slices", tmp_path)
    expected = dict(language_model().model.named_parameters())
    for result in (first, second):
        assert 0.45 < float(result.pop("share")) < 0.55
        assert result.pop("is_same")
    assert second == {"held": 0}
    assert first.pop("held") == sum(p.numel() for p in expected.values())
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], value), name
