"""One object predicts for training, evaluation, forward servers, frozen and finished tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from collectives import tiny_job
from torch import Tensor, nn

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.errors import TaskrayError
from taskray.exchange.messages import Made
from taskray.job.config import TaskConfig
from taskray.loop.assembly import build_model, build_task
from taskray.loop.network import FIRST, Network, frames_of, inputs_of
from taskray.loop.wiring import wire
from taskray.runtime.answering import Answering, Request
from taskray.tasks.depth import Depth
from taskray.tasks.ego_motion import EgoMotion

ARITHMETIC = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory_format": "channels_last"},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "memory_format": "channels_last"},
    ],
    ids=["float32", "channels_last", "bfloat16", "bfloat16 channels_last"],
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module() -> nn.Module:
    """A network whose prediction depends on its mode, and on which convolution is used."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 1, 1))


def network(of: nn.Module | None = None, **settings: Any) -> Network:
    return Network(Depth(), of or module(), TaskConfig(task="depth", **settings), "cpu")


def frames(**more: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch({"image": torch.rand(2, 3, 8, 12, generator=generator), **more}, 7, Place(0, 3, 4))


@ARITHMETIC
def test_an_inferred_prediction_is_that_of_evaluation_mode(settings: dict[str, Any]) -> None:
    one = network(**settings)
    in_training = one.predict(frames())["depth"]
    inferred = one.infer(frames())["depth"]
    one.module.eval()
    expected = one.predict(frames())["depth"]
    assert torch.equal(inferred, expected.detach())
    assert not torch.equal(inferred, in_training.detach())
    assert expected.requires_grad
    assert not inferred.requires_grad
    assert inferred.dtype == expected.dtype == torch.float32


@ARITHMETIC
@pytest.mark.parametrize("trains", [True, False])
def test_inferring_leaves_the_network_as_it_is(settings: dict[str, Any], trains: bool) -> None:
    one = network(**settings)
    one.module.train(trains)
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    one.infer(frames())
    assert one.module.training is trains
    assert all(torch.equal(before[n], value) for n, value in one.module.state_dict().items())


def test_a_network_that_fails_to_infer_goes_back_to_training() -> None:
    one = network()
    with pytest.raises(TaskrayError, match="network 'unet' on 2x4x8x12 failed: RuntimeError: "):
        one.infer(Batch({"image": torch.rand(2, 4, 8, 12)}))
    assert one.module.training


def test_bfloat16_computes_with_less_precision_and_returns_float32() -> None:
    exact, rough = (network(precision=p).infer(frames())["depth"] for p in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.05, atol=0)


def test_channels_last_changes_the_layout_of_weights_and_images_alone() -> None:
    seen: list[bool] = []
    one = network(memory_format="channels_last")
    weight = one.module[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    one.module.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            inputs[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    torch.testing.assert_close(one.infer(frames()), network().infer(frames()))
    assert seen == [True]


def test_a_frozen_network_is_in_evaluation_mode() -> None:
    assert network().module.training
    assert not network(frozen=True, checkpoint="somewhere").module.training


# Frames


def test_all_frames_go_through_the_network_together_and_come_out_by_name() -> None:
    calls: list[int] = []
    one = network()
    one.module.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    second = torch.rand(2, 3, 8, 12)
    both = one.infer(frames(image_2=second), ("", "_2"))
    assert calls == [4]
    assert set(both) == {"depth", "depth_2"}
    alone = one.infer(Batch({"image": second}))["depth"]
    torch.testing.assert_close(both["depth_2"], alone)
    torch.testing.assert_close(both["depth"], one.infer(frames())["depth"])


def test_one_frame_that_is_not_the_first_keeps_its_name() -> None:
    one, second = network(), torch.rand(2, 3, 8, 12)
    found = one.infer(frames(image_2=second), ("_2",))
    assert list(found) == ["depth_2"]
    torch.testing.assert_close(found["depth_2"], one.infer(Batch({"image": second}))["depth"])


def test_frames_and_inputs_follow_from_what_is_published() -> None:
    assert frames_of(Depth(), ()) == frames_of(Depth(), ("depth",)) == FIRST
    assert frames_of(Depth(), ("depth_2", "depth")) == ("", "_2")
    assert inputs_of(Depth(), ("", "_2")) == ("image", "image_2")
    motion = EgoMotion()
    assert inputs_of(motion, FIRST) == motion.inputs


# What is refused


class HalfSize(Depth):
    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return super().predict(output[:, :, ::2, ::2])


class Silent(Depth):
    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (HalfSize(), r"prediction of 'depth'.*shape"),
        (Silent(), "does not predict 'depth', which it announces"),
    ],
)
def test_a_prediction_of_a_wrong_shape_or_name_is_refused(task: Depth, reason: str) -> None:
    one = Network(task, module(), TaskConfig(task="depth"), "cpu")
    for predict in (one.predict, one.infer):
        with pytest.raises(TaskrayError, match=reason):
            predict(frames())


# Predicting on demand


def answering(of: Network, published: tuple[str, ...] = ("depth",), **arguments: Any) -> Any:
    """Answers, and the list of its publications."""
    published_now: list[Made] = []

    def publish(new: Made) -> None:
        published_now.append(new)

    return (
        Answering("depth", of, published, "float32", publish, **arguments),
        published_now,
    )


INPUTS = {name: values.numpy() for name, values in frames().tensors.items()}


@ARITHMETIC
def test_a_copy_of_the_network_answers_with_what_its_trainer_predicts(
    settings: dict[str, Any],
) -> None:
    trainer, copy = network(**settings), network(**settings)
    trainer.predict(frames())  # moves the statistics of the batches
    copy.module.load_state_dict(trainer.module.state_dict())
    answers, published = answering(copy)
    assert answers.predict_for(Request(7, Place(0, 3, 4), None), INPUTS, 40) is None
    (new,) = published
    assert (new.batch, new.place, new.step) == (7, Place(0, 3, 4), 40)
    np.testing.assert_array_equal(new.arrays["depth"], trainer.infer(frames())["depth"].numpy())


@ARITHMETIC
def test_a_forward_server_predicts_what_its_trainer_does(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskray.runtime import task_actor

    monkeypatch.setattr(task_actor, "use_threads", lambda count: None)
    job = tiny_job(*(f"tasks.depth.{key}={value}" for key, value in settings.items()))
    task = build_task(job, "depth")
    trainer = Network(task, build_model(job, "depth", task), job.tasks["depth"], "cpu")
    server = task_actor.ForwardServer(job.model_dump(mode="json"), "depth", 1, wire(job), None)
    published: list[Made] = []
    server.answering.publish = published.append
    request = Request(7, Place(0, 3, 4), None)
    image = np.random.default_rng(0).random((2, 3, 32, 48), np.float32)
    assert server.predict_for(request, {"image": image}) == "no weights yet"
    with torch.no_grad():
        for parameter in trainer.module.parameters():
            parameter.mul_(1.5)
    weights = {name: value.numpy() for name, value in trainer.module.state_dict().items()}
    server.refresh(40, weights)
    server.predict_for(request, {"image": image})
    expected = trainer.infer(Batch({"image": torch.from_numpy(image)}))["depth"]
    np.testing.assert_array_equal(published[0].arrays["depth"], expected.half().numpy())
    assert (published[0].step, server.version()) == (40, 40)


def test_a_prediction_of_the_same_weights_is_made_once() -> None:
    answers, published = answering(network())
    answers.predict_for(Request(7, Place(0, 3, 4), None), INPUTS, 40)
    assert answers.predict_for(Request(7, Place(0, 3, 4), 40), INPUTS, 40) is None
    answers.predict_for(Request(7, Place(0, 7, 4), None), INPUTS, 40)  # another peer, at once
    assert (answers.forward_passes, len(published)) == (1, 2)
    answers.predict_for(Request(7, Place(0, 7, 4), 40), INPUTS, 41)
    assert answers.forward_passes == 2


def test_without_reuse_every_question_costs_a_forward_pass() -> None:
    answers, published = answering(network(), reuse=False)
    for _ in range(3):
        answers.predict_for(Request(7, Place(0, 3, 4), 40), INPUTS, 40)
    assert (answers.forward_passes, len(published)) == (3, 3)
