"""The loop of all tasks in one process: what its own backend has to see to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from collectives import run, tiny_job

from taskray.runtime.checkpoints import CheckpointStore
from taskray.runtime.inline import InlineCollective


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
