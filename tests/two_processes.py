"""A function of a test file in two processes at once, which gloo joins: `python two_processes.py FILE FUNCTION ...`."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_two_processes(file: str, function: str, folder: Path) -> list[Any]:
    """What `function(rank)` of a file gives in each of them: tensors in lists, tuples and dictionaries."""
    processes = [
        subprocess.Popen([sys.executable, __file__, file, function, str(folder), str(rank)]) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in range(2)]


def main() -> None:
    file, function, folder, rank = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    spec = spec_from_file_location("test_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(getattr(module, function)(rank), folder / f"result.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
