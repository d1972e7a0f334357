"""What speculative decoding gains on a text that both models know: `python -m lm_zoo.eval.bench_speculative FOLDER`.

FOLDER holds a model of 12 layers in `model` and one of 2 layers in `draft`, both over bytes; `--train MINUTES` makes
them on the text first. Continuations of several places of the text are then written by plain `generate` and in each way
of speculation, in turns, with weights packed for decoding; what is printed are medians, and whether the tokens agree.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lm_zoo.config import ZooConfig
from lm_zoo.eval.report import check_writable, write_json
from lm_zoo.model import ZooForCausalLM
from lm_zoo.packing import pack_weights
from lm_zoo.speculative import speculate

SIZES = {"model": (256, 12), "draft": (128, 2)}  # hidden size and layers
LENGTH, ROWS = 256, 4  # of a batch in training
LOOKUP, EARLY = 4, 2


def train(name: str, text: Tensor, minutes: float) -> ZooForCausalLM:
    """A model of bytes, trained on pieces of the text for so long, its learning rate falling to 0."""
    hidden_size, layers = SIZES[name]
    torch.manual_seed(0)
    config = ZooConfig(vocab_size=256, hidden_size=hidden_size, num_hidden_layers=layers, mixers={"gla": {}})
    model = ZooForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - done)
        places = torch.randint(len(text) - LENGTH, (ROWS,), generator=generator).tolist()
        ids = torch.stack([text[place : place + LENGTH] for place in places])
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model


@torch.no_grad()
def loss_on(model: ZooForCausalLM, text: Tensor) -> float:
    """Nats per byte."""
    pieces = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return model(pieces, labels=pieces).loss.item()


def measure(model: ZooForCausalLM, draft: ZooForCausalLM, text: Tensor, options: argparse.Namespace) -> dict:
    """Seconds of every way of writing, the share of guesses that stayed, and whether the tokens are the plain ones."""
    ways = {f"draft, {count} guesses": {"draft": draft, "tokens": count} for count in options.guesses}
    ways[f"lookup of {LOOKUP} tokens, 5 guesses"] = {"lookup": LOOKUP, "tokens": 5}
    ways[f"first {EARLY} layers, 2 guesses"] = {"early_layers": EARLY, "tokens": 2}
    seconds = {name: [] for name in ("plain", *ways)}
    shares, calls, agree = ({name: [] for name in ways} for _ in range(3))
    step = (len(text) - options.prompt) // options.places
    for _ in range(options.turns):
        for place in range(0, step * options.places, step):
            prompt = text[None, place : place + options.prompt]
            start = time.perf_counter()
            plain = model.generate(
                prompt, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False, pad_token_id=0
            )
            seconds["plain"].append(time.perf_counter() - start)
            for name, way in ways.items():
                start = time.perf_counter()
                found = speculate(model, prompt, max_new_tokens=options.new, **way)
                seconds[name].append(time.perf_counter() - start)
                shares[name].append(found.acceptance)
                calls[name].append(found.rounds)
                agree[name].append(torch.equal(found.ids, plain))
    rows = {"plain": {"tokens_per_second": options.new / median(seconds["plain"])}}
    for name in ways:
        pairs = zip(seconds["plain"], seconds[name], strict=True)
        rows[name] = {
            "tokens_per_second": options.new / median(seconds[name]),
            "speed_up": median(plain / other for plain, other in pairs),
            "acceptance": sum(shares[name]) / len(shares[name]),
            "tokens_per_call": options.new / (sum(calls[name]) / len(calls[name])),
            "texts_equal_to_plain": f"{sum(agree[name])} of {len(agree[name])}",
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lm_zoo.eval.bench_speculative", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="of model and draft")
    parser.add_argument("--text", type=Path, required=True, help="what they are trained on, and continue")
    parser.add_argument("--bytes", type=int, default=32768, help="how much of it, from its start")
    parser.add_argument("--train", type=float, metavar="MINUTES", help="train them first, the draft a fifth as long")
    parser.add_argument("--guesses", type=int, nargs="+", default=[3, 5, 8], help="of the draft model per call")
    parser.add_argument("--prompt", type=int, default=96, help="bytes of a prompt")
    parser.add_argument("--new", type=int, default=256, help="bytes written after it")
    parser.add_argument("--places", type=int, default=4, help="prompts, spread over the text")
    parser.add_argument("--turns", type=int, default=3, help="how often everything is timed")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.json:
        check_writable(arguments.json)
    text = torch.tensor(list(arguments.text.read_bytes()[: arguments.bytes]))
    if arguments.train:
        for name, share in (("model", 1.0), ("draft", 0.2)):
            train(name, text, share * arguments.train).save_pretrained(arguments.folder / name)
    model, draft = (ZooForCausalLM.from_pretrained(arguments.folder / name).eval() for name in SIZES)
    losses = {"model": loss_on(model, text), "draft": loss_on(draft, text)}
    pack_weights(model)
    pack_weights(draft)
    rows = measure(model, draft, text, arguments)
    for name, row in rows.items():
        more = "" if name == "plain" else f", {row['speed_up']:.2f} times plain, {row['acceptance']:.0%} stay"
        print(f"{name:>32}: {row['tokens_per_second']:6.1f} tokens/s{more}", flush=True)
    if arguments.json:
        found = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "parameters": {"model": model.num_parameters(), "draft": draft.num_parameters()},
            "loss_on_the_text": losses,
            "prompt": arguments.prompt,
            "new": arguments.new,
            "texts": arguments.places * arguments.turns,
        }
        write_json(arguments.json, found | {"ways": rows})


if __name__ == "__main__":
    main()
