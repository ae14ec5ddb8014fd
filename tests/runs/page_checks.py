"""What every page must be like in a real browser: at two widths, light and dark."""

from pathlib import Path
from typing import Any

CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((each) => {
      const share = each / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color, under) => {
    canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const page = dark ? "rgb(18, 18, 18)" : "rgb(255, 255, 255)";
  const behind = (element) => {
    const above = element.parentElement ? behind(element.parentElement) : page;
    return rgb(getComputedStyle(element).backgroundColor, above);
  };
  const [poor, seen] = [[], new Set()];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((each) => each.nodeType === Node.TEXT_NODE);
    if (!own.some((each) => each.textContent.trim()) || !element.checkVisibility()) continue;
    if (element.closest("script, style")) continue;
    const under = behind(element);
    const style = getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const [one, other] = [light(rgb(color, under)), light(under)];
    seen.add(element.localName);
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName} ${element.textContent.slice(0, 20)} ${ratio}`);
  }
  return [poor, [...seen]];
}"""
"""The elements whose own text has too little contrast, and the names of those with text."""


LABELS = """() => {
  const problems = [];
  for (const chart of document.querySelectorAll("svg.chart")) {
    const frame = chart.getBoundingClientRect();
    const boxes = [...chart.querySelectorAll("text")].map((each) => [each.textContent, each.getBoundingClientRect()]);
    boxes.forEach(([text, box], number) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 3) problems.push(`${text} is cut`);
      for (const [other, second] of boxes.slice(number + 1)) {
        const across = Math.min(box.right, second.right) - Math.max(box.left, second.left);
        const down = Math.min(box.bottom, second.bottom) - Math.max(box.top, second.top);
        if (across > 1 && down > 5) problems.push(`${text} and ${other} overlap`);
      }
    });
  }
  return problems;
}"""


BROKEN = """() => {
  const words = [...document.querySelectorAll("code .word")].filter((each) => each.checkVisibility());
  const height = (each) => each.getBoundingClientRect().height;
  return words.filter((each) => each.textContent.length < 20 && height(each) > 30).map((each) => each.textContent);
}"""


HEADS = """() => {
  const broken = [];
  for (const head of document.querySelectorAll("thead th")) {
    if (!head.checkVisibility() || head.parentElement.children.length > 6) continue;
    const texts = document.createTreeWalker(head, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const found of texts.currentNode.data.matchAll(/\\S{1,10}(?!\\S)/g)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, found.index);
        range.setEnd(texts.currentNode, found.index + found[0].length);
        if (new Set([...range.getClientRects()].map((each) => each.top)).size > 1) broken.push(found[0]);
      }
    }
  }
  return broken;
}"""


def check_in_browser(chromium: Any, page: Path) -> set[str]:
    """Open a page at two widths, light and dark, with everything unfolded, and look for problems.

    Return the names of the elements whose text was looked at.
    """
    view = chromium.new_page()
    problems: list[str] = []
    texts: set[str] = set()
    view.on("console", lambda message: problems.append(message.text))
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.goto(page.as_uri())
    view.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert view.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"

    for width in (390, 1280):
        view.set_viewport_size({"width": width, "height": 900})
        assert view.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert view.evaluate(LABELS) == []
        assert view.evaluate(BROKEN) == [], "no line ends within an option"
        assert view.evaluate(HEADS) == [], "no line ends within a short word of a table's head"
        for scheme in ("light", "dark"):
            view.emulate_media(color_scheme=scheme)
            poor, seen = view.evaluate(CONTRAST)
            assert poor == []
            texts.update(seen)
    assert problems == []
    view.close()
    return texts
