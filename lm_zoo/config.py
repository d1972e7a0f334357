"""The one configuration of all models: sizes, and which mixers alternate over the depth."""

import difflib
import importlib.resources
import inspect

import torch
from transformers import PreTrainedConfig

from lm_zoo.layers import MIXERS, Mixer

# Keys that transformers itself writes into or reads from a configuration.
HUGGING_FACE_KEYS = {
    *("model_type", "name_or_path", "torch_dtype", "auto_map", "quantization_config", "task_specific_params"),
    *("attn_implementation", "experts_implementation", "output_attentions", "use_cache", "num_labels"),
    "per_layer_config",
}


class ZooConfig(PreTrainedConfig):
    """Configuration of a `ZooForCausalLM`.

        ZooConfig(hidden_size=512, num_hidden_layers=8, mixers={"gla": {"num_heads": 4}}, pattern=["gla"])
        ZooConfig.preset("hybrid-tiny", vocab_size=4096)

    Attributes:
        vocab_size: V, tokens of the vocabulary.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks, each a mixer and an MLP.
        intermediate_size: width of the MLP; `None` is 8/3 D rounded up to a multiple of 64, 0 is no MLP (as in Mamba).
        mixers: name -> keyword arguments of the layer. The name is one of `MIXERS`, or free with the key `type` naming
            one: `{"local": {"type": "attention", "window": 64}, "global": {"type": "attention"}}`.
        pattern: names of mixers, repeated over the depth: block i has `pattern[i % len(pattern)]`.
        norm_eps: epsilon of all norms.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether input and output embeddings are one matrix.
        bos_token_id, eos_token_id, pad_token_id: special tokens, where there are any.

    Everything is checked here, also whether each mixer can be built: ValueError or TypeError names what is wrong.
    """

    model_type = "lm_zoo"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    intermediate_size: int | None = None
    mixers: dict[str, dict] | None = None
    pattern: list[str] | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        known = set(inspect.get_annotations(type(self))) | HUGGING_FACE_KEYS
        for name in kwargs:
            if name not in known and not name.startswith("_"):
                raise ValueError(f"unknown option {name!r} for ZooConfig{suggest(name, known - HUGGING_FACE_KEYS)}")
        if self.mixers is None:
            self.mixers = {"gla": {}}
        if self.pattern is None:
            self.pattern = list(self.mixers)
        self._check_sizes()
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // (3 * 64)) * 64
        self._check_mixers()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            value = getattr(self, name)
            if name == "intermediate_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            least = 0 if name == "intermediate_size" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise TypeError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                    raise TypeError(f"{name} must be an integer or null, got {value!r}")
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be in [0, vocab_size = {self.vocab_size}), got {token}")

    def _check_mixers(self) -> None:
        if not isinstance(self.mixers, dict) or not self.mixers:
            raise TypeError(f"mixers must map names to keyword arguments, got {self.mixers!r}")
        if not isinstance(self.pattern, list) or not self.pattern:
            raise TypeError(f"pattern must be a list of names from mixers, got {self.pattern!r}")
        for name in self.pattern:
            if not isinstance(name, str):
                raise TypeError(f"pattern must be a list of names from mixers, got {self.pattern!r}")
            if name not in self.mixers:
                raise ValueError(f"pattern has {name!r}, which is not in mixers{suggest(name, self.mixers)}")
        for name in self.mixers:
            with torch.device("meta"):  # a trial without memory: each layer knows best what it cannot be
                self.build_mixer(name)

    def build_mixer(self, name: str, layer_index: int = 0) -> Mixer:
        """A new layer, as `mixers[name]` says, for block `layer_index` where its place in the depth matters."""
        options = self.mixers[name]
        if not isinstance(options, dict):
            raise TypeError(f"mixers[{name!r}] must hold keyword arguments, {{}} if there are none, got {options!r}")
        options = dict(options)
        kind = options.pop("type", name)
        if kind not in MIXERS:
            raise ValueError(f"mixers has {kind!r}, which is no mixer of lm_zoo{suggest(str(kind), MIXERS)}")
        known = [option for option in inspect.signature(MIXERS[kind]).parameters if option != "hidden_size"]
        for option in options:
            if option not in known:
                raise ValueError(f"unknown option {option!r} for the mixer {kind!r}{suggest(option, known)}")
        place = {"layer_index": layer_index, "num_layers": self.num_hidden_layers}
        for option, value in ({"norm_eps": self.norm_eps} | place).items():
            if option in known:
                options.setdefault(option, value)
        try:
            return MIXERS[kind](self.hidden_size, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"mixers[{name!r}]: {error}") from error

    @classmethod
    def preset(cls, name: str, **overrides) -> "ZooConfig":
        """The configuration of a published or a tiny architecture by name, with some options changed."""
        import yaml

        if name not in cls.presets():
            raise ValueError(f"no preset {name!r}{suggest(name, cls.presets())}")
        text = (_preset_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        return cls(**{**yaml.safe_load(text), **overrides})

    @classmethod
    def presets(cls) -> list[str]:
        """Names that `preset` takes."""
        return sorted(file.name.removesuffix(".yaml") for file in _preset_folder().iterdir())


def _preset_folder():
    return importlib.resources.files("lm_zoo.configs") / "models"


def suggest(name: str, known) -> str:
    """The end of an error message about an unknown name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return (f" (did you mean {near[0]!r}?)" if near else "") + f"; known: {', '.join(sorted(known))}"
