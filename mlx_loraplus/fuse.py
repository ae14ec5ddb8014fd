"""mlx_loraplus.fuse: an adapter folded into its base."""

from collections.abc import Sequence

from .commandline import Switches, parse, print_config, run, tell
from .config import FuseConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Fold an adapter into its base and write a folder that stock mlx_lm loads."""
    run(_fuse, arguments)


def _fuse(arguments: Sequence[str]) -> None:
    config, switches = parse(FuseConfig, Switches, arguments, prog="mlx_loraplus.fuse")
    if switches.print_config:
        print_config(config)
        return
    from .adapters.storage import load_adapter
    from .export.fused import check_save_path, fuse_adapter, save_fused
    from .models.loading import load_folder
    from .models.names import find_model

    check_save_path(config)
    source = find_model(config.model)
    if source.note:
        tell(source.note)
    model, tokenizer, base_config = load_folder(source.path)
    load_adapter(model, config.adapter_path)
    fuse_adapter(model, dequantize=config.dequantize, bits=config.bits)
    size = save_fused(model, tokenizer, base_config, source.path, config)
    tell(f"fused {config.adapter_path} into {config.model}: {config.save_path}, {size / 1e9:.2f} GB")
    tell(f"try it: mlx_loraplus.generate --model {config.save_path} --prompt '...'")


if __name__ == "__main__":
    main()
