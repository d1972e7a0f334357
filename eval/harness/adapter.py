"""A model as lm-eval wants it. Its requests are answered from states that are forked where texts part.

What is tokenized how, where texts are cut and what follows on what is as in lm-eval's own `HFLM`, so the numbers are
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm_zoo.causal_lm import CausalLM
from lm_zoo.errors import UserError
from lm_zoo.eval.harness.generation import continuations
from lm_zoo.eval.harness.memory import enough_memory
from lm_zoo.eval.harness.readers import reader_of
from lm_zoo.eval.harness.scoring import Scored, Work, score

ROLLING_WINDOW = 2048  # lm-eval's, for models without a limit
REPEAT = "\n"  # between a context and the same context


class HarnessLM(TemplateLM):
    """Any causal LM with its tokenizer.

    Args:
        model: in eval mode, on its device.
        batch_size: texts that are read at a time.
        max_length: tokens that the model is given at most; what is longer is cut on the left, and a rolling text is
            read in windows of that many. If not given, nothing is cut: a text beyond the model's positions is refused,
            and windows are as long as the positions, or 2,048 tokens for a model without a limit.
        read_twice: give every context twice (Arora et al. 2024, arXiv 2407.05483).
        prefix: let the tokens of every context see all of each other, for models with prefix linear attention (the
            same paper's other half).
        progress: where a bar is shown, if that is a terminal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        read_twice: bool = False,
        prefix: bool = False,
        progress: TextIO | None = None,
    ):
        super().__init__()
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 2:
            raise UserError(f"max_length must be at least 2 tokens (one to see, one to predict), got {max_length}")
        if max_length is not None and self.limit is not None and max_length > self.limit:
            raise UserError(f"max_length {max_length} exceeds the model's {self.limit} positions")
        if prefix and not isinstance(model, CausalLM):
            raise UserError(f"prefix needs a model of lm_zoo, got a {type(model).__name__}; leave it out")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.cut = max_length
        self.read_twice = read_twice
        self.prefix = prefix
        self.progress = progress
        self.reader = reader_of(model)
        self.work = Work()
        self.texts_cut = 0
        self._device = model.device
        self._encode = functools.lru_cache(maxsize=64)(self._encode)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        bos = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if bos is None else bos
        if token is None:
            raise UserError("the tokenizer has no start or end token, which a text without a context begins with")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self._encode(string, add_special_tokens))

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        options = {"verbose": False}
        if add_special_tokens is None:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            start = eos if bos is None else bos
            if start is not None and string.startswith(self.tokenizer.decode(start)):
                add_special_tokens = False  # its own mark is in the text already
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        return self.tokenizer(string, **options)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = []
        for request in requests:
            context, continuation = request.args
            if context:
                pair = self._encode_pair(self.given(context), continuation)
            else:
                answer = self.tok_encode(continuation, add_special_tokens=False)
                mark = self.prefix_token_id
                pair = (answer[:1], answer[1:]) if answer[:1] == [mark] else ([mark], answer)
            encoded.append((request.args, *pair))
        return self._loglikelihood_tokens(encoded)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([self._scored(context, answer) for _, context, answer in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if self.read_twice or self.prefix:
            option = "read_twice" if self.read_twice else "prefix"
            raise UserError(f"{option} is about contexts, and a text that is scored from its first token on has none")
        windows, owners = [], []
        for number, request in enumerate(requests):
            window = self.cut or self.limit or ROLLING_WINDOW
            pairs = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, window, 1)
            for context, answer in map(make_disjoint_window, pairs):
                windows.append(Scored(context + answer, len(context)))
                owners.append(number)
        total = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._scores(windows), strict=True):
            total[number] += nats
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._working(len(requests), "texts written") as done:
            return continuations(self, [request.args for request in requests], done)

    def shortened(self, tokens: list[int], room: int = 0) -> list[int]:
        """The end of a text that leaves `room` of the tokens that the model may be given."""
        limit = self.limit if self.cut is None else self.cut
        if limit is None or len(tokens) <= limit - room:
            return tokens
        if self.cut is None:
            more = f" and {room} to be written" if room else ""
            raise UserError(
                f"a text of {len(tokens):,} tokens{more} exceeds the model's {limit:,} positions; give --max-length "
                f"{limit} to cut such texts on the left"
            )
        if room >= limit:
            raise UserError(f"max_length {limit} leaves no room for a context: the task asks for {room} new tokens")
        self.texts_cut += 1
        return tokens[room - limit :]

    def given(self, context: str) -> str:
        return context + REPEAT + context if self.read_twice and context else context

    def _scored(self, context: list[int], answer: list[int]) -> Scored:
        if not context or not answer:
            raise UserError("a task has an answer or a context without tokens; check its doc_to_text and its choices")
        tokens = self.shortened((context + answer)[:-1]) + answer[-1:]
        if len(answer) >= len(tokens):
            raise UserError(f"an answer of {len(answer):,} tokens does not fit into max_length {len(tokens) - 1:,}")
        return Scored(tokens, len(tokens) - len(answer))

    def _scores(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        with self._working(len(requests), "answers scored") as done:
            options = {"batch_size": self.batch_size, "prefix": self.prefix}
            return score(self.reader, requests, work=self.work, done=done, **options)

    @contextmanager
    def _working(self, count: int, what: str) -> Iterator[Any]:
        hidden = None if self.progress is not None else True  # None: hidden unless on a terminal
        bar = tqdm(total=count, desc=what, file=self.progress, disable=hidden, leave=False)
        with bar, enough_memory(self.batch_size):
            yield bar.update
