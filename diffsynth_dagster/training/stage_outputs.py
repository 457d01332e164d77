"""The outputs of a model's stages for a batch: the cached ones, and those of the stages run now."""

from collections.abc import Mapping
from typing import Any

import torch

from diffsynth_dagster.families.contract import Loaded, Output, Tensors
from diffsynth_dagster.objective.devices import to_device
from diffsynth_dagster.training.batches import Batch, collate
from diffsynth_dagster.weights.resolved import ResolvedModel


class StageOutputs:
    """Runs the stages that are not cached, and sorts the outputs of all stages by their roles."""

    def __init__(self, model: ResolvedModel) -> None:
        self._family, self._stages = model.family, model.step_stages
        self._outputs = {o.name: o for stage in model.family.stages for o in stage.yields}

    @property
    def uses(self) -> list[str]:
        """The components and tokenizers that the stages run now use."""
        return list(dict.fromkeys(name for stage in self._stages for name in stage.uses))

    def of(self, batch: Batch, loaded: Loaded, device: torch.device) -> Tensors:
        """The stacked outputs of all stages, on a device.

        Args:
            loaded: the components and tokenizers of `uses`.
        """
        outputs = dict(batch.outputs)
        for stage in self._stages:
            # Only the columns and outputs that the stage declares: a column of another stage may be
            # called like an output.
            needed = {o.name: o for n in stage.needs for o in self._family.stage(n).yields}
            samples = [
                {i.column: inputs[i.column] for i in stage.reads} | _sample(outputs, needed, index)
                for index, inputs in enumerate(batch.inputs)
            ]
            stacked = collate(stage.yields, stage.run(loaded, samples))
            outputs |= {name: to_device(tensor, device) for name, tensor in stacked.items()}
        return outputs

    def by_role(self, outputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Targets, masks of the known parts by target, and what is passed to `denoise`."""
        targets = {n: t for n, t in outputs.items() if self.role(n) == "target"}
        known = self.of_targets(outputs, "known")
        passed = ("condition", "known")
        conditions = {n: t for n, t in outputs.items() if self.role(n) in passed}
        return targets, known, conditions

    def of_targets(self, outputs: Tensors, role: str) -> Tensors:
        """The outputs of a role, by the target they belong to."""
        return {
            of: t
            for n, t in outputs.items()
            if self.role(n) == role and (of := self._outputs[n].of) is not None
        }

    def role(self, name: str) -> str:
        """The role of an output: see `Output`."""
        # What no stage declares is the mask of a ragged output, which `denoise` gets.
        return self._outputs[name].role if name in self._outputs else "condition"


def _sample(outputs: Tensors, declared: Mapping[str, Output], index: int) -> dict[str, Any]:
    """The outputs of one sample of a stacked batch, without padding."""
    single: dict[str, Any] = {}
    for name, output in declared.items():
        if name in outputs:
            tensor = outputs[name][index]
            single[name] = tensor[outputs[f"{name}_mask"][index]] if output.ragged else tensor
    return single
