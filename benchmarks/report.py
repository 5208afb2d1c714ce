"""How large the report is, how soon it shows, and how fast it sorts and searches, in a real browser.

Makes runs of plausible texts (or takes output files), runs `expo report` on them as a user would, opens the page from
disk in headless chromium a few times, and prints a Markdown table of medians: the time to write the page, its size, the
first contentful paint, the time until the rows are listed, and the time from an input event to the new list laid out,
for sorting and for searching.

    python benchmarks/report.py --prompts 805 --models 6 --rounds 5
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

MEASURE = """([name, values]) => {
    const controls = document.getElementById("controls"), found = [];
    for (const value of values) {
        controls.elements[name].value = value;
        const start = performance.now();
        controls.dispatchEvent(new Event("input", { bubbles: true }));
        document.body.getBoundingClientRect();
        found.push(performance.now() - start);
    }
    return found;
}"""
SORTS = ("difference", "reward:1", "length:1", "order")
SEARCHES = ("a", "the", "an ban", "no such text anywhere", "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", help="output files; none: made ones")
    parser.add_argument("--prompts", type=int, default=805)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--characters", type=int, default=2200, help="mean length of made answers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = asked.files or made(Path(folder), asked.prompts, asked.models, asked.characters)
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "expo", "report", *map(str, files), "--output", str(page)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        seconds = time.perf_counter() - start
        rounds = [look(page, asked.chromium) for _ in range(asked.rounds)]
        print(f"{len(files)} models, {page.stat().st_size / 1e6:.2f} MB, written in {seconds:.1f} s\n")
    print("| | median | worst |\n| --- | --- | --- |")
    for name in rounds[0]:
        values = [value for one in rounds for value in one[name]]
        print(f"| {name} | {statistics.median(values):.0f} ms | {max(values):.0f} ms |")


def made(folder: Path, prompts: int, models: int, characters: int) -> list[Path]:
    """Files of runs that the tests make too."""
    sys.path.insert(0, str(ROOT / "tests"))
    from made_runs import made_runs, write_files

    names = ("dpo", *(f"dpo-ExPO-a{number / 10}" for number in range(1, models)))
    return write_files(folder, made_runs(prompts, names, characters=characters))


def look(page: Path, chromium: str) -> dict[str, list[float]]:
    """Open the page in a new browser: name → milliseconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab: Any = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(page.as_uri())
        tab.wait_for_selector("#browser:not([hidden])")
        listed = tab.evaluate("performance.now()")
        paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        found = {
            "first contentful paint": [paint],
            "rows listed": [listed],
            "sort": tab.evaluate(MEASURE, ["sort", SORTS]),
            "search": tab.evaluate(MEASURE, ["q", SEARCHES]),
        }
        browser.close()
    return found


if __name__ == "__main__":
    main()
