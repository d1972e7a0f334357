"""A student whose weights stay on the disk: a layer's are in memory while the layer is at work, and only then.

Every weight of the blocks, of the embedding and of the head is a single NaN, seen in the weight's shape. Before a block
runs its weights are read, afterwards they are let go of. In a backward pass a block is run again, so that what stays
alive of a forward pass is one hidden state per layer. Norms and learned positions outside of the blocks are in memory,
and so are the mixers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lm_zoo.errors import UserError
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.train.linearize.stream_save import Source, save_shards, save_without_weights
from lm_zoo.train.linearize.stream_weights import Checkpoint
from lm_zoo.train.linearize.teacher import load_config

HEAD = "head"  # beside the numbers of the layers, the name of a part
Place = tuple[nn.Module, str, str]  # module, its parameter, the parameter's full name in the teacher


class StreamedStudent(LinearizedForCausalLM):
    """`StreamedStudent.from_teacher(streamed_teacher(folder, ...), ...)`, then `read_from(Checkpoint(folder))`."""

    def read_from(self, weights: Checkpoint) -> None:
        """Checks that all weights are there, in shape, and reads those that are not streamed."""
        self.weights = weights
        self.adapters: dict[str, nn.Module] = {}  # what is added to a weight as it is read, by the weight's name
        self._keys, self._held, self._only = {}, set(), None
        self._blocks = blocks = [_block_of(self.teacher, attention) for attention in self.attention_layers]
        inside = {id(module): layer for layer, block in enumerate(blocks) for module in block.modules()}
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        inside[id(head)] = HEAD
        stored = _by_present_names(self.teacher, weights)
        self.places: dict[int | str, list[Place]] = {part: [] for part in (*range(len(blocks)), HEAD)}
        for place in _places(self.teacher):
            module, attribute, name = place
            is_tied = module is head and head.weight is embedding.weight
            self._keys[name] = self._keys[self._embedding] if is_tied else self._key(name, stored)
            self._check_shape(name, getattr(module, attribute).shape)
            if (part := inside.get(id(module))) is not None:
                self.places[part].append(place)
            elif module is embedding:
                self._embedding = name
            else:
                module._parameters[attribute] = nn.Parameter(self.read(name))
        embedding.padding_idx = None  # of gradients alone, and it may be no row of those that are read
        embedding.forward = functools.partial(self._embed, embedding, embedding.forward)
        for layer, block in enumerate(blocks):
            block.forward = functools.partial(self._block, layer, block.forward)

    def read(self, name: str) -> Tensor:
        """A weight, with its adapter's part."""
        weight = self.weights.read(self._keys[name], self.dtype, self.device)
        if name in self.adapters:
            weight += self.adapters[name].get_delta_weight("default").to(weight.device)
        return weight

    @contextlib.contextmanager
    def holding(self, part: int | str) -> Iterator[None]:
        """The weights of a layer, or of the head, are in memory."""
        if part in self._held:
            yield
            return
        places = self.places[part]
        before = [module._parameters[attribute] for module, attribute, _ in places]
        for module, attribute, name in places:
            module._parameters[attribute] = nn.Parameter(self.read(name), requires_grad=False)
        self._held.add(part)
        try:
            yield
        finally:
            self._held.remove(part)
            for (module, attribute, _), placeholder in zip(places, before, strict=True):
                module._parameters[attribute] = placeholder

    # ---- one layer at a time ---------------------------------------------------------------------------------------

    def embedded(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the first block takes."""
        taken = []

        def take(block: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            taken.append(hidden)
            return hidden

        self._run_only(0, take, self.get_input_embeddings()(input_ids), cu_seqlens)
        return taken[0]

    def passed(self, layer: int, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the block makes of `hidden`, as it comes from the block before."""
        made = []

        def run(block: Callable[[Tensor], Tensor], _: Tensor) -> Tensor:
            made.append(block(hidden))
            return made[0]

        self._run_only(layer, run, hidden, cu_seqlens)
        return made[0]

    def finished(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the head takes, of what the last block made."""
        last = len(self.attention_layers) - 1
        return self._run_only(last, lambda block, _: hidden, hidden, cu_seqlens)

    def _run_only(self, layer: int, run: Callable, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The base model prepares positions and all else; `run(block, hidden)` takes the layer's place, the others
        hand on what they get."""
        self._only = (layer, run)
        try:
            return self._run(x, None, cu_seqlens)
        finally:
            self._only = None

    def _block(self, layer: int, forward: Callable, hidden: Tensor, *args, **kwargs) -> Tensor:
        def block(hidden: Tensor) -> Tensor:
            with self.holding(layer):
                return forward(hidden, *args, **kwargs)

        if self._only is not None:
            only, run = self._only
            return run(block, hidden) if layer == only else hidden
        if torch.is_grad_enabled():
            return checkpoint(block, hidden, use_reentrant=False)
        return block(hidden)

    # ---- embedding and head ----------------------------------------------------------------------------------------

    def head(self, hidden: Tensor) -> Tensor:
        with self.holding(HEAD):
            return super().head(hidden)

    def head_loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        with self.holding(HEAD):
            return super().head_loss(hidden, targets, reduction)

    def _embed(self, embedding: nn.Embedding, forward: Callable, input_ids: Tensor) -> Tensor:
        tokens, index = input_ids.unique(return_inverse=True)
        count = embedding.num_embeddings
        if (highest := int(tokens[-1])) >= count:
            raise IndexError(f"token {highest} is not in the vocabulary of {count}")
        rows = self.weights.read_rows(self._keys[self._embedding], tokens.tolist(), self.dtype, self.device)
        placeholder = embedding._parameters["weight"]
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            return forward(index)
        finally:
            embedding._parameters["weight"] = placeholder

    # ---- the folder ------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """As `LinearizedForCausalLM` does it, in one file per layer; takes no options."""
        if options:
            raise TypeError(f"a streamed student is saved in one way, without {', '.join(options)}")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        blocks = {id(m): layer for layer, block in enumerate(self._blocks) for m in block.modules()}
        shards: dict[int | str, dict[str, Source]] = {}
        seen = set()  # a tied weight is saved under its first name
        for name, value in self.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                key = name.removeprefix("teacher.")
                read = functools.partial(self.read, key) if key in self._keys else value.detach
                shard = blocks.get(id(self.get_submodule(name.rpartition(".")[0])), HEAD)
                shards.setdefault(shard, {})[name] = (tuple(value.shape), value.dtype, read)
        save_shards(list(shards.values()), folder)
        save_without_weights(self, folder)

    # ---- what the checkpoint has -----------------------------------------------------------------------------------

    def _key(self, name: str, stored: dict[str, str]) -> str:
        """The weight's name in the checkpoint: some were saved without the base model's prefix."""
        prefix = self.teacher.base_model_prefix + "."
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in stored:
                return stored[key]
        raise UserError(
            f"the checkpoint in {self.weights.folder} lacks the weight {name} that its config.json asks for; "
            "save the model again"
        )

    def _check_shape(self, name: str, expected: torch.Size) -> None:
        shape = self.weights.entries[self._keys[name]].shape
        if shape != tuple(expected):
            raise UserError(
                f"the weight {name} in {self.weights.folder} has the shape {list(shape)}, and config.json asks for "
                f"{list(expected)}; save the model again"
            )


def streamed_teacher(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a folder with placeholders for weights: NaN, which spoils every result that it gets into.

    On the GPU if there is one, by default in the dtype of its configuration; on a CPU in float32.
    """
    config = load_config(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (device.type == "cuda" and config.dtype) or torch.float32
    with _parameters_on_meta():
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
    placeholders = {}
    for module in teacher.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in placeholders:
                    nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
                    placeholders[id(parameter)] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = placeholders[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    if (folder / "generation_config.json").is_file():
        teacher.generation_config = GenerationConfig.from_pretrained(folder)
    return teacher.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Models built in here have buffers, which no file has, but no storage for parameters."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _places(teacher: PreTrainedModel) -> list[Place]:
    """All parameters but those of the mixers; a tied one at each of its places."""
    mixers = [module.mixer for module in teacher.modules() if getattr(module, "mixer", None) is not None]
    inside = {id(module) for mixer in mixers for module in mixer.modules()}
    return [
        (module, attribute, f"{prefix}.{attribute}" if prefix else attribute)
        for prefix, module in teacher.named_modules()
        if id(module) not in inside
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    ]


def _block_of(teacher: PreTrainedModel, attention: nn.Module) -> nn.Module:
    """The block that an attention module is in."""
    name = next(name for name, module in teacher.named_modules() if module is attention)
    return teacher.get_submodule(name.rpartition(".")[0])


def _by_present_names(teacher: PreTrainedModel, weights: Checkpoint) -> dict[str, str]:
    """The names in the checkpoint, by what transformers calls the weights today."""
    renamings = [change for change in get_model_conversion_mapping(teacher) if isinstance(change, WeightRenaming)]

    def renamed(name: str) -> str:
        for change in renamings:
            name, _ = change.rename_source_key(name)
        return name

    return {renamed(name): name for name in weights.entries}
