"""A linearization that never has the model in memory: `linearize(..., mode="stream")`.

Measurements and the transfer take the text through one layer after the other, and its hidden states lie on the disk in
between. The recovery and the continuations of the prompt take one batch through all layers, whose weights are read anew
in every pass.
"""

from __future__ import annotations

import shutil
from typing import Any

from lm_zoo.linearized.interface import softmax
from lm_zoo.train.linearize import controls, transfer
from lm_zoo.train.linearize.data import PackedRows, TextOptions
from lm_zoo.train.linearize.recover import Recovery
from lm_zoo.train.linearize.run import Run
from lm_zoo.train.linearize.stream_hidden import HiddenRows, first_groups, groups_of
from lm_zoo.train.linearize.stream_plan import (
    CONTINUATION,
    check_disk,
    check_memory,
    check_streamable,
    disk_needed,
    folder_size,
)
from lm_zoo.train.linearize.stream_student import StreamedStudent, streamed_teacher
from lm_zoo.train.linearize.stream_transfer import (
    LayerLoop,
    Snapshots,
    advance,
    embed,
    joint_history,
    layer_errors,
    layer_loss,
    mean_loss,
    perplexity,
)
from lm_zoo.train.linearize.stream_weights import Checkpoint, return_freed_tensors
from lm_zoo.train.linearize.teacher import find_teacher
from lm_zoo.train.linearize.work import work_path
from lm_zoo.train.order import RowOrder


class StreamedRecovery(Recovery):
    """A `Recovery` whose adapters are not merged, but added to the weights whenever those are read."""

    def finish(self) -> None:
        for name, module in self.student.teacher.named_modules():
            if hasattr(module, "get_delta_weight"):
                self.student.adapters[f"{name}.weight"] = module
        self._adapters.unload()
        self._adapters = None
        super().finish()


class StreamRun(Run):
    """A `Run` in which one layer's weights are in memory at a time."""

    student_class = StreamedStudent
    recovery_class = StreamedRecovery
    continuation_tokens = CONTINUATION

    def __init__(self, *given, max_memory: int | None) -> None:
        spec = given[1]
        check_streamable(spec)
        return_freed_tensors()
        super().__init__(*given)
        check_memory(self.student, self.spec, max_memory)
        self.student.read_from(self.checkpoint)
        layers = list(range(len(self.student.attention_layers)))
        placeholders = self.teacher
        self.teacher = StreamedStudent.from_teacher(placeholders, self.spec.mixer, dict(self.spec.options), layers)
        self.teacher.eval().read_from(self.checkpoint)
        self.teacher.name_or_path = self.name

    def _load_teacher(self, teacher, tokenizer):
        folder, tokenizer = find_teacher(teacher, tokenizer)
        self.checkpoint = Checkpoint(folder)
        return streamed_teacher(folder), tokenizer

    def _load_data(self, options: TextOptions) -> None:
        super()._load_data(options)
        tokens = 0
        if self.spec.transfer is not None:
            rows, used = self._used_rows(number=0)
            lengths = rows.texts.lengths()
            tokens = sum(lengths[text] for row in used for text in rows.rows[row])
        needed = disk_needed(self.student, self.spec, self.dtype, tokens)
        check_disk(self.output, needed, taken=folder_size(work_path(self.output)))

    def _measure_start(self) -> None:
        super()._measure_start()
        self._save()

    # ---- the transfer, layer by layer ------------------------------------------------------------------------------

    def _transfer(self, number: int, state: dict[str, Any] | None) -> None:
        student = self.student
        state = state["loop"] if state is not None and state["stage"] == "transfer" else None
        student.requires_grad_(False)
        training, choosing = self._hidden_rows(number)
        snapshots = Snapshots(self.work.path / "layers")
        for rows in (training, choosing):
            embed(student, rows)
        replaced = [module.layer_idx for module in controls.replaced_layers(student)]
        for layer in range(replaced[-1] + 1):
            with student.holding(layer):
                if layer in replaced and snapshots.finished(layer) is None:
                    state_here = state if state is not None and state["layer"] == layer else None
                    self._train_layer(number, layer, training, choosing, snapshots, state_here)
                for rows in (training, choosing):
                    advance(student, layer, rows, softmax)
        self._take_best(replaced, snapshots)
        student.requires_grad_(True)
        self.measured["layer_error"]["after"] = self._layer_errors()
        self._measure("transfer")
        self.loop = None
        self._save()
        for rows in (training, choosing):
            shutil.rmtree(rows.folder)
        shutil.rmtree(snapshots.folder)

    def _hidden_rows(self, number: int) -> tuple[HiddenRows, HiddenRows]:
        """The rows that the stage learns from, and those that choose the best weights."""
        options = self.spec.transfer
        kind = {"width": self.student.config.hidden_size, "dtype": self.dtype}
        rows, used = self._used_rows(number)
        training = HiddenRows(self.work.path / "training", rows, groups_of(used, options.batch), **kind)
        rows = self.data.rows("choosing", options.length)
        groups = first_groups(rows, options.batch, self.spec.measure_tokens)
        return training, HiddenRows(self.work.path / "choosing", rows, groups, **kind)

    def _used_rows(self, number: int) -> tuple[PackedRows, set[int]]:
        """The rows of the text, and which of them the steps of the stage take."""
        options = self.spec.transfer
        rows = self.data.rows("training", options.length)
        order = RowOrder(len(rows), min(options.batch, len(rows)), seed=self.spec.seed + number)
        batches = options.steps(len(rows)) * options.accumulate
        return rows, {row for batch in range(batches) for row in order.batch(batch)}

    def _train_layer(self, number, layer, training, choosing, snapshots, state) -> None:
        options, student = self.spec.transfer, self.student
        mixer = student.attention_layers[layer].mixer
        parameters = dict(mixer.named_parameters())
        mixer.requires_grad_(True)
        self.loop = loop = LayerLoop(
            f"transfer, layer {layer}",
            options,
            training,
            parameters,
            layer=layer,
            keep=lambda step: snapshots.keep(layer, step, parameters),
            clip_groups=[list(parameters)],
            backward=lambda batch, factor: layer_loss(student, layer, batch, options, factor),
            validate=lambda: mean_loss(student, layer, choosing, options),
            device=self.device,
            seed=self.spec.seed + number,
            log=self.log,
        )
        if state is not None:
            loop.load_state_dict(state)
        loop.run(self._after_step)
        mixer.requires_grad_(False)
        mixer.zero_grad()  # or gradients of all layers would add up
        result = {name: getattr(loop, name) for name in ("history", "tokens", "seconds", "steps")}
        snapshots.finish(layer, result)

    def _take_best(self, replaced: list[int], snapshots: Snapshots) -> None:
        """The weights of the step whose loss was the lowest in the mean over the layers, as all of a run are chosen."""
        results = [snapshots.finished(layer) for layer in replaced]
        history = joint_history([result["history"] for result in results])
        best = min(history, key=lambda entry: entry["held_out"])["step"]
        for layer in replaced:
            snapshots.take(layer, best, dict(self.student.attention_layers[layer].mixer.named_parameters()))
        self.measured["stages"]["transfer"] = {
            "trained_parameters": sum(value.numel() for value in transfer.mixer_parameters(self.student).values()),
            "steps": results[0]["steps"],
            "tokens": results[0]["tokens"],
            "seconds": sum(result["seconds"] for result in results),
            "best_step": best,
            "history": history,
        }

    # ---- measurements ----------------------------------------------------------------------------------------------

    def _perplexity(self, observer: controls.Observer | None = None) -> float:
        folder = self.work.path / "measuring"
        return perplexity(self.student, self.measuring, self.spec.measure_tokens, folder, observer)

    def _mean_losses(self, options: transfer.Transfer) -> dict[int, float]:
        folder = self.work.path / "measuring"
        return layer_errors(self.student, self.measuring, self.spec.measure_tokens, folder, options)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"mode": "stream"}
