"""The harness beside lm-eval's own `HFLM`, on the same requests: `python -m lm_zoo.eval.bench_harness`.

Random texts, each with four answers, and for the last case eight questions of the same text. Both adapters answer all
requests in turns, with the same model, tokenizer and batch size; what is printed are medians, of the ratio that of the
ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from statistics import median

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lm_zoo.config import ZooConfig
from lm_zoo.eval.harness.adapter import HarnessLM
from lm_zoo.eval.machine import machine
from lm_zoo.eval.report import check_writable, write_json
from lm_zoo.layers import MIXERS
from lm_zoo.model import ZooForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 4096  # of the models, which see the letters only


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token per letter."""
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def text(length: int, generator: torch.Generator) -> str:
    return "".join(LETTERS[number] for number in torch.randint(len(LETTERS), (length,), generator=generator).tolist())


def requests(documents: int, context: int, questions: int, question: int, answers: int, answer: int) -> list[Instance]:
    """Per document so many questions of so many tokens after the text, and so many answers to each."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(documents):
        document = text(context - question, generator)
        for _ in range(questions):
            asked = document + text(question, generator)
            pairs += [(asked, text(answer, generator)) for _ in range(answers)]
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
    ]


CASES = {
    "4 answers of 8 tokens": {"questions": 1, "question": 8, "answers": 4, "answer": 8},
    "4 answers of 1 token": {"questions": 1, "question": 8, "answers": 4, "answer": 1},
    "8 questions of 24 tokens, 4 answers of 8 each": {"questions": 8, "question": 24, "answers": 4, "answer": 8},
}


def build(mixer: str, hidden_size: int, layers: int) -> PreTrainedModel:
    """A random model of the zoo, or transformers' Llama of the same sizes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden_size, "num_hidden_layers": layers}
    config = ZooConfig(**sizes, mixers={"gla" if mixer == "llama" else mixer: {}})
    if mixer != "llama":
        return ZooForCausalLM(config).eval()
    inner = config.intermediate_size
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=inner, num_attention_heads=8)).eval()


def measure(model: PreTrainedModel, asked: list[Instance], batch_size: int, turns: int) -> dict:
    tokenizer = letter_tokenizer()
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seconds: dict[str, list[float]] = {"HFLM": [], "harness": []}
    for _ in range(turns):
        for name in seconds:
            lm = hflm if name == "HFLM" else HarnessLM(model, tokenizer, batch_size=batch_size)
            start = time.perf_counter()
            answers = lm.loglikelihood(asked, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)
            if name == "HFLM":
                expected = answers
    apart = max(abs(one - other) for (one, _), (other, _) in zip(answers, expected, strict=True))
    return {
        "seconds": seconds,
        "times_faster": median(plain / ours for plain, ours in zip(*seconds.values(), strict=True)),
        "tokens_asked": lm.work.asked,
        "tokens_read": lm.work.read,
        "largest_difference_in_nats": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lm_zoo.eval.bench_harness", description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=[*MIXERS, "llama"], default=["gla", "llama"])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1000, help="tokens before each answer")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5, help="how often everything is timed")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.json:
        check_writable(arguments.json)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = []
    for mixer in arguments.mixers:
        model = build(mixer, arguments.hidden_size, arguments.layers)
        for case, shape in CASES.items():
            asked = requests(arguments.documents // shape["questions"] or 1, arguments.context, **shape)
            measure(model, asked[: shape["answers"]], arguments.batch_size, 1)  # to warm up
            result = measure(model, asked, arguments.batch_size, arguments.turns)
            results.append({"mixer": mixer, "case": case, "requests": len(asked), **result})
            print(
                f"{mixer:<8} {case:<46} HFLM {median(result['seconds']['HFLM']):6.2f} s   "
                f"harness {median(result['seconds']['harness']):6.2f} s   {result['times_faster']:.2f} times faster"
            )
    if arguments.json:
        sizes = {name: getattr(arguments, name) for name in ("hidden_size", "layers", "context", "batch_size", "turns")}
        made_on = machine(model.device.type) | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        write_json(arguments.json, {**made_on, **sizes, "vocabulary": VOCABULARY, "results": results})


if __name__ == "__main__":
    main()
