"""What the causal language models of lm_zoo have in common: texts in, logits or a loss out, a cache, `generate()`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lm_zoo.cache import ZooCache
from lm_zoo.decode import DecodeStep, recordable
from lm_zoo.kernels.checks import check_cu_seqlens
from lm_zoo.kernels.sequence_parallel import Segment, SequenceGroup, active_group, mean_over_ranks
from lm_zoo.layers.base import FEW
from lm_zoo.layers.prefix import prefix_tokens
from lm_zoo.modules.padding import Padding
from lm_zoo.packing import unpacked

IGNORE = -100  # the label of tokens that do not count
PREFILL_CHUNK = 4096  # tokens of a long prompt that are read at a time
STEPWISE = ("greedy_search", "sample", "beam_search", "beam_sample")  # modes of generation that go token by token
LOOKS_INSIDE = ("contrastive_search", "dola_generation")  # modes that need more of a model than logits


class CausalLM(PreTrainedModel, GenerationMixin):
    """Base of the causal language models. A subclass defines `init_cache`, `hidden_states`, `head` and `head_loss`.

    `generate` takes all that transformers offers, but for caches other than `ZooCache`.
    """

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _is_stateful = False  # in the sense of transformers: the cache can go back, as assisted generation needs it to

    def init_cache(self, batch_size: int) -> ZooCache:
        """An empty cache for `batch_size` texts."""
        raise NotImplementedError(f"{type(self).__name__} does not define init_cache")

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
    ) -> Tensor:
        """What `head` takes, `[B, T, D]`. Arguments as in `forward`; the cache, if given, takes in the tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not define hidden_states")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define head")

    def head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0) -> Tensor:
        """Cross entropy of `head(hidden)`, `[N, D]`, and targets `[N]`, as `linear_cross_entropy` computes it."""
        raise NotImplementedError(f"{type(self).__name__} does not define head_loss")

    def decode_parts(self, cache: ZooCache) -> list[tuple[bool, Callable[[Tensor], Tensor]]]:
        """What makes logits `[B, 1, V]` of one token of each row, in turn, and whether each part has tensors of fixed
        shapes and addresses, so that it can be recorded (`DecodeStep`)."""
        return [(False, lambda ids: self.head(self.hidden_states(ids, past_key_values=cache)))]

    def save_pretrained(self, save_directory, *, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        state_dict = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(save_directory, state_dict=unpacked(state_dict), **kwargs)

    @property
    def _cache_dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        kind = self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # not on the meta device
            return torch.get_autocast_dtype(kind)
        return self.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        z_loss: float = 0.0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token, or the loss.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding, which may be anywhere: it changes neither states nor
                other tokens' outputs, and its own hidden states are 0. `[B, past + T]` is cut to its last T columns.
            inputs_embeds: `[B, T, D]`, in place of `input_ids`.
            labels: `[B, T]`, the input itself for language modelling: each token is scored against the next one's
                label; -100 does not count, nor do padding and the first token of a document. The loss is the mean over
                the tokens that count. It is computed in chunks, and `logits` is then `None`.
            past_key_values: a cache of `init_cache`, which the tokens continue and go into.
            use_cache: whether to make a cache where none is given.
            cu_seqlens: `[N + 1]`, borders of N documents packed along time; B = 1, and a cache has N rows.
            prefix_length: how many tokens at the start of each text, padding not counted, see all of each other in the
                layers that can do that (`PrefixMixer`; the others stay causal): one number, or one per text. They do
                not count in the loss. In `generate` it is that of the prompt.
            logits_to_keep: logits of the last so many tokens only, or of these positions; 0 is all. With a cache, no
                gradients and a number above 0, a long text is read in pieces, whose memory does not grow with it. Where
                the cache records, of more than a few tokens only those whose logits are kept can then be taken back.
            z_loss: weight of the squared log-partition in the loss, see `linear_cross_entropy`.
            output_attentions, output_hidden_states: not supported; here because PEFT names them in every call.
            return_dict: whether to return an object (default) or a tuple.
        """
        for name, asked in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if asked:
                raise ValueError(f"{name} is not supported by {type(self).__name__}: use a forward hook on the layers")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None and given is not None:
            past_key_values = self.init_cache(given.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        step = getattr(past_key_values, "step", None)
        if step is not None and step.armed:
            step.armed = False
            output = CausalLMOutputWithPast(logits=step(input_ids), past_key_values=past_key_values)
            return output.to_tuple() if return_dict is False else output
        whole = labels is not None or cu_seqlens is not None or prefix_length is not None
        if not whole and isinstance(past_key_values, ZooCache):
            input_ids, attention_mask = self._read_ahead(input_ids, attention_mask, past_key_values, logits_to_keep)
        hidden = self.hidden_states(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            prefix_length=prefix_length,
        )
        loss = logits = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head(hidden[:, kept])
        else:
            mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
            targets = next_labels(labels, hidden.shape[:2], mask, cu_seqlens, prefix_length)
            hidden, targets = hidden.flatten(0, 1), targets.flatten()
            if (group := active_group()) is None:
                loss = self.head_loss(hidden, targets, z_loss=z_loss)
            else:
                loss = self.head_loss(hidden, targets, reduction="sum", z_loss=z_loss)
                loss = mean_over_ranks(loss, (targets != IGNORE).sum(), group)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _read_ahead(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: ZooCache, kept: int | Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Let the cache take in a long text piece by piece; what is returned is its end, whose logits are asked for."""
        if input_ids is None or input_ids.dim() != 2 or torch.is_grad_enabled() or active_group() is not None:
            return input_ids, attention_mask
        if not isinstance(kept, int) or kept <= 0 or input_ids.shape[1] <= kept:
            return input_ids, attention_mask
        recording, ahead = cache.recording, input_ids.shape[1] - kept
        if not recording:
            ahead = ahead // PREFILL_CHUNK * PREFILL_CHUNK
        elif input_ids.shape[1] <= FEW and attention_mask is None:
            ahead = 0
        if ahead == 0:
            return input_ids, attention_mask
        if recording:  # what stays in any case is not noted; it may be long, or have padding
            cache.settle()
        mask = attention_mask
        if mask is not None:
            mask = Padding.columns(mask, *input_ids.shape, cache.length)
        for start in range(0, ahead, PREFILL_CHUNK):
            piece = slice(start, min(start + PREFILL_CHUNK, ahead))
            self.hidden_states(input_ids[:, piece], None if mask is None else mask[:, piece], past_key_values=cache)
        if recording:
            cache.record()
        return input_ids[:, ahead:], None if mask is None else mask[:, ahead:]

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        if past_key_values is not None and not is_first_iteration:
            attention_mask = None  # the padding is in the prompt, which the cache holds
            kwargs.pop("prefix_length", None)  # and so is the prefix
        if is_first_iteration and getattr(past_key_values, "recording", False):
            input_ids = input_ids[:, past_key_values.length :]  # as assisted generation leaves to us
        kwargs.pop("tokenizer", None)  # of stop_strings: transformers hands it on to the model
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        step = getattr(past_key_values, "step", None)
        if step is not None and not is_first_iteration:
            step.armed = inputs["input_ids"].shape[1] == 1
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """A `ZooCache` with a row for every beam or returned sequence, in place of transformers' own caches."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: "
                f"{type(self).__name__} keeps its own ZooCache"
            )
        if generation_config.use_cache is False:
            return
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = self.init_cache(batch_size * copies)
            if generation_config.is_assistant:
                cache.record()
        else:
            if copies > 1 and cache.batch_size == batch_size:
                cache = cache.fork(copies)
            cache._is_user_defined = True  # as transformers marks a cache that outlives generate()
        if isinstance(cache, ZooCache):
            quick = self.device.type == "cpu" and generation_mode in STEPWISE and recordable(self, cache)
            cache.step = DecodeStep(self, cache) if quick else None
        model_kwargs["past_key_values"] = cache

    def _get_deprecated_gen_repo(self, generation_mode, trust_remote_code, custom_generate=None) -> str | None:
        """Refuses in one line the modes that transformers itself no longer has."""
        if generation_mode in LOOKS_INSIDE:
            raise ValueError(
                f"{generation_mode.value} reads the hidden states of every layer or token, which {type(self).__name__} "
                "does not give out: leave out penalty_alpha and dola_layers"
            )
        return super()._get_deprecated_gen_repo(generation_mode, trust_remote_code, custom_generate)

    def _assisted_decoding(self, *args, **kwargs):
        """As in transformers; the cache, which may outlive it, no longer records when it is over."""
        cache = kwargs.get("past_key_values")
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            if cache is not None:
                cache.settle()


def read_tokens(
    embed: nn.Module,
    run: Callable[[Tensor, ZooCache | None, Tensor | None], Tensor],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    inputs_embeds: Tensor | None,
    past_key_values: ZooCache | None,
    cu_seqlens: Tensor | None,
    num_states: int,
    checkpointing: bool,
) -> Tensor:
    """Hidden states `[B, T, D]` of a batch of texts, by a model that takes no padding.

    Args:
        embed: tokens to embeddings.
        run: the model, `run(x, cache, cu_seqlens)`: `[B, T, D]` to `[B, T, D]`. A padded batch comes to it packed, and
            a call in which there is nothing but padding does not.
        input_ids, attention_mask, inputs_embeds, past_key_values, cu_seqlens: as in `CausalLM.forward`.
        num_states: how many states a cache must have.
        checkpointing: whether the model is being trained with gradient checkpointing.
    """
    x = _embed(embed, input_ids, inputs_embeds)
    length = x.shape[1]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.device)
    _check_cache(past_key_values, num_states, x.shape[0], cu_seqlens)
    if past_key_values is not None and checkpointing and torch.is_grad_enabled():
        raise ValueError(
            "gradient checkpointing runs each block twice, which a cache does not survive: leave out "
            "past_key_values and use_cache, or switch checkpointing off"
        )
    padding = None
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("give attention_mask or cu_seqlens, not both: packed documents have no padding")
        past = 0 if past_key_values is None else past_key_values.length
        padding = Padding.find(attention_mask, x.shape[0], length, past)
    group = active_group()
    if padding is not None:
        if past_key_values is not None and group is not None:
            raise ValueError("ranks cannot share a padded batch with a cache: leave out past_key_values or the padding")
        x, cu_seqlens = padding.pack(x), padding.cu_seqlens
    if past_key_values is not None and past_key_values.recording and (cu_seqlens is not None or group is not None):
        raise ValueError(
            "past_key_values records, to take tokens back, and then takes no padding, packed documents or segments: "
            "read those before record()"
        )
    if x.shape[1] > 0:  # nothing but padding leaves the states as they are
        x = run(x, past_key_values, cu_seqlens)
    if past_key_values is not None:
        past_key_values.length += length if group is None else length * group.size
    return x if padding is None else padding.unpack(x)


def _embed(embed: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    layout = "[B, T]" if inputs_embeds is None else "[B, T, D]"
    if given.dim() != layout.count(",") + 1 or 0 in given.shape:
        raise ValueError(f"{name} must be {layout} with at least one token, got {list(given.shape)}")
    if inputs_embeds is not None:
        return inputs_embeds
    try:
        return embed(input_ids)
    except IndexError as error:  # only the CPU raises it; elsewhere looking at the ids would stall the device
        raise ValueError(
            f"input_ids must be in [0, vocab_size = {embed.num_embeddings}), got ids from "
            f"{input_ids.min()} to {input_ids.max()}: is this the model's tokenizer?"
        ) from error


def next_labels(
    labels: Tensor,
    shape: torch.Size,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prefix_length: int | Tensor | None = None,
) -> Tensor:
    """For every token the label of the next one in its document, `[B, T]`; -100 at the last, and at padding.

    Also where the next one is of the prefix, which all tokens of the prefix have seen.
    """
    if labels.shape != shape:
        raise ValueError(f"labels must be [B, T] = {list(shape)}, got {list(labels.shape)}")
    padding = None if attention_mask is None else Padding.find(attention_mask, *shape)
    if padding is not None:
        labels, cu_seqlens = padding.pack(labels), padding.cu_seqlens
    if prefix_length is not None:
        labels = labels.masked_fill(prefix_tokens(prefix_length, labels, cu_seqlens), IGNORE)
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    if (group := active_group()) is not None and targets.numel():
        targets = _targets_of_segment(labels, targets, cu_seqlens, group)
    elif cu_seqlens is not None and targets.numel():
        last = cu_seqlens[1:].long() - 1  # -1 for an empty first document: the very last token, which has no next one
        targets[:, last] = IGNORE
    return targets if padding is None else padding.unpack(targets, IGNORE)


def _targets_of_segment(labels: Tensor, targets: Tensor, cu_seqlens: Tensor | None, group: SequenceGroup) -> Tensor:
    """With the label of the last token, which is the first one of the next segment, and the borders that lie here."""
    segment = Segment(group, labels.shape[1], cu_seqlens, labels.device)
    following = group.shift(labels[:, :1], -1)
    if group.rank < group.size - 1:
        targets[:, -1:] = following
    if segment.packed:
        last = cu_seqlens[1:].long() - 1 - segment.offset
        here = (last >= 0) & (last < segment.length)
        last = torch.where(here, last, segment.length)
        targets = F.pad(targets, (0, 1)).index_fill(1, last, IGNORE)[:, :-1]
    return targets


def _check_cache(cache: ZooCache | None, num_states: int, batch: int, cu_seqlens: Tensor | None) -> None:
    if cache is None:
        return
    if not isinstance(cache, ZooCache):
        raise TypeError(f"past_key_values must be a ZooCache (see model.init_cache), got {type(cache).__name__}")
    if len(cache) != num_states:
        raise ValueError(f"past_key_values has {len(cache)} layers, but the model has {num_states}")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if cache.batch_size != rows:
        raise ValueError(f"past_key_values has {cache.batch_size} rows, but the input has {rows}")
