"""What each of two processes does in `train/test_same_gradient.py`: `one_of_two_ranks.py OUT TEXT`, as by torchrun.

Trains two steps on its share of the batch, then takes a step of the optimizer with sharded parameters. OUT gets the
gradients and losses of the one, and the parameters and norm of the other.
"""

import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from forked_ranks import as_by_torchrun
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lm_zoo.train import TextData, ZooModule, fit
from lm_zoo.train.gradients import scale_gradients
from lm_zoo.train.optimizer import AdamWMuon

CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "mixers": {"gla": {"num_heads": 1}}}


class Gradients(L.Callback):
    """The gradients of each step, as the optimizer sees them, and the step's mean loss."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer) -> None:
        if module.step_metrics and len(self.steps) < trainer.global_step:
            step = {name: parameter.grad.clone() for name, parameter in module.model.named_parameters()}
            step["loss"] = module.step_metrics["loss_sum"] / module.step_metrics["targets"]
            self.steps.append(step)


def gradients_of_run(folder: Path, text: Path, *, batch_size: int, callbacks=(), **options) -> list[dict[str, Tensor]]:
    """Of two steps of four rows with uneven numbers of targets, in float64."""
    L.seed_everything(0, verbose=False)
    collect = Gradients()
    cache = str(text.parent / "cache")
    data = TextData(str(text), separator="\n", seq_len=16, batch_size=batch_size, val_fraction=0, cache_dir=cache)
    fit(
        ZooModule(config=CONFIG, warmup=0.0, z_loss=0.01), data, folder, max_steps=3, precision="64-true",
        accelerator="cpu", callbacks=[*callbacks, collect], enable_progress_bar=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    return collect.steps


def optimizer_step(shard, skip: float) -> tuple[list[Tensor], Tensor]:
    """Two parameters after a step of AdamW and of Muon, and the gradients' norm; `shard` cuts each tensor, or nothing.

    The first step is taken, the second one as `skip` says, with gradients that are not finite where it is skipped.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    parameters = [nn.Parameter(shard(value)) for value in values[:2]]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "muon": True}]
    optimizer = AdamWMuon(groups, lr=0.1)
    for poison, skipped in ((0.0, 0.0), (torch.nan if skip else 0.0, skip)):
        for parameter, gradient in zip(parameters, values[2:], strict=True):
            parameter.grad = shard(gradient + poison)
        norm = scale_gradients(parameters, weight=torch.tensor(2.0, dtype=torch.float64), clip_norm=1.0)
        optimizer.skip = torch.tensor(skipped, dtype=torch.float64)
        optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in parameters], norm


def main(out: Path, text: Path) -> None:
    steps = gradients_of_run(out / "run", text, batch_size=2, devices=2, strategy="ddp")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    sharded = {skip: optimizer_step(lambda x: distribute_tensor(x, mesh, [Shard(0)]), skip) for skip in (0.0, 1.0)}
    if dist.get_rank() == 0:
        torch.save({"steps": steps, "sharded": sharded}, out / "results.pt")
    dist.barrier()


if __name__ == "__main__":
    as_by_torchrun(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
