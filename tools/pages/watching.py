"""What a page costs and how quickly it is answered, as the browser sees it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil
from playwright.sync_api import BrowserContext, Page

_COUNTS_ANSWERS = """(() => {
  const began = {}, ended = {};
  window.answered = [];
  const known = (id) => {
    if (!(id in began && id in ended)) return;
    window.answered.push(ended[id] - began[id]);
    delete began[id];
    delete ended[id];
  };
  const listen = async (body) => {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", chunk; !(chunk = await reader.read()).done; ) {
      const lines = (rest + chunk.value).split("\\n");
      rest = lines.pop();
      for (const line of lines.filter((line) => line.startsWith("data:"))) {
        const said = JSON.parse(line.slice(5));
        if (said.msg !== "process_completed") continue;
        ended[said.event_id] = performance.now();
        known(said.event_id);
      }
    }
  };
  const real = window.fetch;
  window.fetch = async (...asked) => {
    const url = String(asked[0]?.url ?? asked[0]), start = performance.now();
    const response = await real(...asked);
    if (url.includes("/queue/join"))
      response.clone().json().then(({ event_id }) => { began[event_id] = start; known(event_id); });
    if (url.includes("/queue/data") && response.body) listen(response.clone().body).catch(() => {});
    return response;
  };
})();"""
"""Each event of a page is asked for by one request, and answered by a line of a stream that stays open: how long it
took, from the one to the other, is added to `window.answered`, in milliseconds."""


def count_answers(context: BrowserContext) -> None:
    """Of all pages that are opened from now on."""
    context.add_init_script(_COUNTS_ANSWERS)


def answers(shown: Page, seconds: float) -> list[float]:
    """How long each event of the page took that was answered within so many seconds from now."""
    shown.evaluate("window.answered = []")
    shown.wait_for_timeout(1000 * seconds)
    return [took / 1000 for took in shown.evaluate("window.answered")]


def cpu_of(processes: Iterable[psutil.Process]) -> float:
    """Seconds of work so far, of those that live."""
    used = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended just now
            continue
        used += times.user + times.system
    return used


def browser_processes() -> list[psutil.Process]:
    """Those of the browsers that this process has started."""
    return [child for child in psutil.Process().children(recursive=True) if "chrom" in _name(child)]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def load_of(shown: Page, server: psutil.Process, seconds: float) -> tuple[float, float]:
    """Seconds of work each second, of the server and of the browser, while a page is looked at."""
    browser = browser_processes()
    before, began = (cpu_of([server]), cpu_of(browser)), time.perf_counter()
    shown.wait_for_timeout(1000 * seconds)
    took = time.perf_counter() - began
    return (cpu_of([server]) - before[0]) / took, (cpu_of(browser) - before[1]) / took
