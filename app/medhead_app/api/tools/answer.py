"""The calls of an answer in OpenAI's format, whole and in the deltas of a stream."""

from __future__ import annotations

from typing import Any

from medhead_app.api.tools.plan import ToolPlan
from medhead_app.api.tools.reader import Delta


class ToolAnswer:
    """Reads the text of one choice.

    Args:
        plan: of the request.

    Attributes:
        content: of the text so far.
        calls: of the text so far.
    """

    def __init__(self, plan: ToolPlan) -> None:
        self._reader, self._new_id = plan.new_reader(), plan.format.new_id
        self.content, self.calls = "", list[dict[str, Any]]()

    def add(self, text: str) -> list[Delta]:
        """Take a piece of the text; return what it adds."""
        return self._keep(self._reader.feed(text))

    def finish(self) -> list[Delta]:
        """Return what was held back at the end of the text."""
        return self._keep(self._reader.finish())

    def chat_delta(self, delta: Delta) -> dict[str, Any]:
        """Return a delta as that of a chat's message."""
        if delta.call is None:
            return {"content": delta.text}
        function: dict[str, Any] = {"arguments": delta.text}
        call: dict[str, Any] = {"index": delta.call}
        if delta.name is not None:
            call |= {"id": self.calls[delta.call]["id"], "type": "function"}
            function = {"name": delta.name, **function}
        return {"tool_calls": [call | {"function": function}]}

    def message(self) -> dict[str, Any]:
        """Return the fields of a whole chat's message."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"content": self.content or (None if self.calls else ""), **calls}

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            if delta.call is None:
                self.content += delta.text
                continue
            if delta.name is not None:
                function = {"name": delta.name, "arguments": ""}
                self.calls.append({"id": self._new_id(), "type": "function", "function": function})
            self.calls[delta.call]["function"]["arguments"] += delta.text
        return deltas
