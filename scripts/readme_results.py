"""Tables and passages of the README and docs/ that follow from what scripts measured and stored."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from scripts.bench.rivals_table import markdown
from scripts.provenance import source_line

SCRIPTS = Path(__file__).parent
SPEED_CASES = {
    "a": "Gemma 3 270M, completions, batch 8",
    "b": "SmolLM2 135M, text, batch 8",
    "c": "4-bit Llama of 1.3M parameters, completions, batch 8",
    "d": "Gemma 3 270M, rows of 2,048 tokens, batch 1",
}


GGUF_LEGEND = """\
Smaller is better in every column. *Base*, *base + LoRA* and *merged*: the largest difference of a logit between
llama.cpp and this package, divided by the standard deviation of the logits, for the model alone, with the exported
adapter, and merged with it. *KL*: how far the probabilities of a file of that type are from those of the full-precision
file, in nats. *Exact GELU*: the difference where the lookup table of llama.cpp plays no part; only for models with GELU."""
FUSE_LEGEND = """\
*Bits*: the width of the fused weights. *Change*: its norm, as a percentage of the norm of the weights. *Stock* rounds
each weight to the nearest value, as `mlx_lm.fuse` does; *ours* is `mlx_loraplus.fuse`; *dropped* is the base without
the change. *Cosine*: between the change that was wanted and the one that the fused layer has, of its weights or of its
outputs; 1 is best. *KL*: how far the next-token probabilities are from those of base + adapter, in nats per token; 0 is
best. *Elsewhere*: on unrelated prose."""

FULL_LEGEND = """\
Embeddings and the last norm are frozen, because `mlx_lm.lora` does not train them. *Rows*: in a batch. *s/step*:
seconds for a step, and *peak*: the highest memory of the run; lower is better. *Largest difference*: of the training
losses of both, relative to the loss; it should be rounding alone."""

STEP_LEGEND = """\
*s/step*: seconds of the fastest step, on one core of a CPU. *z₀*: those that estimate it. *Peak*: the highest memory of
a step, without the weights. *To sft*: the column before it, divided by that of `sft`, which learns the same answers as
examples of their own. Lower is better. Half of the tokens of a row are supervised."""


def demo_part() -> str:
    """Return what the demo did, from scripts/demo --publish: its picture, its time and its answers."""
    result = _result("study", "demo")
    (first, last), (before, after) = result["losses"], result["exact"]
    rows, example = result["rows"], result["example"]
    return f"""\
![Loss of the demo run: it falls from {first:.2f} to {last:.2f} in {result["steps"]} steps](.github/images/demo-loss.png)

This is the demo, on two CPU cores in {result["seconds"] / 60:.1f} minutes. It teaches Gemma 3 270M to turn requests into
JSON:

```text
{example["prompt"].splitlines()[0]}
  before: {example["before"][:70]!r}
  after:  {example["after"]!r}

exact answers: {before} of {rows} before ({before / rows:.0%}), {after} of {rows} after ({after / rows:.0%})
```
"""


def memory_accuracy() -> str:
    """Return how close the memory plan was, as scripts/study/memory_grid measured it."""
    rows = [row for row in _result("study", "grid")["rows"] if row["held_out"]]
    ratios = [row["foretold"] / row["peak"] for row in rows]
    near = sum(0.9 <= ratio <= 1.15 for ratio in ratios) / len(ratios)
    return f"""\
Expect the real peak to be within about 15% of the plan. In {len(rows)} training steps of small models that were not used to
make the formulas, the predicted peak was {min(ratios):.2f} to {max(ratios):.2f} times the real one, and in {near:.0%} of them 0.90 to 1.15 times.
"""


def fuse_table() -> str:
    """Return how much of a change stock's rounding and ours keep, from scripts/study/fuse_rounding."""
    result = _result("study", "rounding")
    rows: dict[tuple[int, float], dict[str, dict[str, float]]] = {}
    for row in result["results"]:
        rows.setdefault((row["bits"], row["ratio"]), {})[row["method"]] = row

    lines = [
        "| bits | change | weights' cosine: stock | ours | outputs' cosine: stock | ours | KL: dropped"
        " | KL: stock | ours | KL elsewhere: stock | ours |",
        "|--:" * 11 + "|",
    ]
    for (bits, ratio), methods in sorted(rows.items()):
        drop, stock, ours = (methods[name] for name in ("drop", "stock", "gptq"))
        values = [
            stock["cosine"], ours["cosine"], stock["output_cosine"], ours["output_cosine"],
            drop["kl"], stock["kl"], ours["kl"], stock["kl_elsewhere"], ours["kl_elsewhere"],
        ]  # fmt: skip
        cells = [str(bits), f"{ratio:.1%}", *(f"{value:.3f}" for value in values)]
        lines.append(f"| {' | '.join(cells)} |")

    source = (
        f"{result['machine']['cpu']}; mlx {result['versions']['mlx']}; {result['commit']},"
        f" {result['date']}"
    )
    return "\n".join([*lines, "", FUSE_LEGEND, "", f"`scripts/study/fuse_rounding`: {source}.\n"])


def speed_table() -> str:
    """Return speed and memory beside stock's, a line for each case of scripts/bench/run."""
    lines = [
        "| model and data | stock, tokens/s | ours, tokens/s | ours / stock | stock, memory | ours, memory | ours / stock |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, title in SPEED_CASES.items():
        medians = _result("bench", case)["medians"]
        stock, ours = medians["stock"], medians["ours"]
        speed = ours["useful_per_second"] / stock["useful_per_second"]
        memory = ours["peak_above_weights"] / stock["peak_above_weights"]
        lines.append(
            f"| {title} | {stock['useful_per_second']:.0f} | {ours['useful_per_second']:.0f}"
            f" | {speed:.1f}x | {stock['peak_above_weights'] / 1e9:.2f} GB"
            f" | {ours['peak_above_weights'] / 1e9:.2f} GB | {memory:.2f}x |"
        )
    legend = (
        "*Tokens/s*: input tokens that are not padding, for each second of training; higher is better. *Memory*: the peak of"
        " a step\nwithout the weights; lower is better."
    )
    return "\n".join([*lines, "", legend]) + "\n"


def gguf_table() -> str:
    """Return how llama.cpp judged each architecture, as scripts/judges/check_gguf_families stored it."""
    lines = [
        "| tiny model | base | base + LoRA | merged | KL of q8_0 | KL of q5_1 | KL of q4_1 | exact GELU |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    result = _result("judges", "gguf_families")
    for name, judged in result["families"].items():
        errors = " | ".join(f"{judged[row]['error']:.0e}" for row in ("base", "lora", "merged"))
        losses = " | ".join(f"{judged[row]['kl']:.4f}" for row in ("q8_0", "q5_1", "q4_1"))
        exact = f"{judged['saturated']['error']:.0e}" if "saturated" in judged else ""
        lines.append(f"| {name} | {errors} | {losses} | {exact} |")

    versions = result["versions"]
    judge = f"llama.cpp {versions['llama.cpp']} of node-llama-cpp {versions['node-llama-cpp']}"
    lines += ["", GGUF_LEGEND, "", f"The judge was {judge}, on {result['date']}."]
    return "\n".join(lines) + "\n"


def gguf_types_table() -> str:
    """Return what the types of a merged GGUF lose, as scripts/judges/gguf_types measured it."""
    result = _result("judges", "gguf_types")
    lines = [
        "| model | type | KL in nats | same next token | perplexity |",
        "|---|---|--:|--:|--:|",
    ]
    for title, kinds in result["models"].items():
        lines += [
            f"| {title} | {kind} | {found['kl']:.5f} | {found['same']:.1%} | x {found['perplexity']:.3f} |"
            for kind, found in kinds.items()
        ]
    legend = (
        "Each is compared with the unquantized model. *KL*: of the next-token probabilities; 0 is best. *Same next"
        " token*:\nhow often the most likely token is the same; 100% is best. *Perplexity*: as a multiple of that of"
        " the unquantized\nmodel; 1 is best."
    )
    return "\n".join([*lines, "", legend]) + "\n"


def tool_calls_table() -> str:
    """Return what scripts/judges/tool_calls found with each full chat template."""
    lines = ["| template | outcome | thoughts | the call is read with |", "|---|---|---|---|"]
    for name, found in _result("judges", "tool_calls")["templates"].items():
        kept = found.get("written", found)
        outcome = found["outcome"]
        if "written" in found:
            outcome = f"refused; {kept['outcome']} with the call in the content"
        cells = [outcome, kept.get("thoughts", ""), kept.get("parser", "")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def experts_table() -> str:
    """Return what adapters on attention and on experts learned, as scripts/study/experts stored it."""
    titles = {
        "attention": "attention alone",
        "attention, wide": "attention alone",
        "experts": "experts alone",
        "all linear layers": "all linear layers",
    }
    rows = _result("study", "experts")["rows"]
    lines = [
        "| model | adapters on | rank | trainable parameters | correct answers, rule | correct answers, facts |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for mixture, (targets, title) in product(
        dict.fromkeys(row["mixture"] for row in rows), titles.items()
    ):
        found = [row for row in rows if (row["mixture"], row["targets"]) == (mixture, targets)]
        rights = [
            ", ".join(f"{row['right']:.0%}" for row in found if row["task"] == task)
            for task in ("rule", "facts")
        ]
        size = f"{found[0]['rank']} | {found[0]['parameters']:,}"
        lines.append(f"| {mixture} | {title} | {size} | {' | '.join(rights)} |")
    return (
        "\n".join([*lines, "", "A cell has one percentage for each seed; higher is better."]) + "\n"
    )


def launches_table() -> str:
    """Return the launches of a step on a GPU, as scripts/bench/launches counts them."""
    result = _result("bench", "launches")
    lines = [
        "| model | rows | tokens per row | launches, mlx_lm | launches, ours | ours / mlx_lm |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['model']} | {row['rows']} | {row['length']:,} | {row['stock']:,}"
        f" | {row['ours']:,} | {row['ours'] / row['stock']:.2f}x |"
        for row in result["counts"]
    ]
    versions = result["versions"]
    source = f"mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']} at {result['commit']}"
    legend = "*Launches*: kernels that the GPU starts for one training step; fewer is better."
    source = f"`scripts/bench/launches`: {source}; {result['date']}."
    return "\n".join([*lines, "", legend, source, ""])


def rivals_tables() -> str:
    """Return how other trainers for MLX compare, as scripts/bench/rivals measured it."""
    if not (SCRIPTS / "bench" / "results" / "rivals.json").exists():
        return "Not measured yet: run `scripts/bench/rivals --data FOLDER`.\n"
    return markdown(_result("bench", "rivals"))


def full_tables() -> str:
    """Return how training all weights compares, as scripts/bench/full measures it."""
    result = _result("bench", "full")
    lines = [
        "| weights | rows | steps | s/step, mlx_lm | ours | ours / mlx_lm | peak, mlx_lm | ours | ours / mlx_lm | largest difference of a loss |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for dtype, both in result["training"].items():
        stock, ours = both["stock"], both["ours"]
        times = [min(each["seconds"], default=math.nan) for each in (stock, ours)]
        peaks = [each["peak_bytes"] / 1e6 for each in (stock, ours)]
        pairs = zip(stock["losses"], ours["losses"], strict=True)
        off = max(abs(one - other) / one for one, other in pairs)
        speed = f"{times[0]:.2f} | {times[1]:.2f} | {times[1] / times[0]:.2f}x"
        if math.isnan(times[0]):
            speed = "- | - | -"
        lines.append(
            f"| {dtype} | {both['rows']} | {len(ours['losses'])} | {speed}"
            f" | {peaks[0]:,.0f} MB | {peaks[1]:,.0f} MB | {peaks[1] / peaks[0]:.2f}x | {off:.1e} |"
        )

    rounding = result["rounding"]
    before = next(iter(rounding.values()))[0]
    lines += [
        "",
        f"{result['model']}: the weights of all blocks, trained by `mlx_lm.lora` and here at η = {result['rate']:g}.",
        FULL_LEGEND,
        "",
        "The next table shows what is lost if bfloat16 weights are rounded at every step, and how much of it the"
        f" compensation of\nthis package gets back. Every weight trains here, for {result['steps']} steps at the"
        " same η. Lower is better; before training,\nthe held-out loss was"
        f" {before:.4f} nats per token.",
        "",
        "| the weights are kept in | held-out loss after |",
        "|---|--:|",
    ]
    lines += [f"| {kept} | {after:.4f} |" for kept, (_, after) in rounding.items()]
    cpu, versions = result["machine"]["cpu"], result["versions"]
    source = f"{cpu}; mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']} at {result['commit']}"
    return "\n".join([*lines, "", f"`scripts/bench/full`: {source}; {result['date']}.\n"])


def preference_steps_table() -> str:
    """Return what a step of each objective takes, as scripts/bench/preferences measured it."""
    if not (SCRIPTS / "bench" / "results" / "preferences.json").exists():
        return "Not measured yet: run `scripts/bench/preferences`.\n"
    result = _result("bench", "preferences")
    lines = ["| objective | s/step | to sft | z₀ | peak | to sft |", "|---|--:|--:|--:|--:|--:|"]
    plain = result["objectives"]["sft"]
    for name, found in result["objectives"].items():
        time = found["seconds"] / plain["seconds"]
        memory = found["peak_bytes"] / plain["peak_bytes"]
        estimate = f"{found['kl_seconds']:.2f}" if name == "kto" else ""
        lines.append(
            f"| {name} | {found['seconds']:.2f} | {time:.2f}x | {estimate}"
            f" | {found['peak_bytes'] / 1e6:,.0f} MB | {memory:.2f}x |"
        )
    size = f"{result['model']}, {result['pairs']} pairs, rows of {result['length']} tokens."
    return "\n".join([*lines, "", STEP_LEGEND, "", size, source_line(result), ""])


def _result(room: str, name: str) -> dict[str, Any]:
    """Return what a script measured."""
    file = SCRIPTS / room / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))
