"""One forward pass: the stages of the step, noising, the denoiser, and the losses."""

from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.objective.devices import to_device
from diffsynth_dagster.objective.flow import NUM_TRAIN_TIMESTEPS
from diffsynth_dagster.objective.loss import sample_losses
from diffsynth_dagster.objective.noise import noise
from diffsynth_dagster.training.adapters import is_adapter
from diffsynth_dagster.training.batches import Batch
from diffsynth_dagster.training.stage_outputs import StageOutputs
from diffsynth_dagster.weights.resolved import ResolvedModel


class TrainingStep(nn.Module):
    """Batch → loss of each sample.

    Args:
        modules: the components used in the step, trained or not.
        tokenizers: loaded tokenizers that the stages of the step use.

    Attributes:
        components: the modules, by name.
        compute_dtypes: denoiser → the element type that it computes in.
    """

    def __init__(
        self,
        model: ResolvedModel,
        modules: dict[str, nn.Module],
        tokenizers: dict[str, Any],
        config: TrainingConfig,
    ) -> None:
        super().__init__()
        self.components = nn.ModuleDict(modules)
        self._tokenizers = tokenizers
        self._family = family = model.family
        self._stage_outputs = StageOutputs(model)
        self._loss_weights = {
            o.name: float(getattr(config, o.weight)) if o.weight is not None else 1.0
            for stage in family.stages
            for o in stage.yields
            if o.role == "target"
        }
        self._noising = model.noising
        self._distills = config.distills
        denoisers = [denoiser.component for denoiser in model.denoisers]
        self._denoisers = [name for name in denoisers if name in modules]
        self.find_compute_dtypes()

    def find_compute_dtypes(self) -> None:
        """Look up what the denoisers compute in: here, not in each step. To be called again after
        something cast the modules."""
        found = {name: weight_dtype(self.components[name]) for name in self._denoisers}
        self.compute_dtypes: dict[str, torch.dtype] = found

    @property
    def loaded(self) -> dict[str, Any]:
        """Component name → module or tokenizer."""
        return {**dict(self.components.items()), **self._tokenizers}

    def row_weights(self, batch: Batch) -> torch.Tensor | None:
        """The weights (B,) of a batch's rows in the loss; None if rows have no weights."""
        weights = [
            t for name, t in batch.outputs.items() if self._stage_outputs.role(name) == "weight"
        ]
        return torch.stack(weights).prod(0).float() if weights else None

    def forward(self, batch: Batch) -> torch.Tensor:
        """Losses (B,) float32 of the samples of a batch, each weighted by its timestep and, if rows
        have weights, by its row."""
        device = next(self.parameters()).device
        outputs = self._stage_outputs.of(batch, self.loaded, device)
        if self._distills:
            losses = self._distilled(outputs, batch.denoiser)
        else:
            losses = self._supervised(batch, outputs)
        for weight in (
            t for name, t in outputs.items() if self._stage_outputs.role(name) == "weight"
        ):
            losses = losses * weight
        return losses

    def _supervised(self, batch: Batch, outputs: Tensors) -> torch.Tensor:
        """Losses (B,) of the predictions at the drawn timesteps."""
        x_0, known, conditions = self._stage_outputs.by_role(outputs)
        masks = self._stage_outputs.of_targets(outputs, "mask")
        device = next(iter(x_0.values())).device
        index = torch.tensor(batch.indices)  # on the CPU, as the tables of the schedule
        epsilon = {name: self._noise(batch, name, clean) for name, clean in x_0.items()}
        x_t: Tensors = {}
        for name, clean in x_0.items():
            # In float32: rounded to bf16 first, small noise would be lost.
            x_t[name] = self._noising.noised(clean.float(), epsilon[name], index)
        x_t = _with_known(x_t, x_0, known)
        t = to_device(self._noising.timesteps[index], device)
        prediction = self._denoise(batch.denoiser, conditions, x_t, t)
        weight = to_device(self._noising.weights[index], device)
        losses = [
            sample_losses(
                prediction[name],
                self._noising.target(clean.float(), epsilon[name], index),
                weight * self._loss_weights[name],
                known.get(name),
                masks.get(name),
            )
            for name, clean in x_0.items()
        ]
        return torch.stack(losses).sum(0)

    def _denoise(
        self, denoiser: str, conditions: Tensors, x_t: Tensors, t: torch.Tensor
    ) -> Tensors:
        """The family's prediction; all inputs but the timesteps are cast to the model's type."""
        model = self.components[denoiser]
        dtype = self.compute_dtypes[denoiser]
        return self._family.denoise(
            model,
            self.loaded,
            {n: c.to(dtype) if c.is_floating_point() else c for n, c in conditions.items()},
            {name: noisy.to(dtype) for name, noisy in x_t.items()},
            t,
        )

    def _distilled(self, outputs: Tensors, denoiser: str) -> torch.Tensor:
        """Losses (B,) of direct distillation: the student samples from the teacher's noise, and its
        result is compared with the teacher's, unweighted. Gradients flow through all of its
        steps."""
        steps = next(t for n, t in outputs.items() if self._stage_outputs.role(n) == "steps")
        losses = torch.zeros(len(steps), device=steps.device)
        # Samples with equal numbers of steps are sampled together.
        for count in steps.unique().tolist():
            members = (steps == count).nonzero()[:, 0]
            part = {name: tensor[members] for name, tensor in outputs.items()}
            x_0, known, conditions = self._stage_outputs.by_role(part)
            start, masks = (
                self._stage_outputs.of_targets(part, "start"),
                self._stage_outputs.of_targets(part, "mask"),
            )
            x_t = {name: start[name].float() for name in x_0}
            assert self._family.inference_sigmas is not None
            sigmas = self._family.inference_sigmas(count, x_0).to(steps.device)
            # Euler steps along the predicted velocity.
            for sigma, after in pairwise(sigmas):
                x_t = _with_known(x_t, x_0, known)
                t = (sigma * NUM_TRAIN_TIMESTEPS).expand(len(members))
                velocity = self._denoise(denoiser, conditions, x_t, t)
                x_t = {n: x + (after - sigma) * velocity[n].float() for n, x in x_t.items()}
            ones = torch.ones(len(members), device=steps.device)
            parts = [sample_losses(x_t[n], x_0[n], ones, known.get(n), masks.get(n)) for n in x_0]
            losses = losses.index_copy(0, members, torch.stack(parts).sum(0))
        return losses

    def _noise(self, batch: Batch, name: str, clean: torch.Tensor) -> torch.Tensor:
        """The noise (B, …) of a target, which depends only on seed, sample, visit and target."""
        shape = tuple(clean.shape[1:])
        drawn = [
            noise(batch.seed, sample, visit, name, shape)
            for sample, visit in zip(batch.samples, batch.visits, strict=True)
        ]
        return to_device(torch.stack(drawn), clean.device)


def _with_known(x_t: Tensors, x_0: Tensors, known: Tensors) -> Tensors:
    """The noised latents, with clean values in the known parts."""
    return {
        n: torch.where(known[n].bool(), x_0[n].float(), x) if n in known else x
        for n, x in x_t.items()
    }


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """While entered, a module is in evaluation mode. Afterwards each submodule has its mode
    back."""
    # Noted one by one: frozen components are in evaluation mode, trained ones are not.
    modes = {inside: inside.training for inside in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for inside, mode in modes.items():
            inside.training = mode


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Element type that a module computes in: the type of its base weights, without LoRA layers.

    Float8 is only used to store weights, not to compute.
    """
    for name, parameter in module.named_parameters():
        stored = parameter.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if not is_adapter(name) and parameter.is_floating_point() and not stored:
            return parameter.dtype
    raise AssertionError("a denoiser has weights")
