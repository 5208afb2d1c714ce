"""The report in a real browser: it asks for nothing, runs nothing of the texts, and shows the rows that it should."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import RM, made_runs
from sizes import sized

from expo.verbs.compare.comparison import compare
from expo.verbs.compare.run import RowKey, Run, RunRow
from expo.verbs.report.aligned import Aligned, align
from expo.verbs.report.figures import charts_of
from expo.verbs.report.page import build
from expo.verbs.report.payload import columns, packed
from expo.verbs.report.text import visible
from expo.verbs.report.verdict import verdict

pytestmark = pytest.mark.xdist_group("browser")  # they share one

HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    "<!-- <script> --!> <img src=x onerror='window.hit = 3'> ]]>",
    '<svg onload="window.hit = 4"><title>x</title></svg><title>taken over</title>',
    "</textarea></style></title><iframe src='https://example.com'></iframe><base href='https://example.com/'>",
    "[a link](javascript:window.hit=5) ![](https://example.com/x.png) $title $script `${window.hit = 6}`",
    "user\u202etxt.exe \u2066hidden\u2069 \u200f right \u061c",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f next line \x85 separators \u2028 \u2029 bom \ufeff",
    "half \ud83d a smile \U0001f600 \udc00 other half \udfff\ud800 end",
    "العربية ثم עברית ثم english 日本語 👩\u200d🚀",
    "\"quotes\" 'single' & &amp; &lt;b&gt; \\u003c \\n",
    "\r\n windows \r lines \t tabs",
    "",
    "   ",
    "x" * 1_000_000,
]


Show = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Show]:
    """Opens a document from disk; at the end nothing may have been asked for, and nothing complained of."""
    contexts, trouble = [], []

    def route(one: Any) -> None:
        if one.request.url != address:
            trouble.append(f"asked for {one.request.url[:200]}")
            one.abort()
        else:
            one.continue_()

    file = tmp_path / "report.html"
    address = file.as_uri()

    def show(document: str, *, before: str = "", ready: str = "#browser:not([hidden])", **options: Any) -> Any:
        file.write_text(document, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("popup", lambda popup: trouble.append("a window was opened"))
        page.on("dialog", lambda dialog: (trouble.append("a dialog was opened"), dialog.dismiss()))
        page.route("**/*", route)
        if before:
            page.add_init_script(before)
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield show
    for context in contexts:
        context.close()
    assert trouble == []


def document(runs: list[Run], notes: tuple[str, ...] = (), *, figures: bool = True) -> str:
    found, aligned = compare(runs), aligned_by(runs)
    return build(aligned, found, verdict(aligned, found), charts_of(aligned, found) if figures else [], notes)


def aligned_by(runs: list[Run], *reward_models: str) -> Aligned:
    return align(runs, reward_models or list(runs[0].rewards))


def row(number: int, output: str | None, prompt: str | None = None, **more: Any) -> RunRow:
    values = {"context": (), "subset": None, "tokens": None, "finish_reason": None, "id": str(number), **more}
    return RunRow(
        RowKey(str(number), 0), prompt=f"prompt {number}" if prompt is None else prompt, output=output, **values
    )


def simple(name: str, outputs: list[str], rewards: list[float | None] | None = None, **more: Any) -> Run:
    rows = tuple(row(number, output, **more) for number, output in enumerate(outputs))
    return Run(name, "task", rows, {} if rewards is None else {RM: tuple(rewards)})


# --- what the page shows is what Python finds ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def three() -> list[Run]:
    """Three runs of 61 prompts with two samples each, some rows without a reward, some answers equal."""
    runs = made_runs(61, ("dpo", "expo-a0.3", "expo-a0.5"), samples=2, characters=120, reward_models=(RM, "other/rm"))
    holes = {1: {5, 40}, 2: {5}}
    for place, missing in holes.items():
        rewards = list(runs[place].rewards[RM])
        for number in missing:
            rewards[number] = None
        rewards[7] = runs[0].rewards[RM][7]
        runs[place] = replace(runs[place], rewards={**runs[place].rewards, RM: tuple(rewards)})
    return runs


@pytest.fixture(scope="module")
def three_document(three: list[Run]) -> str:
    return document(three)


def shown_rows(page: Any) -> list[int]:
    """The rows listed, from this page of them to the last."""
    return page.evaluate("""() => {
        const found = [], next = document.getElementById("next");
        for (;;) {
            found.push(...[...document.querySelectorAll(".open")].map((one) => Number(one.dataset.row)));
            if (next.disabled) return found;
            next.click();
        }
    }""")


def set_controls(page: Any, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        if name == "q":
            page.fill("#q", value)
        else:
            page.select_option(f"[name={name}]", value)


def expected(aligned: Aligned, settings: dict[str, str]) -> list[int]:
    """What the same choice gives here."""
    model, reward = int(settings.get("model", 2)), aligned.reward_models[int(settings.get("reward", 0))]
    changed, words = aligned.differences(reward, model), settings.get("q", "").lower()
    who = {
        "better": lambda one: one is not None and one > 0,
        "worse": lambda one: one is not None and one < 0,
        "equal": lambda one: one == 0,
        "unknown": lambda one: one is None,
    }.get(settings.get("who", ""), lambda one: True)
    runs = range(len(aligned.runs))
    reasons = list(dict.fromkeys(reason for run in runs for reason in aligned.finish_reasons(run)))
    looked = {0, 2, model}  # those side by side
    found = []
    for number, first in enumerate(aligned.first):
        texts = [first.prompt, first.id, *(aligned.outputs(run)[number] or "" for run in runs)]
        kept = who(changed[number]) and any(words in text.lower() for text in texts)
        if subset := settings.get("subset"):
            kept = kept and first.subset == aligned.subsets[int(subset)]
        if finish := settings.get("finish"):
            kept = kept and any(aligned.finish_reasons(run)[number] == reasons[int(finish)] for run in looked)
        if kept:
            found.append(number)
    what, _, run = settings.get("sort", "order").partition(":")
    values = {
        "order": lambda: range(len(aligned)),
        "difference": lambda: changed,
        "reward": lambda: aligned.rewards(reward, int(run)),
        "length": lambda: aligned.lengths(int(run)),
    }[what]()
    sign = -1 if settings.get("direction") == "descending" else 1
    return sorted(found, key=lambda one: (values[one] is None, sign * (values[one] or 0), one))


CHOICES: dict[str, dict[str, str]] = {
    "nothing": {},
    "difference": {"sort": "difference"},
    "difference, highest first": {"sort": "difference", "direction": "descending"},
    "reward of one": {"sort": "reward:1", "direction": "descending"},
    "length": {"sort": "length:2"},
    "another model": {"model": "1", "sort": "difference"},
    "another reward model": {"reward": "1", "sort": "difference", "direction": "descending"},
    "won": {"who": "better", "sort": "difference"},
    "lost": {"who": "worse", "model": "1"},
    "equal": {"who": "equal"},
    "without a reward": {"who": "unknown", "model": "1"},
    "a subset": {"subset": "2", "sort": "reward:2"},
    "cut": {"finish": "1"},
    "a word": {"q": "BAN"},
    "an id": {"q": "17", "who": "better"},
    "nothing found": {"q": "no such text"},
    "all together": {"q": "an", "subset": "1", "who": "better", "sort": "length:0", "direction": "descending"},
}


def test_sorts_filters_and_searches_give_the_rows_that_python_finds(
    show: Show, three: list[Run], three_document: str
) -> None:
    page, aligned = show(three_document), aligned_by(three)
    counts = {}
    for name, settings in CHOICES.items():
        set_controls(page, settings)
        wanted = expected(aligned, settings)
        counts[name] = len(wanted)
        assert page.inner_text("#count") == f"{len(wanted)} of {len(aligned)} rows", name
        assert shown_rows(page) == wanted, name
        page.click("#clear")
    assert counts.pop("nothing found") == 0
    assert all(counts.values())  # each choice is about some row


def test_headers_sort_and_say_so(show: Show, three: list[Run], three_document: str) -> None:
    page, aligned = show(three_document), aligned_by(three)
    header = page.locator("th[data-sort=difference]")
    for order in ("descending", "ascending", "descending"):
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == order
        assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1
        assert page.evaluate("document.activeElement.closest('th')?.dataset.sort") == "difference"
        assert shown_rows(page) == expected(aligned, {"sort": "difference", "direction": order})


def test_a_row_shows_its_answers_side_by_side(show: Show, three: list[Run], three_document: str) -> None:
    page, aligned = show(three_document), aligned_by(three)
    page.locator("[name=column][value='1']").check()
    page.locator(".open[data-row='7']").click()
    sides = page.locator("#row-7 .side")
    assert sides.count() == 3
    for run in range(3):
        side = sides.nth(run)
        assert side.locator("b").inner_text() == three[run].name
        assert side.locator(".text").text_content() == aligned.outputs(run)[7]
        assert f"reward {aligned.rewards(RM, run)[7]:.2f}".replace("-", "−") in side.locator("header").inner_text()
        assert f"{aligned.lengths(run)[7]} tokens" in side.locator("header").inner_text()
    assert page.locator("#row-7 .asked").text_content() == aligned.first[7].prompt
    assert "sample 2" in page.locator(".open[data-row='7']").inner_text()
    page.locator("[name=column][value='0']").uncheck()
    assert sides.count() == 2
    page.locator(".open[data-row='7']").click()
    assert sides.count() == 0


def test_a_row_that_flips_leads_to_all_answers(show: Show, three_document: str) -> None:
    page = show(three_document)
    set_controls(page, {"q": "no such text"})
    link = page.locator("#flips details[open] .flip a").first
    number = link.get_attribute("href").removeprefix("#row-")
    link.click()
    page.wait_for_selector(f"#row-{number}")
    assert page.evaluate("document.activeElement.dataset.row") == number
    assert page.locator(f"#row-{number}").is_visible()


def test_the_keyboard_reaches_everything(show: Show, three_document: str) -> None:
    page = show(three_document)
    active = "document.activeElement.dataset.row ?? document.activeElement.id"
    page.keyboard.press("/")
    assert page.evaluate(active) == "q"
    page.keyboard.type("an/j")  # typed, not obeyed
    assert page.input_value("#q") == "an/j"
    page.fill("#q", "")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.evaluate(active) == "0"
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(active) == "2"
    page.keyboard.press("Enter")
    assert page.locator("#row-2").is_visible()
    page.keyboard.press("k")
    assert page.evaluate(active) == "1"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(60):  # past the end of the first page of rows
        page.keyboard.press("j")
    assert page.inner_text("#page") == "Page 2 of 3"
    reached: list[str] = []
    focused = "(({name, className, tagName}) => name || className || tagName)(document.activeElement)"
    page.locator(".skip").focus()
    while len(reached) < 200 and not (reached and reached[-1] == "open"):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    there = [name for name in dict.fromkeys(reached) if name not in ("A", "SUMMARY", "BUTTON", "box", "text", "asked")]
    order = ["q", "model", "reward", "who", "subset", "finish", "sort", "direction", "column", "open"]
    assert [name for name in there if name in order] == order
    assert {"A", "SUMMARY", "BUTTON"} <= set(reached)


# --- texts that would rather be something else ----------------------------------------------------------------------


def test_hostile_texts_are_only_seen(show: Show) -> None:
    """In prompts, answers, ids, subsets, finish reasons, and names of models and reward models."""
    count = len(HOSTILE)
    runs = []
    for place, name in enumerate(
        ('</script><b onclick="window.hit=1">base\u202e', "<img src=x onerror=window.hit=7>$x$")
    ):
        rows = tuple(
            row(
                number,
                text,
                prompt=HOSTILE[-1 - number][:3000],
                id=f"{number}\u202e<i>",
                subset=HOSTILE[number % 4],
                finish_reason=f"<u>{number % 2}\x00",
                context=(("user<b>", text[:3000]), ("assistant", "<script>window.hit = 9</script>")),
            )
            for number, text in enumerate(HOSTILE)
        )
        runs.append(Run(name, "<task>\u202e", rows, {"<b>rm</b>\u2066": tuple(float(place * n) for n in range(count))}))
    page = show(document(runs, ("<script>window.hit = 8</script>",)))
    title = page.title()
    assert title == visible(f"{runs[0].name} vs {runs[1].name} · <task>\u202e")
    for number in range(count):
        page.locator(f".open[data-row='{number}']").click()
    sides = page.evaluate("[...document.querySelectorAll('.detail .side .text')].map((one) => one.textContent)")
    for number, text in enumerate(HOSTILE):
        assert sides[2 * number] == (visible(text[:4000]) if text else "empty answer")
    every = page.evaluate("document.documentElement.outerHTML.length")
    assert every < 1_500_000  # the long text was not put in
    page.locator("#row-14 .more button").first.click()
    assert page.evaluate("document.querySelector('#row-14 .side .text').textContent.length") == 1_000_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.evaluate("[window.hit, document.title, document.scripts.length, document.images.length]") == [
        None, title, 1, 0,
    ]  # fmt: skip
    assert page.locator("iframe, main b[onclick], main script, base").count() == 0
    unseen = page.evaluate("/[\\u0000\\u202a-\\u202e\\u2066-\\u2069]/.test(document.documentElement.textContent)")
    assert not unseen


def test_the_page_writes_out_what_is_unseen_as_python_does(show: Show) -> None:
    rng = random.Random(0)
    letters = [*map(chr, range(0xA0)), *"\u061c\u200d\u200e\u2028\u202e\u2066\ufeff\uffff\ud83d\ude00\udc00äα日😀"]
    texts = ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(50)]
    page = show(document([simple("a", texts), simple("b", texts)], figures=False))
    for number in range(50):
        page.locator(f".open[data-row='{number}']").click()
    sides = page.evaluate(
        "[...document.querySelectorAll('.detail .side:first-child .text')].map((one) => one.textContent)"
    )
    # a pair of lone halves that stand side by side is one letter in JSON
    joined = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    whole = [text if "\ufffd" not in text else None for text in joined]
    wanted = [visible(text) if text else None for text in whole]
    assert [one for one, other in zip(sides, wanted, strict=True) if other is not None] == list(filter(None, wanted))
    assert sum(one is not None for one in wanted) > 3


def test_the_payload_is_the_runs(three: list[Run]) -> None:
    aligned = aligned_by([*three[:2], simple("c", [HOSTILE[8], "\ud800", "ok"], [1.0, float("nan"), float("inf")])])
    text = packed(columns(aligned))
    assert text == packed(columns(aligned))
    data = json.loads(gzip.decompress(base64.b64decode(text)))
    for run in range(3):
        assert [texts[run] for texts in data["outputs"]] == list(aligned.outputs(run))
        assert data["rewards"][0][run] == list(aligned.rewards(RM, run))
        assert data["lengths"][run] == list(aligned.lengths(run))
    assert data["rewards"][0][2][-3:] == [1.0, None, None]


# --- how it looks ---------------------------------------------------------------------------------------------------


def test_a_phone_scrolls_down_only(show: Show, three: list[Run]) -> None:
    long = [replace(run, name=f"{run.name}-{'very-long-name-' * 8}") for run in three]
    page = show(document(long, ("w" * 300,)), viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator(".open").first.click()
    page.locator("#flips summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(
        "[...document.querySelectorAll('.side')].every((one) => one.getBoundingClientRect().right <= 390)"
    )
    box = page.locator("#table .box").first
    assert box.evaluate("(one) => one.scrollWidth > one.clientWidth")  # the table scrolls in its box
    sizes = page.evaluate(
        "[...document.querySelectorAll('main svg text')].map((one) => one.getBoundingClientRect().height)"
    )
    assert min(sizes) > 8


def luminance(colour: str) -> float:
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3])
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(show: Show, three_document: str, scheme: str) -> None:
    """By 4.5 to 1, as WCAG's level AA asks; figures follow the page."""
    page = show(three_document, color_scheme=scheme)
    page.locator(".open").first.click()
    colours = page.evaluate("""() => {
        const behind = (one) => {
            for (; one; one = one.parentElement) {
                const colour = getComputedStyle(one).backgroundColor;
                if (!/, 0\\)$/.test(colour)) return colour;
            }
        };
        const found = new Set();
        for (const one of document.querySelectorAll("main *, header *, footer *")) {
            const own = [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
            if (!own || !one.checkVisibility()) continue;
            const style = getComputedStyle(one);
            if (one.disabled) continue;
            found.add(`${one instanceof SVGElement ? style.fill : style.color}|${behind(one)}|${one.tagName}`);
        }
        return [...found];
    }""")
    assert len(colours) > 10
    weak = []
    for line in colours:
        ink, paper, _ = line.split("|")
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            weak.append(line)
    assert weak == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) is (scheme == "light")


def test_ids_are_there_once_and_references_lead_somewhere(show: Show, three_document: str) -> None:
    page = show(three_document)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    document_text = page.content()
    assert set(re.findall(r"url\(#([^)]+)\)", document_text)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', document_text)) - {f"row-{n}" for n in range(200)} <= set(ids)
    unnamed = page.evaluate("""[...document.querySelectorAll("input, select, button, svg[role=img], [role=region]")]
        .filter((one) => !(one.labels?.length || one.textContent.trim() || one.getAttribute("aria-label"))).length""")
    assert unnamed == 0


def test_without_scripts_all_but_the_browser_is_there(show: Show, three_document: str) -> None:
    page = show(three_document, ready="#verdict", java_script_enabled=False)
    for part in (
        "#verdict h1",
        "#table table >> nth=0",
        "#flips details[open] .flip >> nth=0",
        "#figures svg >> nth=0",
        "noscript",
    ):
        assert page.locator(part).is_visible(), part
    assert page.locator("#browser").is_hidden()


def test_a_browser_that_cannot_unpack_says_so(show: Show, three_document: str) -> None:
    page = show(three_document, before="delete window.DecompressionStream", ready="#wait.note")
    assert "DecompressionStream" in page.inner_text("#wait")
    assert page.locator("#verdict h1").is_visible()


@pytest.mark.full
def test_six_models_on_many_prompts(show: Show) -> None:
    prompts = sized(ci=200, full=805)
    runs = made_runs(prompts, ("dpo", *(f"expo-a0.{n}" for n in range(1, 6))))
    text = document(runs)
    assert len(text.encode()) < 8_000_000
    assert len(text[: text.index('id="data"')].encode()) < 600_000  # what is seen before the rows are there
    page = show(text)
    assert page.inner_text("#count") == f"{prompts} of {prompts} rows"
    assert page.evaluate("document.querySelectorAll('*').length") < 6000
    wanted = aligned_by(runs).differences(RM, 5)
    set_controls(page, {"sort": "difference", "direction": "descending"})
    best = max(range(prompts), key=lambda number: wanted[number])
    assert page.locator(".open").first.get_attribute("data-row") == str(best)
