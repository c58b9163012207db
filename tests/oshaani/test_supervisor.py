"""How soon a process of the layout is started again."""

from __future__ import annotations

from itertools import accumulate, repeat

from oshaani.supervisor import PAUSE_FIRST_S, PAUSE_MAX_S, SETTLED_S, pause_after


def test_a_process_that_had_begun_its_work_is_started_again_at_once_however_often_it_dies():
    assert list(
        accumulate(
            repeat(SETTLED_S, 20), lambda paused_s, lived_s: pause_after(lived_s, paused_s), initial=0.0
        )
    ) == ([0.0] * 21)


def test_a_process_that_cannot_begin_is_tried_ever_less_often_but_always_again():
    pauses = list(
        accumulate(repeat(0.1, 8), lambda paused_s, lived_s: pause_after(lived_s, paused_s), initial=0.0)
    )[1:]
    assert pauses == [PAUSE_FIRST_S * 2**n for n in range(6)] + [PAUSE_MAX_S] * 2


def test_once_it_has_begun_its_failures_are_forgotten():
    assert pause_after(0.1, pause_after(SETTLED_S, PAUSE_MAX_S)) == PAUSE_FIRST_S
