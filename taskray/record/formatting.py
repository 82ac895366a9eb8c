"""Every metric's title, its direction, and how it is shown.

Result files contain ratios as fractions in [0, 1] and angles in degrees; ``percent`` metrics are
shown times 100. A metric that is not listed has no direction, unless its name marks it as
a loss, an angle or an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskray.loop.metric_key import ConsistencyLoss, SupervisedLoss, metric_of, parse

NOTHING = "—"
"""Shown where there is no value."""


@dataclass(frozen=True)
class MetricInfo:
    """One metric: title, direction, unit as shown, and decimals as shown."""

    name: str
    title: str
    higher_is_better: bool | None
    """None: neither is better."""
    unit: str = ""
    decimals: int = 3

    @property
    def percent(self) -> bool:
        """Whether a fraction is stored and a percentage shown."""
        return self.unit == "%"

    @property
    def heading(self) -> str:
        """Title, unit and an arrow towards better: ``AbsRel ↓``, ``δ < 1.25 (%) ↑``."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.title}{unit} {self.arrow}".rstrip()

    @property
    def arrow(self) -> str:
        """The direction towards better; empty if neither is."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    def format(self, value: float | None, std: float | None = None) -> str:
        """The value as shown, without its unit: ``0.393``, ``37.8 ± 0.4``."""
        if value is None or not math.isfinite(value):
            return NOTHING
        scale = 100.0 if self.percent else 1.0
        text = f"{value * scale:.{self.decimals}f}"
        return text if std is None else f"{text} ± {std * scale:.{self.decimals}f}"

    def good(self, change: float | None) -> bool | None:
        """Whether a change is an improvement; None if nothing changed or neither is better."""
        if not change or self.higher_is_better is None:
            return None
        return (change > 0) == self.higher_is_better


def _fact(name: str, title: str, unit: str = "", decimals: int = 1) -> MetricInfo:
    return MetricInfo(name, title, higher_is_better=None, unit=unit, decimals=decimals)


def _ratio(name: str, title: str) -> MetricInfo:
    return MetricInfo(name, title, higher_is_better=True, unit="%", decimals=1)


def _error(name: str, title: str, unit: str = "", decimals: int = 3) -> MetricInfo:
    return MetricInfo(name, title, higher_is_better=False, unit=unit, decimals=decimals)


METRICS: dict[str, MetricInfo] = {
    m.name: m
    for m in (
        _error("abs_rel", "AbsRel"),
        _error("sq_rel", "SqRel"),
        _error("rmse", "RMSE", "m"),
        _error("rmse_log", "RMSE log"),
        _error("abs_err", "Abs error", "m"),
        _ratio("delta_1", "δ < 1.25"),
        _ratio("delta_2", "δ < 1.25²"),
        _ratio("delta_3", "δ < 1.25³"),
        _error("mean_deg", "Mean angle", "°", 2),
        _error("median_deg", "Median angle", "°", 2),
        _ratio("within_11_25", "Within 11.25°"),
        _ratio("within_22_5", "Within 22.5°"),
        _ratio("within_30", "Within 30°"),
        _ratio("miou", "mIoU"),
        _ratio("pixel_accuracy", "Pixel accuracy"),
        _ratio("f1", "F1"),
        _ratio("mean_f1", "F1, mean of both"),
        _ratio("ods_f1", "F1, best threshold"),
        _fact("energy_mean", "Energy", decimals=2),
        MetricInfo("energy_pearson", "Energy, r with error", higher_is_better=True, decimals=2),
        MetricInfo("energy_spearman", "Energy, ρ with error", higher_is_better=True, decimals=2),
        _error("ate", "ATE", "m"),
        _error("rotation_deg", "Rotation", "°", 2),
        _error("translation_deg", "Translation", "°", 2),
        _ratio("ap_3d", "AP 3D"),
        _ratio("aph_3d", "APH 3D"),
        _ratio("ap_bev", "AP BEV"),
        _ratio("aph_bev", "APH BEV"),
        MetricInfo("delta_m", "Δm", higher_is_better=True, unit="%", decimals=2),
        MetricInfo("steps_per_second", "Steps/s", higher_is_better=True, decimals=2),
        _error("seconds", "Seconds", "s", 1),
        _error("data_wait_fraction", "Waiting for data or peers", "%", 1),
        _fact("steps", "Steps", decimals=0),
        _fact("supervised_steps", "Supervised steps", decimals=0),
        _fact("consistency_steps", "Consistency steps", decimals=0),
        _error("skipped_consistency_steps", "Skipped steps", decimals=0),
        _error("restarts", "Restarts", decimals=0),
        _error("corrupt_rows", "Corrupt rows", decimals=0),
        _fact("steps_mean", "Steps, mean"),
        _fact("steps_max", "Steps, most", decimals=0),
        _fact("seconds_mean", "Seconds, mean", "s"),
        _ratio("hit_rate", "Hit rate"),
        _fact("entries", "Entries", decimals=0),
        _fact("bytes", "Bytes", decimals=0),
        _fact("publishes", "Publishes", decimals=0),
        _error("refused", "Refused", decimals=0),
        _fact("evictions", "Evictions", decimals=0),
        _fact("look_ups", "Look-ups", decimals=0),
        _error("timed_out", "Waits that timed out", decimals=0),
    )
}
"""Every known metric, in the order in which tables show them."""


def describe(key: str) -> MetricInfo:
    """The metric of a name: a plain name, ``iou/<class>``, or either with a path before it
    (``depth/real_test/abs_rel``)."""
    metric = metric_of(key)
    if metric in METRICS:
        return METRICS[metric]
    if metric.startswith("iou/"):
        return _ratio(metric, f"IoU {metric.removeprefix('iou/')}")
    is_loss = isinstance(parse(key), SupervisedLoss | ConsistencyLoss) or metric.startswith("loss")
    lower = is_loss or metric.endswith(("_deg", "_error"))
    return MetricInfo(metric, metric.replace("_", " "), False if lower else None)


def rank(name: str) -> int:
    """A metric's place in tables; unknown metrics come last, in the order given."""
    names = list(METRICS)
    return names.index(name) if name in METRICS else len(names)


def relative_change(value: float | None, baseline: float | None) -> float | None:
    """``(value - baseline) / |baseline|``; None if that is not defined."""
    if value is None or baseline is None or not math.isfinite(value) or not baseline:
        return None
    return (value - baseline) / abs(baseline) if math.isfinite(baseline) else None


def format_change(change: float | None) -> str:
    """A relative change as a signed percentage, with a true minus sign."""
    if change is None:
        return NOTHING
    text = f"{abs(change) * 100:.1f} %"
    return text if text == "0.0 %" else ("+" if change > 0 else "\u2212") + text


def duration(seconds: float | None) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    total = max(0, round(seconds))
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def fixed(value: float | None, decimals: int) -> str:
    """A number with ``decimals`` decimals."""
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A whole number: ``1,200``."""
    return NOTHING if value is None else f"{value:,.0f}"


def size(value: float) -> str:
    """A number of bytes: ``41.0 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(value: float | None) -> str:
    """A fraction as ``97.6 %``."""
    return NOTHING if value is None else f"{value * 100:.1f} %"
