"""Whether a prediction has the shape that its quantity must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from taskray.data.streams.batch import Batch
from taskray.errors import TaskrayError
from taskray.schema import PREDICTED_SHAPES, QUANTITIES, quantity_of


def check_prediction(
    prediction: Mapping[str, Tensor], batch: Batch, quantities: Sequence[str]
) -> None:
    """Raise one line naming the quantity unless each is ``[B, *shape]`` on the batch's frames.

    Sizes that ``schema`` leaves open (C) may be anything; quantities it does not know are free.
    """
    missing = [q for q in quantities if q not in prediction]
    if missing:
        raise TaskrayError(f"the task does not predict {missing[0]!r}, which it says it does")
    size = {"B": next(iter(batch.tensors.values())).shape[0]}
    image = batch.tensors.get("image")
    if image is not None:
        size |= {"H": image.shape[-2], "W": image.shape[-1]}
    for name, tensor in prediction.items():
        quantity = QUANTITIES.get(quantity_of(name))
        if quantity is None:
            continue
        shape = ("B", *PREDICTED_SHAPES.get(quantity.name, quantity.shape))
        expected = [size.get(d, d) if isinstance(d, str) else d for d in shape]
        got = list(tensor.shape)
        if len(got) != len(expected) or any(
            isinstance(e, int) and e != g for e, g in zip(expected, got, strict=True)
        ):
            wanted = "x".join(map(str, expected))
            raise TaskrayError(
                f"prediction of {name!r} has shape {'x'.join(map(str, got))}, expected {wanted}"
            )
