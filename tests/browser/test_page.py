"""The live page in a real browser: what people see, and what hostile values must not do."""

import uuid

import pytest
from playwright.async_api import expect

import pipeline.serve.live
from pipeline.core.report import agent_uuid
from tests.support.serving import Serving, serving

pytestmark = pytest.mark.browser

expect.set_options(timeout=60_000)

A1, A2, A3 = (uuid.UUID(int=number) for number in (1, 2, 3))
ALERT = "window.ran = true"
HOSTILE = [
    f"<script>{ALERT}</script>",
    f"<img src=x onerror='{ALERT}'>",
    f'"><svg onload="{ALERT}">',
    f"'><body onload='{ALERT}'>",
    f"javascript:{ALERT}",
    f"</title></style></textarea><script>{ALERT}</script>",
    f"<iframe srcdoc='<script>parent.{ALERT}</script>'></iframe>",
    f"<math><mtext></mtext><style><img src=x onerror={ALERT}></style></math>",
    "{{constructor.constructor('window.ran = true')()}}",
    "${window.ran = true}",
    f"<!--<img src='--><img src=x onerror={ALERT}//'>",
    f"<a href='javascript:{ALERT}' autofocus onfocus='{ALERT}'>x</a>",
    "<style>*{display:none!important}</style>",
    "<base href='https://elsewhere.example/'>",
    "<meta http-equiv=refresh content='0;url=https://elsewhere.example/'>",
    "&lt;script&gt;&amp;&quot;",
    "data: x\n\nevent: snapshot\ndata: {}\n\n",
    "\u202egnp.exe \u2066 right to left \u2069",
    "a\u0300\u0301\u0302\u0303\u0304" * 40,
    "W" * 2048,
    "\n" * 500 + "after many lines",
    "\ufffd \U0001f600 \u200b\ufeff",
    "__proto__",
    "constructor",
    "hasOwnProperty",
]


def row(page, agent):
    return page.locator(f'.agent[data-agent="{agent}"]')


def cell(page, agent, column):
    return row(page, agent).locator(".cell").nth(column).locator(".text").last


async def test_values_errors_and_ages_appear_and_change(page):
    async with serving() as server:
        server.change(A1, "cpu", "12%", ago=600)
        server.change(A1, "disk", "", "timed out", ago=600)
        await page.goto(server.url)
        await expect(page.locator("#head [role=columnheader]")).to_have_text(["agent", "age", "state", "cpu", "disk"])
        await expect(cell(page, A1, 0)).to_have_text("12%")
        await expect(cell(page, A1, 1)).to_have_text("timed out")
        await expect(row(page, A1).locator(".age")).to_have_text("10 min")
        await expect(row(page, A1).locator(".state")).to_contain_text("1 error")
        server.change(A1, "cpu", "13%")
        server.change(A2, "memory", "1.5 GB")
        await expect(cell(page, A1, 0)).to_have_text("13%")
        await expect(row(page, A2)).to_be_visible()
        await expect(row(page, A1).locator(".age")).to_have_text("3 s")
        await expect(page.locator("#status")).to_have_text("live")
        await expect(page.locator("#summary")).to_contain_text("2 agents · 3 pairs · 1 errors")


async def test_page_says_how_many_pairs_are_left_out(page):
    async with serving(max_pairs=2) as server:
        server.change(A1, "cpu", "12%")
        server.change(A2, "cpu", "12%")
        await page.goto(server.url)
        await expect(page.locator("#summary")).to_have_text("2 agents · 2 pairs · 0 errors · 0 stale")
        server.change(A3, "cpu", "13%")
        server.change(A3, "disk", "13%")
        await expect(page.locator("#summary")).to_contain_text(
            "2 pairs · 0 errors · 0 stale · about 2 more pairs left out"
        )


async def test_pair_becomes_stale_after_three_of_its_usual_intervals_and_fresh_again(page, monkeypatch):
    monkeypatch.setattr(pipeline.serve.live, "_MIN_STALE_SECONDS", 1.0)
    async with serving() as server:
        for ago in (2.0, 1.0, 0.0):
            server.change(A1, "cpu", "12%", ago=ago)
        await page.goto(server.url)
        stale = row(page, A1).locator(".cell.stale")
        await expect(cell(page, A1, 0)).to_have_text("12%")
        await expect(stale).to_have_count(1)
        await expect(row(page, A1).locator(".state")).to_have_text("1 stale")
        await expect(page.locator("#summary")).to_contain_text("1 stale")
        for ago in (2.0, -50.0):
            server.change(A1, "cpu", "13%", ago=ago)
        await expect(stale).to_have_count(0)


async def test_page_reconnects_when_the_server_is_back_and_shows_what_it_has_then(page):
    server = Serving()
    server.change(A1, "cpu", "old")
    server.change(A2, "cpu", "gone")
    await page.goto(server.url)
    await expect(cell(page, A1, 0)).to_have_text("old")
    await server.stop()
    await expect(page.locator("#status")).to_have_attribute("data-state", "cut")
    await expect(cell(page, A1, 0)).to_have_text("old")
    async with serving(port=server.port) as successor:
        successor.change(A1, "cpu", "new")
        await expect(cell(page, A1, 0)).to_have_text("new")
        await expect(page.locator("#status")).to_have_text("live")
        await expect(row(page, A2)).to_have_count(0)


async def test_hostile_text_stays_text(page):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    async with serving() as server:
        for number, text in enumerate(HOSTILE):
            agent = uuid.UUID(int=number)
            server.change(agent, "value", text)
            server.change(agent, "error", "", text)
            server.change(agent, text, "hostile key")
        await page.goto(server.url)
        heights = await page.locator(".agent").evaluate_all("rows => rows.map(row => row.offsetHeight)")
        for number, text in enumerate(HOSTILE):
            agent = uuid.UUID(int=number)
            await page.fill("#search", str(agent))
            await expect(page.locator(".agent")).to_have_count(1)
            await expect(row(page, agent)).to_have_count(1)
            await row(page, agent).locator(".id").click()
            shown = await page.locator("#details-rows > *").evaluate_all("items => items.map(item => item.textContent)")
            pairs = dict(zip(shown[::3], shown[1::3], strict=True))
            assert pairs == {"value": text, "error": f"\u26a0 {text}", text: "hostile key"}
            heights += await page.locator("#details-rows > *").evaluate_all(
                "items => items.map(item => item.offsetHeight)"
            )
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            await page.keyboard.press("Escape")
            await page.fill("#search", "")
        assert await page.evaluate("window.ran") is None
        assert await page.evaluate("({}).polluted") is None
        assert max(heights) <= 200
        assert await page.locator("script, iframe, base, img, style").count() == 1  # the page's own script
    assert all(url.startswith(server.url) for url in requests)


async def test_agent_with_a_name_is_shown_by_it_and_found_by_either(page):
    host, other = (uuid.UUID(agent_uuid(name)) for name in ("host-17", "host-2"))
    async with serving() as server:
        server.change(A1, "cpu", "1%")
        server.change(host, "cpu", "2%")  # by a sink that knows no names yet
        server.change("host-2", "cpu", "3%")
        await page.goto(server.url)
        await expect(row(page, host).locator(".id")).to_have_text(str(host))
        server.change("host-17", "cpu", "4%")
        ids = page.locator(".agent .id")
        await expect(ids).to_have_text([str(A1), "host-17", "host-2"])  # in the order of what is shown
        await expect(row(page, host).locator(".id")).to_have_attribute("title", f"host-17\n{host}")
        for query in ("HOST-17", str(host)[:13]):
            await page.fill("#search", query)
            await expect(ids).to_have_text(["host-17"])
        await page.fill("#search", "")
        await row(page, other).click()
        await expect(page.locator("#details-agent")).to_have_text("host-2")
        await expect(page.locator("#details-id")).to_have_text(str(other))
        await page.keyboard.press("Escape")
        await row(page, A1).click()
        await expect(page.locator("#details-agent")).to_have_text(str(A1))
        await expect(page.locator("#details-id")).to_be_hidden()


async def test_hostile_name_stays_text(page):
    names = [text[:255] for text in HOSTILE]
    async with serving() as server:
        for name in names:
            server.change(name, "cpu", "1%")
        await page.goto(server.url)
        await expect(page.locator(".agent")).not_to_have_count(0)
        heights = await page.locator(".agent").evaluate_all("rows => rows.map(row => row.offsetHeight)")
        for name in names:
            agent = uuid.UUID(agent_uuid(name))
            await page.fill("#search", str(agent))
            await expect(page.locator(".agent")).to_have_count(1)
            assert await row(page, agent).locator(".id").evaluate("item => item.textContent") == name
            await row(page, agent).locator(".age").click()
            assert await page.locator("#details-agent").evaluate("item => item.textContent") == name
            heights.append(await page.locator("#details-agent").evaluate("item => item.offsetHeight"))
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            await page.keyboard.press("Escape")
        assert await page.evaluate("window.ran") is None
        assert max(heights) <= 130
        assert await page.locator("script, iframe, base, img, style").count() == 1  # the page's own script


async def test_search_sort_and_pause(page):
    async with serving() as server:
        for agent, value in ((A1, "9%"), (A2, "100%"), (A3, "20%")):
            server.change(agent, "cpu", value)
        await page.goto(server.url)
        ids = page.locator(".agent .id")
        await expect(ids).to_have_text([str(A1), str(A2), str(A3)])
        await page.select_option("#sort", "key:cpu")
        await expect(ids).to_have_text([str(A1), str(A3), str(A2)])
        await page.click("#direction")
        await expect(ids).to_have_text([str(A2), str(A3), str(A1)])
        await page.fill("#search", "20%")
        await expect(ids).to_have_text([str(A3)])
        await page.fill("#search", "no such thing")
        await expect(page.locator("#empty")).to_have_text("No agent matches the search.")
        await page.fill("#search", "")
        await page.click("#pause")
        await expect(page.locator("#status")).to_have_text("paused")
        server.change(A1, "cpu", "77%")
        server.change(A1, "disk", "new key")
        age = row(page, A1).locator(".age")
        paused_age = await age.text_content()
        await page.wait_for_timeout(2_500)  # nothing may happen, and no event would announce that
        await expect(cell(page, A1, 0)).to_have_text("9%")
        assert await age.text_content() == paused_age
        await page.click("#pause")
        await expect(cell(page, A1, 0)).to_have_text("77%")
        await expect(page.locator("#status")).to_have_text("live")


async def test_keyboard_reaches_everything(page):
    async with serving() as server:
        for number in range(100):
            server.change(uuid.UUID(int=number), "cpu", f"value {number}")
        await page.goto(server.url)
        await expect(row(page, A1)).to_be_visible()
        await page.keyboard.press("/")
        await page.keyboard.type("value")
        await expect(page.locator("#search")).to_have_value("value")
        for focused in ("sort", "direction", "pause", "grid"):
            await page.keyboard.press("Tab")
            await expect(page.locator(f"#{focused}")).to_be_focused()
        await page.keyboard.press("ArrowDown")
        await page.keyboard.press("ArrowDown")
        await expect(row(page, A1)).to_have_attribute("aria-selected", "true")
        await page.keyboard.press("End")
        await expect(row(page, uuid.UUID(int=99))).to_be_in_viewport()
        await page.keyboard.press("Enter")
        await expect(page.locator("#details")).to_be_visible()
        await expect(page.locator("#details-agent")).to_have_text(str(uuid.UUID(int=99)))
        server.change(uuid.UUID(int=99), "cpu", "changed while it is open")
        await expect(page.locator("#details-rows dd").first).to_have_text("changed while it is open")
        await page.keyboard.press("Escape")
        await expect(page.locator("#details")).to_be_hidden()
        await page.keyboard.press("p")
        await expect(page.locator("#status")).to_have_text("paused")


async def test_thousands_of_agents_cost_a_screenful_of_elements(page):
    agents = [uuid.UUID(int=number) for number in range(5000)]
    async with serving() as server:
        for agent in agents:
            for key in range(10):
                server.change(agent, f"key {key}", "v")
        await page.goto(server.url)
        await expect(page.locator("#summary")).to_contain_text("5,000 agents · 50,000 pairs")
        assert await page.locator(".agent").count() < 60
        await page.locator("#grid").focus()
        await page.keyboard.press("End")
        await expect(row(page, agents[-1])).to_be_in_viewport()
        server.change(agents[-1], "key 0", "changed")
        await expect(cell(page, agents[-1], 0)).to_have_text("changed")
        assert await page.locator(".agent").count() < 60


@pytest.mark.parametrize(
    "page",
    [{"color_scheme": "dark"}, {"color_scheme": "light"}],
    indirect=True,
    ids=["dark", "light"],
)
async def test_page_fits_a_phone_in_dark_and_light(page):
    await page.set_viewport_size({"width": 390, "height": 760})
    async with serving() as server:
        for key in ("cpu", "memory", "disk"):
            server.change(A1, key, "12%")
        await page.goto(server.url)
        await expect(row(page, A1)).to_contain_text("cpu 12%")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        assert await page.locator("#grid").evaluate("grid => grid.scrollWidth") <= 390
        colours = await page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, matchMedia('(prefers-color-scheme: dark)').matches]"
        )
        assert colours in (["rgb(17, 22, 29)", True], ["rgb(255, 255, 255)", False])


async def test_token_is_asked_for_until_it_is_right(page):
    async with serving(token="s3cret") as server:
        server.change(A1, "cpu", "12%")
        await page.goto(server.url)
        await expect(page.locator("#login")).to_be_visible()
        await page.fill("#token", "wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#login-error")).to_have_text("This token is wrong.")
        await page.fill("#token", "s3cret")
        await page.keyboard.press("Enter")
        await expect(cell(page, A1, 0)).to_have_text("12%")
        assert "s3cret" not in page.url
