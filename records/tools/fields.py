"""What submission.json may say: the type, the range and the source of every field, in one table.

A field with a `figure` has to be what the logs give; one without is said by people. What the table
does not name is not checked, and a check says so.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from records.tools.logs import Log

# ---- 1. Types ------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_date(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def is_number(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite()
    return type(value) is int


def is_count(value: Any) -> bool:
    return type(value) is int


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_seeds(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**64 for x in value)


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


class Type(NamedTuple):
    """A type of values: its name in a message, and what tells whether a value is one."""

    name: str
    accepts: Callable[[Any], bool]


TEXT = Type("a text that is not empty", is_text)
DATE = Type("a date such as 2026-04-30", is_date)
NUMBER = Type("a number", is_number)
COUNT = Type("a whole number", is_count)
FLAG = Type("true or false", is_flag)
OBJECT = Type("an object", is_object)
SEEDS = Type("a list of seeds", is_seeds)
NUMBERS = Type("a list of numbers", is_numbers)

# ---- 2. Sources ----------------------------------------------------------------------------------
# Each gives the values that a field may have, of the logs' values of its figure.


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def of_the_mean(values: Sequence[float]) -> list[float]:
    return [mean(values)]


def of_any(values: Sequence[float]) -> list[float]:
    return list(values)


def of_any_or_mean(values: Sequence[float]) -> list[float]:
    return [*values, mean(values)]


def of_the_most(values: Sequence[float]) -> list[float]:
    return [max(values)]


def of_the_deviation(values: Sequence[float]) -> list[float]:
    return [spread(values), pstdev(values)]


class Field(NamedTuple):
    """A field of submission.json."""

    type: Type
    low: float = -math.inf
    high: float = math.inf
    figures: tuple[str, ...] = ()  # of a log
    source: Callable[[Sequence[float]], list[float]] = of_the_mean
    unit: float = 1.0  # of the field, in that of its figures

    def wanted(self) -> str:
        """What a value has to be, for a message."""
        if self.low == -math.inf:
            return self.type.name
        top = f" to {self.high:g}" if self.high < math.inf else " on"
        return f"{self.type.name} from {self.low:g}{top}"

    def accepts(self, value: Any) -> bool:
        if not self.type.accepts(value):
            return False
        if self.type in (NUMBER, COUNT):
            return self.low <= value <= self.high
        return True

    def truths(self, logs: Sequence[Log]) -> list[float]:
        """The values it may have; none if no log gives its figures."""
        found: list[float] = []
        for figure in self.figures:
            values = [value for log in logs if (value := figure_of(log, figure)) is not None]
            if values:
                found += [value / self.unit for value in self.source(values)]
        return found


def figure_of(log: Log, figure: str) -> float | None:
    """A figure of a log, or one that follows from several."""
    if figure == "train_and_calibrate_ms":
        return log.train_and_calibrate_ms or None
    if figure == "final_eval_ms":
        return log.final_ms
    return log.values.get(figure)


# ---- 3. The table --------------------------------------------------------------------------------
MOST_LOSS, MOST_BYTES, MOST_SECONDS = 50.0, 1e12, 1e8


def loss(*figures: str) -> Field:
    return Field(NUMBER, 0, MOST_LOSS, figures)


def size(*figures: str, source: Any = of_any) -> Field:
    return Field(NUMBER, 0, MOST_BYTES, figures, source)


def seconds(*figures: str, source: Any = of_any) -> Field:
    return Field(NUMBER, 0, MOST_SECONDS, figures, source, 1e3)


def milliseconds(*figures: str, source: Any = of_any) -> Field:
    return Field(NUMBER, 0, 1e3 * MOST_SECONDS, figures, source)


TRAINING = ("train_ms", "train_and_calibrate_ms")
SCORED: dict[str, Field] = {  # of the whole and of a seed
    "val_bpb": loss("val_bpb"),
    "val_loss": loss("val_loss"),
    "pre_quant_val_bpb": loss("pre_bpb"),
    "pre_quant_val_loss": loss("pre_loss"),
    "steps": Field(COUNT, 0, 1e12, ("steps",), of_any),
    "step_stop": Field(COUNT, 0, 1e12, ("steps",), of_any),
    "step_avg_ms": milliseconds("step_ms"),
    "train_time_s": seconds(*TRAINING),
    "wallclock_seconds": seconds(*TRAINING),
    "train_wallclock_ms": milliseconds(*TRAINING),
    "eval_time_s": seconds("eval_ms", "total_eval_ms", "final_eval_ms"),
    "eval_time_ms": milliseconds("eval_ms", "total_eval_ms", "final_eval_ms"),
    "bytes_total": size("total", source=of_any_or_mean),
    "bytes_code": size("code", "code_unpacked"),
    "artifact_bytes": size("model", "total"),
    "compressed_model_bytes": size("model"),
    "bytes_model_int8_zlib": size("model"),
    "code_size_compressed": size("code"),
    "code_size_uncompressed": size("code_unpacked", "code"),
    "val_tokens": Field(COUNT, 1, 1e12, ("tokens",), of_any),
    "artifact_sha256": Field(TEXT),
}
WHOLE: dict[str, Field] = SCORED | {
    "author": Field(TEXT),
    "github_id": Field(TEXT),
    "name": Field(TEXT),
    "run_name": Field(TEXT),
    "blurb": Field(TEXT),
    "date": Field(DATE),
    "track": Field(TEXT),
    "hardware": Field(TEXT),
    "pytorch_version": Field(TEXT),
    "technique_summary": Field(TEXT),
    "seeds": Field(SEEDS),
    "seed_results": Field(OBJECT),
    "compliance": Field(OBJECT),
    "attribution": Field(OBJECT),
    "comparison": Field(OBJECT),
    "mean_val_bpb": loss("val_bpb"),
    "mean_val_loss": loss("val_loss"),
    "roundtrip_val_bpb": loss("val_bpb"),
    "val_bpb_std": Field(NUMBER, 0, MOST_LOSS, ("val_bpb",), of_the_deviation),
    "val_loss_std": Field(NUMBER, 0, MOST_LOSS, ("val_loss",), of_the_deviation),
    "artifact_bytes_mean": size("model", "total", source=of_the_mean),
    "artifact_bytes_max": size("model", "total", source=of_the_most),
    "train_wallclock_ms_max": milliseconds(*TRAINING, source=of_the_most),
    "eval_time_s_max": seconds("eval_ms", "total_eval_ms", "final_eval_ms", source=of_the_most),
}
COMPARISON: dict[str, Field] = {
    "baseline": Field(TEXT),
    "baseline_val_loss": Field(NUMBERS),
    "delta_nats": Field(NUMBER, -MOST_LOSS, MOST_LOSS),
    "margin_nats": Field(NUMBER, 0, MOST_LOSS),
    "p_value": Field(NUMBER, 0, 1),
}
COMPLIANCE: dict[str, Field] = {
    "train_under_600s": Field(FLAG),
    "train_under_600s_strict": Field(FLAG),
    "eval_under_600s": Field(FLAG),
    "artifact_under_16mb": Field(FLAG),
}
NEEDED = (
    ("author",),
    ("github_id",),
    ("name", "run_name"),
    ("date",),
    ("val_bpb", "mean_val_bpb"),
)


class Fault(NamedTuple):
    """What is wrong with a field, and its keys from the outside in."""

    keys: tuple[str, ...]
    what: str


def shown(value: Any) -> str:
    """A value as JSON has it, cut short."""
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def sift(
    entry: Mapping[str, Any], table: Mapping[str, Field], keys: tuple[str, ...], faults: list[Fault]
) -> dict[str, Any]:
    """The fields that are of their type and in their range; the others become `faults`."""
    kept = {}
    for key, value in entry.items():
        field = table.get(key)
        if field is None or field.accepts(value):
            kept[key] = value
        else:
            faults.append(Fault((*keys, key), f"{key} is {shown(value)}, not {field.wanted()}"))
    return kept


def sift_submission(data: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """submission.json without what is not of its type; `seed_results` by seeds as numbers."""
    kept = sift(data, WHOLE, (), faults)
    for name, table in (("comparison", COMPARISON), ("compliance", COMPLIANCE)):
        if name in kept:
            kept[name] = sift(kept[name], table, (name,), faults)
    results = {}
    for seed, entry in kept.get("seed_results", {}).items():
        keys = ("seed_results", seed)
        if not (seed.isdigit() and int(seed) < 2**64):
            faults.append(Fault(keys, f"{shown(seed)} is no seed"))
        elif is_object(entry):
            results[int(seed)] = sift(entry, SCORED, keys, faults)
        elif SCORED["val_bpb"].accepts(entry):  # a bare score
            results[int(seed)] = {"val_bpb": entry}
        else:
            faults.append(Fault(keys, f"{shown(entry)} is neither an object nor a score"))
    if "seed_results" in kept:
        kept["seed_results"] = results
    return kept


def unchecked(data: Mapping[str, Any]) -> Iterator[str]:
    """Names of fields that the table does not know."""
    for key in data:
        if key not in WHOLE:
            yield key
