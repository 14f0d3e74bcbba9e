"""Tests of the panel "Use from code" in a real browser."""

from __future__ import annotations

import ast

import pytest

from tests.support.browser import OpenPage, set_weight, violations

pytestmark = pytest.mark.browser


def test_code_follows_the_controls_and_is_copied(open_page: OpenPage, server: str) -> None:
    page = open_page("photo=chelsea.jpg&models=one&seed=5", permissions=["clipboard-read", "clipboard-write"])
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    set_weight(page, "colour", 0.4)
    page.wait_for_timeout(500)
    assert requests == []  # closed, it asks for nothing

    def wait_for(*parts: str) -> str:
        for part in parts:
            page.wait_for_function("part => document.querySelector('.code-text').textContent.includes(part)", arg=part)
        return page.locator(".code-text").text_content() or ""

    page.get_by_text("Use from code").click()
    code = wait_for("moondream.vl(", '"colour": 0.4', '"one"', "range(5, 9)", "chelsea.jpg", f'"{server}/v1"')
    ast.parse(code)
    assert violations(page) == []
    session = next(cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "playground_session")
    assert session not in code

    page.locator("#skill").get_by_label("Question").check()
    wait_for('PROMPT = "Is the photo bright or dark?"', "model.query(")  # the prompt that the server has filled in
    page.locator("#prompt textarea").fill('Is this "warm"?')
    page.locator("#seed input").fill("8")
    wait_for(r'"Is this \"warm\"?"', "range(8, 12)")
    page.get_by_role("tab", name="Moondream SDK").press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "OpenAI SDK"
    code = wait_for("openai.OpenAI(")
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.locator("#prompt textarea").fill("")
    page.get_by_text("Question needs a prompt").wait_for()
    assert page.get_by_role("button", name="Copy", exact=True).is_disabled()
