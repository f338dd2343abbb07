"""The sampler never repeats a config, keeps its order, and finds good ones sooner than chance."""

from __future__ import annotations

import itertools
import random
import statistics
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from flashgen.codegen.config import TritonBackwardConfig, TritonForwardConfig
from flashgen.codegen.hopper_config import HopperForwardConfig
from flashgen.codegen.kernel_config import KernelConfig
from flashgen.errors import ConfigError
from flashgen.tuning.config_space import ConfigSpace, suggest_config
from flashgen.tuning.sampler import SpaceExhausted, UntriedNeighbourSampler

optuna.logging.set_verbosity(optuna.logging.ERROR)


def make_configs(block_ms=(32, 64, 128, 256), block_ns=(32, 64, 128), stages=(1, 2, 3, 4), loads=("pointer",)):
    axes = itertools.product(block_ms, block_ns, (2, 4, 8), stages, loads)
    return [
        TritonForwardConfig(block_m=m, block_n=n, num_warps=w, num_stages=s, loads=load)
        for m, n, w, s, load in axes
        if m >= 16 * w
    ]


SIXTY = make_configs(stages=(1, 2, 3))[:60]


def cost(config: KernelConfig) -> float:
    """A smooth valley with its floor at 128x64, 4 warps, 3 stages, descriptor; gradients are all alike."""
    if not isinstance(config, TritonForwardConfig):
        return 1.0
    steps = (
        abs(config.block_m.bit_length() - 8),
        abs(config.block_n.bit_length() - 7),
        abs(config.num_warps.bit_length() - 3),
        abs(config.num_stages - 3),
        config.loads == "pointer",
    )
    return 1.0 + sum(weight * step for weight, step in zip((0.3, 0.25, 0.2, 0.1, 0.15), steps, strict=True))


def new_study(sampler: UntriedNeighbourSampler, storage: object = None) -> optuna.Study:
    return optuna.create_study(sampler=sampler, storage=storage, study_name="s", load_if_exists=True)


def run(study: optuna.Study, sampler: UntriedNeighbourSampler, count: int, batch: int = 1) -> list[KernelConfig]:
    configs = []
    while len(configs) < count:
        trials = [study.ask() for _ in range(min(batch, count - len(configs)))]
        asked = [suggest_config(trial, sampler.space) for trial in trials]
        for trial, config in zip(trials, asked, strict=True):
            study.tell(trial, cost(config))
        configs += asked
    return configs


@pytest.mark.parametrize("batch", [1, 6])
def test_exhausts_the_space_without_a_repeat(batch):
    sampler = UntriedNeighbourSampler(SIXTY, seeds=SIXTY[5:8], seed=3)
    study = new_study(sampler)
    assert sampler.remaining(study) == 60
    configs = run(study, sampler, 60, batch)
    assert set(configs) == set(SIXTY)
    assert sampler.remaining(study) == 0
    with pytest.raises(SpaceExhausted, match="all 60 legal configs"):
        study.ask().suggest_categorical("num_warps", sampler.space.choices["num_warps"])


def test_proposes_seeds_first_in_order():
    seeds = [SIXTY[40], SIXTY[3], SIXTY[40], SIXTY[17]]
    sampler = UntriedNeighbourSampler(SIXTY, seeds=seeds)
    assert run(new_study(sampler), sampler, 3, batch=3) == [SIXTY[40], SIXTY[3], SIXTY[17]]


def test_seed_outside_the_list_stands_for_its_neighbour():
    outside = TritonForwardConfig(block_m=128, block_n=64, num_warps=4, num_stages=9)
    sampler = UntriedNeighbourSampler(make_configs(), seeds=[outside])
    expected = TritonForwardConfig(block_m=128, block_n=64, num_warps=4, num_stages=4)
    assert run(new_study(sampler), sampler, 1) == [expected]


def test_first_points_cover_every_value_of_every_number():
    configs = make_configs(loads=("pointer", "descriptor"))
    sampler = UntriedNeighbourSampler(configs, seed=1)
    spread = run(new_study(sampler), sampler, 20)
    assert ConfigSpace.of(spread).choices == ConfigSpace.of(configs).choices


def test_first_points_are_as_many_of_each_kind_however_few_there_are():
    def gradients(dq, tiles):
        return [
            TritonBackwardConfig(
                block_m1=m, block_n1=n, num_warps=4, num_stages=s, dq=dq, block_m2=t, block_n2=t,
                num_warps2=4 * (t > 0), num_stages2=int(t > 0),
            )
            for m, n, s, t in itertools.product((32, 64, 128), (32, 64, 128), (1, 2, 3), tiles)
        ]  # fmt: skip

    # 162 with a kernel of dQ, 27 and 27 without: what only one kind has leaves most of the box illegal.
    configs = gradients("kernel", (16, 32, 48, 64, 96, 128)) + gradients("atomic", (0,)) + gradients("ordered", (0,))
    sampler = UntriedNeighbourSampler(configs, seed=1)
    spread = run(new_study(sampler), sampler, 18)
    assert [sum(config.dq == dq for config in spread) for dq in ("kernel", "atomic", "ordered")] == [6, 6, 6]
    assert ConfigSpace.of(spread).choices["block_m1"] == (32, 64, 128)
    everything = UntriedNeighbourSampler(configs, seed=1, n_quasi_random=len(configs))
    assert set(run(new_study(everything), everything, len(configs))) == set(configs)


def test_same_seed_same_sequence():
    def sequence(seed: int) -> list[KernelConfig]:
        sampler = UntriedNeighbourSampler(SIXTY, seed=seed)
        return run(new_study(sampler), sampler, 40, batch=6)

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


def test_resumes_from_a_journal_without_repeating(tmp_path: Path):
    def open_study() -> tuple[optuna.Study, UntriedNeighbourSampler]:
        sampler = UntriedNeighbourSampler(SIXTY, seeds=SIXTY[:4], seed=5)
        return new_study(sampler, JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))), sampler

    study, sampler = open_study()
    before = run(study, sampler, 25, batch=5)
    still_running = suggest_config(study.ask(), sampler.space)
    study, sampler = open_study()
    assert sampler.remaining(study) == 34
    after = run(study, sampler, 34, batch=5)
    assert set(before) | {still_running} | set(after) == set(SIXTY)


def test_failed_trials_come_back_and_asked_ones_count_before_their_values_are_known():
    sampler = UntriedNeighbourSampler(SIXTY, seeds=SIXTY[:2])
    study = new_study(sampler)
    first, second = study.ask(), study.ask()
    first.suggest_categorical("block_m", sampler.space.choices["block_m"])
    assert suggest_config(second, sampler.space) == SIXTY[1]
    assert suggest_config(first, sampler.space) == SIXTY[0]
    study.tell(first, state=optuna.trial.TrialState.FAIL)
    assert run(study, sampler, 1) == [SIXTY[0]]
    assert sampler.remaining(study) == 58


def test_beats_random_search_on_a_smooth_valley():
    configs = make_configs(loads=("pointer", "descriptor"))
    ours, chance = [], []
    for seed in range(5):
        sampler = UntriedNeighbourSampler(configs, seed=seed)
        ours.append(min(map(cost, run(new_study(sampler), sampler, 40, batch=6))))
        chance.append(min(map(cost, random.Random(seed).sample(configs, 40))))
    assert statistics.mean(ours) <= statistics.mean(chance)
    assert statistics.mean(ours) <= 1.05


def test_says_nothing_experimental():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = UntriedNeighbourSampler(SIXTY, n_quasi_random=2)
        run(new_study(sampler), sampler, 8, batch=2)


def hopper_configs() -> list[KernelConfig]:
    return [
        HopperForwardConfig(
            consumers=consumers, block_n=n, num_warps=4, num_stages=s, queries=queries, turns=turns, head_group=g
        )
        for consumers, n, s, queries, turns, g in itertools.product(
            (1, 2, 3), (64, 128), (2, 3), ("shared", "registers"), ("free", "alternate"), (1, 4)
        )
    ]  # fmt: skip


def test_configs_of_two_templates_make_one_space():
    configs = [*hopper_configs(), *SIXTY]
    space = ConfigSpace.of(configs)
    assert space.choices["template"] == space.templates == ("gluon/hopper_forward", "triton/forward")
    assert space.choices["block_m"] == (*ConfigSpace.of(SIXTY).choices["block_m"], "")
    assert space.choices["queries"] == ("", "registers", "shared")
    assert space.choices["num_warps"] == (2, 4, 8)
    assert [space.config(dict(zip(space.choices, space.key(c), strict=True))) for c in configs] == configs
    # As before there were several.
    assert "template" not in ConfigSpace.of(SIXTY).choices


def test_exhausts_two_templates_without_a_repeat():
    configs = [*hopper_configs()[:40], *SIXTY[:20]]
    seeds = [SIXTY[3], configs[7]]
    sampler = UntriedNeighbourSampler(configs, seeds=seeds, seed=2, n_quasi_random=10)
    tried = run(new_study(sampler), sampler, 60, batch=4)
    assert tried[:2] == seeds
    assert set(tried) == set(configs)


def test_first_points_are_of_each_template_in_turn():
    sampler = UntriedNeighbourSampler([*hopper_configs(), *make_configs()], seed=1)
    spread = run(new_study(sampler), sampler, 16)
    assert [config.template for config in spread[:4]] == ["gluon/hopper_forward", "triton/forward"] + [
        "gluon/hopper_forward"
    ] * 2
    own = [config for config in spread if isinstance(config, HopperForwardConfig)]
    assert {config.consumers for config in own} == {1, 2, 3}
    assert len({(config.queries, config.turns) for config in own}) == 4


def test_a_neighbour_is_of_the_same_template():
    configs = [*hopper_configs(), *SIXTY]
    outside = HopperForwardConfig(consumers=2, block_n=256, num_warps=4, num_stages=2, rescale=8, tiles="overlap")
    sampler = UntriedNeighbourSampler(configs, seeds=[outside])
    (found,) = run(new_study(sampler), sampler, 1)
    assert found == HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)


def test_a_seed_of_another_template_is_refused():
    with pytest.raises(ConfigError, match="every seed must be a config of triton/forward"):
        UntriedNeighbourSampler(SIXTY, seeds=hopper_configs()[:1])


def test_refuses_an_empty_list():
    with pytest.raises(ConfigError, match="needs legal configs"):
        UntriedNeighbourSampler([])
