"""The optimizer and the course of the learning rate that a config asks for."""

import inspect
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import ParameterError


def make_optimizer(
    config: TrainingConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW, or the class of `customized_optimizer`.

    Raises:
        ParameterError: it cannot be imported, is no optimizer, or does not take what it is given.
    """
    dotted = config.customized_optimizer
    if dotted is None:
        kind: Any = torch.optim.AdamW
    else:
        kind = import_dotted(dotted, "customized_optimizer")
        _require_optimizer(kind, dotted)
    try:
        return kind(list(parameters), lr=config.learning_rate, weight_decay=config.weight_decay)
    except (TypeError, ValueError) as error:
        raise ParameterError(
            f"the optimizer cannot be made: {error}",
            where=f"customized_optimizer = {dotted}",
            do="name a class that takes parameters, lr and weight_decay",
        ) from error


def _require_optimizer(kind: Any, dotted: str) -> None:
    def refuse(what: str) -> ParameterError:
        return ParameterError(
            what,
            where=f"customized_optimizer = {dotted}",
            do="name a class such as torch.optim.AdamW",
        )

    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise refuse("this is no optimizer class of torch")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise refuse("this optimizer evaluates the model several times in a step")


def make_schedule(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The course of the learning rate over all optimizer steps.

    Raises:
        ParameterError: it does not fit the learning rate.
    """
    warms_up = config.lr_scheduler == "constant" and config.lr_warmup_steps
    try:
        return get_scheduler(
            "constant_with_warmup" if warms_up else config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
        )
    except ValueError as error:
        raise ParameterError(
            f"the learning rate cannot take this course: {error}",
            where=f"lr_scheduler = {config.lr_scheduler}, learning_rate = {config.learning_rate}",
            do="choose another course or a larger learning rate",
        ) from error


def check_optimizer(config: TrainingConfig) -> None:
    """Try both on one number. Raises `ParameterError`, see `make_optimizer`, `make_schedule`."""
    number = [torch.nn.Parameter(torch.zeros(1))]
    # One that needs a GPU may be planned where there is none.
    with suppress(RuntimeError, ImportError, AssertionError):
        make_optimizer(config, number)
    make_schedule(config, torch.optim.AdamW(number, lr=config.learning_rate), 1)
