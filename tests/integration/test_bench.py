"""The benchmarks speed and step: what they measure, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from conftest import tiny_llama
from families import MOE, tiny
from medhead import Decoder
from medhead.bench import step
from medhead.bench.measure import Method, MethodResult
from medhead.bench.memory import PeakMemory
from medhead.bench.prompts import encode_prompts, read_prompts
from medhead.bench.speed import main, summary
from medhead.bench.step import ratios
from medhead.errors import MedheadError


def test_a_whole_run(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = [str(folders["recurrent"]), str(folders["medusa"])]
    options = ["--model", str(folders["model"]), "--heads", *heads, "--num-prompts", "2", "--max-new-tokens", "12"]
    options += ["--ignore-eos"]
    options += ["--repeats", "1", "--dtypes", "float32", "--tree-sizes", "4", "8", "--output", str(tmp_path / "new")]
    assert main(options) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    names = [row["name"] for row in content["results"]]
    assert names == [
        "transformers generate",
        "transformers prompt lookup",
        "medhead plain",
        "medhead ngram",
        "medhead lookahead",
        "medhead recycling",
        "medhead hybrid",
        "medhead heads",
        "medhead heads (medusa)",
        "medhead heads, 4 nodes",
        "medhead heads, 8 nodes",
    ]
    for row in content["results"]:
        assert row["name"] in out
        assert row["identical"] == row["prompts"] == 2
        assert row["new_tokens"] == 24  # the end token was ignored
        assert row["tokens_per_second"] > 0
        if row["tree_size"]:
            assert sum(row["parts_ms"].values()) > row["parts_ms"]["forward"] > 0
            assert row["accepted_length"] >= min(row["by_prompt"]) >= 1
            assert row["cache_mib"] > 0
            assert row["peak_mib"] >= row["cache_mib"]
    assert content["machine"]["torch"] == torch.__version__
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "table.md").read_text().strip() in out


def test_sampling_shows_what_the_noise_is_worth(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(folders["model"]),
        "--heads",
        str(folders["recurrent"]),
        "--proposers",
        "--num-prompts",
        "1",
    ]
    options += ["--max-new-tokens", "8", "--repeats", "1", "--temperature", "1", "--dtypes", "float32"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "noise ignored" in out
    assert out.count("1/1") == 3  # ours, all three; transformers draws other numbers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--prompts", "nowhere.jsonl"], "cannot be read"),
        (["--heads", "nowhere"], "does not exist"),
        (["--max-new-tokens", "160"], "leaves no room"),
        (["--proposers", "oracle"], "invalid choice"),
        (["--tree-sizes", "4"], "needs --heads"),
        (["--output", __file__], "is a file"),
        (["--dtypes", "float7"], "dtype must be"),
    ],
)
def test_wrong_input(
    folders: dict[str, Path], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["--model", str(folders["model"]), "--dtypes", "float32", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_prompts_of_every_form(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"messages": messages}, {"prompt": "a"}, {"question": "a"}, {"turns": ["a", "z"]}, {"text": "a"}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    chats = read_prompts(path, 9)
    assert chats == [[{"role": "user", "content": "a"}]] * 5
    assert len(read_prompts(path, 2)) == 2
    assert len({tuple(ids) for ids in encode_prompts(tokenizer, chats, 100)}) == 1
    assert [len(ids) for ids in encode_prompts(tokenizer, chats[:1], 2)] == [2]
    path.write_text('{"prompt": "one\u2028line\u0085only"}\n', encoding="utf-8")
    assert read_prompts(path, 1) == [[{"role": "user", "content": "one\u2028line\u0085only"}]]
    for wrong in ("[1]", "{}", "{not json", '{"messages": []}'):
        path.write_text(wrong)
        with pytest.raises(MedheadError, match="line 1"):
            read_prompts(path, 1)
    path.write_text("")
    with pytest.raises(MedheadError, match="no prompt"):
        read_prompts(path, 1)


def test_padding_after_the_end_is_no_text() -> None:
    """Of rows that end before the longest; transformers' answer is ours, token by token."""
    model = tiny_llama(eos_token_id=5)
    given = [[7, 8, 9], [11], [20, 21], [9, 3, 12, 8]]
    longest = [[int(token) for token in model.generate(torch.tensor([ids]), max_new_tokens=20)[0]] for ids in given]
    ends = [row[len(ids) :] for ids, row in zip(given, longest, strict=True)]
    model.generation_config.eos_token_id = ends[0][2]
    arguments = {"max_new_tokens": 20, "do_sample": False}
    theirs = Method("transformers", arguments, model=model).answer(given)
    ours = Method("medhead", arguments, Decoder(model, "none")).answer(given)
    assert theirs.texts == ours.texts
    assert len({len(text) for text in theirs.texts}) > 1


def test_ratios_are_of_all_tokens_and_all_seconds() -> None:
    slow = MethodResult("transformers generate", "float32", 0, seconds=[2.0, 2.0], new_tokens=[10, 30], passes=[0, 0])
    plain = MethodResult("medhead plain", "float32", 1, seconds=[1.0, 1.0], new_tokens=[10, 30], passes=[10, 30])
    fast = MethodResult("medhead heads", "float32", 16, seconds=[0.5, 0.5], new_tokens=[10, 30], passes=[5, 10])
    fast.parts, fast.profiled_steps = {"forward": 0.8, "propose": 0.1, "accept": 0.1, "commit": 0.0, "other": 0.0}, 10
    rows = summary([slow, plain, fast])
    assert [row["speedup_vs_transformers"] for row in rows] == [1.0, 2.0, 4.0]
    assert [row["speedup_vs_plain"] for row in rows] == [0.5, 1.0, 2.0]
    assert rows[2]["accepted_length"] == pytest.approx(40 / 15, abs=1e-3)
    assert rows[2]["overhead"] == pytest.approx(0.25)
    assert rows[2]["parts_ms"]["forward"] == pytest.approx(80)


def test_peak_memory_counts_what_is_alive_together() -> None:
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        view = first[:10]
        del first, view
        torch.zeros(2000).add_(1)
        torch.ones(500)
    assert memory.peak == 8000


def test_step_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of step of a tiny shape, batches too; table, JSON and picture."""
    options = ["--shapes", "tiny", "--context", "16", "--batch-sizes", "1", "2", "--nodes", "4", "9", "--repeats", "1"]
    assert step.main([*options, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    kinds = ["transformers, eager", "medhead, plain", "medhead, 4 nodes", "medhead, 9 nodes"]
    assert [(row["batch_size"], row["step"]) for row in rows] == [(batch, kind) for batch in (1, 2) for kind in kinds]
    assert all(row["ms"] > 0 for row in rows)
    assert "| tiny | 2 | 16 | medhead, 9 nodes |" in capsys.readouterr().out
    assert (tmp_path / "out" / "step.png").stat().st_size > 1000


def test_step_benchmark_of_captured_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "tiny", "--context", "16", "--nodes", "4", "--repeats", "1", "--steps", "recorded"]
    assert step.main([*options, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [row["step"] for row in rows][3:] == [
        "medhead, plain, recorded",
        "medhead, 4 nodes, recorded, forward only",
        "medhead, 4 nodes, recorded",
        "medhead, 4 nodes with block heads, recorded",
        "medhead, 4 nodes with recurrent heads, recorded",
    ]
    said = capsys.readouterr().out
    assert "- tiny, batch 1, 16 tokens, eager: a plain step" in said
    assert "recurrent heads, 4 nodes:" in said.rsplit("- tiny", 1)[1]


def test_ratios_of_steps() -> None:
    times = {"transformers, eager": 6.0, "medhead, plain": 3.0, "medhead, plain, graph": 1.0}
    times |= {"medhead, 8 nodes, graph": 1.05, "medhead, 64 nodes, graph, forward only": 1.14}
    times |= {"medhead, 64 nodes, graph": 1.1, "medhead, 64 nodes with block heads, graph": 1.2}
    place = {"shape": "8b", "batch_size": 1, "context": 2048}
    rows = [{**place, "step": name, "ms": ms, "vs_weight_read": ms / 0.8} for name, ms in times.items()]
    assert ratios(rows) == [
        "8b, batch 1, 2048 tokens, eager: a plain step takes 3.75x the time to read the weights; "
        "2.00x the speed of transformers generate",
        "8b, batch 1, 2048 tokens, graph: a plain step takes 1.25x the time to read the weights; "
        "6.00x the speed of transformers generate; 64 nodes take 1.10x a plain step; "
        "block heads, 64 nodes: 5% of the step is outside the forward pass",
    ]


def test_captured_steps_take_part(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model",
        str(folders["model"]),
        "--heads",
        str(folders["recurrent"]),
        "--proposers",
        "--num-prompts",
        "1",
    ]
    options += ["--max-new-tokens", "12", "--repeats", "1", "--dtypes", "float32", "--steps", "recorded"]
    assert main(options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ", recorded |" in line]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| medhead plain, recorded", "| medhead heads, recorded"]
    assert all(" 1/1 " in line for line in lines[:2])
    assert all(line.endswith("| - |") for line in lines[2:])  # a captured step is not taken apart


def test_bytes_that_a_token_reads() -> None:
    """The output matrix but not the embedding beside it; of experts the share that is asked."""
    model = step.build("tiny", torch.device("cpu"), torch.float32)
    everything = sum(p.numel() * 4 for p in model.parameters())
    assert step.weight_bytes(model) == everything - 1024 * 128 * 4
    moe = tiny("qwen3_moe", MOE)
    experts = sum(p.numel() * 4 for name, p in moe.named_parameters() if ".experts." in name)
    share = moe.config.num_experts_per_tok / moe.config.num_experts
    rest = sum(p.numel() * 4 for p in moe.parameters()) - experts
    if moe.get_input_embeddings().weight is not moe.get_output_embeddings().weight:
        rest -= moe.get_input_embeddings().weight.numel() * 4
    assert experts
    assert step.weight_bytes(moe) == pytest.approx(rest + share * experts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "1"], "--nodes must be from 2 to 256, got 1"),
        (["--context", "1"], "--context must be from 2 to 10,000,000, got 1"),
        (["--nodes", "300"], "--nodes must be from 2 to 256, got 300"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--shapes", "huge"], "invalid choice"),
    ],
)
def test_step_benchmark_refuses(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = step.main(options)
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert says in capsys.readouterr().err
