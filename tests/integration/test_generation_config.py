"""What a checkpoint's configuration says is obeyed by `generate`, the engine and the commands alike, or can be overridden."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conftest import tiny_llama
from medhead import Decoder, MedheadError
from medhead.bench import harness
from medhead.cli import generate
from medhead.config import SamplingParams
from medhead.generation_config import end_tokens, generate_arguments, override_generation_config
from medhead.serving import Engine, Request
from medhead_training import evaluate, generate_data

PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 9, 8], [20], [30, 31, 30, 31, 30, 31], [40, 41, 42], [50, 51]]


@pytest.fixture
def small(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny_llama(seed=5, vocab=len(tokenizer), eos_token_id=1, bos_token_id=None)


@pytest.fixture
def checkpoint(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model's folder whose configuration files are changed."""

    def make(generation: dict[str, Any] | None = None, template: str | None = None, **config: Any) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders["model"], folder)
        for name, changes in (("config.json", config), ("generation_config.json", generation or {})):
            fields = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(fields | changes))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def run(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def answer(folder: Path, capsys: pytest.CaptureFixture[str], *more: str, prompt: str = "Once upon a time") -> list[int]:
    arguments = ["--model", str(folder), "--prompt", prompt, "--max-new-tokens", "24", "--json", *more]
    code, out, err = run(generate.main, arguments, capsys)
    assert code == 0, err
    return json.loads(out)["token_ids"]


def transformers_answer(folder: Path, prompt: str = "Once upon a time", **arguments: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    given = {"max_new_tokens": 24, "do_sample": False} | arguments
    return model.generate(**ids, **given)[0, ids["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------- the engine


def expected(decoder: Decoder, request: Request, tokenizer: Any) -> list[int]:
    """What transformers gives for a request by itself; its own noise cannot, so plain decoding does for sampling."""
    ids, arguments = torch.tensor([request.prompt]), generate_arguments(decoder.model, request.params, tokenizer)
    if request.params.greedy:
        output = decoder.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    else:
        with decoder.using("none"):
            output = decoder.generate(ids, seed=request.params.seed, **arguments)
    return output[0, len(request.prompt) :].tolist()


def serve(decoder: Decoder, tokenizer: Any, requests: list[Request]) -> list[list[int]]:
    with Engine(decoder, tokenizer, max_rows=3) as engine:  # fewer places than requests: they join and leave
        handles = []
        for request in requests:
            handles.append(engine.submit(request))
            time.sleep(0.01)
        return [[token for output in handle for token in output.tokens] for handle in handles]


@pytest.mark.parametrize(
    "fields",
    [
        PENALTIES,
        {"suppress_tokens": [11, 12, 13], "begin_suppress_tokens": [14], "min_new_tokens": 4},
        {"typical_p": 0.7, "suppress_tokens": [11, 12], "top_k": 30, "min_p": 0.02, "max_length": 4000},
        {"bad_words_ids": [[7, 9], [4]], "sequence_bias": [[[8], -5.0]], "forced_eos_token_id": 1, "top_p": 0.8},
    ],
    ids=["penalties", "suppressed", "local", "banned"],
)
def test_the_engine_decodes_as_the_generation_configuration_says(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> None:
    small.generation_config.update(**fields)
    decoder = Decoder(small, "ngram")
    own = [
        SamplingParams(20),
        SamplingParams(31, temperature=0.9, seed=3),
        SamplingParams(17, repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0),
        SamplingParams(28, temperature=0.7, top_k=9, top_p=0.9, seed=4, repetition_penalty=1.0, no_repeat_ngram_size=0),
        SamplingParams(23, repetition_penalty=1.7),
        SamplingParams(25, temperature=1.2, top_k=0, min_p=0.0, top_p=1.0, seed=5),
    ]
    requests = [Request(prompt, params) for prompt, params in zip(PROMPTS, own, strict=True)]
    found = serve(decoder, tokenizer, requests)
    assert found == [expected(decoder, request, tokenizer) for request in requests]


def test_a_penalty_changes_the_served_text(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    request = Request([30, 31] * 6, SamplingParams(24))
    plain = serve(Decoder(small, "none"), tokenizer, [request])
    small.generation_config.update(**PENALTIES)
    assert serve(Decoder(small, "none"), tokenizer, [request]) != plain
    off = Request([30, 31] * 6, SamplingParams(24, repetition_penalty=1.0, no_repeat_ngram_size=0))
    assert serve(Decoder(small, "none"), tokenizer, [off]) == plain


def test_texts_end_at_the_tokens_of_tokenizer_and_configuration(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    request = Request([5, 6, 7], SamplingParams(24))
    text = serve(Decoder(small, "none"), tokenizer, [request])[0]
    places = [text.index(token) for token in dict.fromkeys(text)]  # where tokens occur first
    small.generation_config.eos_token_id = [text[places[5]], 2]
    assert end_tokens(small, tokenizer) == [text[places[5]], 2, tokenizer.eos_token_id]
    assert serve(Decoder(small, "none"), tokenizer, [request])[0] == text[: places[5] + 1]
    tokenizer = deepcopy(tokenizer)  # other tests use the session's
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(text[places[3]])
    assert serve(Decoder(small, "none"), tokenizer, [request])[0] == text[: places[3] + 1]
    own = Decoder(small, "none").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24)
    assert own[0, 3:].tolist() == text[: places[5] + 1]  # `model.generate` itself ends where transformers does


def test_stop_strings_of_the_configuration_end_a_served_text(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = serve(Decoder(small, "none"), tokenizer, [Request([5, 6, 7], SamplingParams(24))])[0]
    small.generation_config.stop_strings = [next(one for one in map(tokenizer.decode, text[3:]) if one.isascii())]
    request = Request([5, 6, 7], SamplingParams(24))
    found = serve(Decoder(small, "none"), tokenizer, [request])[0]
    assert found == expected(Decoder(small, "none"), request, tokenizer)
    assert found == text[: len(found)]
    assert len(found) < 24


def test_a_stop_string_that_is_a_special_token_ends_a_served_text(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = serve(Decoder(small, "none"), tokenizer, [Request([5, 6, 7], SamplingParams(24))])[0]
    tokenizer = deepcopy(tokenizer)  # other tests use the session's
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(text[4])]})
    small.generation_config.stop_strings = tokenizer.convert_ids_to_tokens(text[4])
    found = serve(Decoder(small, "none"), tokenizer, [Request([5, 6, 7], SamplingParams(24))])[0]
    assert found == text[: text.index(text[4]) + 1]


def test_an_engine_refuses_beams_of_the_configuration(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    small.generation_config.num_beams = 4
    with pytest.raises(MedheadError, match=r"num_beams=4 .*generation configuration.*pass num_beams=1.*none"):
        Engine(Decoder(small, "none"), tokenizer)


# ---------------------------------------------------------------- fields without an effect


def test_fields_that_change_no_text_are_ignored_with_one_warning(small: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    want = small.generate(ids, max_new_tokens=8, do_sample=False)
    fields = {"use_cache": False, "cache_implementation": "static", "output_attentions": True}
    small.generation_config.update(**fields)
    decoder = Decoder(small, "ngram")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert decoder.generate(ids, max_new_tokens=8, do_sample=False).tolist() == want.tolist()
    said = [str(one.message) for one in caught if "medhead" in str(one.message)]
    assert len(said) == 1
    assert all(name in said[0] for name in fields)
    with pytest.raises(MedheadError, match="use_cache"):
        decoder.generate(ids, max_new_tokens=8, use_cache=False)


@pytest.mark.filterwarnings("ignore:medhead ignores")
def test_a_checkpoint_with_leftovers_of_training_serves_every_command(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint({"cache_implementation": "hybrid", "use_cache": False}, use_cache=False)
    assert answer(folder, capsys) == transformers_answer(folder, use_cache=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n')
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--output", str(tmp_path / "data.jsonl")]
    assert run(generate_data.main, [*arguments, "--max-new-tokens", "8"], capsys)[0] == 0
    options = harness.bench_parser("speed", "", "", 1)
    harness.add_decoding_options(options, 8, 1)
    target = harness.load_target(options.parse_args(["--model", str(folder)]), "float32")
    given = generate_arguments(target.model, SamplingParams(8))
    assert Decoder(target, "none").generate(torch.tensor([[5, 6]]), **given).shape[1] > 2


# ---------------------------------------------------------------- commands


def test_the_command_line_obeys_and_overrides(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, folder = checkpoint(), checkpoint(PENALTIES | {"min_p": 0.3, "temperature": 0.3, "do_sample": True})
    want, penalised = answer(plain, capsys), answer(folder, capsys)
    assert penalised == transformers_answer(folder)
    assert penalised != want
    assert answer(folder, capsys, "--generation-config", "none") == want
    off = json.dumps({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0})
    assert answer(folder, capsys, "--generation-config", off) == want
    assert answer(plain, capsys, "--repetition-penalty", "1.5") == transformers_answer(plain, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--generation-config", "{"], "Expecting property name enclosed in double quotes"),
        (["--generation-config", '{"repetition_penality": 1}'], "knows no field 'repetition_penality'"),
        (["--generation-config", "{tmp_path}"], "holds no generation_config.json"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--generation-config", '{"num_beams": 4}'], "num_beams=4 is not supported"),
        (
            ["--generation-config", '{"bad_words_ids": [5]}'],
            "cannot be used: `bad_words_ids` has to be a list of lists",
        ),
        (["--generation-config", '{"eos_token_id": "x"}'], "the model's generation configuration cannot be used"),
        (["--generation-config", '{"stop_strings": 5}'], "must be strings, got 5"),
        (["--generation-config", '{"to_dict": 5}'], "knows no field 'to_dict'"),
        (["--generation-config", "/missing/folder"], "no such folder; give none, a folder or hub id"),
        (["--system", "Be kind."], "the model's chat template refuses these messages: no system, please"),
    ],
)
def test_wrong_input_is_one_line(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}A"
    arguments = ["--model", str(checkpoint(template=template)), "--prompt", "x", "--max-new-tokens", "4"]
    given = [option.replace("{tmp_path}", str(tmp_path)) for option in options]
    code, out, err = run(generate.main, [*arguments, *given], capsys)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_answers_for_training_are_those_that_are_served(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(PENALTIES | {"top_k": 40})
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("Once upon a time", "A", "The dragon said")))
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--output", str(output), "--seed", "9"]
    arguments += ["--temperatures", "0", "0.8", "--max-new-tokens", "24", "--batch-size", "2"]
    assert run(generate_data.main, arguments, capsys)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    params = [SamplingParams(24, one["temperature"], seed=9 + one["index"]) for one in records]
    requests = [Request(one["prompt_ids"], own) for one, own in zip(records, params, strict=True)]
    served = serve(Decoder(model, "recycling"), AutoTokenizer.from_pretrained(folder), requests)
    assert [one["answer_ids"] for one in records] == served
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    code, _, err = run(generate_data.main, arguments, capsys)  # the file is complete
    assert code == 2
    assert "was started with generation configuration" in err
    output.write_text("".join(output.read_text().splitlines(True)[:2]))  # as if it had been killed
    code, _, err = run(generate_data.main, arguments, capsys)
    assert code == 2
    assert "was started with generation configuration" in err


def test_stop_strings_of_a_checkpoint_end_answers_for_training_and_of_evaluate(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`messages` end before the string, as a text of the API; the tokens hold it."""
    stops, prompts, output = set("aeiost"), tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
    folder = checkpoint({"stop_strings": sorted(stops)})
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("Once upon a time", "A", "The dragon said")))
    given = ["--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "24"]
    assert run(generate_data.main, [*given, "--output", str(output), "--temperatures", "0"], capsys)[0] == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert any(stops & set(tokenizer.decode(record["answer_ids"])) for record in records)
    for record in records:
        request = Request(record["prompt_ids"], SamplingParams(24))
        with Engine(Decoder(model, "none"), tokenizer) as engine:
            assert record["messages"][-1]["content"] == engine.submit(request).wait()
        assert [record["answer_ids"]] == serve(Decoder(model, "none"), tokenizer, [request])
    assert run(evaluate.main, [*given, "--num-prompts", "1", "--proposers", "ngram"], capsys)[0] == 0


def test_an_override_keeps_the_special_tokens(small: PreTrainedModel, tmp_path: Path) -> None:
    small.generation_config.update(repetition_penalty=2.0, pad_token_id=7)
    override_generation_config(small, None)
    assert small.generation_config.repetition_penalty == 2.0
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5], "top_k": 3}')
    override_generation_config(small, str(tmp_path))
    config = small.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.top_k) == ([1, 5], 7, 3)
    override_generation_config(small, "none")
    config = small.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.top_k) == ([1, 5], 7, None)
