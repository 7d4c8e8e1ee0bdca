"""Conversations of the page and the operations on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from page_engine import answered, question

from medhead.errors import MedheadError
from medhead_app.chat.conversation import (
    MAX_CHARACTERS,
    TITLE_LENGTH,
    add_message,
    clear_messages,
    cut_answer,
    edit_message,
    last_answer,
    new_conversation,
    new_version,
    parse_conversation,
    prompt_messages,
    restore_messages,
    set_answer,
    show_version,
    stored_form,
    undo_message,
)


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


def contents(conversation: dict[str, Any]) -> list[str]:
    return [message["content"] for message in conversation["messages"]]


def test_a_message_is_refused_whole_and_never_cut() -> None:
    text = "x" * MAX_CHARACTERS
    assert contents(question(text)) == [text]
    with pytest.raises(MedheadError, match=f"has {MAX_CHARACTERS + 1} characters, at most {MAX_CHARACTERS}"):
        question(text + "x")
    many = {"messages": [{"role": "user", "content": text + "x"}] * 2001}
    assert contents(parse_conversation(many)) == [text + "x"] * 2001


def test_undo_and_clear() -> None:
    conversation = answered("one", "two")
    after, text = undo_message(conversation)
    assert text == "two"
    assert contents(after) == ["one", "re one"]
    assert undo_message(new_conversation())[1] == ""
    empty = clear_messages(conversation)
    assert (empty["messages"], empty["title"], empty["id"]) == ([], "", conversation["id"])


def test_removed_messages_can_be_restored() -> None:
    before = answered("one", "two")
    for after in (clear_messages(before), undo_message(before)[0], edit_message(before, 2, "TWO")):
        assert restore_messages(after)["messages"] == before["messages"]
        assert "removed" not in stored_form(after)
    edited = set_answer(edit_message(before, 2, "TWO"), {"role": "assistant", "content": "re TWO"})
    restored = restore_messages(edited)
    assert contents(restored) == contents(before)
    assert contents(restore_messages(restored)) == ["one", "re one", "TWO", "re TWO"]  # nothing is lost
    assert "removed" not in restore_messages(clear_messages(before))
    assert "removed" not in add_message(clear_messages(before), "three")
    assert restore_messages(before)["messages"] == before["messages"]


def test_an_answer_has_versions() -> None:
    conversation = answered("one", "two")
    for text in ("second", "third"):
        conversation = set_answer(new_version(conversation), {"role": "assistant", "content": text})
    assert contents(conversation) == ["one", "re one", "two", "third"]
    assert last_answer(conversation)[0] == "answer 2, version 3"
    first = show_version(show_version(conversation, -1), -1)
    assert contents(first)[-1] == "re two"
    assert first["messages"][-1]["lengths"] == [2, 1]
    assert contents(show_version(first, -1)) == contents(first)
    assert [contents(show_version(first, 1))[-1], contents(show_version(conversation, 1))[-1]] == ["second", "third"]
    back = parse_conversation(json.loads(json.dumps(first)))
    assert [contents(show_version(show_version(back, 1), 1))[-1], last_answer(back)[0]] == [
        "third",
        "answer 2, version 1",
    ]
    again = set_answer(new_version(first), {"role": "assistant", "content": "fourth"})
    assert [m["content"] for m in again["messages"][-1]["earlier"]] == ["re two", "second", "third"]
    assert new_version(question("still open"))["messages"][-1]["content"] == "still open"
    with pytest.raises(MedheadError, match="no message"):
        new_version(new_conversation())


def test_only_an_answer_that_was_cut_can_be_continued() -> None:
    answer = {"role": "assistant", "content": "a b", "token_ids": [1, 2], "note": "stopped by you"}
    assert cut_answer(set_answer(question(), answer)) is not None
    for change in ({"note": ""}, {"token_ids": []}):
        assert cut_answer(set_answer(question(), answer | change)) is None
    assert cut_answer(new_conversation()) is cut_answer(question()) is None


def test_answers_replace_their_earlier_state() -> None:
    conversation = question()
    for text in ("a", "ab", "abc"):
        conversation = set_answer(conversation, {"role": "assistant", "content": text, "lengths": [3]})
    assert contents(conversation) == ["Tell me a story.", "abc"]


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
    odd["messages"][0] |= {
        "token_ids": [1, "2"],
        "seconds": "3",
        "seed": None,
        "earlier": [3, {"role": "user"}],
        "tree": 1,
    }
    message = parse_conversation(odd)["messages"][0]
    assert [message[name] for name in ("token_ids", "seconds", "seed", "earlier", "tree")] == [[], 0.0, 0, [], None]
