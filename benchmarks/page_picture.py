"""Take the picture of a report for README.md with headless Chromium.

    python benchmarks/page_picture.py runs/demo/report.html [--out docs/images/report.png]

The picture shows the top of the page, and is refused if it is larger than a README should load.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 250_000


def main() -> None:
    """Write the PNG file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--width", type=int, default=1000, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, default=1000, help="of the window, in CSS pixels")
    parser.add_argument("--from-y", type=int, default=0, help="scroll down by this many CSS pixels first")
    options = parser.parse_args()
    picture = screenshot(options.page.resolve(), options.width, options.height, options.from_y)
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"The picture has {len(picture)} bytes; at most {MOST_BYTES} are allowed. Lower --height.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(picture)
    print(f"{options.out}: {len(picture)} bytes")


def screenshot(page: Path, width: int, height: int, from_y: int = 0) -> bytes:
    """Return the PNG of a local page in a window of this size, in its light colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise SystemExit("Chromium and chromedriver are needed. On Debian: apt-get install chromium chromium-driver")
    settings = webdriver.ChromeOptions()
    settings.binary_location = browser
    with tempfile.TemporaryDirectory(prefix="btm-picture-") as profile:
        for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"):
            settings.add_argument(argument)
        with webdriver.Chrome(settings, Service(driver)) as window:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
            window.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
            window.get(page.as_uri())
            window.execute_script(f"window.scrollTo(0, {from_y})")
            return window.get_screenshot_as_png()


if __name__ == "__main__":
    main()
