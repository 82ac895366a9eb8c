"""The names that a job may use, and how a name and its arguments become an object.

A name is a built-in one from ``BUILTIN`` or an import path ``package.module:Name``. The arguments
that a job may give are those of the class's ``__init__``: its signature and docstring are the
reference, its type hints are checked.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from taskray.errors import InputError, one_line
from taskray.job.validation import first_problem
from taskray.job.validation import nearest as nearest

BUILTIN: dict[str, dict[str, str]] = {
    "reader": {
        "world": "taskray.data.world:World",
        "seven_scenes": "taskray.data.readers.seven_scenes:SevenScenes",
        "nyuv2": "taskray.data.readers.nyuv2:NYUv2",
        "kitti_tracking": "taskray.data.readers.kitti_tracking:KittiTracking",
        "kitti_odometry": "taskray.data.readers.kitti_odometry:KittiOdometry",
        "cityscapes": "taskray.data.readers.cityscapes:Cityscapes",
        "coco": "taskray.data.readers.coco:Coco",
        "parquet": "taskray.data.storage.parquet:ParquetFolder",
    },
    "model": {
        "unet": "taskray.models.unet:UNet",
        "encoder_decoder": "taskray.models.encoder_decoder:EncoderDecoder",
        "densemtl": "taskray.models.densemtl:DenseMTL",
        "huggingface": "taskray.models.huggingface:HuggingFaceModel",
        "multinetpp": "taskray.models.multinetpp:MultiNetPlusPlus",
        "motion_net": "taskray.models.motion:MotionNet",
        "pillars": "taskray.models.pillars:Pillars",
        "frames_and_pairs": "taskray.models.frames_and_pairs:FramesAndPairs",
    },
    "task": {
        "depth": "taskray.tasks.depth:Depth",
        "normals": "taskray.tasks.normals:Normals",
        "segmentation": "taskray.tasks.segmentation:Segmentation",
        "edges": "taskray.tasks.edges:Edges",
        "ego_motion": "taskray.tasks.ego_motion:EgoMotion",
        "object_motion": "taskray.tasks.object_motion:ObjectMotion",
        "motion": "taskray.tasks.motion:Motion",
        "motion_mask": "taskray.tasks.motion_mask:MotionMask",
        "multi": "taskray.tasks.multi:multi",
        "detection": "taskray.tasks.detection:Detection",
        "box_flow": "taskray.tasks.box_flow:BoxFlow",
    },
    "relation": {
        "depth_normals": "taskray.relations.depth_normals:DepthNormals",
        "scene_photometric": "taskray.relations.scene_photometric:ScenePhotometric",
        "segmentation_warp": "taskray.relations.segmentation_warp:SegmentationWarp",
        "cross_task": "taskray.relations.cross_task:CrossTask",
        "motion_consistency": "taskray.relations.motion_consistency:MotionConsistency",
        "adversarial": "taskray.relations.adversarial:Adversarial",
    },
    "weighting": {
        "sum": "taskray.weighting.weighting:Sum",
        "fixed": "taskray.weighting.weighting:Fixed",
        # of the losses' values
        "equal": "taskray.weighting.scalarized:Mean",
        "random": "taskray.weighting.scalarized:Random",
        "uncertainty": "taskray.weighting.scalarized:UW",
        "dwa": "taskray.weighting.scalarized:DWA",
        "geometric": "taskray.weighting.scalarized:GeometricMean",
        "focused": "taskray.weighting.scalarized:Focused",
        "famo": "taskray.weighting.scalarized:FAMO",
        "imtl_l": "taskray.weighting.scalarized:IMTLL",
        "stch": "taskray.weighting.scalarized:STCH",
        "cosmos": "taskray.weighting.scalarized:COSMOS",
        "pbi": "taskray.weighting.scalarized:PBI",
        # of their gradients
        "gradnorm": "taskray.weighting.gradnorm:GradNorm",
        "aligned_mtl": "taskray.weighting.aggregated:AlignedMTL",
        "cagrad": "taskray.weighting.aggregated:CAGrad",
        "config": "taskray.weighting.aggregated:ConFIG",
        "dualproj": "taskray.weighting.aggregated:DualProj",
        "excess_mtl": "taskray.weighting.aggregated:ExcessMTL",
        "fairgrad": "taskray.weighting.aggregated:FairGrad",
        "graddrop": "taskray.weighting.aggregated:GradDrop",
        "gradvac": "taskray.weighting.aggregated:GradVac",
        "imtl_g": "taskray.weighting.aggregated:IMTLG",
        "krum": "taskray.weighting.aggregated:Krum",
        "mgda": "taskray.weighting.aggregated:MGDA",
        "nash_mtl": "taskray.weighting.aggregated:NashMTL",
        "pcd": "taskray.weighting.aggregated:PCD",
        "pcgrad": "taskray.weighting.aggregated:PCGrad",
        "trimmed_mean": "taskray.weighting.aggregated:TrimmedMean",
        "upgrad": "taskray.weighting.aggregated:UPGrad",
    },
    "loss": {
        "mse": "taskray.tasks.losses:mse",
        "log_mse": "taskray.tasks.losses:log_mse",
        "l1": "taskray.tasks.losses:l1",
        "huber": "taskray.tasks.losses:huber",
        "berhu": "taskray.tasks.losses:berhu",
        "cosine": "taskray.tasks.losses:cosine",
    },
}


BASES = {
    "reader": "taskray.data.readers.reader:Reader",
    "model": "torch.nn:Module",
    "task": "taskray.tasks.task:Task",
    "relation": "taskray.relations.relation:Relation",
    "weighting": "taskray.weighting.weighting:Weighting",
}
"""The base class of each kind of plugin; losses are plain functions."""


NAMES = {
    "reader": ("columns",),
    "task": ("quantities", "inputs", "labels"),
    "relation": ("quantities", "inputs", "constant"),
}
"""Attributes of each kind that are tuples of names; the first one must not be empty."""


def resolve(kind: str, name: str, where: str) -> Any:
    """The class or function behind ``name``; InputError names the key ``where`` otherwise."""
    path = BUILTIN[kind].get(name, name)
    if ":" not in path:
        raise InputError(
            where,
            f"unknown {kind} {name!r}; {nearest(name, list(BUILTIN[kind]))} "
            "(or an import path 'package.module:Name')",
        )
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a job's own code is usually beside the job file
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        if module_name in sys.modules:
            raise InputError(where, f"module {module_name!r} has no {attribute!r}") from None
        raise InputError(where, f"cannot import {module_name!r}: {one_line(error)}") from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise InputError(where, f"cannot import {module_name!r}: {one_line(error)}") from error
    if not callable(found):
        raise InputError(
            where, f"{name!r} is of type {type(found).__name__}, expected a class or function"
        )
    return found


def arguments_of(target: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function, which a job or taskray itself may pass."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters
    return {n: p for n, p in parameters.items() if p.kind in named}


def check_arguments(
    target: Any, arguments: Mapping[str, Any], where: str, given: Collection[str]
) -> dict[str, Any]:
    """The arguments, converted to the types of ``target``'s signature.

    ``given`` are the arguments that taskray passes itself. A signature with ``**keywords`` takes
    any argument. Raises InputError for an unknown argument (with the nearest known one), for a
    missing one, for a wrong type, and if ``target`` has no signature or its type hints cannot be
    resolved (for example, imported under ``TYPE_CHECKING``).
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        kinds = {p.kind for p in inspect.signature(target).parameters.values()}
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:
        raise InputError(where, f"its signature cannot be read: {one_line(error)}") from error
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    known = {n: p for n, p in arguments_of(target).items() if n not in given}
    checked = {}
    for name, value in arguments.items():
        if name not in known and not takes_any:
            raise InputError(f"{where}.{name}", f"unknown key; {nearest(name, list(known))}")
        hint = hints.get(name, Any) if name in known else Any
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a settings class has its own configuration
            adapter = TypeAdapter(hint)
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            raise InputError(*first_problem(error, hint, f"{where}.{name}")) from None
        except InputError as error:  # from a validator of a settings class
            raise InputError(f"{where}.{name}.{error.key}", error.text) from None
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise InputError(f"{where}.{name}", "required, but not given")
    return checked


def build(kind: str, name: str, arguments: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Build the plugin ``name`` from the job's ``arguments`` and the ``given`` ones of taskray.

    Raises InputError, naming the key, for an unknown name, an unknown or missing argument, a
    value of the wrong type, a value that the class itself refuses, and an object of another base
    class than ``BASES`` has for this kind.
    """
    target = resolve(kind, name, where)
    checked = check_arguments(target, arguments, where, given)
    try:
        built = target(**checked, **given)
    except InputError as error:  # its key may be an argument of the class: make it the job's key
        argument = re.split(r"[:.\s]", error.key, maxsplit=1)[0]
        if error.key.startswith(where):
            raise
        if argument in arguments_of(target):
            raise InputError(f"{where}.{error.key}", error.text) from None
        raise InputError(where, str(error)) from None
    except (Exception, SystemExit) as error:
        raise InputError(where, one_line(error)) from error
    if kind in BASES and not isinstance(built, resolve(kind, BASES[kind], where)):
        wanted = BASES[kind].replace(":", ".")
        raise InputError(where, f"{name!r} makes {type(built).__name__}, expected {wanted}")
    for number, attribute in enumerate(NAMES.get(kind, ())):
        found = getattr(built, attribute, None)
        names = isinstance(found, (tuple, list)) and all(isinstance(n, str) for n in found)
        if not names or (number == 0 and not found):
            raise InputError(
                where, f"{name!r} has no {attribute}: got {found!r}, expected a tuple of names"
            )
    if kind == "task" and not isinstance(getattr(built, "out_channels", None), Mapping):
        raise InputError(
            where, f"{name!r} has no out_channels, expected a mapping of heads to channels"
        )
    return built
