"""
`shoal bench generate`: tokens/s of generation with a KV cache, of reading prompts (prefill) and of writing (decode).

The weights are random. With transformers installed, transformers.generate takes turns with shoal on the same weights and prompts; a
ratio is the median over neighboring runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.bench.result import Result, Row
from shoal.bench.table import gathered, number, spread, table
from shoal.bench.trial import Asked, finish, trial
from shoal.config.families import FAMILIES
from shoal.errors import ShoalError
from shoal.run.narrator import Narrator

DEFAULT: Final = """
model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, max_seq_len: 1024, vocab_size: 4096}
data: {corpus: dummy, tokenizer: bytes, seq_len: 256}
train: {steps: 1, global_batch: 1, micro_batch: 1}
"""
SHOAL = "shoal"


@dataclass(frozen=True)
class Lengths:
    """
    Prompts in a batch, for each batch; tokens of each prompt; new tokens of each.

    unequal: whether prompts have from half of these tokens up to all, padded on the left.
    """

    batches: tuple[int, ...]
    prompt: int
    new: int
    unequal: bool = False

    @classmethod
    def read(cls, batches: str, prompt: int, new: int, *, unequal: bool) -> Lengths:
        """Check what the user gave. Raises `ShoalError`."""
        words = [word.strip() for word in batches.split(",")]
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            raise ShoalError(f"--batches {batches}: give numbers of prompts, separated by commas, such as 1,16")
        if prompt < 1 or new < 2:
            raise ShoalError(
                "set --prompt-tokens to at least 1 and --new-tokens to at least 2: the first one ends the prefill"
            )
        return cls(tuple(dict.fromkeys(map(int, words))), prompt, new, unequal)


def bench_generate(asked: Asked, lengths: Lengths, *, narrator: Narrator) -> None:
    """Print the tokens/s of each program and batch, and what to conclude."""
    with trial(asked, narrator) as bench:
        config = bench.planned(bench.config.replace("launch", processes=1))
        if not FAMILIES[config.model.family].native:
            raise ShoalError(f"shoal bench generate times shoal's own families, not model.family {config.model.family}")
        context = config.model.max_seq_len
        if lengths.prompt + lengths.new > context:
            raise ShoalError(
                f"{lengths.prompt} + {lengths.new} tokens do not fit model.max_seq_len {context}; lower --prompt-tokens or "
                "--new-tokens"
            )
        bench.prepare()
        batches, kind = ",".join(map(str, lengths.batches)), "unequal" if lengths.unequal else "equal"
        arguments = [asked.repeats, lengths.prompt, lengths.new, batches, kind]
        with bench.phase(f"generating {asked.repeats + 1} times with each batch"):
            answer = bench.run(
                "shoal.bench.generate_worker",
                config,
                what="the benchmark of generation",
                arguments=[*map(str, arguments)],
            )
        rows = list(_rows(answer["rows"], lengths, config.launch.threads))
        finish(asked, bench.result(rows, list(_notes(rows)), answer["model"]), _table)


def _rows(answers: Sequence[Mapping[str, Any]], lengths: Lengths, threads: int | None) -> Iterator[Row]:
    """Yield the row of each program and batch; shoal's has its ratios to the other one."""
    for each in answers:
        batch = each["batch"]
        seconds = {kind: each[f"{kind}_seconds"] for kind in ("prefill", "decode")}
        counts = {"prefill": each["prompt_tokens"], "decode": batch * (lengths.new - 1)}
        figures = {f"{kind}_tokens_per_second": [counts[kind] / s for s in seconds[kind]] for kind in seconds}
        peer = next((p for p in answers if p["batch"] == batch and p["program"] != SHOAL), None)
        if each["program"] == SHOAL and peer:
            for kind, mine in seconds.items():
                figures[f"times_peer_{kind}"] = [b / a for a, b in zip(mine, peer[f"{kind}_seconds"], strict=True)]
        facts = {
            "program": each["program"], "batch": batch, "prompt_tokens": lengths.prompt, "unequal": lengths.unequal, "new_tokens": lengths.new,
            "threads": threads, "different_tokens": each["different_tokens"], "peer": peer["program"] if peer else "",
        }  # fmt: skip
        yield Row(f"{each['program']}, {batch} prompt{'s' * (batch > 1)}", facts, figures)


def _table(result: Result) -> list[str]:
    return table(
        gathered([
            {
                "program": row.facts["program"], "prompts": str(row.facts["batch"]),
                "prefill, tokens/s": f"{row.median('prefill_tokens_per_second'):,.0f}",
                "spread": spread(row.figures["prefill_tokens_per_second"]),
                "of peer": number(row.median("times_peer_prefill"), ".2f", " x"),
                "decode, tokens/s": f"{row.median('decode_tokens_per_second'):,.0f}",
                "spread ": spread(row.figures["decode_tokens_per_second"]),
                "of peer ": number(row.median("times_peer_decode"), ".2f", " x"),
            }
            for row in result.rows
        ]),
        left=("program",),
    )  # fmt: skip


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to conclude."""
    ours = [row for row in rows if row.facts["program"] == SHOAL]
    first = ours[0].facts
    short = f"{first['prompt_tokens'] // 2} to " if first["unequal"] else ""
    yield f"prompts of {short}{first['prompt_tokens']} tokens, {first['new_tokens']} new tokens each, greedy, threads: {first['threads']}"
    if not first["peer"]:
        yield "transformers is not installed, so there is no peer: pip install 'shoal[hf]'"
        return
    for row in ours:
        yield (
            f"{row.name}: {row.median('times_peer_decode'):.2f} times the decode speed of {row.facts['peer']}, "
            f"{row.median('times_peer_prefill'):.2f} times its prefill speed; {_same(row.facts['different_tokens'])}"
        )


def _same(different: int) -> str:
    return (
        "the same tokens" if not different else f"{different} tokens differ, as rounding may explain in bfloat16 only"
    )
