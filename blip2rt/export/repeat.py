"""One block of each kind is traced, and written as often as the stage has it.

Blocks of a kind compute the same with other weights. So the nodes of the first of them are copied for the others, with
the names of their weights, of their part of the cache, and of the residual stream. What a block computes from none of
these (a mask, say) is not copied but shared.
"""

import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import onnx_ir as ir
from torch import nn

from ..stages import StageSpec, TensorSpec

REPEATED = ("blocks", "cross")  # lists of modules: one after the other on the residual stream, and side by side
CACHED = re.compile(r"((?:past|present|cross)_(?:key|value)_)(\d+)")


@dataclass(frozen=True)
class Shortened:
    """A stage with as many blocks as have to be traced.

    `copies` says for each list which of its blocks are copies of which: (copy, original), ...; `cached` is the list
    whose blocks have keys and values among the inputs and outputs.
    """

    module: nn.Module
    spec: StageSpec
    copies: dict[str, list[tuple[int, int]]]
    cached: str


def shorten(module: nn.Module, spec: StageSpec) -> Shortened:
    """Leave out the blocks that are like an earlier one."""
    short = copy(module)
    short._modules = dict(module._modules)
    copies: dict[str, list[tuple[int, int]]] = {}
    cached, length = "", 0
    for name in REPEATED:
        if not hasattr(module, name):
            continue
        blocks = list(getattr(module, name))
        kinds = [(type(block), *((n, p.shape) for n, p in block.named_parameters())) for block in blocks]
        originals = [kinds.index(kind) for kind in kinds]
        cached, length = name, max(originals) + 1
        setattr(short, name, nn.ModuleList(blocks[:length]))
        copies[name] = list(enumerate(originals))[length:]

    def traced(tensor: TensorSpec) -> bool:
        match = CACHED.fullmatch(tensor.name)
        return match is None or int(match[2]) < length

    spec = replace(spec, inputs=tuple(filter(traced, spec.inputs)), outputs=tuple(filter(traced, spec.outputs)))
    return Shortened(short, spec, copies, cached)


def repeat_blocks(graph: ir.Graph, spec: StageSpec, short: Shortened) -> None:
    """Write the copies into the graph of a shortened stage; its inputs and outputs are then those of the whole stage.

    Args:
        graph: inputs, outputs and the residual stream (`hidden_<i>`) have their names; an output that is also the end
            of the residual stream has the name of that.
        spec: of the whole stage.
        short: the stage that was traced.
    """
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs))}
    for name, copies in short.copies.items():
        end = values.get(f"hidden_{copies[0][0]}") if copies else None
        readers = tuple(end.uses()) if end is not None else ()  # what comes behind the last block that was traced
        for new, original in copies:
            renamed = _renaming(name, original, new, with_cache=name == short.cached)
            _copy_block(graph, values, renamed, f"{name}.{new}")
        if end is not None and name == "blocks":
            last = values[f"hidden_{copies[-1][0] + 1}"]
            for use in readers:
                use.node.replace_input_with(use.idx, last)
            graph.outputs[:] = [last if value is end else value for value in graph.outputs]
    own = dict(zip((tensor.name for tensor in short.spec.outputs), graph.outputs, strict=True))
    graph.outputs[:] = [own.get(tensor.name) or values[tensor.name] for tensor in spec.outputs]
    graph.inputs[:] = [values[tensor.name] for tensor in spec.inputs]
    graph.sort()


def _renaming(name: str, original: int, new: int, with_cache: bool) -> Callable[[str], str | None]:
    """What a value of one block is called in another: weights, cache, residual stream; None: as it likes."""
    stream = {f"hidden_{original}": f"hidden_{new}", f"hidden_{original + 1}": f"hidden_{new + 1}"}

    def renamed(value: str) -> str | None:
        cached = CACHED.fullmatch(value)
        if cached and with_cache and int(cached[2]) == original:
            return f"{cached[1]}{new}"
        if value.startswith(f"{name}.{original}."):
            return f"{name}.{new}." + value.removeprefix(f"{name}.{original}.")
        return stream.get(value) if name == "blocks" else None

    return renamed


def _copy_block(
    graph: ir.Graph, values: dict[str | None, ir.Value], renamed: Callable[[str], str | None], block: str
) -> None:
    """Copy the nodes between the values of a block that have a name; `values` learns the copies."""
    named = {old: new for old in map(str, values) if (new := renamed(old))}
    copied: dict[ir.Value, ir.Value] = {}
    for old, new in named.items():
        original = values[old]
        if original.producer() is None:  # a weight, or what was read of the cache
            fresh = ir.Value(name=new, shape=original.shape, type=original.type)
            if original.is_initializer():
                graph.initializers[new] = fresh
            copied[original] = values[new] = fresh
        elif new in values:  # the residual stream, as the last block left it
            copied[original] = values[new]
    ends = [values[old] for old in named if values[old] not in copied]
    for node in _nodes_between(set(copied), ends, graph):
        if not any(value in copied for value in node.inputs):
            continue
        outputs = []
        for value in node.outputs:
            name = renamed(str(value.name)) or f"{value.name}_{block}"
            outputs.append(ir.Value(name=name, shape=value.shape, type=value.type))
        inputs = [None if value is None else copied.get(value, value) for value in node.inputs]
        graph.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                outputs=outputs,
                version=node.version,
                name=f"{node.name}_{block}",
            )
        )
        copied |= dict(zip(node.outputs, outputs, strict=True))
    values |= {copied[end].name: copied[end] for end in ends}


def _nodes_between(starts: set[ir.Value], ends: list[ir.Value], graph: ir.Graph) -> list[ir.Node]:
    """What the ends are computed by, not going back behind the starts; in the order of the graph."""
    found: set[ir.Node] = set()
    pending = list(ends)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or node in found or value in starts:
            continue
        found.add(node)
        pending += [v for v in node.inputs if v is not None]
    return [node for node in graph if node in found]
