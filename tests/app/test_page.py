"""The race, the sessions and the handlers of the page in process."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from page_engine import (
    all_of,
    answered,
    run_async,
    service_of,
    text_of,
    wait_until_idle,
)

from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.serving import EngineError, QueueFullError, Request, RequestHandle
from medhead_app.chat.conversation import MAX_CHARACTERS, new_conversation
from medhead_app.chat.generation import ChatSettings
from medhead_app.chat.race import RaceState, race
from medhead_app.chat.race_view import race_card, race_cards, verdict_line
from medhead_app.chat.sessions import Sessions
from medhead_app.service import Service

ATTACK = '<b>bold</b><script>window.pwned = 1</script> & <img src=x onerror="alert(1)"> "\''


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


def test_a_stop_before_the_request_is_submitted_cancels_it() -> None:
    sessions, handles = Sessions(), [RequestHandle(Request([1])) for _ in range(3)]
    assert sessions.begin_turn("a", "one") is not None
    assert sessions.cancel("a", "race") == 0
    sessions.tracker("a", "chat")(handles[0])
    sessions.cancel("a", "chat")
    sessions.tracker("a", "chat")(handles[1])
    sessions.end_turn("a")
    assert sessions.begin_turn("a", "one") is not None
    sessions.tracker("a", "chat")(handles[2])
    assert [one.cancelled for one in handles] == [True, True, False]


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
        async for changes in handlers.send(REQUEST, new_conversation(), "Hello", [], *FIELDS):
            shown.append(changes)

    async def abandon() -> None:
        running = asyncio.ensure_future(turn())
        while len(shown) < 3:
            await asyncio.sleep(0.005)
        await handlers.new_chat(REQUEST)
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
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), "Hello <b>", [], *FIELDS)))
    assert changes[0][ui.message] == ""
    assert changes[0][ui.stop]["visible"] is True
    assert changes[0][ui.chat]["busy"] is True
    last = changes[-1]
    assert last[ui.send]["visible"] is True
    assert last[ui.chat]["messages"][0]["html"] == "Hello &lt;b&gt;"
    assert last[ui.chat]["store"] == last[ui.conversation]
    assert "mh-heads" in last[ui.chat]["messages"][1]["html"]
    assert "<svg" in last[ui.panel]
    assert "Answer 1" in last[ui.panel]
    assert "Answer 1 · stopped at the token limit" in last[ui.live]
    assert "mean 3.00" in last[ui.panel]
    undone = handlers.modify(SimpleNamespace(action="undo"), last[ui.conversation])
    assert undone[ui.message] == "Hello <b>"
    assert undone[ui.chat]["removed"]
    assert "removed" not in undone[ui.chat]["store"]
    assert "No answer yet" in undone[ui.panel]
    restored = handlers.modify(SimpleNamespace(action="restore"), undone[ui.conversation])
    assert restored[ui.chat]["messages"] == last[ui.chat]["messages"]
    assert restored[ui.live] == last[ui.live]
    opened = handlers.load(last[ui.chat]["store"])
    assert opened[ui.temperature] == 0.0
    assert opened[ui.conversation]["messages"]


def test_internal_errors_are_logged_and_shown_without_details(caplog: pytest.LogCaptureFixture) -> None:
    handlers = handlers_of(service_of(crash=True))
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), "Hello", [], *FIELDS)))
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
    changes = run_async(all_of(handlers.send(REQUEST, new_conversation(), "Hello", [], *FIELDS)))
    assert "waiting already, try again" in changes[-1][handlers.components.live]
    before = answered("one")
    again = run_async(all_of(handlers.ask(REQUEST, SimpleNamespace(action="retry"), before, *FIELDS)))
    assert again[-1][handlers.components.conversation] == before  # the old answer stays
    assert handlers.components.message not in again[-1]
    assert changes[-1][handlers.components.send]["visible"] is True


def test_no_second_answer_at_a_time() -> None:
    handlers = handlers_of(service_of())
    unchanged = {handlers.components.chat: pytest.importorskip("gradio").skip()}
    handlers.sessions.begin_turn("one", "other")
    assert run_async(all_of(handlers.send(REQUEST, new_conversation(), "Hello", [], *FIELDS))) == [unchanged]


def test_one_answer_at_a_time_in_a_conversation() -> None:
    handlers = handlers_of(service_of())
    conversation = answered("one")
    unchanged = {handlers.components.chat: pytest.importorskip("gradio").skip()}
    handlers.sessions.begin_turn("another tab", conversation["id"])
    assert run_async(all_of(handlers.send(REQUEST, conversation, "Hello", [], *FIELDS))) == [unchanged]
    assert handlers.modify(SimpleNamespace(action="undo"), conversation) == unchanged
    assert run_async(handlers.clear(REQUEST, conversation)) == unchanged
    handlers.sessions.end_turn("another tab")
    assert run_async(handlers.clear(REQUEST, conversation))[handlers.components.chat]["messages"] == []


def test_a_page_shows_what_another_tab_has_stored() -> None:
    handlers = handlers_of(service_of())
    event = SimpleNamespace(conversation=answered("one", "two"))
    shown = handlers.sync(REQUEST, event)[handlers.components.chat]
    assert [message["text"] for message in shown["messages"]] == ["one", "re one", "two", "re two"]
    assert (shown["updated"], shown["store"]) == (event.conversation["updated"], None)
    handlers.sessions.begin_turn("one", "other")
    assert handlers.sync(REQUEST, event) == {handlers.components.chat: pytest.importorskip("gradio").skip()}


def test_a_text_that_is_refused_comes_into_the_box() -> None:
    handlers = handlers_of(service_of())
    text, box = "x" * (MAX_CHARACTERS + 1), handlers.components.message
    edit = SimpleNamespace(action="edit", index=0, text=text)
    for changes in (
        handlers.send(REQUEST, new_conversation(), text, [], *FIELDS),
        handlers.ask(REQUEST, edit, answered("one"), *FIELDS),
    ):
        last = run_async(all_of(changes))[-1]
        assert last[box] == text
        assert f"at most {MAX_CHARACTERS} are allowed" in last[handlers.components.live]


def test_a_race_fills_the_panel() -> None:
    handlers = handlers_of(service_of(delay=0.001))
    changes = run_async(all_of(handlers.race(REQUEST, "Hello", *FIELDS)))
    panel = changes[-1][handlers.components.race_panel]
    assert "Race, speculative decoding" in panel
    assert "mean 3.00" in panel
    assert "mh-tree" in panel
    assert "automatic" in changes[-1][handlers.components.race_speculative]


def test_heads_are_offered_only_where_there_are_some() -> None:
    service = service_of()
    assert "heads" in [value for _, value in handlers_of(service).components.proposer.choices]
    service.engine.has_heads = False  # type: ignore[misc]
    handlers = handlers_of(service)
    assert "heads" not in [value for _, value in handlers.components.proposer.choices]
    stored = answered("one") | {"settings": asdict(ChatSettings(proposer="heads"))}
    assert handlers.load(stored)[handlers.components.proposer] == "automatic"
