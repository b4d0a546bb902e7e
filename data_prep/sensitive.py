"""What in a text may be private: addresses, numbers that name a person, keys, passwords. It is reported, not changed.

    text = "Mail jane@example.org from 8.8.4.4"
    find_sensitive(text)       →  [Finding("e-mail address", 5, 21), Finding("IP address", 27, 34)]
    masked(text, finding)      →  "ja… (16 characters)"

What has a checksum is checked: card numbers (Luhn), IBAN (ISO 7064, 97), Korean resident registration numbers (a date,
and the check digit, which numbers given since October 2020 need not have: those are missed). An IP address counts if
it is a public one, a phone number if it has a country code or the groups of a Korean or North American number.
Patterns know nothing of meaning: names and postal addresses are not found, and an example's `user@example.org` is.

Secrets are found by the detectors of detect-secrets (Yelp) for keys with a form of their own: AWS, GitHub, GitLab,
OpenAI, Slack, Stripe, JSON Web Tokens, private keys, passwords in URLs and others. Their patterns are asked for the
string itself; the library's `scan_line` takes 1.5 ms a text, calls "from" and "list" secrets for their entropy, and
may ask Amazon or GitHub whether a key is valid. Left out for the same noise, or because they go by a variable's name:
the detectors of entropy and keywords, and those of Cloudant, IBM and SoftLayer (80 µs a text).

A row takes 34 µs in Tatoeba and 72 in CodeAlpaca, without secrets 4 and 26. In CodeAlpaca's 2,017 rows there are four
e-mail addresses and one phone number, twice; in Tatoeba's 6,636 sentences, one phone number.
"""

from __future__ import annotations

import functools
import importlib
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import regex

from diptych.data_prep.records import Record, UserError

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
    ("openai", "OpenAIDetector"),
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
    found = _find_secrets(text) if secrets else []
    if "@" in text:
        found += [Finding("e-mail address", *match.span()) for match in _EMAIL.finditer(text)]
    if _DIGITS.search(text):
        for kind, pattern, is_one in NUMBERS:
            found += [Finding(kind, *match.span()) for match in pattern.finditer(text) if is_one(match[0])]
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
    """YYMMDD-SNNNNNC: a date, the century and sex in S, and C from the others (weights 2…9, 2…5, modulo 11)."""
    digits = _digits(text)
    century = {1: 1900, 2: 1900, 3: 2000, 4: 2000, 5: 1900, 6: 1900, 7: 2000, 8: 2000, 9: 1800, 0: 1800}[digits[6]]
    year, month, day = (10 * digits[place] + digits[place + 1] for place in (0, 2, 4))
    try:
        date(century + year, month, day)
    except ValueError:
        return False
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
_RESIDENT_NUMBER = regex.compile(r"(?<![\w-])[0-9]{6}-?[0-9]{7}(?![\w-])")
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

NUMBERS: tuple[tuple[str, regex.Pattern, Callable[[str], bool]], ...] = (
    ("IBAN", _IBAN, _is_iban),
    ("resident registration number", _RESIDENT_NUMBER, _is_resident_number),
    ("payment card number", _CARD, _is_card),
    ("IP address", _IPV4, _is_public_ip),
    ("IP address", _IPV6, _is_public_ip),
    ("phone number", _PHONE, _is_phone),
)
"""What has digits: its kind, how it looks, and whether it really is one. The surer ones come first."""
