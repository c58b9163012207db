from __future__ import annotations

import time

import pytest

from adapters.tools.html_text import readable, without_markup

PAGE = """<!doctype html><html lang=en><head><meta charset=utf-8><title>Tea &amp; more</title>
<style>p > b { color: red }</style><script>if (a < b && c > d) { document.write("<p>no</p>") }</script></head>
<body><!-- <p>hidden</p> --><h1>Tea</h1><p>One <b>strong</b>
   cup.<br>Two cups.</p><ul><li>green<li>black</ul>
<table><tr><th>kind<th>minutes<tr><td>green<td>3</table>
<pre>def brew():
    return 1 &lt; 2</pre><a href="/x" title="a > b">more</a> <svg><text>no</text></svg> 3 < 4
<noscript>Scripts are off.</noscript></body></html>"""


def test_a_page_becomes_what_a_person_would_read() -> None:
    page = readable(PAGE)
    assert page.title == "Tea & more"
    assert page.text == (
        "# Tea\n\nOne strong cup.\nTwo cups.\n\n- green\n- black\n\nkind | minutes\ngreen | 3\n\n"
        "def brew():\n    return 1 < 2\n\nmore 3 < 4 Scripts are off."
    )


def test_the_main_content_is_preferred_where_the_page_marks_it() -> None:
    words = "word " * 100
    assert readable(f"<nav>menu</nav><main><p>{words}</main><footer>end</footer>").text == words.strip()
    assert readable("<nav>menu</nav><main>short</main>").text == "menu\n\nshort"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a<", "a<"),
        ("a < b <3", "a < b <3"),
        ("<p", ""),
        ("x<!--", "x"),
        ("x<script>y", "x"),
        ("x<svg>y", "xy"),
        ("<title>t", ""),
        ('<a title="unclosed>x</a>y', "xy"),
        ("&#" + "9" * 9_999 + ";", "&#" + "9" * 9_999 + ";"),
        ("<SCRIPT>a</ScRiPt >b", "b"),
        ("<br/>x<svg/>y", "x" + "y"),
    ],
)
def test_broken_markup_is_read_as_well_as_it_goes(markup: str, text: str) -> None:
    assert readable(markup).text == text


@pytest.mark.parametrize(
    "part",
    [
        "<div>",
        "<",
        "</",
        "<!--",
        "<!",
        '<a "',
        "<a '\"",
        "<svg>",
        "<svg></svgx ",
        "<script>",
        "<title></titl",
        "&amp",
    ],
)
def test_no_markup_takes_more_than_linear_time(part: str) -> None:
    start = time.perf_counter()
    readable(part * (2_000_000 // len(part)))
    assert time.perf_counter() - start < 8  # A second on a quiet core; quadratic ones take minutes.


def test_a_fragment_becomes_one_line() -> None:
    assert without_markup("The <strong>best</strong>\n tea &amp; cake") == "The best tea & cake"
