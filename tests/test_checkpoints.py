"""Checkpoints: complete or absent, on any pyarrow filesystem."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from pyarrow import fs
from torch import nn

from taskray.errors import InputError
from taskray.loop.learned import Learned
from taskray.relations.relation import Relation
from taskray.runtime.checkpoints import (
    MODEL,
    STATE,
    CheckpointStore,
    find_checkpoint,
    load_into,
    open_filesystem,
)
from taskray.weighting.weighting import Sum, Weighting


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def state(step: int) -> dict:
    return {"step": step, "random": torch.get_rng_state(), "optimizer": {"m": torch.ones(3)}}


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=2)


def test_what_was_saved_comes_back_exactly(store):
    model = network()
    store.save("depth", 40, model, state(40))
    checkpoint = store.latest("depth")
    other = network(4)
    nn.init.zeros_(other[0].weight)
    load_into(other, checkpoint)
    assert checkpoint.step == checkpoint.state["step"] == 40
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_state_loads_without_running_code(store, tmp_path):
    store.save("depth", 40, network(), state(40))
    loaded = torch.load(tmp_path / "depth" / "step_40" / STATE, weights_only=True)
    assert loaded["step"] == 40


def test_an_object_store_which_cannot_rename_folders_takes_checkpoints(tmp_path):
    class Objects(fs.SubTreeFileSystem):
        def move(self, source, target):
            raise OSError("moving a folder is not supported")

    store = CheckpointStore(tmp_path)
    store.filesystem, store.root = Objects(str(tmp_path), fs.LocalFileSystem()), "run"
    for step in (10, 20, 30, 30):
        store.save("depth", step, network(), state(step))
    assert store.steps("depth") == [20, 30]
    store.filesystem.delete_file("run/depth/step_30/manifest.json")  # as if cut off before it
    assert store.latest("depth").step == 20


def test_only_the_newest_are_kept(store):
    for step in (10, 20, 30, 30):
        store.save("depth", step, network(), state(step))
    assert store.steps("depth") == [20, 30]


def test_tasks_do_not_see_each_others_checkpoints(store):
    store.save("depth", 10, network(), state(10))
    assert store.latest("normals") is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "garbage"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, tmp_path, damage):
    for step in (10, 20):
        store.save("depth", step, network(), state(step))
    folder = tmp_path / "depth" / "step_20"
    content = (folder / MODEL).read_bytes()
    match damage:
        case "truncated":
            (folder / MODEL).write_bytes(content[:-7])
        case "missing":
            (folder / STATE).unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "garbage":
            (folder / MODEL).write_bytes(bytes(len(content)))
    assert store.latest("depth").step == 10


def test_where_all_are_damaged_the_error_names_the_file(store, tmp_path):
    store.save("depth", 10, network(), state(10))
    model = tmp_path / "depth" / "step_10" / MODEL
    model.write_bytes(bytes(model.stat().st_size))
    with pytest.raises(InputError, match=r"step_10.*cannot be read"):
        store.latest("depth")


def test_weights_of_another_model_are_refused_with_the_first_that_differs(store):
    store.save("depth", 10, network(8), state(10))
    with pytest.raises(
        InputError, match=r"another model: weight '0.weight' has shape \(8, 3\), exp"
    ):
        load_into(network(4), store.latest("depth"))
    with pytest.raises(
        InputError, match=r"another model: the file has an unknown weight '1\.bias'"
    ):
        load_into(nn.Sequential(nn.Linear(3, 8)), store.latest("depth"))


class LearnedRelation(nn.Module, Relation):
    """Has a weight and a buffer, and is never called here."""

    quantities = ("depth",)

    def __init__(self) -> None:
        super().__init__()
        self.lens = nn.Linear(2, 2)
        self.register_buffer("uses", torch.zeros(()))


class LearnedWeighting(Weighting):
    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))

    def forward(self, losses):
        raise NotImplementedError


def learned(value: float) -> Learned:
    """A task that learns a relation and a weighting, all of whose weights are ``value``."""
    module = Learned(network(), {"bent": LearnedRelation()}, LearnedWeighting())
    for tensor in module.weights().values():
        tensor.fill_(value)
    return module


def test_the_checkpoint_of_a_task_has_the_weights_of_its_relations_and_its_weighting(store):
    store.save("depth", 40, learned(3.0), state(40))
    weights = store.latest("depth").weights
    assert set(weights) == {
        *network().state_dict(),
        "relation:bent.lens.weight",
        "relation:bent.lens.bias",
        "relation:bent.uses",
        "weighting:log_variance",
    }
    other = learned(0.0)
    load_into(other, store.latest("depth"))
    assert all((p == 3.0).all() for p in [*other.parameters(), *other.buffers()])


def test_a_network_alone_reads_the_checkpoint_of_a_task_with_a_learned_relation(store):
    store.save("depth", 40, learned(3.0), state(40))
    alone = network()
    load_into(alone, store.latest("depth"))
    assert all((p == 3.0).all() for p in alone.parameters())


def test_without_learned_relations_a_task_has_the_checkpoint_of_its_network_alone(store):
    store.save("depth", 40, Learned(network(), {}, Sum()), state(40))
    assert set(store.latest("depth").weights) == set(network().state_dict())
    store.save("depth", 50, network(8), state(50))
    load_into(Learned(network(8), {}, Sum()), store.latest("depth"))


def test_a_checkpoint_without_the_weights_of_a_learned_relation_is_refused(store):
    store.save("depth", 10, network(), state(10))
    with pytest.raises(InputError, match=r"the file lacks weight 'relation:bent\.lens\.bias'"):
        load_into(learned(0.0), store.latest("depth"))
    store.save("depth", 20, learned(0.0), state(20))
    with pytest.raises(InputError, match=r"an unknown weight 'relation:bent\.lens\.bias'"):
        load_into(Learned(network(), {}, Sum()), store.latest("depth"))


def test_any_pyarrow_filesystem_will_do(tmp_path):
    store = CheckpointStore(f"file://{tmp_path}/by_uri")
    store.save("depth", 10, network(), state(10))
    assert CheckpointStore(tmp_path / "by_uri").latest("depth").step == 10

    memory = CheckpointStore("mock://bucket/run")
    assert not isinstance(memory.filesystem, fs.LocalFileSystem)
    memory.save("depth", 10, network(), state(10))
    assert memory.latest("depth").step == 10


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    CheckpointStore("~/run/checkpoints").save("depth", 10, network(), state(10))
    assert (tmp_path / "run/checkpoints/depth/step_10" / MODEL).is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("checkpoint: {path: ~/run/checkpoints}")
    for place in ("~/run", "~/run/checkpoints/depth/step_10", "~/other"):
        assert find_checkpoint(place, "depth").step == 10
    with pytest.raises(InputError, match=r"^~nobody-at-all/x: cannot be opened: "):
        open_filesystem("~nobody-at-all/x")


def test_a_location_that_cannot_be_opened_is_named():
    with pytest.raises(InputError, match=r"^nosuch://x: cannot be opened: "):
        open_filesystem("nosuch://x")


WRITER = """
import sys, torch
from torch import nn
from taskray.runtime.checkpoints import CheckpointStore
store = CheckpointStore(sys.argv[1])
model = nn.Linear(1000, 500)
step = (store.steps("depth") or [0])[-1]
while True:
    step += 1
    store.save("depth", step, model, {"step": step})
    print(step, flush=True)
"""


def test_a_write_killed_at_any_moment_leaves_the_previous_checkpoint(tmp_path):
    saved = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with process:
            process.stdout.readline()  # it has saved one
            time.sleep(random.Random(attempt).uniform(0.0, 0.1))
            os.kill(process.pid, signal.SIGKILL)
            printed = [int(line) for line in process.stdout]
        checkpoint = CheckpointStore(tmp_path).latest("depth")
        assert checkpoint.step == checkpoint.state["step"] > saved
        assert checkpoint.step >= max(printed, default=0)
        saved = checkpoint.step
