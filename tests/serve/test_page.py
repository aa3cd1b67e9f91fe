"""The page at `/` in Chromium. On Debian: apt-get install chromium chromium-driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.served_forest import Served, planner_of, running
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from btm_scale.serve.keys import Keys

pytestmark = [pytest.mark.full, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    from selenium.webdriver.chrome.service import Service

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.fail("these tests need chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(service=Service(driver), options=options)
    yield found
    found.quit()


def text_of(browser: webdriver.Chrome, name: str) -> str:
    content: str = browser.find_element(By.ID, name).get_property("textContent")  # type: ignore[assignment]
    return content


def weights(browser: webdriver.Chrome) -> dict[str, str]:
    script = (
        "return [...document.querySelectorAll('.weight')].map(row => [row.dataset.expert, row.lastChild.textContent])"
    )
    return dict(browser.execute_script(script))


def test_the_posterior_follows_the_prompt_and_the_expert_that_wrote_is_named(
    browser: webdriver.Chrome, served: Served
) -> None:
    browser.get(served.url)
    wait = WebDriverWait(browser, 30)
    wait.until(lambda _: weights(browser) == {"expert0": "0.800", "expert1": "0.200"})
    browser.find_element(By.ID, "prompt").send_keys("abcdab")
    posterior = served.post("/v1/posterior", {"input": "abcdab"}).json()["posterior"]
    wait.until(lambda _: weights(browser) == {name: f"{weight:.3f}" for name, weight in posterior.items()})
    browser.find_element(By.ID, "tokens").clear()
    browser.find_element(By.ID, "tokens").send_keys("5")
    browser.find_element(By.ID, "send").click()
    wait.until(lambda _: text_of(browser, "by").startswith("Written by expert"))
    wait.until(lambda _: browser.find_element(By.ID, "send").is_enabled())
    assert text_of(browser, "said") == "abcdab"
    drawn = browser.find_element(By.CSS_SELECTOR, ".weight.drawn").get_attribute("data-expert")
    assert text_of(browser, "by") == f"Written by {drawn}"
    assert [entry["message"] for entry in browser.get_log("browser")] == []  # type: ignore[no-untyped-call]


def test_errors_are_shown_and_a_key_is_sent(browser: webdriver.Chrome, experts: dict[str, Path]) -> None:
    with running(*planner_of(experts), keys=Keys(["secret"])) as server:
        browser.get(server.url)
        wait = WebDriverWait(browser, 30)
        wait.until(lambda _: "API key is missing or wrong" in text_of(browser, "by"))
        browser.find_element(By.ID, "key").send_keys("secret")
        browser.find_element(By.ID, "prompt").send_keys("ab")
        wait.until(lambda _: len(weights(browser)) == 2)
