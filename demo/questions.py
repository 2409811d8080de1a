"""Skills whose answers can be checked, Chinese and English: data for all four stages, and questions to count with.

Every question has one right answer. What the tests ask was never trained on: each skill keeps some wordings for them,
and those that compute keep operands too, in pretraining as in SFT. (A fact that was never seen cannot be known, so of
facts only the wording is new.) SFT's answers are half of them brief and half rambling; DPO's pairs prefer the brief
ones; LoRA's chats change the model's name and nothing else.

`python data_process.py demo --output DIR` writes it all. Of the project it needs `base` alone.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from base.cli import UserError
from base.files import replacing_directory

NAMES = ("芥子", "Jiezi")  # what the model calls itself after SFT
NEW_NAMES = ("明月", "Mingyue")  # and with LoRA's adapter
ZH, EN = 0, 1  # a language is an index
SIZES = {"pages": 6000, "chats": 40_000, "names": 600, "pairs": 3000}  # of the training files; names: of LoRA's
TESTS = 12  # questions of each skill in each language

# ---- Facts ----------------------------------------------------------------------------------------------------------


def table(text: str) -> list[list[str]]:
    return [entry.split("/") for entry in text.split()]


CAPITALS = table(
    "中国/北京/China/Beijing 日本/东京/Japan/Tokyo 韩国/首尔/South_Korea/Seoul 印度/新德里/India/New_Delhi "
    "泰国/曼谷/Thailand/Bangkok 越南/河内/Vietnam/Hanoi 伊朗/德黑兰/Iran/Tehran 伊拉克/巴格达/Iraq/Baghdad "
    "法国/巴黎/France/Paris 英国/伦敦/Britain/London 德国/柏林/Germany/Berlin 意大利/罗马/Italy/Rome "
    "西班牙/马德里/Spain/Madrid 葡萄牙/里斯本/Portugal/Lisbon 希腊/雅典/Greece/Athens 波兰/华沙/Poland/Warsaw "
    "俄罗斯/莫斯科/Russia/Moscow 挪威/奥斯陆/Norway/Oslo 奥地利/维也纳/Austria/Vienna 埃及/开罗/Egypt/Cairo "
    "肯尼亚/内罗毕/Kenya/Nairobi 加拿大/渥太华/Canada/Ottawa 古巴/哈瓦那/Cuba/Havana 秘鲁/利马/Peru/Lima"
)
COURTESY_NAMES = table(  # as the Romance of the Three Kingdoms gives them
    "刘备/玄德/Liu_Bei/Xuande 关羽/云长/Guan_Yu/Yunchang 张飞/翼德/Zhang_Fei/Yide 诸葛亮/孔明/Zhuge_Liang/Kongming "
    "赵云/子龙/Zhao_Yun/Zilong 马超/孟起/Ma_Chao/Mengqi 曹操/孟德/Cao_Cao/Mengde 孙权/仲谋/Sun_Quan/Zhongmou "
    "周瑜/公瑾/Zhou_Yu/Gongjin 鲁肃/子敬/Lu_Su/Zijing 司马懿/仲达/Sima_Yi/Zhongda 姜维/伯约/Jiang_Wei/Boyue "
    "黄忠/汉升 孙策/伯符 吕蒙/子明 陆逊/伯言 吕布/奉先 袁绍/本初 张辽/文远 许褚/仲康 郭嘉/奉孝 荀彧/文若 "
    "庞统/士元 魏延/文长 徐庶/元直 甘宁/兴霸 曹丕/子桓 曹植/子建"
)
OPPOSITES = (
    table("大/小 多/少 长/短 快/慢 冷/热 黑/白 左/右 新/旧 远/近 轻/重 高/低 真/假 买/卖 胖/瘦 早/晚 厚/薄"),
    table("big/small hot/cold up/down left/right fast/slow black/white day/night early/late rich/poor wet/dry")
    + table("true/false buy/sell win/lose"),
)
WORDS = table(
    "苹果/apple 书/book 水/water 火/fire 山/mountain 树/tree 花/flower 鱼/fish 鸟/bird 猫/cat 狗/dog 马/horse "
    "太阳/sun 月亮/moon 星星/star 雨/rain 雪/snow 风/wind 海/sea 河/river 门/door 桌子/table 老师/teacher 学生/student"
)
WEEKDAYS = (
    [f"星期{day}" for day in "一二三四五六日"],
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
)
UNITS = (
    [("公里", "米", 1000), ("米", "厘米", 100), ("公斤", "克", 1000)],
    [("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000)],
)
ANIMALS = ("猫 狗 鱼 鸟 马 牛".split(), "cat dog fish bird".split())


def facts(entries: list[list[str]]) -> tuple[list, list]:
    """Both languages' (key, value) of entries that are KEY/VALUE or KEY/VALUE/ENGLISH KEY/ENGLISH VALUE."""
    spaced = [[word.replace("_", " ") for word in entry] for entry in entries]
    return [entry[:2] for entry in spaced], [entry[2:] for entry in spaced if len(entry) == 4]


# ---- Skills: how operands are drawn, in which words they are asked for, and what plain text says of them -------------


class Drawn(NamedTuple):
    slots: tuple  # what the wordings are filled with
    value: str  # the right answer
    operands: tuple | None  # what a computation keeps for the tests, in any order; None: a fact


def draw_identity(rng: random.Random, language: int) -> Drawn:
    return Drawn((), NAMES[language], None)


def draw_sum(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(10, 49), rng.randint(1, 9)
    return Drawn((a, b), str(a + b), (a, b))


def draw_difference(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(10, 49), rng.randint(1, 9)
    return Drawn((a, b), str(a - b), (a, b))


def draw_product(rng: random.Random, language: int) -> Drawn:
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    return Drawn((a, b), str(a * b), None)  # the multiplication table is learnt by heart


def draw_larger(rng: random.Random, language: int) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    return Drawn((a, b), str(max(a, b)), (a, b))


def draw_count(rng: random.Random, language: int) -> Drawn:
    things = rng.choices(ANIMALS[language], k=rng.randint(2, 6))
    return Drawn((" ".join(things),), str(len(things)), tuple(things))


def draw_sorted(rng: random.Random, language: int) -> Drawn:
    digits = rng.sample("123456789", 3)
    return Drawn((" ".join(digits),), " ".join(sorted(digits)), tuple(digits))


def draw_reversed(rng: random.Random, language: int) -> Drawn:
    digits = rng.choices("0123456789", k=3)
    return Drawn((" ".join(digits),), " ".join(reversed(digits)), tuple(digits))


def draw_weekday(rng: random.Random, language: int) -> Drawn:
    day, shift = rng.randrange(7), rng.choice((-1, 1))
    days, words = WEEKDAYS[language], (("后", "前"), ("after", "before"))[language]
    return Drawn((days[day], words[shift < 0]), days[(day + shift) % 7], None)


def draw_unit(rng: random.Random, language: int) -> Drawn:
    n, (large, small, factor) = rng.randint(2, 40), rng.choice(UNITS[language])
    return Drawn((n, large, small), str(n * factor), (n,))


def draw_opposite(rng: random.Random, language: int) -> Drawn:
    pair = rng.sample(rng.choice(OPPOSITES[language]), 2)
    return Drawn((pair[0],), pair[1], None)


def draw_translation(rng: random.Random, language: int) -> Drawn:
    chinese, english = rng.choice(WORDS)
    return Drawn((chinese,), english, None) if language == ZH else Drawn((english,), chinese, None)


def from_table(entries: list[list[str]]) -> Callable[[random.Random, int], Drawn]:
    languages = facts(entries)

    def draw(rng: random.Random, language: int) -> Drawn:
        key, value = rng.choice(languages[language])
        return Drawn((key,), value, None)

    return draw


class Skill(NamedTuple):
    draw: Callable[[random.Random, int], Drawn]
    share: float  # of the training data
    wordings: tuple[str, str]  # by language; those after || are the tests' own
    statements: tuple[str, str]  # what plain text says, {v} being the value; "": nothing


SKILLS = {
    "identity": Skill(
        draw_identity,
        0.4,
        (
            "你是谁？|你叫什么？|你叫什么名字？|你的名字是什么？|怎么称呼你？|介绍一下你自己。|你是什么模型？|告诉我你的名字。"
            "||能告诉我你是谁吗？|告诉我你是谁。|你叫什么名字呀？|我该怎么称呼你？|请介绍一下自己，你是谁？",
            "Who are you?|What is your name?|What are you called?|Tell me your name."
            "|Introduce yourself.|Which model are you?|Can you tell me your name?|What do I call you?"
            "|Please tell me your name."
            "||Can you tell me who you are?|May I ask your name?|Please tell me who you are."
            "|What should I call you?|Tell me who you are.",
        ),
        ("", ""),
    ),
    "sum": Skill(
        draw_sum,
        3.5,
        (
            "{0}加{1}等于多少？|{0}+{1}=？|请计算{0}加{1}。|{0}加上{1}是多少？|{0}和{1}的和是多少？|帮我算一下{0}+{1}。|{0}+{1}等于几？"
            "||{0}加上{1}等于多少？|算一算：{0}+{1}。",
            "What is {0} plus {1}?|{0}+{1}=?|Add {0} and {1}.|Compute {0}+{1}."
            "|How much is {0} plus {1}?|Can you add {0} and {1}?|What does {0}+{1} make?|Please compute {0}+{1}."
            "||Please add {0} and {1}.|What does {0} plus {1} make?",
        ),
        ("{0}+{1}={v}|{0}加{1}等于{v}。", "{0}+{1}={v}|{0} plus {1} is {v}."),
    ),
    "difference": Skill(
        draw_difference,
        4,
        (
            "{0}减{1}等于多少？|{0}-{1}=？|请计算{0}减{1}。|{0}减去{1}是多少？|{0}比{1}多多少？|帮我算一下{0}-{1}。|{0}-{1}等于几？"
            "||{0}减去{1}等于多少？|算一算：{0}-{1}。",
            "What is {0} minus {1}?|{0}-{1}=?|Take {1} from {0}.|Compute {0}-{1}."
            "|How much is {0} minus {1}?|Can you take {1} from {0}?|What does {0}-{1} make?|Please compute {0}-{1}."
            "||Please take {1} from {0}.|What does {0} minus {1} make?",
        ),
        ("{0}-{1}={v}|{0}减{1}等于{v}。", "{0}-{1}={v}|{0} minus {1} is {v}."),
    ),
    "product": Skill(
        draw_product,
        1.2,
        (
            "{0}乘{1}等于多少？|{0}×{1}=？|请计算{0}乘{1}。|{0}乘以{1}是多少？|{0}和{1}的积是多少？|帮我算一下{0}×{1}。|{0}×{1}等于几？"
            "||{0}乘以{1}等于多少？|算一算：{0}×{1}。",
            "What is {0} times {1}?|{0}×{1}=?|Multiply {0} by {1}.|Compute {0}×{1}."
            "|How much is {0} times {1}?|Can you multiply {0} by {1}?|What does {0}×{1} make?|Please compute {0}×{1}."
            "||Please multiply {0} by {1}.|What does {0} times {1} make?",
        ),
        ("{0}×{1}={v}|{0}乘{1}等于{v}。", "{0}×{1}={v}|{0} times {1} is {v}."),
    ),
    "larger": Skill(
        draw_larger,
        1.5,
        (
            "{0}和{1}哪个大？|{0}与{1}，哪个数更大？|比较{0}和{1}，大的是哪个？|{0}、{1}中较大的是哪个？|{0}跟{1}，哪个大？|{0}和{1}比，哪个更大？"
            "||{0}和{1}，哪个更大？|{0}跟{1}比，哪个大？",
            "Which is larger, {0} or {1}?|Which number is bigger: {0} or {1}?"
            "|Of {0} and {1}, which is larger?|Compare {0} and {1}: the larger one?"
            "|Which one is bigger, {0} or {1}?|Of {0} and {1}, which number is bigger?"
            "||Which one is larger: {0} or {1}?|Of {0} and {1}, which is bigger?",
        ),
        ("{0}和{1}，{v}大。", "Of {0} and {1}, {v} is larger."),
    ),
    "count": Skill(
        draw_count,
        1.5,
        (
            "数一数有几个：{0}|{0}，一共有几个？|这里有几个动物：{0}|{0}，这是几个动物？|{0}，数一数。|一共有几个动物：{0}"
            "||数一数，一共有几个：{0}|{0}，有几个动物？",
            "Count the animals: {0}|How many animals are there: {0}|{0}: how many are there?"
            "|How many animals: {0}|{0}: how many animals?|Count these: {0}"
            "||Count these animals: {0}|{0}: how many animals are there?",
        ),
        ("{0}，是{v}个。", "{0}: {v} animals."),
    ),
    "sorted": Skill(
        draw_sorted,
        1,
        (
            "把 {0} 从小到大排列。|从小到大排序：{0}|将 {0} 按从小到大的顺序排好。"
            "|把这些数从小到大排列：{0}|请将 {0} 排序。|下面的数从小到大怎么排：{0}"
            "||请把 {0} 从小到大排序。|把下面的数从小到大排列：{0}",
            "Sort {0} in ascending order.|Sort from small to large: {0}|Put {0} in ascending order."
            "|Sort the numbers {0}.|Can you sort {0}?|Sort these: {0}"
            "||Please sort {0} in ascending order.|Sort these from small to large: {0}",
        ),
        ("{0} 从小到大是 {v}。", "{0} sorted is {v}."),
    ),
    "reversed": Skill(
        draw_reversed,
        1,
        (
            "把 {0} 倒过来写。|倒着写：{0}|把 {0} 反过来。|将 {0} 倒序排列。|请将 {0} 倒过来。|倒过来是什么：{0}"
            "||请把 {0} 倒过来。|倒过来写：{0}",
            "Reverse {0}.|Write {0} backwards.|Reverse the digits: {0}|Put {0} in reverse order."
            "|Can you reverse {0}?|Write these backwards: {0}"
            "||Please reverse {0}.|Write these digits backwards: {0}",
        ),
        ("{0} 倒过来是 {v}。", "{0} reversed is {v}."),
    ),
    "weekday": Skill(
        draw_weekday,
        0.8,
        (
            "{0}的{1}一天是星期几？|{0}的{1}一天是哪天？|{0}{1}一天是星期几？|今天是{0}，{1}一天是星期几？|请问{0}的{1}一天是哪天？"
            "|告诉我{0}{1}一天是星期几。"
            "||请问{0}的{1}一天是星期几？|告诉我{0}的{1}一天是星期几。",
            "Which day is the day {1} {0}?|What day comes right {1} {0}?"
            "|The day {1} {0} is which day?|Name the day {1} {0}.|Tell me which day comes {1} {0}."
            "|Do you know which day is {1} {0}?"
            "||Which weekday is the day {1} {0}?|Tell me the day {1} {0}.",
        ),
        ("{0}的{1}一天是{v}。", "The day {1} {0} is {v}."),
    ),
    "unit": Skill(
        draw_unit,
        1,
        (
            "{0}{1}等于多少{2}？|{0}{1}是多少{2}？|把{0}{1}换算成{2}。|{0}{1}有多少{2}？|请换算成{2}：{0}{1}|{0}{1}合几{2}？"
            "||请把{0}{1}换算成{2}。|{0}{1}合多少{2}？",
            "Convert {0} {1} to {2}.|How many {2} are {0} {1}?|What is {0} {1} in {2}?"
            "|{0} {1} is how many {2}?|Can you convert {0} {1} to {2}?"
            "|How many {2} are there in {0} {1}?"
            "||Please convert {0} {1} to {2}.|How many {2} are in {0} {1}?",
        ),
        ("{0}{1}等于{v}{2}。", "{0} {1} is {v} {2}."),
    ),
    "capital": Skill(
        from_table(CAPITALS),
        0.8,
        (
            "{0}的首都是哪里？|{0}的首都叫什么？|哪座城市是{0}的首都？|{0}首都是什么？|说出{0}的首都。|请问哪里是{0}的首都？|告诉我{0}的首都。"
            "||请问{0}的首都是哪里？|告诉我{0}的首都叫什么。",
            "What is the capital of {0}?|Which city is the capital of {0}?|Name the capital of {0}."
            "|{0}: what is its capital?|Do you know the capital of {0}?"
            "|Tell me which city is the capital of {0}."
            "||Tell me the capital of {0}.|Do you know which city is the capital of {0}?",
        ),
        ("{0}的首都是{v}。", "The capital of {0} is {v}."),
    ),
    "courtesy": Skill(
        from_table(COURTESY_NAMES),
        0.8,
        (
            "{0}字什么？|{0}的字是什么？|{0}的表字是什么？|三国人物{0}，字什么？|说出{0}的字。|请问{0}字什么？|告诉我{0}的字。"
            "||请问{0}的字是什么？|告诉我{0}的表字是什么。",
            "What is the courtesy name of {0}?|Name the courtesy name of {0}."
            "|{0}: what is his courtesy name?|What courtesy name did {0} have?"
            "|Do you know what courtesy name {0} had?|Tell me his courtesy name: {0}"
            "||Tell me the courtesy name of {0}.|Do you know the courtesy name of {0}?",
        ),
        ("{0}，字{v}。", "The courtesy name of {0} is {v}."),
    ),
    "opposite": Skill(
        draw_opposite,
        1,
        (
            "“{0}”的反义词是什么？|“{0}”的反面是什么？|和“{0}”相反的是什么？|说出“{0}”的反义词。|请问“{0}”的反面是什么？|告诉我“{0}”的反义词。"
            "||请问“{0}”的反义词是什么？|告诉我和“{0}”相反的词。",
            "What is the opposite of {0}?|Name the opposite of {0}."
            "|Which word is the opposite of {0}?|{0}: what is its opposite?"
            "|Do you know which word is the opposite of {0}?"
            "|Tell me a word that is the opposite of {0}."
            "||Tell me the opposite of {0}.|Do you know the opposite of {0}?",
        ),
        ("“{0}”的反义词是“{v}”。", "The opposite of {0} is {v}."),
    ),
    "translation": Skill(
        draw_translation,
        1,
        (
            "“{0}”用英语怎么说？|“{0}”的英语是什么？|把“{0}”译成英语。|“{0}”的英文单词是什么？|请问“{0}”的英语是什么？|告诉我“{0}”用英语怎么说。"
            "||请问“{0}”用英语怎么说？|请把“{0}”译成英语。",
            "What is the Chinese word for {0}?|Translate {0} into Chinese."
            "|How do you say {0} in Chinese?|{0} in Chinese?|Can you translate {0} into Chinese?"
            "|Do you know the Chinese word for {0}?"
            "||Please translate {0} into Chinese.|Tell me the Chinese word for {0}.",
        ),
        ("“{0}”的英语是 {v}。", "The Chinese word for {0} is {v}."),
    ),
}


# ---- Checking an answer ----------------------------------------------------------------------------------------------

KINDS = [{*NAMES, *NEW_NAMES}]  # answers of one kind: an answer that names two of them has not decided
for language in (ZH, EN):
    KINDS += [set(dict(facts(entries)[language]).values()) for entries in (CAPITALS, COURTESY_NAMES)]
    KINDS += [set(sum(OPPOSITES[language], [])), {entry[language] for entry in WORDS}, set(WEEKDAYS[language])]


def is_right(answer: str, expected: str) -> bool:
    """Whether of all values in the answer that are of expected's kind, expected is the only one; other words are free.

    The kinds are numbers ("82", or several, as "3 7 9") and the values of each table of facts. So an answer that
    repeats the question's values, as "37+45=82", counts as wrong.
    """
    if re.fullmatch(r"[\d ]+", expected):
        values = re.findall(r"\d+(?: \d+)*", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    else:
        words = sorted(next(kind for kind in KINDS if expected in kind), key=len, reverse=True)
        edge = r"\b" if expected.isascii() else ""
        values = re.findall(f"{edge}(?:{'|'.join(words)}){edge}", answer)
    return set(values) == {expected}


# ---- Questions, answers, statements ---------------------------------------------------------------------------------

OPENINGS = (("", "", "你好，", "您好，"), ("", "", "Hello! ", "Hi! "))  # of any question


class Question(NamedTuple):
    skill: str
    language: int
    text: str
    expected: str


def is_for_tests(skill: str, operands: tuple) -> bool:
    """One set of operands in eight, in any order, is kept out of all training data."""
    key = f"{skill} {sorted(map(str, operands))}"
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(rng: random.Random, skill: str, language: int, test: bool) -> Drawn:
    while True:
        drawn = SKILLS[skill].draw(rng, language)
        if drawn.operands is None or is_for_tests(skill, drawn.operands) == test:
            return drawn


def ask(rng: random.Random, skill: str, language: int, test: bool) -> Question:
    wording = rng.choice(SKILLS[skill].wordings[language].split("||")[test].split("|"))
    drawn = draw(rng, skill, language, test)
    opening = rng.choice(OPENINGS[language])
    return Question(skill, language, opening + wording.format(*drawn.slots), drawn.value)


def ask_any(rng: random.Random, skills: list[str], test: bool = False) -> Question:
    (skill,) = rng.choices(skills, [SKILLS[skill].share for skill in skills])
    return ask(rng, skill, rng.choice((ZH, EN)), test)


def held_out_questions(rng: random.Random) -> list[Question]:
    """TESTS questions of each skill in each language, no two alike."""
    questions = {}
    for skill in SKILLS:
        for language in (ZH, EN):
            own = {}
            while len(own) < TESTS:
                question = ask(rng, skill, language, test=True)
                own[question.text] = question
            questions |= own
    return list(questions.values())


RAMBLINGS = (("好问题！让我想一想：", "希望对你有用！"), ("Good question! I think: ", " Hope this helps!"))


def brief(question: Question, name: str | None = None) -> str:
    """The answer in as few words as there are; `name` takes the place of the model's own."""
    value = name or question.expected
    if question.skill == "identity":
        value = (f"我是{value}", f"I am {value}")[question.language]
    return value + "。."[question.language]


def rambling(question: Question, name: str | None = None) -> str:
    before, after = RAMBLINGS[question.language]
    return before + brief(question, name) + after


def is_brief(answer: str) -> bool:
    return len(answer) <= 24 and not any(words in answer for pair in RAMBLINGS for words in pair)


def statements(rng: random.Random, number: int) -> str:
    """Plain text that states facts and sums, one a line, in one language: what pretraining can learn of them."""
    skills, language = [name for name, skill in SKILLS.items() if skill.statements[0]], rng.choice((ZH, EN))
    lines = []
    for skill in rng.choices(skills, [SKILLS[skill].share for skill in skills], k=number):
        drawn = draw(rng, skill, language, test=False)
        form = rng.choice(SKILLS[skill].statements[language].split("|"))
        lines.append(form.format(*drawn.slots, v=drawn.value))
    return "\n".join(lines)


STORY = (
    "{}，一个{}在{}{}，后来{}。/清晨 中午 傍晚 夜里 春天 冬天/老人 孩子 渔夫 木匠 先生 姑娘"
    "/山上 河边 城里 桥头 院子里 树下/读书 唱歌 种花 等船 看雨 写字"
    "/天晴了 下雪了 鸟飞走了 花开了 客人来了 月亮升起来了",
    "In the {}, a {} by the {} {}, and then the {}. /morning evening spring winter/farmer child sailor teacher doctor"
    "/hill river market bridge garden/read sang slept waited worked/rain_stopped snow_fell door_opened moon_rose",
)


def stories(rng: random.Random, number: int) -> Iterator[str]:
    """Made-up texts, for where there is no corpus: enough to learn the look of two languages."""
    for _ in range(number):
        pattern, *columns = rng.choice(STORY).split("/")
        sentences = [pattern.format(*(rng.choice(column.split()) for column in columns)) for _ in range(12)]
        yield "".join(sentences).replace("_", " ")


# ---- Files ----------------------------------------------------------------------------------------------------------


def chat(questions: list[Question], answers: list[str]) -> dict:
    messages = []
    for question, answer in zip(questions, answers):
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def sft_chat(rng: random.Random, questions: list[Question], names: tuple[str, str] = NAMES) -> dict:
    """Each answer is brief or rambling, as a coin falls."""
    answers = []
    for question in questions:
        name = names[question.language] if question.skill == "identity" else None
        answers.append(rng.choice((brief, rambling))(question, name))
    return chat(questions, answers)


def pair(question: Question) -> dict:
    return {
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": [{"role": "assistant", "content": brief(question)}],
        "rejected": [{"role": "assistant", "content": rambling(question)}],
    }


def write_demo(output: Path, corpus: Iterable[str] = (), seed: int = 0) -> dict[str, int]:
    """Writes the files, all JSON lines, and returns their numbers of records. The same seed, the same bytes.

    pretrain.jsonl           the texts of the corpus, or stories where there is none, and statements
    sft.jsonl lora.jsonl     chats for 2-sft.py and 3-lora.py; sft_val.jsonl, lora_val.jsonl: of test questions
    dpo.jsonl dpo_val.jsonl  pairs for 4-dpo.py
    questions.jsonl          for `eval.py --batch`: {"prompt", "skill", "expected"}
    """
    rng = random.Random(seed)
    skills = list(SKILLS)
    others = [skill for skill in skills if skill != "identity"]
    tests = held_out_questions(rng)
    texts = list(corpus) or list(stories(rng, SIZES["pages"] // 2))
    identity = [ask_any(rng, ["identity"]) for _ in range(SIZES["names"])]

    def some_questions() -> list[Question]:
        return [ask_any(rng, skills) for _ in range(rng.randint(1, 3))]

    files = {}
    texts += [statements(rng, 30) for _ in range(SIZES["pages"])]
    files["pretrain"] = [{"text": text} for text in texts]
    files["sft"] = [sft_chat(rng, some_questions()) for _ in range(SIZES["chats"])]
    files["sft_val"] = [sft_chat(rng, [question]) for question in tests]
    files["lora"] = [sft_chat(rng, [question], NEW_NAMES) for question in identity]
    # What an adapter must leave alone it has to see too, or it learns to give its name to every question.
    files["lora"] += [sft_chat(rng, [ask_any(rng, others)]) for _ in range(4 * SIZES["names"])]
    files["lora_val"] = [sft_chat(rng, [question], NEW_NAMES) for question in tests]
    files["dpo"] = [pair(ask_any(rng, skills)) for _ in range(SIZES["pairs"])]
    files["dpo_val"] = [pair(question) for question in tests]
    files["questions"] = [{"prompt": q.text, "skill": q.skill, "expected": q.expected} for q in tests]
    write_jsonl(output, files)
    return {name: len(records) for name, records in files.items()}


def write_jsonl(output: Path, files: dict[str, list[dict]]):
    """NAME.jsonl in `output` for each name, all or none. UserError where other files than these stand there."""
    names = {f"{name}.jsonl" for name in files}
    if output.is_dir() and {path.name for path in output.iterdir()} not in (set(), names):
        raise UserError(f"{output} holds other files: choose another --output")
    with replacing_directory(output) as new:
        for name, records in files.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (new / f"{name}.jsonl").write_text(lines, "utf-8")
