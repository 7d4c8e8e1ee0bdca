"""`exact`: logits and texts do not depend on the tree, the proposer or the batch, bit for bit, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from conftest import noise_heads, tiny_llama
from families import ACCEPTED, STATEFUL, exists, tiny, tiny_stateful
from medhead import Decoder, MedheadError, TypicalAcceptance
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.config import EXACT
from medhead.core.tree import TokenTree
from medhead.model.bitwise import UNPROVEN, Bitwise
from medhead.model.block_weights import use_blocks
from medhead.model.loading import load_model, load_tokenizer
from medhead.model.named_models import DEMO_HEADS
from medhead.model.prompt_reader import read_whole
from medhead.model.row_products import SIXTY_FOUR
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.scheduling.cost_model import CostModel
from medhead.serving import Engine, Request
from medhead.serving.request import SamplingParams
from triton_here import interpreted, needs_triton, row_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAMILIES = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox",
    "gpt2", "olmo2", "gpt_oss", "deepseek_v3", "starcoder2", "cohere2", "opt", "llama4_text",
]  # fmt: skip
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")  # many small products, each of which waits for all threads
ALL = [  # family, type, threads: every family with every type, each with another number of threads
    (name, dtype, 1 if name in EXPERTS else 1 + (place + turn) % 3)
    for place, name in enumerate(FAMILIES)
    for turn, dtype in enumerate(DTYPES)
    if exists(name)
]
SIZES = (2, 9, 33, 64)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_parents(nodes: int) -> list[int]:
    """A tree with long paths and many branches."""
    generator = torch.Generator().manual_seed(nodes)
    return [0] + [int(torch.randint(max(0, node - 5), node, (1,), generator=generator)) for node in range(1, nodes)]


def path_logits(target: Target, cache: Any, prefix: int, tree: TokenTree) -> Tensor:
    """Logits `[nodes, vocab]` of every node by a pass over it alone, its ancestors before it."""
    found: dict[int, Tensor] = {}
    parents, tokens, depth = tree.parents[0].tolist(), tree.tokens[0], tree.depth[0].tolist()

    def visit(node: int) -> None:
        cache.lengths.set([prefix + depth[node]])
        found[node] = target.verify(cache, TokenTree.root(tokens[node : node + 1]))[0][0, 0]
        for child in range(node + 1, tree.nodes):
            if parents[child] == node:
                visit(child)

    visit(0)
    return torch.stack([found[node] for node in range(tree.nodes)])


def check_logits(model: PreTrainedModel, by_blocks: bool = True) -> Target:
    """Compare trees of up to 64 nodes with passes over one node, after a prompt of 21 tokens."""
    target = Target(model, probe=False, exact="bitwise")
    assert target.bitwise is not None
    target.bitwise.by_blocks = by_blocks
    ids = torch.randint(3, 60, (21 + 64,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), target.active():
        cache = target.new_cache(1, 120)
        read_whole(target, cache, [ids[:21].tolist()])
        tree = TokenTree.from_parents(ids[20:84], torch.tensor(random_parents(64)))
        expected = path_logits(target, cache, 20, tree)
        for nodes in SIZES:
            cache.lengths.set([20])
            part = TokenTree.from_parents(tree.tokens[0, :nodes], tree.parents[0, :nodes])
            logits, _ = target.verify(cache, part)
            assert torch.equal(logits[0], expected[:nodes])
    return target


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("place", range(len(FAMILIES)))
def test_logits_of_trees_are_those_of_single_nodes(place: int, by_blocks: bool) -> None:
    name, dtype = FAMILIES[place], DTYPES[(place + by_blocks) % 3]
    if not exists(name):
        pytest.skip(f"transformers has no {name} here")
    check_logits(tiny(name, ACCEPTED[name], dtype=dtype), by_blocks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "count"), ALL)
def test_logits_for_every_type_and_number_of_threads(name: str, dtype: torch.dtype, count: int) -> None:
    with threads(count):
        check_logits(tiny(name, ACCEPTED[name], dtype=dtype))


HALF_IS_SLOW = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[:2])]
OTHERS_ARE_SLOW = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]


@pytest.mark.parametrize("dtype", HALF_IS_SLOW)
def test_wide_layers(dtype: torch.dtype) -> None:
    """Layers that can be packed, and rows of activations that are no multiple of a vector."""
    check_logits(tiny_llama(hidden_size=192, intermediate_size=331, context=128).to(dtype))


@pytest.mark.parametrize("dtype", HALF_IS_SLOW)
def test_layers_with_int8_weights(dtype: torch.dtype) -> None:
    """Linear layers of another class."""
    model = tiny_llama(context=128).to(dtype)
    use_blocks(model, "int8")
    check_logits(model)


def text(decoder: Decoder, ids: list[int], **options: Any) -> list[int]:
    """The new tokens of one prompt."""
    out = decoder.generate(torch.tensor([ids]), **{"max_new_tokens": 32, "do_sample": False} | options)
    return out[0, len(ids) :].tolist()


PROMPTS = [[5, 9, 13, 5, 9, 30, 5, 9], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3}


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("dtype", OTHERS_ARE_SLOW)
def test_texts_are_those_of_plain_decoding_and_of_transformers(dtype: torch.dtype, exact: str) -> None:
    model = tiny_llama().to(dtype)
    try:
        target = Target(model, exact=exact)  # refused with "transformers" where rows of products are padded
    except MedheadError as error:
        pytest.skip(str(error))
    plain = Decoder(target, "none")
    expected = [(text(plain, ids), text(plain, ids, **SAMPLED)) for ids in PROMPTS[:2]]
    for proposer in ("ngram", "recycling", "heads"):
        heads = {"heads": noise_heads(target, "block")} if proposer == "heads" else {}
        decoder = Decoder(target, build_proposer(proposer, target, **heads))
        assert [(text(decoder, ids), text(decoder, ids, **SAMPLED)) for ids in PROMPTS[:2]] == expected
    if exact == "transformers":
        for ids, (greedy, _) in zip(PROMPTS, expected, strict=False):
            own = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
            assert own[0, len(ids) :].tolist() == greedy


@pytest.mark.slow
def test_texts_of_the_demo_model() -> None:
    model, tokenizer = load_model(None, "cpu", "bfloat16"), load_tokenizer(None)
    target = Target(model, exact="transformers")
    plain, heads = Decoder(target, "none"), Decoder(target, "heads", heads=DEMO_HEADS)
    recycling = Decoder(target, "recycling")
    for chat in read_prompts(None, 6):
        ids = encode_prompts(tokenizer, [chat], 100)[0]
        for options in ({}, SAMPLED):
            expected = text(plain, ids, max_new_tokens=96, **options)
            assert text(heads, ids, max_new_tokens=96, **options) == expected
            assert text(recycling, ids, max_new_tokens=96, **options) == expected
            if not options:
                own = model.generate(torch.tensor([ids]), max_new_tokens=96, do_sample=False)
                assert own[0, len(ids) :].tolist() == expected
    assert heads.statistics.accepted_length > 1.5


def test_a_row_of_a_batch_is_the_prompt_alone() -> None:
    decoder = Decoder(tiny_llama().bfloat16(), "recycling", exact="bitwise")
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in PROMPTS])
    out = decoder.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=24, do_sample=False)
    for row, one in zip(out[:, width:].tolist(), PROMPTS, strict=True):
        alone = text(decoder, one, max_new_tokens=24)
        assert row[: len(alone)] == alone


@pytest.mark.parametrize("new", [1, 12])
def test_a_served_request_is_the_prompt_alone(tokenizer: Any, new: int) -> None:
    model = tiny_llama(vocab=len(tokenizer)).bfloat16()
    alone = Decoder(model, "none", exact="bitwise")
    params = [SamplingParams(new), SamplingParams(new, temperature=0.9, seed=4, top_p=0.9), SamplingParams(new)]
    with Engine(Decoder(model, "recycling", exact="bitwise"), tokenizer) as engine:
        requests = zip(PROMPTS, params, strict=True)
        handles = [engine.submit(Request(prompt=ids, params=one, logprobs=1)) for ids, one in requests]
        found = [[(token, step.logprobs) for step in handle for token in step.tokens] for handle in handles]
        results = [handle.result for handle in handles]
    for ids, one, tokens, result in zip(PROMPTS, params, found, results, strict=True):
        options = {} if one.greedy else {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 4}
        expected = text(alone, ids, max_new_tokens=new, **options)
        assert [token for token, _ in tokens] == expected
        assert all(logprobs for _, logprobs in tokens)
        assert result.new_tokens == len(expected)


def test_the_first_token_teaches_no_cost_of_a_pass() -> None:
    """The prompt's own pass gives it, so there is no pass whose seconds could be learnt."""
    target = Target(tiny_llama().bfloat16(), exact="bitwise")
    costs = CostModel({1: 1e-3, 8: 2e-3, 32: 4e-3})
    decoder = Decoder(target, build_proposer("hybrid", target, members=["recycling"], costs=costs))
    text(decoder, PROMPTS[0], max_new_tokens=1)
    assert (costs.load_factor, costs.tree_factor) == (1.0, 1.0)
    text(decoder, PROMPTS[0], max_new_tokens=2)
    assert costs.load_factor != 1.0


def mix_rows(model: PreTrainedModel) -> Any:
    """Let every token of a pass depend on all others, by a little; return the hook."""
    return model.model.norm.register_forward_hook(lambda module, args, out: out + 1e-2 * out.mean(1, keepdim=True))


def test_the_self_test_refuses_rows_that_depend_on_each_other() -> None:
    model = tiny_llama().bfloat16()
    mix_rows(model)
    with pytest.raises(MedheadError, match="cannot be promised for LlamaForCausalLM in bfloat16 with 1 threads"):
        Decoder(model, "recycling", exact="bitwise", probe=False)


def test_the_promise_ends_with_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    decoder = Decoder(model, "recycling", exact="bitwise")
    mix_rows(model)
    text(decoder, PROMPTS[0])  # proved before, and not again
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MedheadError, match="with 2 threads"):
        text(decoder, PROMPTS[0])


def test_what_does_not_go_with_it() -> None:
    model = tiny_llama()
    with pytest.raises(MedheadError, match="exact must be 'auto', 'bitwise', 'transformers' or None, got"):
        Decoder(model, "none", exact="yes")
    with pytest.raises(MedheadError, match="step 'eager', which changes texts"):
        Decoder(model, "none", exact="bitwise", step="eager")
    with pytest.raises(MedheadError, match="typical acceptance, which changes texts"):
        Decoder(model, "none", exact="bitwise", typical=TypicalAcceptance())
    with pytest.raises(MedheadError, match="this Target was made without it"):
        Decoder(Target(model, probe=False), "none", exact="bitwise")
    with pytest.raises(MedheadError, match="its attention is 'reference'"):
        Decoder(model, "none", exact="bitwise", attention="reference")
    if "lfm2" in STATEFUL and exists("lfm2"):
        with pytest.raises(MedheadError, match="its layers hold states"):
            Decoder(tiny_stateful("lfm2"), "none", exact="bitwise", probe=False)


def test_on_a_gpu_it_is_refused_until_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tiny_llama(), probe=False)
    target.device = torch.device("cuda")
    with pytest.raises(
        MedheadError, match=rf"has not yet run on a GPU \({UNPROVEN}=1 tries it\); leave the option out"
    ):
        Bitwise(target)
    with pytest.raises(MedheadError, match="it is on cuda, and the promise is for a CPU"):
        Bitwise(target, "transformers")
    monkeypatch.setenv(UNPROVEN, "1")
    with pytest.raises(MedheadError, match="its attention is 'sdpa', and it must be 'triton'"):
        Bitwise(target)
    with pytest.raises(MedheadError, match="it is on cuda, and the promise is for a CPU"):
        Bitwise(target, by_default=True)


class Rows(TorchDispatchMode):
    """Notes the shapes of the rows that are multiplied, and of those whose mean is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[tuple[Any, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kind = torch.ops.aten, func.overloadpacket
        if kind in (aten.linear, aten.mm, aten.addmm, aten.mean):
            rows = args[1] if kind is aten.addmm else args[0]
            self.shapes.add(("mean" if kind is aten.mean else "product", *rows.shape))
        return func(*args, **(kwargs or {}))


@needs_triton
@interpreted
def test_the_form_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: logits of trees are those of single nodes, and no pass has another shape of products and norms."""
    monkeypatch.setenv(UNPROVEN, "1")
    monkeypatch.setattr("medhead_kernels.tree_path_attention.SPAN", 32)
    model = tiny_llama(num_hidden_layers=1, num_key_value_heads=1)
    monkeypatch.setattr(Bitwise, "_differing_nodes", lambda self: (0, [1] * 9))  # the check below is the same
    with row_products():
        target = Target(model, probe=False, attention="triton", packed=False, exact="bitwise")
        ids, shapes = torch.randint(3, 60, (39,), generator=torch.Generator().manual_seed(1)), []
        with torch.inference_mode(), target.active():
            cache = target.new_cache(1, 120)
            read_whole(target, cache, [ids[:31].tolist()])
            tree = TokenTree.from_parents(ids[30:39], torch.tensor(random_parents(9)))
            expected = path_logits(target, cache, 30, tree)
            for nodes in (1, 2, 9):
                cache.lengths.set([30])
                part = TokenTree.from_parents(tree.tokens[0, :nodes], tree.parents[0, :nodes])
                with Rows() as rows:
                    logits, _ = target.verify(cache, part)
                shapes.append(rows.shapes)
                assert torch.equal(logits[0], expected[:nodes])
    assert shapes[0] == shapes[1] == shapes[2]
    assert {shape[1] for shape in shapes[0]} == {64}
    assert {shape[0] for shape in shapes[0]} == {"product", "mean"}


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_products_of_one_number_of_rows(rows: int) -> None:
    x, seen = torch.randn(rows, 5), []

    def product(given: Tensor) -> Tensor:
        seen.append(given.shape[0])
        return 2 * given

    assert torch.equal(SIXTY_FOUR.apply(product, x), 2 * x)
    assert seen == [64] * -(-rows // 64)


def promised(decoder: Decoder) -> str | None:
    """What a decoder's target promises."""
    return None if decoder.target.bitwise is None else decoder.target.bitwise.exact


def test_half_precision_is_bit_for_bit_by_default() -> None:
    model = tiny_llama().bfloat16()
    assert promised(Decoder(model, "recycling")) == "bitwise"
    assert promised(Decoder(model, "recycling", exact=None)) is None
    assert promised(Decoder(model, "none", step="eager")) is None
    assert promised(Decoder(model, "none", typical=TypicalAcceptance())) is None
    assert promised(Decoder(Target(model), "none")) is None
    assert promised(Decoder(tiny_llama(), "none")) is None
    assert promised(Decoder(tiny("mixtral", ACCEPTED["mixtral"], dtype=torch.bfloat16), "none")) is None  # experts cost


def test_a_default_promise_ends_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    decoder = Decoder(model, "recycling")
    with torch.autocast("cpu", torch.bfloat16):
        text(decoder, PROMPTS[0])
    assert promised(decoder) is None
    decoder = Decoder(model, "recycling")
    assert promised(decoder) == "bitwise"
    Decoder(decoder.target, "none", typical=TypicalAcceptance())
    assert promised(decoder) is None
    hook = mix_rows(model)
    assert promised(Decoder(model, "recycling", probe=False)) is None
    hook.remove()
    monkeypatch.setattr("medhead.model.bitwise.path_attention.unavailable", lambda: "no compiler")
    assert promised(Decoder(model, "recycling")) is None
    assert promised(Decoder(model, "recycling", exact="bitwise")) == "bitwise"


def test_an_engine_keeps_prefixes_unless_somebody_asked_for_bits(tokenizer: Any) -> None:
    model = tiny_llama(vocab=len(tokenizer)).bfloat16()
    for exact in ("auto", "bitwise"):
        decoder = Decoder(model, "recycling", exact=exact)
        assert promised(decoder) == "bitwise"
        before = text(decoder, PROMPTS[2])
        with Engine(decoder, tokenizer) as engine:
            for _ in range(2):
                handle = engine.submit(Request(PROMPTS[2], SamplingParams(4)))
                handle.wait()
        assert (handle.result.cached_tokens > 0) == (exact == "auto")
        assert text(decoder, PROMPTS[2]) == before  # read whole, whatever the engine did
    assert promised(Decoder(Target(model, exact="auto"), "none", exact="bitwise")) == "bitwise"


def test_a_self_test_that_passed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    Target(model, exact="bitwise")
    monkeypatch.setattr(Bitwise, "_differing_nodes", lambda self: (9, list(range(9))))
    Target(model, exact="bitwise")
    model.lm_head.weight.data[0] += 1
    with pytest.raises(MedheadError, match="logits of the self-test differ"):
        Target(model, exact="bitwise")
