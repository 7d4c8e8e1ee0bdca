"""Training data: reading records, the assistant's mask under many chat templates, the token store, packing."""

from __future__ import annotations

import json
import pickle
import random
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medhead.errors import MedheadError
from medhead_training.data import packing
from medhead_training.data import token_store as store
from medhead_training.data.encode import Encoder
from medhead_training.data.packing import PackedDataset, best_fit
from medhead_training.data.prompts import encode_prompt, parse_prompt
from medhead_training.data.records import Record, parse_record, read_records
from medhead_training.data.token_store import TokenStore, prepare_tokens

Chat = list[tuple[str, str]]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def messages(chat: Chat) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


# -------------------------------------------------------------------- records


def test_every_kind_of_record(tmp_path: Path) -> None:
    chat = messages([("user", "Hi"), ("assistant", "Hello")])
    lines(tmp_path / "b.jsonl", {"text": "Once"}, {"messages": chat, "id": 3})
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + json.dumps({"prompt": "Hi", "answer": "Hello"}) + "\n\n   \n"
        '{"question": "Hi", "answer": "Hello\u2028there"}\n'
        + json.dumps({"prompt_ids": [1, 2], "answer_ids": [3], "messages": chat}),  # no line end
        encoding="utf-8",
    )
    (tmp_path / "notes.txt").write_text("not data")
    read: list[int] = []
    records = list(read_records(tmp_path, read.append))
    assert [record.messages for record in records[:2]] == [
        chat,
        messages([("user", "Hi"), ("assistant", "Hello\u2028there")]),
    ]
    assert records[2].ids == ([1, 2], [3])
    assert records[2].messages is None
    assert (records[3].text, records[4].messages) == ("Once", chat)
    assert records[1].where == f"{tmp_path / 'a.jsonl'}, line 4"
    assert sum(read) == sum((tmp_path / name).stat().st_size for name in ("a.jsonl", "b.jsonl"))
    assert [r.text for r in read_records([tmp_path / "b.jsonl", str(tmp_path / "b.jsonl")])][::2] == ["Once", "Once"]


def test_a_file_is_read_as_a_stream(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", *[{"text": "one"}] * 10)
    with path.open("a") as file:
        file.write("{broken\n")
    reader = read_records(path)
    assert [next(reader).text for _ in range(10)] == ["one"] * 10
    with pytest.raises(MedheadError, match="line 11 is not JSON"):
        next(reader)


WRONG_LINES = {
    "not JSON": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
    "no object": (b"[1]\n", "line 1: expected an object with `messages`.*got a list"),
    "no known field": (
        b'{"story": "a", "prompt": "b"}\n',
        r"`text`, or `prompt_ids` \+ `answer_ids`; it has prompt, story",
    ),
    "text is a number": (b'{"text": 5}\n', "`text` must be text, got a number"),
    "half a character": (b'{"text": "\\ud800"}\n', "lone surrogate"),
    "answer is a list": (b'{"prompt": "a", "answer": ["b"]}\n', "`answer` must be text, got a list"),
    "messages is text": (b'{"messages": "a"}\n', "`messages` must be a list"),
    "no message": (b'{"messages": []}\n', "`messages` must be a list.*an empty list"),
    "message without role": (b'{"messages": [{"content": "a"}]}\n', "message 1 must be an object"),
    "message without content": (
        b'{"messages": [{"role": "user"}]}\n',
        "`content of message 1` must be text, got nothing",
    ),
    "ids are text": (b'{"prompt_ids": [1], "answer_ids": ["2"]}\n', "`answer_ids` must be a list of whole numbers"),
    "ids are negative": (b'{"prompt_ids": [-1], "answer_ids": [2]}\n', "`prompt_ids` must be a list of whole numbers"),
    "very deep": (b"[" * 100_000 + b"\n", "is not JSON"),
    "empty": (b"", "holds no record"),
    "blank": (b"\n \n", "holds no record"),
}


@pytest.mark.parametrize("name", sorted(WRONG_LINES))
def test_wrong_lines_are_named(tmp_path: Path, name: str) -> None:
    content, says = WRONG_LINES[name]
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(MedheadError, match=says) as caught:
        list(read_records(tmp_path / "data.jsonl"))
    assert "data.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_sources(tmp_path: Path) -> None:
    for source, says in (
        (tmp_path / "nowhere.jsonl", "does not exist"),
        ("data/train.jsonl", "does not exist"),  # looks like owner/name, but is a file's name
        (tmp_path, "holds no .*jsonl file"),
        ([], "no training data was given"),
    ):
        with pytest.raises(MedheadError, match=says):
            list(read_records(source))


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        if name == "nobody/nothing":
            raise ConnectionError("no such\ndata set")
        return [{"text": None, "messages": [{"role": "user", "content": "Hi", "tool_calls": None}]}, {"other": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    reader = read_records("some-one/chats_v1.2")
    assert next(reader).messages == messages([("user", "Hi")])
    assert asked == [("some-one/chats_v1.2", {"split": "train", "streaming": True})]
    with pytest.raises(MedheadError, match=r"some-one/chats_v1.2, row 2: expected"):
        next(reader)
    with pytest.raises(MedheadError, match="no Hugging Face dataset that can be read: no such data set"):
        list(read_records("nobody/nothing"))


def test_prompts_wait_for_an_answer() -> None:
    chat = messages(
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "Sure")]
    )
    assert parse_prompt({"messages": chat}, "x") == chat[:4]
    assert parse_prompt({"messages": chat[:4]}, "x") == chat[:4]
    for fields in ({"prompt": "Hi"}, {"question": "Hi", "answer": "a"}, {"turns": ["Hi", "b"]}, {"text": "Hi"}):
        assert parse_prompt(fields, "x") == messages([("user", "Hi")])
    for wrong, says in (
        ({"messages": chat[:1]}, "no turn"),
        ({"messages": chat[2:3]}, "no turn"),
        ({"answer": "a"}, "it has answer"),
        ({"prompt": " "}, "is empty"),
        ({"turns": []}, "must be text, got an empty list"),
        ("Hi", "got text"),
    ):
        with pytest.raises(MedheadError, match=says):
            parse_prompt(wrong, "x")


# -------------------------------------------------------------------- mask

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    # name: template, special tokens, their roles
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "tagged": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        {"eos_token": "<|end|>"},
    ),
    "tagged without the end, newline after it": (
        "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{{ '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant\n' }}{% endif %}",
        ["<|bos|>", "<|h|>", "<|end|>"],
        {"eos_token": "<|end|>", "bos_token": "<|bos|>"},
    ),
    "tagged beyond the end": (
        "{% for m in messages %}{{ '<|h|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}",
        ["<|h|>", "<|end|>"],
        {"eos_token": "<|end|>"},
    ),
    "llama 3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\n\n' }}{%- endif %}",
        ["<|bos|>", "<|header|>", "<|/header|>", "<|eot|>"],
        {"bos_token": "<|bos|>", "eos_token": "<|eot|>"},
    ),
    "mistral": (  # the system prompt is shown before the last user turn, and only while nothing comes after it
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set ms = messages[1:] %}"
        "{% else %}{% set ms = messages %}{% endif %}{% for m in ms %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{% if loop.last and s is defined %}"
        "[INST]{{ s }}\n\n{{ m.content }}[/INST]{% else %}[INST]{{ m.content }}[/INST]{% endif %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "phi": (  # the end of the text follows the last turn
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        {"eos_token": "<|endoftext|>", "turn_end": "<|end|>"},
    ),
    "glm": (  # a turn is ended by the header of the next one
        "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["[gMASK]", "<|system|>", "<|user|>", "<|assistant|>"],
        {"eos_token": "<|user|>"},
    ),
    "qwen 3": (  # thoughts are shown in the last turn alone, empty ones too
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content }}"
        "\n</think>\n\n{% endif %}"
        "{{ c }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>"},
    ),
    "r1": (  # the prompt ends within thoughts, which are cut off in the chat
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<|Assistant|>{{ m.content.split('</think>')[-1] + '<|eos|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ["<|bos|>", "<|User|>", "<|Assistant|>", "<|eos|>"],
        {"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
    ),
    "words": (  # no special token at all: the header's space becomes one with the first word
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        [],
        {},
    ),
}
CHATS: dict[str, Chat] = {
    "one turn": [("user", "Hi there"), ("assistant", "Hello world!")],
    "system and turns": [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Grüße, 日本語 🙂!"),
        ("user", "More"),
        ("assistant", "world"),
    ],
    "spaces": [("user", " Hi "), ("assistant", "  The fox\n"), ("user", "\nMore"), ("assistant", "\n\n jumps ")],
    "same words": [("user", "world"), ("assistant", "world"), ("user", "world"), ("assistant", "user: assistant")],
    "thoughts": [
        ("user", "Hi"),
        ("assistant", "<think>\nold\n</think>\n\nHello"),
        ("user", "More"),
        ("assistant", "<think>\nhm\n</think>\n\nSure"),
    ],
    "ends with the user": [("user", "Hi"), ("assistant", "Hello"), ("user", "More")],
    "an empty answer": [("user", "Hi"), ("assistant", ""), ("user", "More"), ("assistant", "Sure")],
}


def make_tokenizer(
    template: str | None, special: list[str], trim: bool = False, **roles: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts words as Llama 3 and Qwen do; `trim` leaves white space out of the offsets."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    bpe.decoder = decoders.ByteLevel()
    if trim:
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Hello world the quick brown fox world jumps\n\nassistant: user: Sure\n\n"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=template,
        additional_special_tokens=[s for s in special if s not in roles.values()],
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in roles.items() if role != "turn_end"},
    )


def answers(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every run of marked tokens."""
    runs: list[list[int]] = [[]]
    for token, marked in zip(ids, mask, strict=True):
        if marked:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def same(found: list[str], expected: list[str]) -> bool:
    """Equal, but for a header's newline or space that is one token with the first of the answer."""
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(a == b or (a[0] in " \n" and a[1:] == b) for a, b in pairs)


def assistant_text(name: str, chat: Chat, turn_end: str) -> list[str]:
    """What the assistant writes in this template, ends of turns included."""
    found = []
    for index, (role, content) in enumerate(chat):
        last = index + 1 == len(chat)
        if role != "assistant":
            continue
        if name in ("llama 3", "glm", "words"):
            content = content.strip()
        if name == "qwen 3":
            thought = content.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in content else ""
            content = content.split("</think>")[-1].lstrip("\n")
            content = f"<think>\n{thought}\n</think>\n\n{content}" if last else content
        if name == "r1":
            content = content.split("</think>")[-1]
        if name == "glm":
            found.append("\n" + content + ("" if last else "<|user|>"))
        elif name == "words":
            found.append(content + "\n\n")
        elif name == "tagged without the end, newline after it" and not content:
            continue  # the template tags nothing
        else:
            found.append(content + turn_end)
    return found


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_mask_marks_what_the_assistant_said(name: str, trim: bool) -> None:
    template, special, roles = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special, trim, **roles)
    turn_end = roles.get("turn_end", roles.get("eos_token", ""))
    encoder = Encoder(tokenizer, end_tokens=[tokenizer.convert_tokens_to_ids(turn_end)] if turn_end else [])
    for title, chat in CHATS.items():
        if name == "words" and title in ("spaces", "an empty answer"):
            continue  # white space of text and template are the same tokens there
        encoded = encoder.encode(Record("x", messages=messages(chat)))
        assert encoded.skipped is None, (title, encoded.skipped)
        assert encoded.ids == tokenizer.apply_chat_template(messages(chat))["input_ids"], title
        found = answers(encoded.ids, encoded.mask, tokenizer)
        expected = assistant_text(name, chat, turn_end)
        assert same(found, expected), (title, found, expected)
        if title not in ("spaces", "same words") and name != "words":
            assert found == expected


@pytest.mark.parametrize("name", ["chatml", "llama 3", "phi", "qwen 3", "r1"])
def test_random_chats(name: str) -> None:
    template, special, roles = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special, True, **roles)
    turn_end = roles.get("turn_end", roles["eos_token"])
    encoder = Encoder(tokenizer, end_tokens=[tokenizer.convert_tokens_to_ids(turn_end)])
    rng = random.Random(5)
    for _ in range(40):
        chat: Chat = [("system", "Be kind.")] if rng.random() < 0.5 else []
        for turn in range(rng.randint(1, 5)):
            text = "".join(
                rng.choice(["world", " fox", "\n", "é", "日本", "🙂", "<", "user", ":", "1", " "]) for _ in range(8)
            )
            chat.append(("assistant" if turn % 2 else "user", text))
        expected = [text for text in assistant_text(name, chat, turn_end) if text]
        encoded = encoder.encode(Record("x", messages=messages(chat)))
        found = answers(encoded.ids, encoded.mask, tokenizer)
        assert same(found, expected), (found, expected)
        assert (encoded.skipped is None) == bool(expected)


def test_the_mask_of_a_turn_begins_where_the_prompt_ends() -> None:
    """The mask begins with the first token after the prompt that the model is given."""
    for name in ("chatml", "llama 3", "phi", "qwen 3", "glm"):
        template, special, roles = TEMPLATES[name]
        tokenizer = make_tokenizer(template, special, **roles)
        chat = messages(CHATS["one turn"])
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        encoded = Encoder(tokenizer).encode(Record("x", messages=chat))
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.mask[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_special_tokens_that_eat_the_white_space_after_them() -> None:
    """As Phi 3's do: the header's token then covers the first spaces of the answer too, but is not the assistant's."""
    template, special, roles = TEMPLATES["phi"]
    tokenizer = make_tokenizer(template, special, **roles)
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in special], special_tokens=True)
    encoder = Encoder(tokenizer, end_tokens=[tokenizer.convert_tokens_to_ids("<|end|>")])
    chat = messages([("user", "Hi"), ("assistant", "  The fox"), ("user", "More"), ("assistant", "\n world ")])
    encoded = encoder.encode(Record("x", messages=chat))
    assert len(encoded.ids) == len(tokenizer.apply_chat_template(chat)["input_ids"])
    assert answers(encoded.ids, encoded.mask, tokenizer) == ["The fox<|end|>", "world <|end|>"]


def test_white_space_at_the_end_of_an_answer_that_nothing_ends() -> None:
    """Offsets without white space give such a token no width; it is the assistant's all the same."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|sep|>{% endfor %}"
    tokenizer = make_tokenizer(template, ["<|sep|>"], trim=True)
    encoded = Encoder(tokenizer).encode(
        Record("x", messages=messages([("assistant", "The fox \n"), ("assistant", " ")]))
    )
    assert answers(encoded.ids, encoded.mask, tokenizer) == ["The fox \n", " "]


def test_a_tokenizer_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    template, special, roles = TEMPLATES["llama 3"]
    tokenizer = make_tokenizer(template, special, **roles)
    fast = Encoder(tokenizer).encode(Record("x", messages=messages(CHATS["system and turns"])))
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert Encoder(tokenizer).encode(Record("x", messages=messages(CHATS["system and turns"]))) == fast
    words = make_tokenizer(TEMPLATES["words"][0], [])
    skipped = Encoder(words).encode(Record("x", messages=messages([("user", "Hi"), ("assistant", "world")])))
    assert skipped.skipped is not None
    assert "no character offsets" in skipped.skipped


def test_tool_calls_are_the_assistants() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{% for t in m.tool_calls %}"
        "{{ '<call>' + t.name + '</call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, ["<|im_start|>", "<|im_end|>", "<call>", "</call>"], eos_token="<|im_end|>")
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
                {"role": "tool", "content": "sunny"},
                {"role": "assistant", "content": "It is sunny."},
            ]
        },
        "x",
    )
    encoded = Encoder(tokenizer).encode(record)
    assert answers(encoded.ids, encoded.mask, tokenizer) == ["<call>weather</call><|im_end|>", "It is sunny.<|im_end|>"]


def test_what_cannot_be_used_is_skipped_with_a_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    mistral = make_tokenizer(*TEMPLATES["mistral"][:2], **TEMPLATES["mistral"][2])
    odd = make_tokenizer(
        "{% for m in messages %}{{ m.content | upper }}<e>{% endfor %}{{ messages | length }}", ["<e>"], eos_token="<e>"
    )
    for used, chat, says in (
        (mistral, [("user", "a"), ("user", "b"), ("assistant", "c")], "refuses it: roles must alternate"),
        (tokenizer, [("user", "a")], "no turn of the assistant"),
        (odd, [("user", "a"), ("assistant", "b")], "was not found"),
    ):
        encoded = Encoder(used).encode(Record("x", messages=messages(chat)))
        assert encoded.skipped is not None
        assert says in encoded.skipped
        assert not encoded.ids


def test_text_ids_and_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, max_length=6)
    encoded = encoder.encode(Record("x", text="Once upon a time there was a café."))
    assert encoded.ids == tokenizer("Once upon a time there was a café.")["input_ids"][:6]
    assert encoded.mask == [True] * 6
    encoded = encoder.encode(Record("x", ids=([5, 6, 7], [8, 9, 10, 11, 1])))
    assert (encoded.ids, encoded.mask) == ([5, 6, 7, 8, 9, 10], [False] * 3 + [True] * 3)
    assert encoder.encode(Record("x", ids=([5] * 6, [8]))).skipped == "the assistant says nothing in the first 6 tokens"
    assert encoder.encode(Record("x", ids=([5], []))).skipped == "the assistant says nothing"
    assert encoder.encode(Record("x", text="")).skipped == "the assistant says nothing"
    with pytest.raises(MedheadError, match="data, line 3: token id 999 is outside this tokenizer's 300"):
        encoder.encode(Record("data, line 3", ids=([5], [999])))
    with pytest.raises(MedheadError, match="at least 1"):
        Encoder(tokenizer, max_length=0)


def test_bos_is_the_tokenizers_business() -> None:
    template, special, roles = TEMPLATES["llama 3"]
    tokenizer = make_tokenizer(template, special, **roles)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    bos = tokenizer.bos_token_id
    assert Encoder(tokenizer).encode(Record("x", text="Hello")).ids.count(bos) == 1
    assert Encoder(tokenizer).encode(Record("x", messages=messages(CHATS["one turn"]))).ids.count(bos) == 1
    long = messages([("user", "world " * 30)])
    full = encode_prompt(tokenizer, long, "x", 1000)
    cut = encode_prompt(tokenizer, long, "x", 10)
    assert cut == [bos, *full[-9:]]
    assert encode_prompt(tokenizer, long, "x", 1) == full[-1:]


def test_chats_need_a_template() -> None:
    tokenizer = make_tokenizer(None, [])
    with pytest.raises(
        MedheadError, match=r"a.jsonl, line 1 is a chat, but .* no chat template: use records with `text`"
    ):
        Encoder(tokenizer).encode(Record("a.jsonl, line 1", messages=messages(CHATS["one turn"])))
    assert Encoder(tokenizer).encode(Record("x", text="Hello")).ids
    assert encode_prompt(tokenizer, messages([("user", "Hello")]), "x", 9) == tokenizer("Hello")["input_ids"]
    with pytest.raises(MedheadError, match="x: the prompt has no token"):
        encode_prompt(tokenizer, messages([("user", "")]), "x", 9)


# -------------------------------------------------------------------- store


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [{"prompt": f"Tell {n}", "answer": "Once " * (n % 7 + 1)} for n in range(50)]
    return lines(tmp_path / "data.jsonl", *records, {"messages": messages([("user", "only asked")])})


def test_the_store_holds_every_token(data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = prepare_tokens(data, tokenizer, tmp_path / "cache", progress=False)
    encoder = Encoder(tokenizer)
    encoded = [encoder.encode(record) for record in read_records(data)][:-1]
    assert (made.documents, made.records, made.skipped) == (50, 51, {"no turn of the assistant": 1})
    assert (made.tokens, made.assistant_tokens) == (sum(len(e.ids) for e in encoded), sum(sum(e.mask) for e in encoded))
    for document in range(len(made)):
        ids, mask = made[document]
        assert (ids.tolist(), mask.tolist()) == (encoded[document].ids, encoded[document].mask)
    assert made[-1][0].tolist() == encoded[-1].ids
    assert made.lengths.tolist() == [len(e.ids) for e in encoded]
    assert sorted(p.name for p in made.folder.iterdir()) == ["ends.npy", "mask.bin", "meta.json", "tokens.bin"]
    assert made.folder.joinpath("tokens.bin").stat().st_size == 4 * made.tokens
    reopened = pickle.loads(pickle.dumps(made))  # as a loader's process gets it: the path, not the tokens
    assert len(pickle.dumps(made)) < 1000
    assert reopened[7][0].tolist() == made[7][0].tolist()


def test_a_store_is_read_again_only_if_something_changed(
    data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, passes = tmp_path / "cache", []
    real = store.write_tokens
    monkeypatch.setattr(store, "write_tokens", lambda *arguments: (passes.append(1), real(*arguments)))

    def prepared(**options: Any) -> Path:
        return prepare_tokens(data, tokenizer, cache, progress=False, **options).folder

    first = prepared()
    assert prepared() == first
    assert len(passes) == 1
    assert len({first, prepared(max_length=20), prepared(max_length=21), prepared(end_tokens=[5])}) == 4
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("<|assistant|>", "<|user|>")
        assert prepared() != first
    finally:
        tokenizer.chat_template = template
    with data.open("a") as file:
        file.write(json.dumps({"text": "Once upon a time"}) + "\n")
    second = prepared()
    assert second != first
    assert len(passes) == 6
    (second / "tokens.bin").write_bytes(b"damaged")
    with pytest.raises(MedheadError, match="no readable token store"):
        TokenStore(second)
    assert prepared() == second  # a damaged store is written anew
    assert TokenStore(second).documents == 51
    with pytest.raises(MedheadError, match="no readable token store"):
        TokenStore(tmp_path / "nowhere")


def test_a_killed_pass_leaves_no_store(
    data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    real = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, record: real(self, record) if "line 9" not in record.where else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        prepare_tokens(data, tokenizer, cache, progress=False)
    assert not list(cache.iterdir())
    monkeypatch.undo()
    left = cache / f".abc.{socket.gethostname()}.{2**22 + 5}"  # no such process: what a SIGKILL leaves
    left.mkdir()
    other = cache / ".abc.elsewhere.1"
    other.mkdir()
    prepare_tokens(data, tokenizer, cache, progress=False)
    assert not left.exists()
    assert other.exists()


def test_data_without_an_assistant(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = {"messages": messages([("user", "Hi")])}
    data = lines(tmp_path / "data.jsonl", asked, asked, {"prompt": "long " * 50, "answer": "a"})
    with pytest.raises(
        MedheadError,
        match=r"among the 3 records .* \(2 times: no turn of the assistant; 1 times: the assistant says nothing in",
    ):
        prepare_tokens(data, tokenizer, tmp_path / "cache", max_length=20, progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_held_out_documents(data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = prepare_tokens(data, tokenizer, tmp_path / "cache", progress=False)
    for held_out, count in ((0.1, 5), (7, 7), (0, 0), (0.0, 0), (0.001, 1)):
        train, held = made.split(held_out, seed=3)
        assert len(held) == count
        assert sorted([*train, *held]) == list(range(50))
    assert made.split(5, 3)[1].tolist() == made.split(5, 3)[1].tolist() != made.split(5, 4)[1].tolist()
    for wrong in (1.0, -0.1, 50, -1, float("nan")):
        with pytest.raises(MedheadError, match=r"held"):
            made.split(wrong, 3)


# -------------------------------------------------------------------- packing


class FakeStore:
    """Documents of given lengths; token t of all tokens has the id t."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.asarray(lengths)
        self.ends = np.cumsum(self.lengths)

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(start, end, dtype=np.int32)
        return ids, ids % 3 == 0


def packed(lengths: list[int], documents: list[int] | None = None, length: int = 64, **options: Any) -> PackedDataset:
    chosen = list(range(len(lengths))) if documents is None else documents
    return PackedDataset(FakeStore(lengths), chosen, length, **options)  # type: ignore[arg-type]


LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "short": lambda rng: rng.randint(1, 20),
    "mixed": lambda rng: rng.randint(1, 64),
    "longer than a row": lambda rng: rng.randint(1, 300),
}


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_every_token_comes_once_an_epoch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 100)  # several windows
    rng = random.Random(1)
    lengths = [LENGTHS[name](rng) for _ in range(700)]
    documents = [n for n in range(700) if n % 10]  # the others are held out
    dataset = packed(lengths, documents, seed=5, epochs=2, pad_token=9)
    store = dataset.store
    owner = np.repeat(np.arange(700), lengths)
    rows = []
    for epoch in range(2):
        seen: list[int] = []
        for index in dataset.rows_of_epoch(epoch):
            row = {name: values.tolist() for name, values in dataset[index].items()}
            assert {len(values) for values in row.values()} == {64}
            used = [n for n in range(64) if row["document"][n] >= 0]
            assert used == list(range(len(used)))  # padding is at the end
            assert row["document"][: len(used)] == sorted(row["document"][: len(used)])
            assert row["input_ids"][len(used) :] == [9] * (64 - len(used))
            assert not any(row["mask"][len(used) :])
            assert row["position_ids"][len(used) :] == [0] * (64 - len(used))
            for number in set(row["document"]) - {-1}:
                at = [n for n in used if row["document"][n] == number]
                ids = [row["input_ids"][n] for n in at]
                assert [row["position_ids"][n] for n in at] == list(range(len(at)))
                assert ids == list(range(ids[0], ids[0] + len(ids)))  # one piece, in order
                assert len(set(owner[ids])) == 1  # of one document
                assert (ids[0] - (store.ends - store.lengths)[owner[ids[0]]]) % 64 == 0
                assert [row["mask"][n] for n in at] == [token % 3 == 0 for token in ids]
                seen += ids
            rows.append(row["input_ids"])
        assert sorted(seen) == [token for token in range(len(owner)) if owner[token] % 10]
    first, second = (rows[slice(r.start, r.stop)] for r in (dataset.rows_of_epoch(0), dataset.rows_of_epoch(1)))
    assert first != second  # an epoch is packed anew
    assert len(rows) == len(dataset)
    assert dataset.efficiency > 0.85
    assert dataset.efficiency == pytest.approx(sum(lengths[d] for d in documents) * 2 / (64 * len(rows)))


def test_a_row_is_a_function_of_seed_and_index() -> None:
    rng = random.Random(2)
    lengths = [rng.randint(1, 90) for _ in range(300)]
    one, other = packed(lengths, seed=1, epochs=3), packed(lengths, seed=1, epochs=3)
    order = list(range(len(one)))
    rng.shuffle(order)
    shuffled = {index: one[index]["input_ids"].tolist() for index in order}
    assert all(other[index]["input_ids"].tolist() == shuffled[index] for index in range(len(other)))
    longer = packed(lengths, seed=1, epochs=5)  # more epochs do not change the first ones
    assert all(longer[index]["input_ids"].tolist() == shuffled[index] for index in range(len(one)))
    assert any(packed(lengths, seed=2)[n]["input_ids"].tolist() != shuffled[n] for n in range(5))
    for epoch in range(3):
        rows = one.rows_of_epoch(epoch)
        assert one.epochs_in(rows.start) == epoch
        assert one.epochs_in(rows.start + len(rows) // 2) == pytest.approx(epoch + len(rows) // 2 / len(rows))
    assert one.epochs_in(len(one)) == 3
    for index in (-1, len(one)):
        with pytest.raises(IndexError):
            one[index]
    for wrong in ({"documents": []}, {"length": 0}, {"epochs": 0}, {"seed": -1}):
        with pytest.raises(MedheadError):
            packed(lengths, **wrong)  # type: ignore[arg-type]


def test_best_fit() -> None:
    rng = random.Random(3)
    for _ in range(50):
        sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 60))]
        bins = best_fit(sizes, 20)
        assert sorted(n for members in bins for n in members) == list(range(len(sizes)))
        assert all(0 < sum(sizes[n] for n in members) <= 20 for members in bins)
        assert len(bins) <= 11 / 9 * -(-sum(sizes) // 20) + 2  # what decreasing best fit guarantees, generously
    assert [sorted(b) for b in best_fit([5, 15, 10, 10], 20)] == [[0, 1], [2, 3]]


def test_a_row_of_a_real_store(data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = prepare_tokens(data, tokenizer, tmp_path / "cache", progress=False)
    train, held = made.split(0.1, 0)
    dataset = PackedDataset(made, train, 64, seed=1)
    row = dataset[0]
    assert [str(row[name].dtype) for name in ("input_ids", "mask", "document", "position_ids")] == [
        "torch.int64", "torch.bool", "torch.int64", "torch.int64"
    ]  # fmt: skip
    kept = {tuple(made[int(document)][0].tolist()) for document in train}
    for number in range(int(row["document"].max()) + 1):
        here = row["document"] == number
        assert tuple(row["input_ids"][here].tolist()) in kept
        assert row["mask"][here].any()
    assert dataset.tokens == sum(int(made.lengths[document]) for document in train)
    assert len(held) == 5
