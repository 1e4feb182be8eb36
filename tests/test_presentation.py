import pytest

from memlayers.presentation import duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.0, "59 s"),
        (59.5, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (18_420, "5 h 07 min"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration_text(seconds) == text
