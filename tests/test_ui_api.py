"""The named endpoints, as another program calls them: from a plan to a file, without a browser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from gradio_client.exceptions import AppError
from safetensors import safe_open

from .browser import Site, empty_site, wait_until


@pytest.fixture(scope="module")
def idle_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site on which nothing is ever started."""
    yield from empty_site(tmp_path_factory.mktemp("idle"))


SHORT = ["budget.images=8", "budget.batch=2", "save.every=2", "sample.every=0", "adapter.rank=2", "adapter.alpha=2"]


def test_a_program_plans_trains_draws_and_exports(site: Site, tmp_path):
    client = site.client()
    answers = (str(site.images), "pocket", "by program", "trg")
    planned = client.predict(*answers, settings=SHORT, api_name="/plan")
    assert (planned["images"], planned["steps"]) == (6, 4)
    assert client.predict(*answers, settings=SHORT, api_name="/train")["run"] == "by program"
    wait_until(lambda: client.predict("by program", api_name="/status")["state"] == "done", "it is done", 300)

    drawn = client.predict("by program", ["emoji of a cat", "emoji of a dog"], strength=0.5, api_name="/sample")
    assert len(drawn["pictures"]) == 2
    for url in drawn["pictures"]:
        with urllib.request.urlopen(site.url + url) as picture:
            assert picture.read(8) == b"\x89PNG\r\n\x1a\n"

    exported = client.predict("by program", step=2, formats=["kohya"], precision="fp32", api_name="/export")
    [weights] = [file for file in exported["files"] if file["name"].endswith(".safetensors")]
    target = tmp_path / "out.safetensors"
    urllib.request.urlretrieve(site.url + weights["url"], target)
    with safe_open(target, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize(
    ("answers", "settings", "message"),
    [
        (["/no/such/folder", "pocket", "x", ""], [], "there is no such folder"),
        (["", "pocket", "x", ""], [], "data.0.path"),
        (["IMAGES", "nonsense", "x", ""], [], "does not exist"),
        (["IMAGES", "pocket", "", ""], [], "name"),
        (["IMAGES", "pocket", "x", ""], ["adapter.rnak=4"], "Did you mean adapter.rank"),
        (["IMAGES", "pocket", "x", ""], ["adapter.rank=0", "budget.batch=-1"], "adapter.rank(.|\n)*budget.batch"),
    ],
    ids=["no folder", "no answer", "no base", "no name", "unknown setting", "two at once"],
)
@pytest.mark.parametrize("endpoint", ["/plan", "/train"])
def test_a_mistake_is_told_and_nothing_is_started(
    idle_site: Site, answers: list[str], settings: list[str], message: str, endpoint: str
):
    given = [str(idle_site.images) if answer == "IMAGES" else answer for answer in answers]
    with pytest.raises(AppError, match=message):
        idle_site.client().predict(*given, settings=settings, api_name=endpoint)
    assert not list(idle_site.runs.glob("*/config.toml"))


@pytest.mark.parametrize("endpoint", ["/status", "/stop", "/resume", "/export"])
@pytest.mark.parametrize("name", ["", "nobody", "../x"])
def test_a_run_that_is_not_there_is_told(idle_site: Site, endpoint: str, name: str):
    with pytest.raises(AppError, match="there is no run"):
        idle_site.client().predict(name, api_name=endpoint)


def test_what_cannot_be_stopped_is_told(trained_site: Site):
    client = trained_site.client()
    with pytest.raises(AppError, match="not being trained"):
        client.predict("seen", api_name="/stop")
    with pytest.raises(AppError, match=r"budget\.images"):
        client.predict("seen", api_name="/resume")
    with pytest.raises(AppError, match="no checkpoint of step 3"):
        client.predict("seen", step=3, api_name="/export")
    assert client.predict("seen", api_name="/status")["state"] == "done"
