"""Continuous batching: requests join and leave decode loops between steps, one loop per proposer and tree size."""

from medhead.serving.engine import Engine
from medhead.serving.handle import RequestHandle
from medhead.serving.logprobs import TokenLogprobs
from medhead.serving.request import EngineError, QueueFullError, Request, Result, StepOutput, Stopped, TreeView

__all__ = [
    "Engine",
    "EngineError",
    "QueueFullError",
    "Request",
    "RequestHandle",
    "Result",
    "StepOutput",
    "Stopped",
    "TokenLogprobs",
    "TreeView",
]
