"""How much the LoRAs of a training change the weights of their layers, so that a LoRA without
effect is noticed."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from diffsynth_dagster.families.lora import Lora
from diffsynth_dagster.formats.change import change_norms

ROUNDING = 1e-7
"""Relative rounding error of float32, about 2⁻²³: a smaller change of a weight is lost."""


@dataclass(frozen=True)
class Effect:
    """The relative change ‖ΔW‖ / ‖W‖ (Frobenius norms) of each layer that has a LoRA.

    Attributes:
        of_layer: `<component>.<layer>` → its relative change. Empty if the norms ‖W‖ are not known.
        unchanged: the layers that do not change at all: B is zero.
        layers: the number of layers with a LoRA.
    """

    of_layer: Mapping[str, float]
    unchanged: tuple[str, ...]
    layers: int

    @property
    def is_nothing(self) -> bool:
        """Whether the change of every layer is below the rounding of its weights in float32."""
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
    """Measure how much LoRAs change their layers.

    Args:
        loras: component → its LoRA.
        weight_norms: component → layer → ‖W‖ of the base weights. May lack layers.
    """
    shares: dict[str, float] = {}
    unchanged: list[str] = []
    for component, lora in loras.items():
        known = weight_norms.get(component, {})
        for layer, norm in change_norms(lora).items():
            name = f"{component}.{layer}"
            if not norm:
                unchanged.append(name)
            if known.get(layer):  # neither missing nor zero
                shares[name] = norm / known[layer]
    return Effect(shares, tuple(unchanged), sum(len(lora.down) for lora in loras.values()))
