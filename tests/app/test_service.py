"""What the page and the API share: truncated conversations, limits, the memory check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from app_engine import CONTEXT, FakeEngine

from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL
from medhead_app import memory_check
from medhead_app.service import PromptTooLongError, Service, split_exchanges


@pytest.fixture
def service(tokenizer: Any) -> Service:
    return Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]


def conversation(count: int, system: str | None = "Be kind.", text: str = "once upon a time") -> list[dict[str, str]]:
    """A conversation that ends with the user's message `count`."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number in range(1, count):
        messages.append({"role": "user", "content": f"{number} {text}"})
        messages.append({"role": "assistant", "content": f"answer {number}"})
    return [*messages, {"role": "user", "content": f"{count} {text}"}]


def test_a_conversation_that_fits_is_encoded_by_the_template(service: Service, tokenizer: Any) -> None:
    messages = conversation(1)
    encoded = service.encode_chat(messages, 8)
    assert (
        encoded.token_ids
        == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    assert encoded.dropped == 0


def test_the_oldest_exchanges_are_dropped(service: Service, tokenizer: Any) -> None:
    messages = conversation(12)
    encoded = service.encode_chat(messages, 10)
    assert 0 < encoded.dropped < len(messages) - 2
    assert encoded.dropped % 2 == 0  # whole exchanges
    assert len(encoded.token_ids) <= CONTEXT - 10
    text = tokenizer.decode(encoded.token_ids)
    assert "Be kind." in text  # the system prompt stays
    assert "12 once upon" in text  # so does the newest message
    assert "<|user|>1 once" not in text
    one_more = [messages[0], *messages[1 + encoded.dropped - 2 :]]  # and no more than had to go
    read = tokenizer.apply_chat_template(one_more, add_generation_prompt=True, return_dict=True)
    assert len(read["input_ids"]) > CONTEXT - 10


def test_room_for_the_answer_is_kept_up_to_half_the_context(service: Service) -> None:
    little, much = service.encode_chat(conversation(12), 1), service.encode_chat(conversation(12), 10_000)
    assert len(much.token_ids) <= CONTEXT // 2
    assert little.dropped < much.dropped


def test_nothing_is_dropped_without_truncation(service: Service) -> None:
    with pytest.raises(PromptTooLongError, match=r"has \d+ tokens, at most 63 fit"):
        service.encode_chat(conversation(12), 1, truncate=False)


def test_a_message_that_does_not_fit_is_an_error(service: Service) -> None:
    with pytest.raises(PromptTooLongError):
        service.encode_chat(conversation(1, text="dragon " * 100), 1)


def test_a_long_newest_message_may_use_the_answers_room(service: Service) -> None:
    encoded = service.encode_chat(conversation(3, text="a cafe xyz bcd efgh" * 2), CONTEXT)
    assert CONTEXT // 2 < len(encoded.token_ids) < CONTEXT
    assert encoded.dropped == 4


def test_templates_that_refuse_say_so_in_one_line(service: Service) -> None:
    with pytest.raises(MedheadError, match="chat template refuses these messages: roles are"):
        service.encode_chat([{"role": "tool", "content": "x"}], 1)
    with pytest.raises(MedheadError, match="no messages"):
        service.encode_chat([], 1)


def test_without_a_template_messages_are_joined(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer, "chat_template", None)
    messages = [{"role": "system", "content": "Once"}, {"role": "user", "content": "upon"}]
    assert service.encode_chat(messages, 1).token_ids == service.encode("Once\n\nupon")


def test_exchanges() -> None:
    system, exchanges = split_exchanges(conversation(3))
    assert [message["role"] for message in system] == ["system"]
    assert [len(part) for part in exchanges] == [2, 2, 1]
    assert split_exchanges([{"role": "system", "content": "x"}]) == ([], [[{"role": "system", "content": "x"}]])


def test_requests_stay_within_the_limits(tokenizer: Any) -> None:
    service = Service(FakeEngine(), tokenizer, "tiny", max_prompt_tokens=20, max_new_tokens=30)  # type: ignore[arg-type]
    assert service.request([5] * 20).params.max_new_tokens == 30
    assert service.request([5], 7, seed=3).params.seed == 3
    with pytest.raises(PromptTooLongError, match="at most 20"):
        service.request([5] * 21)
    with pytest.raises(MedheadError, match="max_new_tokens must be from 1 to 30 on this server, got 31"):
        service.request([5], 31)
    whole = Service(FakeEngine(), tokenizer, "tiny", max_new_tokens=10**6)  # type: ignore[arg-type]
    assert whole.request([5] * 60).params.max_new_tokens == CONTEXT - 60


def test_closing_closes_the_engine(service: Service) -> None:
    service.close()
    assert service.closed
    assert not service.engine.running  # type: ignore[attr-defined]


# ---------------------------------------------------------------- memory


def test_weights_are_counted_from_the_files(tmp_path: Path) -> None:
    assert 5_000_000 < (memory_check.count_weights(DEMO_MODEL) or 0) < 6_000_000
    assert memory_check.count_weights(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert memory_check.count_weights(tmp_path) is None
    assert memory_check.count_weights("no-one/has-this-model") is None


def test_a_model_that_does_not_fit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    memory_check.check_memory(DEMO_MODEL, cpu, torch.float32)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 2**20)
    with pytest.raises(
        MedheadError, match=r"needs about 0\.0 GiB as float32, but only 0\.0 GiB of memory are free; try --dtype"
    ):
        memory_check.check_memory(DEMO_MODEL, cpu, torch.float32)
