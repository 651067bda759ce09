import pytest
from hypothesis import given
from hypothesis import strategies as st

from logger.text import duration


@pytest.mark.parametrize(("seconds", "said"), [
    (0, "0.0 s"), (8.34, "8.3 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (119.7, "2 min 00 s"), (245, "4 min 05 s"),
    (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (3629, "1 h 00 min"), (3640, "1 h 01 min"), (7630, "2 h 07 min")])
def test_times_at_a_glance(seconds, said):
    assert duration(seconds) == said


@given(st.floats(0, 1e6))
def test_what_is_read_is_the_time_to_the_precision_shown(seconds):
    units = {"h": 3600, "min": 60, "s": 1}
    parts = duration(seconds).split()
    numbers = [float(part) for part in parts[::2]]
    assert all(number < 60 for number, unit in zip(numbers, parts[1::2]) if unit != "h")
    read = sum(number * units[unit] for number, unit in zip(numbers, parts[1::2]))
    assert abs(read - seconds) <= {1: 0.05, 60: 0.5, 3600: 30.5}[units[parts[1]]] + 1e-6
