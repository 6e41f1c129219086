"""results/*.json -> the table of the README, between its two `figures` marks.

python benchmarks/report.py            prints it
python benchmarks/report.py --write    puts it into README.md
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's table of figures, from benchmarks/results.")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    arguments = parser.parse_args(argv)
    table = figures()
    if arguments.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table + END + rest.partition(END)[2])
    else:
        print(table, end="")
    return 0


def figures() -> str:
    """Markdown of all figures."""
    parts = (
        full_size(load("full-size-opt-2.7b")),
        other_processor(load("full-size-opt-6.7b-avx2")),
        openvino(load("openvino-opt-2.7b")),
        linears(load("linears")),
        tree_cache(load("tree-cache")),
    )
    return "\n".join(parts)


def full_size(result: dict[str, Any]) -> str:
    """The whole of OPT-2.7B beside transformers."""
    parameters, machine, theirs = result["parameters"], result["machine"], result["transformers"]
    rows = []
    for precision, engine in result["engines"].items():
        caption, built, same = engine["caption"], engine["export"], engine["tokens_as_transformers"]
        rows.append(
            f"| blip2rt, {precision} | {caption['seconds']:.1f} s | {caption['peak_gb']:.1f} GB "
            f"| {engine['transformers_bf16_over_ours']:.1f} x | {engine['transformers_fp32_over_ours']:.1f} x "
            f"| {same} of {len(caption['token_ids'])} | {built['seconds']:.0f} s, {built['peak_gb']:.1f} GB "
            f"| {built['engine_gb']:.1f} GB |"
        )
    for precision, peer in theirs.items():
        seconds = peer["seconds"]
        rows.append(
            f"| transformers {result['versions']['transformers']}, {precision}, eager | {seconds:.1f} s "
            f"| {peer['peak_gb']:.1f} GB | {theirs['bf16']['seconds'] / seconds:.1f} x "
            f"| {theirs['fp32']['seconds'] / seconds:.1f} x | | | |"
        )
    return "\n".join(
        (
            f"BLIP-2 OPT-2.7B at full size, random weights, {parameters / 1e6:,.2f} M parameters: {result['task']},",
            f"{machine['cores']} cores of {machine['cpu']}, {machine['kernels']} kernels (`{result['command']}`):",
            "",
            "| | one caption | memory | faster than bf16 | than fp32 | same tokens | export (time, memory) | size |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            *(line for precision, engine in result["engines"].items() for line in floors(precision, engine)),
        )
    )


def other_processor(result: dict[str, Any]) -> str:
    """A larger model, on a processor without AVX-512."""
    machine, engine = result["machine"], result["engines"]["int4"]
    caption, built, over = engine["caption"], engine["export"], engine["over_floor"]
    return "\n".join(
        (
            f"OPT-6.7B, {result['parameters'] / 1e6:,.2f} M parameters, the same task on an older processor,",
            f"{machine['cores']} cores of {machine['cpu']} without AVX-512, {machine['kernels']} kernels",
            f"(`{result['command']}`):",
            f"blip2rt int4 takes {caption['seconds']:.1f} s and {caption['peak_gb']:.1f} GB a caption "
            f"({over['whole']:.2f} x its floor) and {built['seconds'] / 60:.0f} minutes",
            f"and {built['peak_gb']:.1f} GB to export; the engine is {built['engine_gb']:.1f} GB.",
            "",
        )
    )


def floors(precision: str, engine: dict[str, Any]) -> list[str]:
    """How far an engine is from what the machine allows, where that was measured."""
    if "floors" not in engine:
        return []
    rates, over = engine["floors"], {name.replace("_", " "): ratio for name, ratio in engine["over_floor"].items()}
    over_floor = ", ".join(f"{name} {ratio:.2f} x" for name, ratio in over.items() if name != "qformer")
    batches = ", ".join(
        f"{name.replace('1 beams', 'greedy')} {figures['seconds']:.2f} s ({figures['over_floor']:.2f} x)"
        for name, figures in engine.get("batches", {}).items()
        if name != "peak_gb"
    )
    return [
        f"{precision}, over its floor (weights at {rates['read_gb_per_s']:.0f} GB/s, 8-bit products at "
        f"{rates['int8_gop_per_s']:.0f} GOP/s, both measured in the same run): {over_floor}.",
        *([f"In batches, a picture: {batches}."] if batches else []),
        "",
    ]


def openvino(result: dict[str, Any]) -> str:
    """Our int4 engine beside OpenVINO's."""
    version, rows = result["versions"]["openvino"].partition("-")[0], []
    for name, figures in result["figures"].items():
        ours, theirs = figures["blip2rt"], figures["openvino"]
        name = name.replace("1 pictures", "1 picture").replace("1 beams", "greedy")
        rows.append(
            f"| {name} | {ours['seconds']:.2f} s | {theirs['seconds']:.2f} s | {figures['ratio']:.2f} x "
            f"| {ours['peak_gb']:.1f} GB | {theirs['peak_gb']:.1f} GB |"
        )
    return "\n".join(
        (
            f"The same model beside OpenVINO {version}, whose parts were built by hand;",
            f"{result['task']} (`{result['command']}`):",
            "",
            "| | blip2rt | OpenVINO | as fast | memory | theirs |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        )
    )


def linears(result: dict[str, Any]) -> str:
    """A linear layer in every form."""
    times, errors, machine = result["milliseconds"], result["relative_error"], result["machine"]
    rows = next(iter(times.values())).keys()
    return "\n".join(
        (
            f"{result['task'][0].upper()}{result['task'][1:]}, on",
            f"{machine['cpu']} with the {machine['path']} path of the native kernels (`{result['command']}`):",
            "",
            "| ms | " + " | ".join(f"{count} row{'s' if count != '1' else ''}" for count in rows) + " | error |",
            "|---|" + "---|" * (len(rows) + 1),
            *(
                f"| {name} | " + " | ".join(f"{times[name][count]:.1f}" for count in rows) + f" | {errors[name]:.1e} |"
                for name in times
            ),
            "",
        )
    )


def tree_cache(result: dict[str, Any]) -> str:
    """Beams as a tree against a cache for every beam."""
    bare, moving = result["tree_over_per_beam"], result["tree_over_per_beam_reorder"]
    return "\n".join(
        (
            "A step of the beam tree over a step with a cache for every beam: the same ops in the same run,",
            f"{result['task']}, layers of OPT-2.7B's size (`{result['command']}`):",
            f"{bare['shared']:.2f} x where beams share ancestors ({moving['shared']:.2f} x with the copies that",
            f"changing places costs there), {bare['diverged']:.2f} x where they share none.",
            "",
        )
    )


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    result: dict[str, Any] = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
