"""Check exported heads against vLLM on a CPU: what it loads, which text and which draft tokens it makes, and how many of them
are accepted, beside a chain of the same depth in medhead.

Every folder of heads is exported in every format of its kind, with its draft vocabulary and, where the format keeps one, with
all tokens, too. vLLM decodes the prompts greedily in float32, plainly and with the export; medhead decodes them with the heads
themselves. Draft tokens are compared where both have the same root. Every case is written when it is done, and a run that was
stopped goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medhead import Decoder
from medhead.bench import harness
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.cli.common import Parser, check_range, run_command
from medhead.errors import MedheadError, one_line
from medhead.heads import Heads, load_heads
from medhead.heads.formats import FORMATS, export_heads
from medhead.heads.formats.eagle3 import SPECULATIVE_TOKENS
from medhead.model.loading import load_model, load_tokenizer
from medhead.model.named_models import resolve_model
from medhead.model.target import Target
from medhead.proposers.base import VerifyOutput
from medhead.proposers.heads import HeadsProposer
from medhead_training.export import write as write_checkpoint

Row = dict[str, Any]
Passes = list[tuple[int, list[int]]]  # of every pass how many tokens the text had, and the draft tokens behind them
METHODS = {
    "vllm-medusa": "medusa",
    "medusa": "medusa",
    "eagle3": "eagle3",
    "dflash": "dflash",
    "mlp_speculator": "mlp_speculator",
}
KEEP_DRAFT_VOCAB = ("eagle3", "speculators")
EXAMPLES = """\
example:
  python benchmarks/vllm/check.py --vllm-python vllm-venv/bin/python --heads medhead/assets/heads-attention \\
      medhead/assets/heads-medusa --prompts benchmarks/prompts.jsonl --output benchmarks/vllm/demo
"""


@dataclass(frozen=True)
class Case:
    """Heads in a format, with their draft vocabulary or with all tokens."""

    folder: str
    format: str
    vocabulary: str  # draft or all

    @property
    def key(self) -> Row:
        """The fields of a row that name the case."""
        return {"heads": Path(self.folder).name, "format": self.format, "vocabulary": self.vocabulary}


def parser() -> Parser:
    """Return the parser of the program."""
    options = Parser(prog="vllm/check.py", description=__doc__, epilog=EXAMPLES)
    add = options.add_argument
    add("--vllm-python", required=True, help="Python of the environment that vLLM is installed in")
    add("--model", help="model folder (default: the demo model)")
    add("--heads", nargs="+", required=True, help="folders of heads checkpoints without a correction")
    add("--prompts", type=Path, help="JSON lines with messages, prompt, question, turns or text (default: built-in)")
    add("--num-prompts", type=int, default=12, help="prompts (default: %(default)s)")
    add("--max-new-tokens", type=int, default=80, help="tokens of an answer (default: %(default)s)")
    add("--timeout", type=int, default=1200, help="seconds that vLLM may take for a case (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder to write results.json and table.md to")
    return options


def cases_of(folder: str, heads: Heads) -> Iterator[Case]:
    """Yield the cases of some heads."""
    for name, checkpoint_format in FORMATS.items():
        if checkpoint_format.kind == heads.config.kind:
            if heads.draft_tokens is not None and name in KEEP_DRAFT_VOCAB:
                yield Case(folder, name, "draft")
            yield Case(folder, name, "all")


def over_all_tokens(heads: Heads) -> Heads:
    """Make heads propose from the whole vocabulary."""
    heads.draft_tokens, heads.config.draft_vocab_size = None, 0
    return heads


# ---------------------------------------------------------------- the two engines


def run_vllm(args: argparse.Namespace, prompts: list[list[int]], model: str | Path, speculative: Row | None) -> Row:
    """Decode with vLLM in a process of its own; return its answers, or its error."""
    length = max(map(len, prompts)) + args.max_new_tokens + 16
    job = {"model": str(model), "prompts": prompts, "max_new_tokens": args.max_new_tokens, "max_model_len": length}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json", "log.txt")]
        files[0].write_text(json.dumps(job | {"speculative_config": speculative}))
        engine = str(Path(__file__).with_name("engine.py"))
        with files[2].open("w") as log:
            command = [args.vllm_python, engine, *map(str, files[:2])]
            try:
                subprocess.run(command, env=engine_environment(), stdout=log, stderr=log, timeout=args.timeout)
            except subprocess.TimeoutExpired:
                raise MedheadError(
                    f"vLLM took more than {args.timeout} s for one case; give a larger --timeout"
                ) from None
            except OSError as error:
                raise MedheadError(f"--vllm-python {args.vllm_python!r} cannot be run: {error.strerror}") from None
        if not files[1].is_file():
            raise MedheadError(f"vLLM ended without a result: {files[2].read_text()[-500:]}")
        found: Row = json.loads(files[1].read_text())
    return found


def engine_environment() -> dict[str, str]:
    """Return the environment of vLLM: one thread, and none of this project's modules."""
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def run_medhead(target: Target, heads: Heads, prompt: list[int], tokens: int, depth: int) -> Row:
    """Decode a prompt with a chain of draft tokens; return the answer as vLLM's is."""
    decoder = Decoder(target, HeadsProposer(target, heads, shape=[[0] * (level + 1) for level in range(depth)]))
    passes: Passes = []
    emitted = 0

    def note(output: VerifyOutput) -> None:
        nonlocal emitted
        if emitted:  # the first output is the prompt's pass
            passes.append((emitted, output.tree.tokens[0, 1:].tolist()))
        emitted += output.counts[0]

    decoder.on_output = note
    ids = torch.tensor([prompt])
    out = decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return {"tokens": out[0, ids.shape[1] :].tolist(), "passes": passes}


# ---------------------------------------------------------------- comparing


def compare(plain: list[Row], spoken: list[Row], ours: list[Row]) -> Row:
    """Return the counts of a case: equal texts, equal draft tokens, tokens and passes of both engines."""
    row: Row = {"prompts": len(plain)}
    pairs = list(zip(spoken, ours, strict=True))
    row["texts_of_plain_vllm"] = sum(a["tokens"] == b["tokens"] for a, b in zip(plain, spoken, strict=True))
    row["texts_of_medhead"] = sum(a["tokens"] == b["tokens"] for a, b in pairs)
    row["drafts"] = row["drafts_equal"] = 0
    for theirs, own in pairs:
        if theirs["tokens"] == own["tokens"]:  # else the roots are those of different texts
            known = dict(own["passes"])
            for at, drafts in theirs["passes"]:
                both = list(zip(drafts, known.get(at, []), strict=False))  # ours end with the text
                row["drafts"] += len(both)
                row["drafts_equal"] += sum(a == b for a, b in both)
    for name, answers in (("vllm", spoken), ("medhead", ours)):
        row[f"{name}_tokens"] = sum(len(answer["tokens"]) - 1 for answer in answers)  # prefill emits the first one
        row[f"{name}_passes"] = sum(at < len(answer["tokens"]) for answer in answers for at, _ in answer["passes"])
    return row


def measure(args: argparse.Namespace, target: Target, case: Case, prompts: list[list[int]], plain: list[Row]) -> Row:
    """Return the row of a case."""
    heads = load_heads(case.folder, target)
    depth = heads.config.depth
    if heads.config.kind == "attention":
        depth = min(depth, SPECULATIVE_TOKENS)
    row: Row = case.key | {"kind": heads.config.kind, "draft_tokens": depth}
    if case.vocabulary == "all" and case.format != "vllm-medusa":  # whose export takes all tokens by itself
        over_all_tokens(heads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        try:
            with torch.no_grad():
                write_checkpoint(export_heads(heads, target, case.format), out, torch.float32)
        except MedheadError as error:
            return row | {"loads": False, "refused_by": "medhead", "error": str(error)}
        if case.format == "speculators":  # served in place of the model
            found = run_vllm(args, prompts, out, None)
        else:
            method = {"method": METHODS[case.format], "model": str(out), "num_speculative_tokens": depth}
            found = run_vllm(args, prompts, resolve_model(args.model), method)
    if "error" in found:
        return row | {"loads": False, "refused_by": "vLLM", "error": one_line(found["error"].replace(folder, ""), 160)}
    heads = heads if case.vocabulary == "draft" else over_all_tokens(heads)
    ours = [run_medhead(target, heads, prompt, args.max_new_tokens, depth) for prompt in prompts]
    return row | {"loads": True} | compare(plain, found["answers"], ours)


# ---------------------------------------------------------------- results


def table(rows: list[Row]) -> str:
    """Return the table, and the causes where something was refused."""
    header = ["heads", "format", "drafts from", "draft tokens", "loads", "texts of plain vLLM", "texts of medhead",
              "drafts equal", "accepted length: vLLM", "medhead"]  # fmt: skip
    cells, causes = [], []
    for row in rows:
        vocabulary = "all tokens" if row["vocabulary"] == "all" else "draft vocabulary"
        start = [row["heads"], f"`{row['format']}`", vocabulary, str(row["draft_tokens"])]
        if not row["loads"]:
            cells.append([*start, f"no ({row['refused_by']})", *["-"] * 5])
            causes.append(f"- {row['heads']}, `{row['format']}`: refused by {row['refused_by']}: {row['error']}")
            continue
        equal = [f"{row[name]}/{row['prompts']}" for name in ("texts_of_plain_vllm", "texts_of_medhead")]
        lengths = [f"{row[f'{name}_tokens'] / row[f'{name}_passes']:.3f}" for name in ("vllm", "medhead")]
        cells.append([*start, "yes", *equal, f"{row['drafts_equal']}/{row['drafts']}", *lengths])
    return "\n".join([harness.markdown_table(header, cells, left=3), *(["", *causes] if causes else [])])


def save(args: argparse.Namespace, content: Row) -> None:
    """Write the results and the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    machine, options = content["machine"], content["options"]
    size = f"{options['num_prompts']} prompts, at most {options['max_new_tokens']} tokens, greedy, float32"
    title = f"{harness.label(options['model'])}, {size}, vLLM {content['vllm']} on a CPU, {machine['date']}"
    (args.output / "table.md").write_text(f"{title}\n\n{table(content['results'])}\n", encoding="utf-8")


def load(args: argparse.Namespace) -> Row:
    """Return the results so far; refuse those of other options."""
    names = ("model", "prompts", "num_prompts", "max_new_tokens")
    options = {name: str(value) if isinstance(value := getattr(args, name), Path) else value for name in names}
    path = args.output / "results.json"
    if not path.is_file():
        return {"machine": harness.machine(), "options": options, "results": []}
    content: Row = json.loads(path.read_text(encoding="utf-8"))
    if content["options"] != options:
        raise MedheadError(f"{path} holds results of other options: {content['options']}; give another --output")
    return content


def run(args: argparse.Namespace) -> None:
    """Check all cases that are not done."""
    for name in ("num_prompts", "max_new_tokens", "timeout"):
        check_range(args, name, 1)
    content = load(args)
    target = Target(load_model(args.model, torch.device("cpu"), torch.float32), probe=False)
    longest = int(target.context) - args.max_new_tokens - 16
    prompts = encode_prompts(load_tokenizer(args.model), read_prompts(args.prompts, args.num_prompts), longest)
    if "plain" not in content:
        found = run_vllm(args, prompts, resolve_model(args.model), None)
        if "error" in found:
            raise MedheadError(f"vLLM does not decode {resolve_model(args.model)}: {found['error']}")
        content |= {"vllm": found["version"], "plain": [answer["tokens"] for answer in found["answers"]]}
        save(args, content)
    plain = [{"tokens": tokens} for tokens in content["plain"]]
    done = [{name: row[name] for name in ("heads", "format", "vocabulary")} for row in content["results"]]
    for folder in args.heads:
        for case in cases_of(folder, load_heads(folder, target)):
            if case.key not in done:
                row = measure(args, target, case, prompts, plain)
                content["results"].append(row)
                save(args, content)
                harness.say(json.dumps(row))
    print(table(content["results"]))


if __name__ == "__main__":
    sys.exit(run_command(parser(), run, None))
