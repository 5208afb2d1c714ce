"""Where the engines of a sweep run: shares that fit, side by side where they do, and never more than there is."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from expo.errors import InputError
from expo.verbs.sweep.placement import GPU_SHARE, HOST_SHARE, Model, as_told, on_cpu, on_gpus

GB = 1 << 30


def model(gigabytes: float, *, spreads: bool = True, gpus: int | None = None) -> Model:
    return Model(int(gigabytes * GB), spreads=spreads, tensor_parallel=gpus)


def test_two_7b_models_share_an_80_gb_gpu():
    policy, reward = on_gpus(model(15), [model(15)], ["0"], 80 * GB)
    assert policy.gpus == reward.gpus == ("0",)
    assert reward.side_by_side
    assert policy.gpu_share + reward.gpu_share <= GPU_SHARE + 1e-9
    assert policy.gpu_share * 80 * GB > 15 * GB + 8 * GB
    assert reward.gpu_share * 80 * GB > 15 * GB


def test_where_they_do_not_fit_the_reward_model_comes_after():
    policy, reward = on_gpus(model(15), [model(15)], ["0"], 24 * GB)
    assert (policy.gpu_share, reward.gpu_share) == (None, None)
    assert (policy.side_by_side, reward.side_by_side) == (True, False)


def test_with_two_gpus_each_has_its_own():
    policy, reward = on_gpus(model(15), [model(15)], ["4", "7"], 24 * GB)
    assert (policy.gpus, reward.gpus) == (("4",), ("7",))
    assert (policy.gpu_share, reward.gpu_share, reward.side_by_side) == (None, None, True)


def test_with_eight_gpus_the_policy_has_a_power_of_two():
    policy, reward = on_gpus(model(140), [model(15)], list("01234567"), 80 * GB)
    assert policy.gpus == ("0", "1", "2", "3")
    assert reward.gpus == ("7",)


def test_a_policy_that_needs_all_gpus_shares_them_or_goes_first():
    large, reward = on_gpus(model(140), [model(15)], ["0", "1"], 80 * GB)
    assert large.gpus == ("0", "1")
    assert not reward.side_by_side


def test_what_the_user_says_counts():
    policy, reward = on_gpus(model(15, gpus=2), [model(15)], ["0", "1", "2"], 80 * GB)
    assert (policy.gpus, reward.gpus) == (("0", "1"), ("2",))


def test_an_engine_that_does_not_spread_has_one_gpu():
    policy, reward = on_gpus(model(15, spreads=False), [model(15, spreads=False)], ["0", "1", "2"], 80 * GB)
    assert (policy.gpus, reward.gpus) == (("0",), ("2",))


@pytest.mark.parametrize(
    ("devices", "gpus", "beside"),
    [
        (["cpu", "cuda"], [(), ("3",)], [True, True]),
        (["cuda:1", "cuda:0"], [("5",), ("3",)], [True, True]),
        (["cuda:0", "cuda:0"], [("3",), ("3",)], [True, False]),
        (["auto", "cpu"], [("3", "5"), ()], [True, True]),
        (["auto", "cuda:0"], [("5",), ("3",)], [True, True]),
        (["auto", "auto"], [("3", "5"), ("3",)], [True, False]),
    ],
)
def test_devices_that_are_named(devices, gpus, beside):
    places = as_told(model(1), [model(1)], devices, ["3", "5"], 80 * GB)
    assert [place.gpus for place in places] == gpus
    assert [place.side_by_side for place in places] == beside


def test_a_number_of_gpus_that_the_user_gives_holds_with_devices_that_are_named():
    policy, reward = as_told(model(1, gpus=2), [model(1)], ["auto", "cpu"], list("0123"), 80 * GB)
    assert (policy.gpus, reward.gpus) == (("0", "1"), ())
    policy, reward = as_told(model(1), [model(140)], ["cuda:3", "cuda"], list("0123"), 80 * GB)
    assert (policy.gpus, reward.gpus) == (("3",), ("0", "1"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            lambda: as_told(model(1), [model(1)], ["cuda:5", "cpu"], ["0", "1"], 80 * GB),
            "--device cuda:5: there are cuda:0 to",
        ),
        (
            lambda: as_told(model(1), [model(1)], ["cpu", "cuda:1"], ["0"], 80 * GB),
            "--reward-device cuda:1: there is only",
        ),
        (
            lambda: as_told(model(1, gpus=2), [model(1)], ["auto", "cuda:1"], ["0", "1"], 80 * GB),
            "--tensor-parallel 2 needs 2",
        ),
        (lambda: on_gpus(model(1, gpus=8), [model(1)], ["0", "1"], GB), "--tensor-parallel 8 needs 8 GPUs, and 2 are"),
        (lambda: on_gpus(model(1), [model(1, gpus=2)], ["0"], GB), "--reward-tensor-parallel 2 needs 2 GPUs, and 1 is"),
    ],
)
def test_gpus_that_are_not_there_are_refused(place, message):
    with pytest.raises(InputError, match=message):
        place()


def test_a_large_reward_model_has_a_power_of_two_as_well():
    policy, reward = on_gpus(model(15), [model(140)], list("01234567"), 80 * GB)
    assert (policy.gpus, reward.gpus) == (("0", "1", "2", "3"), ("4", "5", "6", "7"))


def test_after_the_policy_a_reward_model_has_all_the_gpus_it_needs():
    policy, reward = on_gpus(model(140), [model(140)], ["0", "1", "2", "3"], 80 * GB)
    assert (policy.gpus, reward.gpus, reward.side_by_side) == (tuple("0123"), tuple("0123"), False)


def test_a_shared_reward_model_has_the_gpus_that_the_user_gives_it():
    policy, reward = on_gpus(model(15, gpus=2), [model(15, gpus=2)], ["0", "1"], 80 * GB)
    assert (policy.gpus, reward.gpus, reward.side_by_side) == (("0", "1"), ("0", "1"), True)


sizes = st.floats(0.01, 200)


@given(sizes, st.lists(sizes, min_size=1, max_size=3), st.integers(1, 9), st.sampled_from([8, 24, 80, 141]))
def test_shares_on_a_gpu_never_exceed_it(policy, rewards, count, gigabytes):
    gpus = list(map(str, range(count)))
    places = on_gpus(model(policy), [model(size) for size in rewards], gpus, gigabytes * GB)
    assert len(places) == 1 + len(rewards)
    assert places[0].side_by_side
    for gpu in gpus:
        there = [place for place in places if gpu in place.gpus and place.side_by_side]
        assert len(there) < 2 or sum(place.gpu_share for place in there) <= GPU_SHARE + 0.01
    for place, size in zip(places, (policy, *rewards), strict=True):
        assert set(place.gpus) <= set(gpus)
        if place.gpu_share is not None:
            assert place.gpu_share * gigabytes * len(place.gpus) > size


@given(sizes, st.lists(sizes, min_size=1, max_size=3), st.floats(1, 500))
def test_on_a_cpu_they_are_side_by_side_only_where_memory_is_for_all(policy, rewards, free):
    places = on_cpu(model(policy), [model(size) for size in rewards], int(free * GB))
    assert places[0].side_by_side
    together = all(place.side_by_side for place in places)
    assert together == (sum(place.nbytes for place in places) <= HOST_SHARE * int(free * GB))
