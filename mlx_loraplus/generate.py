"""mlx_loraplus.generate: one answer, streamed, with or without an adapter."""

import sys
from collections.abc import Sequence

from .arguments import command
from .config import GenerateConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Let a model answer a prompt."""
    with command("mlx_loraplus.generate", GenerateConfig, arguments) as (config, _):
        import mlx.core as mx

        from .inference.generate import load, stream

        model, tokenizer = load(config.model, config.adapter_path)
        mx.random.seed(config.seed)
        prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
        for piece in stream(
            model, tokenizer, prompt, max_tokens=config.max_tokens, temperature=config.temperature, chat=config.chat
        ):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
