"""docs/zoo.md, written from the registry: what each mixer is, its recurrence, its state, its op, and its presets."""

import inspect
import re
import sys
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm_zoo.config import ZooConfig
from lm_zoo.eval.mixers import MixerFacts, mixer_facts
from lm_zoo.layers import MIXERS, Mixer
from lm_zoo.model import ZooForCausalLM

COMMAND = "lm-zoo list --markdown > docs/zoo.md"

# Prefixes of the operators that a call runs, and what the page calls them.
OPS = {
    "lm_zoo.linear_attention.": "linear_attention",
    "lm_zoo.linear_scan.": "linear_scan",
    "lm_zoo.selective_scan.": "selective_scan",
    "aten._fft_r2c.": "torch.fft",
    "aten._scaled_dot_product_": "scaled_dot_product_attention",
}

# Why a mixer has no preset of a published size.
UNPUBLISHED = {
    "kda": "Kimi Linear, the paper's model, is a 48B mixture of experts with latent attention in every fourth layer, "
    "neither of which the zoo has.",
    "lightnet": "No public configuration of a language model with its parameter count was found.",
    "linear_attention": "Based (arXiv 2402.18668), published as a language model with `feature_map: taylor`, consists "
    "mostly of gated convolutions, which the zoo does not have.",
    "s4d": "Published for the classification of long sequences, not as a language model.",
}


def zoo_page(hidden_size: int) -> str:
    """The page, with states counted at `hidden_size`: the same text for the same registry and presets."""
    facts = mixer_facts(hidden_size)
    ops = {row.name: ops_of(MIXERS[row.name](hidden_size)) for row in facts}
    presets = {row.name: [] for row in facts}
    for preset in ZooConfig.presets():
        config = ZooConfig.preset(preset)
        for name in dict.fromkeys(config.pattern):
            presets[config.mixers[name].get("type", name)].append((parameters(config), preset))
    lines = [
        "# The mixers of lm_zoo",
        "",
        f"<!-- Written by `{COMMAND}`: change the classes or the presets, not this file. -->",
        "",
        "What forgets is the **decay**, how a token is written is the **update**. The **state** is what a layer of "
        f"hidden size {hidden_size} with default options remembers of one text, in float32. The **op** does the work; "
        "`linear_attention`, `linear_scan` and `selective_scan` are in `kernels/`. In the equations `t` is the token, "
        "`S` a matrix per head, `h` a vector; classes have the rest in their docstrings.",
        "",
        *_table(facts, ops),
    ]
    for row in facts:
        lines += ["", *_section(row, ops[row.name], sorted(presets[row.name]))]
    return "\n".join(lines) + "\n"


def ops_of(mixer: Mixer) -> list[str]:
    """Names from `OPS` that a call of the layer runs on, watched rather than declared."""
    with torch.no_grad(), _Watch() as watch:
        mixer(torch.zeros(1, 2, mixer.hidden_size))
    return [name for prefix, name in OPS.items() if any(op.startswith(prefix) for op in watch.seen)]


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def parameters(config: ZooConfig) -> int:
    with torch.device("meta"):
        return ZooForCausalLM(config).num_parameters()


def _table(facts: list[MixerFacts], ops: dict[str, list[str]]) -> Iterator[str]:
    yield "| mixer | recurrence | decay | update | state | op | paper |"
    yield "| --- | --- | --- | --- | ---: | --- | --- |"
    for row in facts:
        cells = (
            f"[`{row.name}`](#{row.name})",
            f"`{MIXERS[row.name].equation}`",
            row.decay,
            row.update,
            row.state,
            _code(ops[row.name]),
            _linked(row.paper),
        )
        yield f"| {' | '.join(cells)} |"


def _section(row: MixerFacts, ops: list[str], presets: list[tuple[int, str]]) -> Iterator[str]:
    mixer = MIXERS[row.name]
    what = inspect.getdoc(sys.modules[mixer.__module__]).split("\n\n")[0]
    paragraphs = inspect.getdoc(mixer).split("\n\n")
    equations = next((part for part in paragraphs if part.startswith("    ")), f"    {mixer.equation}")
    state = next((" ".join(part.split()) for part in paragraphs if part.startswith("The state ")), "")
    yield f"## {row.name}"
    yield ""
    yield " ".join(what.split())
    yield ""
    yield "```text"
    yield inspect.cleandoc("\n" + equations)
    yield "```"
    yield ""
    yield f"- Class: `{row.class_name}`"
    yield f"- Paper: {_linked(row.paper)}"
    yield f"- Decay: {row.decay}; update: {row.update}; op: {_code(ops)}"
    yield f"- State: {row.state}. {state}".rstrip()
    yield f"- Presets: {', '.join(f'`{name}` ({count:,} parameters)' for count, name in presets)}"
    if row.name in UNPUBLISHED:
        yield f"- No preset of a published size: {UNPUBLISHED[row.name]}"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
