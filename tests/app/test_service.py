"""What page and API share: conversations that fit, limits, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from app_engine import CONTEXT, FakeEngine

from medhead.errors import MedheadError
from medhead.model.loading import DEMO_MODEL
from medhead_app import memory_check as fit
from medhead_app.service import PromptTooLongError, Service, split_exchanges


@pytest.fixture
def service(tokenizer: Any) -> Service:
    return Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]


def talk(count: int, system: str | None = "Be kind.", text: str = "once upon a time") -> list[dict[str, str]]:
    """A conversation that ends with the user's message `count`."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number in range(1, count):
        messages.append({"role": "user", "content": f"{number} {text}"})
        messages.append({"role": "assistant", "content": f"answer {number}"})
    return [*messages, {"role": "user", "content": f"{count} {text}"}]


def test_a_conversation_that_fits_is_the_templates(service: Service, tokenizer: Any) -> None:
    messages = talk(1)
    encoded = service.chat(messages, 8)
    assert (
        encoded.ids
        == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    assert encoded.dropped == 0


def test_the_oldest_exchanges_are_left_out(service: Service, tokenizer: Any) -> None:
    messages = talk(12)
    encoded = service.chat(messages, 10)
    assert 0 < encoded.dropped < len(messages) - 2
    assert encoded.dropped % 2 == 0  # whole exchanges
    assert len(encoded.ids) <= CONTEXT - 10
    text = tokenizer.decode(encoded.ids)
    assert "Be kind." in text  # the system prompt stays
    assert "12 once upon" in text  # so does the newest message
    assert "<|user|>1 once" not in text
    one_more = [messages[0], *messages[1 + encoded.dropped - 2 :]]  # and no more than had to go
    read = tokenizer.apply_chat_template(one_more, add_generation_prompt=True, return_dict=True)
    assert len(read["input_ids"]) > CONTEXT - 10


def test_room_for_the_answer_is_kept_up_to_half_the_context(service: Service) -> None:
    little, much = service.chat(talk(12), 1), service.chat(talk(12), 10_000)
    assert len(much.ids) <= CONTEXT // 2
    assert little.dropped < much.dropped


def test_nothing_is_left_out_unasked(service: Service) -> None:
    with pytest.raises(PromptTooLongError, match=r"has \d+ tokens, at most 63 fit"):
        service.chat(talk(12), 1, cut=False)


def test_a_message_that_does_not_fit_is_an_error(service: Service) -> None:
    with pytest.raises(PromptTooLongError):
        service.chat(talk(1, text="dragon " * 100), 1)


def test_a_long_newest_message_may_use_the_answers_room(service: Service) -> None:
    encoded = service.chat(talk(3, text="a cafe xyz bcd efgh" * 2), CONTEXT)
    assert CONTEXT // 2 < len(encoded.ids) < CONTEXT
    assert encoded.dropped == 4


def test_templates_that_refuse_say_so_in_one_line(service: Service) -> None:
    with pytest.raises(MedheadError, match="chat template refuses these messages: roles are"):
        service.chat([{"role": "tool", "content": "x"}], 1)
    with pytest.raises(MedheadError, match="no messages"):
        service.chat([], 1)


def test_without_a_template_messages_are_joined(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.tokenizer, "chat_template", None)
    messages = [{"role": "system", "content": "Once"}, {"role": "user", "content": "upon"}]
    assert service.chat(messages, 1).ids == service.encode("Once\n\nupon")


def test_exchanges() -> None:
    system, exchanges = split_exchanges(talk(3))
    assert [message["role"] for message in system] == ["system"]
    assert [len(part) for part in exchanges] == [2, 2, 1]
    assert split_exchanges([{"role": "system", "content": "x"}]) == ([], [[{"role": "system", "content": "x"}]])


def test_requests_stay_within_the_limits(tokenizer: Any) -> None:
    service = Service(FakeEngine(), tokenizer, "tiny", max_prompt_tokens=20, max_new_tokens=30)  # type: ignore[arg-type]
    assert service.request([5] * 20).max_new_tokens == 30
    assert service.request([5], 7, seed=3).seed == 3
    with pytest.raises(PromptTooLongError, match="at most 20"):
        service.request([5] * 21)
    with pytest.raises(MedheadError, match="1 to 30 tokens, got 31"):
        service.request([5], 31)
    whole = Service(FakeEngine(), tokenizer, "tiny", max_new_tokens=10**6)  # type: ignore[arg-type]
    assert whole.request([5] * 60).max_new_tokens == CONTEXT - 60


def test_closing_closes_the_engine(service: Service) -> None:
    service.close()
    assert service.closed
    assert not service.engine.running  # type: ignore[attr-defined]


# ---------------------------------------------------------------- memory


def test_weights_are_counted_from_the_files(tmp_path: Path) -> None:
    assert 5_000_000 < (fit.weights_in(DEMO_MODEL) or 0) < 6_000_000
    assert fit.weights_in(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert fit.weights_in(tmp_path) is None
    assert fit.weights_in("no-one/has-this-model") is None


def test_a_model_that_does_not_fit_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    fit.check_fits(DEMO_MODEL, cpu, torch.float32)
    monkeypatch.setattr(fit, "free_bytes", lambda device: 2**20)
    with pytest.raises(
        MedheadError, match=r"needs about 0\.0 GiB as float32, but only 0\.0 GiB of memory are free; --dtype"
    ):
        fit.check_fits(DEMO_MODEL, cpu, torch.float32)
