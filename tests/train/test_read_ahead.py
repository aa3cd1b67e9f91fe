"""The next step's text is read while this step runs, and is the same text."""

from __future__ import annotations

import threading

import pytest
import torch

from btm_scale.train.read_ahead import ReadAhead

GPU = torch.device("meta")


class Text:
    """Numbers as text; `readers` are the names of the threads that read, in order."""

    def __init__(self) -> None:
        self.readers: list[str] = []

    def read(self, first: int, count: int) -> torch.Tensor:
        self.readers.append(threading.current_thread().name)
        if first >= 100:
            raise IndexError("out of range")
        return torch.arange(first, first + count)


def test_announced_text_is_read_by_another_thread() -> None:
    text = Text()
    with ReadAhead(text.read, GPU) as ahead:
        assert ahead.read(0, 4, then=8).tolist() == [0, 1, 2, 3]
        assert ahead.read(8, 4, then=16).tolist() == [8, 9, 10, 11]
    main, *others = text.readers
    assert main == threading.current_thread().name
    assert {name.rpartition("_")[0] for name in others} == {"read-ahead"}


def test_after_a_jump_the_right_text_is_read() -> None:
    with ReadAhead(Text().read, GPU) as ahead:
        ahead.read(0, 4, then=8)
        assert ahead.read(40, 4, then=48).tolist() == [40, 41, 42, 43]
        assert ahead.read(48, 4).tolist() == [48, 49, 50, 51]


def test_an_error_belongs_to_the_step_that_needs_the_text() -> None:
    with ReadAhead(Text().read, GPU) as ahead:
        ahead.read(0, 4, then=100)
        with pytest.raises(IndexError, match="out of range"):
            ahead.read(100, 4)
        ahead.read(0, 4, then=100)  # and never needed


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    text = Text()
    with ReadAhead(text.read, torch.device("cpu")) as ahead:
        ahead.read(0, 4, then=8)
    assert len(text.readers) == 1
