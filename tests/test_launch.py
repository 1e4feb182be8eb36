import pytest

from memlayers.launch import is_first, is_launched, is_spoken_for, number, require_launched


@pytest.fixture
def environment(monkeypatch):
    def set_to(**values):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_to


@pytest.mark.parametrize(
    ("values", "launched", "first", "spoken_for"),
    [
        ({}, False, True, False),
        ({"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}, False, True, False),
        ({"WORLD_SIZE": 4, "RANK": 0, "LOCAL_RANK": 0}, True, True, False),
        ({"WORLD_SIZE": 4, "RANK": 1, "LOCAL_RANK": 1}, True, False, True),
        ({"WORLD_SIZE": 4, "RANK": 2, "LOCAL_RANK": 0}, True, False, False),  # on the second machine
        ({"WORLD_SIZE": 4, "RANK": 2}, False, True, False),  # machines, numbered by a cluster
    ],
)
def test_the_environment_says_which_process_this_is(environment, values, launched, first, spoken_for):
    environment(**values)
    assert (is_launched(), is_first(), is_spoken_for()) == (launched, first, spoken_for)


def test_a_number_that_is_not_set_is_that_of_a_process_alone(environment):
    environment()
    assert (number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), number("RANK"), number("LOCAL_RANK")) == (1, 1, 0, 0)
    require_launched()
    environment(RANK="first")
    with pytest.raises(ValueError, match="RANK must be an integer of at least 0, got 'first'"):
        number("RANK")


def test_processes_that_cannot_find_each_other_are_refused(environment):
    environment(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="here")
    with pytest.raises(ValueError, match="MASTER_PORT must be set where WORLD_SIZE is 2: start the command with torch"):
        require_launched()
