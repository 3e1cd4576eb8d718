"""The proof that a GGUF splits text into the same tokens as its checkpoint, used by `convert` and `verify`.

Texts that are hard for tokenizers and a sample of the vocabulary's own pieces go through llama.cpp and through the
checkpoint's tokenizer; the ids must be equal. If llama.cpp is known to lack something (`known_gaps`), texts that need it
may differ, and the difference is reported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from yarn_edge.checkpoint.sentencepiece_model import SentencePieceReference
from yarn_edge.checkpoint.tekken import TEKKEN, byte_alphabet
from yarn_edge.checkpoint.tokenizer import SPACE, Reference, TokenizersReference, steps
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import is_named
from yarn_edge.runtime.model import Model

Encode = Callable[[str, bool], list[int]]
SAMPLE = 2000  # pieces of the vocabulary that become texts

STRESS_TEXTS: tuple[str, ...] = (
    "Hello, world! The quick brown fox jumps over the lazy dog.", "a", " a", "  a", "a ", "a  ", "", " ", "  ",
    "    ", "\n", "\n\n", "\n \n", "\t", "\t\t\n", " \n", "\n ", "\r\n", "\r\n\r\n", "a\r\nb\rc\n\n\nd",
    "x\n\n\n\n\n\n\n\ny", "tabs\tand\t\tmore", " leading", "trailing   ", "in   between    words",
    "line end  \nnext", "end.\n\n  Indented", "no\u00a0break", "\u00a0\u00a0x",
    "thin\u2009em\u2003ideographic\u3000space", "a\u2028b\u2029c", "\x0bvt\x0cff", "a\x85b",
    "zero\u200bwidth\u200djoiner\ufeffbom", "soft\u00adhyphen", " \t \n \t x", "\n\t\tif x:\n\t\t\treturn  y\n",
    " \u3000 ", "0", "7", "42", "123", "1234", "12345", "1234567890", "00000000000000000", "3.14159",
    "1,000,000", "2024-01-31", "1e-10", "v1.2.3", "0x1F4A9", "123abc456", "abc123", "x1y22z333", "10%", "$5.00",
    "½ ¾ ² ³ ① Ⅷ", "٠١٢٣٤٥٦٧٨٩", "०१२३", "１２３４", "I'm you're he's we've they'll I'd can't",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D CAN'T", "It'S 'tis rock'n'roll", "I’m you’re don’t",
    "'quoted' \"double\" `tick` ''", "o'clock's 'Ve 'LL 'rE'", "x's's 'd'", "'", "''s", "l'été qu'il",
    "https://example.com/a/b?c=d&e=f#g", "user.name+tag@mail.example.org", "C:\\Users\\me\\file.txt",
    "/usr/bin/env", "!!!", "...", "?!?!", "--", "———", "…", "***bold***", "## Heading", "- item\n- item",
    "(a)[b]{c}<d>", "a,b;c:d", "@#$%^&*", "=====", "+-*/=", "<=>", "~~~", "|a|b|", "a/b/c//", "foo_bar__baz",
    "_x_", "\\n\\t", "# comment\n// c\n/* d */", "¿Qué? ¡Ay!",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # note\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2.5f; }\n}\n", '{"key": [1, 2.0, null, true], "k": "v\\n"}',
    "<p class=\"x\">&nbsp;</p>", "SELECT * FROM t WHERE a >= 10 AND b != 'x';", "$x^2 + \\frac{1}{2}$",
    "camelCase PascalCase snake_case SCREAMING_CASE XMLHttpRequest",
    "HTTPServer iPhone eBay McDonald USA's ABCdef abcDEF aB Ab", "ALLCAPS lower Title", "aAbBcC", "A1b2C3",
    "e=mc²", "Grüße aus Köln, schöne Straße", "café naïve façade œuvre", "Ærøskøbing Ångström", "señor niño",
    "İstanbul ığdır", "ÜBER GRÖSSE", "Привет, мир! Как дела?", "ПРИВЕТ МИР", "ПриветМир", "Київ їжак ґанок",
    "Καλημέρα κόσμε", "ΑΘΗΝΑ ΑθήναΚόσμος", "Շնորհակալություն", "გამარჯობა", "שלום עולם", "שָׁלוֹם",
    "مرحبا بالعالم، كيف حالك؟", "السَّلَامُ عَلَيْكُم", "فارسی می‌نویسم", "اردو زبان", "नमस्ते दुनिया",
    "हिन्दी में लिखा हुआ वाक्य।", "বাংলা ভাষা", "தமிழ் மொழி", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "ਪੰਜਾਬੀ", "ગુજરાતી",
    "සිංහල", "สวัสดีชาวโลก ภาษาไทย", "ສະບາຍດີ", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "བོད་སྐད་", "አማርኛ ቋንቋ", "ᏣᎳᎩ",
    "ᠮᠣᠩᠭᠣᠯ", "你好,世界!今天天气很好。", "中文English混排123测试", "《红楼梦》、“引号”——省略……",
    "繁體中文測試", "㐀㐁 𠀀𠀁", "日本語のテキスト", "カタカナとひらがな", "ｶﾀｶﾅ ﾊﾝｶｸ", "ＦＵＬＬ　ＷＩＤＴＨ",
    "東京タワー2024年", "안녕하세요 세계", "한국어와English", "ㄱㄴㄷ", "Tiếng Việt có dấu", "TIẾNG VIỆT", "😀",
    "😀😃 😄", "👍🏽 👩🏿‍🚀", "👨‍👩‍👧‍👦", "🇩🇪🇫🇷🇯🇵", "❤️ ☀️ ✈", "1️⃣ #️⃣", "text😀text", "🏳️‍🌈🏴‍☠️",
    "→ ⇒ ∀x∈ℝ ∑ ∞ ≤ ≠ √2", "€ £ ¥ ₹ ₿", "e\u0301 a\u0308 n\u0303", "cafe\u0301s", "o\u0302\u0323",
    "Z\u0351\u036b\u0343a\u0334l\u0321g\u034do", "\u1100\u1161\u11a8", "Å vs A\u030a vs \u212b", "ﬁ ﬂ ﬀ",
    "ǅ ǈ ʰ ˈ", "ß ẞ ſ 'ſ", "™ © ® ° § ¶ •", "«guillemets» „deutsch“ ‚x‘", "𝓗𝓮𝓵𝓵𝓸 𝐁𝐨𝐥𝐝", "𐍈 𓀀 𒀀", "\ue000",
    "\ufffd", "\x01\x02\x1b[0m\x7f", "▁ ▁▁ a▁b", "Ġ Ċ ĠĠ", "[PAD1] <0x41> <unk>",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaa", "a b c d e f g h i j",
    "xxxxxxxx  xxxx   xx x", "Ünïcödé\nmixed\twith ASCII and 中文 and العربية 123 !!!\n",
)  # fmt: skip


@dataclass(frozen=True)
class Mismatch:
    """The first text that is split differently: its ids from the first difference on, and the text, shortened."""

    text: str
    add_special: bool
    position: int
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        special = " with special tokens" if self.add_special else ""
        return (
            f"{self.text!r}{special}: from token {self.position} on the checkpoint has {self.expected}, "
            f"llama.cpp has {self.found}"
        )


@dataclass(frozen=True)
class Gap:
    """Something that the checkpoint does and llama.cpp does not. concerns: whether a text needs it.

    remedy: the text for which llama.cpp would return the checkpoint's ids; if there is one, that is checked.
    """

    note: str
    concerns: Callable[[str], bool]
    remedy: Callable[[str], str] | None = None


@dataclass(frozen=True)
class TokenComparison:
    """The outcome of `compare_tokens`.

    n_different: comparisons that differ; mismatch: the first of them. n_explained: those that differ as a known gap predicts,
    which do not count as different; notes: these gaps.
    """

    n_texts: int
    n_tokens: int
    n_different: int
    mismatch: Mismatch | None
    n_explained: int
    notes: tuple[str, ...]


def reference_encoder(checkpoint: Path) -> TokenizersReference | SentencePieceReference:
    """The checkpoint's own tokenizer, (text, add_special) -> ids: tokenizer.json, else tekken.json, else tokenizer.model.

    Raises YarnEdgeError if there is neither, or if it is not a BPE.
    """
    if is_named(checkpoint / "tokenizer.json") or is_named(checkpoint / TEKKEN):
        return TokenizersReference(checkpoint)
    if is_named(checkpoint / "tokenizer.model"):
        return SentencePieceReference(checkpoint)
    raise YarnEdgeError(
        f"{checkpoint}: has no tokenizer.json and no tokenizer.model; make one with "
        "transformers.AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )


def stress_texts(tokens: Sequence[str], markup: Iterable[str] = ()) -> list[str]:
    """STRESS_TEXTS, an even sample of the vocabulary's own pieces as text, and special tokens (`markup`) inside text.

    tokens: the vocabulary in GGUF's form, byte-level (Ġ is a space) or SentencePiece (▁ is a space).
    """
    texts = [*STRESS_TEXTS]
    byte_of = None if "<0x00>" in tokens else byte_alphabet()
    step = max(1, len(tokens) // SAMPLE)
    sample = [*tokens[::step], *sorted(tokens[step // 2 :: step], key=len, reverse=True)[: SAMPLE // 10]]
    pieces = [text for token in sample if (text := _piece_text(token, byte_of))]
    texts += pieces
    texts += ["".join(pieces[i : i + 5]) for i in range(0, min(len(pieces), 500), 5)]
    texts += [" ".join(pieces[i : i + 5]) for i in range(2, min(len(pieces), 500), 5)]
    chosen = list(dict.fromkeys(markup))
    for token in chosen[:20] + chosen[20 :: max(1, len(chosen) // 20)]:
        texts += [token, f"Hello{token}", f"{token}Hello", f"Hello{token}world", f"Hello {token} world"]
        texts += [f"a\n{token}\nb{token}{token}"]
    return list(dict.fromkeys(texts))


def known_gaps(reference: Reference, pre: str) -> tuple[Gap, ...]:
    """What llama.cpp with `tokenizer.ggml.pre` = `pre` does not do and this checkpoint does."""
    gaps = []
    texts = [m.content for m in reference.markup.values() if m.content]
    stripping = [m.content for m in reference.markup.values() if m.content and m.strips]
    if any(step.get("type") == "NFC" for step in steps(reference.settings.get("normalizer"))):
        note = "the checkpoint normalizes text to NFC, llama.cpp does not: text that is not NFC tokenizes differently"
        nfc = partial(unicodedata.normalize, "NFC")
        gaps.append(Gap(note, lambda text: nfc(text) != text, nfc))
    if reference.prepends_space_once:
        note = (
            "llama.cpp puts a space before text that follows a special token, the checkpoint only before the first text"
        )
        gaps.append(Gap(note, lambda text: any(0 <= text.find(t) < len(text) - len(t) for t in texts)))
    if reference.spares_second_space:
        note = "llama.cpp puts a space before text that begins with one, the checkpoint does not"
        blank = (" ", SPACE)
        gaps.append(Gap(note, lambda text: text.startswith(blank) and bool(text.strip(" ")), lambda text: text[1:]))
        gaps.append(Gap(note, lambda text: not text.strip(" ") or any(t + b in text for t in texts for b in blank)))
    if stripping:
        shown = one_line(", ".join(stripping[:3]), 60) + (" and others" if len(stripping) > 3 else "")
        note = f"the checkpoint takes white space and word ends around {shown} into account, llama.cpp does not"
        gaps.append(Gap(note, lambda text: any(t in text and t != text for t in stripping)))
    if pre in _MARK_BLIND:
        note = f"llama.cpp's {pre} pre-tokenizer splits words at combining marks: these words tokenize differently"
        gaps.append(Gap(note, _has_marks))
    if pre in _CASE_BLIND:
        note = f"llama.cpp's {pre} pre-tokenizer splits words at combining marks and at some capitals outside ASCII"
        gaps.append(Gap(f"{note}: these words tokenize differently", _has_marks_or_capitals))
    return tuple(gaps)


def compare_tokens(
    model: Model, encode: Encode, texts: Iterable[str], gaps: Sequence[Gap] = (), give_up: int | None = None
) -> TokenComparison:
    """Compare llama.cpp's ids with those of `encode` for every text, with and without special tokens.

    give_up: stop after more than this many differing comparisons.
    """
    n_texts = n_tokens = n_different = n_explained = 0
    first: Mismatch | None = None
    notes: dict[str, None] = {}
    for text in texts:
        if give_up is not None and n_different > give_up:
            break
        n_texts += 1
        for add_special in (False, True):
            expected = encode(text, add_special)
            ids = model.tokenize(text, add_special=add_special, parse_special=True)
            n_tokens += len(expected)
            if expected == ids:
                continue
            explained = [gap for gap in gaps if gap.concerns(text)]
            for gap in explained:
                if gap.remedy is not None:
                    ids = model.tokenize(gap.remedy(text), add_special=add_special, parse_special=True)
            if explained and (ids == expected or any(gap.remedy is None for gap in explained)):
                n_explained += 1
                notes.update(dict.fromkeys(gap.note for gap in explained))
            else:
                n_different += 1
                first = first or _mismatch(text, add_special, expected, ids)
    return TokenComparison(n_texts, n_tokens, n_different, first, n_explained, tuple(notes))


def check_tokens(model: Model, reference: Reference, encode: Encode | None = None) -> TokenComparison:
    """The whole proof for a loaded GGUF: its tokens against those of its checkpoint.

    encode: the reference's ids, where they are remembered from another comparison.
    """
    tokens = model.gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise YarnEdgeError(f"{model.path}: tokenizer.ggml.tokens is missing; convert the checkpoint again")
    texts = stress_texts(tokens, (m.content for _, m in sorted(reference.markup.items())))
    pre = str(model.gguf.metadata.get("tokenizer.ggml.pre", ""))
    return compare_tokens(model, encode or reference, texts, known_gaps(reference, pre))


# For these pre-tokenizers llama.cpp replaces \p{Lu}, \p{Ll} and \p{M} by ASCII ranges and "any other letter".
_CASE_BLIND = {
    "tekken",
    "gpt-4o",
    "llama4",
    "kanana2",
    "talkie",
    "minimax-m2",
    "granite-embed-multi-97m",
    "tiny_aya",
    "cohere2moe",
    "youtu",
}

_MARK_BLIND = {"kimi-k2"}  # unicode.cpp: its splitter by hand asks whether a character is a letter, and a mark is none


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(c)[0] == "M" for c in text)


def _has_marks_or_capitals(text: str) -> bool:
    if _has_marks(text):
        return True
    kinds = [unicodedata.category(c) for c in text]
    neighbors = zip([" ", *text], text, [*text[1:], " "], strict=False)
    return any(
        c > "\x7f" and kind in ("Lu", "Lt") and (before.isalpha() or after.isupper())
        for (before, c, after), kind in zip(neighbors, kinds, strict=True)
    )


def _mismatch(text: str, add_special: bool, expected: list[int], found: list[int]) -> Mismatch:
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return Mismatch(text if len(text) <= 60 else text[:59] + "…", add_special, at, expected[at:][:6], found[at:][:6])


def _piece_text(token: str, byte_of: dict[str, int] | None) -> str:
    """The text of a piece; "" if it is not whole text, such as half a character."""
    if byte_of is None:
        return token.replace(SPACE, " ")
    try:
        return bytes(byte_of[c] for c in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return ""
