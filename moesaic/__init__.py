"""Moesaic turns a dense language model into a mixture of experts, trains it, measures it,
shrinks it to FP8 and runs it.

Every verb of the command line is a function here that takes its Config and returns what
happened as a plain dict. Importing this package loads no torch: each name is imported when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.version import __version__

_HOMES = {
    "load_model": "moesaic.model.build",
    "upcycle": "moesaic.upcycling.upcycle",
    "UpcycleConfig": "moesaic.upcycling.config",
    "prepare": "moesaic.data.prepare",
    "PrepareConfig": "moesaic.data.config",
    "train": "moesaic.training.train",
    "TrainConfig": "moesaic.training.config",
    "plan_train": "moesaic.planning.train",
    "PlanTrainConfig": "moesaic.planning.config",
    "plan_serve": "moesaic.planning.serving.serve",
    "PlanServeConfig": "moesaic.planning.config",
    "plan_check": "moesaic.planning.check",
    "PlanCheckConfig": "moesaic.planning.config",
    "measure": "moesaic.measuring.measure",
    "MeasureConfig": "moesaic.measuring.config",
    "evaluate": "moesaic.evaluation.evaluate",
    "EvaluateConfig": "moesaic.evaluation.config",
    "quantize": "moesaic.quantizing.quantize",
    "QuantizeConfig": "moesaic.quantizing.config",
    "Engine": "moesaic.serving.engine.engine",
    "EngineConfig": "moesaic.serving.config",
    "RequestConfig": "moesaic.serving.config",
    "generate": "moesaic.serving.generate",
    "GenerateConfig": "moesaic.serving.config",
    "serve": "moesaic.serving.serve",
    "ServeConfig": "moesaic.serving.config",
    "chat": "moesaic.serving.chat",
    "ChatConfig": "moesaic.serving.config",
    "bench_serve": "moesaic.serving.bench",
    "BenchServeConfig": "moesaic.serving.config",
    "inspect": "moesaic.reporting.inspect",
    "InspectConfig": "moesaic.reporting.config",
    "report": "moesaic.reporting.report",
    "ReportConfig": "moesaic.reporting.config",
    "demo": "moesaic.studies.demo",
    "DemoConfig": "moesaic.studies.config",
}
"""Where each public name lives."""

__all__ = ["MoesaicError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
