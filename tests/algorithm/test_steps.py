"""Steps: runs of the mask, or turns when the turn index is known."""

import pytest
import torch

from sod_mcore.algorithm import index_steps


def test_runs_of_the_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    step_index, num_steps = index_steps(mask)
    assert step_index.tolist() == [[-1, 0, 0, -1, 1], [0, -1, 1, -1, 2], [-1] * 5]
    assert num_steps.tolist() == [2, 3, 0]


def test_masking_tokens_inside_a_turn_does_not_split_it() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 1]]).bool()
    turn = torch.tensor([[0, 0, 0, -1, 1]], dtype=torch.int16)
    step_index, num_steps = index_steps(mask, turn)
    assert step_index.tolist() == [[0, -1, 0, -1, 1]]
    assert num_steps.tolist() == [2]
    assert index_steps(mask)[1].tolist() == [3]  # what it would be without the turn index


def test_turns_without_anything_between_stay_apart() -> None:
    mask = torch.ones(1, 4).bool()
    turn = torch.tensor([[0, 0, 1, 1]])
    assert index_steps(mask, turn)[0].tolist() == [[0, 0, 1, 1]]


def test_a_turn_masked_as_a_whole_is_no_step() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1]]).bool()
    turn = torch.tensor([[0, 1, 1, 2, 2]])
    step_index, num_steps = index_steps(mask, turn)
    assert step_index.tolist() == [[0, -1, -1, 1, 1]]
    assert num_steps.tolist() == [2]


def test_turn_index_outside_the_mask_does_not_matter() -> None:
    mask = torch.tensor([[0, 1, 0]]).bool()
    turn = torch.tensor([[-7, 3, 32000]], dtype=torch.int16)
    assert index_steps(mask, turn)[0].tolist() == [[-1, 0, -1]]


def test_negative_turn_inside_the_mask_is_refused() -> None:
    mask = torch.tensor([[1, 1]]).bool()
    with pytest.raises(ValueError, match=r"turn_index is -1 at \(0, 1\)"):
        index_steps(mask, torch.tensor([[0, -1]]))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="loss_mask has shape"):
        index_steps(torch.ones(3).bool())
    with pytest.raises(ValueError, match="turn_index has shape"):
        index_steps(torch.ones(1, 3).bool(), torch.zeros(1, 2).long())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    mask = torch.ones(shape).bool()
    for turn in (None, torch.zeros(shape).long()):
        step_index, num_steps = index_steps(mask, turn)
        assert step_index.shape == shape
        assert num_steps.tolist() == [0] * shape[0]
