"""The page in headless Chromium: an empty console, charts drawn; hover, keys and filters work."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from pipeline.state.audit_verdict import AuditVerdict, write_verdict
from schemas.storage.manifest import read_manifest
from tests.fixtures.tiny_recipe import (
    EVERY_KIND,
    TinyRecipe,
    edit_recipe,
    make_recipe,
    teachercache,
)

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MARKUP = (
    "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A finished recipe; some of its text is markup, and a shard of one table is damaged."""
    folder = tmp_path_factory.mktemp("page")
    texts = [f"{MARKUP} {text}" if n % 3 == 0 else text for n, text in enumerate(paragraphs[:30])]
    made = make_recipe(folder, tiny_model, texts, more_steps=EVERY_KIND)
    made.run()
    return made


@pytest.fixture(scope="module")
def page(recipe: TinyRecipe) -> Path:
    """The page that the command writes where nobody says where."""
    said = teachercache("report", recipe.path)
    assert said.code == 0 and not said.err, said.err
    path = recipe.root / "reports" / "tiny.html"
    assert said.out.split() == [str(path)]
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(
    browser: webdriver.Chrome, page: Path, *, width: int = 1280, scheme: str = "light"
) -> None:
    """Open the page at a width, in a colour scheme, with the console empty."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")  # type: ignore[no-untyped-call]
    browser.get(page.as_uri())


def console(browser: webdriver.Chrome) -> list[Any]:
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]


def all_of(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def tip(browser: webdriver.Chrome) -> WebElement:
    return browser.find_element(By.ID, "tip")


def test_charts_are_drawn_and_the_console_is_empty(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    plots = all_of(browser, ".plot svg")
    assert len(plots) > 10
    for plot in plots:
        assert plot.size["width"] > 100 and plot.size["height"] > 40
        assert plot.find_elements(By.CSS_SELECTOR, "[aria-roledescription][aria-label]")
    titles = [found.text for found in all_of(browser, "figcaption")]
    for title in ("loss (nats)", "tokens/s", "entropy (nats)", "kept mass"):
        assert title in titles
    steps = [step.get_attribute("aria-label") for step in all_of(browser, "a.step")]
    assert "signals: teacher_logits, done" in steps and len(steps) == 6
    assert browser.title.startswith("tiny")
    assert console(browser) == []


def test_markup_in_rows_is_shown_as_text(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    shown = " ".join(
        str(found.get_property("textContent"))
        for found in all_of(browser, "#table-signals .sample .text")
    )
    assert '<img src=x onerror="document.title=' in shown and "</script><script>" in shown
    assert not all_of(browser, "img") and browser.title != "run"
    assert len(all_of(browser, "script")) == 2  # the samples and the page's own
    assert console(browser) == []


def test_hover_and_keys_show_what_is_kept_at_a_token(
    browser: webdriver.Chrome, page: Path, recipe: TinyRecipe
) -> None:
    opened(browser, page)
    samples = json.loads(
        str(browser.find_element(By.ID, "samples-json").get_property("textContent"))
    )
    kept = samples["signals"][0]["parts"][0]["tokens"][1][2]
    tokens = all_of(browser, "#table-signals .sample .token.scored")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[0])
    assert not tip(browser).is_displayed()
    ActionChains(browser).move_to_element(tokens[0]).perform()
    assert tip(browser).is_displayed()
    said = tip(browser).text
    assert "entropy" in said and "surprise" in said and "kept entries" in said
    numbers = [cell.text for cell in tip(browser).find_elements(By.CSS_SELECTOR, "td.n")]
    assert [float(n) for n in numbers] == pytest.approx([n for _, n in kept], rel=0.01)
    ActionChains(browser).move_by_offset(0, -300).perform()
    assert not tip(browser).is_displayed()

    browser.execute_script("arguments[0].focus()", tokens[0])
    first = tip(browser).text
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens[1]
    assert tip(browser).is_displayed() and tip(browser).text != first
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip(browser).is_displayed()
    stops = all_of(browser, "#table-signals .sample .token[tabindex='0']")
    assert len(stops) == len(all_of(browser, "#table-signals .sample"))  # one a sample


def test_hover_on_a_chart_says_its_numbers(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    bars = all_of(browser, "#table-signals .plot [aria-roledescription='bar']")
    tallest = max(bars, key=lambda bar: bar.size["height"])
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tallest)
    ActionChains(browser).move_to_element(tallest).perform()
    WebDriverWait(browser, 60).until(lambda shown: tip(shown).text)
    assert tip(browser).text == tallest.get_attribute("aria-label")


def test_filters_and_colours(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    box = browser.find_element(By.CSS_SELECTOR, "#table-signals .samples")

    def shown() -> int:
        number = len(box.find_elements(By.CSS_SELECTOR, ".sample"))
        said = box.find_element(By.CSS_SELECTOR, "[role=status]").text
        assert said.startswith(f"{number} of ")
        return number

    every = shown()
    search = box.find_element(By.CSS_SELECTOR, "input[type=search]")
    search.send_keys("onerror")
    assert 0 < shown() < every
    search.clear()
    search.send_keys("no text has this")
    assert shown() == 0
    search.send_keys(*[Keys.BACKSPACE] * 20)
    assert shown() == every
    split, level, order, measure = (
        Select(found) for found in box.find_elements(By.TAG_NAME, "select")
    )
    split.select_by_value("heldout")
    heldout = shown()
    assert 0 < heldout < every
    split.select_by_value("")
    level.select_by_value("high")
    assert 0 < shown() < every
    level.select_by_value("all")
    order.select_by_value("high")
    means = [
        float(found.text.split()[-1])
        for found in box.find_elements(By.CSS_SELECTOR, "h4 span:last-child")
    ]
    assert means == sorted(means, reverse=True) and len(means) == every
    before = [token.get_attribute("class") for token in box.find_elements(By.CLASS_NAME, "scored")]
    assert any(re.search(r"\bh[1-6]\b", classes or "") for classes in before)
    measure.select_by_visible_text("surprise")
    after = [token.get_attribute("class") for token in box.find_elements(By.CLASS_NAME, "scored")]
    assert before != after
    assert console(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_its_window_in_light_and_dark(
    browser: webdriver.Chrome, page: Path, width: int, scheme: str
) -> None:
    opened(browser, page, width=width, scheme=scheme)
    page_width, window_width = (
        browser.execute_script(f"return document.documentElement.{name}")
        for name in ("scrollWidth", "clientWidth")
    )
    assert page_width <= window_width <= width
    page_colour = browser.find_element(By.TAG_NAME, "body").value_of_css_property(
        "background-color"
    )
    brightness = sum(int(part) for part in re.findall(r"\d+", page_colour)[:3])
    assert (brightness > 600) == (scheme == "light")
    label = browser.find_element(By.CSS_SELECTOR, ".plot text").value_of_css_property("fill")
    muted = "rgb(91, 99, 109)" if scheme == "light" else "rgb(160, 168, 178)"
    assert label == muted
    assert console(browser) == []


def test_the_tab_key_reaches_links_steps_and_filters(browser: webdriver.Chrome, page: Path) -> None:
    opened(browser, page)
    seen = set()
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        seen.add(active.get_attribute("class") or active.tag_name)
    assert {"skip", "a", "step done", "summary"} <= seen


def faithful(dataset_id: str) -> AuditVerdict:
    return AuditVerdict(
        outcome="faithful",
        dataset_id=dataset_id,
        audited_at="2026-11-28T03:00:00+00:00",
        num_rows=4,
        num_positions=188,
        engine="transformers",
        settings={},
        measures={"log-probs": {"largest": 1e-4}},
        truncation={},
        failures=[],
    )


def test_what_is_damaged_or_pending_is_said(
    browser: webdriver.Chrome, recipe: TinyRecipe, tmp_path: Path
) -> None:
    """One shard's bytes are changed, one manifest is torn, one student is to be trained anew."""
    copied = recipe.copy(tmp_path)
    shard = next(copied.step("states").folder.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    documents = copied.step("documents").folder
    write_verdict(documents, faithful(read_manifest(documents).dataset_id))
    (copied.step("signals").folder / "manifest.json").write_text("{")
    edit_recipe(copied, "steps", "distilled", "max_steps", value=3)
    output = tmp_path / "some where" / "page.html"
    said = teachercache("report", copied.path, "--output", output)
    assert said.code == 0 and not said.err, said.err
    opened(browser, output)
    states = {step.get_attribute("aria-label") for step in all_of(browser, "a.step")}
    assert "signals: teacher_logits, damaged" in states
    assert "distilled: train, pending" in states and "documents: ingest, done" in states
    (problem,) = all_of(browser, "#table-states .problem")
    assert shard.name in problem.text and "has changed" in problem.text
    assert all_of(browser, "#table-documents .sample")
    facts = browser.find_element(By.CSS_SELECTOR, "#table-documents .facts").text
    assert "audit\nfaithful" in facts
    assert "not audited" in browser.find_element(By.CSS_SELECTOR, "#table-states .facts").text
    assert "is damaged" in browser.find_element(By.ID, "step-signals").text
    assert "not known" in browser.find_element(By.ID, "costs").text
    assert console(browser) == []
