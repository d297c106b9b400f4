"""The documentation's site: built without a broken link, and opened in a browser."""

import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from helpers.browser import set_view, start_browser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("", "docs/start/first-run/", "docs/guides/evaluate/", "docs/reference/python/", "docs/results/")
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    program = shutil.which("mkdocs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no mkdocs: pip install 'hybrid-policy-distillation[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [program, "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_errors_and_fits_the_window(browser, address, page, width):
    set_view(browser, width)
    browser.get(address + page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    assert len(browser.find_elements("tag name", "h1")) == 1
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    images = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert browser.execute_script(images) == []


def test_the_search_finds_a_method(browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    set_view(browser, 1280)
    browser.get(address + "?q=forward_kl")
    found = ".md-search-result__link"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements("css selector", found))
    assert any("methods" in e.get_attribute("href") for e in browser.find_elements("css selector", found))


def test_old_addresses_lead_to_the_new_pages(browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(address + "docs/regimes/")
    WebDriverWait(browser, 10).until(lambda b: "on-policy" in b.current_url)


def test_python_names_are_there_with_their_texts(site):
    page = (site / "docs/reference/python/index.html").read_text(encoding="utf-8")
    for name in ("DistillTrainer", "distillation_loss", "TermConfig", "load_recipe"):
        assert f"{name}</" in page or f"{name}<" in page
    assert "never differentiated" in page
