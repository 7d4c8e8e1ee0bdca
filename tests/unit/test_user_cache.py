"""Where measurements are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from medhead import user_cache


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's user may have none: measurements are kept where `$MEDHEAD_CACHE` says, or nowhere."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("MEDHEAD_CACHE", str(tmp_path / "here"))
    assert user_cache.write(user_cache.cache_folder() / "costs.json", [1])
    assert user_cache.read(tmp_path / "here" / "costs.json", list, "") == [1]
    monkeypatch.delenv("MEDHEAD_CACHE")
    nowhere = user_cache.cache_folder() / "costs.json"
    assert not user_cache.write(nowhere, [1])
    assert user_cache.read(nowhere, list, "") is None
