"""The page in Chromium, without network. On Debian: apt-get install chromium chromium-driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from btm_scale.report.page import write_page

pytestmark = [pytest.mark.full, pytest.mark.slow]

HOSTILE = "<img src=x onerror=alert(1)>"
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "window-size=1400,1000"),
)
FIGURES = ["forest", "ratios", "experts", "lineage", "training-loss", "priors", "compute"]


class Browser(webdriver.Chrome):
    """Chromium with the page open, as wide as asked for."""

    def open(self, page: Path, width: int = 1400, **features: str) -> None:
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self.get(page.as_uri())

    def figure(self, name: str) -> WebElement:
        box = self.find_element(By.CSS_SELECTOR, f"[data-name={name}]")
        self.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        return box

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.get_log("browser")]  # type: ignore[no-untyped-call]


def _start(profile: Path, **preferences: Any) -> Browser:
    from selenium.webdriver.chrome.service import Service

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.fail("these tests need chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Browser(service=Service(driver), options=options)
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    return browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    browser = _start(folder / "profile", **{"download.default_directory": str(folder)})
    yield browser
    browser.quit()


@pytest.fixture
def page(config, make_results, tmp_path: Path) -> Path:
    """The page of a run with every section, and a domain with a hostile name."""
    names = ("math", HOSTILE, "</script><script>alert(2)</script>")
    results = make_results(training=names).model_copy(update={"name": HOSTILE})
    results.lineage.update({"math": {"seed": 1.0}, HOSTILE: {"math": 0.4, "seed": 0.6}})
    models = ("seed", "dense", *names)
    curves = {m: [{"step": i, "loss": 4 - i / 60 + k / 2} for i in range(1, 61)] for k, m in enumerate(models)}
    write_page(config, results, curves, tmp_path / "report.html")
    return tmp_path / "report.html"


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_without_errors_requests_or_overflow(browser, page, width, scheme):
    browser.open(page, width, prefers_color_scheme=scheme)
    drawn = """
        const boxes = [...document.querySelectorAll(".chart")];
        return boxes.filter((box) => box.querySelector(".main-svg")).map((box) => box.dataset.name);
    """
    assert browser.execute_script(drawn) == FIGURES
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    ink = browser.execute_script("return document.querySelector('.annotation-text').style.fill")
    assert (sum(map(int, ink[4:-1].split(","))) > 400) is (scheme == "dark")
    assert browser.errors() == []


@pytest.mark.parametrize("width", [1400, 400])
def test_figures_of_64_experts_are_drawn_without_errors_or_overflow(browser, config, make_results, tmp_path, width):
    names = [f"a-domain-with-a-long-name-{i}" for i in range(64)]
    curves = {m: [{"step": i, "loss": 4 - i / 60} for i in range(1, 61)] for m in ("seed", "dense", *names)}
    results = make_results(training=names)
    results.lineage.update({name: {names[0]: 1.0} for name in names[1:]})
    write_page(config, results, curves, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width)
    sizes = """
        const sizes = [...document.querySelectorAll(".chart")].map((box) => [box.dataset.name, box._fullLayout._size]);
        return sizes.map(([name, size]) => [name, size.w > 100 && size.h > 70]);
    """
    assert browser.execute_script(sizes) == [[name, True] for name in FIGURES]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.errors() == []


def test_figures_follow_a_change_of_the_theme_and_of_the_width(browser, page):
    browser.open(page, 1400, prefers_color_scheme="light")
    colours, sizes = [], []
    for scheme, width in (("light", 1400), ("dark", 400)):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        WebDriverWait(browser, 20).until(
            lambda b, w=width: b.execute_script("return document.querySelector('.main-svg').width.baseVal.value") < w
        )
        line = browser.find_element(By.CSS_SELECTOR, "[data-name=forest] .js-line")
        colours.append(line.value_of_css_property("stroke"))
        sizes.append(browser.figure("training-loss").size["height"])
    assert colours[0] != colours[1]
    assert sizes[0] != sizes[1]
    assert browser.errors() == []


def test_a_legend_click_hides_a_curve_and_hovering_shows_its_name_literally(browser, page):
    browser.open(page)
    box = browser.figure("training-loss")
    curves = "return arguments[0].querySelectorAll('.scatterlayer .trace').length"
    before = browser.execute_script(curves, box)
    names = [entry.text for entry in box.find_elements(By.CSS_SELECTOR, ".legendtext")]
    assert "seed" in names
    toggle = box.find_elements(By.CSS_SELECTOR, ".legendtoggle")[names.index("seed")]
    ActionChains(browser).move_to_element(toggle).click().perform()
    # The curve, and the raw losses behind it.
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(curves, box) == before - 2)

    # On the last point of the hostile name, while the others are dimmed.
    at = """
        const box = arguments[0], {xaxis, yaxis} = box._fullLayout, size = box._fullLayout._size;
        const at = box.data.findIndex((trace) => trace.hovertext.startsWith("&lt;img") && trace.showlegend !== false);
        const {x, y} = box.calcdata[at].at(-1);
        return [Math.round(xaxis.l2p(x) - size.w / 2), Math.round(yaxis.l2p(y) - size.h / 2)];
    """
    plot = box.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(browser).move_to_element_with_offset(plot, *browser.execute_script(at, box)).perform()
    hover = WebDriverWait(browser, 20).until(lambda b: box.find_element(By.CSS_SELECTOR, ".hovertext"))
    assert hover.text.startswith(HOSTILE)
    assert "step 60" in hover.text
    dimmed = """
        const lines = [...arguments[0].querySelectorAll(".scatterlayer .js-line")];
        return lines.map((line) => getComputedStyle(line).strokeOpacity);
    """
    opacities = browser.execute_script(dimmed, box)
    assert opacities.count("1") == 1
    assert opacities.count("0.25") == before - 3

    box = browser.figure("experts")
    plot = box.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(browser).move_to_element(plot).perform()
    hover = WebDriverWait(browser, 20).until(lambda b: box.find_element(By.CSS_SELECTOR, ".hovertext"))
    assert " on " in hover.text
    assert browser.errors() == []


def test_a_hostile_name_is_text_and_no_handler_runs(browser, page):
    browser.open(page)
    box = browser.figure("forest")
    for line in ("ratios", "experts", "priors", "training-loss"):
        plot = browser.figure(line).find_element(By.CSS_SELECTOR, ".nsewdrag")
        for across in (-0.3, -0.1, 0.1, 0.3):
            ActionChains(browser).move_to_element_with_offset(plot, int(plot.size["width"] * across), 0).perform()
    assert browser.execute_script("return document.images.length") == 0
    assert browser.find_element(By.TAG_NAME, "h1").text == HOSTILE
    assert HOSTILE in browser.execute_script("return arguments[0].textContent", box)
    assert "<img src=" in browser.execute_script("return document.querySelector('[data-name=experts]').textContent")
    with pytest.raises(Exception, match="no such alert"):
        _ = browser.switch_to.alert.text
    assert browser.errors() == []


def test_a_figure_is_saved_as_png(browser, page):
    browser.open(page)
    box = browser.figure("compute")
    folder = Path(browser.capabilities["chrome"]["userDataDir"]).parent
    behavior = {"behavior": "allow", "downloadPath": str(folder)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    button = box.find_element(By.CSS_SELECTOR, ".modebar-btn")
    assert button.get_attribute("data-title") == "Save as PNG"
    ActionChains(browser).move_to_element(button).click().perform()
    WebDriverWait(browser, 30).until(lambda b: (folder / "compute.png").is_file())
    assert (folder / "compute.png").read_bytes().startswith(b"\x89PNG")


def test_without_javascript_the_page_has_its_sentences_and_tables_and_no_empty_box(page, tmp_path):
    browser = _start(tmp_path / "profile", **{"profile.managed_default_content_settings.javascript": 2})
    try:
        browser.open(page)
        assert not any(box.is_displayed() for box in browser.find_elements(By.CSS_SELECTOR, ".chart"))
        tables = browser.find_elements(By.CSS_SELECTOR, "figure table")
        assert len(tables) == 4
        assert all(table.is_displayed() for table in tables)
        captions = [caption.text for caption in browser.find_elements(By.TAG_NAME, "figcaption")]
        assert len(captions) == len(FIGURES)
        assert all(captions)
        assert not any("Click" in caption for caption in captions)
    finally:
        browser.quit()
