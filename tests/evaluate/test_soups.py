from __future__ import annotations

from btm_scale.evaluate.soups import greedy_members


def test_a_soup_adds_experts_that_do_not_raise_the_loss() -> None:
    losses = {("a",): 3.0, ("a", "b"): 3.1, ("a", "c"): 2.5, ("a", "c", "d"): 2.5}
    evaluated = []

    def loss(names: tuple[str, ...]) -> float:
        evaluated.append(names)
        return losses[names]

    assert greedy_members(["a", "b", "c", "d"], loss) == ("a", "c", "d")
    assert evaluated == [("a",), ("a", "b"), ("a", "c"), ("a", "c", "d")]


def test_a_single_candidate_is_the_soup() -> None:
    assert greedy_members(["a"], lambda names: 1.0) == ("a",)
