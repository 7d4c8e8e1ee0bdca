"""Serving several people with one model: requests join and leave one decode loop between steps (continuous batching)."""

from medhead.serving.engine import Engine
from medhead.serving.requests import EngineError, Piece, QueueFullError, Request, Result, Stopped, TreeView
from medhead.serving.ticket import Ticket

__all__ = ["Engine", "EngineError", "Piece", "QueueFullError", "Request", "Result", "Stopped", "Ticket", "TreeView"]
