"""Headless Chromium, for tests of pages."""

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def rendered(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return a page's document after its scripts, and the browser's complaints of its content policy.

    The test is skipped without a browser.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    result = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "Content Security Policy" in line]
