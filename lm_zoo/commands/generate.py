"""`lm-zoo generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_zoo.commands.arguments import non_negative, positive, probability, seed
from lm_zoo.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a saved model with its tokenizer")
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="go on from where an earlier run stopped, and keep where this one does",
    )
    parser.add_argument(
        "--temperature", type=non_negative, default=0.8, help="0: always the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-p", type=probability, default=0.95, help="nucleus sampling (default 0.95)")
    parser.add_argument("--seed", type=seed, default=0, help="same seed, same text (default 0)")
    guesses = parser.add_mutually_exclusive_group()
    guesses.add_argument(
        "--draft", metavar="MODEL", type=Path, help="folder of a smaller model that guesses ahead, for speed"
    )
    guesses.add_argument(
        "--lookup", metavar="N", type=positive, help="guess what followed the last N tokens where they stood before"
    )
    guesses.add_argument("--early-layers", metavar="N", type=positive, help="guess with the model's first N layers")
    parser.add_argument("--max-tokens", type=positive, default=200, metavar="N", help="(default 200)")


def run(arguments: argparse.Namespace) -> None:
    from lm_zoo.causal_lm import CausalLM
    from lm_zoo.eval.generation import generate
    from lm_zoo.eval.loading import decode_utf8, load_model
    from lm_zoo.packing import pack_weights

    prompt, state = arguments.prompt, arguments.state
    is_new = state is not None and not state.exists()
    if prompt is None and (state is None or is_new):
        raise UserError("give --prompt TEXT, or --state FILE of an earlier run; see `lm-zoo generate --help`")
    if prompt == "-":
        prompt = decode_utf8(sys.stdin.buffer.read(), "the prompt on standard input")
    model, tokenizer = load_model(arguments.model)
    speculation = {"lookup": arguments.lookup, "early_layers": arguments.early_layers}
    if arguments.draft is not None:
        speculation["draft"], of_draft = load_model(arguments.draft)
        if of_draft.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"the draft in {arguments.draft} has another tokenizer than the model in {arguments.model}; train the "
                "draft with the model's tokenizer"
            )
    speculation = {way: value for way, value in speculation.items() if value is not None}
    if isinstance(model, CausalLM):
        pack_weights(model)
    generate(
        model,
        tokenizer,
        prompt or "",
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stream=sys.stdout,
        state=state,
        speculation=speculation or None,
    )
    if is_new:
        print(f"lm-zoo: {state} is new: the text began here", file=sys.stderr)
