"""The page: the same three files for everybody, and in a browser all that it promises, by mouse or by keyboard."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from browser import CHROMIUM, Page, browsing
from commands import refused
from serving import Running, asked, data_url, message, serving
from tiny import Lesson

from llava_cmoe.chat.opening import LearnedRun, Snapshot, open_together
from llava_cmoe.chat.session import ChatSession
from llava_cmoe.serve.page import HEADERS, PATHS

RUNS = ("run", "run@1", "other")


@pytest.fixture(scope="module")
def together(lesson: Lesson, lesson_of) -> dict[str, LearnedRun]:
    run, other = lesson.recipe.run, lesson_of("sequential_lora").recipe.run
    return dict(zip(RUNS, open_together([Snapshot(run), Snapshot(run, after=1), Snapshot(other)]), strict=True))


@pytest.fixture(scope="module")
def shown(together: dict[str, LearnedRun]) -> Iterator[Running]:
    with serving(together, with_page=True) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(page: Page, shown: Running) -> Page:
    """The page, fresh; what went wrong before is forgotten."""
    page.open(f"{shown.address}/")
    page.wait("!document.getElementById('main').hidden")
    page.problems.clear()
    page.addresses.clear()
    return page


IDLE = "document.getElementById('stop').disabled"


def ask(page: Page, text: str, button: str = "send") -> None:
    page.get("document.getElementById('question').value = ''; document.getElementById('question').focus()")
    page.write(text)
    page.get(f"document.getElementById('{button}').click()")
    page.wait(IDLE)


def last_answer(page: Page) -> list[str]:
    """Lines of the last answer: what was said, and whose routers said it."""
    return page.text("#talk li:last-child").split("\n")


def row_of(lesson: Lesson, task: str, index: int) -> tuple[str, Path | None]:
    row = lesson.run.eval_spec.rows[task][index]
    return row["turns"][0]["text"].removeprefix("<image>\n"), Path(row["image"]) if row["image"] else None


def test_the_files_hold_nothing_of_a_run_and_let_nothing_else_run(shown: Running, together):
    with serving(together["other"], with_page=True) as other:
        files = {path: [httpx2.get(server.address + path) for server in (shown, other)] for path in sorted(PATHS)}
    for one, two in files.values():
        assert one.status_code == 200 and one.content == two.content
        assert {name: one.headers[name] for name in HEADERS} == HEADERS
        assert "http://" not in one.text and "https://" not in one.text and "@import" not in one.text
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    html, script = files["/"][0].text, files["/page.js"][0].text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Storage|cookie", script)

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag != "style" and not [name for name, _ in attrs if name == "style" or name.startswith("on")]
            assert tag != "script" or dict(attrs).get("src") == "page.js"

    Tags().feed(html)


def test_without_the_key_the_page_is_all_that_is_served(together):
    with serving(together["run"], key="s\u00e9cret", with_page=True) as running:
        assert all(httpx2.get(running.address + path).status_code == 200 for path in PATHS)
        for path in ("/v1/models", "/health", "/page.html", "//", "/page.css/"):
            assert httpx2.get(running.address + path).status_code == 401


def test_a_page_of_another_name_reaches_no_file(shown: Running):
    assert {httpx2.get(shown.address + path, headers={"host": "evil.example"}).status_code for path in PATHS} == {403}


def test_every_model_says_what_it_stands_for_and_is_answered_by_that_run(shown: Running, lesson: Lesson, together):
    facts = {model.id: model.llava_cmoe for model in shown.client().models.list()}
    assert list(facts) == [
        *("run", "run:colours", "run:sides", "run:base", "run@1", "run@1:colours", "run@1:base", "other")
    ]  # fmt: skip
    assert facts["run:sides"] == {"run": "run", "stages": ["colours", "sides"], "route": "oracle", "task": "sides"}
    assert facts["run@1"] == {"run": "run@1", "stages": ["colours"], "route": "located", "task": None}
    assert facts["run:base"]["route"] == "base" and facts["other"]["route"] is None
    bodies = [{"model": name, "messages": asked(lesson, "sides", 0), "max_tokens": 12} for name in together]
    mixed = [shown.post(body).json() for body in bodies]
    for body, got, learned in zip(bodies, mixed, together.values(), strict=True):
        with serving(learned) as alone:
            wanted = alone.post({**body, "model": "run"}).json()
        assert got["choices"] == wanted["choices"] and got["llava_cmoe"] == wanted["llava_cmoe"]
    assert [len(got["llava_cmoe"]["scores"] or ()) for got in mixed] == [2, 1, 0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["run", "run:sides", "run:base", "other"])
def test_experts_that_are_asked_for_are_those_that_chat_sees(
    model: str, stream: bool, shown: Running, together, lesson: Lesson
):
    text, _ = row_of(lesson, "colours", 3)
    body = {"model": model, "messages": message(text), "max_tokens": 12, "stream": stream}
    answer = shown.post({**body, "llava_cmoe": {"experts": True}})
    if stream:
        *_, last, _, _ = answer.text.split("\n\n")
        verdict = json.loads(last.removeprefix("data: "))["llava_cmoe"]
    else:
        verdict = answer.json()["llava_cmoe"]
    plain = shown.post({**body, "stream": False}).json()["llava_cmoe"]
    assert verdict == {**plain, "experts": verdict["experts"]}
    learned = together[model.partition(":")[0]]
    task = {"run:sides": 1, "run:base": -1}.get(model)
    reply = ChatSession(learned).ask(None, text, task=task)
    assert list(reply.pieces)
    seen = {one["site"]: {int(expert): share for expert, share in one["shares"].items()} for one in verdict["experts"]}
    used = dict(reply.used())
    assert (
        bool(used) == (model in ("run", "run:sides"))
        and seen.keys() == used.keys()
        and all(
            seen[site].keys() == used[site].keys() and sum(seen[site].values()) == pytest.approx(1) for site in seen
        )
    )


def test_two_runs_of_one_name_are_refused(lesson: Lesson):
    assert "would be called run" in refused("web", lesson.recipe.run, "--compare", lesson.recipe.run)


@pytest.mark.slow
def test_a_person_uploads_a_picture_asks_and_reads_whose_routers_answered(opened: Page, shown: Running, lesson: Lesson):
    text, picture = row_of(lesson, "colours", 0)
    opened.choose("#picture", picture)
    opened.wait("document.getElementById('preview').naturalWidth > 0")
    ask(opened, text)
    first = shown.post({"model": "run", "messages": message(text, data_url(picture))}).json()
    task, said = first["llava_cmoe"]["task"], first["choices"][0]["message"]["content"]
    spoken = f"located: {task}" if task else "no task fits: the base model answers"
    assert last_answer(opened) == [said, spoken] and opened.text("#verdict") == spoken
    scores = opened.get("[...document.querySelectorAll('#scores tr')].map((row) => row.innerText.split(/\\s+/))")
    wanted = first["llava_cmoe"]["scores"]
    assert [(name, float(score)) for name, score in scores] == [
        (name, pytest.approx(score, abs=0.006)) for name, score in wanted.items()
    ]
    widths = opened.get("[...document.querySelectorAll('#scores .bar')].map((bar) => bar.offsetWidth)")
    assert widths == sorted(widths) and widths[-1] > 50
    for route, model in (("oracle", "run:sides"), ("base", "run:base")):
        opened.get("document.getElementById('anew').click()")
        opened.get("document.getElementById('task').value = 'sides'")
        opened.get(f"document.querySelector('[value={route}]').click()")
        ask(opened, text)
        answer = shown.post({"model": model, "messages": message(text, data_url(picture))}).json()
        whose = "sides, as chosen" if route == "oracle" else "the base model, as chosen"
        assert last_answer(opened) == [answer["choices"][0]["message"]["content"], whose]
        assert not opened.text("#scores")
    assert opened.problems == [] and {httpx2.URL(one).netloc for one in opened.addresses} == {
        httpx2.URL(shown.address).netloc, b""
    }  # fmt: skip


@pytest.mark.slow
def test_a_conversation_stays_with_the_task_of_its_first_question(opened: Page, shown: Running, lesson: Lesson):
    text, _ = row_of(lesson, "sides", 1)
    ask(opened, text)
    first = shown.post({"model": "run", "messages": message(text)}).json()
    ask(opened, "And which colour?")
    task, said = first["llava_cmoe"]["task"], first["choices"][0]["message"]["content"]
    turns = [*message(text), {"role": "assistant", "content": said}, {"role": "user", "content": "And which colour?"}]
    answer = shown.post({"model": f"run:{task or 'base'}", "messages": turns}).json()
    whose = f"{task or 'the base model'}, as the first question was located"
    assert last_answer(opened) == [answer["choices"][0]["message"]["content"], whose]
    assert len(opened.get("[...document.querySelectorAll('#talk li')].map(String)")) == 4
    opened.get("document.getElementById('anew').click()")
    assert opened.text("#talk") == ""


@pytest.mark.slow
def test_side_by_side_are_the_answers_of_each_run_to_the_question_alone(opened: Page, shown: Running):
    ask(opened, "Which colour?", "compare")
    cards = opened.get("[...document.querySelectorAll('#sides li')].map((card) => card.innerText.split(/\\n+/))")
    assert [card[:2] for card in cards] == [
        ["run@1", "after task 1, colours"], ["run", "after task 2, sides"], ["other", "after task 2, sides"]
    ]  # fmt: skip
    for name, _, said, _ in cards:
        answer = shown.post({"model": name, "messages": message("Which colour?")}).json()
        assert said == answer["choices"][0]["message"]["content"]
    assert opened.text("#asked") == "Which colour?" and opened.text("#talk") == ""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_keyboard_alone_is_enough_on_a_phone(dark: bool, opened: Page, shown: Running):
    opened.resize(390, 844, dark)
    opened.get("document.activeElement.blur()")
    for selector in ("#picture", "[name=route]", "#task", "#question", "#compare", "#anew"):
        opened.tab_to(selector)
        if selector == "[name=route]":
            opened.press("ArrowDown")
    assert opened.get("document.querySelector('[value=oracle]').checked")
    opened.tab_to("#question")
    opened.write("Which colour?")
    opened.press("Enter")
    opened.wait(f"{IDLE} && document.querySelectorAll('#talk li').length === 2")
    assert last_answer(opened)[1] == "colours, as chosen" and "layer" in opened.text("#heat")
    assert opened.get("document.activeElement.id") == "question"
    assert opened.get("document.documentElement.scrollWidth") <= 390
    ground = opened.get("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark


@pytest.mark.slow
def test_what_is_wrong_is_said_and_the_question_is_kept(opened: Page):
    ask(opened, "Is it </s>?")
    assert "special token" in opened.text("#problem") or "</s>" in opened.text("#problem")
    assert opened.get("document.getElementById('question').value") == "Is it </s>?"
    ask(opened, "<img src=x onerror=alert(1)>")
    assert "<img src=x" in opened.text("#talk") and opened.get("document.querySelectorAll('img').length") == 1


@pytest.mark.slow
def test_the_page_asks_for_the_key_and_keeps_it_nowhere(page: Page, together):
    with serving(together["run"], key="s\u00e9cret", with_page=True) as running:
        page.open(f"{running.address}/")
        for key, is_right in (("wrong", False), ("s\u00e9cret", True)):
            page.wait("!document.getElementById('keys').hidden")
            assert not page.text("#main")
            page.get("document.getElementById('key').focus()")
            page.write(key)
            page.press("Enter")
            if not is_right:
                page.wait("document.getElementById('problem').innerText.includes('key')")
        page.wait("!document.getElementById('main').hidden")
        ask(page, "Which colour?")
        assert len(last_answer(page)) == 2 and not page.text("#problem")
        kept = page.get("[document.cookie, localStorage.length, sessionStorage.length, document.body.outerHTML]")
        assert kept[:3] == ["", 0, 0] and "s\u00e9cret" not in kept[3]
        assert not [one for one in page.addresses if "cret" in one]
        page.open(f"{running.address}/")
        page.wait("!document.getElementById('keys').hidden")
