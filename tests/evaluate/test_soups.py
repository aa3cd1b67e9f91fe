from __future__ import annotations

from btm_scale.evaluate.soups import greedy_members


def test_a_soup_takes_whoever_does_not_raise_the_loss() -> None:
    losses = {("a",): 3.0, ("a", "b"): 3.1, ("a", "c"): 2.5, ("a", "c", "d"): 2.5}
    asked = []

    def loss(names: tuple[str, ...]) -> float:
        asked.append(names)
        return losses[names]

    assert greedy_members(["a", "b", "c", "d"], loss) == ("a", "c", "d")
    assert asked == [("a",), ("a", "b"), ("a", "c"), ("a", "c", "d")]


def test_a_single_candidate_is_the_soup() -> None:
    assert greedy_members(["a"], lambda names: 1.0) == ("a",)
