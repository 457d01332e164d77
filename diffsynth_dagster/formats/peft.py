"""LoRAs in the format of peft's `PeftModel`: `base_model.model.<layer>.lora_A.weight`, for one
component. The settings are a file `adapter_config.json`, whose text is kept in the notes."""

import json

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.families.sampling_types import Tensors
from diffsynth_dagster.formats.contract import AllRules, Loras, NamedTensors, UnreadableLora
from diffsynth_dagster.formats.diffusers import REFUSALS, applied, peft_settings, without_weights
from diffsynth_dagster.formats.names import with_dots
from diffsynth_dagster.formats.reading import read_as

START = "base_model.model."
CONFIG = "adapter_config.json"
"""Name of the settings file, and of the note with its text."""


class Peft:
    """See `Format`."""

    def write(self, loras: Loras, rules: AllRules) -> NamedTensors:
        assert len(loras) == 1, "a file of peft is for one module"
        (lora,) = loras.values()
        folded = lora.folded()
        settings = LoraConfig(**peft_settings(folded), inference_mode=True).to_dict()
        # JSON has no sets; sorted, since their order changes from process to process.
        plain = {n: sorted(v) if isinstance(v, set) else v for n, v in settings.items()}
        text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
        return NamedTensors(with_dots(START, folded, alphas=False), {CONFIG: text})

    def read(self, tensors: Tensors, rules: AllRules) -> dict[str, Lora]:
        return read_as("peft", tensors, rules)

    def try_load(
        self, spelled: NamedTensors, name: str, module: nn.Module, rules: AllRules
    ) -> Lora:
        # `LoraConfig` sets `peft_type` itself and does not take it as an argument.
        entries = json.loads(spelled.notes[CONFIG])
        settings = {n: v for n, v in entries.items() if n != "peft_type"}
        tensors = {n.removeprefix(START): t for n, t in spelled.tensors.items()}
        try:
            inject_adapter_in_model(
                LoraConfig(**settings), without_weights(module), low_cpu_mem_usage=True
            )
            loaded = set_peft_model_state_dict(module, tensors, low_cpu_mem_usage=True)
        except REFUSALS as error:
            raise UnreadableLora(str(error)) from error
        if loaded.unexpected_keys:
            raise UnreadableLora(f"it leaves {loaded.unexpected_keys[0]} out")
        return applied(module)


FORMAT = Peft()
