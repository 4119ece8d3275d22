import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import InputHeader, Mask
from server.errors import InvalidParameter
from server.segment import labels as labelling
from server.segment import postprocess
from server.segment.labels import find
from server.segment.postprocess import Postprocessing, Processed, apply
from tests.server.segment.masks import disc, lines, masks


def processed(classes: np.ndarray, unit_mm: float | None = None, *, described: bool = True, **wanted: Any) -> Processed:
    mask = Mask(classes.copy(order="K"), confidence=np.full_like(classes, 0.5, dtype=np.float16))
    return apply(mask, Postprocessing(**wanted), None, unit_mm, objects=described)


class TestSizes:
    @settings(max_examples=100, deadline=None)
    @given(masks(), st.integers(0, 30), st.integers(0, 30))
    def test_smaller_objects_go_and_others_stay_as_they_are(self, classes: np.ndarray, a: int, b: int) -> None:
        found = find(classes)
        less, more = sorted((a, b))
        done = processed(classes, min_size_px=less)
        kept = found.pixels >= less
        assert np.array_equal(done.mask.classes, np.where(np.concatenate([[False], kept])[found.labels], classes, 0))
        assert done.mask.objects is not None
        assert done.mask.objects.pixels.tolist() == found.pixels[kept].tolist()
        assert sum(done.dropped.values()) == np.count_nonzero(~kept)
        assert {v: int((found.value[~kept] == v).sum()) for v in done.dropped} == done.dropped
        # More is dropped, never less, by a larger size.
        assert not (processed(classes, min_size_px=more).mask.classes.astype(bool) & ~done.mask.classes.astype(bool)).any()

    @settings(max_examples=60, deadline=None)
    @given(masks(), st.integers(0, 12), st.booleans(), st.booleans(), st.booleans())
    def test_objects_are_those_of_the_mask(
        self, classes: np.ndarray, least: int, holes: bool, largest: bool, instances: bool
    ) -> None:
        done = processed(classes, min_size_px=least, fill_holes=holes, keep_largest=largest, instances=instances)
        assert done.mask.objects is not None
        assert np.array_equal(done.mask.objects.labels > 0, done.mask.classes > 0)
        assert (done.mask.objects.pixels >= least).all()
        if largest:
            assert np.bincount(done.mask.objects.value, minlength=1).max(initial=0) <= 1
        if not instances:
            again = find(done.mask.classes)
            assert np.array_equal(again.labels, done.mask.objects.labels)
        # Nothing of it depends on whether objects are asked for.
        assert np.array_equal(
            processed(
                classes, described=False, min_size_px=least, fill_holes=holes, keep_largest=largest, instances=instances
            ).mask.classes,
            done.mask.classes,
        )

    def test_in_units(self) -> None:
        classes = lines("1.11.111")
        # A pixel of 0.5 by 0.2 mm.
        assert processed(classes, 0.1, min_size_mm2=0.2).mask.classes.tolist() == lines("..11.111").tolist()
        assert processed(classes, 0.1, min_size_mm2=0.2001).mask.classes.tolist() == lines(".....111").tolist()
        assert processed(classes, 0.1, min_size_mm2=0.3).dropped == {1: 2}

    @settings(max_examples=60, deadline=None)
    @given(masks())
    def test_the_largest_of_each_class(self, classes: np.ndarray) -> None:
        found = find(classes)
        done = processed(classes, keep_largest=True)
        for value in set(found.value.tolist()):
            mine = np.flatnonzero(found.value == value)
            # Of several the first.
            best = mine[np.argmax(found.pixels[mine])]
            assert np.array_equal(done.mask.classes == value, found.labels == best + 1)

    def test_order(self) -> None:
        # A hole is filled before sizes are compared, and what is too small is never the largest.
        ring = lines("111..", "1.1.2", "111..")
        assert processed(ring, fill_holes=True, min_size_px=9).mask.classes.tolist() == lines("111..", "111..", "111..").tolist()
        assert not processed(ring, min_size_px=9, keep_largest=True).mask.classes.any()
        # Objects are split before sizes are compared.
        two = disc((40, 60), ((20, 18), 10), ((20, 35), 10))
        assert processed(two, min_size_px=400).mask.classes.any()
        assert not processed(two, min_size_px=400, instances=True).mask.classes.any()
        assert processed(two, min_size_px=400, instances=True).dropped == {1: 2}

    def test_noise_can_be_dropped_before_it_is_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(labelling, "MOST_OBJECTS", 3)
        grid = np.zeros((9, 9), dtype=np.uint8)
        grid[::3, ::3] = 1
        grid[0, :5] = 1
        for wanted in ({}, {"instances": True}):
            with pytest.raises(InvalidParameter, match=r"falls into 8 objects.*min_size_px"):
                processed(grid, **wanted)
            done = processed(grid, min_size_px=2, **wanted)
            assert done.mask.objects is not None
            assert len(done.mask.objects) == 1


def test_nothing_asked_is_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("number", "fill_holes", "measure"):
        monkeypatch.setattr(postprocess, name, lambda *_: pytest.fail("done"))
    mask = Mask(lines("1.1"))
    assert apply(mask, Postprocessing(), None, None, objects=False).mask is mask


@settings(max_examples=40, deadline=None)
@given(masks())
def test_instances_leave_classes_alone(classes: np.ndarray) -> None:
    done = processed(classes, instances=True)
    assert np.array_equal(done.mask.classes, classes)
    assert done.mask.objects is not None
    assert len(done.mask.objects) >= len(find(classes))
    # In the order of their first pixels.
    flat = (done.mask.objects.labels.T if classes.ndim == 3 else done.mask.objects.labels).ravel()
    first = [int(np.argmax(flat == number)) for number in range(1, len(done.mask.objects) + 1)]
    assert first == sorted(first)


class TestTimes:
    """What is done with a time-lapse is done with each time, as if it had come alone."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(masks(axes=(3,), most_side=8), min_size=1, max_size=1),
        st.integers(1, 3),
        st.integers(0, 6),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    def test_each_is_by_itself(
        self, drawn: list[np.ndarray], slices: int, least: int, holes: bool, largest: bool, instances: bool
    ) -> None:
        classes = np.asfortranarray(np.concatenate([drawn[0]] * slices, axis=2))
        wanted = Postprocessing(min_size_px=least, fill_holes=holes, keep_largest=largest, instances=instances)
        confidence = np.full_like(classes, 0.5, dtype=np.float16)
        done = apply(Mask(classes.copy(order="K"), confidence=confidence), wanted, None, None, objects=True, time_slices=slices)
        assert done.mask.objects is not None
        before, dropped = 0, dict[int, int]()
        for first in range(0, classes.shape[2], slices):
            one = classes[..., first : first + slices]
            alone = processed(one[..., 0].T if slices == 1 else one, min_size_px=least, fill_holes=holes, keep_largest=largest, instances=instances)  # fmt: skip
            assert alone.mask.objects is not None
            labels = alone.mask.objects.labels.T[..., None] if slices == 1 else alone.mask.objects.labels
            seen = done.mask.objects.labels[..., first : first + slices]
            assert np.array_equal(seen, np.where(labels > 0, labels + before, 0))
            count = len(alone.mask.objects)
            border = done.mask.objects.touches_border[before : before + count]
            assert border.tolist() == alone.mask.objects.touches_border.tolist()
            before += count
            for value, times in alone.dropped.items():
                dropped[value] = dropped.get(value, 0) + times
        assert len(done.mask.objects) == before
        assert done.dropped == dropped

    def test_pages_are_measured_by_area(self) -> None:
        times = InputHeader((4, 5, 6), time_slices=1)
        Postprocessing(min_size_mm2=1.0).check_kind(times)
        with pytest.raises(InvalidParameter, match="min_size_mm3 does not fit; objects of images and of pages that are times"):
            Postprocessing(min_size_mm3=1.0).check_kind(times)
        Postprocessing(min_size_mm3=1.0).check_kind(InputHeader((4, 5, 6), time_slices=2))


IMAGE, STACK, VOLUME = InputHeader((4, 5)), InputHeader((4, 5, 6)), InputHeader((4, 5, 6), affine=np.eye(4))


class TestChecks:
    @pytest.mark.parametrize(
        ("wanted", "says"),
        [
            ({"threshold": -0.1}, r"threshold=-0.1 is not between 0 and 1"),
            ({"threshold": 1.5}, r"threshold=1.5 is not between 0 and 1"),
            ({"threshold": math.nan}, r"threshold=nan is not between 0 and 1"),
            ({"min_size_px": -1}, r"min_size_px=-1 is not a size; give 0 or more"),
            ({"min_size_mm2": math.inf}, r"min_size_mm2=inf is not a size"),
            ({"min_size_mm3": math.nan}, r"min_size_mm3=nan is not a size"),
            ({"min_size_px": 1, "min_size_mm2": 1.0}, r"min_size_px and min_size_mm2 are given; .* give one of them"),
        ],
    )
    def test_of_the_request(self, wanted: dict[str, Any], says: str) -> None:
        with pytest.raises(InvalidParameter, match=says):
            Postprocessing(**wanted).check()

    def test_what_is_fine(self) -> None:
        for wanted in ({}, {"threshold": 0.0}, {"threshold": 1.0}, {"min_size_px": 0}, {"min_size_mm2": 1e-9}):
            Postprocessing(**wanted).check()

    def test_of_the_kind(self) -> None:
        for input_header, wanted, says in (
            (
                IMAGE,
                {"min_size_mm3": 1.0},
                "min_size_mm3 does not fit; objects of images and of pages that are times are measured by min_size_mm2 or min_size_px",
            ),
            (STACK, {"min_size_mm2": 1.0}, "min_size_mm2 does not fit; objects of volumes and stacks are measured by min_size_mm3"),
            (VOLUME, {"min_size_mm2": 1.0}, "min_size_mm2 does not fit"),
        ):
            with pytest.raises(InvalidParameter, match=says):
                Postprocessing(**wanted).check_kind(input_header)
        Postprocessing(min_size_mm2=1.0).check_kind(IMAGE)
        Postprocessing(min_size_mm3=1.0).check_kind(VOLUME)
        Postprocessing(min_size_px=1).check_kind(STACK)

    def test_of_the_unit(self) -> None:
        with pytest.raises(InvalidParameter, match=r"min_size_mm2 needs to know .* add pixel_size_um=0.5 .*, or use min_size_px"):
            Postprocessing(min_size_mm2=1.0).check_unit(IMAGE, None)
        with pytest.raises(
            InvalidParameter, match=r"min_size_mm3 needs to know .* add pixel_size_um=0.5x0.5x2 .*height x width x page"
        ):
            Postprocessing(min_size_mm3=1.0).check_unit(STACK, None)
        Postprocessing(min_size_mm3=1.0).check_unit(STACK, 0.5)
        Postprocessing(min_size_px=1).check_unit(IMAGE, None)

    def test_asked_is_in_the_order_in_which_it_is_done(self) -> None:
        wanted = Postprocessing(keep_largest=True, threshold=0.0, min_size_px=0, fill_holes=True)
        assert list(wanted.asked.items()) == [("threshold", 0.0), ("fill_holes", True), ("min_size_px", 0), ("keep_largest", True)]
        assert Postprocessing().asked == {}
