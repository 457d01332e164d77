"""The size and length that a sample is trained at. Pure arithmetic: no file is read."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from diffsynth_dagster.errors import ParameterError

_NEAR_S = 1.5e-3
"""Tolerance in seconds: a frame that begins this little after a moment counts as shown at it,
because files round their times."""


@dataclass(frozen=True)
class FrameRule:
    """The clip lengths that a family takes: n ≡ `remainder` (mod `step`) frames, n >= `least`.

    `least` is above 1 if the model is given the first frame: at least one more must be predicted.
    """

    step: int
    remainder: int
    least: int = 1

    @property
    def smallest(self) -> int:
        """The shortest length."""
        first = self.remainder or self.step  # remainder 0 allows step, 2 step, …, but not 0 frames
        return first + -(-max(0, self.least - first) // self.step) * self.step

    def longest(self, frames: int) -> int:
        """The longest length of at most `frames`; 0 if there is none."""
        length = frames - (frames - self.remainder) % self.step
        return length if length >= self.smallest else 0


@dataclass(frozen=True)
class Geometry:
    """The sizes and lengths that a family takes.

    Attributes:
        side_factor: width and height must be multiples of it, in pixels.
        frames: lengths of a clip; None for a family without videos.
        default_frames: `num_frames` if it is left out.
        default_frame_rate: `frame_rate` if it is left out; None keeps the rate of each clip.
        published_frame_rate: frames per second of the clips that the models were trained on, for
            families whose clips keep their rate. It is used for warnings only.
        sample_size: width and height in pixels of sample pictures, if the training has no fixed
            size.
    """

    side_factor: int
    frames: FrameRule | None = None
    default_frames: int = 81
    default_frame_rate: float | None = None
    sample_size: tuple[int, int] = (1024, 1024)
    published_frame_rate: float | None = None


@dataclass(frozen=True)
class SizeRule:
    """The size of images: `height` and `width` for all, or each its own up to `max_pixels`."""

    height: int | None
    width: int | None
    max_pixels: int
    side_factor: int
    bucket_step: int | None = None

    def target(self, width: int, height: int) -> tuple[int, int]:
        """The trained size of an image.

        The rule is that of DiffSynth-Studio: an image with more than `max_pixels` pixels is scaled
        down to that area (both sides truncated to integers), a smaller one is not enlarged, and
        then each side is floored to a multiple of `side_factor`. With a `bucket_step`, a side of at
        least that many pixels is floored to a multiple of the step instead, so that more images
        have the same size.

        Args:
            width, height: size of the image in pixels, after its orientation is applied.

        Returns:
            (width, height) in pixels. A side is 0 if the image is smaller than the factor.
        """
        if self.height is not None and self.width is not None:
            return self.width, self.height
        if width * height > self.max_pixels:
            scale = (width * height / self.max_pixels) ** 0.5
            width, height = int(width / scale), int(height / scale)
        return self._floored(width), self._floored(height)

    def _floored(self, side: int) -> int:
        step = self.bucket_step
        # A side shorter than the step would be floored to 0 by it.
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
        ParameterError: a side or the `bucket_step` is not a multiple of the family's factor, or
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
    """The size with the given area and the aspect ratio of an image, rounded to the factor.

    The published Qwen-Image-Edit pipelines size their input images this way.

    Returns:
        (width, height) in pixels, each at least the factor.
    """
    wide = (area * width / height) ** 0.5
    tall = wide * height / width
    return max(factor, round(wide / factor) * factor), max(factor, round(tall / factor) * factor)


def cover(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """The size that an image is resized to so that it covers the target, before the centre crop.

    Args:
        width, height: size of the image in pixels.
        target: (width, height) in pixels.
    """
    scale = max(target[0] / width, target[1] / height)
    # Rounding could leave a side one pixel short of the target.
    return max(round(width * scale), target[0]), max(round(height * scale), target[1])


def crop_place(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """Left and top edge, in pixels, of the centre crop of an image that `cover` resized."""
    wide, tall = cover(width, height, target)
    return round((wide - target[0]) / 2), round((tall - target[1]) / 2)


@dataclass(frozen=True)
class ClipRule:
    """Which frames of a clip are trained on: the first `num_frames` at `frame_rate`.

    Attributes:
        frame_rate: frames per second that clips are resampled to; None keeps the rate of each clip.
    """

    num_frames: int
    frame_rate: float | None
    rule: FrameRule

    def clip(self, frames: int, rate: float | None) -> tuple[int, float]:
        """How much of a clip with evenly spaced frames is trained on: see `taken`.

        Returns:
            (trained frames, stride): see `frame_indices`.
        """
        return len(self.taken(frames, rate)), self.stride(rate)

    def stride(self, rate: float | None) -> float:
        """Average number of frames of the file for each frame that is taken."""
        return rate / self.frame_rate if rate is not None and self.frame_rate else 1.0

    def taken(
        self, frames: int, rate: float | None, times: Sequence[float] | None = None
    ) -> list[int]:
        """Which frames of a clip are trained on.

        Args:
            frames: how many frames the file has.
            rate: its frames per second; None for a still image, which has one frame and no rate.
            times: for unevenly spaced frames: the seconds at which each frame is shown, counted
                from the first, followed by the end of the last frame.

        Returns:
            The numbers of the frames, as many as the family takes of a file of this length; empty
            if the file is too short.
        """
        if times is not None and self.frame_rate:
            found = frames_at(times, self.frame_rate, self.num_frames)
        else:
            # One more than the division gives, since it may round down; excess is dropped below.
            most = min(int(frames / self.stride(rate)) + 1, self.num_frames)
            indices = frame_indices(most, self.stride(rate))
            found = [index for index in indices if index < frames]
        return found[: self.rule.longest(len(found))]


def frame_indices(count: int, stride: float) -> list[int]:
    """Which frames of an evenly spaced clip are taken: those shown at the moments of the new rate.

    Args:
        count: how many frames are taken.
        stride: frames of the file for each frame that is taken; 1 takes every frame.
    """
    # 1e-6 is for products such as 2.9999999 that stand for 3.
    return [int(index * stride + 1e-6) for index in range(count)]


def frames_at(times: Sequence[float], rate: float, most: int) -> list[int]:
    """Which frames of an unevenly spaced clip are taken: those shown at the moments of the new rate.

    Args:
        times: when each frame is shown, and when the last one ends, in seconds; see
            `ClipRule.taken`.
        rate: frames per second that are taken.
        most: upper bound of the number of frames.
    """
    last = len(times) - 2  # the final time is the end of the clip, not a frame
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
        # The message suggests the nearest valid length below, and the one after it.
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
