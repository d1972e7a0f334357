"""What ranks that share sequences check against one process, run in every one of them by `test_sequence_parallel.py`.

    python sequence_cases.py FOLDER WORLD_SIZE quick|all

writes `FOLDER/RANK.json` for each rank: for every case the relative errors, or what was raised. Every rank computes
both sides, from the same seeds; its own part of the outputs is compared, and the sum over the ranks of each gradient.
"""

import datetime
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sequence_checks import BATCH, T, order, refusals, small_models, two_dimensions, volumes
from torch import Tensor

from lm_zoo.kernels import causal_conv1d, linear_attention, linear_scan, selective_scan
from lm_zoo.kernels.sequence_parallel import SequenceGroup, alone, sequence_parallel

from compare import relative_error  # isort: skip - by the path that sequence_checks adds
from forked_ranks import on_ranks  # isort: skip

BOUNDS = [0, 0, 3, 3, 17, 17, 19, 24, 24]  # empty ones, one that crosses 3 segments of 6, borders at 6 and 12 within
ALIGNED = [0, 6, 12, 18, 24]  # every document starts where a segment of two or of four ranks does, or in its middle
FORMS = ("all_gather", "ring")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


Case = Callable[[SequenceGroup], dict[str, float]]


def error(actual: Tensor, expected: Tensor) -> float:
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    return relative_error(actual, expected) if torch.isfinite(actual).all() else float("inf")


def gradient_errors(group: SequenceGroup, names, found, expected) -> dict[str, float]:
    return {f"d{n}": error(group.sum(a.resolve_conj()), b) for n, a, b in zip(names, found, expected, strict=True)}


def weigh(like: Tensor, seed: int) -> Tensor:
    """The weights of a loss that tells all elements apart."""
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def join(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def real_sum(x: Tensor) -> Tensor:
    return x.sum().real if x.is_complex() else x.sum()


# ---- ops ----------------------------------------------------------------------------------------------------------


def compare_op(op, inputs: dict[str, Tensor | None], options: dict, state_name: str) -> Case:
    """`inputs` with T in their second place are along time; `options[state_name]` is the initial state."""

    def call(group: SequenceGroup | None):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
        arguments = {name: leaves.get(name) for name in inputs}
        if group is not None:
            along_time = {name for name, x in leaves.items() if x.dim() >= 3 and x.shape[1] == T}
            arguments |= {name: group.segment(leaves[name]) for name in along_time}
        given = dict(options)
        if given.get(state_name) is not None:
            leaves[state_name] = given[state_name].clone().requires_grad_()
            given[state_name] = leaves[state_name].clone()
        found = op(**arguments, **given)
        y, final = found if isinstance(found, tuple) else (found, given[state_name])
        return y, final, leaves

    def case(group: SequenceGroup) -> dict[str, float]:
        def gradients(found, group):
            y, final, leaves = found
            weights = weigh(expected[0], 1)
            loss = real_sum(y * (weights if group is None else group.segment(weights)))
            if final is not None:  # which is the same on all ranks
                loss = loss + real_sum(final * weigh(final, 2)) / (1 if group is None else group.size)
            return torch.autograd.grad(loss, list(leaves.values()))

        with alone():
            expected = call(None)
            dexpected = gradients(expected, None)
        actual = call(group)
        errors = {"y": error(actual[0], group.segment(expected[0]))}
        if actual[1] is not None:
            errors["final"] = error(actual[1], expected[1])
        return errors | gradient_errors(group, actual[2], gradients(actual, group), dexpected)

    return case


def op_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    generator = torch.Generator().manual_seed(0)
    complex_dtype = torch.promote_types(dtype, torch.complex64)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=dtype, generator=generator)

    heads, value_heads, K, V = 2, 4, 6, 5
    for bounds, with_state in ((None, False), (None, True), (BOUNDS, False), (BOUNDS, True), (ALIGNED, True)):
        layout = ("dense" if bounds is None else "packed" if bounds is BOUNDS else "aligned") + "-state" * with_state
        batch, cu_seqlens = (BATCH, None) if bounds is None else (1, torch.tensor(bounds))
        rows = batch if bounds is None else len(bounds) - 1
        common = {"cu_seqlens": cu_seqlens, "output_final_state": with_state}

        def states(*shape: int, dtype: torch.dtype = dtype, rows=rows, with_state=with_state) -> dict:
            return {"initial_state": randn(rows, *shape, dtype=dtype) if with_state else None}

        decays = {
            "none": None,
            "constant": -rand(value_heads),
            "scalar": -rand(batch, T, value_heads),
            "channel": -4 * rand(batch, T, value_heads, K),
            "reset": (-rand(batch, T, value_heads, K)).index_fill(1, torch.tensor([7]), -torch.inf),
        }
        for decay, log_decay in decays.items():
            for delta in (False, True):
                inputs = {"q": randn(batch, T, heads, K), "k": F.normalize(randn(batch, T, heads, K), dim=-1)}
                inputs |= {"v": randn(batch, T, value_heads, V), "log_decay": log_decay}
                inputs["beta"] = 2 * rand(batch, T, value_heads) if delta else None
                options = common | states(value_heads, K, V)
                name = f"linear_attention/{decay}-{'delta' if delta else 'additive'}-{layout}"
                yield name, compare_op(linear_attention, inputs, options, "initial_state")
        for kind, scan_dtype in (("real", dtype), ("complex", complex_dtype)):
            x, decay = randn(batch, T, 10, dtype=scan_dtype), randn(batch, T, 10).tanh().to(scan_dtype)
            if kind == "complex":
                decay = torch.polar(decay.real.abs(), randn(batch, T, 10))
            decay[:, 15] = 0
            options = common | states(10, dtype=scan_dtype)
            yield (
                f"linear_scan/{kind}-{layout}",
                compare_op(linear_scan, {"x": x, "decay": decay}, options, "initial_state"),
            )
        inputs = {"x": randn(batch, T, 7), "dt": rand(batch, T, 7), "A": -rand(7, 3), "B": randn(batch, T, 3)}
        inputs |= {"C": randn(batch, T, 3), "D": randn(7), "z": randn(batch, T, 7)}
        options = common | states(7, 3)
        yield f"selective_scan/{layout}", compare_op(selective_scan, inputs, options, "initial_state")
        for width in (1, 4, 9):  # 9 reaches over two segments of 6
            inputs = {"x": randn(batch, T, 7), "weight": randn(7, width), "bias": randn(7)}
            options = {"activation": "silu", "cu_seqlens": cu_seqlens}
            options["state"] = randn(rows, 7, width - 1) if with_state else None
            yield f"causal_conv1d/{width}-{layout}", compare_op(causal_conv1d, inputs, options, "state")


# ---- layers -------------------------------------------------------------------------------------------------------


def compare_layer(name: str, dtype: torch.dtype, bounds: list[int] | None, with_state: bool) -> Case:
    """Outputs, gradients of the input and of all parameters, and the state, which goes on from an earlier text."""

    def case(group: SequenceGroup) -> dict[str, float]:
        models = small_models()
        layer = models.make_layer(name, dtype)
        generator = torch.Generator().manual_seed(3)
        batch, rows = (BATCH, BATCH) if bounds is None else (1, len(bounds) - 1)
        x = torch.randn(batch, T, models.HIDDEN, dtype=dtype, generator=generator)
        earlier = torch.randn(rows, 5, models.HIDDEN, dtype=dtype, generator=generator)
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}

        def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
            state = None
            if with_state:
                state = layer.init_state(rows)
                with alone(), torch.no_grad():
                    layer(earlier, state=state)
            y = layer(x, state=state, cu_seqlens=cu_seqlens)
            return y, [] if state is None else list(state.tensors.values())

        weights = weigh(x, 4)
        with alone():
            expected, expected_state = run(x)
            dexpected = torch.autograd.grad((expected * weights).sum(), list(leaves.values()), allow_unused=True)
        actual, state = run(group.segment(x))
        found = torch.autograd.grad((actual * group.segment(weights)).sum(), list(leaves.values()), allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values(), strict=True)]
        dexpected = [torch.zeros_like(x) if g is None else g for g, x in zip(dexpected, leaves.values(), strict=True)]
        errors = {"y": error(actual, group.segment(expected))}
        for i, (a, b) in enumerate(zip(state, expected_state, strict=True)):
            errors[f"state {i}"] = error(a, b)
        return errors | gradient_errors(group, leaves, found, dexpected)

    return case


def layer_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    for name in small_models().LAYERS:
        layouts = {"dense": (None, False)}
        if dtype == torch.float64:
            layouts |= {"packed": (BOUNDS, False), "dense-state": (None, True), "packed-state": (BOUNDS, True)}
        for layout, arguments in layouts.items():
            yield f"layer-{name}/{layout}", compare_layer(name, dtype, *arguments)


# ---- models -------------------------------------------------------------------------------------------------------


def compare_model(name: str, dtype: torch.dtype, layout: str) -> Case:
    """The loss, the gradients of all parameters, and the logits of a model of three layers."""

    def case(group: SequenceGroup) -> dict[str, float]:
        models = small_models()
        model = models.make_model(name, dtype)
        if layout == "checkpointed":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # a new name
            model.train()
        batch = 1 if layout == "packed" else BATCH
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(1, models.VOCAB, (batch, T), generator=generator)
        labels = ids.masked_fill(torch.rand(batch, T, generator=generator) < 0.3, -100)
        options = {"cu_seqlens": torch.tensor(BOUNDS)} if layout == "packed" else {}
        mask = torch.ones(batch, T, dtype=torch.int64)
        mask[0, :9], mask[1:, 20:] = 0, 0
        parameters = dict(model.named_parameters())

        def run(take: Callable[[Tensor], Tensor]):
            given = options | ({"attention_mask": take(mask)} if layout == "padded" else {})
            with torch.no_grad():
                logits = model(take(ids), **given).logits
            loss = model(take(ids), labels=take(labels), **given).loss
            return logits, loss, torch.autograd.grad(loss, list(parameters.values()))

        with alone():
            logits, loss, gradients = run(lambda x: x)
        found = run(group.segment)
        errors = {"logits": error(found[0], group.segment(logits)), "loss": error(found[1], loss)}
        if dtype == torch.float32:  # where that of some parameters alone is more than 1e-5 off float64 in one process
            return errors | gradient_errors(group, ["all"], [join(found[2])], [join(gradients)])
        return errors | gradient_errors(group, parameters, found[2], gradients)

    return case


def model_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    for name in ("gla", "gated_deltanet", "hybrid", "lightnet"):
        for layout in ("dense", "packed", "padded", "checkpointed"):
            yield f"model-{name}/{layout}", compare_model(name, dtype, layout)


# ---- all of them --------------------------------------------------------------------------------------------------


def numeric_cases(form: str, quick: bool) -> Iterator[tuple[str, Case]]:
    """By "dtype/subject/layout"; the quick ones leave out what others nearly stand for."""
    for dtype in TOLERANCES:
        for cases in (op_cases, layer_cases, model_cases):
            if quick and dtype == torch.float32 and (cases is not layer_cases or form == "ring"):
                continue
            for name, case in cases(dtype):
                subject, layout = name.split("/")
                if (
                    quick
                    and cases is layer_cases
                    and layout not in (("dense",) if form == "ring" else ("dense", "packed"))
                ):
                    continue
                if quick and cases is model_cases and (subject != "model-hybrid" or form == "ring"):
                    continue
                yield f"{str(dtype).removeprefix('torch.')}/{name}", case


def attempt(case: Case, group: SequenceGroup) -> dict | str:
    try:
        return case(group)
    except Exception:  # the test that asks for this case fails with it
        return traceback.format_exc()


def main(folder: Path, rank: int, size: int, quick: bool) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=wait)
    found: dict[str, dict] = {}
    for form in FORMS:
        with sequence_parallel(dist.group.WORLD, form) as group:
            for name, case in numeric_cases(form, quick):
                found[f"{form}/{name}"] = attempt(case, group)
            found[f"{form}/refusals"] = attempt(refusals, group)
            found[f"{form}/volumes"] = attempt(volumes, group)
            found["order"] = attempt(order, group)
    with sequence_parallel(two_dimensions()["sequence"], "ring") as group:
        found["mesh"] = attempt(compare_layer("gla", torch.float64, None, False), group)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, size, plan = sys.argv[1:]
    on_ranks(int(size), lambda rank: main(Path(folder), rank, int(size), plan == "quick"))
