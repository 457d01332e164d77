"""Sample pictures and evaluations during a training, written by the main process."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from PIL import Image

from diffsynth_dagster.cache.row_sets import reduced_family
from diffsynth_dagster.cache.sampled_rows import SampledRows
from diffsynth_dagster.dotted import import_dotted
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.files import write_whole
from diffsynth_dagster.run.events import Sampled
from diffsynth_dagster.training.clips import clip_bytes
from diffsynth_dagster.training.ema import evaluated_weights
from diffsynth_dagster.training.encoded_data import encode_prompts
from diffsynth_dagster.training.sample_inputs import beside, input_pictures
from diffsynth_dagster.training.sampling import Sampler, grid, grid_boxes, strip
from diffsynth_dagster.training.setup import TrainingState
from diffsynth_dagster.training.step import evaluating

COLUMNS = 8
"""Images in a row of a step's picture; fewer if inputs are beside them, or frames of a clip."""


class Pictures:
    """Makes images and clips with the current weights, and writes them to `samples/` in the run
    folder."""

    def __init__(self, training: TrainingState) -> None:
        inputs, self._training = training.inputs, training
        self._config, self._parallel = inputs.config, inputs.parallel
        self._run_file, self._reporter = inputs.run_file, inputs.reporter
        self._module = training.step_module
        self._sampler = Sampler(
            inputs.config, inputs.models, inputs.parallel.autocast, inputs.stop_asked
        )
        self._folder = Path(inputs.config.output_path) / "samples"
        # Sample → its inputs; read once, since they are the same for every step.
        self._inputs: dict[int, list[Image.Image]] = {}

    def sample(self, step: int) -> None:
        """Write one picture with the samples of a step; and each video as a file. Collective: every
        process makes a part of them.

        The picture shows a video as a strip of its frames, and inputs such as the picture to edit
        beside the sample.

        Raises:
            OutputError: the run folder cannot be written.
            Stopped: the run was asked to stop. All samples of the step are made again later.
        """
        rows = self._training.samples.sampled
        if rows is None:
            return
        made: list[tuple[int, Image.Image, bytes | None]] = []
        stopped = False
        parallel = self._parallel
        with evaluated_weights(self._training), evaluating(self._module):
            # The seed of the training in each step, so that pictures differ only by the weights.
            clips = self._sampler.make(
                self._module.loaded,
                rows,
                self._config.seed,
                parallel.process_index,
                parallel.num_processes,
            )
            try:
                for number, clip in clips:
                    # As small as it is shown: all samples are sent to the main process.
                    film = clip_bytes(clip) if len(clip.frames) > 1 else None
                    made.append((number, strip(clip.frames), film))
            except Stopped:
                stopped = True
        if parallel.any(stopped):
            raise Stopped
        everything = sorted(parallel.gathered(made), key=itemgetter(0))
        if parallel.is_main_process:
            self._write_samples(step, rows, everything)

    def _write_samples(
        self, step: int, rows: SampledRows, made: Sequence[tuple[int, Image.Image, bytes | None]]
    ) -> None:
        """Write the samples of a step: of each its number, picture, and video file if it is one."""
        shown: list[Image.Image] = []
        inputs = reduced_family(self._training.inputs.models.resolved.family).file_inputs
        for number, picture, film in made:
            if number not in self._inputs:
                self._inputs[number] = input_pictures(rows, inputs, number)
            with_inputs = beside(picture, self._inputs[number], film is not None)
            shown.append(self._as_before(number, with_inputs))
            # An image is in the picture of the step; a video is also a file of its own.
            if film is not None:
                file = self._folder / f"step-{step}-{number}.mp4"
                write_whole(file, lambda staged, film=film: staged.write_bytes(film))
                self._run_file.filmed(file.stem, file.name)
                self._reporter.report(Sampled(step, str(file)))
        widest = max(image.width for image in shown)
        columns = max(1, min(len(shown), COLUMNS * max(w for w, *_ in rows.sizes) // widest))
        boxes = grid_boxes([image.size for image in shown], columns)
        self._run_file.sampled(
            [{"prompt": p, "box": b} for p, b in zip(rows.prompts, boxes, strict=True)]
        )
        picture = self._write(f"step-{step}", grid(shown, columns))
        self._reporter.report(Sampled(step, str(picture)))

    def _as_before(self, number: int, picture: Image.Image) -> Image.Image:
        """A sample with its inputs, in the size that it had in the steps before. It is smaller if an
        input is gone since; the sample stays where it was, at the right and at the bottom."""
        before = self._run_file.record.shown
        if number >= len(before):
            return picture
        left, top, right, bottom = before[number]["box"]
        free = right - left - picture.width, bottom - top - picture.height
        if free == (0, 0) or min(free) < 0:
            return picture
        sheet = Image.new("RGB", (right - left, bottom - top), "white")
        sheet.paste(picture, free)
        return sheet

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
        inputs = self._training.inputs
        rows = encode_prompts(inputs.config, inputs.models, inputs.manifests.train, prompts)
        with evaluated_weights(self._training), evaluating(self._module):
            clips = self._sampler.make(self._module.loaded, rows, seed)
            # A list, since clips are made lazily and need the averaged weights in place.
            return [strip(clip.frames) for _, clip in clips]

    def _write(self, name: str, picture: Image.Image) -> Path:
        path = self._folder / f"{name}.png"
        write_whole(path, lambda staged: picture.save(staged, format="PNG"))
        self._run_file.pictured(name, path.name)
        return path
