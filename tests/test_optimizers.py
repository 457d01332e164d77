"""Every named optimizer keeps the same promises: one table for all."""

import json
import sys
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
from test_config import GUIDE_COMMAND
from torch import nn

from diffsynth_dagster.config.learning import Optimizer
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.train import main
from diffsynth_dagster.training.optimizer import (
    OPTIMIZERS,
    check_optimizer,
    make_optimizer,
    make_schedule,
)
from diffsynth_dagster.weights.resolved import resolve

# Tensors of 8 bits are used where tensors are large, unless it is said that they are.
TABLE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_fused": {},
    "adamw8bit": {"optimizer_arguments": {"min_8bit_size": 16}},
    "adafactor": {},
    "prodigy": {"learning_rate": 1.0, "optimizer_arguments": {"d0": 1e-4}},
    "muon": {},
    "adamw_schedule_free": {"lr_scheduler": "constant"},
}


def optimizers(*names: str) -> list[Any]:
    """Parameters of a test: those whose package is not installed are skipped."""
    lacks = find_spec("bitsandbytes") is None
    skip = pytest.mark.skipif(lacks, reason="bitsandbytes is not installed")
    return [pytest.param(name, marks=[skip] if "8bit" in name else []) for name in names]


every_optimizer = pytest.mark.parametrize("name", optimizers(*TABLE))


def config_of(name: str, **more: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"optimizer": name, "learning_rate": 0.01, **TABLE[name], **more}
    )


class Network(nn.Module):
    """Has a table, matrices, a convolution, vectors, and a weight that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 16)
        self.mix = nn.Conv1d(16, 16, 1)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 4)
        self.idle = nn.Parameter(torch.ones(2, 2))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.table(words).mT).mT
        return self.down(torch.nn.functional.gelu(self.up(mixed))).mean(1)


WORDS = torch.randint(0, 10, (8, 5), generator=torch.Generator().manual_seed(2))
WANTED = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Course = torch.optim.lr_scheduler.LRScheduler


def learner(
    config: TrainingConfig, kind: str = "cosine"
) -> tuple[Network, torch.optim.Optimizer, Course]:
    network = Network()
    optimizer = make_optimizer(config, list(network.parameters()), [network.table.weight])
    if config.optimizer == "adamw_schedule_free":
        kind = "constant_with_warmup"
    course = config.model_copy(update={"lr_scheduler": kind, "lr_warmup_steps": 5})
    return network, optimizer, make_schedule(course, optimizer, 100)


def learn(network: Network, optimizer: Any, schedule: Course, steps: int) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(network(WORDS), WANTED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(OPTIMIZERS) == set(get_args(Optimizer))


@every_optimizer
def test_the_loss_falls(name: str) -> None:
    losses = learn(*learner(config_of(name)), 100)
    assert losses[-1] < 0.3 * losses[0]


@every_optimizer
def test_a_state_is_restored_exactly(name: str) -> None:
    """Through JSON and tensors, as a state on a disk."""
    from diffsynth_dagster.training.packing import pack, unpack

    network, optimizer, schedule = learner(config_of(name))
    learn(network, optimizer, schedule, 30)
    tensors: dict[str, torch.Tensor] = {}
    packed = [pack(optimizer.state_dict(), "o", tensors), pack(schedule.state_dict(), "s", tensors)]
    again, *others = learner(config_of(name))
    again.load_state_dict(network.state_dict())
    for other, kept in zip(others, json.loads(json.dumps(packed)), strict=True):
        other.load_state_dict(unpack(kept, tensors))
    assert learn(again, *others, 30) == learn(network, optimizer, schedule, 30)
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@every_optimizer
def test_a_learning_rate_of_zero_changes_nothing(name: str) -> None:
    """Every group follows the schedule: in the first step of a warm-up the rate is zero."""
    network, optimizer, schedule = learner(config_of(name))
    before = [p.detach().clone() for p in network.parameters()]
    learn(network, optimizer, schedule, 1)
    for one, other in zip(network.parameters(), before, strict=True):
        assert torch.equal(one, other)
    assert all(group["lr"] > 0 for group in optimizer.param_groups)


def test_muon_is_for_matrices_and_adamw_for_the_others() -> None:
    """The two optimizers of torch, each on its own weights, take the same steps."""
    network, optimizer, schedule = learner(config_of("muon", weight_decay=0.1))
    losses = learn(network, optimizer, schedule, 20)
    twin = Network()
    matrices = [twin.up.weight, twin.down.weight, twin.idle]
    others = [twin.table.weight, twin.mix.weight, twin.mix.bias, twin.up.bias, twin.down.bias]
    pair = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1),
    ]
    course = TrainingConfig(lr_scheduler="cosine", lr_warmup_steps=5)
    schedules = [make_schedule(course, part, 100) for part in pair]
    for expected in losses:
        loss = nn.functional.mse_loss(twin(WORDS), WANTED)
        assert float(loss.detach()) == expected
        loss.backward()
        for part, its_schedule in zip(pair, schedules, strict=True):
            part.step()
            part.zero_grad()
            its_schedule.step()


def test_a_step_of_float16_that_overflows_is_skipped_by_the_scaler() -> None:
    """A fused optimizer would skip it by itself, and report a step that changed nothing."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(config_of("adamw_fused"), [weight])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum() * float("inf")).backward()
    called: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(True))
    scaler.step(optimizer)
    scaler.update()
    assert not called
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer adam", "input should be 'adamw', 'adamw_fused'"),
        ("--optimizer_arguments beta=1", "unexpected keyword argument 'beta'"),
        ("--optimizer_arguments betas=0.9", "the optimizer cannot be made"),
        ("--optimizer_arguments betas=2,0.9", "Invalid beta parameter"),
        ("--optimizer_arguments eps=small", "the optimizer cannot be made"),
        ("--optimizer adamw_schedule_free --optimizer_arguments r=a", "cannot be made"),
        ("--optimizer_arguments eps", "'eps' is no new name=value"),
        ("--optimizer_arguments eps=1e-8 --optimizer_arguments {", "is not JSON"),
        ("--optimizer_arguments lr=1", "give --learning_rate"),
        ("--optimizer_arguments weight_decay=1", "give --weight_decay"),
        ("--optimizer muon --customized_optimizer torch.optim.SGD", "both name an optimizer"),
        ("--optimizer prodigy", "give --learning_rate 1"),
        ("--optimizer adamw_schedule_free --lr_scheduler cosine", "leave --lr_scheduler out"),
        ("--optimizer adamw_schedule_free --ema_sigma_rel 0.1", "keeps an average by itself"),
        ("--ema_sigma_rel 0.3", "input should be less than 0.2886"),
        ("--learning_rates vea=1", "names 'vea', which is not trained"),
        ("--learning_rates dit=0", "input should be greater than 0"),
        ("--learning_rates dit=fast", "input should be a valid number"),
        ("--optimizer adafactor --optimizer_arguments relative_step=True", "Cannot combine manual"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--trainable_models", "dit", *flags.split(), "--dry_run"]
    assert main([*GUIDE_COMMAND, *given]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize("name", ["prodigy", "adamw_schedule_free", "muon"])
def test_steps_that_change_one_expert_are_not_for_all(name: str) -> None:
    """Of two experts one rests in each step, which an optimizer with one count of steps cannot know."""
    given = {"lora_base_model": ("dit", "dit2"), "model_paths": ("high", "low")}
    config = config_of(name, **given)
    family = find_family("wanvideo")
    assert family.variant is not None
    model = resolve(config, family.variant(family, config, {"dit": {}, "dit2": {}}))
    if name == "muon":
        check_optimizer(config, model)
    else:
        with pytest.raises(ParameterError, match="a step changes one expert"):
            check_optimizer(config, model)


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    assert main([*GUIDE_COMMAND, "--optimizer", "adamw8bit", "--dry_run"]) == 2
    assert "pip install 'diffsynth-dagster[bitsandbytes]'" in capsys.readouterr().err


@every_optimizer
def test_a_plan_names_the_optimizer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        f"--{key}={json.dumps(value)}"
        for key, value in TABLE[name].items()
        if key != "lr_scheduler"
    ]
    assert main([*GUIDE_COMMAND, "--optimizer", name, *given, "--dry_run", "--no_files"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizer"] == OPTIMIZERS[name].path


@pytest.mark.parametrize(
    "written",
    [
        "betas=0.9,0.99 eps=1e-8 fused=True name=original none=None",
        'betas=[0.9,0.99] eps=1e-8 fused=true name="original" none=null',
        '{"betas": [0.9, "0.99"], "eps": "1e-8", "fused": true, "name": "original", "none": null}',
    ],
)
def test_arguments_may_be_written_in_two_ways(written: str) -> None:
    expected = {"betas": [0.9, 0.99], "eps": 1e-8, "fused": True, "name": "original", "none": None}
    assert (
        TrainingConfig.model_validate({"optimizer_arguments": written}).optimizer_arguments
        == expected
    )
    again = TrainingConfig.model_validate({"optimizer_arguments": expected})
    assert again.optimizer_arguments == expected
