"""The page's logic in process: conversations, token colors, charts, answers, races, and the handlers' changes."""

from __future__ import annotations

import asyncio
import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Awaitable
from dataclasses import asdict
from html import unescape
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from page_engine import STORY, ScriptedEngine

from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.serving import EngineError, QueueFullError, Request, RequestHandle, Result, TreeView
from medhead_app.chat.conversation import (
    TITLE_LENGTH,
    Conversation,
    add_message,
    clear_messages,
    edit_message,
    new_conversation,
    parse_conversation,
    pass_lengths,
    prompt_messages,
    remove_answer,
    set_answer,
    undo_message,
)
from medhead_app.chat.generation import ChatSettings, StreamState, Update, generate_answer
from medhead_app.chat.race import RaceState, race
from medhead_app.chat.race_view import race_card, race_cards, verdict_line
from medhead_app.chat.sessions import Sessions
from medhead_app.chat.stats import live_line, passes_saved, summary, tokens_per_second
from medhead_app.chat.svg import describe_lengths, describe_tree, draw_lengths, draw_tree, is_valid_tree, tree_json
from medhead_app.chat.token_colors import SOURCES, color_tokens, css_classes, legend
from medhead_app.service import Service

ATTACK = '<b>bold</b><script>window.pwned = 1</script> & <img src=x onerror="alert(1)"> "\''


def service_of(**options: Any) -> Service:
    engine = ScriptedEngine(**options)
    return Service(engine, engine.tokenizer, "scripted")  # type: ignore[arg-type]


def question(text: str = "Tell me a story.") -> Conversation:
    return add_message(new_conversation(), text)


def answered(*texts: str) -> Conversation:
    conversation = new_conversation()
    for text in texts:
        reply = {"role": "assistant", "content": f"re {text}", "tokens": [["re", "heads 1"]], "lengths": [2, 1]}
        conversation = set_answer(add_message(conversation, text), reply)
    return conversation


def run_async(work: Awaitable[Any], seconds: float = 20) -> Any:
    async def run() -> Any:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(run())


async def all_of(stream: Any) -> list[Any]:
    return [item async for item in stream]


# ---------------------------------------------------------------- conversations


def test_send_adds_a_message_and_names_the_conversation() -> None:
    before = new_conversation()
    after = add_message(before, "  Hello\nthere ")
    assert before["messages"] == []
    assert after["messages"] == [{"role": "user", "content": "Hello\nthere"}]
    assert after["title"] == "Hello there"
    assert after["id"] == before["id"]
    assert len(add_message(before, "word " * 100)["title"]) <= TITLE_LENGTH
    with pytest.raises(MedheadError, match="empty"):
        add_message(before, " \n ")


def test_edit_drops_what_came_after() -> None:
    conversation = answered("one", "two", "three")
    after = edit_message(conversation, 2, "TWO")
    assert [m["content"] for m in after["messages"]] == ["one", "re one", "TWO"]
    assert len(conversation["messages"]) == 6
    for index in (1, -1, 6):
        with pytest.raises(MedheadError, match="your own"):
            edit_message(conversation, index, "x")


def test_undo_regenerate_clear() -> None:
    conversation = answered("one", "two")
    after, text = undo_message(conversation)
    assert text == "two"
    assert [m["content"] for m in after["messages"]] == ["one", "re one"]
    assert undo_message(new_conversation())[1] == ""
    assert [m["content"] for m in remove_answer(conversation)["messages"]] == ["one", "re one", "two"]
    assert remove_answer(question("still open"))["messages"][-1]["content"] == "still open"
    with pytest.raises(MedheadError, match="no message"):
        remove_answer(new_conversation())
    empty = clear_messages(conversation)
    assert (empty["messages"], empty["title"], empty["id"]) == ([], "", conversation["id"])


def test_answers_replace_their_earlier_state() -> None:
    conversation = question()
    for text in ("a", "ab", "abc"):
        conversation = set_answer(conversation, {"role": "assistant", "content": text, "lengths": [3]})
    assert [m["content"] for m in conversation["messages"]] == ["Tell me a story.", "abc"]
    assert pass_lengths(answered("one", "two")) == [2, 1, 2, 1]


def test_the_prompt_has_only_roles_and_contents() -> None:
    messages = prompt_messages(add_message(answered("one"), "two"), " Be kind. ")
    assert messages[0] == {"role": "system", "content": "Be kind."}
    assert [sorted(message) for message in messages] == [["content", "role"]] * 4
    assert prompt_messages(question())[0]["role"] == "user"


@pytest.mark.parametrize(
    "raw",
    [
        None,
        3,
        "text",
        [],
        {},
        {"messages": 3},
        {"messages": [3, None, {"role": "system", "content": "x"}, {"role": "user", "content": 4}]},
        {"messages": [], "id": "../../etc", "settings": [], "tree": 3, "updated": "now"},
    ],
)
def test_what_a_browser_sends_is_checked(raw: Any) -> None:
    conversation = parse_conversation(raw)
    assert conversation["messages"] == []
    assert conversation["id"].isalnum()
    assert conversation["tree"] is None
    assert conversation["settings"] == {}


def test_a_stored_conversation_comes_back() -> None:
    conversation = answered("one", "two")
    back = parse_conversation(json.loads(json.dumps(conversation)))
    assert back["id"] == conversation["id"]
    assert [m["content"] for m in back["messages"]] == [m["content"] for m in conversation["messages"]]
    assert back["messages"][1]["tokens"] == [["re", "heads 1"]]
    odd = {
        "messages": [
            {"role": "assistant", "content": "x", "tokens": [["a"], 3, ["b", "ngram"]], "lengths": [1, "2", -1]}
        ]
    }
    message = parse_conversation(odd)["messages"][0]
    assert (message["tokens"], message["lengths"]) == ([["b", "ngram"]], [1])


# ---------------------------------------------------------------- token colors and Markdown


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


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
    assert color_tokens(tokens[:3]) == html[: len(color_tokens(tokens[:3]))]  # it only grows at its end


def test_a_source_cannot_leave_its_attribute() -> None:
    html = color_tokens([["x", '"><script>'], ["y", 'heads "><b>'], ["z", "heads 99"]])
    assert set(re.findall(r"<(\w+)", html)) == {"span"}
    assert "mh-depth-8" in html


def test_every_source_has_a_class_of_its_own_and_a_place_in_the_legend() -> None:
    assert len({css_classes(source) for source in SOURCES}) == len(SOURCES)
    for name, _ in SOURCES.values():
        assert name in legend()


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
    assert "<b>50 %</b> passes saved" in live_line(result, "<i>")
    assert "<i>" not in live_line(result, "<i>")
    assert "–" in live_line(None)
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


# ---------------------------------------------------------------- answers


def test_an_answer_comes_in_updates() -> None:
    service = service_of(delay=0.002)
    settings = ChatSettings(
        system="Be kind.", temperature=0.5, max_new_tokens=24, seed=5, proposer="ngram", tree_size=8
    )
    updates: list[Update] = run_async(all_of(generate_answer(service, question(), settings, interval=0)))
    texts = [update.conversation["messages"][-1]["content"] for update in updates]
    assert len(set(texts)) >= 8
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert [update.done for update in updates] == [False] * (len(updates) - 1) + [True]
    message = updates[-1].conversation["messages"][-1]
    assert STORY.startswith(message["content"])
    assert "".join(text for text, _ in message["tokens"]) == message["content"]
    assert message["lengths"] == [3] * 8
    assert message["note"] == "stopped at the token limit"
    assert is_valid_tree(updates[-1].conversation["tree"])
    request = service.engine.requests[0]  # type: ignore[attr-defined]
    assert request.params == SamplingParams(24, 0.5, 0.95, seed=5)
    assert (request.proposer, request.tree_size) == ("ngram", 8)
    assert request.trace
    assert "Be kind." in service.tokenizer.decode(request.prompt)


def test_updates_are_not_more_frequent_than_the_interval() -> None:
    updates = run_async(all_of(generate_answer(service_of(delay=0.002), question(), ChatSettings(), interval=10)))
    assert len(updates) == 3  # the first, one, the last
    assert updates[-1].conversation["messages"][-1]["content"] == STORY


def test_closing_an_answer_cancels_its_request() -> None:
    service = service_of(delay=0.01)
    handles: list[RequestHandle] = []

    async def close() -> None:
        stream = generate_answer(service, question(), ChatSettings(max_new_tokens=500), handles.append, interval=0)
        async for update in stream:
            if update.result.new_tokens:
                break
        await stream.aclose()

    run_async(close())
    assert handles[0].cancelled
    wait_until_idle(service, 1.0)


def wait_until_idle(service: Service, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while service.engine.statistics().running:
        assert time.perf_counter() < end, "the request is still running"
        time.sleep(0.01)


def test_a_stopped_answer_keeps_its_text() -> None:
    service = service_of(delay=0.005)

    async def stop() -> Update:
        handles: list[RequestHandle] = []
        async for update in generate_answer(
            service, question(), ChatSettings(max_new_tokens=500), handles.append, interval=0
        ):
            if update.result.passes == 3:
                handles[0].cancel()
        return update

    update = run_async(stop())
    assert update.done
    assert update.conversation["messages"][-1]["note"] == "stopped by you"
    assert update.conversation["messages"][-1]["content"]


def test_a_long_conversation_is_cut_and_says_so() -> None:
    conversation = answered(*[f"{number} " + "word " * 30 for number in range(20)])
    service = service_of(context=200)
    asked = add_message(conversation, "and now?")
    updates = run_async(all_of(generate_answer(service, asked, ChatSettings(max_new_tokens=20), interval=0)))
    message = updates[-1].conversation["messages"][-1]
    assert message["dropped"] > 0
    assert len(updates[-1].conversation["messages"]) == 42  # nothing is lost on the page
    view = pytest.importorskip("medhead_app.chat.view", reason="markdown-it-py is not installed").message_view
    assert f"{message['dropped']} older messages were left out" in view(message, True)["notice"]


def test_failures_are_one_line() -> None:
    updates = run_async(all_of(generate_answer(service_of(fail="it broke"), question(), ChatSettings(), interval=0)))
    assert (updates[-1].error, updates[-1].done) == ("it broke", True)
    assert updates[-1].conversation["messages"][-1]["content"]  # what came before is kept
    with pytest.raises(QueueFullError, match="waiting already"):
        run_async(all_of(generate_answer(service_of(max_rows=0, max_queue=0), question(), ChatSettings())))


def test_settings_from_the_fields() -> None:
    raw = {
        "temperature": 1,
        "top_p": "0.5",
        "max_new_tokens": 5000,
        "seed": " 12 ",
        "proposer": "none",
        "tree_size": "16",
    }
    settings = ChatSettings.from_fields(raw, 100)
    assert settings == ChatSettings("", 1.0, 0.5, 100, 12, "none", 16)
    assert ChatSettings.from_fields({"seed": "", "tree_size": "automatic"}, 100).seed is None
    assert ChatSettings.from_fields(asdict(settings), 100) == settings
    for bad in ({"seed": "x"}, {"temperature": None}, {"tree_size": "big"}):
        with pytest.raises(MedheadError, match="not a number"):
            ChatSettings.from_fields(bad, 100)


def test_each_answer_without_a_seed_draws_one() -> None:
    service = service_of()
    seeds = {ChatSettings().request(service, [1]).params.seed for _ in range(5)}
    assert len(seeds) > 1
    automatic = ChatSettings().request(service, [1])
    assert (automatic.proposer, automatic.tree_size) == (None, None)


def test_the_stream_state_ignores_trees_without_draft_tokens() -> None:
    stream = StreamState()
    output = SimpleNamespace(
        text="a", tokens=[0], texts=["a"], sources=["bonus"], tree=TreeView([0], [0], ["root"], [0])
    )
    stream.add(output)  # type: ignore[arg-type]
    assert stream.tree(ScriptedEngine().tokenizer) is None
    assert stream.tokens == [["a", "bonus"]]


# ---------------------------------------------------------------- race


def run_race(service: Service, settings: ChatSettings = ChatSettings(max_new_tokens=30)) -> list[RaceState]:  # noqa: B008
    return run_async(all_of(race(service, "Tell me a story.", settings, interval=0)))


def test_a_race_ends_with_a_speedup_and_identical_text() -> None:
    service = service_of(delay=0.003)
    states = run_race(service)
    last = states[-1]
    assert len(states) > 5
    assert [state.done for state in states] == [False] * (len(states) - 1) + [True]
    assert last.speedup == pytest.approx(3.0)
    assert last.identical is True
    first, second = service.engine.requests  # type: ignore[attr-defined]
    assert (first.proposer, second.proposer) == ("none", None)
    assert first.params.seed == second.params.seed is not None
    assert first.prompt == second.prompt
    assert text_of(verdict_line(last)) == "3.00× as fastidentical text: yes"
    assert "width:100.0%" in race_cards(last, 30)[0]


def test_a_race_notices_another_text() -> None:
    service = service_of(script=lambda request: "a b c" if request.proposer == "none" else "a b d")
    assert text_of(verdict_line(run_race(service)[-1])).endswith("identical text: no")


def test_a_race_that_is_stopped_has_no_result() -> None:
    service = service_of(delay=0.01)

    async def stop() -> RaceState:
        handles: list[RequestHandle] = []
        states = race(service, "x", ChatSettings(max_new_tokens=200), handles.append, interval=0)
        last = await anext(states)
        for handle in handles:
            handle.cancel()
        async for last in states:  # noqa: B007
            pass
        return last

    last = run_async(stop())
    assert (last.speedup, last.identical) == (None, None)
    assert "no result" in verdict_line(last)


def test_closing_a_race_cancels_both() -> None:
    service = service_of(delay=0.01)
    handles: list[RequestHandle] = []

    async def close() -> None:
        stream = race(service, "x", ChatSettings(max_new_tokens=500), handles.append, interval=0)
        await anext(stream)
        await stream.aclose()

    run_async(close())
    assert [handle.cancelled for handle in handles] == [True, True]
    wait_until_idle(service, 1.0)


def test_wrong_races_are_refused() -> None:
    with pytest.raises(MedheadError, match="is plain decoding itself"):
        run_race(service_of(), ChatSettings(proposer="none"))
    with pytest.raises(MedheadError, match="empty"):
        run_async(all_of(race(service_of(), " ", ChatSettings())))
    with pytest.raises(EngineError, match="it broke"):
        run_race(service_of(fail="it broke"))
    full = service_of(max_rows=1, max_queue=0, delay=0.01)
    with pytest.raises(QueueFullError):
        run_race(full)
    wait_until_idle(full, 1.0)


def test_race_cards_escape() -> None:
    assert "<script>" not in race_card("<script>", None)
    assert "<b>x" not in verdict_line(None, "<b>x")


# ---------------------------------------------------------------- sessions and handlers


def test_sessions_cancel_only_their_own_requests() -> None:
    sessions, handles = Sessions(), [RequestHandle(Request([1], SamplingParams())) for _ in range(3)]
    sessions.tracker("a", "chat")(handles[0])
    sessions.tracker("a", "race")(handles[1])
    sessions.tracker("b", "chat")(handles[2])
    assert sessions.cancel("a", "chat") == 1
    assert [handle.cancelled for handle in handles] == [True, False, False]
    assert sessions.cancel("a") == 1
    handles[2].end()
    assert sessions.cancel("b") == 0


def test_an_abandoned_turn_shows_nothing_more() -> None:
    handlers = handlers_of(service_of(delay=0.01))
    shown: list[Any] = []

    async def turn() -> None:
        async for changes in handlers.send(REQUEST, new_conversation(), True, "Hello", *FIELDS):
            shown.append(changes)

    async def abandon() -> None:
        running = asyncio.ensure_future(turn())
        while len(shown) < 3:
            await asyncio.sleep(0.005)
        await handlers.new_chat(REQUEST, True)
        count = len(shown)
        assert not handlers.sessions.is_busy("one")
        await running
        assert len(shown) == count

    run_async(abandon())
    assert all(changes[handlers.components.chat]["busy"] for changes in shown)


def handlers_of(service: Service) -> Any:
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    from medhead_app.chat.handlers import Handlers
    from medhead_app.chat.layout import Components

    with gr.Blocks():
        return Handlers(service, Components(service))


FIELDS = ("", 0.0, 1.0, 30, "", "automatic", "automatic")
REQUEST = SimpleNamespace(session_hash="one")


def test_a_turn_on_the_page() -> None:
    handlers = handlers_of(service_of(delay=0.001))
    ui = handlers.components
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), True, "Hello <b>", *FIELDS)))
    assert changes[0][ui.message] == ""
    assert changes[0][ui.stop]["visible"] is True
    assert changes[0][ui.chat]["busy"] is True
    last = changes[-1]
    assert last[ui.send]["visible"] is True
    assert last[ui.chat]["messages"][0]["html"] == "Hello &lt;b&gt;"
    assert last[ui.chat]["store"] == last[ui.conversation]
    assert "mh-heads" in last[ui.chat]["messages"][1]["html"]
    assert "<svg" in last[ui.tree]
    assert "mean 3.00" in last[ui.lengths]
    again = handlers.show(REQUEST, last[ui.conversation], False)[ui.chat]
    assert "mh-heads" not in again["messages"][1]["html"]
    undone = handlers.undo(last[ui.conversation], True)
    assert undone[ui.message] == "Hello <b>"
    opened = handlers.load(last[ui.chat]["store"], True)
    assert opened[ui.temperature] == 0.0
    assert opened[ui.conversation]["messages"]


def test_internal_errors_are_logged_and_shown_without_details(caplog: pytest.LogCaptureFixture) -> None:
    handlers = handlers_of(service_of(crash=True))
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), True, "Hello", *FIELDS)))
    assert "a secret inside" not in str(changes)
    assert "Internal error" in changes[-1][handlers.components.live]
    assert changes[-1][handlers.components.chat]["messages"] == []
    assert changes[-1][handlers.components.message] == "Hello"  # the message is not lost
    assert "a secret inside" in caplog.text
    assert "Traceback" in caplog.text
    raced = run_async(all_of(handlers.race(REQUEST, "Hello", *FIELDS)))
    assert "Internal error" in raced[-1][handlers.components.race_verdict]


def test_a_full_queue_is_shown_on_the_page() -> None:
    handlers = handlers_of(service_of(max_rows=0, max_queue=0))
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), True, "Hello", *FIELDS)))
    assert "waiting already, try again" in changes[-1][handlers.components.live]
    before = answered("one")
    again = run_async(all_of(handlers.ask(REQUEST, SimpleNamespace(action="retry"), before, True, *FIELDS)))
    assert again[-1][handlers.components.conversation] == before  # the old answer stays
    assert handlers.components.message not in again[-1]
    assert changes[-1][handlers.components.send]["visible"] is True


def test_no_second_answer_at_a_time() -> None:
    handlers = handlers_of(service_of())
    handlers.sessions.begin_turn("one")
    assert run_async(all_of(handlers.send(REQUEST, new_conversation(), True, "Hello", *FIELDS))) == []


def test_heads_are_offered_only_where_there_are_some() -> None:
    service = service_of()
    assert "heads" in [value for _, value in handlers_of(service).components.proposer.choices]
    service.engine.has_heads = False  # type: ignore[misc]
    handlers = handlers_of(service)
    assert "heads" not in [value for _, value in handlers.components.proposer.choices]
    stored = answered("one") | {"settings": asdict(ChatSettings(proposer="heads"))}
    assert handlers.load(stored, True)[handlers.components.proposer] == "automatic"
