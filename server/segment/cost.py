"""What a request will take, told from the file's header alone, and the limits that it is held against."""

import math
from dataclasses import dataclass, replace

from server.arrays import InputHeader
from server.errors import TooLarge
from server.imaging import encode as encoding
from server.imaging.decode_options import DecodeOptions
from server.imaging.geometry import Placement
from server.runtime.bundle import Graph, Manifest
from server.runtime.pace import Pace
from server.segment.plan import STEP_PIXELS, tile_grid
from server.segment.postprocess import Postprocessing
from server.segment.statistics import LISTED_BYTES, MOST_LISTED
from server.settings import LimitsSettings

# How many times longer than restoring and encoding a mask it takes beside the device, until it has been measured: what is done
# with it, of which the first of a request's is meant. Of noise and of diagonal lines it is up to five times that again.
WORK = {"instances": 10, "outlines": 6, "objects": 2, "mask": 1}
LONG = ("instances", "outlines")

# Of the place of one window; a stack of tiny slices has more windows than pixels in one.
WINDOW_BYTES = 100


@dataclass(frozen=True)
class Estimate:
    """What a request will take.

    Attributes:
        pixels: pixels or voxels of the input, or of the network's grid where that has more.
        windows: to be run.
        tile_pixels: of each window.
        padding: pixels of all windows that are not the input's.
        seconds: of the runs, at the pace of the last ones: what the request costs the others. It is padded pixels times seconds
            per pixel of the graph, as measured, rather than times its MACs, with which time does not go (the top rows wait for
            memory); 0 where the pace is not known yet.
        memory_bytes: of the decoded input, the open scores and the mask at their most.
    """

    pixels: int
    windows: int
    tile_pixels: int
    padding: int
    seconds: float
    memory_bytes: int

    def __str__(self) -> str:
        return f"about {self.seconds:,.0f} s and {self.memory_bytes / 1e6:,.0f} MB"


def estimate(
    input_header: InputHeader,
    reference: InputHeader | None,
    placement: Placement,
    manifest: Manifest,
    graph: Graph,
    formats: tuple[str, ...],
    wanted: Postprocessing,
    pace: Pace,
) -> Estimate:
    """Adds up time and memory.

    Args:
        input_header: of the input.
        reference: of the reference, if there is one.
        placement: of the network's grid.
        manifest: of the network.
        graph: to be run.
        formats: of the answer.
        wanted: what is to be done with the mask.
        pace: of that graph.
    """
    grid = tile_grid(placement.size, manifest, graph, flat=placement.flat)
    windows, tile_pixels = math.prod(grid.counts), math.prod(grid.tile)
    pixels, network, k = math.prod(input_header.size), math.prod(placement.size), manifest.score_channels
    # The network's own copy: resampled, or colours averaged to grey.
    copied = network * 4 * input_header.channels if placement.resampled else 0
    copied += network * 4 if input_header.channels > len(manifest.channels) else 0
    needs = encoding.needs(formats)
    # Of the axis that orders the windows one window, of the others all.
    sides = (t if a == grid.axis else max(s, t) for a, (s, t) in enumerate(zip(placement.size, grid.tile, strict=True)))
    open_channels = k + ("head_std" in needs)
    open_rows = math.prod(sides) * 4 * (2 * open_channels + 3)
    steps = max(STEP_PIXELS, tile_pixels) * 4 * (len(manifest.channels) + open_channels) * 2 + WINDOW_BYTES * windows
    # Probabilities, and them encoded.
    kept = (6 * k if "scores" in needs else 0) * pixels
    # The spread, and it encoded as float32.
    kept += (10 if "head_std" in needs else 0) * pixels
    # The score of each pixel's class, and what is labelled and listed; what is done with the mask is over when it is encoded.
    labelled = replace(wanted, instances=False, fill_holes=False).bytes(pixels, objects="objects" in needs)
    kept += (2 if "objects" in needs else 0) * pixels
    kept += max(wanted.bytes(pixels, objects="objects" in needs), labelled + encoding.memory(formats, input_header))
    kept += LISTED_BYTES * min(MOST_LISTED, pixels) if "report" in needs else 0
    compared = math.prod(reference.size) * (reference.channels * reference.sample_bytes + 3) if reference else 0
    # The mask, its encoded form, and what finding the best class takes in passing.
    memory = pixels * (input_header.channels * input_header.sample_bytes + 2) + copied + open_rows + steps + kept + compared
    covered = math.prod(min(s, t) for s, t in zip(placement.size, grid.tile, strict=True))
    padding = windows * (tile_pixels - covered)
    return Estimate(max(pixels, network), windows, tile_pixels, padding, windows * pace.seconds(tile_pixels), memory)


def work_of(formats: tuple[str, ...], wanted: Postprocessing) -> str:
    """What is done with the mask, by the time it takes: a row of `WORK`."""
    needs = encoding.needs(formats)
    asked = {
        "instances": wanted.instances,
        "outlines": any(encoding.ENCODERS[name].outlines for name in formats),
        "objects": bool(needs) or wanted.of_objects or wanted.fill_holes,
        "mask": True,
    }
    return next(work for work in WORK if asked[work])


def check(found: Estimate, input_header: InputHeader, limits: LimitsSettings) -> None:
    """Refuses what is over a limit.

    Raises:
        TooLarge: says what it would take.
    """
    if input_header.kind != "image":
        DecodeOptions(0, limits.max_voxels).check_volume(input_header.size, f"Here it would take {found}. ")
    if found.memory_bytes > limits.max_memory_mb * 1e6:
        raise TooLarge(
            f"this would take {found} of memory; the limit is {limits.max_memory_mb:,} MB. Crop the input, ask for "
            "fewer formats, of which the mask takes least, or raise UNETPP_LIMITS__MAX_MEMORY_MB on the server"
        )
