"""Serving several people with one model: requests join and leave one decode loop between steps (continuous batching)."""

from medhead.serving.engine import Engine
from medhead.serving.handle import RequestHandle
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
    "TreeView",
]
