"""How much the LoRAs of a training change the weights of their layers: a LoRA that does nothing is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.formats.change import change_norms

ROUNDING = 1e-7
"""The share of a number that float32 rounds."""


@dataclass(frozen=True)
class Effect:
    """‖ΔW‖ / ‖W‖ (Frobenius norms) of the layers that LoRAs change.

    Attributes:
        of_layer: `<component>.<layer>` → its share. Empty where the norms of the weights are not known.
        unchanged: the layers that are not changed at all.
        layers: how many layers there are.
    """

    of_layer: Mapping[str, float]
    unchanged: tuple[str, ...]
    layers: int

    @property
    def is_nothing(self) -> bool:
        """Whether no layer is changed by as much as its weights are rounded in float32."""
        if len(self.unchanged) == self.layers:
            return True
        return bool(self.of_layer) and max(self.of_layer.values()) < ROUNDING

    def __str__(self) -> str:
        """One line for a person."""
        if len(self.unchanged) == self.layers:
            return "it changes nothing: B is zero in all of its layers"
        if self.is_nothing:
            most = max(self.of_layer.values())
            return f"it changes next to nothing: at most {most:.1g} of the weights of a layer"
        text = f"it changes {self.layers - len(self.unchanged)} of {self.layers} layers"
        shares = [share for name, share in self.of_layer.items() if name not in self.unchanged]
        if not shares:
            return text
        most = max(self.of_layer, key=lambda name: self.of_layer[name])
        return (
            f"{text}, by {median(shares):.2g} of their weights (median; {min(shares):.2g} to "
            f"{max(shares):.2g}, most in {most})"
        )


def effect_of(loras: Mapping[str, Lora], weight_norms: Mapping[str, Mapping[str, float]]) -> Effect:
    """What LoRAs change.

    Args:
        loras: component → its LoRA.
        weight_norms: component → layer → ‖W‖ of the base, as far as they are known.
    """
    shares: dict[str, float] = {}
    unchanged: list[str] = []
    for component, lora in loras.items():
        known = weight_norms.get(component, {})
        for layer, norm in change_norms(lora).items():
            name = f"{component}.{layer}"
            if not norm:
                unchanged.append(name)
            if known.get(layer):
                shares[name] = norm / known[layer]
    return Effect(shares, tuple(unchanged), sum(len(lora.down) for lora in loras.values()))
