"""The parameters of sample images, and the check that they go together."""

from collections.abc import Callable

from pydantic import BaseModel

from diffsynth_dagster.config.declare import Text, Texts, parameter
from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.errors import ParameterError


class SamplingParameters(BaseModel):
    """Sample images that are made before, during and after the training."""

    # Affects latents: the prompts are encoded too, and with guidance the negative one.
    sample_prompts: Texts = parameter(
        (),
        "Prompts of the sample images; as a flag, a JSON list or one prompt.",
        affects="latents",
        each_half=True,
    )
    sample_table: str | None = parameter(
        None,
        "Table (csv, json, jsonl or parquet) with a row for each sample image, in place of "
        "`sample_prompts`: the columns of the metadata but for the one that is trained on. Paths in "
        "it are relative to its own folder.",
        affects="latents",
        by_content=True,
        each_half=True,
        off_by_default=True,
    )
    sample_steps: int | None = parameter(
        None,
        "Optimizer steps between two sample pictures. Left out: one with each checkpoint.",
        affects="training",
        ge=1,
    )
    sample_num_inference_steps: int = parameter(
        20, "Denoising steps of a sample image.", affects="training", ge=1
    )
    sample_cfg_scale: float | None = parameter(
        None,
        "Scale of classifier-free guidance of a sample image; 1 is no guidance. Left out: what the "
        "model's authors recommend.",
        affects="latents",
        each_half=True,
        left_out_as=1.0,  # the default before None was allowed
        used_with=("sample_prompts", "sample_table", "customized_evaluation"),
        ge=1.0,
    )
    sample_negative_prompt: Text | None = parameter(
        None,
        "Negative prompt, from which guidance leads sample images away. Left out: the one that the "
        "model's authors recommend, or an empty one.",
        affects="latents",
        each_half=True,
        off_by_default=True,
    )
    customized_evaluation: str | None = parameter(
        None,
        "Dotted path of a function that measures the model before and after the training "
        "by the images that it generates.",
        affects="training",
    )

    @property
    def makes_samples(self) -> bool:
        """Whether sample images are made, of prompts or of the rows of a table."""
        return bool(self.sample_prompts) or self.sample_table is not None


def check_samples(
    config: SamplingParameters,
    naming: Callable[[str], str],
    refuse: Callable[[str, str], ParameterError],
) -> None:
    """Check that the parameters of samples go together.

    Args:
        naming: how a parameter's name is written where the values come from.
        refuse: (what is wrong, what to do) → the error.

    Raises:
        ParameterError: they do not.
    """
    prompts, table = naming("sample_prompts"), naming("sample_table")
    given = config.sample_prompts
    if len(given) == 1 and given[0].lower().endswith(TABLES):
        raise refuse(
            f"{prompts} lists prompts, and {given[0]} is the name of a table", f"give {table}"
        )
    if given and config.sample_table is not None:
        raise refuse(f"{prompts} and {table} both say which samples are made", "leave one out")
    if config.sample_steps is not None and not config.makes_samples:
        raise refuse(
            f"{naming('sample_steps')} is given but no {prompts}",
            f"give {prompts} or {table}, or leave {naming('sample_steps')} out",
        )
    evaluates = config.makes_samples or config.customized_evaluation
    if config.sample_negative_prompt is not None and not evaluates:
        raise refuse(
            f"{naming('sample_negative_prompt')} is given, and no samples are made",
            f"give {prompts}, or leave it out",
        )
