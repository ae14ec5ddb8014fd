"""The types of the keywords: generated from the settings, and checked by a type checker."""

import json
import subprocess
import sys
from pathlib import Path

from mlx_loraplus import keyword_types
from mlx_loraplus.command_config import SweepConfig
from mlx_loraplus.config import TrainConfig
from mlx_loraplus.settings import setting_names

ROOT = Path(__file__).parent.parent

RIGHT = """
import mlx_loraplus as ml
from pathlib import Path

model, tokenizer = ml.load("tiny")
rows = [{"prompt": "a", "completion": "b"}]
ml.finetune(model, tokenizer, data=rows, lr_ratio=16, batch_size="auto", resume=True)
ml.finetune(model, tokenizer, data=Path("rows.jsonl"), grad_checkpoint=True, fields={"prompt": "q"})
ml.finetune(model, tokenizer, data={"train": rows, "valid": iter(rows)}, target_modules=["q_proj"])
ml.evaluate(model, tokenizer, split="test", data=(row for row in rows))
ml.preview(rows, model="tiny", max_seq_length=64)
ml.sweep_rates(model, tokenizer, data=rows, lr_ratios=[1, 4])
ml.plan_memory("tiny", rank=4)
ml.attach_adapters(model, ml.AdapterConfig(rank=8))
"""
WRONG = (
    "ml.finetune(model, tokenizer, lr_ration=16)",
    'ml.finetune(model, tokenizer, rank="8")',
    'ml.finetune(model, tokenizer, adapter="lorra")',
    "ml.finetune(model, tokenizer, data=5)",
    "ml.evaluate(model, tokenizer, data=None)",
    "ml.preview(rows, epochs=[1])",
    "ml.sweep_rates(model, tokenizer, epochs=1)",
    'ml.plan_memory(rank="4")',
)


def test_the_options_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "options.py"), "--check"]
    subprocess.run(command, check=True)
    assert set(keyword_types.TrainOptions.__annotations__) == set(setting_names(TrainConfig))
    assert set(keyword_types.SweepOptions.__annotations__) == set(setting_names(SweepConfig))
    for kind, missing in (
        (keyword_types.PreviewOptions, "data"),
        (keyword_types.PlanOptions, "model"),
    ):
        assert set(kind.__annotations__) == set(setting_names(TrainConfig)) - {missing}


def test_a_type_checker_accepts_right_keywords_and_refuses_wrong_ones(tmp_path: Path):
    (tmp_path / "notebook.py").write_text(RIGHT + "\n".join(WRONG))
    settings = {
        "include": ["notebook.py"],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = Path(sys.executable).with_name("pyright")
    done = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [
        problem["range"]["start"]["line"]
        for problem in json.loads(done.stdout)["generalDiagnostics"]
    ]
    first = RIGHT.count("\n")
    assert sorted(set(lines)) == list(range(first, first + len(WRONG)))
