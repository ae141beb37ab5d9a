"""A real headless Chromium for tests that look at a page: the machine's own, or one fetched into `build/browser`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser of Playwright. Skips the test, with the reason, where none can be had."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make setup` does that")
    spec = importlib.util.spec_from_file_location("fetch_browser", ROOT / "packaging" / "fetch_browser.py")
    assert spec is not None
    assert spec.loader is not None
    fetch_browser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch_browser)
    try:
        program = fetch_browser.provide(ROOT / "build" / "browser")
    except (fetch_browser.FetchError, OSError) as err:
        pytest.skip(str(err))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
