"""The optimizer and the learning-rate schedule of a config."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from diffsynth_dagster.config.learning import Optimizer
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import ParameterError, reason_of
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.weights.resolved import ResolvedModel

Group = dict[str, Any]
"""Parameters with a learning rate of their own, as torch's optimizers take them: `params`, `lr`,
and `name`, which is the trained component or part."""


@dataclass(frozen=True)
class NamedOptimizer:
    """What a name of `optimizer` stands for.

    Attributes:
        path: dotted path of the class.
        arguments: default arguments; `optimizer_arguments` overrides them.
        extra: this project's extra that installs it.
        elementwise: whether the update of each weight depends on that weight alone, so that tensors
            may be cut anywhere.
        counts_together: whether all weights share one count of steps, so that every step must
            update all of them.
        spares_embeddings: whether it takes the embedding tables as the argument `embeddings`.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    extra: str | None = None
    elementwise: bool = False
    counts_together: bool = False
    spares_embeddings: bool = False


OPTIMIZERS: Mapping[Optimizer, NamedOptimizer] = {
    "adamw": NamedOptimizer("torch.optim.AdamW", elementwise=True),
    "adamw_fused": NamedOptimizer("torch.optim.AdamW", {"fused": True}, elementwise=True),
    "adamw8bit": NamedOptimizer(
        "bitsandbytes.optim.AdamW8bit", extra="bitsandbytes", elementwise=True
    ),
    # Not torch's, which scales steps by the size of the weights: those of a LoRA start at zero.
    "adafactor": NamedOptimizer(
        "transformers.optimization.Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": NamedOptimizer("prodigyopt.Prodigy", counts_together=True),
    "muon": NamedOptimizer("diffsynth_dagster.training.muon.MuonWithAdamW", spares_embeddings=True),
    "adamw_schedule_free": NamedOptimizer("schedulefree.AdamWScheduleFree", counts_together=True),
}


def parameter_groups(
    config: TrainingConfig, family: Family, trained: Mapping[str, nn.Parameter]
) -> list[nn.Parameter] | list[Group]:
    """The trained parameters. With `learning_rates`, a group for each trained component or part, in
    the order of the config.

    Args:
        trained: name in `TrainingStep` (`components.<component>.<tensor>`) → parameter.
    """
    if not config.learning_rates:
        return list(trained.values())
    parts = [family.part(name) for name in (*config.trainable_models, *config.lora_base_model)]
    groups: dict[str, list[nn.Parameter]] = {part.name: [] for part in parts}
    for name, parameter in trained.items():
        _, component, rest = name.split(".", 2)
        part = next(p for p in parts if p.of == component and p.holds(rest))
        groups[part.name].append(parameter)
    return [
        {
            "params": members,
            "lr": config.learning_rates.get(name, config.learning_rate),
            "name": name,
        }
        for name, members in groups.items()
        if members
    ]


def make_optimizer(
    config: TrainingConfig,
    parameters: Sequence[nn.Parameter] | Sequence[Group],
    embeddings: Iterable[torch.Tensor] = (),
) -> torch.optim.Optimizer:
    """The optimizer of `optimizer`, or the class of `customized_optimizer`.

    Args:
        parameters: see `parameter_groups`.
        embeddings: the parameters that are embedding tables.

    Raises:
        ParameterError: it cannot be imported, is no optimizer, or does not take its arguments.
    """
    dotted, named = config.customized_optimizer, OPTIMIZERS[config.optimizer]
    given = {name: _as_tuple(value) for name, value in config.optimizer_arguments.items()}
    if dotted is None:
        kind, given = _import_named(config.optimizer), {**named.arguments, **given}
        if named.spares_embeddings:
            given["embeddings"] = list(embeddings)
    else:
        kind = import_dotted(dotted, "customized_optimizer")
        _require_optimizer(kind, dotted)
    try:
        # Prodigy prints when it is made, which would end up in the JSON of a dry run.
        with redirect_stdout(StringIO()):
            made = kind(
                list(parameters),
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                **given,
            )
    except (TypeError, ValueError) as error:
        raise _cannot_be_made(config, error) from error
    if averages_by_itself(made):
        # Schedule-free optimizers refuse a step until they are in training mode.
        made.train()
    if getattr(made, "_step_supports_amp_scaling", False):
        # A fused optimizer would check float16's gradients itself, and skip a step unnoticed.
        made._step_supports_amp_scaling = False
    return made


def _cannot_be_made(config: TrainingConfig, error: Exception) -> ParameterError:
    dotted, given = config.customized_optimizer, config.optimizer_arguments
    names = (
        f"optimizer = {config.optimizer}" if dotted is None else f"customized_optimizer = {dotted}"
    )
    return ParameterError(
        f"the optimizer cannot be made: {reason_of(error)}",
        where=names + (f", optimizer_arguments = {given}" if given else ""),
        do="give arguments that its class takes"
        if given
        else "name a class that takes parameters, lr and weight_decay",
    )


def _as_tuple(value: Any) -> Any:
    # A recipe has lists where optimizers take tuples, such as betas.
    return tuple(value) if isinstance(value, list) else value


def _import_named(name: Optimizer) -> Any:
    """The class of a named optimizer. Raises `ParameterError` if its package is not installed."""
    named = OPTIMIZERS[name]
    module, _, attribute = named.path.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        package = module.partition(".")[0]
        install = package if named.extra is None else f"'diffsynth-dagster[{named.extra}]'"
        raise ParameterError(
            f"{package} cannot be imported: {reason_of(error)}",
            where=f"optimizer = {name}",
            do=f"pip install {install}, or choose another optimizer",
        ) from error


def _require_optimizer(kind: Any, dotted: str) -> None:
    """Check that `customized_optimizer` is a usable class. Raises `ParameterError`."""

    def refuse(what: str) -> ParameterError:
        return ParameterError(
            what,
            where=f"customized_optimizer = {dotted}",
            do="name a class such as torch.optim.AdamW",
        )

    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise refuse("this is no optimizer class of torch")
    # LBFGS needs a closure that computes the loss again; a training step computes it once.
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise refuse("this optimizer evaluates the model several times in a step")


def averages_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is schedule-free: it evaluates other weights than it trains. `eval` puts
    the averaged weights in place, and `train` puts the trained ones back."""
    return all(callable(getattr(optimizer, name, None)) for name in ("eval", "train"))


def needs_whole_tensors(config: TrainingConfig, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer does not work on pieces of tensors, or also changes weights outside a
    step."""
    named = config.customized_optimizer is None and not OPTIMIZERS[config.optimizer].elementwise
    return named or averages_by_itself(optimizer)


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Name of a group ("" if it has none) → its learning rate in the next step.

    For Prodigy, that is the rate that it has estimated, times the one of the config.
    """
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        # `d` is Prodigy's estimate. Muon splits groups, which share a name and a rate.
        rates.setdefault(group.get("name", ""), float(group["lr"]) * float(group.get("d", 1.0)))
    return rates


def make_schedule(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule over all optimizer steps.

    Raises:
        ParameterError: the schedule cannot be made with this learning rate.
    """
    # The "constant" schedule of diffusers ignores the warm-up.
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


def check_optimizer(config: TrainingConfig, model: ResolvedModel) -> None:
    """Make the optimizer and the schedule for two tiny parameters, to find mistakes early.

    Raises:
        ParameterError: see `make_optimizer`, `make_schedule`; or the optimizer cannot train several
            denoisers, since each step updates only one of them.
    """
    several = len(model.denoisers) > 1
    if (
        several
        and config.customized_optimizer is None
        and OPTIMIZERS[config.optimizer].counts_together
    ):
        raise ParameterError(
            "this optimizer counts the steps of all weights together, and a step changes one expert",
            where=f"optimizer = {config.optimizer}",
            do="choose another one, or train one expert",
        )
    # A vector and a matrix: Muon treats them differently.
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))]
    # An optimizer that needs a GPU may be checked on a machine without one.
    with suppress(RuntimeError, ImportError, AssertionError):
        made = make_optimizer(config, parameters)
        if config.customized_optimizer is None and config.optimizer_arguments:
            _try_step(config, made, parameters)
    make_schedule(config, torch.optim.AdamW(parameters, lr=config.learning_rate), 1)


def _try_step(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> None:
    """Make one step, since some optimizers look at their arguments only then. Raises
    `ParameterError`."""
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (TypeError, ValueError, IndexError) as error:
        raise _cannot_be_made(config, error) from error
