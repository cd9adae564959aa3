"""The page as a new user meets it: `cxray ui` in a process of its own, over the real gateway, in Chromium. A picture of each view is
left in test-output/ui."""

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ui_server
from fake_backends import Fake
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from ui_server import ROOT, chart_of, example, jpeg, xray

from contracts.pages import NOT_FOR_DIAGNOSIS
from serve.security import new_key

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run --window-size=1280,1000"
)
VIEWS = ("Study", "Compare", "Search", "Models")
SHOTS = ROOT / "test-output" / "ui"


class Visitor:
    """Someone at the page. Everything waits until it is there."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url

    def until(self, seen: Callable[[Any], Any], what: str = "") -> Any:
        return WebDriverWait(self.browser, 30, 0.1, [StaleElementReferenceException]).until(seen, what)

    def see(self, css: str, text: str = "") -> WebElement:
        def shown(browser: Any) -> WebElement | None:
            return next((e for e in browser.find_elements(By.CSS_SELECTOR, css) if text in e.text and e.is_displayed()), None)

        return self.until(shown, f"{css} with {text!r} is not to be seen")

    def press(self, css: str, text: str) -> None:
        """Pressed once it is there and will stay: the page may be drawing it anew."""

        def pressed(browser: Any) -> bool:
            found = [e for e in browser.find_elements(By.CSS_SELECTOR, css) if e.text.strip() == text and e.is_displayed()]
            for element in found[:1]:
                browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
                element.click()
            return bool(found)

        self.idle()
        self.until(pressed, f"{css} {text!r} is not there to press")
        self.idle()

    def idle(self) -> None:
        """Until the script has run, and what it drew is there."""
        app = '[data-testid="stApp"][data-test-script-state="notRunning"]'
        self.until(lambda b: b.find_elements(By.CSS_SELECTOR, app) and not b.find_elements(By.CSS_SELECTOR, '[data-stale="true"]'), "busy")

    def open(self, view: str = "Study") -> "Visitor":
        """A new visit, in this view."""
        self.browser.get(self.url)
        self.see("h1", "Study")
        if view != "Study":
            self.go(view)
        self.idle()
        return self

    def go(self, view: str) -> None:
        self.press("header a", view)
        self.see("h1", view)
        self.idle()

    def upload(self, file: Path) -> None:
        field = self.until(lambda b: b.find_elements(By.CSS_SELECTOR, 'input[type="file"]'))[0]
        field.send_keys(str(file))
        self.see('[data-testid="stFileUploader"]', file.name)
        self.idle()

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def width(self, pixels: int, height: int = 1000) -> None:
        size = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def shot(self, name: str, pixels: int = 1280) -> None:
        """The whole page, as a PNG in test-output/ui."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.width(pixels, self.browser.execute_script("return document.querySelector('[data-testid=\"stMain\"]').scrollHeight") + 10)
        assert self.browser.save_screenshot(str(SHOTS / f"{name}.png"))
        self.width(pixels)

    def problem(self) -> str:
        return self.see('[role="alert"].problem').text


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    missing = [name for name in (CHROMIUM, DRIVER) if not Path(name).exists()]
    if missing:
        # .ci/run installs them; a machine of somebody's own need not have them.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"{' and '.join(missing)} is not there: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        for argument in (*OPTIONS.split(), f"--user-data-dir={profile}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        yield browser
        browser.quit()


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, new_key(file, "page")


@pytest.fixture(scope="module")
def model() -> Fake:
    return ui_server.fakes()["fusion"]


@pytest.fixture(scope="module")
def api(key, model) -> Iterator[str]:
    with ui_server.service(key[0], fusion=model) as address:
        yield address


@pytest.fixture(scope="module")
def url(api, key, tmp_path_factory) -> Iterator[str]:
    """The page with a key of its own. What it leaves in its log is nothing of anybody's."""
    log = tmp_path_factory.mktemp("page") / "log"
    with log.open("wb") as sink, ui_server.page(api, sink, key[1]) as address:
        yield address
    said = log.read_text()
    assert not [word for word in ("Traceback", key[1], "wrong-key", "secret-name") if word in said], said


@pytest.fixture
def visitor(browser, url) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    yield visitor
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def levels(visitor: Visitor) -> list[int]:
    return [int(e.tag_name[1]) for e in visitor.all("h1, h2, h3, h4, h5, h6") if e.is_displayed()]


def test_every_view_says_what_it_is_not_for_and_can_be_read_out(visitor):
    visitor.open()
    for view in VIEWS:
        visitor.go(view)
        assert NOT_FOR_DIAGNOSIS in visitor.see('[role="note"]').text
        found = levels(visitor)
        assert found[0] == 1 and found.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(found)), f"{view}: headings {found}"
        assert all(image.get_attribute("alt") for image in visitor.all("img")), view
        assert not visitor.all('[data-testid="stException"]')
        fields = "input:not([type=file]):not([type=hidden]), textarea"
        unnamed = [e.get_attribute("outerHTML") for e in visitor.all(fields) if e.is_displayed() and not e.accessible_name]
        assert not unnamed, f"{view}: fields that have no name"
    hosts = (
        "return performance.getEntriesByType('resource').map(e => new URL(e.name)).filter(u => u.protocol != 'data:').map(u => u.hostname)"
    )
    assert set(visitor.browser.execute_script(hosts)) == {"127.0.0.1"}, "a browser that opens the page asks nobody else"


def test_a_demo_study_from_choice_to_truth(visitor, model):
    visitor.open()
    visitor.press("button", "Classify")
    rows = visitor.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".findings li"))
    assert len(rows) == 14 and chart_of(model.classify.asked[-1]) == example("1").chart, "the form has rounded nothing"
    words = ["not positive" not in row.text for row in rows]
    assert words == sorted(words, reverse=True) and 0 < sum(words) < 14
    assert [("on" in row.get_attribute("class").split()) for row in rows] == words
    assert "72.0 years" in visitor.see(".evidence", "Dyspnea").text and "Source: our own" in visitor.see(".evidence", "fit 0.71").text
    assert visitor.see("h2", "Truth, not shown to the model") and "Mild pulmonary edema" in visitor.see(".truth").text
    visitor.shot("study")

    over = visitor.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".layers img + img"))[0]
    assert over.value_of_css_property("opacity") == "0.7"
    whole = [part.rect for part in visitor.all(".layers:has(img + img) img")]
    assert whole[0] == whole[1], "the overlay lies on the picture"
    slider = visitor.see('[data-testid="stSlider"]', "Opacity").find_element(By.TAG_NAME, "input")
    visitor.browser.execute_script("arguments[0].focus()", slider)
    ActionChains(visitor.browser).send_keys(Keys.HOME).perform()
    visitor.until(lambda b: b.find_element(By.CSS_SELECTOR, ".layers img + img").value_of_css_property("opacity") == "0", "not bare")


def test_by_keyboard_alone(visitor):
    visitor.open()
    for _ in range(80):
        visitor.browser.switch_to.active_element.send_keys(Keys.TAB)
        if visitor.browser.switch_to.active_element.text == "Classify":
            break
    focused = visitor.browser.switch_to.active_element
    assert focused.text == "Classify", "the button can be reached"
    focused.send_keys(Keys.ENTER)
    visitor.see(".findings li")


def test_compare_marks_what_the_chart_and_the_passages_change(visitor):
    visitor.open("Compare")
    visitor.press("button", "Compare")
    assert "▲ +0.50\nbecomes positive" in visitor.see(".compared li", "Edema").text
    visitor.shot("compare")
    visitor.press("label", "Knowledge")
    visitor.press("button", "Compare")
    visitor.see("h2", "Knowledge off and on")
    assert "▲ +0.20" in visitor.see(".compared li", "+0.20").text
    assert len([e for e in visitor.all(".cx td") if e.text.endswith(" ms")]) == 2


def test_search_by_words_and_by_image(visitor, tmp_path):
    visitor.open("Search")
    visitor.see('input[aria-label="Words"]').send_keys("left effusion", Keys.ENTER)
    visitor.see("h2", "left effusion")
    assert "Pneumothorax: denied" in visitor.see(".matches").text and len(visitor.all(".matches figure")) == 6
    visitor.shot("search")
    (tmp_path / "secret-name.jpg").write_bytes(jpeg(xray()))
    visitor.press("label", "An image")
    visitor.upload(tmp_path / "secret-name.jpg")
    visitor.press("button", "Search")
    visitor.see("h2", "Studies like your image")


def test_a_model_s_card(visitor):
    visitor.open("Models")
    assert "0.883 (0.831 to 0.929)" in visitor.see("table", "Macro").text
    visitor.press("summary p", "Model card of fusion")
    assert visitor.see("h3", "Fusion") and visitor.see("h4", "Data")
    visitor.shot("models")


def test_a_wrong_key_and_then_the_right_one(visitor, key):
    visitor.open()
    visitor.see('input[type="password"]').send_keys("wrong-key", Keys.ENTER)
    assert "Unauthorized" in visitor.problem() and "Request " in visitor.problem()
    visitor.idle()
    assert "wrong-key" not in visitor.see("body").text and not visitor.all("form")
    visitor.shot("wrong-key")
    visitor.see('input[type="password"]').send_keys(Keys.CONTROL, "a")
    visitor.see('input[type="password"]').send_keys(key[1], Keys.ENTER)
    visitor.see("button", "Classify")
    visitor.go("Models")
    visitor.see("h2", "fusion")
    assert not visitor.all(".problem") and key[1] not in visitor.browser.current_url


def test_own_images_a_wrong_one_and_a_right_one(visitor, tmp_path):
    visitor.open()
    visitor.press("label", "Your own images")
    (tmp_path / "secret-name.txt").write_text("Not an image.")
    visitor.upload(tmp_path / "secret-name.txt")
    visitor.press("button", "Classify")
    assert "Image 1 is no JPEG, PNG or DICOM" in visitor.problem()
    visitor.shot("problem")

    visitor.open()
    visitor.press("label", "Your own images")
    (tmp_path / "secret-name.png").write_bytes(jpeg(xray(3, 1500)))
    visitor.upload(tmp_path / "secret-name.png")
    visitor.press("button", "Classify")
    visitor.see("h2", "your study")
    visitor.see(".findings li")
    assert len(visitor.all(".findings li")) == 14 and not visitor.all(".truth")
    visitor.shot("own")
    visitor.go("Compare")
    visitor.see('[data-testid="stCaptionContainer"]', "Still held: 1 image of before")


def test_on_a_narrow_screen_nothing_runs_off_the_side(visitor):
    visitor.width(390, 844)
    for view in VIEWS:
        visitor.browser.get(f"{visitor.url}/{'' if view == 'Study' else view.lower()}")
        visitor.see("h1", view)
        visitor.idle()
        if view in ("Study", "Compare"):
            visitor.press("button", {"Study": "Classify"}.get(view, view))
            visitor.see(".findings li, .compared li")
        sizes = visitor.browser.execute_script(
            "const m = document.querySelector('[data-testid=\"stMain\"]'); return [m.scrollWidth, m.clientWidth]"
        )
        assert sizes[0] <= sizes[1] <= 390, view
        visitor.shot(f"narrow-{view.lower()}", 390)
