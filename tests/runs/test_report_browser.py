"""Reports of the example and RL Zoo in headless Chromium: video, phones, dark mode, without a network."""

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lunar_lander
import pytest

from sb3_reinforce.tools import write_report, zoo

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
SECTIONS = ("Learning", "Evaluation", "Diagnostics", "Hyperparameters", "Repeat the run")
#: Play half a second
PLAY = """video => new Promise((resolve, reject) => {
    video.ontimeupdate = () => {
        if (video.currentTime > 0.5) resolve([video.readyState, video.videoWidth, video.videoHeight, video.duration]);
    };
    video.onerror = () => reject(video.error.message);
    setTimeout(() => reject("still at " + video.currentTime), 20000);
    video.play().catch(reject);
})"""
#: Sum of the background color of the page
BACKGROUND = "body => getComputedStyle(body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((sum, x) => sum + +x, 0)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Report of a short run of the example, and comparison of two of them and of three algorithms of RL Zoo."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for seed in "01":
            arguments = ["--runs", str(runs), "--seed", seed, "--timesteps", "12000", "--evaluation-episodes", "5"]
            patch.setattr(sys, "argv", ["lunar_lander.py", *arguments])
            lunar_lander.main()
        for algo, seed in itertools.product(("a2c", "ppo", "reinforce"), "12"):
            arguments = ["--algo", algo, "--env", "CartPole-v1", "-n", "2000", "--eval-freq", "500", "--seed", seed]
            patch.setattr(sys, "argv", ["sb3-reinforce", "train", *arguments, "--log-folder", str(runs / "logs")])
            zoo.main()
    folders = [runs / f"{lunar_lander.ENV}_{number}" for number in (1, 2)] + sorted(runs.glob("logs/*/*_?"))
    return {"one": folders[0] / "report.html", "several": write_report(folders, runs / "report.html")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Open a page without a network, and check that it loads nothing else and logs no errors."""
    contexts, requests, errors = [], [], []

    def visit(name: str, width: int = 1200, **options: Any) -> Any:
        contexts.append(browser.new_context(offline=True, viewport={"width": width, "height": 844}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)
    assert errors == []


def open_all(page: Any) -> None:
    """Open all folded parts."""
    for summary in page.locator("summary").all():
        if summary.is_visible():
            summary.click()


def test_the_video_plays(visit: Callable[..., Any]):
    page = visit("one")
    video = page.locator("video")
    assert video.count() == 1
    ready, width, height, duration = video.evaluate(PLAY)
    assert ready >= 2 and (width, height) == (600, 400) and duration > 1


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_pages_are_readable_on_phones_in_light_and_dark_mode(visit: Callable[..., Any], name: str, scheme: str, width: int):
    page = visit(name, width=width, color_scheme=scheme)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.locator("body").evaluate(BACKGROUND)
    assert (background < 150) if scheme == "dark" else (background > 700)
    heights = page.locator("svg text").evaluate_all("texts => texts.map(text => text.getBoundingClientRect().height)")
    assert min(height for height in heights if height) >= 9
    for picture in page.locator(".picture").all():
        box = picture.bounding_box()
        assert box["width"] >= 300 and box["height"] >= 200
        assert picture.get_attribute("role") == "img" and picture.get_attribute("aria-label")
    algorithms = "A2C, 2 seeds; PPO, 2 seeds; REINFORCE, 2 seeds"
    assert page.locator(f"[aria-label$='{algorithms}']").count() == (2 if name == "several" else 0)
    for section in SECTIONS:
        assert page.get_by_role("heading", name=section, exact=True).last.is_visible()
    assert page.locator("video").last.is_visible()
