"""The base of all parts of a request."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Refuse unknown fields, and strings where numbers are expected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
