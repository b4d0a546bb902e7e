"""What looks private is found where it stands, what only resembles it is not, and nothing is shown in full."""

import base64
import json
import random
import string
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data_prep.cleaning.sensitive import (
    SensitiveSpan,
    find_in_record,
    find_sensitive,
    masked,
    secret_detectors,
)
from diptych.data_prep.rows.records import Origin, Record


def found(text):
    return [(finding.kind, text[finding.start : finding.end]) for finding in find_sensitive(text)]


def drawn(letters, length, seed=0):
    return "".join(random.Random(seed).choices(letters, k=length))


def token(payload):
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")


ALPHANUMERIC = string.ascii_letters + string.digits
JWT = f"{token({'alg': 'HS256'})}.{token({'sub': '1234567890'})}"
# Put together here, so that no scanner takes this file for a leak.
SECRETS = {
    "AWS Access Key": "AKIA" + drawn(string.ascii_uppercase, 16),
    "GitHub Token": "ghp_" + drawn(ALPHANUMERIC, 36),
    "GitLab Token": "glpat-" + drawn(ALPHANUMERIC, 20),
    "Slack Token": "xoxb-" + drawn(string.digits, 12) + "-" + drawn(ALPHANUMERIC, 24),
    "Stripe Access Key": "sk_live_" + drawn(ALPHANUMERIC, 24),
    "SendGrid API Key": "SG." + drawn(ALPHANUMERIC, 22) + "." + drawn(ALPHANUMERIC, 43),
    "JSON Web Token": JWT,
    "Private Key": "BEGIN RSA PRIVATE KEY",
    "Basic Auth Credentials": "://user:" + drawn(string.ascii_lowercase, 12) + "@",
}


def test_the_literal_of_the_docstring():
    text = "Mail jane@example.org from 8.8.4.4"
    assert find_sensitive(text) == [SensitiveSpan("e-mail address", 5, 21), SensitiveSpan("IP address", 27, 34)]
    assert masked(text, find_sensitive(text)[0]) == "ja… (16 characters)"


@pytest.mark.parametrize(
    "kind, text",
    [
        ("e-mail address", "first.last+tag@mail.example.co.kr"),
        ("payment card number", "4111 1111 1111 1111"),
        ("payment card number", "5555555555554444"),
        ("payment card number", "3782-822463-10005"),
        ("IBAN", "DE89 3704 0044 0532 0130 00"),
        ("IBAN", "GB82WEST12345698765432"),
        ("resident registration number", "900101-1234568"),
        ("resident registration number", "9001011234568"),
        ("resident registration number", "900101-1234567"),  # no check digit: given in place of another
        ("resident registration number", "880229 - 2345678"),
        ("resident registration number", "2010053123456"),  # born when check digits had ended
        ("secret (API key)", "sk-proj-" + drawn(ALPHANUMERIC + "-_", 74) + "T3BlbkFJ" + drawn(ALPHANUMERIC, 74)),
        ("secret (API key)", "sk-ant-api03-" + drawn(ALPHANUMERIC + "-_", 93) + "AA"),
        ("secret (API key)", "sk-or-v1-" + drawn(string.hexdigits.lower(), 64)),
        ("secret (API key)", "sk-" + drawn(ALPHANUMERIC, 48)),
        ("secret (API key)", "sk-" + drawn(ALPHANUMERIC, 20) + "T3BlbkFJ" + drawn(ALPHANUMERIC, 20)),
        ("secret (API key)", "hf_" + drawn(ALPHANUMERIC, 34)),
        ("secret (API key)", "AIza" + drawn(ALPHANUMERIC, 35)),
        ("secret (API key)", "github_pat_" + drawn(ALPHANUMERIC + "_", 82)),
        ("IP address", "8.8.8.8"),
        ("IP address", "2001:4860:4860::8888"),
        ("phone number", "+82 10-1234-5678"),
        ("phone number", "+1 (212) 555-0123"),
        ("phone number", "010-1234-5678"),
        ("phone number", "01012345678"),
        ("phone number", "02-312-3456"),
        ("phone number", "(212) 555-0123"),
        ("phone number", "1-800-446-2581"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "So: {}.", "그는 {} 를 썼다", "({}),", '"{}"', "a\n{}\nb"])
def test_each_kind_is_found_where_it_stands(kind, text, around):
    assert found(around.format(text)) == [(kind, text)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn
        "0000 0000 0000 0000",
        "4 8 12 16 20 24 28 32 36 40",
        "GB82WEST12345698765433",  # modulo 97
        "9001011234567",  # check digit
        "2010043123456",  # the day before check digits ended
        "901301-1234568",  # month 13
        "991231-3123456",  # born in 2099
        "900101-9123456",  # born in 1890, and no check digit
        ".sk-fading-circle12 { } .sk-cube-grid-2024-animation-delay",
        "sk-SK, sk-learn, risk-free2024-and-more-of-the-same",
        "192.168.0.1, 10.0.0.1, 127.0.0.1, 256.1.1.1, 3.11.7.2.1, v1.2.3.4",
        "std::vector<int>::iterator a::b ::1 fe80::1",
        "2024-01-02 12:30:45.123456, 1700000000, 1700000000000",
        "3.14159265358979, 1,000,000, 2^31 = 2147483648",
        "@decorator, a @ b, user@localhost",
        "192 168 0 1",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "eyJ.eyJ.x",
        "",
    ],
)
def test_what_only_looks_like_it_is_not_found(text):
    assert found(text) == []


@pytest.mark.parametrize(
    "text, value",
    [
        ("password: hunter2", "hunter2"),
        ("The PASSWORD=hunter2.", "hunter2"),
        ("비밀번호: tiger1234", "tiger1234"),
        ('{"api_key": "9f8a7d6c5b", "n": 1}', "9f8a7d6c5b"),
        ("'db_password' => 'Gehe!m'", "Gehe!m"),
        ("my.key_passphrase := S3cr3t,x", "S3cr3t"),
        ("?user=a&client_secret=abcd1234&x=1", "abcd1234"),
        ("Server=db;Password=hunter2;", "hunter2"),
    ],
)
def test_what_is_assigned_to_a_name_for_secrets_is_one(text, value):
    assert found(text) == [("secret (assigned)", value)]


@pytest.mark.parametrize(
    "text",
    [
        "Password: required! 비밀번호: 최소8자이상",
        'password = "securepassword"; pwd = "root"',
        "password = input('Password 1: ')",
        "password = getpass2(prompt)",
        "secret = config.secret2; api_key = os.environ['KEY_1']",
        "password: str, secret: Uint8Array, pwd: uint256",
        "password = $PASSWORD1, api_key: {{ key_1 }}, api_key: <YOUR_KEY_1>, secret='{secret1}'",
        "password_chars = string.ascii_letters + string.digits",
        "secret: https://example.org/page2",
        "Secretary: anna2000. The password has 12 characters.",
        "password: ********",
    ],
)
def test_what_is_assigned_and_no_password_is_left_alone(text):
    assert found(text) == []


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_covered_whole(kind):
    text = f"key = {SECRETS[kind]} # do not tell"
    assert any(
        finding.kind == f"secret ({kind})" and SECRETS[kind] in text[finding.start : finding.end]
        for finding in find_sensitive(text)
    )


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("place", [0, 3000, 3830, 4080, 7700, 20_000])
def test_secrets_are_found_anywhere_in_a_long_text(kind, place):
    secret = SECRETS[kind]
    text = ("a word " * 4000)[:place] + f" {secret} " + "a word " * 100
    assert [text[finding.start : finding.end].strip() for finding in find_sensitive(text)] == [secret]


def test_every_occurrence_is_a_finding_and_none_overlap():
    text = "a@b.org, c@d.org; 4111111111111111, a@b.org"
    findings = find_sensitive(text)
    assert [finding.kind for finding in findings] == ["e-mail address"] * 2 + ["payment card number", "e-mail address"]
    assert all(one.end <= two.start for one, two in zip(findings, findings[1:], strict=False))


def test_tatoeba_has_one_phone_number(pairs):
    """Of 6,636 real sentences."""
    assert [hit for pair in pairs for text in pair for hit in found(text)] == [("phone number", "1-800-446-2581")]


PARTS = st.sampled_from([*SECRETS.values(), "a@b.org", "4111111111111111", "8.8.8.8", "010-1234-5678", "안녕 "])


@settings(deadline=None)
@given(st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=8).map("".join))
def test_findings_lie_in_the_text_and_masks_show_two_characters_at_most(text):
    end = 0
    for finding in find_sensitive(text):
        assert end <= finding.start < finding.end <= len(text)
        end = finding.end
        shown, dots, rest = masked(text, finding).partition("…")
        assert dots and len(shown) <= 2 and text[finding.start :].startswith(shown)
        assert rest == f" ({finding.end - finding.start} characters)"


def test_a_short_finding_is_not_shown_at_all():
    assert masked("8.8.8.8", SensitiveSpan("IP address", 0, 7)) == "… (7 characters)"


def test_all_texts_of_a_record_are_looked_at():
    record = Record(
        instruction="Mail a@b.org.",
        input="8.8.8.8",
        output="+82 10-1234-5678",
        system="c@d.org",
        history=(("none", "e@f.org"),),
        origin=Origin("rows", 1),
    )
    assert [(field, finding.kind) for field, finding in find_in_record(record)] == [
        ("system", "e-mail address"),
        ("instruction", "e-mail address"),
        ("input", "IP address"),
        ("output", "phone number"),
        ("history 2", "e-mail address"),
    ]


@pytest.mark.parametrize(
    "text",
    ["eyJ", "1 ", "+1", "sk-a1", "password=", "pwd a", "a@", "a.", "://a:", "1234-", "AB12 ", "2001:", "a@b.co "],
)
def test_no_text_makes_the_search_slow(text):
    started = time.process_time()
    find_sensitive(text * (100_000 // len(text)))
    assert time.process_time() - started < 3


def test_without_detect_secrets_the_extra_is_named():
    code = (
        "import sys; sys.modules['detect_secrets'] = None\n"
        "from diptych.data_prep.cleaning.sensitive import secret_detectors\n"
        "secret_detectors()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "UserError" in run.stderr
    assert "pip install 'diptych[clean]'" in run.stderr.splitlines()[-1]


def test_all_detectors_are_there():
    assert len(secret_detectors()) == 18
