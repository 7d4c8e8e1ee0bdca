"""Images in messages of the API and of the page: what the model gets, what is refused, and what the browser keeps."""

from __future__ import annotations

import json
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from app_engine import FakeEngine
from page_engine import all_of, answered, run_async
from PIL import Image

from medhead import Decoder
from medhead.errors import MedheadError
from medhead.generation_config import end_tokens
from medhead.model.loading import load_processor, load_tokenizer
from medhead.serving import Engine
from medhead_app import images
from medhead_app.api import conformance
from medhead_app.api.errors import ApiError
from medhead_app.api.responses_schema import ResponsesRequest
from medhead_app.api.schema import ChatRequest, parse_body
from medhead_app.chat import conversation as conversations
from medhead_app.chat.generation import ChatSettings, generate_answer
from medhead_app.chat_encoder import ChatEncoder, EncodedChat
from medhead_app.images import MAX_IMAGES, read_data_url
from medhead_app.listen import run_in_thread
from medhead_app.server import build_app
from medhead_app.service import Service
from vision_chat import chat_model, chat_processor, data_url, picture

QUESTION = "What is this?"
PNG = data_url(picture())


@pytest.fixture(scope="module")
def processor() -> Any:
    return chat_processor()


@pytest.fixture(scope="module")
def service(processor: Any) -> Iterator[Service]:
    decoder = Decoder(chat_model(processor), "ngram", tree_size=8)
    with Engine(decoder, processor.tokenizer, max_rows=4) as engine:
        yield Service(engine, processor.tokenizer, "tiny", processor=processor)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with run_in_thread(build_app(service), service) as url:
        yield url


def part(url: str = PNG) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def post(address: str, messages: list[Any], **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{address}/v1/chat/completions", json=body | fields, timeout=30)


def alone(service: Service, processor: Any, *shown: Image.Image) -> tuple[dict[str, Any], str]:
    """What the processor makes of a message, and the text that `generate` gives after it."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": one} for one in shown]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(messages, return_tensors="pt", **options)
    model = service.engine.decoder.model
    ends = end_tokens(model, service.tokenizer)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    return inputs, service.decode(found[0, inputs["input_ids"].shape[1] :].tolist())


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


# ---------------------------------------------------------------- answers


def test_an_image_in_a_chat_gives_the_text_of_generate(address: str, service: Service, processor: Any) -> None:
    inputs, expected = alone(service, processor, picture())
    options: dict[str, Any] = {"model": "tiny", "messages": user(part()), "max_tokens": 12, "temperature": 0}
    answer = client(address).chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]  # those of the image included
    stream = client(address).chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected
    content: Any = [
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    response = client(address).responses.create(
        model="tiny", input=[{"role": "user", "content": content}], max_output_tokens=12, temperature=0
    )
    assert response.output_text == expected


def test_other_images_and_several_of_them(address: str, service: Service, processor: Any) -> None:
    shown = {name: picture(name) for name in ("blue", "green")}
    cases = [(shown["blue"],), (shown["green"],), (shown["blue"], shown["green"]), ()]
    expected = [alone(service, processor, *images)[1] for images in cases]
    assert len(set(expected)) == len(cases)
    found = []
    for images_of in cases:
        answer = post(address, user(*(part(data_url(one)) for one in images_of)), max_tokens=12).json()
        found.append(answer["choices"][0]["message"]["content"])
        if images_of:
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert found == expected


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_every_format_is_read(kind: str) -> None:
    frames = {"save_all": True, "append_images": [picture("blue")]} if kind == "GIF" else {}
    found = read_data_url(data_url(picture(), kind, **frames)).decode()
    assert (found.mode, found.size) == ("RGB", (40, 30))
    red, _, blue = found.getpixel((39, 29))
    assert red > 200 > 60 > blue  # the first frame


def test_an_image_is_turned_and_shown_on_white() -> None:
    turned = picture()
    exif = turned.getexif()
    exif[274] = 6  # turned by 90 degrees
    assert read_data_url(data_url(turned, "JPEG", exif=exif)).decode().size == (30, 40)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_data_url(data_url(clear)).decode().getpixel((1, 1)) == (255, 255, 255)


def test_grey_of_16_bits_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.new("I;16", (3, 1))
    for column, value in enumerate((255, 0x80FF, 0xFFFF)):
        grey.putpixel((column, 0), value)
    shown = read_data_url(data_url(grey)).decode()
    assert [shown.getpixel((column, 0)) for column in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    clear = read_data_url(data_url(grey, transparency=255)).decode()
    assert [clear.getpixel((column, 0)) for column in range(2)] == [(255,) * 3, (128,) * 3]
    monkeypatch.setitem(images.FORMATS, "image/tiff", "TIFF")
    for mode in ("I", "F"):
        with pytest.raises(MedheadError, match="the image has 32 bits a channel"):
            read_data_url(data_url(Image.new(mode, (2, 2)), "TIFF")).decode()


# ---------------------------------------------------------------- refusals


def data_url_of_header(width: int, height: int) -> str:
    """Return a PNG of a few bytes that says it has this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return "data:image/png;base64," + b64encode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b"")).decode()


REFUSED = {
    "http": ("https://example.com/cat.png", r"fetches nothing.*got a URL that begins with 'https:'"),
    "file": ("file:///etc/passwd", r"fetches nothing.*got a URL that begins with 'file:'"),
    "path": ("/etc/passwd", "fetches nothing.*got no data URL"),
    "svg": ("data:image/svg+xml;base64,PHN2Zz4=", "must be one of image/png"),
    "base64": ("data:image/png;base64,!!!!", "not valid base64"),
    "text": ("data:image/png;base64,aGVsbG8=", "not a file of the kind PNG"),
    "format": (data_url(picture(), "BMP").replace("bmp", "png"), "not a file of the kind PNG"),
    "damaged": (PNG[: len("data:image/png;base64,") + 80], "cannot be decoded"),
    "pixels": (data_url_of_header(4096, 4097), "the image has 4096 x 4097 pixels; at most 16,777,216"),
    "bomb": (data_url_of_header(10**5, 10**5), "too many pixels"),
    "bytes": ("data:image/png;base64," + "A" * (images.MAX_BYTES // 3 * 4 + 8), "larger than 4,194,304 bytes"),
}


def assert_refused(response: httpx.Response, message: str, param: str = "messages") -> None:
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert re.search(message, error["message"]), error["message"]
    assert "\n" not in error["message"]
    assert (error["param"] or "messages").startswith(param)


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_is_not_allowed_is_refused_in_one_line(address: str, name: str) -> None:
    url, message = REFUSED[name]
    assert_refused(post(address, user(part(url))), message)


def test_the_size_is_checked_before_an_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30)
    monkeypatch.setattr(Image.Image, "load", None)
    assert read_data_url(PNG)
    with pytest.raises(MedheadError, match=r"the image has 40 x 31 pixels; at most 1,200"):
        read_data_url(data_url_of_header(40, 31))


def test_images_in_wrong_places_are_refused(address: str) -> None:
    for role in ("system", "assistant"):
        messages = [{"role": role, "content": [part()]}, {"role": "user", "content": QUESTION}]
        assert_refused(post(address, messages), "only messages of the role user", "messages[0].content")
    many = user(*[part()] * (MAX_IMAGES + 1))
    assert_refused(post(address, many), f"at most {MAX_IMAGES} images are allowed, got {MAX_IMAGES + 1}")
    fetched = [{"type": "image", "url": "https://example.com/cat.png"}]
    assert_refused(post(address, [{"role": "user", "content": fetched}]), "part 0 must be", "messages[0].content")
    placeholder = [{"type": "text", "text": "<image>"}, part()]
    assert_refused(post(address, [{"role": "user", "content": placeholder}]), "processor refuses|cannot read a prompt")


def test_a_model_of_text_refuses_images(tokenizer: Any) -> None:
    service = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    with run_in_thread(build_app(service), service) as url:
        assert_refused(post(url, user(part())), "the model 'tiny' is served for text only")
        body = {"model": "tiny", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]}
        assert_refused(httpx.post(f"{url}/v1/responses", json=body), "served for text only", "input")
        assert post(url, user(part()), padding="x" * 5 * 2**20).status_code == 413
    with pytest.raises(MedheadError, match="the model reads text only: leave out the images"):
        ChatEncoder(tokenizer).encode([{"role": "user", "content": [read_data_url(PNG)]}])


# ---------------------------------------------------------------- chats


def test_a_template_that_reads_texts_gets_texts(processor: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    encoded = ChatEncoder(processor.tokenizer, processor).encode(messages).token_ids
    assert processor.tokenizer.decode(encoded) == f"<|user|>{QUESTION}<|assistant|>"
    texts = chat_processor()
    texts.tokenizer.chat_template = texts.chat_template = tokenizer.chat_template
    found = ChatEncoder(texts.tokenizer, texts).encode(messages).token_ids
    options = {"add_generation_prompt": True, "return_dict": True}
    assert found == texts.tokenizer.apply_chat_template(messages, **options)["input_ids"]


def test_what_a_processor_says_of_tokens_grows_with_them() -> None:
    types, pixels = torch.tensor([[0, 1, 0]]), torch.ones(1, 3)
    grown = EncodedChat([5, 6, 7], 2, {"token_type_ids": types, "pixel_values": pixels}).followed_by([8])
    assert (grown.token_ids, grown.dropped) == ([5, 6, 7, 8], 2)
    assert grown.model_inputs["token_type_ids"].tolist() == [[0, 1, 0, 0]]
    assert grown.model_inputs["pixel_values"] is pixels


def test_a_processor_is_loaded_where_there_is_one(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    chat_model(processor).config.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    loaded = load_processor(tmp_path, tokenizer)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == tokenizer.chat_template == processor.chat_template
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(MedheadError, match=r"the processor of .* cannot be loaded"):
        load_processor(tmp_path, tokenizer)


def test_an_answer_about_an_image_goes_on_where_it_was_cut(service: Service) -> None:
    asked = conversations.add_message(conversations.new_conversation(), QUESTION, [PNG])

    def answer(conversation: Any, limit: int, go_on: bool = False) -> Any:
        settings = ChatSettings(temperature=0, max_new_tokens=limit)
        updates = run_async(all_of(generate_answer(service, conversation, settings, go_on=go_on)))
        assert not updates[-1].error
        return updates[-1].conversation

    whole, begun = answer(asked, 12), answer(asked, 5)
    assert begun["messages"][-1]["token_ids"] == whole["messages"][-1]["token_ids"][:5]
    assert answer(begun, 7, go_on=True)["messages"][-1]["token_ids"] == whole["messages"][-1]["token_ids"]


# ---------------------------------------------------------------- conversations of the page


def test_a_message_keeps_its_images_through_the_browser() -> None:
    asked = conversations.add_message(answered("hello"), "", [PNG, PNG])
    assert asked["messages"][-1] == {"role": "user", "content": "", "images": [PNG, PNG]}
    assert conversations.last_images(asked) == [PNG, PNG]
    stored = conversations.stored_form(asked)
    assert conversations.parse_conversation(stored)["messages"][-1] == asked["messages"][-1]
    edited = conversations.edit_message(asked, 2, "And this?")
    assert edited["messages"][-1] == {"role": "user", "content": "And this?", "images": [PNG, PNG]}
    content = conversations.prompt_messages(edited)[-1]["content"]
    assert [type(one).__name__ for one in content] == ["ImageFile", "ImageFile", "str"]
    assert conversations.add_message(conversations.new_conversation(), "", [PNG])["title"] == "Image"


def test_images_beyond_the_limit_are_not_kept_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    view = pytest.importorskip("medhead_app.chat.view", reason="markdown-it-py is not installed").message_view
    monkeypatch.setattr(conversations, "KEPT_IMAGE_CHARACTERS", 2 * len(PNG))
    asked = conversations.add_message(answered("hello"), "one", [PNG])
    asked = conversations.add_message(asked, "two", [PNG, PNG])
    kept = conversations.parse_conversation(conversations.stored_form(asked))["messages"]
    assert kept[-1]["images"] == [PNG, PNG]
    assert kept[-2] == {"role": "user", "content": "one", "lost": 1}
    assert "1 image of this message was not kept in this browser" in view(kept[-2])["summary"]
    assert view(asked["messages"][-1], 3)["html"].count('alt="Image ') == 2
    stored = {**asked, "messages": kept}
    edited = conversations.edit_message(stored, len(kept) - 2, "and now?")
    assert edited["messages"][-1] == {"role": "user", "content": "and now?", "lost": 1}
    assert kept[-2]["content"] == "one"
    undone, text = conversations.undo_message(edited)
    assert (text, conversations.last_images(edited)) == ("and now?", [])
    assert conversations.restore_messages(undone)["messages"][-1]["lost"] == 1


def test_what_is_no_image_is_not_taken_from_a_browser() -> None:
    for wrong in ("https://example.com/cat.png", 'data:image/png;base64,"onerror="', 5, None):
        raw = {"messages": [{"role": "user", "content": "x", "images": [wrong]}]}
        assert conversations.parse_conversation(raw)["messages"] == [{"role": "user", "content": "x"}]
    with pytest.raises(MedheadError, match="a message may have 4 images, got 5"):
        conversations.add_message(conversations.new_conversation(), "x", [PNG] * 5)


def test_the_page_offers_images_where_the_model_takes_them(service: Service, tokenizer: Any) -> None:
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    from medhead_app.chat.handlers import Handlers
    from medhead_app.chat.layout import Components

    text = Service(FakeEngine().start(), tokenizer, "tiny")  # type: ignore[arg-type]
    text.engine.has_heads = False  # type: ignore[misc]
    for one, visible in ((service, True), (text, False)):
        with gr.Blocks():
            components = Components(one)
        assert components.images.visible is visible
        handlers = Handlers(one, components)
        fields = ["", 0, 1, 4, "", "none", "automatic"]
        request: Any = SimpleNamespace(session_hash="s")
        sent = run_async(all_of(handlers.send(request, conversations.new_conversation(), "", [PNG], *fields)))
        if visible:
            assert sent[0][components.images] == []
            assert sent[-1][components.conversation]["messages"][0]["images"] == [PNG]
            undone = handlers.modify(SimpleNamespace(action="undo"), sent[-1][components.conversation])  # type: ignore[arg-type]
            assert undone[components.images] == [PNG]
        else:  # the message goes back into the box
            assert sent[-1][components.images] == [PNG]
            assert "text only" in sent[-1][components.live]


@pytest.mark.parametrize("name", conformance.PARTS)
def test_the_table_says_which_parts_are_read(name: str) -> None:
    values: dict[str, Any] = {"image_url": {"url": PNG}, "input_image": PNG, "input_audio": {}, "input_file": ""}
    field = "text" if name.endswith("text") else "image_url" if "image" in name else name
    content = [{"type": name, field: values.get(name, "hello")}]
    chat, responses = (
        {"messages": [{"role": "user", "content": content}]},
        {"input": [{"role": "user", "content": content}]},
    )
    for reads, kind, body in zip(
        conformance.PARTS[name], (ChatRequest, ResponsesRequest), (chat, responses), strict=True
    ):
        given = json.dumps({"model": "tiny"} | body).encode()
        if reads:
            parse_body(kind, given)  # type: ignore[type-var]
        else:
            with pytest.raises(ApiError, match="part 0 must be"):
                parse_body(kind, given)  # type: ignore[type-var]
