"""Readings of answers to yes/no questions: yes, no, or unclear.

An answer is unclear if it says neither, says both, hedges, or refuses. The question is not read: "There is a dog" is a
yes to any question. Thinking and markup are removed first. The first sentence to which a rule applies decides:

    1. unclear: "Yes and no", "Yes. No.", "No, actually yes"
    2. the word: "No, I cannot see one", "I'd say yes", "So the answer is no"
    3. yes:      "There is a dog not far from a tree", "It is", "Without a doubt"
    4. unclear:  "I am not sure", "I cannot answer that", "There may be one"
    5. no:       "There isn't one", "I see no dog", "A dog is not visible"
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Reading = Literal["yes", "no", "unclear"]
Replacements = tuple[tuple[str, str], ...]


def _any(phrases: Iterable[str]) -> str:
    return f"(?:{'|'.join(phrases)})"


# ---------------------------------------------------------- marks and spelling

_TAG = "(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection)"
_END_OF_THOUGHT = re.compile(rf"</{_TAG}>|◁/think▷|\[/think\]", re.IGNORECASE)
_UNFINISHED_THOUGHT = re.compile(rf"(?:<{_TAG}>|◁think▷|\[think\]).*", re.DOTALL | re.IGNORECASE)
_BEGUN_THOUGHT = re.compile(rf"(?:<{_TAG}>|◁think▷|\[think\])\s*$", re.IGNORECASE)
_ENCLOSED = re.compile(r"<answer>(.*?)(?:</answer>|$)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)", re.DOTALL)

_CONTRACTIONS: Replacements = (
    ("[\u2018\u2019\u02bc\u00b4`]", "'"),
    (r"\bcan(?:'?t|not)\b", "can not"),
    (r"\bwon'?t\b", "will not"),
    (r"\bain'?t\b", "is not"),
    (r"\b(is|are|was|were|do|does|did|could|would|should|has|have|had)n'?t\b", r"\1 not"),
    (r"\bi'?m\b", "i am"),
    (r"\b(there|it|that|this|he|she|here|what)'s\b", r"\1 is"),
    (r"\b(i|you|we|they)'d\b", r"\1 would"),
    (r"\b(they|we|you)'re\b", r"\1 are"),
    (r"\b(i|you|we|they)'ve\b", r"\1 have"),
)
_MARKUP: Replacements = (
    (r"\\(?:boxed|text\w*|math\w*)\s*\{([^{}]*)\}", r" \1 "),
    (r"<[^<>]*>", " "),
    (r"[*_~`\"“”„«»\[\](){}$\\#>]+|(?<!\w)'|'(?!\w)", " "),
    # Markers of lists, and the choices repeated
    (r"(?m)^[^\S\n]*(?:[-+•–—]|(?:option\s+)?(?:\d{1,2}|[a-h]|i{1,3})\s*[.:)])\s*", ""),  # noqa: RUF001
    (r"(?m)^[^\S\n]*(?:option\s+)?(?:\d|[a-h])\s+(?=(?:yes|no)\b)", ""),
    (r"\b(?:yes\s*(?:/|\||or)\s*no|no\s*(?:/|\||or)\s*yes)\b", " "),
)
_IDIOMS: Replacements = (
    (r"\b(?:without|beyond|no)(?: a| any)?(?: shadow of a)? (?:doubt|question)\b", "definitely"),
    (r"\b(?:there is )?definitely(?: about (?:it|that)| that\b|$)(?: that\b)?", "definitely, "),
    (r"\bnot (?:only|just|merely|far|too|very|to mention|long)\b|\bif not\b", " "),
    (r"\bno (?:problem|exceptions?|wonder)\b", " "),
    (r"\bnothing but\b|\b(?:none other|no (?:less|fewer)) than\b", "only"),
)
_LABELS = ("answer", "response", "assistant", "conclusion", "verdict", "output", "result", "prediction")
_LABEL = re.compile(rf"\b{_any(_LABELS)}\s*[:=]|\bfinal answer is\b")

# ---------------------------------------------------------- hedges, refusals

_PICTURE = r"(?:image|picture|photo|photograph|scene|frame)"
_THE_PICTURE = rf"(?:(?:the|this|that|any|an|your) )*(?:\w+ed )?(?:{_PICTURE}|attachment|visual)s?(?! of\b| with\b)"
_UNKNOWN = (  # after "not"
    *("sure", "certain", "confident", "comfortable", "clear", "known", "obvious", "possible", "able", "enough"),
    *("sufficient(?:ly)?", "applicable", "available", "provided", "specified", "given", "stated", "evident"),
    *("conclusive", "visible to me", "allowed", "permitted"),
)
_KNOW = (  # after "cannot", and after "hard to"
    *("know", "tell", "say", "determine", "decide", "confirm", "verify", "answer", "judge", "assess", "ascertain"),
    *("conclude", "guess", "infer", "speculate", "comment", "make (?:a|that|any)", "do that", "recall"),
    "be (?:sure|certain|determined|answered|confirmed|verified|inferred|said|known)",
    *("help", "assist", "comply", "discuss", "respond", "provide", "give", "process", "interpret", "analy[sz]e"),
    "engage",
    *("identify (?:people|who|individuals)", "(?:identify|see|discern|make out) (?:if|whether|what|which)"),
    "see (?:clearly|well|properly)",
    rf"(?:see|view|access|open|load|display|receive|look at|find) {_THE_PICTURE}",
)
_NOT = r"(?:can|could|do|will|would|did|does|may|must|should) (?:rather )?not (?:\w+ly |even |be able to |really )*"
_MISSING = (  # after "no"
    *("comment", "idea", "clue", "answer", "information", _PICTURE, "attachment", "context", "opinion", "reliable"),
    *("certain", "definite", "definitive", "clear (?:way|answer|indication|evidence)", "(?:way|means) (?:to|of)"),
)
_HEDGES = (
    rf"not (?:\w+ly )?(?:100 ?% |quite |too |so |at all )?{_any(_UNKNOWN)}",
    rf"{_NOT}{_any(_KNOW)}",
    r"rather not (?:say|answer)",
    rf"{_any(('unable', 'impossible', 'hard', 'difficult', 'tough', 'tricky', 'challenging', 'refuse', 'decline'))}\b"
    rf"[^.]{{0,30}}? to (?:\w+ly )?{_any((*_KNOW, 'see', 'identify', 'make', 'discern'))}",
    r"(?:hard|difficult|impossible|tough|tricky) to \w+$|must decline|refuse$|i can not$",
    r"(?:not )?have (?:the |any |an? )?(?:\w+ )?(?:access|ability|capability|information|context|idea|clue|way)",
    r"unclear|uncertain|unsure|unknown|ambiguous|undetermined|undecided|inconclusive|indeterminate|insufficient|n/a",
    r"too (?:blurry|dark|small|far|poor|unclear) to|not enough|seems? to be something",
    r"maybe|perhaps|possibly|probably|presumably|potentially|likely|unlikely|might|conceivably|supposedly",
    r"may|could(?: \w+ly| also)? (?:be|have|contain|show)|it is possible|it depends|depends on",
    r"(?:a|some|any|the)(?: \w+)? (?:chance|possibility|uncertainty)|i (?:would )?(?:guess|suppose)",
    r"as an ai|i am an ai|(?:language|text-based) model",
    rf"no {_any(_MISSING)}",
    r"without (?:\w+ )?(?:(?:the|an?|any|more|further|additional) )+(?:\w+ )?"
    r"(?:image|picture|context|information|details?)",
    r"(?:provide|upload|share|attach|send|show me)\b[^.]{0,25}\b(?:image|picture|photo)",
)
_HEDGE = re.compile(rf"\b{_any(_HEDGES)}\b")

# ---------------------------------------------------------- the words yes and no, assent

_YES, _NO = "(?:yes|yeah|yep|yup|yea|aye)", "(?:no|nope|nah)"
_CLAUSE_END = re.compile(
    r"[,:—–/|]|\s-+\s|\b(?:and|but|or|so|then|wait|actually|rather|because|since|as|however)\b"  # noqa: RUF001
)
_SURELY = "(?:definitely|absolutely|undoubtedly|indeed|correct|true|exactly|affirmative)"
_ASSENT = re.compile(
    rf"{_SURELY}(?:$|,)|(?:sure|certainly|of course|right|positive|agreed|y|sure thing|i agree)$"
    r"|(?:that|this|it) is (?:\w+ly )?(?:correct|right|true|accurate)\b|i (?:do )?(?:think|believe) so\b"
)
_DISSENT = re.compile(
    r"(?:false|incorrect|wrong|negative|n|i (?:disagree|doubt (?:it|that)))$|by no means"
    r"|(?:that|this|it) is (?:\w+ly )?(?:incorrect|wrong|false|untrue|inaccurate)\b"
)

# ---------------------------------------------------------- statements and negations

_OPENING = (
    rf"well|oh|ok|okay|sure|so|thus|therefore|hence|then|honestly|unfortunately|clearly|certainly|of course|{_SURELY}",
    "sorry|i am sorry|i am afraid|apologies",
    rf"(?:in|from|within|based on|looking at|according to|judging (?:from|by)|given) (?:the|this) (?:\w+ )?{_PICTURE}"
    r"(?: \w+ed)?",
    r"as far as i can (?:see|tell)|(?:while|although|though|if|since|because|as)\b[^,]*",
)
_REPORTING = (
    r"(?:i|we|you) (?:can |could )?(?:\w+ly )?(?:see|notice|observe|think|believe|would say|say) (?:that )?"
    r"(?=(?:there|it|the)\b)",
    r"it (?:\w+ly )?(?:appears|seems|looks like|looks as if)(?: that)? (?=(?:there|it|the)\b)",
    r"it is (?:clear|evident|obvious|true|definite)(?: that)? ",
)
_LEAD_IN = re.compile(rf"(?:{_any(_OPENING)}\s*,?\s+(?:but )?|{_any(_REPORTING)})+")
_EXISTS = (
    r"(?:there (?:(?:is|are|was|were)(?: indeed| also| \w+ly)?|(?:appears?|seems?) to be|exists?)"
    r"|(?:i|we|you) (?:can |could |do )?(?:\w+ly )?(?:see|observe|notice|spot|find))"
)
_NEGATION = r"(?:no|not|none|nothing|neither|never|nobody|nowhere|zero)\b"
_SHOWS = rf"(?:the|this) {_PICTURE} (?:\w+ly )?(?:shows?|contains?|has|features?|depicts?|includes?)"
_STATES = re.compile(
    rf"{_EXISTS} \S|(?:it|they|he|she|this|that|there|these|those|i|we|you) (?:\w+ly )?"
    r"(?:is|are|does|do|was|were|has|have|did|can)(?: indeed| so| one| too)?$"
)
_DENIES_FIRST = re.compile(rf"(?:{_EXISTS}|{_SHOWS}) {_NEGATION}")
_DENIES_ANOTHER = re.compile(rf"(?:,|\bbut|\band|\bwhile)\s+(?:{_EXISTS} |i do )?(?:no|not an?|not any|none|not see)\b")
_ASIDE = re.compile(
    r"(?<!^)\b(?:(?<!is )(?<!are )without|with no|which|who|whose|while|although|though|because|where|when"
    r"|that (?:is|are|has|have|does|do))\b.*"
)
_DENIES = re.compile(rf"\b(?:{_NEGATION}|(?:is|are) (?:absent|missing|without)\b|lack(?:s|ing)?\b|devoid of)")

# ---------------------------------------------------------- other languages: the first of these decides

_ELSEWHERE = re.compile(
    r"(?P<unclear>不知道|不清楚|看不清|不确定|不確定|不太确定|无法|無法|难以|難以|不好说|可能|也许|或许|抱歉|对不起"
    r"|分かりません|分からない|わかりません|わからない|かもしれ|不明|判断できま|모르|확실하지|알 수 없"
    r"|не знаю|не уверен|не могу|трудно сказать|возможно|может быть"
    r"|لا أعرف|لا أدري|لا أستطيع|لست متأكد|ربما|पता नहीं|नहीं पता|शायद|नहीं बता"
    r"|\b(?:no (?:lo |la )?s[eé]|no puedo|non (?:lo )?so|não sei|ne sais pas|weiß (?:es |ich )*nicht)\b"
    r"|\bno estoy segur|\b(?:peut-être|vielleicht|quizás?|tal vez|talvez|forse)\b)"
    r"|(?P<no>不是|没有|沒有|并没|^(?:不(?!错)|没(?!错)|沒|否|无|無)"
    r"|いいえ|いません|ありません|いない|ない(?=です|$|。)|아니|없"
    r"|\bнет\b|\bне\b"  # noqa: RUF001
    r"|^لا\b|لا يوجد|नहीं|^(?:nein|non|não|nao|nie)\b)"
    r"|(?P<yes>没错|不错|(?:^|[,。])(?:是(?!否)|对|對|嗯|有)|[中里裡上]有|有一"
    r"|(?:^|[,。])はい|あります|います|(?:^|\s)(?:네|예)(?![가-힣])|있습니다|있어요|있다"
    r"|\bда\b"  # noqa: RUF001
    r"|نعم|हाँ|हां|^(?:sí|si|sì|oui|ja|sim|tak)\b)"
)


def final_answer(text: str) -> str:
    """Return a text without its thinking, and the content of its last answer tag; empty if it only thinks."""
    ends = [match.end() for match in _END_OF_THOUGHT.finditer(text)]
    text = _UNFINISHED_THOUGHT.sub("", text[ends[-1] :] if ends else text)
    enclosed = [one or other for one, other in _ENCLOSED.findall(text)]
    return (enclosed[-1] if enclosed else text).strip()


def begun_thought(prompt: str) -> str:
    """Return the tag of the thought that a prompt begins for the model; empty if it begins none."""
    begun = _BEGUN_THOUGHT.search(prompt)
    return begun.group().strip() if begun else ""


def parse_strict(answer: str) -> bool | None:
    """Parse yes or no as a person would who does not see the question; return None for an unclear answer."""
    text = _plain(answer)
    if (word := _ELSEWHERE.search(text)) is not None:
        return None if word["unclear"] else word["yes"] is not None
    # Questions are repeated, not answered
    sentences = [_spaced(part) for part in re.findall(r"[^.!?;\n]+[.!?;\n]*", text) if "?" not in part]
    sentences = [sentence for sentence in sentences if re.search("[a-z]", sentence)]
    if any(re.fullmatch(_YES, one) for one in sentences) and any(re.fullmatch(_NO, one) for one in sentences):
        return None
    readings = (_read_sentence(sentence, is_first=index == 0) for index, sentence in enumerate(sentences))
    reading = next((reading for reading in readings if reading is not None), "unclear")
    return None if reading == "unclear" else reading == "yes"


def _plain(answer: str) -> str:
    """Return an answer in lower case without thinking, markup, contractions, idioms and the text before a label."""
    text = unicodedata.normalize("NFKC", final_answer(answer)).lower()
    for pattern, replacement in (*_CONTRACTIONS, *_MARKUP, *_IDIOMS):
        text = re.sub(pattern, replacement, text)
    labelled = [part for part in _LABEL.split(text)[1:] if part.strip(" .\n")]
    return (labelled[-1] if labelled else text).strip()


def _spaced(sentence: str) -> str:
    """Return a sentence with single spaces, without its end mark."""
    return " ".join(sentence.rstrip(".!?;\n ").split()).strip(" ,:")


def _read_sentence(sentence: str, *, is_first: bool) -> Reading | None:
    """Return the reading of a sentence, or None if no rule applies."""
    # Words before a hedge count, those after it do not
    hedge = _HEDGE.search(sentence)
    certain = sentence[: hedge.start()] if hedge else sentence
    word = _read_words(certain, is_first=is_first)
    if word is not None:
        return word
    # Openings such as "it is clear that" decide nothing
    lead_in = _LEAD_IN.match(certain)
    body = certain[lead_in.end() :] if lead_in else certain
    denies = _DENIES_FIRST.match(body)
    # A statement is a yes, unless it goes on to deny; before a hedge it needs more than three words
    if not denies and _STATES.match(body.strip()) and (hedge is None or len(body.split()) > 3):
        return "unclear" if _DENIES_ANOTHER.search(body) else "yes"
    if hedge is not None:
        return "unclear"
    # Assent and denial without the words yes and no
    if _ASSENT.match(sentence):
        return "yes"
    return "no" if denies or _DISSENT.match(sentence) or _DENIES.search(_ASIDE.sub("", body)) else None


def _read_words(sentence: str, *, is_first: bool) -> Reading | None:
    """Return the reading of the words yes and no, where they are answers; "no dog" is one at the very beginning."""
    readings = set[Reading]()
    for index, clause in enumerate(map(str.strip, _CLAUSE_END.split(sentence))):
        if re.search(rf"\b{_YES}\b", clause):
            readings.add("yes")
        if re.search(rf"(?:^|\s){_NO}$", clause) or (is_first and index == 0 and re.match(rf"{_NO}\b", clause)):
            readings.add("no")
    return "unclear" if len(readings) == 2 else next(iter(readings), None)
