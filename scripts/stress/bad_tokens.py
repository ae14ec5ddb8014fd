"""Tokens that the model cannot hold, numbers that are not finite, and examples longer than the context."""

from scripts.stress.bad_inputs import Case

TRAIN = "train --iters 2 --batch-size 2 --max-seq-length 64 --adapter-path run --data"
PLAIN = [
    {"prompt": f"What comes after {number}?", "completion": f"{number + 1}."}
    for number in range(12)
]
LATE = [*PLAIN, {"prompt": "Call it", "completion": "<call> now"}]
CHAT = [
    {"messages": [
        {"role": "user", "content": f"What comes after {number}?"},
        {"role": "assistant", "content": f"{number + 1}."},
    ]}
    for number in range(12)
]  # fmt: skip
PAIR = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No <call>."}
    for row in PLAIN
]
LONG = [{"prompt": "Count", "completion": " ".join(map(str, range(number, number + 20)))}
        for number in range(12)]  # fmt: skip
OUTSIDE = ("'<call>'", "49152", "49,152")

CASES = [
    Case("tokens: an added token in the last row", f"{TRAIN} rows.jsonl --model ../models/added-token",
         {"rows.jsonl": LATE}, shows=OUTSIDE),
    Case("tokens: an added token in a rejected answer",
         f"{TRAIN} rows.jsonl --objective dpo --model ../models/added-token",
         {"rows.jsonl": PAIR}, shows=OUTSIDE),
    Case("tokens: an added token that every chat begins with",
         f"{TRAIN} rows.jsonl --model ../models/added-in-template", {"rows.jsonl": CHAT}, shows=("'<|turn|>'", "49152")),
    Case("tokens: an added token in the validation file alone",
         f"{TRAIN} data --model ../models/added-token",
         {"data/train.jsonl": PLAIN, "data/valid.jsonl": LATE}, shows=OUTSIDE),
    Case("tokens: an added token in packed text", f"{TRAIN} data --pack --model ../models/added-token",
         {"data/train.txt": "One line.\n\nAnother line.\n\nThen <call> it.\n"}, shows=OUTSIDE),
    Case("tokens: an added token, dry run", f"{TRAIN} rows.jsonl --dry-run --model ../models/added-token",
         {"rows.jsonl": LATE}, shows=OUTSIDE),
    Case("tokens: an added token, sweep",
         "sweep --data rows.jsonl --iters 3 --max-seq-length 64 --adapter-path run --model ../models/added-token",
         {"rows.jsonl": LATE}, shows=OUTSIDE),
    Case("tokens: an added token, evaluation of a run",
         """
         train --iters 1 --batch-size 2 --max-seq-length 64 --adapter-path trained --data plain.jsonl --model ../models/added-token
         train --test --adapter-path trained --data data
         """, {"data/test.jsonl": LATE, "data/train.jsonl": PLAIN, "plain.jsonl": PLAIN}, shows=OUTSIDE),
    Case("tokens: an added token in a sample prompt",
         f"{TRAIN} rows.jsonl --prompts 'Please <call> me' --model ../models/added-token",
         {"rows.jsonl": PLAIN}, shows=OUTSIDE),
    Case("tokens: an added token in a sample prompt, dry run",
         f"{TRAIN} rows.jsonl --dry-run --prompts 'Please <call> me' --model ../models/added-token",
         {"rows.jsonl": PLAIN}, shows=OUTSIDE),
    Case("tokens: the tokenizer of another model, dry run", f"{TRAIN} rows.jsonl --dry-run --model ../models/wrong-tokenizer",
         {"rows.jsonl": [{"prompt": "The capital of France is", "completion": " the"}] * 4}, shows=("262,144", "49,152")),
    Case("tokens: the tokenizer of another model, all used tokens exist", f"{TRAIN} rows.jsonl --model ../models/wrong-tokenizer",
         {"rows.jsonl": [{"prompt": "The capital of France is", "completion": " the"}] * 4}, shows=("262,144", "49,152")),
    Case("tokens: an added token, generate", "generate --prompt 'Please <call> me' --model ../models/added-token",
         shows=OUTSIDE),
    Case("tokens: an added token, generate from standard input",
         "generate --no-chat --prompt - --model ../models/added-token", stdin="Please <call> me", shows=OUTSIDE),
    Case("tokens: an added token, generate with a system prompt",
         "generate --system 'You <call>.' --model ../models/added-token", shows=OUTSIDE),
    Case("tokens: an added token, chat", "chat --max-tokens 2 --model ../models/added-token",
         stdin="Please <call> me\n", shows=OUTSIDE, code=0),
    Case("tokens: the tokenizer of another model", f"{TRAIN} rows.jsonl --model ../models/wrong-tokenizer",
         {"rows.jsonl": PLAIN}, shows=("49,152",)),
    Case("tokens: the tokenizer of another model, generate",
         "generate --model ../models/wrong-tokenizer", shows=("49,152",)),
    Case("tokens: an infinite weight", f"{TRAIN} rows.jsonl --model ../models/infinite-norm", {"rows.jsonl": PLAIN},
         shows=("NaN instead of logits",)),
    Case("tokens: an infinite weight, with accumulation", f"{TRAIN} rows.jsonl --grad-accumulation-steps 2 --model ../models/infinite-norm",
         {"rows.jsonl": CHAT}, shows=("NaN instead of logits",)),
    Case("tokens: NaN in the embedding", f"{TRAIN} rows.jsonl --adapter dora --model ../models/nan-embedding",
         {"rows.jsonl": PLAIN}, shows=("NaN instead of logits",)),
    Case("tokens: NaN in the embedding, generate", "generate --model ../models/nan-embedding", shows=("NaN instead of probabilities",)),
    Case("tokens: rows longer than the context", f"{TRAIN} rows.jsonl --model ../models/short-context",
         {"rows.jsonl": LONG}, code=0, shows=("context of 32 tokens",)),
    Case("tokens: rows longer than Gemma's context", f"{TRAIN} rows.jsonl --dry-run --model ../models/short-gemma",
         {"rows.jsonl": LONG}, code=0, shows=("context of 32 tokens",)),
    Case("tokens: rows longer than a table of positions", f"{TRAIN} rows.jsonl --model ../models/gpt2",
         {"rows.jsonl": LONG}, shows=("32 learned positions",)),
    Case("tokens: packed rows longer than a table of positions",
         f"{TRAIN} rows.jsonl --pack --model ../models/gpt2", {"rows.jsonl": [{"text": "a b c d"}] * 40}),
    Case("tokens: a prompt longer than a table of positions",
         f"generate --prompt '{'word ' * 40}' --model ../models/gpt2", shows=("32 learned positions",)),
]  # fmt: skip
