"""A task's forward server, as its trainer keeps it up to date."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from taskray.job.config import Job
from taskray.runtime.cache_link import CacheLink

CHECK_EVERY = 25
"""Steps between two looks at whether the server was restarted and has lost its weights."""


class StaleCopy:
    """Sends the network's weights to the server every ``forward_server.refresh_every`` steps, in
    the background."""

    def __init__(self, server: Any, module: nn.Module, job: Job, link: CacheLink) -> None:
        self.server, self.module, self.link = server, module, link
        self.every = job.forward_server.refresh_every
        self._sent: tuple[int, dict[str, np.ndarray]] = (0, {})

    def stepped(self, step: int) -> None:
        """The trainer has made ``step`` steps."""
        if step % self.every == 0:
            self.refresh(step)
        elif step % CHECK_EVERY == 0:
            self.link.tell(self._revive)

    def refresh(self, step: int) -> None:
        """Send the weights of now."""
        state = self.module.state_dict()
        self._sent = (step, {k: v.detach().cpu().numpy().copy() for k, v in state.items()})
        self.link.tell(self._send)

    def _send(self) -> None:
        self.link.call(self.server.refresh, *self._sent)

    def _revive(self) -> None:
        if self.link.call(self.server.version) != self._sent[0]:
            self._send()
