"""Compare every type of the installed transformers with `generate`; the results are the table of docs/models.md.

`python docs/model_types.py` goes on where it stopped; `--again` compares anew, `python docs/model_types.py llama gemma3` these
types alone. A tiny random model of a type runs in a process of its own. A type is

- identical, if the texts equal those of `generate` (greedy; one prompt, and a padded batch of two) and sampled texts with a seed
  equal those of plain decoding;
- refused, if medhead raises a `MedheadError`, whose first line is the reason;
- impossible, if `generate` of transformers itself does not run with text alone;
- different, or unbuilt, which are faults of medhead or of `tests/tiny_types.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from medhead import Decoder, MedheadError  # noqa: E402
from medhead.errors import one_line  # noqa: E402
from tiny_types import KINDS, tiny_type, types  # noqa: E402

RESULTS = ROOT / "docs" / "model_types.jsonl"
LIMIT = 120  # seconds of processor time for one type
NEW = 24  # tokens of each text


def prompts() -> dict[str, Tensor]:
    """Return a batch of two prompts, the second padded on the left."""
    ids = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compare(name: str, kind: str) -> dict[str, Any]:
    """Return the result of a type, and the reason where it is not `identical`."""
    try:
        AutoConfig.for_model(name)
    except Exception as error:
        return {"result": "impossible", "reason": one_line(f"{type(error).__name__}: {error}", 200)}
    try:
        model = tiny_type(name, kind)
    except ImportError as error:
        return {"result": "impossible", "reason": one_line(str(error).split(" but ")[0], 200)}
    except Exception as error:
        return {"result": "unbuilt", "reason": one_line(f"{type(error).__name__}: {error}", 200)}
    both = prompts()
    alone = {key: value[:1] for key, value in both.items()}
    short = {key: value[1:, 5:] for key, value in both.items()}
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    try:
        expected = [model.generate(**one, **greedy).tolist() for one in (alone, both)]
    except Exception as error:
        return {"result": "impossible", "reason": one_line(f"{type(error).__name__}: {error}", 200)}
    try:
        sampled = []
        for proposer in ("none", "recycling", "lookahead"):
            with Decoder(model, proposer) as decoder:
                found = [decoder.generate(**one, **greedy).tolist() for one in (alone, both)]
                if (
                    found[0] == expected[0] and found[1] != expected[1]
                ):  # are the rows of transformers' own batch different?
                    own = model.generate(**short, **greedy).tolist()[0]
                    if found[1] == decoder.generate(**both, **greedy).tolist() and _row(found[1][1], 5) == _row(own, 0):
                        found[1] = expected[1]
                if found != expected:
                    return {"result": "different", "reason": f"greedy text with {proposer!r}"}
                sampled.append(decoder.generate(**both, max_new_tokens=NEW, do_sample=True, seed=3).tolist())
                if sampled[-1] != sampled[0]:
                    return {"result": "different", "reason": f"sampled text with {proposer!r}"}
    except MedheadError as error:
        return {"result": "refused", "reason": one_line(error, 300)}
    except Exception as error:
        return {"result": "different", "reason": one_line(f"{type(error).__name__}: {error}", 200)}
    return {"result": "identical"}


def _row(tokens: list[int], padding: int) -> list[int]:
    """Return a row's text without padding on either side."""
    tokens = tokens[padding:]
    while tokens and tokens[-1] == 0:
        tokens = tokens[:-1]
    return tokens


def _child(name: str, kind: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    pipe.send(compare(name, kind))


def compare_apart(name: str, kind: str) -> dict[str, Any]:
    """Return the result of a type, compared in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, kind, there))
    child.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = {"result": "unbuilt", "reason": f"the process died, perhaps after {LIMIT} seconds of processor time"}
    child.join()
    return found


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results by kind and type."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(one["kind"], one["type"]): one for one in map(json.loads, lines)}


def main(arguments: list[str]) -> int:
    """Compare types and write their results; return 1 if any is `different` or `unbuilt`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to compare anew; all if none is named")
    parser.add_argument("--kind", choices=KINDS, help="types of this kind only")
    parser.add_argument("--again", nargs="*", help="compare anew those with these results, or all", metavar="RESULT")
    options = parser.parse_args(arguments)
    results = read()
    for kind in [options.kind] if options.kind else KINDS:
        for name in types(kind):
            known = results.get((kind, name))
            redo = options.again is not None and (not options.again or (known or {}).get("result") in options.again)
            if (name not in options.types) if options.types else (known is not None and not redo):
                continue
            found = compare_apart(name, kind)
            results[kind, name] = {"kind": kind, "type": name, **found, "transformers": transformers.__version__}
            print(f"{kind:7} {name:26} {found['result']:10} {found.get('reason', '')}", flush=True)
            lines = [json.dumps(results[key]) for key in sorted(results)]
            RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(one["result"] in ("different", "unbuilt") for one in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
