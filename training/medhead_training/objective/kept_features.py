"""Whether and how a run keeps what a frozen target says about its text, instead of running the target in every step."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.model.eval_mode import eval_mode
from medhead.model.loading import DTYPES
from medhead_training.data.feature_store import FeatureParts, fingerprint, prepare_features, started, store_key
from medhead_training.data.packing import PackedDataset
from medhead_training.objective.module import HeadsModule
from medhead_training.objective.unroll import PackedBatch

FOLDER = "features"  # in the run folder
FREE_SHARE = 0.5  # of the free disk that `auto` uses at most


def parts_to_keep(module: HeadsModule) -> FeatureParts:
    """Return the arrays that training reads of every token: the heads' features and what the loss needs, if that differs."""
    config, options = module.heads.config, module.options
    sizes = {"features": module.heads.feature_size}
    if options.loss == "soft" or (options.loss != "hard" and config.feature_layers):
        sizes["teacher"] = config.hidden_size
    return FeatureParts(sizes, DTYPES[options.feature_dtype])


@torch.no_grad()
def compute_parts(module: HeadsModule, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the arrays of `parts_to_keep` for texts `[rows, length]`, one text a row, padded at the end."""
    ids, mask = ids.to(module.output.device), mask.to(module.output.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    with module.target.listening(module.heads.config.feature_layers):
        hidden, features = module.target.read_hidden(module.model, ids, positions)
    found = [features]
    if "teacher" in parts_to_keep(module).sizes:
        found.append(module.teacher_of(hidden, PackedBatch(ids, mask, torch.zeros_like(ids))))
    return [part.cpu() for part in found]


def keep_features(module: HeadsModule, rows: PackedDataset, folder: Path, processes: int, say: bool = True) -> bool:
    """Give `rows` what the target says about their text, computed once and kept in `folder`, and return True.

    Return False if the options, the disk or the number of processes are against it.
    """
    options, parts = module.options, parts_to_keep(module)
    if options.features == "keep" and processes > 1:
        raise MedheadError(f"--features keep works in one process, here are {processes}; give --features recompute")
    if options.features == "recompute" or options.recipe != "heads" or options.shard or processes > 1:
        return False
    folder = folder / FOLDER
    heads = {} if module.heads.draft_tokens is None else {"draft_tokens": module.heads.draft_tokens}
    frozen = {name: p for name, p in module.target.model.named_parameters() if not p.requires_grad}
    target = fingerprint(frozen | heads)
    layers = module.heads.config.feature_layers
    facts = target, layers, options.loss, options.seq_len, parts.sizes, str(parts.dtype), rows.fingerprint()
    key, size = store_key(*facts), rows.tokens * parts.bytes_per_token
    free = shutil.disk_usage(folder.parent).free
    if options.features == "auto" and not started(folder, key) and (rows.epochs == 1 or size > FREE_SHARE * free):
        return False
    if say:
        per_token = f"{rows.tokens:,} tokens x {parts.bytes_per_token:,} bytes"
        line = f"the target reads the text once; what heads need of it is kept in {folder}: {per_token} = {size / 1e9:.3g} GB"
        print(line, file=sys.stderr)
    with eval_mode(module):
        rows.kept = prepare_features(
            folder, key, parts, rows.pieces(), rows.tokens, lambda ids, mask: compute_parts(module, ids, mask), say
        )
    return True


def remove_features(folder: Path) -> None:
    """Delete what `keep_features` wrote."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
