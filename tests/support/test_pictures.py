"""Plots: round numbers on their axes. (Pictures and plots as files are tested where they are written.)"""

import pytest

from support.pictures import frontier, round_numbers


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.04, 0.9, [0, 0.2, 0.4, 0.6, 0.8]), (360.1, 561, [400, 450, 500, 550]),
    (17.3, 19.9, [17.5, 18, 18.5, 19, 19.5])])
def test_ticks_of_plots_are_round_numbers(low, high, expected):
    assert round_numbers(low, high) == pytest.approx(expected)


def test_the_frontier_joins_the_points_that_no_other_beats():
    points = [(3, 5), (1, 2), (2, 1), (2, 4), (4, 5), (5, 7)]
    best = frontier(points)
    assert best == [(1, 2), (2, 4), (3, 5), (5, 7)]
    for x, y in points:
        beaten = any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in best) != beaten
