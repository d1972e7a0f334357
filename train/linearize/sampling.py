"""Texts by the teacher itself, where there are no others: what it would write is what the student has to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.errors import UserError
from lm_zoo.files import whole_file
from lm_zoo.train.linearize.data import prefix
from lm_zoo.train.linearize.spec import LinearizeSpec
from lm_zoo.train.linearize.teacher import not_finite

SELF = "self"  # in the place of a file name
TEXTS_AT_A_TIME = 64
MOST_TOKENS = 200_000  # where there is no other text: sampling is slow beside training, another pass costs less


def sample_texts(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    spec: LinearizeSpec,
    log: Callable[[str], None],
) -> None:
    """Writes JSON lines with texts of about `tokens` tokens together, unless the file is there already.

    Drawn from the teacher's whole distribution (temperature 1), from the start of a text to its end or `spec.length`.
    """
    if path.is_file():
        return
    start = (
        prefix(tokenizer).tolist()
        or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    )
    ends = {token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}
    count = 0
    log(f"sampling {tokens:,} tokens from the teacher")
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file, torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        while count < tokens:
            before = count
            for ids in _sample(teacher, tokenizer, start, ends, spec.length):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                count += len(ids) if text else 0
                if text:
                    file.write(json.dumps({"text": text}) + "\n")
            if count == before:
                raise UserError("the teacher writes nothing but empty texts; give some with --text")


@torch.inference_mode()
def _sample(teacher, tokenizer, start: list[int], ends: set[int], length: int) -> list[list[int]]:
    ids = torch.tensor([start] * TEXTS_AT_A_TIME, device=teacher.device)
    if teacher(ids[:1]).logits.isnan().any():
        raise not_finite(teacher.name_or_path)
    output = teacher.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length - len(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for row in output[:, len(start) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts
