"""Write `families.md` from what the families declare and from the templates of recipes.

python docs/make_families.py
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffsynth_dagster.config import read_recipe
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.families import Family, each_family
from diffsynth_dagster.families.contract import Component
from diffsynth_dagster.weights.identify import guess_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
EXAMPLES = ROOT / "recipes" / "examples"
HEAD = """# Families

What can be trained, and from which files and columns. This page is made by `docs/make_families.py` from the
declarations in `diffsynth_dagster/families/` and the templates in `recipes/examples/`: change those, not this page.

A **module** is what `trainable_models` and `lora_base_model` name. Its files are read in the layout of diffusers (a
folder), in that of the model's authors (single files), and, where the table says so, as a part of a whole checkpoint
that holds several modules. A **variant** is a template to copy; its columns are those of the metadata table.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def code(words: Iterable[str]) -> str:
    """Words in code style, separated by commas; a dash for none."""
    return ", ".join(f"`{word}`" for word in words) or "–"


def files_of(component: Component) -> str:
    """Where the files of a component come from."""
    places = [
        f"`{component.names.folder}/`",
        *(f"`{glob}`" for glob in component.recognition.original_globs),
    ]
    whole = [
        f"below `{start}` in a whole checkpoint or file"
        for start in component.recognition.checkpoint_prefixes
    ]
    return ", ".join([*places, *whole])


def formats(family: Family, name: str) -> str:
    """The key formats of LoRAs of a module."""
    rules = family.part(name).lora
    return "no LoRA" if rules is None else f"`{rules.native}`"


def modules(family: Family) -> list[str]:
    """The table of a family's modules, with the parts that are trained under names of their own."""
    head = ("module", "class", "files", "usual LoRA layers", "LoRA checkpoints")
    rows: list[list[str]] = []
    for name in family.trainable:
        component = family.component(family.part(name).of)
        rules = family.part(name).lora
        targets = None if rules is None else rules.targets
        rows.append(
            [
                f"`{name}`",
                ", ".join(component.construction.classes),
                files_of(component) if component.name == name else f"in `{component.name}`",
                "named, or automatic" if targets is None else code(targets),
                formats(family, name),
            ]
        )
    return table(head, rows)


def column(item: Input) -> str:
    """A column and what it holds."""
    kind = f"{item.kind}s" if item.many else item.kind
    return f"`{item.column}` ({kind}{', may be empty' if item.optional else ''})"


def variant(name: str, configs: Sequence[TrainingConfig]) -> list[str]:
    """The row of a variant, from its templates."""
    family = guess_model(configs[0]).family
    trained = [f"{n} in full" for c in configs for n in c.trainable_models]
    trained += [f"LoRA on {', '.join(c.lora_base_model)}" for c in configs if c.lora_base_model]
    tasks = dict.fromkeys(config.task for config in configs)
    columns = [column(i) for i in family.inputs if i.kind != "sizes"]
    words = ", ".join(columns), "; ".join(dict.fromkeys(trained)) or "–", code(tasks)
    return [f"`{name}`", *words]


def variants(family: Family) -> list[list[str]]:
    """The rows of a family's variants: templates whose names differ only in what is trained."""
    together: dict[str, list[TrainingConfig]] = {}
    for path in sorted((EXAMPLES / family.name).glob("*.yaml")):
        name = path.stem.removesuffix("_lora").removesuffix("_full")
        together.setdefault(name, []).append(read_recipe(path).config)
    return [variant(name, configs) for name, configs in together.items()]


def section(family: Family) -> list[str]:
    """The section of a family."""
    tasks = ["sft", *(["direct_distill"] if family.inference_sigmas is not None else [])]
    geometry = family.geometry
    sizes = f"sides are multiples of {geometry.side_factor}"
    if geometry.frames is not None:
        rule = geometry.frames
        sizes += f"; clips have {rule.remainder} more than a multiple of {rule.step} frames"
    return [
        f"\n## {family.name}\n",
        f"- Tasks: {code(tasks)}, each whole or in two halves (`:data_process`, `:train`).",
        f"- Sizes: {sizes}.",
        f"- Parameters of its own: {code(family.parameters)}.\n",
        *modules(family),
        "",
        *table(("variant", "columns", "trains", "task"), variants(family)),
    ]


def page() -> str:
    """The whole page."""
    lines = [line for family in each_family() for line in section(family)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
