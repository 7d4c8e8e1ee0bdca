"""Heads that a checkpoint brings along: they say what transformers' own layers say, and the text stays what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_conversations import check_continued
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_layers

from conftest import tiny_llama
from families import ACCEPTED, STATEFUL, tiny
from medhead import Decoder, MedheadError
from medhead.cli.common import make_decoder
from medhead.cli.generate import parser
from medhead.model.target import Target
from medhead.proposers.heads import HeadsExpander, HeadsProposer

MtpModel: Any = getattr(modeling_layers, "MtpModel", None)
needs_mtp = pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"),
    reason=f"transformers {transformers.__version__} has no MtpModel.forward_layer (5.24 has)",
)
LAYERS, VOCAB = 2, 24  # so few tokens that guesses are accepted
BOTH = [("deepseek_v3", 1), ("glm4_moe", 1), ("deepseek_v3", 3), ("glm4_moe", 2)]
PROMPTS = [[5, 9, 13, 5, 9, 20, 21], [7, 3], [11]]


@dataclass
class Case:
    """A checkpoint with MTP layers: the model, the target, and transformers' own MTP model."""

    model: PreTrainedModel
    target: Target
    mtp: Any


def write_checkpoint(folder: Path, family: str, count: int) -> None:
    """A random checkpoint in its own key names: the MTP blocks are stored as further layers, with four modules more.

    Blocks change the residual stream little, in the target as in the MTP layers, so that guesses are accepted now and then.
    """
    config = ACCEPTED[family] | {"vocab_size": VOCAB, "num_hidden_layers": LAYERS + count, "initializer_range": 0.5}
    tiny(family, config).save_pretrained(folder)
    weights, size = load_file(folder / "model.safetensors"), 32
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= 0.01
    for layer in range(LAYERS, LAYERS + count):
        name = f"model.layers.{layer}"
        weights[f"{name}.eh_proj.weight"] = torch.cat([torch.eye(size), 0.1 * torch.randn(size, size)], 1)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            weights[f"{name}.{norm}.weight"] = 1 + 0.2 * torch.randn(size)
        weights[f"{name}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()  # real ones repeat them
        weights[f"{name}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": count}
    fields.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module", params=BOTH, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family, count = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, family, count)
    with pytest.MonkeyPatch.context() as patch:
        # the classes name the layer behind the last one of the published sizes, 61 of DeepSeek-V3; here it is another
        patterns = [rf"model\.layers\.{LAYERS + layer}.*" for layer in range(count)]
        kind = type(tiny(family, ACCEPTED[family]))
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", patterns)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        yield Case(model, Target(model), MtpModel.from_pretrained(model).eval() if MtpModel else None)


def padded(batch: int) -> dict[str, Tensor]:
    """The first prompts, padded on the left."""
    width = max(map(len, PROMPTS[:batch]))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS[:batch]])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS[:batch]])
    return {"input_ids": ids, "attention_mask": mask}


@needs_mtp
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_that_of_transformers(case: Case, batch: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 999 if batch == 1 else 17}
    expected = case.model.generate(**padded(batch), **options)
    decoder = Decoder(case.target, "heads", heads="mtp")
    assert torch.equal(decoder.generate(**padded(batch), **options), expected)
    assert decoder.statistics.accepted_length > 1.3


@needs_mtp
@pytest.mark.parametrize("shape", [None, [[0], [1], [0, 0], [1, 0], [0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0, 0]]])
def test_seeded_sampling_is_that_of_plain_decoding(case: Case, shape: list[list[int]] | None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "top_k": 0, "seed": 11}
    expected = Decoder(case.target, "none").generate(**padded(3), **options)
    decoder = Decoder(case.target, heads="mtp", shape=shape)
    assert torch.equal(decoder.generate(**padded(3), **options), expected)


class SpyExpander(HeadsExpander):
    """Writes down what the heads say at every node: (text, path below the root, logits)."""

    records: list[tuple[list[int], list[int], Tensor]]

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        found = super().expand(state, tokens, depth)
        if depth == 0:
            self.paths: list[dict[int, list[int]]] = [{0: []} for _ in self.state.texts]
        for row, text in enumerate(self.state.texts):
            for place, index in enumerate(found[0][row, :, 0].tolist()):
                if depth:
                    above = self.paths[row][int(state[row, place])]
                    self.paths[row][index] = [*above, int(tokens[row, place])]
                logits = self.output_head.logits(self._shared.outputs[row, index], depth)
                self.records.append((list(text), self.paths[row][index], logits))
        return found


def run_layer(mtp: Any, layer: int, ids: Tensor, hidden: Tensor, first: int) -> Tensor:
    """One layer over a whole text without a cache; `first` is the position of its first token."""
    embeddings, positions = mtp.embed_tokens(ids), torch.arange(first, first + ids.shape[1])[None]
    turn = mtp.rotary_emb(embeddings, positions)
    return mtp.layers[layer](embeddings, hidden, turn, None, positions, None)


@torch.no_grad()
def plain_logits(case: Case, text: list[int], path: list[int]) -> Tensor:
    """What is said at the end of a path below the text's last token, by running every layer over everything."""
    ids, read, count = torch.tensor([text + path]), len(text) - 1, len(case.mtp.layers)
    inputs = case.model(ids[:, :read], output_hidden_states=True).hidden_states[-1]
    for depth in range(len(path) + 1):
        if depth:
            inputs = said if depth < count else torch.cat([inputs, said[:, -1:]], 1)  # noqa: F821
        layer = min(depth, count - 1)
        said = run_layer(case.mtp, layer, ids[:, layer + 1 : depth + 1 + read], inputs, layer + 1)
    return case.model.lm_head(said[0, -1])


@needs_mtp
def test_every_node_is_told_what_the_layers_say_on_the_whole_text(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medhead.proposers.heads.HeadsExpander", SpyExpander)
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", 3)
    SpyExpander.records = []
    proposer = HeadsProposer(case.target, "mtp", max_depth=5, width=3, dtype=torch.float32)
    decoder = Decoder(case.target, proposer)
    decoder.generate(**padded(3), max_new_tokens=16, do_sample=False)
    assert decoder.statistics.accepted_length > 1.2
    assert {len(path) for _, path, _ in SpyExpander.records} == {0, 1, 2, 3, 4}
    for text, path, logits in SpyExpander.records[::7]:
        torch.testing.assert_close(logits, plain_logits(case, text, path), rtol=1e-3, atol=1e-3)


@needs_mtp
def test_the_reference_is_what_transformers_drafts(case: Case) -> None:
    from transformers.cache_utils import MtpCache

    text = PROMPTS[0]
    ids, positions = torch.tensor([text]), torch.arange(1, len(text))[None]
    hidden = case.model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
    cache = MtpCache(config=case.model.config.get_mtp_config())
    tokens, logits, _ = case.mtp(ids[:, 1:], hidden, None, positions, cache)
    for depth in range(len(case.mtp.layers)):
        found = plain_logits(case, text, tokens[0, :depth].tolist())
        torch.testing.assert_close(found, logits[0, depth], rtol=1e-4, atol=1e-4)


@needs_mtp
def test_the_target_is_left_as_it_was(case: Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    rotary, attention = case.model.model.rotary_emb.inv_freq.clone(), case.model.config._attn_implementation
    decoder = Decoder(case.target, heads="mtp", dtype=torch.bfloat16)
    decoder.generate(**padded(2), max_new_tokens=8, do_sample=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert torch.equal(case.model.model.rotary_emb.inv_freq, rotary)
    assert case.model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in case.model.parameters())


@needs_mtp
def test_the_command_line_knows_them(case: Case) -> None:
    decoder = make_decoder(parser().parse_args(["--model", "somewhere", "--heads", "mtp"]), case.model)
    assert decoder.proposer.members[0].heads.config.kind == "mtp"  # type: ignore[attr-defined]


@needs_mtp
def test_models_without_such_layers_are_refused(tmp_path: Path) -> None:
    unsaved = tiny("deepseek_v3", ACCEPTED["deepseek_v3"])
    unsaved.save_pretrained(tmp_path)
    lacking = AutoModelForCausalLM.from_pretrained(tmp_path)
    cases = [
        (tiny_llama(), "no multi-token-prediction layers"),
        (unsaved, "was not loaded from one"),
        (lacking, "weights are missing"),
    ]
    for model, says in cases:
        with pytest.raises(MedheadError, match=says) as refusal:
            Decoder(model, heads="mtp")
        assert "\n" not in str(refusal.value)


def test_an_old_transformers_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_layers, "MtpModel", raising=False)
    with pytest.raises(MedheadError, match=r"need transformers 5\.24 or newer"):
        Decoder(target, heads="mtp")


@needs_mtp
def test_layers_of_a_hybrid_model(tmp_path: Path) -> None:
    """Qwen3.5 names them in its own way, and its target holds states; they are attention and hold none."""
    types = ["linear_attention", "linear_attention", "full_attention"]  # attention last, as in the published ones
    fields = STATEFUL["qwen3_5_text"] | {"layer_types": types, "vocab_size": VOCAB, "mtp_num_hidden_layers": 1}
    model = tiny("qwen3_5_text", fields)
    model.save_pretrained(tmp_path)
    like = tiny("qwen3_5_text", fields | {"layer_types": ["full_attention"], "num_hidden_layers": 1}, seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in like.model.layers[0].state_dict().items():
        weights[f"mtp.layers.0.{name}"] = weight.clone()
    weights["mtp.fc.weight"] = torch.cat([torch.eye(32), 0.1 * torch.randn(32, 32)], 1)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights[f"mtp.{norm}.weight"] = 0.2 * torch.randn(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 999}
    alone = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in PROMPTS]
    decoder = Decoder(model, heads="mtp", tree_size=8, proposer="heads")
    found = decoder.generate(**padded(3), **options)[:, max(map(len, PROMPTS)) :]
    assert torch.equal(found, torch.stack(alone))
    torch.testing.assert_close(decoder.proposer.heads._mtp[0].layers[0].eh_proj.weight, weights["mtp.fc.weight"])
    assert not hasattr(model.config, "num_mtp_layers")


@needs_mtp
def test_stored_entries_are_continued_where_one_layer_reads_nothing_of_another(case: Case) -> None:
    """The engine's prefix cache holds them; with several layers a prompt is read whole."""
    proposer = HeadsProposer(case.target, heads="mtp")
    assert (proposer.draft_key is not None) == (len(case.mtp.layers) == 1)
    if proposer.draft_key is not None:
        check_continued(case.target, proposer)
