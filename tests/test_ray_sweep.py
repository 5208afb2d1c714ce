"""`expo sweep --ray` on a real cluster of several raylets: the rows and the choice are those of one machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import Raylets
from test_orphans import wait_until_gone
from test_ray import ended, raylets, start  # noqa: F401 - fixtures
from test_sweep import (
    assert_same_rows,
    cache,  # noqa: F401
    drawn,  # noqa: F401
    pictures,  # noqa: F401
    processes,  # noqa: F401
    record_of,
    reward_model,  # noqa: F401
    swept,  # noqa: F401
    task,  # noqa: F401
    verdicts,  # noqa: F401
)

from expo.arguments import arguments_of
from expo.errors import InputError
from expo.verbs import sweep as verb

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def assert_same_sweep(ours: Path, theirs: Path) -> None:
    """Equal rows, and equal sweep.json but for when and where they were made."""
    assert_same_rows(ours, theirs)
    apart = ("clock", "config", "engines", "switch", "rows_xxh3")  # rewards may differ in their last bits
    records = [{name: said for name, said in record_of(one).items() if name not in apart} for one in (ours, theirs)]
    assert rounded(records[0]) == rounded(records[1])
    assert {one["on"] for one in record_of(ours)["engines"]} == {"the Ray cluster"}
    assert [file.name for file in ours.rglob(".*")] == []
    assert [file.name for file in ours.rglob("*.parts")] == []


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def test_a_machine_dies(
    swept: Any,  # noqa: F811
    raylets: Raylets,  # noqa: F811
    start: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """More engines than α: each α is divided, one engine waits for a machine, and then there is but one machine."""
    config, whole = swept(alpha=(2.0,)), swept(alpha=(2.0,), output=str(tmp_path / "whole"))
    folder = Path(config.output)
    raylets.hold()
    with monkeypatch.context() as patch:
        patch.setenv("EXPO_CACHE", str(tmp_path / "cache"))  # where nothing is proved yet
        process = start("sweep", *arguments_of(config), "--data-parallel", 3)
    verb.run(whole)
    victim, _ = raylets.waiting(2)
    journals = [len(file.read_text().splitlines()) for file in folder.rglob("*.parts/.*.journal.jsonl")]
    assert sum(journals) > len(journals), "rows are durable before the kill"
    raylets.kill_machine_of(victim)
    raylets.open()
    _, err = ended(process)
    assert "another process takes it up" in err
    switch = record_of(folder)["switch"]
    assert switch["proved"], switch
    assert switch["reason"].startswith("switched to α = "), "by a process of the cluster"
    assert_same_sweep(folder, Path(whole.output))
    assert verb.run(replace(config, ray="127.0.0.1:9")).status == "already complete", "for which no cluster is needed"


@pytest.mark.full
def test_the_run_itself_is_killed(
    swept: Any,  # noqa: F811
    raylets: Raylets,  # noqa: F811
    start: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    config, whole = swept(alpha=(2.0,)), swept(alpha=(2.0,), output=str(tmp_path / "whole"))
    words = ("sweep", *arguments_of(config), "--data-parallel", 3)
    raylets.hold()
    process = start(*words)
    left = raylets.waiting(2)
    process.kill()
    process.communicate()
    for pid in left:
        wait_until_gone(pid)
    with pytest.raises(InputError, match=r"has parts of a sweep on a cluster: go on with --ray"):
        verb.run(config)
    raylets.open()
    ended(start(*words))
    verb.run(whole)
    assert_same_sweep(Path(config.output), Path(whole.output))


@pytest.mark.full
def test_a_race_is_that_of_one_machine(
    swept: Any,  # noqa: F811
    raylets: Raylets,  # noqa: F811
    start: Any,  # noqa: F811
    tmp_path: Path,
    task: Path,  # noqa: F811
) -> None:
    """Two machines: the policy has one, the reward model the other."""
    task.write_text("".join(f'{{"prompt": "w{number % 50} w{number * 7 % 50}"}}\n' for number in range(60)))
    config, whole = swept(search="race"), swept(search="race", output=str(tmp_path / "whole"))
    process = start("sweep", *arguments_of(config))
    verb.run(whole)
    ended(process)
    assert_same_sweep(Path(config.output), Path(whole.output))
