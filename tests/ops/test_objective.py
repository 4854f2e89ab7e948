"""An objective is right or it is refused, with every fault in one message."""

import math
from typing import Any

import pytest

from sod_mcore.ops import Objective


def test_default_is_the_published_method() -> None:
    objective = Objective()
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.28, 3.0)
    assert not objective.needs_teacher_logprobs
    assert not objective.needs_teacher_topk


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k2_coefficient": -1.0}, r"k2_coefficient=-1\.0"),
        ({"topk_coefficient": math.nan}, "topk_coefficient=nan"),
        ({"entropy_coefficient": math.inf}, "entropy_coefficient=inf"),
        ({"policy_coefficient": 0.0}, "there is no loss"),
        ({"clip_low": 1.1}, r"clip_low=1\.1"),
        ({"clip_high": -0.1}, r"clip_high=-0\.1"),
        ({"dual_clip": 1.0}, r"dual_clip=1\.0"),
        ({"topk_divergence": "k1"}, "topk_divergence='k1'.*is an advantage"),
        ({"jsd_beta": 1.0}, r"jsd_beta=1\.0.*reverse_kl"),
    ],
)
def test_each_fault_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"clip_low=2.*dual_clip=0.*jsd_beta=-1"):
        Objective(clip_low=2, dual_clip=0, jsd_beta=-1)
