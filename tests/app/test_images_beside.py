"""Images beside other work: what does not wait for them, how often they are decoded, and when they are freed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from page_engine import all_of, run_async
from test_images import PNG, QUESTION, part, post, user

from medhead import Decoder
from medhead.serving import Engine
from medhead_app.chat import conversation as conversations
from medhead_app.chat.generation import ChatSettings, generate_answer
from medhead_app.chat.race import race
from medhead_app.images import ImageFile, read_data_url
from medhead_app.listen import run_in_thread
from medhead_app.server import build_app
from medhead_app.service import Service
from vision_chat import chat_model, chat_processor, data_url, picture


@pytest.fixture(scope="module")
def processor() -> Any:
    return chat_processor()


@pytest.fixture(scope="module")
def service(processor: Any) -> Iterator[Service]:
    with Engine(Decoder(chat_model(processor), "ngram", tree_size=8), processor.tokenizer) as engine:
        yield Service(engine, processor.tokenizer, "tiny", processor=processor)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with run_in_thread(build_app(service), service) as url:
        yield url


def test_a_truncated_chat_decodes_an_image_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [read_data_url(data_url(picture(color))) for color in ("blue", "red", "green")]
    texts = [{"role": "user", "content": f"{number} {QUESTION * 4}"} for number in range(40)]
    messages = [*texts, *({"role": "user", "content": [one, QUESTION]} for one in shown)]
    decode, decoded = ImageFile.decode, list[ImageFile]()
    monkeypatch.setattr(ImageFile, "decode", lambda one: (decoded.append(one), decode(one))[1])
    encoded = service.encode_chat(messages, 8)
    assert decoded == shown
    newest = service.encode_chat(messages[encoded.dropped :], 8)
    assert 0 < encoded.dropped < len(texts)
    assert newest.token_ids == encoded.token_ids
    assert torch.equal(newest.model_inputs["pixel_values"], encoded.model_inputs["pixel_values"])


def test_texts_do_not_wait_for_images(service: Service, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, beside = type(processor.image_processor), list[list[int]]()
    preprocess: Callable[..., Any] = kind.preprocess

    def busy(*args: Any, **options: Any) -> Any:
        thread = threading.Thread(target=lambda: beside.append(service.encode(QUESTION)), daemon=True)
        thread.start()
        thread.join(10)
        assert beside
        return preprocess(*args, **options)

    monkeypatch.setattr(kind, "preprocess", busy)
    assert service.encode_chat([{"role": "user", "content": [read_data_url(PNG), QUESTION]}], 8).model_inputs
    assert beside[0] == service.encode(QUESTION)


def test_the_page_encodes_beside_its_event_loop(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, threads = service.encode_chat, list[threading.Thread]()
    noted = lambda *args: (threads.append(threading.current_thread()), encode(*args))[1]  # noqa: E731
    monkeypatch.setattr(service, "encode_chat", noted)
    asked, settings = (
        conversations.add_message(conversations.new_conversation(), "x", [PNG]),
        ChatSettings(max_new_tokens=8),
    )
    run_async(all_of(generate_answer(service, asked, settings)))
    run_async(all_of(race(service, QUESTION, settings)))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_images_are_freed_while_the_answer_is_written(
    address: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, pixels, left = service.engine.submit, list[weakref.ref[Any]](), list[int]()

    def noted(request: Any) -> Any:
        pixels.append(weakref.ref(request.model_inputs["pixel_values"]))
        return submit(request)

    def at_end(request: Any, result: Any) -> None:
        left.append(sum(one() is not None for one in pixels))

    monkeypatch.setattr(service.engine, "submit", noted)
    monkeypatch.setattr(service.engine, "listeners", [*service.engine.listeners, at_end])
    for stream in (False, True):
        assert post(address, user(part()), max_tokens=60, stream=stream, ignore_eos=True, n=2).status_code == 200
    content = [{"type": "input_image", "image_url": PNG}]
    body = {"model": "tiny", "input": [{"role": "user", "content": content}], "max_output_tokens": 60}
    assert httpx.post(f"{address}/v1/responses", json=body, timeout=30).status_code == 200
    counted = httpx.get(f"{address}/metrics").text
    assert [f'{{endpoint="{name}",' in counted for name in ("chat", "responses", "page")] == [True, True, False]
    assert 'requests_total{endpoint="chat",reason="length"} 4.0' in counted
    asked = conversations.add_message(conversations.new_conversation(), QUESTION, [PNG])
    run_async(all_of(generate_answer(service, asked, ChatSettings(max_new_tokens=60))))
    assert len(pixels) == 6
    assert left == [0] * 6
