"""The size and length that a sample is trained at. Pure numbers: no file is needed to know them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from diffsynth_dagster.errors import ParameterError

_NEAR_S = 1.5e-3
"""A frame that begins so little after a moment is the one that is shown then: times are rounded."""


@dataclass(frozen=True)
class FrameRule:
    """The lengths that a family takes: n ≡ `remainder` (mod `step`) frames, `least` or more.

    `least` is above 1 where the first frame of a clip is given: one must follow that is predicted.
    """

    step: int
    remainder: int
    least: int = 1

    @property
    def smallest(self) -> int:
        """The shortest length."""
        first = self.remainder or self.step
        return first + -(-max(0, self.least - first) // self.step) * self.step

    def longest(self, frames: int) -> int:
        """The longest length of at most `frames`; 0 when there is none."""
        length = frames - (frames - self.remainder) % self.step
        return length if length >= self.smallest else 0


@dataclass(frozen=True)
class Geometry:
    """What a family takes.

    Attributes:
        side_factor: both sides are multiples of it, in pixels.
        frames: lengths of a clip; None for a family without videos.
        default_frames: `num_frames` when it is left out.
        default_frame_rate: `frame_rate` when it is left out; None keeps each clip's own.
        published_frame_rate: where each clip keeps its own: frames per second of the clips that the
            models were trained on. It changes nothing, and is there for warnings.
        sample_size: width and height in pixels of what is made as a sample, where a training has no
            fixed size.
    """

    side_factor: int
    frames: FrameRule | None = None
    default_frames: int = 81
    default_frame_rate: float | None = None
    sample_size: tuple[int, int] = (1024, 1024)
    published_frame_rate: float | None = None


@dataclass(frozen=True)
class SizeRule:
    """The size asked for: fixed (height and width), or each image's own below `max_pixels`."""

    height: int | None
    width: int | None
    max_pixels: int
    side_factor: int
    bucket_step: int | None = None

    def target(self, width: int, height: int) -> tuple[int, int]:
        """The trained size of an image.

        An image with more than `max_pixels` pixels is scaled down to that area (both sides
        truncated to integers), then each side is floored to the factor; a smaller one is not
        enlarged. The rule of DiffSynth-Studio. With a `bucket_step`, a side of at least that many
        pixels is floored to a multiple of it, so that more images have the same size.

        Args:
            width, height: size of the image in pixels, after its orientation is applied.

        Returns:
            (width, height) in pixels. A side is 0 when the image is smaller than the factor.
        """
        if self.height is not None and self.width is not None:
            return self.width, self.height
        if width * height > self.max_pixels:
            scale = (width * height / self.max_pixels) ** 0.5
            width, height = int(width / scale), int(height / scale)
        return self._floored(width), self._floored(height)

    def _floored(self, side: int) -> int:
        step = self.bucket_step
        factor = step if step is not None and side >= step else self.side_factor
        return side // factor * factor


def size_rule(
    height: int | None,
    width: int | None,
    max_pixels: int,
    geometry: Geometry,
    bucket_step: int | None = None,
) -> SizeRule:
    """Check the size parameters against what the family takes.

    Raises:
        ParameterError: a side or the `bucket_step` is no multiple of the family's factor, or
            `max_pixels` is smaller than the smallest image.
    """
    factor = geometry.side_factor
    for name, side in (("height", height), ("width", width), ("bucket_step", bucket_step)):
        if side is not None and side % factor:
            near = max(factor, round(side / factor) * factor)
            raise ParameterError(
                f"{name} = {side} is not a multiple of {factor}", where=name, do=f"{near} is"
            )
    if max_pixels < factor * factor:
        raise ParameterError(
            f"max_pixels = {max_pixels} is less than the smallest image of {factor}x{factor}",
            where="max_pixels",
            do=f"give at least {factor * factor}",
        )
    return SizeRule(height, width, max_pixels, factor, bucket_step)


def area_size(width: int, height: int, area: int, factor: int = 32) -> tuple[int, int]:
    """The size of this area with the aspect of an image, both sides rounded to the factor.

    How the published Qwen-Image-Edit pipelines size the images that they are given.

    Returns:
        (width, height) in pixels, each at least the factor.
    """
    wide = (area * width / height) ** 0.5
    tall = wide * height / width
    return max(factor, round(wide / factor) * factor), max(factor, round(tall / factor) * factor)


def cover(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """The size that an image is resized to so that it covers the target, before the centre crop."""
    scale = max(target[0] / width, target[1] / height)
    return max(round(width * scale), target[0]), max(round(height * scale), target[1])


def crop_place(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """Left and top edge, in pixels, of what is cropped from an image after it was resized by
    `cover`: the centre."""
    wide, tall = cover(width, height, target)
    return round((wide - target[0]) / 2), round((tall - target[1]) / 2)


@dataclass(frozen=True)
class ClipRule:
    """Which frames of a clip are trained on: the first `num_frames`, taken at `frame_rate`.

    Attributes:
        frame_rate: frames per second that clips are resampled to; None keeps each clip's own.
    """

    num_frames: int
    frame_rate: float | None
    rule: FrameRule

    def clip(self, frames: int, rate: float | None) -> tuple[int, float]:
        """How much of a clip is trained on whose frames are shown evenly: see `taken`.

        Returns:
            (trained frames, stride): see `frame_indices`.
        """
        return len(self.taken(frames, rate)), self.stride(rate)

    def stride(self, rate: float | None) -> float:
        """How many frames of a file there are for each one that is taken, on average."""
        return rate / self.frame_rate if rate is not None and self.frame_rate else 1.0

    def taken(
        self, frames: int, rate: float | None, times: Sequence[float] | None = None
    ) -> list[int]:
        """Which frames of a clip are trained on.

        Args:
            frames: how many frames the file has.
            rate: its frames per second; None for a still image, which is one frame of any rate.
            times: where frames are not shown evenly, the seconds at which each is shown, counted from
                the first, and at which the last one ends.

        Returns:
            As many as the longest clip that the family takes; none where the file is too short for
            any.
        """
        if times is not None and self.frame_rate:
            found = frames_at(times, self.frame_rate, self.num_frames)
        else:
            most = min(int(frames / self.stride(rate)) + 1, self.num_frames)
            indices = frame_indices(most, self.stride(rate))
            found = [index for index in indices if index < frames]
        return found[: self.rule.longest(len(found))]


def frame_indices(count: int, stride: float) -> list[int]:
    """Which frames of a file are taken: for each moment of the new rate, the one shown then.

    Args:
        count: how many are taken.
        stride: frames of the file for each one taken; 1 takes every one.
    """
    return [int(index * stride + 1e-6) for index in range(count)]


def frames_at(times: Sequence[float], rate: float, most: int) -> list[int]:
    """Which frames of a file are taken: for each moment of the new rate, the one that is shown then.

    Args:
        times: at which the frames are shown, and the last one ends, in seconds; see `ClipRule.taken`.
        rate: frames per second that are taken.
        most: no more than so many.
    """
    last = len(times) - 2
    moments = (index / rate for index in range(most))
    shown = (bisect_right(times, moment + _NEAR_S) - 1 for moment in moments)
    return [index for index in shown if index <= last]


def clip_rule(
    num_frames: int | None, frame_rate: float | None, geometry: Geometry, family: str
) -> ClipRule | None:
    """Check the length parameters against what the family takes.

    Returns:
        None for a family without videos.

    Raises:
        ParameterError: the family has no videos, or takes no clip of this length.
    """
    rule = geometry.frames
    if rule is None:
        for name, value in (("num_frames", num_frames), ("frame_rate", frame_rate)):
            if value is not None:
                raise ParameterError(
                    f"{name} = {value} is given, but {family} is trained on images",
                    where=name,
                    do=f"leave {name} out",
                )
        return None
    count = geometry.default_frames if num_frames is None else num_frames
    if count < rule.smallest or rule.longest(count) != count:
        below = rule.longest(count) or rule.smallest
        raise ParameterError(
            f"num_frames = {count} is no length that {family} takes: {_unfit(count, rule)}"
            if rule.remainder
            else f"num_frames = {count} is not a multiple of {rule.step}, as {family} needs",
            where="num_frames",
            do=f"{below} is, or {below + rule.step}",
        )
    return ClipRule(count, frame_rate or geometry.default_frame_rate, rule)


def _unfit(count: int, rule: FrameRule) -> str:
    if count % rule.step == rule.remainder:
        return f"the shortest clip has {rule.smallest} frames"
    return f"it is not {rule.remainder} more than a multiple of {rule.step}"
