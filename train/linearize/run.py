"""A linearization from end to end: teacher, transfer, recovery, controls, folder."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lm_zoo.errors import UserError, one_line
from lm_zoo.files import whole_folder
from lm_zoo.kernels.checks import check_option
from lm_zoo.linearized import LinearizedForCausalLM
from lm_zoo.linearized.interface import softmax
from lm_zoo.train.checkpoints import Interrupted
from lm_zoo.train.linearize import controls, transfer
from lm_zoo.train.linearize.data import LinearizeData, TextOptions, check_tokenizer
from lm_zoo.train.linearize.loop import StageLoop
from lm_zoo.train.linearize.recover import Recovery
from lm_zoo.train.linearize.report import write_report
from lm_zoo.train.linearize.sampling import MOST_TOKENS, SELF, sample_texts
from lm_zoo.train.linearize.spec import LinearizeSpec
from lm_zoo.train.linearize.teacher import load_teacher, not_finite, positions
from lm_zoo.train.linearize.work import Signals, WorkFolder, check_output
from lm_zoo.train.memory import peak_memory
from lm_zoo.train.packing import Selection
from lm_zoo.train.quiet import quiet_libraries

MODES = ("memory", "stream")
MATCHED_ROWS = 4  # of text, to match the norms on
Data = str | Path | list | tuple | TextOptions


def linearize(
    teacher: str | Path | PreTrainedModel,
    spec: str | Path | LinearizeSpec = "lolcats",
    *,
    data: Data,
    output: str | Path,
    overrides: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | None = None,
    resume: bool = False,
    mode: str = "memory",
    max_memory: int | None = None,
    checkpoint_seconds: float | None = None,
    log: Callable[[str], None] | None = None,
) -> tuple[LinearizedForCausalLM, dict[str, Any]]:
    """Turns a transformer into a linear-attention model, saved in the folder `output`; returns it and the report.

        model, report = linearize("path/of/a/llama", "lolcats", data="my.txt", output="out")

    Args:
        teacher: a folder, a name on the Hugging Face hub, or the model itself, whose weights become the student's.
        spec: a preset, a YAML file, or a `LinearizeSpec`.
        data: text files, or `TextOptions` for all other sources; "self" samples the teacher.
        output: the folder to write, which must not exist.
        overrides: of the spec's values, by dotted names.
        tokenizer: the teacher's, where `teacher` is a model.
        prompt: for the report, to be continued by both; by default the beginning of a held-out text.
        resume: go on with the run for `output` that was interrupted, with the same result as if it had not been.
        mode: "memory", or "stream" for a teacher that does not fit in there, see `stream_run`: a folder or a name. The
            student that is returned streams its weights, too; load the folder where there is room for it.
        max_memory: bytes that a stream may take, of the process on a CPU, of the GPU's otherwise.
        checkpoint_seconds: time between checkpoints.
        log: gets a line now and then; by default they go to stderr.

    Raises:
        UserError: bad input, or a loss that is not finite. Nothing is written then.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint was saved.
    """
    spec = spec if isinstance(spec, LinearizeSpec) else LinearizeSpec.load(spec)
    spec = spec.override(overrides or {})
    output = Path(output)
    check_option("mode", mode, MODES)
    if max_memory is not None and mode == "memory":
        raise UserError("max_memory is a bound for mode stream; mode memory takes what it needs")
    check_output(output, resume)
    disable_progress_bar()  # of transformers: it would draw one for writing a single file
    with quiet_libraries():
        given = (teacher, spec, data, output, tokenizer, prompt, log or _to_stderr)
        if mode == "stream":
            from lm_zoo.train.linearize.stream_run import StreamRun  # it is a Run, too

            run = StreamRun(*given, max_memory=max_memory)
        else:
            run = Run(*given)
        return run.run(resume, checkpoint_seconds)


class Run:
    """The parts of a run, and how far it has come."""

    student_class = LinearizedForCausalLM
    recovery_class = Recovery
    continuation_tokens = controls.CONTINUATION_TOKENS

    def __init__(self, teacher, spec, data, output, tokenizer, prompt, log) -> None:
        self.output, self.log, self.prompt = output, log, prompt
        self.name = str(getattr(teacher, "name_or_path", teacher))
        self.teacher, self.tokenizer = self._load_teacher(teacher, tokenizer)
        check_tokenizer(self.tokenizer)
        self.spec = fitting(spec, self.teacher)
        with torch.random.fork_rng():
            torch.manual_seed(self.spec.seed)  # of the mixers' first weights
            self.student = self.student_class.from_teacher(
                self.teacher, self.spec.mixer, dict(self.spec.options), list(self.spec.keep_layers)
            ).eval()
        self.device, self.dtype = self.student.device, self.student.dtype
        self._cast_mixers(torch.promote_types(self.dtype, torch.float32))  # 16 bits are too coarse to train in
        transfer.check_mixers(self.student, self.spec)
        self.options = data if isinstance(data, TextOptions) else TextOptions(files=_as_files(data))
        self.data: LinearizeData | None = None
        self.measured: dict[str, Any] = {"stages": {}}  # what the report will say
        self.loop: StageLoop | None = None
        self.stage: str | None = None
        self.signals = Signals()

    def run(self, resume: bool, checkpoint_seconds: float | None) -> tuple[LinearizedForCausalLM, dict[str, Any]]:
        samples_itself = self.options.files == (SELF,)
        if not samples_itself:
            self._load_data(self.options)  # bad text is told before anything is written
        self.work = WorkFolder(self.output, self._identity(), resume=resume, every_seconds=checkpoint_seconds)
        state = self.work.load() if resume else None
        try:
            with self.signals.listening():
                if samples_itself:
                    tokens = min(
                        MOST_TOKENS, max((stage.tokens for stage in self.spec.stages.values()), default=MOST_TOKENS)
                    )
                    self._load_data(self._sampled(tokens))
                elif self.spec.self_tokens > 0:
                    options = self._sampled(self.spec.self_tokens)
                    sampled = Selection.all_of(options.corpus(options.source(), self.tokenizer))
                    self.data = dataclasses.replace(self.data, sampled=sampled)
                self._stages(state)
                report = self._finish()
        except Exception:
            if not (self.work.path / "checkpoint.pt").is_file() or self._has_diverged:
                self.work.remove()
            raise
        self.work.remove()
        return self.student, report

    def _load_teacher(self, teacher, tokenizer) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_teacher(teacher, tokenizer)

    def _load_data(self, options: TextOptions) -> None:
        self.data = LinearizeData.load(options, self.tokenizer, self.spec.val_fraction)
        self.measuring = self.data.rows("measuring", self.spec.length)

    def _sampled(self, tokens: int) -> TextOptions:
        """Where text that the teacher wrote itself lies."""
        texts = self.work.path / "self.jsonl"
        sample_texts(self.teacher, self.tokenizer, texts, tokens, self.spec, self.log)
        place = {"files": (str(texts),), "dataset": None, "text_column": "text", "cache_dir": self.work.path / "cache"}
        return dataclasses.replace(self.options, **place, streaming=False)

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _stages(self, state: dict[str, Any] | None) -> None:
        if state is None:
            if self.spec.match_norms:
                rows = self.data.rows("training", self.spec.length)
                transfer.match_norms(self.student, next(rows.batches(MATCHED_ROWS)).to(self.device))
            self._measure_start()
        else:
            self.measured = state["measured"]
            self._load_mixers(state["mixers"])
        for number, name in enumerate(self.spec.stages):
            if name in self.measured["stages"]:
                continue
            self.stage = name
            {"transfer": self._transfer, "recover": self._recover}[name](number, state)
            self.stage = self.loop = None
        self._measure_end()

    def _transfer(self, number: int, state: dict[str, Any] | None) -> None:
        options, student = self.spec.transfer, self.student
        parameters = transfer.mixer_parameters(student)
        choosing = self.data.rows("choosing", options.length)

        def backward(batch, factor):
            return _mean(transfer.layer_losses(student, batch, options, factor))

        def validate():
            return float(_mean(transfer.mean_losses(student, choosing, options, self.spec.measure_tokens)))

        student.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._train(number, options, parameters, transfer.by_layer(parameters), backward, validate, state)
        student.requires_grad_(True)
        self.measured["layer_error"]["after"] = self._layer_errors()
        self._measure("transfer")

    def _recover(self, number: int, state: dict[str, Any] | None) -> None:
        options = self.spec.recover
        choosing = self.data.rows("choosing", options.length)
        recovery = self.recovery_class(self.student, options, self.spec.seed)
        parameters = recovery.parameters

        def validate():
            return recovery.held_out_loss(choosing, self.spec.measure_tokens)

        for step in range(1, options.replacement_steps + 1):
            self.stage = "recover" if step == options.replacement_steps else f"replace_{step}"
            recovery.replace(step)
            if self.stage in self.measured["stages"]:
                continue
            order = number + step - 1
            self._train(order, options.part, parameters, [list(parameters)], recovery.backward, validate, state)
            if self.stage != "recover":
                self._measure(self.stage, recovery.observer)
        recovery.finish()
        self._measure("recover")

    def _train(self, number, options, parameters, clip_groups, backward, validate, state) -> None:
        self.loop = loop = StageLoop(
            self.stage,
            options,
            self.data.rows("training", options.length),
            parameters,
            clip_groups=clip_groups,
            backward=backward,
            validate=validate,
            device=self.device,
            seed=self.spec.seed + number,
            log=self.log,
        )
        if state is not None and state["stage"] == self.stage:
            loop.load_state_dict(state["loop"])
        loop.run(self._after_step)
        self.measured["stages"][self.stage] = {
            "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
            "steps": loop.steps,
            "tokens": loop.tokens,
            "seconds": loop.seconds,
            "best_step": loop.best_step,
            "history": loop.history,
        }

    def _after_step(self) -> None:
        if self.work.is_due or self.signals.came is not None:
            self._save()
        if self.signals.came is not None:
            raise Interrupted(self.signals.came, self.work.path / "checkpoint.pt")

    def _save(self) -> None:
        mixers = {name: value.detach() for name, value in transfer.mixer_parameters(self.student).items()}
        loop = None if self.loop is None else self.loop.state_dict()
        self.work.save({"measured": self.measured, "mixers": mixers, "stage": self.stage, "loop": loop})

    @torch.no_grad()
    def _load_mixers(self, saved: dict[str, torch.Tensor]) -> None:
        for name, parameter in transfer.mixer_parameters(self.student).items():
            parameter.copy_(saved[name])

    def _cast_mixers(self, dtype: torch.dtype) -> None:
        for attention in controls.replaced_layers(self.student):
            attention.mixer.to(dtype)

    @property
    def _has_diverged(self) -> bool:
        return self.loop is not None and self.loop.has_diverged

    # ---- measurements ----------------------------------------------------------------------------------------------

    def _measure_start(self) -> None:
        student = self.student
        prompt = self.prompt or controls.prompt_from(self.measuring, self.tokenizer)
        self.measured["continuation"] = {
            "prompt": prompt,
            "teacher": controls.continuation(self.teacher, self.tokenizer, prompt, self.continuation_tokens),
        }
        self.measured["perplexity"] = {}
        self._measure("teacher", softmax)
        if not math.isfinite(self.measured["perplexity"]["teacher"]):
            raise not_finite(self.name)
        self._measure("untrained")
        if controls.has_window(student):
            self._measure("window_only", controls.window_only)
        self.measured["layer_error"] = {"before": self._layer_errors(), "after": None}

    def _measure_end(self) -> None:
        self._cast_mixers(self.dtype)
        values = self.measured["perplexity"]
        final = self._perplexity()
        if controls.replaced_layers(self.student):
            self._measure("linear_part_ablated", controls.window_only)
        self.measured["perplexity"]["final"] = final
        self.measured["gap_closed"] = controls.gap_closed(values.get("window_only"), values["teacher"], final)
        self.measured["times_the_teachers"] = final / values["teacher"]
        prompt = self.measured["continuation"]["prompt"]
        self.measured["continuation"]["student"] = controls.continuation(
            self.student, self.tokenizer, prompt, self.continuation_tokens
        )
        self.measured["state"] = controls.state_size(self.student)
        self.measured["peak_memory_bytes"] = peak_memory(self.device)

    def _measure(self, name: str, observer: controls.Observer | None = None) -> None:
        value = self._perplexity(observer)
        self.measured["perplexity"][name] = value
        self.log(f"perplexity, {name.replace('_', ' ')}: {value:.4g}")

    def _perplexity(self, observer: controls.Observer | None = None) -> float:
        return controls.perplexity(self.student, self.measuring, self.spec.measure_tokens, observer)

    def _layer_errors(self) -> list[float | None]:
        """||y - y'||^2 / ||y||^2 of each layer; `None` where softmax is kept."""
        options = self.spec.transfer or transfer.Transfer(tokens=1, learning_rate=1.0, length=self.spec.length)
        options = dataclasses.replace(options, loss="normalized_mse", weights_cross_entropy=0.0)
        errors = self._mean_losses(options)
        return [errors.get(layer) for layer in range(len(self.student.attention_layers))]

    def _mean_losses(self, options: transfer.Transfer) -> dict[int, float]:
        return transfer.mean_losses(self.student, self.measuring, options, self.spec.measure_tokens)

    # ---- the result ------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        report = {
            "teacher": self.name,
            "family": self.student.teacher.config.model_type,
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
            "layers": len(self.student.attention_layers),
            "kept_layers": list(self.spec.keep_layers),
            "held_out_tokens": sum(self.measuring.texts.lengths()),
            **self.measured,
            "spec": self.spec.as_dict(),
        }
        try:
            with whole_folder(self.output) as unfinished:
                self.student.save_pretrained(unfinished)
                self.tokenizer.save_pretrained(unfinished)
                write_report(report, unfinished)
        except Exception as error:
            if "os error" not in str(error):  # what safetensors and tokenizers call a full disk
                raise
            raise UserError(f"cannot save {self.output}: {one_line(error)}; free some space") from error
        return report

    def _identity(self) -> dict[str, Any]:
        """What the result depends on."""
        text = {"text": list(self.options.files), "dataset": self.options.dataset}
        if self.data is not None:
            text["tokens of text"] = self.data.training.num_tokens
        return {"teacher": self.name, **text, "spec": self.spec.as_dict()}


def fitting(spec: LinearizeSpec, teacher: PreTrainedModel) -> LinearizeSpec:
    """The spec for this teacher: its layers counted from the first, no text longer than its positions, its rates."""
    layers, limit = teacher.config.num_hidden_layers, positions(teacher.config)
    values: dict[str, Any] = {}
    for layer in spec.keep_layers:
        if not -layers <= layer < layers:
            raise UserError(f"keep_layers: the teacher has layers 0 to {layers - 1}, and no layer {layer}")
    kept = range(layers)[spec.keep_every - 1 :: spec.keep_every] if spec.keep_every else spec.keep_layers
    values["keep_layers"] = sorted({layer % layers for layer in kept})
    if len(values["keep_layers"]) == layers:  # nothing is replaced, so there is nothing to learn
        spec = dataclasses.replace(spec, transfer=None, recover=None)
    elif spec.recover is not None:
        replaced = layers - len(values["keep_layers"])
        values["recover.replacement_steps"] = min(spec.recover.replacement_steps, replaced)
    for name, stage in spec.stages.items():
        if limit is not None and stage.length > limit:
            values[f"{name}.length"] = limit
        if stage.rate_width is not None:
            ratio = stage.rate_width / teacher.config.hidden_size
            values[f"{name}.learning_rate"] = stage.learning_rate * ratio**0.5
    return spec.override(values)


def _mean(losses: dict[int, Any]) -> Any:
    return sum(losses.values()) / len(losses)


def _as_files(data: str | Path | list | tuple) -> tuple[str, ...]:
    return tuple(map(str, data)) if isinstance(data, list | tuple) else (str(data),)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
