"""Token colors, Markdown, statistics and charts of the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html import unescape
from typing import Any

import pytest
from page_engine import text_of

from medhead.serving import Result, TreeView
from medhead_app.chat.stats import answer_result, failed_line, live_line, passes_saved, summary, tokens_per_second
from medhead_app.chat.svg import describe_lengths, describe_tree, draw_lengths, draw_tree, is_valid_tree, tree_json
from medhead_app.chat.token_colors import SOURCES, color_tokens, css_classes, display_name, legend

ATTACK = '<b>bold</b><script>window.pwned = 1</script> & <img src=x onerror="alert(1)"> "\''


def test_colored_tokens_are_escaped_and_complete() -> None:
    tokens = [
        ["Once", "heads 1"],
        [" upon", "heads 2"],
        [ATTACK, "ngram"],
        ["\n\n", "bonus"],
        ["", "bonus"],
        ["a b", "no one"],
    ]
    html = color_tokens(tokens)
    assert text_of(html) == "".join(text for text, _ in tokens)
    assert set(re.findall(r"<(\w+)", html)) == {"span"}
    assert "mh-heads mh-depth-2" in html


def test_a_source_cannot_leave_its_attribute() -> None:
    html = color_tokens([["x", '"><script>'], ["y", 'heads "><b>'], ["z", "heads 99"]])
    assert set(re.findall(r"<(\w+)", html)) == {"span"}
    assert "mh-depth-8" in html


def test_every_source_has_a_class_of_its_own_and_a_place_in_the_legend() -> None:
    assert len({css_classes(source) for source in SOURCES}) == len(SOURCES)
    for name, _ in SOURCES.values():
        assert name in legend()


def test_a_proposer_has_one_name_everywhere() -> None:
    assert display_name("ngram") == "n-gram"
    assert [display_name(name) for name in ("automatic", "recycling", "none")] == ["automatic", "recycling", "none"]
    assert 'title="n-gram"' in color_tokens([["x", "ngram"]])
    assert "n-gram" in summary(result_of([1], proposer="ngram"))
    assert "(n-gram, accepted)" in draw_tree(tree_json(TREE, list("abcde")) | {"accepted": [0, 2]})


SAMPLE = """# The title

1. 1 **bold** \\* `x  y` [label](label) label
2. tail

> quote  
> quote

```py
x = 1
```

| a | 1 |
|---|---|
| 1 | 1 |

end <b> of *it
"""  # noqa: W291


@pytest.mark.parametrize("size", [1, 3, 7, 500])
def test_rendered_markdown_is_colored(size: int) -> None:
    text = pytest.importorskip("medhead_app.chat.text", reason="markdown-it-py is not installed")
    starts = range(0, len(SAMPLE), size)
    tokens = [[SAMPLE[start : start + size], f"heads {number + 1}"] for number, start in enumerate(starts)]
    html, plain = text.render_markdown(SAMPLE, tokens), text.render_markdown(SAMPLE)
    assert re.sub(r"</?span[^>]*>", "", html) == plain  # colors change nothing else
    for code in re.findall(r"<code.*?</code>", html, re.DOTALL):
        assert "mh-token" not in code
    words = re.findall(r'title="heads, depth (\d+)">(.*?)</span>', html)
    assert len(words) > 10
    for depth, word in words:  # every word has the color of a token that it is part of
        token = SAMPLE[(int(depth) - 1) * size : int(depth) * size]
        assert unescape(word) in token
    shown = re.sub(r"\s", "", text_of(re.sub(r"<(pre|code|button).*?</\1>", "", plain, flags=re.DOTALL)))
    assert re.sub(r"\s", "", "".join(unescape(word) for _, word in words)) == shown  # and no word is left out


def test_tokens_that_are_not_in_the_text_color_nothing() -> None:
    text = pytest.importorskip("medhead_app.chat.text", reason="markdown-it-py is not installed")
    tokens = [["One", "ngram"], [" tw", "heads 1"], ["\ufffd", "heads 2"], [" three", "bonus"], [" four", "bonus"]]
    html = text.render_markdown("One twé\r\nthr&#101;e", tokens)
    assert text_of(html).strip() == "One twé\nthree"
    assert re.findall(r'"([^"]*)">([^<]*)</span>', html) == [("n-gram", "One"), ("heads, depth 1", "tw")]


def test_html_in_markdown_is_shown_as_text() -> None:
    text = pytest.importorskip("medhead_app.chat.text", reason="markdown-it-py is not installed")
    html = text.render_markdown(ATTACK + "\n\n```html\n<b>&lt;</b>\n```\n\n`<i>`")
    assert not {"b", "script", "img", "i"} & set(re.findall(r"<(\w+)", html))
    assert "<b>bold</b><script>window.pwned = 1</script>" in text_of(html)
    assert "<b>&lt;</b>" in text_of(html)


def test_markdown_is_readable_and_fetches_nothing() -> None:
    text = pytest.importorskip("medhead_app.chat.text", reason="markdown-it-py is not installed")
    html = text.render_markdown(
        "# T\n\n- **a**\n- b\n\n```python\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[l](http://a.b) ![i](http://c.d/e.png)"
    )
    for part in (
        "<h1>",
        "<li>",
        "<strong>",
        '<code class="language-python">',
        "<table>",
        'rel="noopener noreferrer nofollow"',
    ):
        assert part in html
    assert "<img" not in html
    assert "<a" not in text.render_markdown("[x](javascript:alert(1))")


# ---------------------------------------------------------------- statistics and charts


def result_of(lengths: list[int], **fields: Any) -> Result:
    return Result(new_tokens=sum(lengths), passes=len(lengths), lengths=lengths, **fields)


def test_statistics_in_words() -> None:
    result = result_of([4, 1, 1], seconds=3.0, queued=1.0, proposer="hybrid", seed=9)
    assert tokens_per_second(result) == 3
    assert passes_saved(result) == 0.5
    assert summary(result) == "6 tokens · 3 tokens/s · accepted length 2.0 · hybrid · seed 9"
    line = live_line(result, "answer 2, version 1", "<i>")
    assert "<b>50 %</b> passes saved" in line
    assert "Answer 2, version 1 · &lt;i&gt;" in line
    assert "&lt;i&gt;" in failed_line("<i>")
    assert "–" in live_line(None)
    stored = answer_result({"lengths": [4, 1, 1], "seconds": 2.0})
    assert tokens_per_second(stored) == 3
    assert live_line(stored, "answer 2, version 1", "<i>") == line
    assert (tokens_per_second(Result()), passes_saved(Result()), summary(Result())) == (0.0, 0.0, "")


TREE = TreeView([9, 1, 2, 3, 4], [0, 0, 0, 1, 3], ["root", "heads", "ngram", "heads", "recycling"], [0, 1, 3])


def test_the_tree_as_svg() -> None:
    tree = tree_json(TREE, ["root", " a", ATTACK, "\n", "\x00"], " own")
    svg = ET.fromstring(draw_tree(tree))
    groups = [part for part in svg if part.tag.endswith("g")]
    kinds = [part.get("class", "") for part in groups]
    assert len(groups) == 6  # five nodes and the bonus token
    assert sum("mh-accepted" in kind for kind in kinds) == 4
    assert sum("mh-ngram" in kind for kind in kinds) == 1
    paths = [part.get("class", "") for part in svg if part.tag.endswith("path")]
    assert len(paths) == 5
    assert sum("mh-strong" in path for path in paths) == 3
    rows = [float(part.find("{*}text").get("y")) for part in groups]  # type: ignore[union-attr,arg-type]
    assert len(set(rows)) == 6
    assert max(rows) < float(svg.get("height", 0))
    assert describe_tree(tree) == "4 draft tokens · 2 accepted"


def test_a_tree_whose_text_ended_has_no_bonus_token() -> None:
    svg = ET.fromstring(draw_tree(tree_json(TREE, list("abcde"))))
    assert sum(part.tag.endswith("g") for part in svg) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"texts": []},
        {"parents": [0, 0, 0, 1, 9]},
        {"parents": [0, 1, 0, 1, 3]},
        {"accepted": [7]},
        {"sources": [1] * 5},
        {"bonus": 3},
    ],
)
def test_a_broken_tree_is_not_drawn(change: dict[str, Any]) -> None:
    tree = tree_json(TREE, list("abcde"), "f")
    assert is_valid_tree(tree)
    assert not is_valid_tree(tree | change)
    assert "<svg" not in draw_tree(tree | change)


def test_lengths_as_svg() -> None:
    svg = ET.fromstring(draw_lengths([1, 1, 4, 30]))
    bars = [part for part in svg if part.get("class") == "mh-bar"]
    assert len(bars) == 3
    heights = [float(bar.get("height", 0)) for bar in bars]
    assert heights[0] == 2 * heights[1] == 2 * heights[2]
    assert describe_lengths([1, 1, 4]) == "mean 2.00 · 3 passes"
    assert not [part for part in ET.fromstring(draw_lengths([])) if part.get("class") == "mh-bar"]
