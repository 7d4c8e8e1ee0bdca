"""Shared fixtures: tiny random models, heads of noise, a tiny tokenizer."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_paths = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "training", "app"))]  # for commands that tests start
os.environ["PYTHONPATH"] = os.pathsep.join([*_paths, *filter(None, [os.environ.get("PYTHONPATH")])])
if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run in Python, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from medhead.heads import Heads, HeadsConfig, build_heads, save_heads
from medhead.model.target import Target
from medhead_kernels import block_linear
from medhead_training.demo.tokenizer import train_tokenizer
from medhead_training.objective.unroll import PackedBatch

settings.register_profile(
    "medhead", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("medhead")
torch.set_num_threads(1)
block_linear.unavailable()  # compiled once, before any test looks at what is printed


def tiny_llama(seed: int = 3, vocab: int = 64, context: int = 160, **changes: object) -> PreTrainedModel:
    """A random Llama whose text is varied enough to tell decoders apart."""
    torch.manual_seed(seed)
    fields: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()


# heads of every kind and correction, and of the forms that loaded checkpoints have: fields of `HeadsConfig`
HEADS: dict[str, dict[str, Any]] = {
    "medusa": {"kind": "medusa", "num_layers": 2},
    "medusa_parent": {"kind": "medusa", "correction": "parent"},
    "medusa_own": {"kind": "medusa", "own_output": True, "tie_weights": True},
    "recurrent": {"kind": "recurrent"},
    "sequential": {"kind": "sequential"},
    "sequential_tied": {"kind": "sequential", "tie_weights": True, "scale_input": True},
    "sequential_own": {"kind": "sequential", "own_embedding": True, "own_output": True},
    "attention": {"kind": "attention", "feature_layers": [0, 1]},
    "attention_last": {"kind": "attention", "norm_before_residual": True},
    "attention_own": {
        "kind": "attention",
        "feature_layers": [1],
        "own_embedding": True,
        "own_output": True,
        "draft_hidden_size": 24,
    },
    "block": {"kind": "block", "feature_layers": [0, 1]},
    "block_parent": {"kind": "block", "correction": "parent", "num_layers": 2, "feature_layers": [1]},
    "block_recurrent": {"kind": "block", "correction": "recurrent", "num_layers": 2, "feature_layers": [0, 1]},
    "block_second": {"kind": "block", "root_slot_predicts": False},
    "block_full": {"kind": "block", "correction": "recurrent", "causal": False},
    "block_dflash": {
        "kind": "block",
        "causal": False,
        "root_slot_predicts": False,
        "mask_token_id": 3,
        "feature_layers": [0, 1],
    },
}


def noise_heads(
    target: Target, name: str = "recurrent", depth: int = 4, seed: int = 0, draft_vocab: int = 0, **changes: Any
) -> Heads:
    """Heads that know nothing, by a name of `HEADS`; with a draft vocabulary they name tokens in no order."""
    torch.manual_seed(seed)
    sizes = {"inner_size": 24, "correction_size": 20, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = HeadsConfig(
        depth=depth,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_target_layers=target.layers,
        draft_vocab_size=draft_vocab,
        **(sizes | HEADS[name] | changes),
    )
    heads: Any = build_heads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if draft_vocab:
        heads.draft_tokens.copy_(torch.randperm(target.vocab_size)[:draft_vocab])
    if config.mask_token_id >= 0 and config.kind == "block":
        heads.set_mask(target.embedding.weight.detach()[config.mask_token_id])
    return heads.eval()


def read(target: Target, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and features of whole texts `[rows, length]`; inside `target.active(...)`."""
    return target.read_hidden(target.model, ids, torch.arange(ids.shape[1]).expand_as(ids))


def packed_batch(documents: list[list[int]]) -> PackedBatch:
    """Return a training batch with one document a row, all of whose tokens are to be predicted."""
    longest = max(map(len, documents))
    ids, document = torch.zeros(len(documents), longest, dtype=torch.long), torch.full((len(documents), longest), -1)
    for row, text in enumerate(documents):
        ids[row, : len(text)], document[row, : len(text)] = torch.tensor(text), 0
    return PackedBatch(ids, document >= 0, document)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Costs of passes are kept in a folder of the session's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MEDHEAD_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_passes_of_other_modules(own_cache: Path) -> Iterator[None]:
    """The next module's tests do not find passes that those of this one compiled."""
    yield
    shutil.rmtree(own_cache / "compiled", ignore_errors=True)


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def target(model: PreTrainedModel) -> Target:
    return Target(model)


@pytest.fixture(scope="session")
def deep() -> PreTrainedModel:
    """A model with enough layers for heads that read several of them."""
    return tiny_llama(seed=11, num_hidden_layers=8, initializer_range=0.3)


@pytest.fixture(scope="session")
def deep_target(deep: PreTrainedModel) -> Target:
    return Target(deep)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a chat template, 300 tokens."""
    text = "Once upon a time there was a small café. Grüße! The dragon said: 日本語. She went home. " * 4
    return train_tokenizer([text], 300, 160)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """A model folder and heads folders that fit it."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_llama(vocab=len(tokenizer), eos_token_id=1, bos_token_id=None)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    target = Target(model)
    kinds = ("medusa", "recurrent", "attention", "block_recurrent")
    for kind in kinds:
        save_heads(noise_heads(target, kind), model, root / kind)
    return {name: root / name for name in ("model", *kinds)}


def hear_ctrl_c() -> None:
    """In a child process: SIGINT as in a terminal, also where the tests run in a background job that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
