"""The processes of a training, their devices, and how they share the work of a step.

Beside `training.join`, which makes a `Parallel`, and `run.trackers`, this is the one module that knows
accelerate, DDP and DeepSpeed. Everything else asks `Parallel`, and reads the same for one process on a CPU as for many GPUs on several machines.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import EXIT_USER_ERROR, ParameterError, UserError
from diffsynth_dagster.run.trackers import Trackers
from diffsynth_dagster.training.randomness import random_state, set_random_state

T = TypeVar("T")


class Parallel:
    """The processes of a training as one of them sees them.

    A **collective** method waits for all processes: every one of them must call it.

    Attributes:
        device: that this process computes on.
        process_index: of this process in the whole job, from 0.
        num_processes: of the whole job, over all machines (nodes).
        is_main_process: whether this is the one process of the job that writes and reports.
        is_node_main: whether this is the first process of its node.
        mixed_precision: "no", "bf16" or "fp16".
        trackers: those that the config switches on (TensorBoard, W&B, …), if any.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device = accelerator.device
        self.process_index: int = accelerator.process_index
        self.num_processes: int = accelerator.num_processes
        self.is_main_process: bool = accelerator.is_main_process
        self.is_node_main: bool = accelerator.is_local_main_process
        self.mixed_precision: str = accelerator.mixed_precision
        self.trackers = Trackers(accelerator) if accelerator.log_with else None
        self._uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def dtype(self) -> torch.dtype:
        """Element type of frozen weights: that of the computation."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.mixed_precision, torch.float32)

    @property
    def trained_dtype(self) -> torch.dtype:
        """Element type of weights that are trained as a whole.

        DeepSpeed itself holds float32 copies of them, in pieces.
        """
        return self.dtype if self._uses_deepspeed else torch.float32

    @property
    def runs_behind(self) -> bool:
        """Whether the device works behind this process, which must not wait for every step of it."""
        return self.device.type == "cuda"

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step changed nothing, because float16 was too small for the
        gradients."""
        return self._accelerator.optimizer_step_was_skipped

    def seed(self, seed: int) -> None:
        """Seed the global random numbers of Python, numpy and torch, on every device."""
        set_seed(seed % 2**32)  # numpy takes no more

    def wait_for_everyone(self) -> None:
        """Wait until every process is here. Collective."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def node_main_first(self) -> Generator[None]:
        """Enter by turns: the main process, the first of every other node, then all the others.

        Collective. So what the first of a node downloads or finds out is there for the others of
        its node. The main process goes before the other nodes because these may share its file
        system, and a hub's client or a user's own function may not expect that another process
        writes the same files at the same time.
        """
        turn = 0 if self.is_main_process else 1 if self.is_node_main else 2
        for _ in range(turn):
            self.wait_for_everyone()
        yield
        for _ in range(turn, 2):
            self.wait_for_everyone()

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on every process. Collective.

        Where it raises a `UserError`, that is the main process's to report: the others end.
        """
        made: list[Any] = [None, True]
        if self.is_main_process:
            try:
                made = [make(), False]
            except UserError:
                broadcast_object_list(made)
                raise
        value, failed = broadcast_object_list(made)
        if failed:
            raise SystemExit(EXIT_USER_ERROR)
        return cast(T, value)

    def device_names(self) -> list[str]:
        """Names of the devices of all processes. Collective."""
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else self.device.type
        return gather_object([name])

    @property
    def synchronises_gradients(self) -> bool:
        """Whether gradients are averaged over processes by DDP, which must know before the first step
        which parameters get one."""
        return self.num_processes > 1 and not self._uses_deepspeed

    def expect_gradients(self, module: nn.Module, got_one: Mapping[str, bool] | None) -> None:
        """Say which parameters get a gradient in a step; before `prepare`. Collective.

        Args:
            got_one: name of a trained parameter in `module` → whether it got a gradient from a batch
                of this process; None where that is not the same in every step.
        """
        everywhere = [] if got_one is None else gather_object([dict(got_one)])
        counts = {n: sum(here[n] for here in everywhere) for n in got_one or {}}
        if got_one is None or any(0 < count < len(everywhere) for count in counts.values()):
            # Looked for in every step, which takes some milliseconds.
            handler = self._accelerator.ddp_handler
            assert handler is not None, "start_parallel gives one"
            handler.find_unused_parameters = True
        for name, parameter in module.named_parameters():
            if counts.get(name) == 0:
                parameter.requires_grad_(False)  # nothing reaches it, so that nothing changes

    def prepare(
        self, config: TrainingConfig, module: nn.Module, optimizer: Optimizer
    ) -> tuple[nn.Module, Optimizer]:
        """The module and the optimizer as they are used in a step of all processes. Collective."""
        if self._uses_deepspeed:
            self._configure_deepspeed(config)
        return self._accelerator.prepare(module, optimizer)

    def _configure_deepspeed(self, config: TrainingConfig) -> None:
        """What DeepSpeed would ask a data loader for, and the clipping, which it does itself."""
        plugin = self._accelerator.state.deepspeed_plugin
        assert plugin is not None
        settings = plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        if config.customized_optimizer is not None or config.optimizer != "adamw":
            # Or it would be replaced by DeepSpeed's own where its state lies in CPU memory.
            settings["zero_force_ds_cpu_optimizer"] = False
        if config.max_grad_norm is not None:
            settings["gradient_clipping"] = config.max_grad_norm
        elif settings.get("gradient_clipping", "auto") == "auto":
            settings["gradient_clipping"] = 0.0  # accelerate would clip at 1

    def let_go(self) -> None:
        """Hold the prepared module and optimizer no longer, after the last step."""
        self._accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[None]:
        """Entered around a computation with trained modules, to compute in mixed precision."""
        return self._accelerator.autocast()

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Generator[None]:
        """Entered around the forward and backward pass of a micro-batch.

        Args:
            model: as `prepare` returned it.
            last: whether it is the last micro-batch of the optimizer step: gradients are summed
                over the processes in its backward pass, once for the whole step.

        Raises:
            ParameterError: a trained parameter gets no gradient, and DDP does not expect that.
        """
        self._accelerator.sync_gradients = last
        try:
            if last:
                yield
            else:
                with self._accelerator.no_sync(model):
                    yield
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            raise ParameterError(
                "some trained parameters get no gradient in this step, but did in the first one",
                where="find_unused_parameters",
                do="give find_unused_parameters",
            ) from error

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss () to those of the optimizer step."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
        """Clip the gradients to a norm, if one is given; returns their norm () before, on the device."""
        limit = float("inf") if max_norm is None else max_norm
        before = self._accelerator.clip_grad_norm_(parameters, limit)
        return torch.as_tensor(0.0 if before is None else before, device=self.device).float()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Means of numbers (…) over the processes, on the device. Collective."""
        reduced: Any = self._accelerator.reduce(values, "mean")
        return reduced

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the CPU over the processes, as a new one on the CPU. Collective."""
        if self.num_processes == 1:
            return values.clone()
        reduced: Any = self._accelerator.reduce(values.to(self.device), "sum")
        return reduced.cpu()

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes, those of the first one first. Collective."""
        return gather_object(values)

    def trained(self, model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """What of the prepared module is trained, by the names in the module given to `prepare`."""
        parameters = dict(self._module(model).named_parameters())
        return {name: parameters[name] for name in names}

    def _module(self, model: nn.Module) -> nn.Module:
        return self._accelerator.unwrap_model(model, keep_torch_compile=False)

    def whole_weights(
        self, model: nn.Module, names: Iterable[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and copies of trained weights, each one whole and in CPU memory, one after the other.
        Collective: every process goes through all of them; the main process alone is handed any.

        Every process holds its weights whole (see `start_parallel`). Where weights will be
        partitioned, this is the place that gathers them.
        """
        for name, parameter in self.trained(model, names).items():
            if self.is_main_process:
                yield name, parameter.detach().to("cpu", copy=True).contiguous()

    @property
    def updates_whole_tensors(self) -> bool:
        """Whether an optimizer step changes the parameters of the module themselves: DeepSpeed gives
        the optimizer flat pieces of copies of them."""
        return not self._uses_deepspeed

    @property
    def can_save_state(self) -> bool:
        """Whether `state` has all that goes on from step to step: DeepSpeed keeps that in parts."""
        return not self._uses_deepspeed

    def any(self, here: bool) -> bool:
        """Whether something is so on any process. Collective."""
        if self.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        reduced: Any = self._accelerator.reduce(flag, "sum")
        return bool(reduced)

    def state(self, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
        """What the next steps depend on beside the weights: the states of the optimizer, of the
        learning rate, of the scale of float16, and of the random numbers of every process.
        Collective."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_state(self.device)]),
        }

    def load_state(
        self,
        model: nn.Module,
        weights: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        optimizer: Optimizer,
        schedule: LRScheduler,
    ) -> None:
        """Bring a prepared training to where it was, but for the random numbers: see `load_random`.

        Args:
            weights: name → trained weight: see `whole_weights`.
            state: what `state` gave.

        Raises:
            ValueError: the state is that of another optimizer.
        """
        with torch.no_grad():
            for name, parameter in self.trained(model, weights).items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def load_random(self, states: Sequence[Any]) -> None:
        """Give this process its random numbers back, if as many processes wrote the state.

        Args:
            states: the random numbers of each of them.
        """
        if len(states) == self.num_processes:
            set_random_state(states[self.process_index], self.device)

    def tensors_from_main(self, path: Path) -> dict[str, torch.Tensor]:
        """The tensors of a file that the main process sees, in CPU memory of every process, one after the
        other. Collective."""
        if self.num_processes == 1:
            return load_file(path)
        found = load_file(path) if self.is_main_process else {}
        kinds = self.from_main(lambda: [(n, t.shape, t.dtype) for n, t in found.items()])
        for name, shape, dtype in kinds:
            tensor = found[name] if name in found else torch.empty(shape, dtype=dtype)
            # As bytes, since not every way between processes takes every type.
            sent: Any = broadcast(tensor.reshape(-1).view(torch.uint8).to(self.device))
            if not self.is_main_process:
                found[name] = sent.cpu().view(dtype).reshape(shape)
        return found
