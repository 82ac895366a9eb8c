"""The loop of all tasks in one process: what its own backend has to see to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from collectives import run, tiny_job

from taskray.data.streams.batch import Batch
from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.inline import InlineCollective, LocalPeers


def test_after_ctrl_c_the_result_tells_of_the_step_that_the_checkpoints_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives: list[InlineCollective] = []
    step = InlineCollective._step

    def interrupted(self: InlineCollective, living: dict[str, Any]) -> None:
        if living["depth"].trainer.step == 17:
            raise KeyboardInterrupt
        step(self, living)

    monkeypatch.setattr(InlineCollective, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_job("runtime.chunk_steps=10"), tmp_path, inline=True, before=collectives.append)
    result = collectives[0].result(0.0)
    assert result["status"] == "interrupted"
    store = CheckpointStore(tmp_path / "checkpoints")
    for name, task in result["tasks"].items():
        assert store.steps(name)[-1] == task["steps"] == 17
        assert task["supervised_steps"] + task["consistency_steps"] == 17


def test_what_was_asked_before_an_evaluation_or_a_checkpoint_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, int] = {}

    def request(self: LocalPeers, batch: Batch, now: int, use: int) -> None:
        if self.name == "depth":
            asked[use] = asked.get(use, 0) + 1

    monkeypatch.setattr(LocalPeers, "request", request)
    job = tiny_job(
        "steps=40", "mediator.supervised_steps=4", "evaluation.every=9", "checkpoint.every=24",
        "runtime.chunk_steps=1",
    )  # fmt: skip
    run(job, tmp_path, inline=True)
    # a step's peers are asked for in the step before it, and these pauses come just after
    assert {use for use, times in asked.items() if times > 1} == {9, 24}
    assert set(asked) == {4, 9, 14, 19, 24, 29, 34, 39}
