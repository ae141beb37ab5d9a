import pytest

from dlrm_deploy.bench.qps_search import highest_valid


class Server:
    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.tried: list[float] = []

    def __call__(self, load: float) -> bool:
        self.tried.append(load)
        return load <= self.capacity


@pytest.mark.parametrize("start", [1.0, 30.0, 99.0, 101.0, 800.0])
def test_the_load_found_was_tried_and_one_a_little_higher_is_invalid(start):
    server = Server(100.0)
    found = highest_valid(server, start, precision=0.05, most_runs=40)
    assert found in server.tried
    assert found <= 100 < found * 1.05
    invalid = min(load for load in server.tried if load > 100)
    assert invalid / found <= 1.05


def test_a_start_near_the_limit_takes_few_runs():
    server = Server(100.0)
    highest_valid(server, 30.0)
    assert len(server.tried) <= 8


def test_a_server_that_bears_nothing_has_no_load():
    server = Server(0.0)
    assert highest_valid(server, 10.0, most_runs=5) is None
    assert len(server.tried) == 5
    assert server.tried[-1] < 10


def test_the_search_ends_where_every_load_is_valid():
    server = Server(float("inf"))
    assert highest_valid(server, 1.0, most_runs=6) == server.tried[-1]
    assert len(server.tried) == 6
