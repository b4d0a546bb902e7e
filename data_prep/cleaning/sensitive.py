"""What in a text may be private: addresses, numbers that name a person, keys, passwords. It is reported, not changed.

    text = "Mail jane@example.org from 8.8.4.4"
    find_sensitive(text)       →  [Finding("e-mail address", 5, 21), Finding("IP address", 27, 34)]
    masked(text, finding)      →  "ja… (16 characters)"

What has a checksum is checked: card numbers (Luhn), IBAN (ISO 7064, 97), Korean resident registration numbers. Those
have no check digit if they were given since 5 October 2020, to the newly born or in place of an older one: so
900101-1234567 counts by its date, and 13 digits in a row only with the check digit or a birth since then. An IP
address counts if it is a public one, a phone number if it has a country code or the groups of a Korean or North
American number. Patterns know nothing of meaning: names and postal addresses are not found, and an example's
`user@example.org` is.

Secrets are found by the detectors of detect-secrets (Yelp) for keys with a form of their own: AWS, GitHub, GitLab,
Slack, Stripe, JSON Web Tokens, private keys, passwords in URLs and others. Their patterns are asked for the string
itself; the library's `scan_line` takes 1.5 ms a text, calls "from" and "list" secrets for their entropy, and may ask
Amazon or GitHub whether a key is valid. Left out are its detectors of entropy, for that noise, those of Cloudant, IBM
and SoftLayer (80 µs a text), and two that have their like here:

    sk-proj-…, sk-ant-…, hf_…, AIza…   API_KEY; OpenAIDetector knows one of OpenAI's forms, and none of others'
    password: hunter2                  ASSIGNED, with the names of KeywordDetector; that one takes all up to the end of
                                       the line, as in `password_chars = string.ascii_letters + …`, and `"root"`

A row takes 34 µs in Tatoeba and 170 in CodeAlpaca, without secrets 2 and 42. In CodeAlpaca's 2,017 rows there are four
e-mail addresses, one phone number, twice, and one encrypted password, twice; in Tatoeba's 6,636 sentences, one phone
number.
"""

from __future__ import annotations

import functools
import importlib
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import regex

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Record

NO_CHECK_DIGITS_SINCE = date(2020, 10, 5)
"""Births since then have resident registration numbers of random digits behind the first of the second half."""

PIECE, PIECE_OVERLAP = 4096, 256
"""Characters. Some detectors start anew at each "eyJ" and read to the end: a long text is given to them in pieces."""

SECRET_DETECTORS = (
    ("artifactory", "ArtifactoryDetector"),
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("basic_auth", "BasicAuthDetector"),
    ("discord", "DiscordBotTokenDetector"),
    ("github_token", "GitHubTokenDetector"),
    ("gitlab_token", "GitLabTokenDetector"),
    ("jwt", "JwtTokenDetector"),
    ("mailchimp", "MailchimpDetector"),
    ("npm", "NpmDetector"),
    ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"),
    ("sendgrid", "SendGridDetector"),
    ("slack", "SlackDetector"),
    ("square_oauth", "SquareOAuthDetector"),
    ("stripe", "StripeDetector"),
    ("telegram_token", "TelegramBotTokenDetector"),
    ("twilio", "TwilioKeyDetector"),
)
"""Module and class in detect_secrets.plugins."""


@dataclass(frozen=True, order=True)
class Finding:
    """`text[start:end]` may be sensitive."""

    kind: str
    start: int
    end: int


def find_sensitive(text: str, secrets: bool = True) -> list[Finding]:
    """What is found, in the order of the text; of two that overlap, the one whose pattern says more."""
    found = [*_find_api_keys(text), *_find_secrets(text)] if secrets else []
    if "@" in text:
        found += [Finding("e-mail address", *match.span()) for match in _EMAIL.finditer(text)]
    if _DIGITS.search(text):
        for kind, pattern, is_one in NUMBERS:
            found += [Finding(kind, *match.span()) for match in pattern.finditer(text) if is_one(match[0])]
    if secrets:
        found += _find_assigned(text)
    return sorted(_without_overlaps(found, len(text)), key=lambda finding: finding.start)


def find_in_record(record: Record, secrets: bool = True) -> list[tuple[str, Finding]]:
    """`("output", Finding(…))` for each finding in a record's texts; the history's are "history 1" and so on."""
    texts = [("system", record.system), ("instruction", record.instruction), ("input", record.input)]
    texts += [("output", record.output)]
    earlier = [text for turn in record.history for text in turn]
    texts += [(f"history {number}", text) for number, text in enumerate(earlier, start=1)]
    return [(field, finding) for field, text in texts if text for finding in find_sensitive(text, secrets)]


def masked(text: str, finding: Finding) -> str:
    """`"ja… (16 characters)"`: never more than the first two characters, and none of a very short one."""
    length = finding.end - finding.start
    shown = text[finding.start : finding.start + 2] if length >= 8 else ""
    return f"{shown}… ({length} characters)"


def require_detectors() -> None:
    """Says at once, before any row is read, that detect-secrets is missing."""
    _detectors()


def _find_api_keys(text: str) -> list[Finding]:
    return [Finding("secret (API key)", *match.span()) for match in API_KEY.finditer(text)]


def _find_assigned(text: str) -> list[Finding]:
    """What stands behind `password:`, where it looks like a password: neither a word nor a piece of a program."""
    if ":" not in text and "=" not in text:
        return []
    return [
        Finding("secret (assigned)", *match.span("value"))
        for match in _assigned().finditer(text)
        if _is_password(match["value"])
    ]


def _is_password(value: str) -> bool:
    """A plain word is an example or a name ("securepassword"), `{secret2}` and `<KEY_1>` stand for something else."""
    from detect_secrets.filters.heuristic import is_templated_secret

    return bool(_LETTER.search(value) and _DIGIT_OR_SIGN.search(value)) and not is_templated_secret(value)


@functools.cache
def _assigned() -> regex.Pattern:
    require_detectors()
    from detect_secrets.plugins.keyword import DENYLIST

    return regex.compile(ASSIGNED.format(names="|".join((*DENYLIST, *MORE_NAMES))), regex.IGNORECASE)


def _find_secrets(text: str) -> list[Finding]:
    """What the detectors' own patterns match as a whole: what they return is for some only a group, such as "ghp"."""
    found = set()
    for offset in range(0, max(1, len(text) - PIECE_OVERLAP), PIECE - PIECE_OVERLAP):
        piece = text[offset : offset + PIECE]
        for detector in _detectors():
            for pattern in detector.denylist:
                for match in pattern.finditer(piece):
                    if detector.secret_type != "JSON Web Token" or detector.is_formally_valid(match[0]):
                        start, end = match.span()
                        found.add(Finding(f"secret ({detector.secret_type})", offset + start, offset + end))
    return sorted(found, key=lambda finding: (finding.start, -finding.end, finding.kind))


@functools.cache
def _detectors() -> tuple:
    try:
        return tuple(
            getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)()
            for module, name in SECRET_DETECTORS
        )
    except ModuleNotFoundError as error:
        raise UserError(
            "Looking for secrets needs detect-secrets, which is not installed: pip install 'diptych[clean]'."
        ) from error


def _without_overlaps(findings: list[Finding], characters: int) -> list[Finding]:
    """Earlier ones in the list win."""
    taken = bytearray(characters)
    kept = []
    for finding in findings:
        if not any(taken[finding.start : finding.end]):
            taken[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            kept.append(finding)
    return kept


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdigit()]


def _is_card(text: str) -> bool:
    """Luhn: from the right, every second digit is doubled, and the digits of all add up to a multiple of ten."""
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
    """YYMMDD-SNNNNNC: a date of birth, the century and sex in S, and C from the others (weights 2…9, 2…5, modulo 11),
    or any digits, where there may be no check digit."""
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


def _is_phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15


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
"""Keys of OpenAI, Anthropic, OpenRouter, Hugging Face, Google, Groq, xAI and GitHub by how they begin. `sk-` begins
names too (`sk-fading-circle12`), of which no part is as long."""

ASSIGNED = r"""(?x)
    (?!secretar) (?:{names}) \w{{0,30}} [\]'")]{{0,2}} [ ]{{0,3}} (?: :=? | ={{1,3}}>? | !=+ ) [ ]{{0,3}}
    (?: (?P<quote>["'`]) (?P<value>[^\s"'`]{{6,100}}) (?P=quote)
      | (?! [$&/(\[{{<] | \w+:// | [A-Za-z_]\w*\.[A-Za-z_] | (?:u?int|float|bytes|utf|sha|base|md)[-_]?[0-9] )
        (?P<value>[^\s"'`,;&<>(){{}}\[\]]{{5,100}} [^\s"'`,;&<>(){{}}\[\].]) (?= [\s,;&<>)}}\].] | $ ) )"""
"""A name, a sign, and a value: in quotes, or one word that is no `config.key2`, `read(…)`, `uint256` or address."""

MORE_NAMES = ("passphrase", "passcode", "(?:access|auth|api|bearer)_?token", "비밀번호", "패스워드", "비번")
"""Besides those of detect-secrets (password, passwd, pwd, secret, api_key, private_key …)."""

_LETTER = regex.compile(r"[A-Za-z]")  # "비밀번호: 8자이상" is a rule for passwords
_DIGIT_OR_SIGN = regex.compile(r"[0-9]|(?<=\w)[!@#$%](?=\w)")

NUMBERS: tuple[tuple[str, regex.Pattern, Callable[[str], bool]], ...] = (
    ("IBAN", _IBAN, _is_iban),
    ("resident registration number", _RESIDENT_NUMBER, _is_resident_number),
    ("payment card number", _CARD, _is_card),
    ("IP address", _IPV4, _is_public_ip),
    ("IP address", _IPV6, _is_public_ip),
    ("phone number", _PHONE, _is_phone),
)
"""What has digits: its kind, how it looks, and whether it really is one. The surer ones come first."""
