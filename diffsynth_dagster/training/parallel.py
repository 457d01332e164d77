"""The processes of a training, their devices, and how they share the work of a step.

Besides `training.join`, which makes a `Parallel`, and `run.trackers`, this is the only module that
knows accelerate, DDP and DeepSpeed. All other code asks `Parallel`, and reads the same for one
process on a CPU as for many GPUs on several machines.
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
    """The processes of a training, as seen by one of them.

    A **collective** method waits for all processes: every one of them must call it.

    Attributes:
        device: where this process computes.
        process_index: number of this process in the whole job, from 0.
        num_processes: of the whole job, on all machines (nodes).
        is_main_process: whether this is the one process of the job that writes and reports.
        is_node_main: whether this is the first process of its node.
        mixed_precision: "no", "bf16" or "fp16".
        trackers: TensorBoard, W&B and others that the config switches on; None if there are none.
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
        """Element type of frozen weights: the type that is computed in."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.mixed_precision, torch.float32)

    @property
    def trained_dtype(self) -> torch.dtype:
        """Element type of fully trained weights.

        DeepSpeed keeps its own float32 copies of them, in pieces.
        """
        return self.dtype if self._uses_deepspeed else torch.float32

    @property
    def runs_behind(self) -> bool:
        """Whether the device works asynchronously: this process should not wait for each step."""
        return self.device.type == "cuda"

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last optimizer step was skipped because gradients overflowed in float16."""
        return self._accelerator.optimizer_step_was_skipped

    def seed(self, seed: int) -> None:
        """Seed the global random numbers of Python, numpy and torch, on every device."""
        set_seed(seed % 2**32)  # numpy takes 32 bits

    def wait_for_everyone(self) -> None:
        """Wait until every process is here. Collective."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def node_main_first(self) -> Generator[None]:
        """Enter in turns: the main process, the first process of every other node, then all the
        others.

        Collective. What the first process of a node downloads or computes is there when the others
        enter. The main process goes before the other nodes because they may share a file system,
        and a hub's client or a user's function may not expect that another process writes the same
        files at the same time.
        """
        # Every process waits twice in all, so that the waits of all of them match.
        turn = 0 if self.is_main_process else 1 if self.is_node_main else 2
        for _ in range(turn):
            self.wait_for_everyone()
        yield
        for _ in range(turn, 2):
            self.wait_for_everyone()

    def from_main(self, make: Callable[[], T]) -> T:
        """The result of `make` on the main process, handed to every process. Collective.

        If it raises a `UserError`, the main process raises that, and the others exit.
        """
        made: list[Any] = [None, True]  # the result, and whether it failed
        if self.is_main_process:
            try:
                made = [make(), False]
            except UserError:
                # The others wait for a result: tell them that there is none.
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
        """Whether DDP averages the gradients over the processes. It must know before the first step
        which parameters get a gradient."""
        return self.num_processes > 1 and not self._uses_deepspeed

    def expect_gradients(self, module: nn.Module, got_one: Mapping[str, bool] | None) -> None:
        """Tell DDP which parameters get a gradient in a step; to be called before `prepare`.
        Collective.

        Args:
            got_one: name of a trained parameter in `module` → whether it got a gradient from a
                batch of this process; None if that differs from step to step.
        """
        everywhere = [] if got_one is None else gather_object([dict(got_one)])
        counts = {n: sum(here[n] for here in everywhere) for n in got_one or {}}
        if got_one is None or any(0 < count < len(everywhere) for count in counts.values()):
            # DDP then searches for unused parameters in every step, which takes milliseconds.
            handler = self._accelerator.ddp_handler
            assert handler is not None, "start_parallel gives one"
            handler.find_unused_parameters = True
        for name, parameter in module.named_parameters():
            if counts.get(name) == 0:
                parameter.requires_grad_(False)  # no loss depends on it, so it would not change

    def prepare(
        self, config: TrainingConfig, module: nn.Module, optimizer: Optimizer
    ) -> tuple[nn.Module, Optimizer]:
        """Wrap the module and the optimizer for steps of all processes together. Collective."""
        if self._uses_deepspeed:
            self._configure_deepspeed(config)
        return self._accelerator.prepare(module, optimizer)

    def _configure_deepspeed(self, config: TrainingConfig) -> None:
        """Set what DeepSpeed would read from a data loader, and the clipping, which it does
        itself."""
        plugin = self._accelerator.state.deepspeed_plugin
        assert plugin is not None
        settings = plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        if config.customized_optimizer is not None or config.optimizer != "adamw":
            # Otherwise DeepSpeed insists on its own AdamW when the state is in CPU memory.
            settings["zero_force_ds_cpu_optimizer"] = False
        if config.max_grad_norm is not None:
            settings["gradient_clipping"] = config.max_grad_norm
        elif settings.get("gradient_clipping", "auto") == "auto":
            settings["gradient_clipping"] = 0.0  # accelerate would set 1

    def let_go(self) -> None:
        """Release the prepared module and optimizer after the last step."""
        self._accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[None]:
        """Entered around a computation with trained modules, to compute in mixed precision."""
        return self._accelerator.autocast()

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Generator[None]:
        """Entered around the forward and backward pass of a micro-batch.

        Args:
            model: as `prepare` returned it.
            last: whether it is the last micro-batch of the optimizer step. Its backward pass
                reduces the gradients over the processes, once for the whole step.

        Raises:
            ParameterError: a trained parameter gets no gradient, although DDP expects one.
        """
        # accelerate derives this from its own data loaders, which are not used here.
        self._accelerator.sync_gradients = last
        try:
            if last:
                yield
            else:
                with self._accelerator.no_sync(model):
                    yield
        except RuntimeError as error:
            # DDP tells this error from others only by its text.
            if "find_unused_parameters" not in str(error):
                raise
            raise ParameterError(
                "some trained parameters get no gradient in this step, but did in the first one",
                where="find_unused_parameters",
                do="give find_unused_parameters",
            ) from error

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss () to the gradients of the optimizer step."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
        """Clip the gradients to a norm, if given; returns their norm () before, on the device."""
        limit = float("inf") if max_norm is None else max_norm
        # With DeepSpeed, which clips by itself: its norm, or None if it knows none.
        before = self._accelerator.clip_grad_norm_(parameters, limit)
        return torch.as_tensor(0.0 if before is None else before, device=self.device).float()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor (…) over the processes, on the device. Collective."""
        reduced: Any = self._accelerator.reduce(values, "mean")
        return reduced

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor over the processes, as a new CPU tensor. Collective."""
        if self.num_processes == 1:
            return values.clone()
        reduced: Any = self._accelerator.reduce(values.to(self.device), "sum")
        return reduced.cpu()

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes, in the order of the processes. Collective."""
        return gather_object(values)

    def trained(self, model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Trained parameters of the prepared module, by their names before `prepare`."""
        parameters = dict(self._module(model).named_parameters())
        return {name: parameters[name] for name in names}

    def _module(self, model: nn.Module) -> nn.Module:
        return self._accelerator.unwrap_model(model, keep_torch_compile=False)

    def whole_weights(
        self, model: nn.Module, names: Iterable[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the trained weights one after the other: name and a whole copy in CPU memory.

        Collective: every process must iterate to the end, but only the main process gets weights.
        Today every process holds all weights whole (see `start_parallel`). If they are partitioned
        one day, they are to be gathered here.
        """
        for name, parameter in self.trained(model, names).items():
            if self.is_main_process:
                yield name, parameter.detach().to("cpu", copy=True).contiguous()

    @property
    def updates_whole_tensors(self) -> bool:
        """Whether the optimizer updates the parameters of the module themselves. With DeepSpeed it
        gets flat pieces of copies of them."""
        return not self._uses_deepspeed

    @property
    def can_save_state(self) -> bool:
        """Whether `state` is complete. DeepSpeed keeps the optimizer's state in parts."""
        return not self._uses_deepspeed

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any process. Collective."""
        if self.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        reduced: Any = self._accelerator.reduce(flag, "sum")
        return bool(reduced)

    def state(self, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
        """What the next steps depend on besides the weights: the states of the optimizer, the
        learning-rate schedule, the loss scaler of float16, and every process's random numbers.
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
        """Restore a prepared training, except for its random numbers: see `load_random`.

        Args:
            weights: name → trained weight: see `whole_weights`.
            state: as `state` returned it.

        Raises:
            ValueError: the state belongs to another optimizer.
        """
        with torch.no_grad():
            for name, parameter in self.trained(model, weights).items():
                parameter.copy_(weights[name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def load_random(self, states: Sequence[Any]) -> None:
        """Restore the random numbers of this process, if as many processes wrote the state.

        Args:
            states: the random numbers of each process that wrote it.
        """
        if len(states) == self.num_processes:
            set_random_state(states[self.process_index], self.device)

    def tensors_from_main(self, path: Path) -> dict[str, torch.Tensor]:
        """The tensors of a file, in CPU memory of every process. Only the main process reads the
        file; it sends the tensors one by one. Collective."""
        if self.num_processes == 1:
            return load_file(path)
        tensors = load_file(path) if self.is_main_process else {}
        layout = self.from_main(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()])
        for name, shape, dtype in layout:
            tensor = tensors[name] if name in tensors else torch.empty(shape, dtype=dtype)
            # As bytes: not every backend sends every element type.
            sent: Any = broadcast(tensor.reshape(-1).view(torch.uint8).to(self.device))
            if not self.is_main_process:
                tensors[name] = sent.cpu().view(dtype).reshape(shape)
        return tensors
