"""Structured output: every text is of its grammar, and is the same whatever proposes."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, hf
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from conftest import noise_heads, tiny_llama
from medhead import Decoder, Grammar, MedheadError
from medhead.config import SamplingParams
from medhead.core.constraint import new_constraint
from medhead.grammar import compile_grammar
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer
from medhead.proposers import Proposer, build_proposer
from medhead.serving import Engine, Request
from scripted import OracleProposer, RandomProposer

END, LIMIT = 1, 140
VALUES: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 5},
    {"type": "integer", "minimum": 0, "maximum": 99},
    {"type": "boolean"},
    {"enum": ["red", "green", "blue"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "null"},
    {"const": "fixed"},
    {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "format": "date"},
]


def obj(**properties: Any) -> dict[str, Any]:
    """An object schema whose properties are all required, no others allowed."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# single values, objects of one and of two of them, nested objects, and arrays of objects: 50 schemas
SCHEMAS = [
    *VALUES,
    *(obj(value=value) for value in VALUES),
    *(obj(first=one, second=two) for one, two in zip(VALUES, VALUES[1:] + VALUES[:1], strict=True)),
    *(obj(name={"const": "x"}, inner=obj(deep=value)) for value in VALUES),
    *({"type": "array", "items": obj(id=value), "minItems": 1, "maxItems": 2} for value in VALUES),
]
RIGID = obj(
    identifier={"type": "integer", "minimum": 0, "maximum": 9},
    description={"enum": ["unremarkable"]},
    classification=obj(confidence={"type": "boolean"}, certification={"type": "boolean"}),
)
GRAMMARS: list[Grammar | None] = [
    Grammar.json_schema(SCHEMAS[21]),
    Grammar("regex", r"(cat|dog)-[0-9]{3,5}!"),
    None,
    Grammar.choice(["yes, of course", "no", 'a "quoted"\nlüne']),
    Grammar("grammar", 'root ::= "<" [a-d]+ ">" root | "."'),
]
PROMPTS = [[20, 21, 22, 23], [7, 9], [40, 41, 40, 41, 40], [65], [70, 71, 72]]
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "seed": 5}


@pytest.fixture(scope="module")
def decoder(tokenizer: PreTrainedTokenizerBase) -> Decoder:
    return Decoder(tiny_llama(vocab=len(tokenizer), context=640, eos_token_id=END, bos_token_id=None), "none")


@pytest.fixture(scope="module")
def reads(tokenizer: PreTrainedTokenizerBase) -> Any:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def padded(rows: int) -> dict[str, Tensor]:
    longest = max(map(len, PROMPTS[:rows]))
    ids = [[0] * (longest - len(row)) + row for row in PROMPTS[:rows]]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS[:rows]]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def texts(
    decoder: Decoder, tokenizer: Any, grammars: list[Grammar | None], inputs: Any = None, **options: Any
) -> list[list[int]]:
    """The new tokens of every row up to its end token, decoded with a grammar each."""
    inputs = padded(len(grammars)) if inputs is None else inputs
    options = {"max_new_tokens": LIMIT} | options
    out = decoder.generate(**inputs, grammar=grammars, tokenizer=tokenizer, **options)
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def makers(decoder: Decoder, plain: list[list[int]], prompts: list[list[int]]) -> dict[str, Proposer]:
    """Every kind of proposer, and two for tests: the last three visit many nodes."""
    target = decoder.target
    whole = [prompt + text for prompt, text in zip(prompts, plain, strict=True)]
    heads = noise_heads(target, "recurrent")
    return {
        "ngram": build_proposer("ngram", target),
        "lookahead": build_proposer("lookahead", target),
        "recycling": build_proposer("recycling", target),
        "heads": build_proposer("heads", target, heads=heads),
        "hybrid": build_proposer("hybrid", target, heads=heads, tree_size=12),
        "random": RandomProposer(target.vocab_size),
        "oracle": OracleProposer(whole, target.vocab_size),
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    SAMPLED,
    SAMPLED | {"top_k": 7, "top_p": 0.9},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},  # processors that are asked node by node
    {"suppress_tokens": list(range(5, 150)), "min_new_tokens": 30},  # they ban what the grammar needs
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_has_the_same_texts_whatever_proposes(decoder, tokenizer, reads, options) -> None:
    plain = texts(decoder, tokenizer, GRAMMARS, **options)
    check_texts(plain, reads)
    made = list(makers(decoder, plain, PROMPTS).items())
    for name, proposer in made if options in ({}, SAMPLED) else made[-3:]:
        with decoder.using(proposer):
            assert texts(decoder, tokenizer, GRAMMARS, **options) == plain, name


def check_texts(found: list[list[int]], reads: Any) -> None:
    """Every row is of its grammar; the free row may be anything."""
    said = [reads(row) for row in found]
    jsonschema.validate(json.loads(said[0]), SCHEMAS[21])
    assert re.fullmatch(r"(cat|dog)-[0-9]{3,5}!", said[1])
    assert said[3] in ("yes, of course", "no", 'a "quoted"\nlüne')
    whole = re.fullmatch(r"(<[a-d]+>)*\.", said[4])
    assert whole or (len(found[4]) == LIMIT and re.fullmatch(r"(<[a-d]+>)*(<[a-d]*)?", said[4]))
    assert all(row[-1] == END for row in (found[0], found[1], found[3]))


def test_rows_of_a_batch_do_not_change_each_other(decoder, tokenizer) -> None:
    together = texts(decoder, tokenizer, GRAMMARS)
    for prompt, grammar, text in zip(PROMPTS, GRAMMARS, together, strict=True):
        alone = decoder.generate(
            torch.tensor([prompt]), grammar=grammar, tokenizer=tokenizer, max_new_tokens=LIMIT, eos_token_id=END
        )[0, len(prompt) :].tolist()
        assert alone == text
    several = texts(decoder, tokenizer, GRAMMARS[:2], num_return_sequences=2, **SAMPLED)
    assert [bool(text[-1] == END) for text in several] == [True] * 4
    ids = torch.tensor([PROMPTS[2]])
    free = decoder.generate(ids, max_new_tokens=LIMIT)[0, len(PROMPTS[2]) :].tolist()
    assert free[: len(together[2])] == together[2]


class Masks(LogitsProcessor):
    """The slow reference: a matcher reads the whole text anew for every token."""

    def __init__(self, grammar: Grammar, tokenizer: Any, vocab: int, prompt: int) -> None:
        self.tokenizer, self.prompt, self.vocab = hf.from_tokenizer(tokenizer, vocab, END), prompt, vocab
        self.source = compile_grammar(grammar.kind, grammar.text)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        matcher = LLMatcher(self.tokenizer, self.source, log_level=0)
        assert matcher.consume_tokens(input_ids[0, self.prompt :].tolist())
        forced = matcher.compute_ff_tokens()
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[: self.vocab]
        allowed = torch.from_numpy(bits == 1)
        if forced:
            allowed = torch.arange(self.vocab) == forced[0]
        return scores.masked_fill(~allowed, -torch.inf)


def test_greedy_text_is_that_of_transformers_with_the_masks(decoder, tokenizer) -> None:
    model: Any = decoder.model
    for prompt, grammar in zip(PROMPTS, GRAMMARS, strict=True):
        if grammar is not None:
            ids, masks = torch.tensor([prompt]), Masks(grammar, tokenizer, decoder.target.vocab_size, len(prompt))
            theirs = model.generate(ids, logits_processor=[masks], max_new_tokens=120)
            with decoder.using("ngram"):
                ours = decoder.generate(ids, grammar=grammar, tokenizer=tokenizer, max_new_tokens=120)
            assert ours.tolist() == theirs.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_outputs_of_fifty_schemas_are_valid(options: dict[str, Any]) -> None:
    assert len(SCHEMAS) == 50
    model, tokenizer = load_model(DEMO_MODEL, torch.device("cpu"), torch.float32), load_tokenizer(DEMO_MODEL)
    inputs = tokenizer(["Describe it as JSON."] * 10, return_tensors="pt")
    decoders = [Decoder(model, name) for name in ("none", "ngram")]
    decoders.append(Decoder(model, "hybrid", heads=str(DEMO_HEADS), tree_size=12))
    for first in range(0, 50, 10):
        schemas = SCHEMAS[first : first + 10]
        grammars: Any = [Grammar.json_schema(schema) for schema in schemas]
        plain, *others = (texts(one, tokenizer, grammars, inputs, **options) for one in decoders)
        assert others == [plain, plain]
        for schema, text in zip(schemas, plain, strict=True):
            assert text[-1] == END
            jsonschema.validate(json.loads(tokenizer.decode(text, skip_special_tokens=True)), schema)


def test_forced_tokens_cost_no_pass(decoder, tokenizer, reads) -> None:
    inputs, grammars = {"input_ids": torch.tensor([PROMPTS[0]])}, [Grammar.json_schema(RIGID)]
    plain = texts(decoder, tokenizer, grammars, inputs)
    assert decoder.statistics.passes == len(plain[0])  # plain decoding stays plain
    assert json.loads(reads(plain[0]))["description"] == "unremarkable"
    with decoder.using("ngram"):
        assert texts(decoder, tokenizer, grammars, inputs) == plain
        assert decoder.statistics.passes * 3 < len(plain[0])


class CountsCalls(LogitsProcessor):
    """Keeps a state, so all rows advance together."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores


@pytest.mark.parametrize("proposer", ["none", "ngram"])
def test_processors_that_look_at_the_batch_go_with_grammars(decoder, tokenizer, proposer: str) -> None:
    with decoder.using(proposer):
        plain = texts(decoder, tokenizer, GRAMMARS[:3], max_new_tokens=60)
        counts = CountsCalls()
        found = texts(decoder, tokenizer, GRAMMARS[:3], max_new_tokens=60, logits_processor=[counts])
    assert found == plain
    assert counts.calls == max(map(len, plain))


def test_the_limit_cuts_a_text_anywhere(decoder, tokenizer) -> None:
    whole = texts(decoder, tokenizer, GRAMMARS[:1])[0]
    with decoder.using("ngram"):
        for limit in (1, 2, 9):
            assert texts(decoder, tokenizer, GRAMMARS[:1], max_new_tokens=limit)[0] == whole[:limit]


def test_engine_serves_grammars_beside_free_texts(decoder, tokenizer, reads) -> None:
    sampled: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    model: Any = decoder.model
    with Engine(Decoder(model, "hybrid", heads=noise_heads(decoder.target), tree_size=10), tokenizer) as engine:
        runs = [
            [
                engine.submit(Request(prompt, SamplingParams(LIMIT, grammar=one, **more), proposer, trace=True))
                for prompt, one in zip(PROMPTS, GRAMMARS, strict=True)
            ]
            for proposer in ("none", None, "ngram")
            for more in ({}, sampled)
        ]
        outputs = [[list(handle) for handle in run] for run in runs]
        cut = engine.submit(Request(PROMPTS[0], SamplingParams(4, grammar=GRAMMARS[0])))
        cut.wait()
    tokens = [[[token for output in one for token in output.tokens] for one in run] for run in outputs]
    assert tokens[0] == tokens[2] == tokens[4]
    assert tokens[1] == tokens[3] == tokens[5]
    for run, found in zip(runs, tokens, strict=True):
        check_texts(found, reads)
        assert run[0].result.reason == run[1].result.reason == "stop"
    assert cut.result.reason == "length"
    sources = {source for output in outputs[2][0] for source in output.sources}
    assert "grammar" in sources


WRONG = [
    ("json_schema", '{"type": "strin"}', "strin"),
    ("json_schema", '{"type": "string", "format": "banana"}', "banana"),
    ("json_schema", '{"not": {}}', "not"),
    ("json_schema", "[1]", "object"),
    ("json_schema", '{"type": ', "line 1"),
    ("json_schema", "false", "object"),
    ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
    ("regex", "[a-", "unclosed"),
    ("choice", "[]", "at least one"),
    ("choice", '["a", ""]', "empty"),
    ("choice", '"a"', "list"),
    ("grammar", "start: other", "other"),
    ("banana", "x", "kind must be one of"),
    ("regex", 5, "must be a string"),
]


@pytest.mark.parametrize(("kind", "text", "said"), WRONG)
def test_a_wrong_grammar_is_refused_in_one_line(kind: str, text: Any, said: str) -> None:
    with pytest.raises(MedheadError, match=re.escape(said)) as error:
        Grammar(kind, text)
    assert "\n" not in str(error.value)


def test_what_a_grammar_needs_is_said(decoder, tokenizer) -> None:
    ids, grammar = torch.tensor([[5, 6]]), Grammar("regex", "a+")
    for given, said in (
        ({"grammar": grammar}, "tokenizer=tokenizer"),
        ({"grammar": "a+", "tokenizer": tokenizer}, "medhead.Grammar"),
        ({"grammar": [grammar] * 3, "tokenizer": tokenizer}, "3 entries for 1 prompts"),
        ({"grammar": [], "tokenizer": tokenizer}, "0 entries"),
    ):
        with pytest.raises(MedheadError, match=re.escape(said)):
            decoder.generate(ids, max_new_tokens=5, **given)
    with pytest.raises(MedheadError, match="fast tokenizer"):
        new_constraint(grammar, object(), 300, [END])
    with pytest.raises(MedheadError, match="end token"):
        new_constraint(grammar, tokenizer, 300, [])
    with pytest.raises(MedheadError, match=r"medhead\.Grammar"):
        SamplingParams(grammar="a+")  # type: ignore[arg-type]


def test_json_has_the_form_of_json_dumps(decoder, tokenizer, reads) -> None:
    text = reads(texts(decoder, tokenizer, [Grammar.json_schema(RIGID)], {"input_ids": torch.tensor([[9, 8]])})[0])
    assert text == json.dumps(json.loads(text))


def test_a_model_may_have_more_logits_than_the_tokenizer_has_tokens(tokenizer) -> None:
    model: PreTrainedModel = tiny_llama(vocab=len(tokenizer) + 37, context=640, eos_token_id=END, bos_token_id=None)
    for name in ("none", "ngram"):
        text = texts(
            Decoder(model, name), tokenizer, [Grammar("regex", "[xyz]{4}")], {"input_ids": torch.tensor([[5]])}
        )
        assert re.fullmatch("[xyz]{4}", tokenizer.decode(text[0], skip_special_tokens=True))
