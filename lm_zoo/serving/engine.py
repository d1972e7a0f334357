"""One model that writes many texts at once: each enters and leaves at any step."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from lm_zoo.causal_lm import CausalLM
from lm_zoo.errors import UserError
from lm_zoo.layers.checks import check_positive, check_size
from lm_zoo.prefix_store import PrefixStore
from lm_zoo.serving.reader import Reader
from lm_zoo.serving.request import Closed, EngineError, Piece, QueueFull, Request
from lm_zoo.serving.sampling import Chooser, Sampling
from lm_zoo.serving.slots import Slots

logger = logging.getLogger(__name__)
LONG = 2**16  # characters of a prompt that must not hold up others


class PromptTooLong(UserError):
    """The prompt, or what is to come after it, is longer than the engine or the model takes."""


class Engine:
    """Texts of many callers, written by one model a token of each at a time.

        with Engine(model, tokenizer) as engine:
            for text in engine.stream("Once upon a time", Sampling(max_tokens=50)): ...
            request = engine.submit("In the beginning")      # from any thread; returns at once
            request.result().text                            # or iterate over its pieces
            engine.cancel(request)

    A thread of its own runs the model. In turns it reads a piece of the prompts that have come and adds a token to
    every text that is being written, each by its own `Sampling`; at temperature 0 that is the text of `model.generate`.
    A text is the same whoever else is in the batch, up to the rounding of products of other shapes.

    Args:
        model: of lm_zoo, in eval mode. Nobody else may run it meanwhile.
        tokenizer: its tokenizer.
        max_batch: texts that are read and written at a time; more wait.
        max_queue: texts that may wait; more are refused with `QueueFull`.
        max_prompt_tokens, max_tokens: longest prompt and longest text that are taken.
        max_seconds: for a text from `submit` to its end; it ends there with the reason "timeout".
        prefill_chunk: tokens of prompts that are read between two steps of the texts being written.
        prefix_store: of this model, for prompts that begin alike. Nobody else may use it meanwhile.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 64,
        max_queue: int = 256,
        max_prompt_tokens: int = 32768,
        max_tokens: int = 4096,
        max_seconds: float | None = None,
        prefill_chunk: int = 256,
        prefix_store: PrefixStore | None = None,
    ):
        if not isinstance(model, CausalLM):
            raise UserError(f"model must be one of lm_zoo, got a {type(model).__name__}; linearize it")
        if model.training:
            raise ValueError("model must be in eval mode: call model.eval()")
        sizes = {"max_batch": max_batch, "max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
        for name, value in (sizes | {"prefill_chunk": prefill_chunk}).items():
            check_size(name, value)
        if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 0:
            raise ValueError(f"max_queue must be an integer of at least 0, got {max_queue!r}")
        if max_seconds is not None:
            check_positive("max_seconds", max_seconds)
        if prefix_store is not None and prefix_store.model is not model:
            raise ValueError("prefix_store must be of the same model")
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_tokens
        self.max_seconds = max_seconds
        self.prefix_store = prefix_store
        self.prompt_tokens = 0  # of all prompts that were taken in
        self.written_tokens = 0
        self.steps = 0
        self.finished: Counter[str] = Counter()  # texts, by the reason
        self._ends = _end_tokens(model, tokenizer)
        # Encoding may write into a tokenizer, so it has its own and takes one caller at a time: one for short prompts,
        # and one for long ones, which can take seconds.
        self._encoders = [(copy.deepcopy(tokenizer), threading.Lock()) for _ in range(2)]
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Request] = deque()
        self._held = 0  # texts that were taken in and are not finished
        self._close_by: float | None = None
        # The rest is the thread's own.
        self._reader = Reader(model, prefill_chunk, prefix_store)
        self._slots = Slots(model)
        self._written: list[Request] = []  # text n is row n of the slots
        self._last: list[int] = []  # and its last token, which the model has not read
        self._chooser: Chooser | None = None  # for these texts
        self._thread = threading.Thread(target=self._run, name="lm_zoo.Engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Texts that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being read or written."""
        return self._held - len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether new texts are refused."""
        return self._close_by is not None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt. An empty one starts where a document starts: at the tokenizer's own mark."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not Unicode text: {error.reason} at {error.start}") from error
        with self._encoder(len(prompt)) as encoder:
            ids = encoder(prompt, verbose=False)["input_ids"]
        if not ids:
            marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [mark for mark in marks if mark is not None][:1]
        return ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Tokens of a conversation up to where the answer begins, by the tokenizer's chat template.

        Raises UserError where it has none, or the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template; use completions, or save one with it")
        with self._encoder(sum(len(str(message)) for message in messages)) as encoder:
            try:
                return encoder.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except Exception as error:  # templates are programs of the model's authors, and raise what they like
                raise UserError(f"the model's chat template refuses these messages: {error}") from error

    @contextlib.contextmanager
    def _encoder(self, characters: int) -> Iterator[PreTrainedTokenizerBase]:
        """A tokenizer that nobody else is using."""
        encoder, lock = self._encoders[characters > LONG]
        with lock:
            yield encoder

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        listener: Callable[[Piece], None] | None = None,
    ) -> Request:
        """Take in a text, from any thread, and return at once.

        Args:
            prompt: text, or token ids.
            sampling: how to go on from it; `Sampling()` if not given.
            listener: called with every piece by the engine's thread, which waits for it; else the request keeps them.

        Raises:
            UserError: a prompt without tokens or with ids that the model does not have.
            PromptTooLong, QueueFull, Closed.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(ids)
        sampling = self._check_length(ids, Sampling() if sampling is None else sampling)
        request = Request(ids, sampling, self.tokenizer, self._ends, self.max_seconds, listener)
        with self._changed:
            if self.closing:
                raise Closed("the engine is closing and takes no more texts")
            if self._held >= self.max_batch + self.max_queue:
                raise QueueFull(f"{self._held} texts are waiting or being written already; try again later")
            self._waiting.append(request)
            self._held += 1
            self.prompt_tokens += len(ids)
            self._changed.notify()
        return request

    def stream(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Iterator[str]:
        """The text as it comes. To leave the loop cancels the rest."""
        request = self.submit(prompt, sampling)
        try:
            for piece in request:
                if piece.text:
                    yield piece.text
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a text; nothing happens where it has ended. Its last piece says "cancelled"."""
        request.cancelled = True

    def close(self, grace: float = 0.0) -> None:
        """Take no more texts, finish within `grace` seconds those that were taken in, end the others with `Closed`."""
        with self._changed:
            by = time.monotonic() + grace
            self._close_by = by if self._close_by is None else min(by, self._close_by)
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_prompt(self, ids: list[int]) -> None:
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no start token; give a prompt")
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, and at most {self.max_prompt_tokens} are taken")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise UserError(f"the prompt's token ids must be integers from 0 to {vocabulary - 1}, got {token!r}")

    def _check_length(self, ids: list[int], sampling: Sampling) -> Sampling:
        """With a `max_tokens` that the engine and the model can keep."""
        asked, room = sampling.max_tokens, self.max_tokens
        if asked is not None and asked > room:
            raise UserError(f"max_tokens must be at most {room} here, got {asked}")
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None:
            room = min(room, context - len(ids))
        if room < (asked or 1):
            raise PromptTooLong(
                f"prompt ({len(ids)} tokens) and max_tokens ({asked or 1}) exceed the model's {context} positions; "
                "shorten one of them"
            )
        return sampling if asked is not None else replace(sampling, max_tokens=room)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait():
                self._end_some()
                self._begin()
                if len(self._reader):
                    self._read()
                if self._written:
                    self._write()
        finally:
            self._close_by = 0.0
            self._fail(self._requests(), Closed("the engine has stopped"))

    def _wait(self) -> bool:
        """Until there is something to do; False when there will be nothing more."""
        with self._changed:
            while not self._held:
                if self.closing:
                    return False
                self._changed.wait()
        return True

    def _end_some(self) -> None:
        """Texts that nobody wants any more, or whose time is over."""
        now = time.monotonic()
        if self._close_by is not None and now >= self._close_by:
            self._fail(self._requests(), Closed("the engine is closing"))
            return
        ended = {}
        for request in self._requests():
            if request.cancelled:
                ended[request] = "cancelled"
            elif request.deadline is not None and now >= request.deadline:
                ended[request] = "timeout"
        self._drop(set(ended))
        for request, reason in ended.items():
            request.finish(reason)
            self._count(request)

    def _requests(self) -> list[Request]:
        with self._changed:
            waiting = list(self._waiting)
        return waiting + [prompt.request for prompt in self._reader.prompts] + self._written

    def _begin(self) -> None:
        with self._changed:
            while self._waiting and len(self._reader) + len(self._written) < self.max_batch:
                self._reader.add(self._waiting.popleft())

    def _read(self) -> None:
        turn = self._reader.take_turn()
        try:
            read, logits = self._reader.read(turn)
            if not read:
                return
            requests = [prompt.request for prompt in read]
            chooser = Chooser([request.sampling for request in requests], self.model.device)
            tokens = self._choose(chooser, logits, requests)
            entering = [n for n, request in enumerate(requests) if request.finish_reason is None]
            if entering:
                self._slots.enter([read[n].cache for n in entering])
                self._written += [requests[n] for n in entering]
                self._last += [tokens[n] for n in entering]
                self._chooser = None
        except Exception as error:
            self._slots.leave([*range(len(self._written), len(self._slots))])  # rows that were about to be taken
            self._report(error, [prompt.request for prompt, _ in turn])

    def _write(self) -> None:
        try:
            logits = self._slots.step(self._last)
            self.steps += 1
            if self._chooser is None:
                self._chooser = Chooser([request.sampling for request in self._written], self.model.device)
            self._last = self._choose(self._chooser, logits, self._written)
            self._leave([row for row, request in enumerate(self._written) if request.finish_reason is not None])
        except Exception as error:
            self._report(error, list(self._written))

    def _choose(self, chooser: Chooser, logits: torch.Tensor, requests: list[Request]) -> list[int | None]:
        """The next token of each text, written to it."""
        tokens, logprobs = chooser.choose(logits, [request.draw() for request in requests])
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if token is None:
                request.finish("error", EngineError("the model gave logits that are not finite"))
            else:
                request.write(token, logprobs.get(row))
                self.written_tokens += 1
            if request.finish_reason is not None:
                self._count(request)
        return tokens

    def _leave(self, rows: list[int]) -> None:
        if not rows:
            return
        self._slots.leave(rows)
        for row in sorted(rows, reverse=True):  # as the rows of the slots move
            for texts in (self._written, self._last):
                texts[row] = texts[-1]
                texts.pop()
        self._chooser = None

    def _drop(self, requests: set[Request]) -> None:
        """Take texts out, wherever they are."""
        if not requests:
            return
        with self._changed:
            self._waiting = deque(request for request in self._waiting if request not in requests)
        self._reader.drop(requests)
        self._leave([row for row, request in enumerate(self._written) if request in requests])

    def _report(self, error: Exception, requests: list[Request]) -> None:
        """An error of the model ends the texts that it was working on; the others go on."""
        logger.error("the model failed; %d texts end", len(requests), exc_info=error)
        self._fail(requests, EngineError(f"the model failed: {error}"))

    def _fail(self, requests: list[Request], error: EngineError) -> None:
        self._drop(set(requests))
        for request in requests:
            if request.finish_reason is None:
                request.finish("error", error)
                self._count(request)

    def _count(self, request: Request) -> None:
        self.finished[request.finish_reason] += 1
        with self._changed:
            self._held -= 1


def _end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: those of the tokenizer and of the model's generation_config."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
