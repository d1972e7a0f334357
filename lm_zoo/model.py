"""The one model of the zoo: embeddings, blocks of a mixer and an MLP, a final norm, and the output embeddings."""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_zoo.cache import ZooCache
from lm_zoo.causal_lm import IGNORE, CausalLM, read_tokens
from lm_zoo.config import ZooConfig
from lm_zoo.layers import MIXERS, LayerState, PrefixMixer
from lm_zoo.layers.kv_state import GrowingKeyValues
from lm_zoo.modules.loss import linear_cross_entropy
from lm_zoo.modules.mlp import SwiGLU
from lm_zoo.modules.norm import RMSNorm


class Block(GradientCheckpointingLayer):
    """x <- x + mixer(norm(x)),  x <- x + mlp(norm(x)); the second only where there is an MLP"""

    def __init__(self, config: ZooConfig, index: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer_name = config.pattern[index % len(config.pattern)]
        self.mixer = config.build_mixer(self.mixer_name, index)
        self.mlp = None
        if config.intermediate_size > 0:
            self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
    ) -> Tensor:
        prefix = {"prefix_length": prefix_length} if isinstance(self.mixer, PrefixMixer) else {}
        x = x + self.mixer(self.mixer_norm(x), state=state, cu_seqlens=cu_seqlens, **prefix)
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class ZooModel(nn.Module):
    """Everything but the output embeddings: tokens in, hidden states `[B, T, D]` after the final norm out."""

    def __init__(self, config: ZooConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.shared = nn.ModuleList()  # what layers of one kind have in common over the depth
        for name in dict.fromkeys(config.pattern[: len(self.layers)]):
            mixers = [layer.mixer for layer in self.layers if layer.mixer_name == name]
            module = mixers[0].shared_over_depth(len(self.layers))
            if module is not None:
                self.shared.append(module)
                for mixer in mixers:
                    mixer.share(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
    ) -> Tensor:
        """Arguments as in `CausalLM.forward`; the cache, where one is given, takes in the tokens."""
        if prefix_length is not None:
            self._check_prefix()
        return read_tokens(
            self.embed_tokens,
            partial(self._run, prefix_length=prefix_length),
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            num_states=len(self.layers),
            checkpointing=self.training and self.layers[0].gradient_checkpointing,
        )

    def _run(self, x, cache: ZooCache | None, cu_seqlens: Tensor | None, prefix_length: int | Tensor | None) -> Tensor:
        states = [None] * len(self.layers) if cache is None else cache.states
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state, cu_seqlens, prefix_length)
        return self.norm(x)

    def _check_prefix(self) -> None:
        if not any(isinstance(layer.mixer, PrefixMixer) for layer in self.layers):
            able = ", ".join(name for name, mixer in MIXERS.items() if issubclass(mixer, PrefixMixer))
            mixers = ", ".join(dict.fromkeys(layer.mixer_name for layer in self.layers))
            raise ValueError(
                f"prefix_length needs a layer whose state has no order ({able}), this model has {mixers}: leave it out"
            )


class ZooForCausalLM(CausalLM):
    """A causal language model with any pattern of mixers.

        model = ZooForCausalLM(ZooConfig.preset("gla-tiny"))
        loss = model(input_ids, labels=input_ids).loss
        model.generate(input_ids, max_new_tokens=20)
        model.save_pretrained(folder); AutoModelForCausalLM.from_pretrained(folder)     # after `import lm_zoo`

    The arguments of a call are those of `CausalLM.forward`.
    """

    config_class = ZooConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = ZooModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def init_cache(self, batch_size: int) -> ZooCache:
        place = {"device": self.device, "dtype": self._cache_dtype}
        return ZooCache([layer.mixer.init_state(batch_size, **place) for layer in self.model.layers], model=self)

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
        return self.model(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            prefix_length=prefix_length,
        )

    def decode_parts(self, cache):
        layers = zip(self.model.layers, cache.states, strict=True)
        return [
            (True, self.model.embed_tokens),
            *((not isinstance(state, GrowingKeyValues), partial(layer, state=state)) for layer, state in layers),
            (True, lambda x: self.head(self.model.norm(x))),
        ]

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0) -> Tensor:
        options = {"ignore_index": IGNORE, "reduction": reduction, "z_loss": z_loss}
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, **options)
