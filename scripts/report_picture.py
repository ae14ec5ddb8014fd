r"""Photograph the page of a run, as in the README: ``report_picture.py RUN [PICTURE]``.

The README's picture shows SmolLM2 135M after 60 steps on the demo set::

    mlx_loraplus.train --model smollm2-135m --lr-ratio 16 --learning-rate 5e-4 --warmup 6 \
        --iters 60 --batch-size 4 --max-seq-length 96 --steps-per-report 2 --steps-per-eval 12 \
        --sample-rows 2 --adapter-path home-assistant
    python scripts/report_picture.py home-assistant

It needs the extra ``dev`` and Chromium.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

README = Path(__file__).resolve().parents[1] / ".github/images/report.png"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_COLOURS = 256  # enough for text and curves, in a third of the size


def photograph(page: Path) -> bytes:
    """Return a page, as a browser shows it, as a PNG file."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise SystemExit("Chromium is not installed: install the package chromium")

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = opened.new_page(viewport={"width": 1000, "height": 800})
        view.goto(page.absolute().as_uri())
        picture = view.screenshot(full_page=True)
        opened.close()
    return picture


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("picture", type=Path, nargs="?", default=README, help="a .png file")
    given = parser.parse_args()

    picture = Image.open(io.BytesIO(photograph(given.run / "report.html"))).convert("RGB")
    picture.quantize(_COLOURS, Image.Quantize.MEDIANCUT).save(given.picture, optimize=True)
    print(f"{given.picture}: {given.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
