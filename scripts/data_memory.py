"""Read a file of many rows as a run does, into a cache of its own; print the processor time and the memory it took.

python scripts/data_memory.py --rows 2000000
"""

import mlx_loraplus  # noqa: F401, I001  before mlx

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import mlx.core  # noqa: F401  counted in the memory at the start, as in a run
from mlx_lm.utils import load_tokenizer

from mlx_loraplus.config import RunConfig, configure
from mlx_loraplus.data.examples import load_data
from mlx_loraplus.data.packing import plan_batches
from mlx_loraplus.models.names import find_model

TEXT = "the light in a kitchen is on and off while some rain falls over nine green hills near our old house"
WORDS = TEXT.split()


def write_rows(path: Path, rows: int) -> None:
    """Write seeded completion rows of 10 to 60 words."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = " ".join(chance.choices(WORDS, k=chance.randint(5, 30)))
            answer = " ".join(chance.choices(WORDS, k=chance.randint(5, 30)))
            file.write(json.dumps({"prompt": f"{number}: {prompt}", "completion": f" {answer}"}) + "\n")


def memory() -> dict[str, float]:
    """Return this process's memory in MB: anonymous now, and the peak with pages of files."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status if line.endswith("kB")}
    return {"anonymous": fields["RssAnon"], "peak": fields["VmHWM"]}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--batches", type=int, default=10_000, help="to read afterwards")
    options = parser.parse_args()
    tokenizer = load_tokenizer(find_model(options.model).path)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_LORAPLUS_CACHE"] = folder
        path = Path(folder) / "train.jsonl"
        write_rows(path, options.rows)
        config = configure(RunConfig, {"data": str(path), "max_seq_length": 128, "pack": options.pack})
        start = memory()
        print(f"{options.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB; before: {start}")
        for turn in ("encoded", "from the cache"):
            began = time.process_time()
            examples = load_data(config, tokenizer, "train").examples["train"]
            seconds = time.process_time() - began
            print(
                f"{turn}: {seconds:.1f} s, {options.rows / seconds:,.0f} rows/s; {len(examples):,} examples; {memory()}"
            )
        size = sum(file.stat().st_size for file in (Path(folder) / "tokens").rglob("*") if file.is_file())
        print(f"cache: {size / 1e6:,.0f} MB")
        began = time.process_time()
        batches = plan_batches(examples, config.data, config.seed)
        print(f"batches planned: {time.process_time() - began:.1f} s; {memory()}")
        began = time.process_time()
        first = batches[0]
        print(f"first batch: {time.process_time() - began:.1f} s; {first.tokens.shape}")
        began = time.process_time()
        read = min(options.batches, batches.per_epoch)
        tokens = sum(batches[n].useful for n in range(read))
        print(f"{read:,} batches: {time.process_time() - began:.1f} s, {tokens:,} tokens; {memory()}")


if __name__ == "__main__":
    main()
