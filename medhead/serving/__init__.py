"""Serving several people with one model: requests join and leave one decode loop between steps (continuous batching)."""

from medhead.serving.engine import Engine
from medhead.serving.handle import Ticket
from medhead.serving.request import EngineError, Piece, QueueFullError, Request, Result, Stopped, TreeView

__all__ = ["Engine", "EngineError", "Piece", "QueueFullError", "Request", "Result", "Stopped", "Ticket", "TreeView"]
