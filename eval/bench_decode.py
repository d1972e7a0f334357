"""How decoding depends on the context, for every mixer and the transformer: speed, time to the first token, memory.

Each is a model of 12 layers and hidden size 512 with its weights packed and its steps recorded, and on request compiled
as well. All of one context and batch size take their steps in turn, each after a plain read of memory, so that a drift
of the machine's speed meets all of them alike; the numbers are medians, the ratios medians of the ratios within a turn.

The speed of a step does not depend on the values in a state, so that a context is not read for it: keys and values of
as many tokens are filled in. The time to the first token is that of reading random tokens, in pieces.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lm_zoo.cache import ZooCache
from lm_zoo.config import ZooConfig
from lm_zoo.decode import WARM_UP, DecodeStep
from lm_zoo.eval.machine import machine
from lm_zoo.layers.kv_state import GrowingKeyValues
from lm_zoo.model import ZooForCausalLM
from lm_zoo.packing import pack_weights

SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 12}
TRANSFORMER = "attention"
PROMPT = 128  # tokens that are read before each state is filled
ROOM = 192  # slots for the tokens that the measurement itself adds
READ = 40_000_000  # float32 numbers that are read to measure the memory: more than a processor's caches hold


@dataclass(frozen=True)
class Limits:
    """What a measurement may take; what would take more is skipped, and the report says so."""

    bytes: int  # of one state
    seconds: float  # to read a context


@torch.inference_mode()
def bench_decode(
    mixers: Iterable[str],
    contexts: Iterable[int],
    batches: Iterable[int],
    *,
    turns: int,
    limits: Limits,
    say: Callable[[str], None],
    compile: bool = False,
) -> dict[str, Any]:
    """Decoding speeds and times to the first token, what was skipped, and where the transformer falls behind."""
    mixers, contexts = list(mixers), sorted(contexts)
    models = {mixer: make_model(mixer) for mixer in mixers}
    decoding, reading, skipped = [], [], []
    for batch in batches:
        for context in contexts:
            rows, left_out = decode_point(models, context, batch, turns, limits, compile)
            decoding += rows
            skipped += left_out
            say(f"batch {batch}, context {context:,}: " + ", ".join(map(in_words, rows)))
    for mixer, model in models.items():
        for batch in batches:
            rows, left_out = read_contexts(mixer, model, contexts, batch, limits)
            reading += rows
            skipped += left_out
            taken = ", ".join(f"{row['context']:,}: {row['seconds']:.2f} s" for row in rows)
            say(f"{mixer}, batch {batch}, first token after {taken}")
    weights = {mixer: weight_bytes(model) for mixer, model in models.items()}
    return {
        **machine("cpu"),
        "threads": torch.get_num_threads(),
        "model": SIZES,
        "weight_bytes_per_step": weights,
        "decoding": decoding,
        "first_token": reading,
        "crossover": crossovers(decoding),
        "skipped": skipped,
    }


@torch.inference_mode(False)  # or no one could tell whether its parameters change
def make_model(mixer: str, **options: Any) -> ZooForCausalLM:
    torch.manual_seed(0)
    return pack_weights(ZooForCausalLM(ZooConfig(**SIZES, mixers={mixer: {}}, **options)).eval())


def decode_point(
    models: dict[str, ZooForCausalLM], context: int, batch: int, turns: int, limits: Limits, compile: bool
) -> tuple[list[dict], list[dict]]:
    """Decoding `batch` texts after `context` tokens each, all models in turn."""
    steps, sizes, skipped = {}, {}, []
    token = torch.ones(batch, 1, dtype=torch.int64)
    for mixer, model in models.items():
        needed = state_bytes(model, context) * batch
        if needed > limits.bytes:
            reason = f"its state of {needed / 2**30:.1f} GiB is over the limit of {limits.bytes / 2**30:.1f}"
            skipped.append({"what": "decoding", "mixer": mixer, "batch": batch, "context": context, "reason": reason})
            continue
        sizes[mixer] = needed
        for compiled in (False, True) if compile and mixer != TRANSFORMER else (False,):
            step = DecodeStep(model, cache_at(model, context, batch), compile=compiled)
            for _ in range(WARM_UP + 1):
                step(token)
            steps[mixer, compiled] = step
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
    memory, reads = torch.ones(READ), {key: [] for key in steps}
    for _ in range(turns):
        for key, step in steps.items():
            memory.sum()  # the first read after a step over gigabytes is slow
            reads[key].append(timed(memory.sum))
            seconds[key].append(timed(lambda step=step: step(token)))
    rows = []
    for (mixer, compiled), taken in seconds.items():
        row = {"mixer": mixer, "batch": batch, "context": context, "seconds_per_step": median(taken)}
        row |= {"tokens_per_second": batch / median(taken), "state_bytes": sizes[mixer]}
        if compiled:
            row |= {"compiled": True, "times_recorded": ratio(seconds[mixer, False], taken)}
        if (TRANSFORMER, False) in seconds:
            row["times_the_transformer"] = ratio(seconds[TRANSFORMER, False], taken)
        if batch == 1:
            share = weight_bytes(models[mixer]) / memory.nbytes
            row["share_of_bandwidth"] = share * ratio(reads[mixer, compiled], taken)
        rows.append(row)
    return rows, skipped


def cache_at(model: ZooForCausalLM, context: int, batch: int) -> ZooCache:
    """A cache as it is after `context` tokens, but for the values in it."""
    cache = model.init_cache(batch)
    model(torch.ones(batch, min(PROMPT, context), dtype=torch.int64), past_key_values=cache, logits_to_keep=1)
    for state in cache.states:
        if isinstance(state, GrowingKeyValues):
            values = torch.randn(context + ROOM, state["keys"].shape[3])
            for name in ("keys", "values"):
                shape = (*state[name].shape[:2], *values.shape)
                state.tensors[name] = torch.empty(shape).copy_(values)
            state.used = context
        if "position" in state.tensors:
            state["position"].fill_(context)
    cache.length = context
    return cache


def state_bytes(model: ZooForCausalLM, context: int) -> int:
    """Bytes of the state of one text after `context` tokens."""
    total = 0
    for state in model.init_cache(1).states:
        total += state.nbytes
        if isinstance(state, GrowingKeyValues):
            total += context * 2 * state["keys"].shape[1] * state["keys"].shape[3] * state["keys"].element_size()
    return total


def weight_bytes(model: ZooForCausalLM) -> int:
    """Bytes of the parameters that every step reads: all but the embeddings, of which it reads a row."""
    return sum(parameter.nbytes for parameter in model.parameters()) - model.model.embed_tokens.weight.nbytes


def read_contexts(
    mixer: str, model: ZooForCausalLM, contexts: list[int], batch: int, limits: Limits
) -> tuple[list[dict], list[dict]]:
    """Times to the first token, shortest context first, up to where the limit would be passed."""
    rows, skipped = [], []
    generator = torch.Generator().manual_seed(0)
    for context in contexts:
        place = {"mixer": mixer, "batch": batch, "context": context}
        foreseen = rows[-1]["seconds"] * context / rows[-1]["context"] if rows else 0
        reason = None
        if skipped or foreseen > limits.seconds:
            reason = f"reading it would take over the limit of {limits.seconds:g} seconds"
        elif (needed := state_bytes(model, context) * batch) > limits.bytes:
            reason = f"its state of {needed / 2**30:.1f} GiB is over the limit of {limits.bytes / 2**30:.1f}"
        if reason is not None:
            skipped.append({"what": "first token", **place, "reason": reason})
            continue
        ids = torch.randint(SIZES["vocab_size"], (batch, context), generator=generator)

        def read(ids=ids) -> None:
            model(ids, past_key_values=model.init_cache(batch), logits_to_keep=1).logits.argmax()

        taken = [timed(read)]
        if taken[0] < limits.seconds / 4:
            taken += [timed(read), timed(read)]
        rows.append({**place, "seconds": median(taken), "tokens_per_second": batch * context / median(taken)})
    return rows, skipped


def crossovers(rows: list[dict]) -> list[dict]:
    """For each mixer and batch size the shortest measured context from which on the transformer is slower."""
    found = []
    recorded = [row for row in rows if "compiled" not in row]
    compared = [row for row in recorded if "times_the_transformer" in row and row["mixer"] != TRANSFORMER]
    for mixer, batch in dict.fromkeys((row["mixer"], row["batch"]) for row in compared):
        mine = [row for row in compared if (row["mixer"], row["batch"]) == (mixer, batch)]
        slower = [row["context"] for row in mine if row["times_the_transformer"] <= 1]
        faster = [row["context"] for row in mine if row["context"] > max(slower, default=0)]
        found.append({"mixer": mixer, "batch": batch, "context": min(faster, default=None)})
    return found


@torch.inference_mode()
def against_transformers(turns: int, length: int = 2048) -> dict[str, Any]:
    """Mamba-2 here and in transformers, with the same sizes and no MLPs: a decoding step, and reading a prompt."""
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says that its kernels need a GPU
    sizes = {"head_dim": 64, "state_size": 128, "expand": 2, "num_heads": SIZES["hidden_size"] // 32, "n_groups": 1}
    theirs = Mamba2ForCausalLM(Mamba2Config(**SIZES, **sizes)).eval()
    ours = make_model("mamba2", intermediate_size=0)
    ids = torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    prompt = {
        "ours": lambda: ours(ids, past_key_values=ours.init_cache(1), logits_to_keep=1),
        "theirs": lambda: theirs(ids, use_cache=True, logits_to_keep=1),
    }
    cache = theirs(ids[:, :PROMPT], use_cache=True).cache_params
    step = DecodeStep(ours, cache_at(ours, PROMPT, 1))
    token = ids[:, :1]
    decode = {"ours": lambda: step(token), "theirs": lambda: theirs(token, cache_params=cache, use_cache=True)}
    found = {"parameters": {"ours": ours.num_parameters(), "theirs": theirs.num_parameters()}, "prompt": length}
    for what, calls, rounds in (("decode", decode, 4 * turns), ("prefill", prompt, max(3, turns // 3))):
        for call in calls.values():
            for _ in range(WARM_UP + 2 if what == "decode" else 1):
                call()
        taken = {who: [] for who in calls}
        for _ in range(rounds):
            for who, call in calls.items():
                taken[who].append(timed(call))
        found[what] = {who: median(seconds) for who, seconds in taken.items()}
        found[what]["ratio"] = ratio(taken["theirs"], taken["ours"])
    return found


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """Median over the turns."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def in_words(row: dict) -> str:
    share = f" ({row['share_of_bandwidth']:.0%} of the memory's)" if "share_of_bandwidth" in row else ""
    return f"{name(row)} {row['tokens_per_second']:.0f}/s{share}"


def name(row: dict) -> str:
    return row["mixer"] + ", compiled" * row.get("compiled", False)


def free_memory() -> int:
    """Bytes that a new process could take."""
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def tables(report: dict) -> Iterator[str]:
    """The report in Markdown: for each batch size tokens/s over contexts."""
    contexts = sorted({row["context"] for row in report["decoding"]})
    for batch in sorted({row["batch"] for row in report["decoding"]}):
        rows = [row for row in report["decoding"] if row["batch"] == batch]
        yield f"| batch {batch}, tokens/s after | " + " | ".join(f"{context:,}" for context in contexts) + " |"
        yield "| --- |" + " ---: |" * len(contexts)
        for mixer in dict.fromkeys(map(name, rows)):
            speeds = {row["context"]: row["tokens_per_second"] for row in rows if name(row) == mixer}
            cells = [f"{speeds[context]:,.0f}" if context in speeds else "" for context in contexts]
            yield f"| {mixer} | " + " | ".join(cells) + " |"
        yield ""
