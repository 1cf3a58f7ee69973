"""The page of a root in an object store: read from there, written there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.reports.page.page import page_of
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, teachercache
from tests.servers.s3_server import Server, running_server, use_endpoint


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as found:
        yield found


@pytest.mark.slow
def test_a_root_in_a_store_has_the_same_page(
    every_kind: TinyRecipe,
    server: Server,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_endpoint(monkeypatch, server.url)
    copied, root = every_kind.copy(tmp_path), server.new_root()
    here = page_of(copied.load(), copied.plan())
    server.put_files(root, copied.root, (p for p in copied.root.rglob("*") if p.is_file()))
    edit_recipe(copied, "execution", "root", value=root)
    said = teachercache("report", copied.path)
    assert said.code == 0 and not said.err, said.err
    assert said.out.split() == [f"{root}/reports/tiny.html"]
    page = server.objects(root)["cache/reports/tiny.html"].decode()
    for html in (here, page):
        assert html.startswith("<!doctype html>") and html.count("<section") == 6
        assert "Cannot be read" not in html and "Rows stand alone" not in html
    start, end = '<script type="application/json" id="samples-json">', "</script>"
    samples = [html.split(start)[1].split(end)[0] for html in (here, page)]
    assert samples[0] == samples[1] and len(samples[0]) > 10_000
    assert teachercache("ls", copied.path).code == 0  # which looks past the page
