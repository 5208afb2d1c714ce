"""A sweep on a cluster, without one: how its room is shared out, and who gives up a machine for whom."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from test_workers import Staying, crew_of, staying_crew  # noqa: F401 - fixtures

from expo.config import SweepConfig
from expo.errors import InputError
from expo.rows import workers
from expo.rows.cluster import Cluster, Machine
from expo.verbs.sweep import team as team_module
from expo.verbs.sweep.team import Machines, Teams

PAIR = {"sft": "s", "dpo": "d"}


class Rooms(Cluster):
    """A cluster of machines that are only named."""

    def __init__(self, *machines: tuple[int, int]) -> None:
        self._machines = [Machine(str(number), str(number), *made) for number, made in enumerate(machines)]

    @property
    def machines(self) -> list[Machine]:
        return self._machines


def shares(cluster: Cluster, *, race: bool = False, gpus: int = 0, models: int = 1, **settings: Any) -> list[Any]:
    job = SimpleNamespace(
        config=SweepConfig(**PAIR, ray="auto", reward_engine="transformers", **settings),
        race="a race" if race else None,
        first=SimpleNamespace(gpus_per_engine=lambda there: gpus if there else 0),
        reward_models=[
            SimpleNamespace(
                engine="transformers", spec=SimpleNamespace(can={"local"}), config=SimpleNamespace(device="auto")
            )
            for _ in range(models)
        ],
    )
    machines = Machines(job)  # type: ignore[arg-type]
    machines.cluster = cluster
    return [(share.processes, share.gpus) for share in machines.shares]


@pytest.mark.parametrize(
    ("made", "settings", "wanted"),
    [
        ([(8, 0), (8, 0)], {}, [(2, 0), (2, 0)]),
        ([(8, 0), (8, 0)], {"race": True}, [(1, 0), (1, 0)]),
        ([(8, 0), (8, 0)], {"race": True, "models": 3}, [(1, 0)] + [(1, 0)] * 3),
        ([(8, 0), (8, 0)], {"data_parallel": 5, "race": True}, [(5, 0), (1, 0)]),
        ([(64, 8), (64, 8)], {"gpus": 1}, [(16, 1), (16, 1)]),
        ([(64, 8), (64, 8)], {"gpus": 4}, [(4, 4), (16, 1)]),
        ([(64, 8), (64, 8)], {"gpus": 1, "race": True, "models": 2}, [(14, 1), (1, 1), (1, 1)]),
    ],
)
def test_a_clusters_room_is_shared_out(
    made: list[tuple[int, int]], settings: dict[str, Any], wanted: list[tuple[int, int]]
) -> None:
    """In a grid the reward models come after the policy; in a race each keeps an engine beside it."""
    assert shares(Rooms(*made), **settings) == wanted


def test_more_engines_than_there_is_room_for() -> None:
    with pytest.raises(InputError, match=r"room for 2 engines with 4 GPUs each in one machine .* and 3 are asked for"):
        shares(Rooms((64, 8)), gpus=4, data_parallel=3)


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch, staying_crew: Any):  # noqa: F811
    """Teams of workers that stay, and a function that steps them until something is so."""
    monkeypatch.setattr(team_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(team_module, "ROOM_SECONDS", 0.1)
    crews = []

    def make(*of_each: list[Staying]) -> list[Any]:
        made = [SimpleNamespace(crews=[staying_crew(*some)]) for some in of_each]
        crews.extend(crew for one in made for crew in one.crews)
        return made

    def until(running: Teams, condition: Any) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            for crew in crews:
                crew.step()
            running.between_looks()

    yield make, until
    for crew in crews:
        workers.stop_all(crew._workers)


def test_who_has_nothing_to_do_gives_up_a_machine_where_another_waits_for_one(teams: Any) -> None:
    make, until = teams
    done, waits = Staying("row()"), Staying("time.sleep(60)", placed=False)
    first, second = make([done], [waits])
    (crew,) = first.crews
    running = Teams([first], SimpleNamespace())  # type: ignore[list-item, arg-type]
    until(running, lambda: crew.is_over)
    running.between_looks()
    assert done.is_there, "nobody needs it"
    running = Teams([first, second], SimpleNamespace())  # type: ignore[arg-type]
    until(running, lambda: not done.is_there)
    assert waits.done == ["0/1"]


def test_who_has_no_machine_takes_no_job_from_another_that_waits_for_one(teams: Any) -> None:
    make, until = teams
    nowhere = [Staying("time.sleep(60)", placed=False) for _ in range(2)]
    (one,) = make(nowhere)
    (crew,) = one.crews
    crew.add(nowhere[0].job)
    ended = time.monotonic() + 0.5
    until(Teams([one], SimpleNamespace()), lambda: time.monotonic() > ended)  # type: ignore[list-item, arg-type]
    assert [len(worker.done) for worker in nowhere] == [1, 1]
