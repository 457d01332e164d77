"""Sample pictures and evaluations during a training, made and written by the main process."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.families.contract import Clip
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.run.events import Sampled
from diffsynth_dagster.training.clips import write_clip
from diffsynth_dagster.training.ema import evaluated_weights
from diffsynth_dagster.training.sampling import Sampler, grid, grid_boxes, strip
from diffsynth_dagster.training.setup import TrainingState
from diffsynth_dagster.training.step import evaluating

COLUMNS = 8
"""Images in a row of a step's picture."""


class Pictures:
    """Makes images and clips with the current weights, and writes them to `samples/` in the run
    folder."""

    def __init__(self, training: TrainingState) -> None:
        inputs, self._training = training.inputs, training
        self._config, self._parallel = inputs.config, inputs.parallel
        self._run_file, self._reporter = inputs.run_file, inputs.reporter
        self._module = training.step_module
        self._sampler = Sampler(
            inputs.config,
            inputs.manifest,
            inputs.models,
            inputs.parallel.autocast,
            inputs.stop_asked,
        )
        self._folder = Path(inputs.config.output_path) / "samples"

    def sample(self, step: int) -> None:
        """Write one picture with an image for each of `sample_prompts`, or each row of the table
        that it names; and each video as a file. Collective.

        The picture shows a video as a strip of its frames.

        Raises:
            OutputError: the run folder cannot be written.
            Stopped: the run was asked to stop. All samples of the step are made again later.
        """
        # Other processes need not load a decoder: one makes all pictures.
        if self._config.sample_prompts:
            self._on_main(lambda: self._sample(step))

    def _sample(self, step: int) -> None:
        images: list[Image.Image] = []
        with evaluated_weights(self._training), evaluating(self._module):
            # The seed of the training in each step, so that pictures differ only by the weights.
            clips = self._sampler.named(self._module.loaded, self._config.seed)
            for index, clip in enumerate(clips):
                images.append(strip(clip.frames))
                # An image is in the picture of the step; a video is also a file of its own.
                if len(clip.frames) > 1:
                    file = self._write_clip(f"step-{step}-{index}", clip)
                    self._reporter.report(Sampled(step, str(file)))
        columns = min(COLUMNS, len(images))
        boxes = grid_boxes([image.size for image in images], columns)
        prompts = self._sampler.prompts
        self._run_file.sampled(
            [{"prompt": p, "box": b} for p, b in zip(prompts, boxes, strict=True)]
        )
        picture = self._write(f"step-{step}", grid(images, columns))
        self._reporter.report(Sampled(step, str(picture)))

    def evaluate(self, when: str) -> None:
        """Call `customized_evaluation`, and record its result under `when`. Collective.

        Args:
            when: "before" or "after" the training.

        Raises:
            OutputError, Stopped: see `sample`.
        """
        dotted = self._config.customized_evaluation
        if dotted is not None:
            self._on_main(lambda: self._evaluate(dotted, when))

    def _evaluate(self, dotted: str, when: str) -> None:
        evaluation = import_dotted(dotted, "customized_evaluation")(self._generate)
        self._run_file.evaluated(when, evaluation.metrics)
        for name, picture in evaluation.pictures.items():
            self._write(f"{when}-{name}", picture)

    def _on_main(self, make: Callable[[], None]) -> None:
        """Let the main process make something while the others wait. If it is stopped, all of them
        are. Collective."""
        stopped = False
        if self._parallel.is_main_process:
            try:
                make()
            except Stopped:
                stopped = True
        # The others learn of a stop here, and so wait until the main process is done.
        if self._parallel.any(stopped):
            raise Stopped

    def _generate(self, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """Given to a user's evaluation; see `sampling.Generate`."""
        with evaluated_weights(self._training), evaluating(self._module):
            clips = self._sampler(self._module.loaded, prompts, seed)
            # A list, since clips are made lazily and need the averaged weights in place.
            return [strip(clip.frames) for clip in clips]

    def _write(self, name: str, picture: Image.Image) -> Path:
        path = self._folder / f"{name}.png"
        write_whole(path, lambda staged: picture.save(staged, format="PNG"))
        self._run_file.pictured(name, path.name)
        return path

    def _write_clip(self, name: str, clip: Clip) -> Path:
        path = write_clip(self._folder / f"{name}.mp4", clip)
        self._run_file.filmed(name, path.name)
        return path
