"""Which series of an upload is meant, and which of its instances form the volume or the image."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidParameter, Unreadable
from server.imaging.decode_options import join_notes
from server.imaging.dicom_files import Instance
from server.imaging.dicom_frames import frame_count
from server.imaging.dicom_stream import FORMAT

# Characters of a UID, and series that an error lists.
MAX_UID, MAX_LISTED = 64, 50


def choose(instances: Sequence[Instance], series: str | None) -> tuple[list[Instance], str]:
    """Returns the instances of the one series, or of the one that the caller names, and a note on what was left out.

    Scouts are left out where exactly one other series remains.

    Args:
        instances: All instances with pixels.
        series: SeriesInstanceUID, or the number of a series in the list that the error has; None for the only one.

    Raises:
        InvalidParameter: There are several series and none is named, or the named one is not there.
        Unreadable: The series holds several instances of several frames.
    """
    by_uid: defaultdict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        by_uid[_text(instance.dataset, "SeriesInstanceUID", MAX_UID)].append(instance)
    # By their UIDs, so that the numbers do not depend on the order of the files.
    listed = sorted(by_uid)
    chosen, note = _find(by_uid, listed, series)
    several = [one for one in chosen if frame_count(one.dataset) > 1]
    if several and len(chosen) > 1:
        raise Unreadable(
            f"the series holds {len(several)} instances of several frames and {len(chosen) - len(several)} of one; each is an input "
            "of its own: send one of them",
            reason="several-instances",
            format=FORMAT,
            limit=1,
            actual=len(chosen),
            unit="instances",
        )
    kept, more = _without_scouts(chosen)
    return kept, join_notes(note, more)


def describe(uid: str, number: int, instances: Sequence[Instance]) -> dict[str, Any]:
    """Returns what an error may show of a series: nothing that people have written."""
    first = instances[0].dataset
    return {
        "number": number,
        "uid": uid,
        "modality": _text(first, "Modality", 16),
        "size": [int(first.get("Rows") or 0), int(first.get("Columns") or 0)],
        "count": sum(frame_count(one.dataset) for one in instances),
    }


def _find(
    by_uid: dict[str, list[Instance]], listed: list[str], series: str | None
) -> tuple[list[Instance], str]:
    rows = [describe(uid, number, by_uid[uid]) for number, uid in enumerate(listed, 1)]
    if series is not None:
        wanted = series.strip()
        if wanted in by_uid:
            return by_uid[wanted], ""
        if wanted.isdecimal() and 1 <= int(wanted[:9]) <= len(listed):
            return by_uid[listed[int(wanted[:9]) - 1]], ""
        raise InvalidParameter(
            f"series={series!r:.70} is not in the input, which has {_shown(rows)}",
            parameter="series",
            value=series[:MAX_UID],
            allowed=rows[:MAX_LISTED],
        )
    if len(listed) == 1:
        return by_uid[listed[0]], ""
    pictures = [uid for uid in listed if not all(map(_is_scout, by_uid[uid]))]
    if len(pictures) == 1:
        return by_uid[pictures[0]], f"{len(listed) - 1} series of localisers left out"
    raise InvalidParameter(
        f"the input holds {len(listed)} series, and one is segmented at a time: {_shown(rows)}; pick one with series=NUMBER or "
        "series=UID",
        parameter="series",
        limit=1,
        actual=len(listed),
        unit="series",
        allowed=rows[:MAX_LISTED],
    )


def _shown(rows: Sequence[dict[str, Any]]) -> str:
    shown = "; ".join(
        f"{row['number']}: {row['modality']} of {row['count']} × {row['size'][0]} × {row['size'][1]} ({row['uid']})"
        for row in rows[:8]
    )
    return shown + (f"; and {len(rows) - 8} more" if len(rows) > 8 else "")


def _without_scouts(instances: list[Instance]) -> tuple[list[Instance], str]:
    kept = [one for one in instances if not _is_scout(one)]
    if not kept or len(kept) == len(instances):
        return instances, ""
    return kept, f"{len(instances) - len(kept)} localisers among the slices left out"


def _is_scout(instance: Instance) -> bool:
    kind = instance.dataset.get("ImageType") or ()
    parts = [kind] if isinstance(kind, str) else kind
    return "LOCALIZER" in [str(part).upper() for part in parts]


def _text(dataset: Any, name: str, longest: int) -> str:
    """Returns a value of letters, digits, points and underscores; others are left out because they may be text."""
    return "".join(c for c in str(dataset.get(name) or "") if c.isascii() and (c.isalnum() or c in "._"))[
        :longest
    ]
