"""Which images a row holds, at which patch scale; the training stream of images.

A row has a budget of tokens. An image of H x W pixels takes (H / (p s)) * (W / (p s)) of them at
patch scale s, p being the base patch, and a video as many for each patch of frames. Row r belongs
to lane r mod lanes; a lane draws images and scales by itself and fills one row after the other, so
the stream is a pure function of (data fingerprint, seed, row number), for any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trinity.core.draws import Stream, generator_for
from trinity.core.errors import ConfigError, DataError
from trinity.core.images_config import ImagesConfig
from trinity.data.build import HELD_OUT, TRAIN
from trinity.data.images import Condition, ImageDataset
from trinity.data.pack import permuted, stream_key
from trinity.data.row_stream import RowStream, State


class Planned(NamedTuple):
    """An image's place in a row, before it is read."""

    number: int
    """Of the image, in its split."""
    epoch: int
    """How often its source had been gone through before."""
    scale: int
    """Edge of its patches, in base patches."""
    flipped: bool


class Placed(NamedTuple):
    """An image in a row."""

    number: int
    """Of the image, in its split."""
    epoch: int
    scale: int
    """Edge of its patches, in base patches."""
    condition: Condition
    """Class (-1: none), or embedding, float32 (width,)."""
    pixels: Tensor
    """float32 (C, H, W) or (C, T, H, W)."""


class ImageRows(NamedTuple):
    """What a process was given."""

    rows: list[list[Placed]]
    """Images of each row, in order."""
    row_numbers: list[int]
    """Of each row, in the global stream: noise is drawn by them."""


def tokens_at_scale(
    extent: Sequence[int], scale: int, *, patch_size: int, patch_frames: int = 1
) -> int:
    """Tokens of an image (H, W) or a video (T, H, W) with patches ``scale`` base patches wide.

    Raises ConfigError where the patches do not fill it.
    """
    *frames, height, width = extent
    edge = patch_size * scale
    num_frames = frames[0] if frames else 1
    if height % edge or width % edge or num_frames % patch_frames:
        raise ConfigError(
            f"images.height={height}, width={width}, frames={num_frames} are no whole "
            f"number of patches of {edge} (model.patch_size={patch_size} at scale {scale}) and "
            f"{patch_frames} frames; change the size, or set the scale's images.coarse_shares to 0"
        )
    return (height // edge) * (width // edge) * (num_frames // patch_frames)


def scale_at(fraction: float, shares: Sequence[float], fits: Sequence[bool]) -> int | None:
    """Index of the scale that a uniform ``fraction`` in (0, 1] draws among those that fit.

    Chances are ``shares`` over their sum among these. None where nothing with a share fits.
    """
    allowed = [i for i, fit in enumerate(fits) if fit and shares[i] > 0]
    if not allowed:
        return None
    left = fraction * sum(shares[i] for i in allowed)
    for index in allowed:
        left -= shares[index]
        if left <= 0:
            return index
    return allowed[-1]  # rounding


class ImagePlanner:
    """All lanes together: the images of any row, in any order that does not go back in a lane.

    A lane takes from the source that lags most behind its share of images. Within a source all
    lanes together walk through a fresh permutation every epoch, so each image comes exactly once
    per epoch. All that a lane remembers is how many images of each source it took.
    """

    def __init__(
        self,
        num_images: Sequence[int],
        weights: Sequence[float],
        *,
        tokens: Mapping[int, int],
        shares: Sequence[float],
        sequence_length: int,
        flip: bool,
        num_lanes: int,
        seed: int,
    ) -> None:
        """``tokens`` are those of an image at each scale; ``shares`` belong to its keys."""
        self._sizes, self._weights = list(num_images), list(weights)
        self._first = np.cumsum([0, *num_images])
        self._tokens, self._shares = tokens, shares
        self._budget, self._flip, self._seed = sequence_length, flip, seed
        self._keys: dict[tuple[int, int], int] = {}
        self.num_lanes = num_lanes
        """Independent row streams; row r belongs to lane r mod lanes."""
        self.num_rows = [0] * num_lanes
        """Rows that each lane has filled."""
        self.num_drawn = np.zeros((num_lanes, len(weights)), dtype=np.int64)
        """Images that each lane took from each source."""

    def row(self, number: int) -> list[Planned]:
        """Images of row ``number``; rows of the same lane that were passed over are replayed."""
        index, lane = divmod(number, self.num_lanes)
        if index < self.num_rows[lane]:
            raise ValueError(f"row {number} was planned already; load an earlier state to go back")
        self._replay(lane, index)
        return self._fill(lane)

    def state(self, next_row: int, lanes: range | None = None) -> State:
        """Everything needed to go on at ``next_row``: ``num_drawn`` of the chosen lanes."""
        chosen = range(self.num_lanes) if lanes is None else lanes
        for lane in chosen:
            self._replay(lane, self._rows_before(next_row, lane))
        return {"num_drawn": self.num_drawn[chosen.start : chosen.stop].copy()}

    def load_state(self, state: State, lanes: range | None = None) -> None:
        """Go to a state of the same lanes, which also tells ``next_row``."""
        chosen = range(self.num_lanes) if lanes is None else lanes
        next_row = int(state["next_row"][0])
        self.num_drawn[chosen.start : chosen.stop] = state["num_drawn"]
        for lane in chosen:
            self.num_rows[lane] = self._rows_before(next_row, lane)

    def _rows_before(self, next_row: int, lane: int) -> int:
        return (next_row - lane + self.num_lanes - 1) // self.num_lanes

    def _replay(self, lane: int, num_rows: int) -> None:
        while self.num_rows[lane] < num_rows:
            self._fill(lane)

    def _fill(self, lane: int) -> list[Planned]:
        placed: list[Planned] = []
        left = self._budget
        while True:
            fits = [tokens <= left for tokens in self._tokens.values()]
            draw = int(self.num_drawn[lane].sum())
            # With one scale there is nothing to draw, and a draw costs as much as all the rest.
            fraction = 1.0 if len(fits) == 1 else self._fraction(lane, draw, Stream.SCALE)
            index = scale_at(fraction, self._shares, fits)
            if index is None:
                self.num_rows[lane] += 1
                return placed
            scale, tokens = list(self._tokens.items())[index]
            flipped = self._flip and self._fraction(lane, draw, Stream.FLIP) <= 0.5
            placed.append(Planned(*self._draw(lane), scale, flipped))
            left -= tokens

    def _fraction(self, lane: int, draw: int, stream: Stream) -> float:
        return 1.0 - generator_for(self._seed, lane, draw, stream).random()

    def _draw(self, lane: int) -> tuple[int, int]:
        """(number, epoch) of the lane's next image."""
        drawn = self.num_drawn[lane]
        source = min(range(len(drawn)), key=lambda s: (drawn[s] / self._weights[s], s))
        size = self._sizes[source]
        epoch, position = divmod(int(drawn[source]) * self.num_lanes + lane, size)
        drawn[source] += 1
        if (source, epoch) not in self._keys:
            self._keys[source, epoch] = stream_key("images", self._seed, source, epoch)
        own = permuted(position, size, self._keys[source, epoch])
        return int(self._first[source]) + own, epoch


class ImageLoader(RowStream[ImagePlanner]):
    """The training stream of images, seen from one process."""

    TABLE = "images"

    def __init__(
        self,
        dataset: ImageDataset,
        config: ImagesConfig,
        *,
        patch_size: int,
        patch_scales: Sequence[int] = (1,),
        patch_frames: int = 1,
        sequence_length: int,
        seed: int,
        rank: int,
        world_size: int,
        step_rows: Sequence[int] = (),
    ) -> None:
        """See :class:`RowStream` for ``step_rows``; the patches are those of the model.

        Raises ConfigError for shares that do not match the scales, patches that do not fill an
        image, and rows too short for one image.
        """
        shares = config.coarse_shares or (1.0, *[0.0] * (len(patch_scales) - 1))
        if len(shares) != len(patch_scales):
            raise ConfigError(
                f"images.coarse_shares={list(shares)} must have one number for each of "
                f"model.patch_scales={list(patch_scales)}"
            )
        used = {scale: share for scale, share in zip(patch_scales, shares, strict=True) if share}
        tokens = {
            scale: tokens_at_scale(
                config.extent(), scale, patch_size=patch_size, patch_frames=patch_frames
            )
            for scale in used
        }
        longest = max(tokens.values())
        if longest > sequence_length:
            raise ConfigError(
                f"batch.sequence_length={sequence_length} is less than the {longest} tokens of one "
                "image; raise it, or use larger patches"
            )
        self._dataset = dataset
        planner = ImagePlanner(
            [len(source.items[TRAIN]) for source in dataset.sources],
            [source.weight for source in dataset.sources],
            tokens=tokens,
            shares=list(used.values()),
            sequence_length=sequence_length,
            flip=config.flip,
            num_lanes=config.lanes,
            seed=seed,
        )
        self._pool = (
            ThreadPoolExecutor(config.decode_threads) if config.decode_threads > 1 else None
        )
        super().__init__(
            planner, config.skip_rows, rank=rank, world_size=world_size, step_rows=step_rows
        )

    def next_rows(self, num_rows: int) -> ImageRows:
        """This process's share of the next ``num_rows`` rows of the global stream.

        Those of its own lanes, or else the rank-th of world_size equal blocks. Raises ValueError
        when the rows cannot be divided equally, DataError for a damaged image.
        """
        mine = self.take(num_rows)
        plans = [self._planner.row(row) for row in mine]
        flat = [planned for plan in plans for planned in plan]
        rows = [row for row, plan in zip(mine, plans, strict=True) for _ in plan]
        read_all = map if self._pool is None else self._pool.map
        placed = iter(read_all(self._read, rows, flat))
        return ImageRows([[next(placed) for _ in plan] for plan in plans], mine)

    def _read(self, row: int, planned: Planned) -> Placed:
        try:
            pixels, condition = self._dataset.read(TRAIN, planned.number)
        except DataError as error:
            raise DataError(f"row {row} of the stream: {error}") from None
        pixels = pixels.flip(-1) if planned.flipped else pixels
        return Placed(planned.number, planned.epoch, planned.scale, condition, pixels)

    def describe_rows(self, rows: Sequence[int]) -> list[str]:
        """One line per image of some global rows, in ascending order."""
        return [
            f"row {number}: {self._name(planned.number)}, epoch {planned.epoch}, "
            f"patch scale {planned.scale}" + ", mirrored" * planned.flipped
            for number in rows
            for planned in self._planner.row(number)
        ]

    def _name(self, number: int) -> str:
        source, own = self._dataset.locate(TRAIN, number)
        return f"{self._dataset.sources[source].name} image {own}"


def held_out_images(
    dataset: ImageDataset,
    num_images: int,
    *,
    batch_rows: int,
    images_per_row: int = 1,
    scale: int = 1,
) -> dict[str, list[ImageRows]]:
    """The same images every time for each source that has held-out ones, never mirrored.

    A random choice of at most ``num_images`` of each source, each once; rows are numbered from 0.
    The last row and batch may be smaller.
    """
    batches: dict[str, list[ImageRows]] = {}
    first = 0
    for source in dataset.sources:
        size = len(source.items[HELD_OUT])
        numbers = [permuted(i, size, 0) for i in range(min(num_images, size))]
        placed = []
        for own in numbers:
            pixels, condition = source.read(HELD_OUT, own)
            placed.append(Placed(first + own, 0, scale, condition, pixels))
        rows = [placed[i : i + images_per_row] for i in range(0, len(placed), images_per_row)]
        if rows:
            batches[source.name] = [
                ImageRows(rows[i : i + batch_rows], list(range(i, min(i + batch_rows, len(rows)))))
                for i in range(0, len(rows), batch_rows)
            ]
        first += size
    return batches
