"""The documentation's lines are not stale: seen without running them, but for one small page."""

from pathlib import Path

import pytest

from doc_blocks import ROOT, blocks_of, faults, pages, run_blocks

PLANTED = """\
# A page

```bash
word=here
jebm train --config smoke --energy.width 50 --dry-run && jebm sample --checkpoint runs/smoke --count 9
```

<!-- not run: needs a machine of yours -->
```bash
ssh you@machine
```

```python
from json import loads
value = loads("7")
```

```console
$ word=there && echo $word
there
```

```python
print(value + 1)
```
"""


@pytest.mark.parametrize("page", pages())
def test_no_line_of_the_documentation_is_stale(page: str) -> None:
    assert list(faults(page, (ROOT / page).read_text("utf-8"))) == []


def test_blocks_are_found_with_their_reasons_and_run_in_one_shell(tmp_path: Path) -> None:
    blocks = blocks_of("page.md", PLANTED)
    assert [(block.line, block.language, block.reason) for block in blocks] == [
        (3, "bash", None),
        (9, "bash", "needs a machine of yours"),
        (13, "python", None),
        (18, "console", None),
        (23, "python", None),
    ]
    assert list(faults("page.md", PLANTED)) == []
    run = [block for block in blocks if not block.reason and "jebm" not in block.text]
    (tmp_path / "page.md").write_text(PLANTED)
    output = run_blocks(run, tmp_path, {}, 60)
    assert "== page.md:23\n8\n== page.md:23 took " in output
    assert "== page.md:18\nthere\n== page.md:18 took " in output


@pytest.mark.parametrize(
    ("right", "typo", "fault"),
    [
        ("--energy.width", "--energy.widht", "unknown key energy.widht; did you mean energy.width?"),
        ("--count", "--cuont", "unknown option --cuont; did you mean --count?"),
        ("jebm sample", "jebm smaple", "unknown command smaple; did you mean sample?"),
        ("smoke", "smoek", "smoek: there is no such file"),
        ("import loads", "import laods", "page.md:13: json has no laods"),
        ("from json", "from jsno", "page.md:13: no module jsno"),
        ('("7")', '(("7")', "page.md:13: "),
        ("```console", "```", "page.md:18: ```: not one of"),
        ("not run: ", "not run", "not run"),
    ],
)
def test_a_typo_in_a_page_is_named(right: str, typo: str, fault: str) -> None:
    assert fault in " ".join(faults("page.md", PLANTED.replace(right, typo, 1)))


def test_a_block_that_fails_is_named(tmp_path: Path) -> None:
    blocks = blocks_of("page.md", "```bash\ntrue\n```\n\n```bash\nehco typo\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:5 failed with exit code 127"):
        run_blocks(blocks, tmp_path, {}, 60)
