"""Answers made to harm who reads them: nothing is executed or fetched, and nothing hangs.

A violation of the content security policy is an error on the console, which fails the test (conftest.py).
"""

import pytest
from fake_site import choose, say, wait

MARKUP = """<script>attacked = 1</script><img src=x onerror="attacked = 1"><svg onload="attacked = 1">
<iframe srcdoc="<script>parent.attacked = 1</script>"></iframe>
[a](javascript:attacked=1) [b](JaVaScRiPt&#58;attacked=1) [c](data:text/html,<script>attacked=1</script>)
[d](vbscript:attacked=1) [e](\x01javascript:attacked=1) <javascript:attacked=1> [f]( java\tscript:attacked=1)
![g](http://example.invalid/x.png) ![h](data:image/svg+xml,<svg/onload=attacked=1>) ![i](//example.invalid/y.png)
[j]: javascript:attacked=1

[j] [k](/v1/models) [l](file:///etc/passwd) [m](//example.invalid)

```"><script>attacked=1</script>
</code></pre><script>attacked = 1</script>
```
"""
FORMULAS = r"""
$\href{javascript:attacked=1}{x}$ $\url{javascript:attacked=1}$ $\includegraphics{http://example.invalid/z.png}$
$\class{a" onclick="attacked=1}{x}$ $\style{background:url(http://example.invalid/s)}{x}$ $\id{turns}{x}$
$\htmlData{onclick=attacked}{x}$ $\text{<script>attacked=1</script>}$ $\textcolor{red;background:url(//e.invalid)}{x}$
$\def\a{\a\a}\a$ $\newcommand{\b}{\b\b}\b$ $\let\c=\c\c$ $\gdef\d#1{#1#1#1#1}\d{\d{\d{\d{\d{x}}}}}$
$\rule{1e9em}{1e9em}$ $\hspace{1e99em}$ $\kern1e9em$ $\boxed{\Huge\Huge x}$ $\color{expression(attacked=1)}x$
"""
NESTED = [  # what opens, what closes, how deep
    ("{", "}", 900),
    (r"\sqrt{", "}", 250),
    (r"\frac{", "}{1}", 200),
    (r"\left(", r"\right)", 120),
    ("x^{", "}", 400),
]
UNFINISHED = [  # in the highlighter's languages
    ("python", "f'{"),
    ("javascript", "`${"),
    ("cpp", "a<b<"),
    ("bash", '$((\\"'),
    ("css", "a{b:"),
    ("xml", "<a b='"),
]
ATTACKS = {
    "markup": MARKUP,
    "formulas": FORMULAS,
    "deep formulas": "".join(f"${opened * n}x{closed * n}$ " for opened, closed, n in NESTED),
    "many formulas": "$x^2$ " * 16_000,
    "unclosed formulas": "$a " * 10_000 + r"\( " * 10_000 + "$$ \\[ " * 5000,
    "a wide table": "|a" * 180 + "|\n" + "|-" * 180 + "|\n" + ("|b" * 180 + "|\n") * 220,
    "deep quotes and lists": ">" * 20_000 + "\n\n" + "- " * 20_000 + "x\n\n" + "1. " * 10_000,
    "emphasis": "*a _b " * 8000 + "**" * 8000 + "~~" * 4000,
    "brackets": "[" * 20_000 + "](" * 10_000 + "![" * 10_000 + "<" * 10_000,
    "backticks": "".join("`" * i + " " for i in range(400)),
    "entities": "&#x41;&amp;&nosuch;" * 4000,
    "code": "".join(f"```{name}\n{text * (3900 // len(text))}\n```\n" for name, text in UNFINISHED),
    "a megabyte": "word " * 200_000,
}


@pytest.mark.extra
@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_does_no_harm(visit, name):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.set_default_timeout(20_000)
    choose(page, "sft")
    say(page, "say:" + ATTACKS[name])
    wait(page)
    page.locator("article footer .note:not(:empty)").wait_for()
    assert page.evaluate("typeof attacked") == "undefined"
    assert page.locator("#turns :is(script, img, svg, iframe, object, embed, style, link, form)").count() == 0
    links = page.locator("#turns a").evaluate_all("links => links.map((link) => link.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}
    attributes = page.locator("#turns *").evaluate_all(
        "all => [...new Set(all.flatMap((one) => one.getAttributeNames()))]"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
    sizes = page.locator("article math").evaluate_all("all => all.map((one) => one.getBoundingClientRect().height)")
    assert max(sizes, default=0) < 20_000
    page.get_by_role("button", name="New chat").click()  # it still listens
    page.locator(".hello").wait_for()
