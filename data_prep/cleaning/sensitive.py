"""Private data in texts: addresses, numbers that name a person, keys, passwords. It is reported, not changed.

    text = "Mail jane@example.org from 8.8.4.4"
    find_sensitive(text)       →  [SensitiveSpan("e-mail address", 5, 21), SensitiveSpan("IP address", 27, 34)]
    masked(text, span)         →  "ja… (16 characters)"

Numbers with a checksum are checked: cards (Luhn), IBAN (ISO 7064, 97), Korean resident registration numbers. Those
given since 5 October 2020, to the newly born or in place of an older one, have no check digit: so 900101-1234567
counts by its date, and 13 digits in a row only with the check digit or a birth since then. An IP address counts if it
is public, a phone number if it has a country code or the groups of a Korean or North American number. Names and postal
addresses are not found, and an example's `user@example.org` is.

Keys with a form of their own are found by the detectors of detect-secrets (Yelp): AWS, GitHub, Slack, Stripe and
others. Only their patterns are used: the library's `scan_line` takes 1.5 ms a text, calls "from" and "list" secrets
for their entropy, and may ask Amazon or GitHub whether a key is valid. Left out are its detectors of entropy, for that
noise, those of Cloudant, IBM and SoftLayer (80 µs a text), OpenAI's (it knows one form; API_KEY knows more) and
KeywordDetector: it takes all up to the end of the line, as in `password_chars = string.ascii_letters + …`; ASSIGNED
uses its names.

A row takes 34 µs in Tatoeba and 170 in CodeAlpaca. In CodeAlpaca's 2,017 rows there are four e-mail addresses, one
phone number, twice, and one encrypted password, twice; in Tatoeba's 6,636 sentences, one phone number.
"""

import functools
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import regex

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Record

NO_CHECK_DIGITS_SINCE = date(2020, 10, 5)
PIECE, PIECE_OVERLAP = 4096, 256
"""Characters. Some detectors start anew at each "eyJ" and read to the end, so a long text is given to them in
pieces."""

SECRET_DETECTORS = (
    "ArtifactoryDetector AWSKeyDetector AzureStorageKeyDetector BasicAuthDetector DiscordBotTokenDetector"
    " GitHubTokenDetector GitLabTokenDetector JwtTokenDetector MailchimpDetector NpmDetector PrivateKeyDetector"
    " PypiTokenDetector SendGridDetector SlackDetector SquareOAuthDetector StripeDetector TelegramBotTokenDetector"
    " TwilioKeyDetector"
).split()
"""Classes in detect_secrets.plugins."""


@dataclass(frozen=True, order=True)
class SensitiveSpan:
    """`text[start:end]` may be sensitive."""

    kind: str
    start: int
    end: int


def find_sensitive(text: str) -> list[SensitiveSpan]:
    """In the order of the text. Of two that overlap, the one whose pattern is the surer stays."""
    found = [SensitiveSpan("secret (API key)", *match.span()) for match in API_KEY.finditer(text)]
    # The whole match of each detector's patterns; what detectors return is for some only a group, such as "ghp".
    secrets = set()
    for offset in range(0, max(1, len(text) - PIECE_OVERLAP), PIECE - PIECE_OVERLAP):
        piece = text[offset : offset + PIECE]
        for detector in secret_detectors():
            for match in (match for pattern in detector.denylist for match in pattern.finditer(piece)):
                if detector.secret_type != "JSON Web Token" or detector.is_formally_valid(match[0]):
                    start, end = match.span()
                    secrets.add(SensitiveSpan(f"secret ({detector.secret_type})", offset + start, offset + end))
    found += sorted(secrets, key=lambda span: (span.start, -span.end, span.kind))
    if "@" in text:
        found += [SensitiveSpan("e-mail address", *match.span()) for match in _EMAIL.finditer(text)]
    if _DIGITS.search(text):
        for kind, pattern, is_valid in NUMBERS:
            found += [SensitiveSpan(kind, *match.span()) for match in pattern.finditer(text) if is_valid(match[0])]
    if ":" in text or "=" in text:
        values = (match for match in _assigned().finditer(text) if _is_password(match["value"]))
        found += [SensitiveSpan("secret (assigned)", *match.span("value")) for match in values]
    taken, kept = bytearray(len(text)), []
    for span in found:
        if not any(taken[span.start : span.end]):
            taken[span.start : span.end] = b"\1" * (span.end - span.start)
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


def find_in_record(record: Record) -> list[tuple[str, SensitiveSpan]]:
    """`("output", SensitiveSpan(…))` for each span in a record's texts; the history's are "history 1" and so on."""
    texts = [("system", record.system), ("instruction", record.instruction), ("input", record.input)]
    texts += [("output", record.output), ("rejected", record.rejected)]
    earlier = [text for turn in record.history for text in turn]
    texts += [(f"history {number}", text) for number, text in enumerate(earlier, start=1)]
    return [(field, span) for field, text in texts if text for span in find_sensitive(text)]


def masked(text: str, span: SensitiveSpan) -> str:
    """`"ja… (16 characters)"`: never more than the first two characters, and none of a very short one."""
    length = span.end - span.start
    shown = text[span.start : span.start + 2] if length >= 8 else ""
    return f"{shown}… ({length} characters)"


@functools.cache
def secret_detectors() -> tuple:
    """Called before any row is read, too, so that a missing detect-secrets is reported at once (UserError)."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ModuleNotFoundError as error:
        raise UserError(
            "Looking for secrets needs detect-secrets, which is not installed: pip install 'diptych[clean]'."
        ) from error
    classes = {detector.__name__: detector for detector in get_mapping_from_secret_type_to_class().values()}
    return tuple(classes[name]() for name in SECRET_DETECTORS)


@functools.cache
def _assigned() -> regex.Pattern:
    from detect_secrets.plugins.keyword import DENYLIST  # an optional library

    return regex.compile(ASSIGNED.format(names="|".join((*DENYLIST, *MORE_NAMES))), regex.IGNORECASE)


def _is_password(value: str) -> bool:
    """A plain word is an example or a name ("securepassword"); `{secret2}` and `<KEY_1>` are placeholders."""
    from detect_secrets.filters.heuristic import is_templated_secret  # an optional library

    return bool(_LETTER.search(value) and _DIGIT_OR_SIGN.search(value)) and not is_templated_secret(value)


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdigit()]


def _is_card(text: str) -> bool:
    """Luhn's checksum."""
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    letters = text.replace(" ", "")
    if not 15 <= len(letters) <= 34:
        return False
    return int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])) % 97 == 1


def _is_resident_number(text: str) -> bool:
    """YYMMDD-SNNNNNC: a date of birth, S for century and sex, and the check digit C (weights 2…9, 2…5, modulo 11)."""
    digits = _digits(text)
    century = {1: 1900, 2: 1900, 3: 2000, 4: 2000, 5: 1900, 6: 1900, 7: 2000, 8: 2000, 9: 1800, 0: 1800}[digits[6]]
    year, month, day = (10 * digits[place] + digits[place + 1] for place in (0, 2, 4))
    try:
        birth = date(century + year, month, day)
    except ValueError:
        return False
    if birth > date.today():
        return False
    if birth >= NO_CHECK_DIGITS_SINCE or ("-" in text and century > 1800):
        return True
    weighted = sum(digit * weight for digit, weight in zip(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=False))
    foreign = 2 if digits[6] in (5, 6, 7, 8) else 0
    return ((11 - weighted % 11) % 10 + foreign) % 10 == digits[12]


def _is_public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_DIGITS = regex.compile(r"\d")
_EMAIL = regex.compile(r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_IBAN = regex.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_RESIDENT_NUMBER = regex.compile(r"(?<![\w-])[0-9]{6}(?: ?- ?)?[0-9]{7}(?![\w-])")
_CARD = regex.compile(
    r"(?<![\w.-])(?:[2-6][0-9]{12,18}"
    r"|[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?"  # 4-4-4-4, and 3 more
    r"|3[47][0-9]{2}([ -])[0-9]{6}\2[0-9]{5})(?![\w-]|\.[0-9])"  # American Express
)
_IPV4 = regex.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w.]*[\w])")
_IPV6 = regex.compile(r"(?<![\w:])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?![\w:])")  # 2000::/3
_PHONE = regex.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9][0-9]{0,2}(?: ?\([0-9]{1,4}\))?(?:[ .-]?[0-9]{1,4}){2,5}"  # +82 10-1234-5678
    r"|0(?:2|1[016789]|[3-6][1-5]|70|50[0-9])[ .-][0-9]{3,4}[ .-][0-9]{4}"  # 010-1234-5678, 02 123 4567
    r"|01[016789][0-9]{7,8}"  # 01012345678
    r"|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}"  # (212) 555-0123
    r"|(?:1[ .-])?[2-9][0-9]{2}([ .-])[2-9][0-9]{2}\1[0-9]{4}"  # 212-555-0123
    r")(?![\w-])"
)

API_KEY = regex.compile(
    r"(?<![\w-])(?:sk-(?:proj|svcacct|admin|ant|or-v1)-(?=[\w-]*[0-9])[A-Za-z0-9_-]{16,250}"
    r"|sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]{20,250}"
    r"|hf_[A-Za-z0-9]{30,40}|AIza[\w-]{35}|gsk_[A-Za-z0-9]{40,60}|xai-[A-Za-z0-9]{60,90}|github_pat_\w{60,90})(?![\w-])"
)
"""Keys of OpenAI, Anthropic, OpenRouter, Hugging Face, Google, Groq, xAI and GitHub. `sk-` begins other names too
(`sk-fading-circle12`), but none with a part of 16 characters."""

ASSIGNED = r"""(?x)
    (?!secretar) (?:{names}) \w{{0,30}} [\]'")]{{0,2}} [ ]{{0,3}} (?: :=? | ={{1,3}}>? | !=+ ) [ ]{{0,3}}
    (?: (?P<quote>["'`]) (?P<value>[^\s"'`]{{6,100}}) (?P=quote)
      | (?! [$&/(\[{{<] | \w+:// | [A-Za-z_]\w*\.[A-Za-z_] | (?:u?int|float|bytes|utf|sha|base|md)[-_]?[0-9] )
        (?P<value>[^\s"'`,;&<>(){{}}\[\]]{{5,100}} [^\s"'`,;&<>(){{}}\[\].]) (?= [\s,;&<>)}}\].] | $ ) )"""
"""A name, a sign, and a value: in quotes, or one word that is no `config.key2`, `read(…)`, `uint256` or address."""

MORE_NAMES = ("passphrase", "passcode", "(?:access|auth|api|bearer)_?token", "비밀번호", "패스워드", "비번")
"""Besides the names of detect-secrets (password, pwd, secret, api_key …)."""

_LETTER = regex.compile(r"[A-Za-z]")  # "비밀번호: 8자이상" is a rule for passwords
_DIGIT_OR_SIGN = regex.compile(r"[0-9]|(?<=\w)[!@#$%](?=\w)")

NUMBERS: tuple[tuple[str, regex.Pattern, Callable[[str], bool]], ...] = (
    ("IBAN", _IBAN, _is_iban),
    ("resident registration number", _RESIDENT_NUMBER, _is_resident_number),
    ("payment card number", _CARD, _is_card),
    ("IP address", _IPV4, _is_public_ip),
    ("IP address", _IPV6, _is_public_ip),
    ("phone number", _PHONE, lambda text: 8 <= len(_digits(text)) <= 15),
)
"""Kind, pattern, and whether a match is one. The surer ones come first."""
