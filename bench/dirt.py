"""Texts that were not cleaned, made of clean ones: what crawls have in them, each kind with a share of its own.

    python -m bench.dirt zh.jsonl.gz en.jsonl.gz --output raw.jsonl

For bench/rules.py, where there is no raw crawl at hand. Three kinds are changes within a text, the others are texts
that are added; the shares are of the clean texts. They are chosen, not counted in a crawl, so that each rule has
something to do; the last three kinds are met by no rule. Nothing but the clean texts and --seed decides.
"""

import argparse
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

from base.cli import HelpFormatter, positive
from corpus.records import each_record, text_of

MENU = ["首页", "新闻", "登录", "注册", "关于我们", "联系我们", "Home", "Login", "Next page", "上一页 下一页"]
OFFERS = ["低价代理，加微信咨询", "点击进入，免费领取", "Buy now, best price online", "无抵押贷款，当天放款"]


def accents(text: str, rng: random.Random) -> str:
    return unicodedata.normalize("NFD", text)  # é in two characters


def marks(text: str, rng: random.Random) -> str:
    """Soft hyphens, zero-width blanks and byte order marks between the letters."""
    return "".join(letter + rng.choice("\xad\u200b\ufeff") * (rng.random() < 0.05) for letter in text)


def blanks(text: str, rng: random.Random) -> str:
    """Line ends of Windows, blanks at them, ideographic indents, blank lines: what is left of a page's layout."""
    lines = text.replace("。", "。\n").splitlines()
    return "".join(f"\u3000\u3000{line}{' ' * rng.randrange(6)}\r\n" + "\r\n" * rng.randrange(4) for line in lines)


def copy(text: str, rng: random.Random) -> str:
    return text  # as it is


def near_copy(text: str, rng: random.Random) -> str:
    """Another page of the same text: one stretch is missing, and a line of its own follows."""
    place = rng.randrange(len(text))
    return f"{text[:place]}{text[place + 5 :]}\n阅读 {rng.randrange(10**4)} 次"


def stub(text: str, rng: random.Random) -> str:
    return f"{rng.choice(MENU)[:5]} {rng.randrange(1000)}"


def symbols(text: str, rng: random.Random) -> str:
    """A table or a frame without its content."""
    return "".join(rng.choice("|-+=*#_/\\<>~^·★│─") for _ in range(len(text))) + text[:20]


def spam(text: str, rng: random.Random) -> str:
    return f"{rng.choice(OFFERS)} {rng.randrange(10**8)}\n" * (len(text) // 12 + 8)


def mojibake(text: str, rng: random.Random) -> str:
    return text.encode().decode("gb18030", "replace")  # UTF-8 that was taken for GBK


def markup(text: str, rng: random.Random) -> str:
    """What is left of HTML, with the menu of its site before and after."""
    menu = " | ".join(rng.sample(MENU, 5))
    body = text.replace("\n", "<br />&nbsp;&nbsp;")
    return f'{menu}\n<div class="content-{rng.randrange(100)}">{body}</div>\n{menu} &copy; {rng.randrange(2000, 2026)}'


def code(text: str, rng: random.Random) -> str:
    return text.encode()[:200].hex()  # base64 and the like


CHANGES = {accents: 0.1, marks: 0.1, blanks: 0.4}  # share of the texts
ADDED = {copy: 0.25, near_copy: 0.25, stub: 0.1, symbols: 0.05, spam: 0.1, mojibake: 0.05, markup: 0.05, code: 0.05}


def make_dirty(texts: list[str], rng: random.Random) -> tuple[list[str], Counter]:
    """The texts with dirt, in random order; and the characters of each kind."""
    made = []
    weights = [1 / rank for rank in range(1, len(texts) + 1)]  # a few texts are copied very often, most never
    for text in texts:
        kind = rng.choices([None, *CHANGES], [1 - sum(CHANGES.values()), *CHANGES.values()])[0]
        made.append((kind.__name__ if kind else "clean", kind(text, rng) if kind else text))
    for kind, share in ADDED.items():
        made += [(kind.__name__, kind(text, rng)) for text in rng.choices(texts, weights, k=round(share * len(texts)))]
    rng.shuffle(made)
    sizes = Counter()
    for name, text in made:
        sizes[name] += len(text)
    return [text for _, text in made], sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="clean texts")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file")
    parser.add_argument("--texts", type=positive, default=2000, help="so many of the clean ones, at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    texts = [text for file in args.inputs for text in each_record(file, "text", lambda record: text_of(record, "text"))]
    made, sizes = make_dirty(rng.sample(texts, min(args.texts, len(texts))), rng)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in made]
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{args.output}: {len(made):,} texts, {sizes.total():,} characters")
    for name, size in sizes.most_common():
        print(f"  {name:10} {size / sizes.total():6.1%}")


if __name__ == "__main__":
    main()
