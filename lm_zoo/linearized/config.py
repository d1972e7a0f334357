"""The configuration of a linearized transformer: its teacher's, and what stands in which layers' attention."""

import copy
import inspect

import torch
from transformers import AutoConfig, PreTrainedConfig

from lm_zoo.config import HUGGING_FACE_KEYS, suggest
from lm_zoo.linearized.families import family_of, geometry
from lm_zoo.linearized.inner import InnerMixer, check_options, mixer_class

CODE_FILE = "modeling_lm_zoo"  # written into each saved folder, for trust_remote_code=True
# What a teacher's configuration says of its checkpoint, or of other heads than ours.
LEFT_OUT = {
    *("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"),
    *("id2label", "label2id", "problem_type"),
}


def _of_the_teacher(name: str) -> property:
    def write(config, value):
        config.teacher_config[name] = value

    return property(lambda config: getattr(config.build_teacher_config(), name, None), write)


class LinearizedConfig(PreTrainedConfig):
    """Configuration of a `LinearizedForCausalLM`.

    Attributes:
        teacher_config: the teacher's configuration as a dictionary, with its `model_type`.
        mixer: name of what stands in the place of softmax attention, one of `INNER_MIXERS`.
        mixer_options: its keyword arguments.
        keep_layers: layers that keep their softmax attention, from 0.

    All is checked here but the values of `mixer_options`, which the mixer checks when it is built: ValueError or
    TypeError names what is wrong. `vocab_size` and other common sizes are read from `teacher_config`.
    """

    model_type = "lm_zoo_linearized"
    keys_to_ignore_at_inference = ("past_key_values",)

    teacher_config: dict | None = None
    mixer: str | None = None
    mixer_options: dict | None = None
    keep_layers: list[int] | None = None

    vocab_size = _of_the_teacher("vocab_size")
    hidden_size = _of_the_teacher("hidden_size")
    num_hidden_layers = _of_the_teacher("num_hidden_layers")
    num_attention_heads = _of_the_teacher("num_attention_heads")
    max_position_embeddings = _of_the_teacher("max_position_embeddings")
    tie_word_embeddings = _of_the_teacher("tie_word_embeddings")

    def __post_init__(self, **kwargs):
        known = set(inspect.get_annotations(type(self))) | HUGGING_FACE_KEYS
        for name in kwargs:
            if name not in known and not name.startswith("_"):
                raise ValueError(
                    f"unknown option {name!r} for LinearizedConfig{suggest(name, known - HUGGING_FACE_KEYS)}"
                )
        if not isinstance(self.teacher_config, dict) or not isinstance(self.teacher_config.get("model_type"), str):
            raise TypeError(
                f"teacher_config must be a teacher's config.to_dict() with its model_type, got {self.teacher_config!r}"
            )
        self.teacher_config = {k: v for k, v in self.teacher_config.items() if k not in LEFT_OUT}
        self.mixer_options = {} if self.mixer_options is None else self.mixer_options
        check_options(self.mixer, self.mixer_options)
        self.mixer_options = copy.deepcopy(self.mixer_options)
        teacher_config = self.build_teacher_config()
        family_of(teacher_config)
        self.keep_layers = _check_layers(self.keep_layers or [], teacher_config.num_hidden_layers)
        super().__post_init__(**kwargs)
        classes = {"AutoConfig": "LinearizedConfig", "AutoModelForCausalLM": "LinearizedForCausalLM"}
        self.auto_map = {auto: f"{CODE_FILE}.{name}" for auto, name in classes.items()}

    def build_teacher_config(self) -> PreTrainedConfig:
        """The teacher's configuration as transformers knows it."""
        try:
            return AutoConfig.for_model(**copy.deepcopy(self.teacher_config))
        except ValueError as error:
            raise ValueError(f"teacher_config: {error}") from error

    def build_mixer(self, attention: torch.nn.Module) -> InnerMixer:
        """A new inner mixer for an attention module of the teacher."""
        try:
            return mixer_class(self.mixer)(**geometry(attention), **self.mixer_options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"mixer {self.mixer!r}: {error}") from error

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a saved folder has a file of its own for `trust_remote_code`, and needs no copy of ours."""


def _check_layers(layers, count: int) -> list[int]:
    if not isinstance(layers, list | tuple | set | range):
        raise TypeError(f"keep_layers must be a list of layers, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"keep_layers must hold integers, got {layer!r}")
        if not 0 <= layer < count:
            raise ValueError(f"keep_layers must be in [0, {count}), the teacher's layers, got {layer}")
    return sorted(set(layers))
