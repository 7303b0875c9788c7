"""The pages: every question of the course has its answer, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
INDEX = ROOT / "docs" / "README.md"

# The questions of the five documents, in their order. The other two documents answer the second
# and the last of these; their statements are in mistakes.md.
QUESTIONS = {
    "Midterm, February 2024": [
        *(f"Convolution {i}" for i in (1, 2, 3)),
        *(f"Backpropagation through time {i}" for i in (1, 2)),
        *(f"Positional encoding {i}" for i in (1, 2)),
        *(f"Model design {i}" for i in (1, 2, 3)),
        *(f"Optimization {i}" for i in (1, 2, 3, 4)),
    ],
    "NYU Deep Learning, homework 2": [
        *("1.1a", "1.1b", "1.1c (i)", "1.1c (ii)", "1.1c (iii)", "1.1c (iv)"),
        *(f"1.2.1{letter}" for letter in "abcd"),
        *(f"1.2.2{letter}" for letter in "abcdef"),
        *(f"1.3.{i}" for i in (1, 2, 3, 4)),
        *("2", "2", "2", "2"),  # two notebooks, the spikes, the pictures of extra credit
    ],
    "UCSB CS 291K, homework 2": [
        *(f"1.{i}" for i in range(1, 8)),
        *("2.1", "2.2", "2.3a", "2.3b", "2.3c", "2.4"),
        *(f"3.{i}" for i in range(1, 7)),
        "4",
    ],
    "Berkeley CS182, homework 6": [
        *(f"1{letter}" for letter in "abcd"),
        *(f"2{letter}" for letter in "abcde"),
        *(f"3{letter}" for letter in "abcdefg"),
        *("4", "4a"),
        *(f"5{letter}" for letter in "abc"),
        *(f"6{letter}" for letter in "abc"),
    ],
}


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text of each heading."""
    found = re.findall(r"^(#+) (.+)$", without_code(page), re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def anchor(heading: str) -> str:
    """Where GitHub lets a link to this heading go."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_question_is_answered_in_its_order() -> None:
    answered: dict[str, list[str]] = {}
    for level, text in headings(ROOT / "docs" / "answers.md"):
        if level == 2:
            answered[text] = section = []
        elif level == 3:
            section.append(text.split(". ")[0])
    assert answered == QUESTIONS


def links(page: Path) -> list[tuple[str, str]]:
    """Label and target of each link and picture."""
    return re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", without_code(page))


def test_the_index_names_every_page() -> None:
    named = {(INDEX.parent / target).resolve() for _, target in links(INDEX)}
    assert named >= set(PAGES) - {INDEX}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for label, target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        name, _, place = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if place:
            assert place in {anchor(text) for _, text in headings(path)}, target
        if label.startswith("`test_"):
            assert re.search(rf"^def {label.strip('`')}\(", path.read_text(), re.MULTILINE), label


def test_every_mistake_has_its_test_and_every_test_its_mistake() -> None:
    written = (ROOT / "docs/answers/test_mistakes.py").read_text()
    tests = re.findall(r"^def (test_\w+)", written, re.MULTILINE)
    named = re.findall(r"`(test_00\w+)`", (ROOT / "docs/mistakes.md").read_text())
    assert named == tests


def test_pictures_are_all_shown() -> None:
    files = {path.name for path in (ROOT / "docs").iterdir() if path.is_file()}
    pictures = files - {page.name for page in PAGES}
    shown = {Path(target).name for page in PAGES for _, target in links(page)}
    assert pictures <= shown
