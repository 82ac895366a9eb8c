"""Names that a job may use, and how a name plus its arguments becomes an object.

A name is either a built-in one from ``BUILTIN`` or an import path ``package.module:Name``.
The arguments that a job may give are those of the class's ``__init__``: its signature and
docstring are the reference, its type hints are checked.
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
        "huggingface": "taskray.models.huggingface:HuggingFaceModel",
        "motion_net": "taskray.models.motion:MotionNet",
        "pillars": "taskray.models.pillars:Pillars",
    },
    "task": {
        "depth": "taskray.tasks.depth:Depth",
        "normals": "taskray.tasks.normals:Normals",
        "segmentation": "taskray.tasks.segmentation:Segmentation",
        "ego_motion": "taskray.tasks.ego_motion:EgoMotion",
        "object_motion": "taskray.tasks.object_motion:ObjectMotion",
        "motion": "taskray.tasks.motion:Motion",
        "multi": "taskray.tasks.multi:multi",
        "detection": "taskray.tasks.detection:Detection",
        "box_flow": "taskray.tasks.box_flow:BoxFlow",
    },
    "relation": {
        "depth_normals": "taskray.relations.depth_normals:DepthNormals",
        "scene_photometric": "taskray.relations.scene_photometric:ScenePhotometric",
        "segmentation_warp": "taskray.relations.segmentation_warp:SegmentationWarp",
        "motion_consistency": "taskray.relations.motion_consistency:MotionConsistency",
    },
    "loss": {
        "mse": "taskray.tasks.losses:mse",
        "log_mse": "taskray.tasks.losses:log_mse",
        "l1": "taskray.tasks.losses:l1",
        "cosine": "taskray.tasks.losses:cosine",
    },
}


BASES = {
    "reader": "taskray.data.readers.reader:Reader",
    "model": "torch.nn:Module",
    "task": "taskray.tasks.task:Task",
    "relation": "taskray.relations.relation:Relation",
}
"""What the plugins of a kind are; losses are plain functions."""


def resolve(kind: str, name: str, where: str) -> Any:
    """The class or function behind ``name``; InputError names the key ``where`` otherwise."""
    path = BUILTIN[kind].get(name, name)
    if ":" not in path:
        raise InputError(
            f"{where}: unknown {kind} {name!r}; {nearest(name, list(BUILTIN[kind]))} "
            "(or an import path 'package.module:Name')"
        )
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a job's own code usually stands beside the job
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        if module_name in sys.modules:
            raise InputError(f"{where}: module {module_name!r} has no {attribute!r}") from None
        raise InputError(f"{where}: cannot import {module_name!r}: {one_line(error)}") from error
    except (Exception, SystemExit) as error:  # a module that a person wrote may fail in any way
        raise InputError(f"{where}: cannot import {module_name!r}: {one_line(error)}") from error
    if not callable(found):
        kind_found = type(found).__name__
        raise InputError(f"{where}: {name!r} is no class or function (but of type {kind_found})")
    return found


def arguments_of(target: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function: what a job, or taskray itself, passes to it."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters
    return {n: p for n, p in parameters.items() if p.kind in named}


def check_arguments(
    target: Any, arguments: Mapping[str, Any], where: str, given: Collection[str]
) -> dict[str, Any]:
    """The arguments, converted to the types of ``target``'s signature.

    Unknown ones are refused, naming the nearest known; ``given`` are those taskray passes itself.
    A signature with ``**keywords`` takes any. InputError, too, where there is no signature, or
    its type hints cannot be looked up (imported under ``TYPE_CHECKING``, say).
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        kinds = {p.kind for p in inspect.signature(target).parameters.values()}
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:
        raise InputError(f"{where}: its arguments cannot be told: {one_line(error)}") from error
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    known = {n: p for n, p in arguments_of(target).items() if n not in given}
    checked = {}
    for name, value in arguments.items():
        if name not in known and not takes_any:
            raise InputError(f"{where}.{name}: unknown key; {nearest(name, list(known))}")
        hint = hints.get(name, Any) if name in known else Any
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a settings class brings its own configuration
            adapter = TypeAdapter(hint)
        try:
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            raise InputError(first_problem(error, hint, f"{where}.{name}")) from None
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise InputError(f"{where}.{name}: required, but not given")
    return checked


def build(kind: str, name: str, arguments: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Build the plugin ``name`` with the job's ``arguments`` and what taskray itself gives.

    Raises InputError, naming the key, for an unknown name, an unknown argument, a missing one
    or a value of the wrong type; for whatever the class itself refuses; and for what is no plugin
    of this kind (``BASES``).
    """
    target = resolve(kind, name, where)
    checked = check_arguments(target, arguments, where, given)
    try:
        built = target(**checked, **given)
    except InputError as error:  # the class names its argument; the key is where a job has it
        text = str(error)
        argument = re.split(r"[:.\s]", text, maxsplit=1)[0]
        separator = "." if argument in arguments_of(target) else ": "
        raise InputError(text if text.startswith(where) else f"{where}{separator}{text}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{where}: {one_line(error)}") from error
    if kind in BASES and not isinstance(built, resolve(kind, BASES[kind], where)):
        wanted = BASES[kind].replace(":", ".")
        raise InputError(f"{where}: {name!r} makes {type(built).__name__}, expected {wanted}")
    return built
