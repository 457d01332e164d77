"""The encoded rows that samples are made from, by the number of the sample."""

from collections.abc import Sequence

from diffsynth_dagster.cache.manifest import Manifest
from diffsynth_dagster.cache.resolve import Sample, Samples
from diffsynth_dagster.data.columns import CAPTION, Input
from diffsynth_dagster.data.samples import Files, files_of
from diffsynth_dagster.data.table.checked_table import PINNED, read_checked


class SampledRows:
    """The row set `samples`, or a set of prompts, with what is encoded of it.

    Args:
        manifest: of the row set. With guidance it has each row a second time, with the negative
            prompt; see `row_sets.write_samples_table`.
        samples: where its rows are stored.

    Attributes:
        samples: see above.
        sizes: width, height and frames of each sample.
        prompts: the prompt of each sample.
    """

    def __init__(self, manifest: Manifest, samples: Samples) -> None:
        self.samples = samples
        self._table = read_checked(manifest.folder, PINNED).rows.sort("row").collect()
        guided = manifest.made_of["negative_prompt"] is not None
        self._count = self._table.height // 2 if guided else self._table.height
        sizes = self._table.select("width", "height", "frames").head(self._count)
        self.sizes: Sequence[tuple[int, int, int]] = sizes.rows()
        self.prompts: Sequence[str] = self._table[CAPTION].head(self._count).to_list()
        places = [(b, i) for b, size in enumerate(samples.buckets) for i in range(size)]
        self._places = {samples.at(*place).row: place for place in places}

    def __len__(self) -> int:
        return self._count

    def bucket(self, number: int) -> int:
        """The bucket of a sample: samples of a bucket are of one shape."""
        return self._places[number + 1][0]

    def at(self, number: int) -> Sample:
        """The row of a sample, counted from 0."""
        return self.samples.at(*self._places[number + 1])

    def unprompted(self, number: int) -> Sample:
        """The row of a sample with the negative prompt, which guidance has."""
        return self.at(number + self._count)

    def files(self, number: int, item: Input) -> Files:
        """The files that the row of a sample names in a column; see `data.samples`."""
        return files_of(self._table.row(number, named=True), item)
