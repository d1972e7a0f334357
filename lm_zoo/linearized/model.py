"""A pretrained transformer whose attention is ours: the same weights, with an inner mixer in place of the softmax."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import IGNORE, CausalLM, read_tokens
from lm_zoo.errors import UserError
from lm_zoo.kernels.sequence_parallel import active_group
from lm_zoo.layers import LayerState
from lm_zoo.layers.kv_state import key_values
from lm_zoo.linearized.config import CODE_FILE, LinearizedConfig
from lm_zoo.linearized.families import check_teacher, family_of, geometry
from lm_zoo.linearized.inner import Context
from lm_zoo.linearized.interface import NAME, attach, hold_rotary, release_rotary
from lm_zoo.modules.loss import cross_entropy_in_chunks, linear_cross_entropy
from lm_zoo.modules.rotary import advance, token_positions

CODE = '''"""Loads this folder with trust_remote_code=True, where lm_zoo is installed."""

from lm_zoo.linearized import LinearizedConfig, LinearizedForCausalLM

__all__ = ["LinearizedConfig", "LinearizedForCausalLM"]
'''


class LinearizedForCausalLM(CausalLM):
    """A transformer of transformers, `model.teacher`, with an inner mixer in the attention of all layers but some.

        student = LinearizedForCausalLM.from_teacher(teacher, "hybrid", {"window": 64}, keep_layers=[0])
        student.generate(input_ids, max_new_tokens=20)
        student.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)     # after `import lm_zoo`

    Projections, norms, MLPs and embeddings are the teacher's modules under their usual names; the mixers are submodules
    `mixer` of the attention modules, and `None` in the layers that keep their softmax. Dropout of attention weights is
    left out, and rotary angles that a teacher changes with the length of the text are those of short texts throughout.
    The arguments of a call are those of `CausalLM.forward`.
    """

    config_class = LinearizedConfig
    base_model_prefix = "teacher"

    def __init__(self, config: LinearizedConfig, teacher: PreTrainedModel | None = None):
        super().__init__(config)
        self.family = family_of(config.build_teacher_config())
        self.teacher = _new_teacher(config) if teacher is None else teacher
        self.generation_config = copy.deepcopy(self.teacher.generation_config)
        self._observer = None
        for layer, attention in enumerate(self.attention_layers):
            mixer = None if layer in config.keep_layers else config.build_mixer(attention)
            attach(attention, mixer, self.family.softmax_window(self.teacher.config, layer))
        if rotary := getattr(self.teacher.base_model, "rotary_emb", None):
            hold_rotary(rotary)
        if self.device.type != "meta":  # all is initialised by now, the mixers by themselves: let nobody do it again
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_teacher(
        cls, teacher: PreTrainedModel, mixer: str, options: dict | None = None, keep_layers: list[int] | None = None
    ) -> LinearizedForCausalLM:
        """A model with untrained mixers that shares the weights of `teacher`: no weight is copied.

        `teacher` itself stays what it is, with its softmax. But the weights are the same tensors: what trains or moves
        them here does so there.

        Args:
            teacher: a causal language model of a supported family.
            mixer: name of the inner mixer, one of `INNER_MIXERS`.
            options: its keyword arguments.
            keep_layers: layers that keep their softmax attention.
        """
        check_teacher(teacher)
        config = LinearizedConfig(
            teacher_config=teacher.config.to_dict(),
            mixer=mixer,
            mixer_options=options,
            keep_layers=keep_layers,
            dtype=teacher.dtype,
        )
        shared = _share(teacher)
        shared.set_attn_implementation(NAME)
        model = cls(config, shared)
        for attention in model.attention_layers:
            if attention.mixer is not None:
                weight = next(attention.parameters())
                attention.mixer.to(device=weight.device, dtype=weight.dtype)
        return model.train(teacher.training)

    @classmethod
    def from_pretrained(cls, folder, *args, output_loading_info: bool = False, **options):
        """As in transformers, but that a folder in which weights are missing is refused."""
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{folder} has no weight {missing[0]}{more}: it was not saved whole, or from another model")
        return (model, info) if output_loading_info else model

    def as_teacher(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """A transformers model of the same weights with softmax attention in all layers; no weight is copied.

        Both can be used side by side. Adapters that stand in this model by then are in it, too.
        """
        mixers = {id(attention.mixer): None for attention in self.attention_layers if attention.mixer is not None}
        teacher = _share(self.teacher, mixers)
        if rotary := getattr(teacher.base_model, "rotary_emb", None):
            release_rotary(rotary)
        teacher.set_attn_implementation(attn_implementation)
        return teacher

    @property
    def attention_layers(self) -> list[nn.Module]:
        """The attention modules, in the order of the layers; `.mixer` is the inner mixer of each, or `None`."""
        return self.family.attention_layers(self.teacher)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[nn.Module, Tensor, Tensor, Tensor, Context], Tensor]) -> Iterator[None]:
        """Calls of the model inside this context ask `observer` for the output of every attention, see `Context`.

        def teach(module, q, k, v, context):
            target = softmax(module, q, k, v, context)      # what the teacher's attention gives
            ...
            return target                                   # [B, T, H, D]: what the layer goes on with

        with student.observed(teach):
            student(input_ids)
        """
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    def init_cache(self, batch_size: int) -> ZooCache:
        """An empty cache for `batch_size` texts: a state per layer, and how many tokens each text has."""
        place = {"device": self.device, "dtype": self._cache_dtype}
        states = []
        for attention in self.attention_layers:
            if attention.mixer is not None:
                states.append(attention.mixer.init_state(batch_size, **place))
            else:
                sizes = geometry(attention)
                window = attention.softmax_window
                states.append(key_values(batch_size, sizes["num_kv_heads"], sizes["head_size"], window, **place))
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        return ZooCache([*states, LayerState({"position": position})], model=self)

    def hidden_states(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        inputs_embeds=None,
        past_key_values=None,
        cu_seqlens=None,
        prefix_length=None,
    ) -> Tensor:
        if prefix_length is not None:
            raise ValueError("prefix_length is not for linearized models, which imitate causal attention: leave it out")
        if self._observer is not None and past_key_values is not None:
            raise ValueError(
                "an observer stands in for attention without a state: leave out past_key_values and use_cache"
            )
        if active_group() is not None:
            raise ValueError("ranks cannot share the text of a linearized model: leave the sequence_parallel block")
        return read_tokens(
            self.get_input_embeddings(),
            self._run,
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            num_states=len(self.attention_layers) + 1,
            checkpointing=self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules()),
        )

    def _run(self, x: Tensor, cache: ZooCache | None, cu_seqlens: Tensor | None) -> Tensor:
        states = counter = None
        if cache is not None:
            *states, counter = cache.states
        start = None if counter is None else counter["position"]
        positions = token_positions(x.shape[1], start, cu_seqlens, device=x.device)
        self._check_positions(positions, cache)
        context = Context(states=states, cu_seqlens=cu_seqlens, observer=self._observer)
        output = self.teacher.base_model(
            inputs_embeds=x, position_ids=positions, use_cache=False, return_dict=True, lm_zoo=context
        )
        if counter is not None:
            advance(x, counter, cu_seqlens)
        return output.last_hidden_state

    def _check_positions(self, positions: Tensor, cache: ZooCache | None) -> None:
        """Whether a learned embedding has all of the positions; looks at them only where there may be too many."""
        count = self._option(self.family.positions)
        if count is None:
            return
        seen = positions.shape[1] + (0 if cache is None else cache.length)
        if seen > count and (longest := int(positions.max()) + 1) > count:
            raise ValueError(f"a text of {longest} tokens is too long: the teacher has learned {count} positions")

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(hidden)
        divisor, cap = self._option(self.family.logit_divisor), self._option(self.family.logit_cap)
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else cap * (logits / cap).tanh()

    def head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0) -> Tensor:
        head = self.get_output_embeddings()
        options = {"ignore_index": IGNORE, "reduction": reduction, "z_loss": z_loss}
        if type(head) is nn.Linear and head.bias is None and self._option(self.family.logit_cap) is None:
            divisor = self._option(self.family.logit_divisor)
            hidden = hidden if divisor is None else hidden / divisor
            return linear_cross_entropy(hidden, head.weight, targets, **options)
        return cross_entropy_in_chunks(self.head, self.config.vocab_size, hidden, targets, **options)

    def _option(self, name: str | None) -> float | None:
        """An option of the teacher that its family has or has not."""
        return None if name is None else getattr(self.teacher.config, name)

    def get_input_embeddings(self) -> nn.Module:
        return self.teacher.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.teacher.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.teacher.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.teacher.set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation, allow_all_kernels: bool = False) -> None:
        raise ValueError("the attention of a LinearizedForCausalLM is its own: see as_teacher(attn_implementation)")

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options) -> None:
        """As in transformers; a small file goes with it, for those who load with `trust_remote_code=True`."""
        if is_main_process:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{CODE_FILE}.py").write_text(CODE, encoding="utf-8")
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)


def _new_teacher(config: LinearizedConfig) -> PreTrainedModel:
    teacher_config = config.build_teacher_config()
    teacher_config._attn_implementation = NAME
    # Not by from_config, which would go by the dtype of the teacher's own checkpoint.
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(teacher_config)](teacher_config)


def _share(model: PreTrainedModel, instead: dict[int, None] | None = None) -> PreTrainedModel:
    """A copy of the modules with the very same parameters; `instead` says what else to take, by id.

    Buffers are copied: they are small, and transformers writes into some.
    """
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo | (instead or {}))
