"""The page at /, used by hand in a real browser."""

import shutil
import subprocess
import sys
import tempfile

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
pytest.importorskip("fastapi", reason="needs the extra serve")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serving.tiny_run import ONE_DEVICE
from tim4rec_jax.serving import Recommender

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)


@pytest.fixture(scope="module")
def address(tiny_workdir):
    """A service in a process of its own, as the command line starts it."""
    command = [sys.executable, "-m", "tim4rec_jax.serving", "serve", "--port=0"]
    with subprocess.Popen(
        [*command, f"--workdir={tiny_workdir}"],
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        line = server.stdout.readline()
        try:
            yield line.split()[-1]
        finally:
            server.terminate()
            assert server.wait(30) in (0, -15)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # The sandbox needs rights that containers do not give.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,900"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


def test_history_by_hand(browser, address, tiny_workdir):
    browser.get(address)
    wait = WebDriverWait(browser, 20)

    def by(name):
        return browser.find_element(By.ID, name)

    def lines(name):
        return browser.find_elements(By.CSS_SELECTOR, f"#{name} li")

    wait.until(lambda _: "30 items" in by("about").text)
    for title, moment in (("Title of i7", "2020-01-02T10:00:00"), ("i12", "2020-01-01T10:00:00")):
        by("item").send_keys(title)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#choices option"))
        choose = browser.find_element(By.CSS_SELECTOR, "#choices option").get_attribute("value")
        by("item").clear()
        by("item").send_keys(choose)
        browser.execute_script("arguments[0].value = arguments[1]", by("time"), moment)
        by("item").send_keys(Keys.ENTER)  # no mouse needed
    wait.until(lambda _: len(lines("history")) == 2)
    # Sorted by time, whatever the order of typing.
    assert [line.text.split("\n")[0] for line in lines("history")] == [
        "Title of i12 (i12)",
        "Title of i7 (i7)",
    ]
    by("item").send_keys("nobody", Keys.ENTER)
    wait.until(lambda _: "does not know “nobody”" in by("note").text)
    assert lines("history")[1].text.startswith("nobody unknown")
    lines("history")[1].find_element(By.TAG_NAME, "button").click()
    by("ask").submit()
    wait.until(lambda _: len(lines("found")) == 10)
    expected = Recommender.load(tiny_workdir).recommend(["i12", "i7"], [1577872800, 1577959200])
    shown = [line.text.split("\n")[1] for line in lines("found")]
    assert shown == [item if item == "i3" else f"Title of {item} {item}" for item in expected.items]

    browser.find_element(By.CSS_SELECTOR, "#history button").click()
    assert len(lines("history")) == 1
    by("clear").click()
    by("ask").submit()
    wait.until(lambda _: "most popular items" in by("note").text)
    # A long name fits a telephone's screen. Chromium's windows are no narrower than 500 pixels.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    by("item").send_keys("x" * 200, Keys.ENTER)
    wait.until(lambda _: len(lines("history")) == 1)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints
