"""What a process that trains sets once, before its first step."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST_TO_KEEP = 1 << 30
_LARGEST_BLOCK = 32 << 20
"""Bytes; glibc takes no more."""


def use_threads(count: int) -> None:
    """Ray sets one thread per reserved CPU; a task's own setting is meant instead."""
    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def keep_freed_memory() -> None:
    """Keep what tensors free for the next ones.

    A step frees and allocates the same sizes as the one before. By default glibc gives large
    blocks back to the kernel, which clears every page of them again: up to a sixth of a step.
    Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        set_option(_TRIM_THRESHOLD, _MOST_TO_KEEP)
