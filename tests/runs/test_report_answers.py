"""Sample answers on a run's page."""

import re
from pathlib import Path

import mlx_loraplus as ml
from mlx_loraplus.runs.report import report_page
from mlx_loraplus.runs.report_answers import shown_answer


def test_thoughts_are_folded_and_calls_are_marked(folder: Path):
    run = ml.Run.load(folder)
    begin = "<|turn>user\nturn it on<turn|>\n<|turn>model\n"
    call = '<|tool_call>call:on{room:<|"|>%s<|"|>}<tool_call|>'
    thoughts = "<|channel>thought\nThe <b>hall</b>.\n<channel|>"
    run.start["prompts"] = [{"prompt": begin, "expected": f"Yes.{call % 'hall'}"}]
    for event in run.history:
        if "valid_loss" in event:
            event["answers"] = [f"{thoughts}Yes.{call % 'kitchen'}"]
    page = report_page(run).decode()
    folded = "<summary>thoughts</summary><p>The &lt;b&gt;hall&lt;/b&gt;.</p></details>"
    assert f'<details class="thought">{folded}' in page
    assert "<p>Yes.</p>" in page
    changed = "<del>hall</del><ins>kitchen</ins>"
    assert f"<b>tool call</b> <code>call:on{{room:&#34;{changed}&#34;}}</code>" in page
    cards = page[page.index('<article class="card">') : page.index("</article>")]
    assert not re.search(r"&lt;\||\|&gt;|channel", cards), "no marker of the template is left"


def test_calls_are_compared_with_the_expected_calls_in_their_order():
    expected = '<tool_call>{"name": "on"}</tool_call><tool_call>{"name": "off"}</tool_call>'
    same = shown_answer("base", expected, expected)
    assert [kind for kind, _ in same.parts] == ["call", "call"]
    assert {change for _, pieces in same.parts for change, _ in pieces} == {"same"}
    assert same.likeness == "\u2713 exact"

    # Thoughts are not compared, and text where none is expected is marked as a whole.
    other = shown_answer("base", "<think>Hm.</think>I can't.", expected)
    assert other.parts == [("thought", [("same", "Hm.")]), ("text", [("extra", "I can't.")])]
    assert shown_answer("base", "<|im_end|>", expected).parts == [
        ("text", [("same", "(an empty answer)")])
    ]


def test_what_a_similar_answer_lacks_is_crossed_out():
    call = '{"name": "on"}'
    short = shown_answer("base", "Yes.", f"Yes.<tool_call>{call}</tool_call>")
    assert short.parts == [("text", [("same", "Yes.")]), ("call", [("missing", call)])]


def test_an_answer_that_was_cut_while_thinking_is_a_thought():
    prompt = "<|im_start|>assistant\n<think>\n"
    cut = shown_answer("base", "The hall is", "Yes.", prompt)
    assert cut.parts == [("thought", [("same", "The hall is")])]
    whole = shown_answer("base", "The hall.</think>Yes.", "Yes.", prompt)
    assert [kind for kind, _ in whole.parts] == ["thought", "text"]


def test_html_in_an_answer_is_no_marker():
    parts = shown_answer("base", "I use HTML old tag", "I use HTML <s>old</s> tag").parts
    assert "missing" in {change for _, pieces in parts for change, _ in pieces}
    assert shown_answer("base", "<s> Yes.</s>", "Yes.").parts == [("text", [("same", "Yes.")])]


def test_an_answer_with_other_white_space_says_so():
    lines = '{\n  "action": "play"\n}'
    other = shown_answer("base", '{"action": "play"}', lines)
    assert other.likeness == "exact, but for white space"
    assert not shown_answer("base", '{"action": "stop"}', lines).likeness
