"""Personal data: planted of each kind, among look-alikes; what is found is counted as precision and recall."""

import random
import time

import pytest

from data_pipeline.personal_data import REPLACEMENTS, placeholder

# Numbers from documentation and test ranges: none is anyone's.
PLANTED = {
    "email": [
        "ada@example.org",
        "a.b+lists@mail.example.co.uk",
        "first_last-99@sub.example.com",
        "X%y@example.museum",
        "o@example.io",
    ],
    "phone": [
        "+49 30 1234567",
        "+1 (212) 555-0123",
        "+442079460123",
        "(212) 555-0187",
        "212-555-0143",
        "1-212-555-0143",
        "+86 138 0013 8000",
        "+33.1.23.45.67.89",
    ],
    "ip_address": [
        "8.8.8.8",
        "142.250.74.46",
        "2606:4700:4700::1111",
        "2001:4860:4860:0:0:0:0:8888",
        "93.184.216.34",
        "2a00:1450:4001:81b::",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "FR1420041010050500013M02606",
        "NO93 8601 1117 947",
        "CH9300762011623852957",
        "AT61 1904 3002 3457 3201",
        "ES91 2100 0418 4502 0005 1332",
        "BE68 5390 0754 7034",
    ],
    "card_number": [
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "6011111111111117",
        "3056 930902 5904",
        "3530111333300000",
    ],
    "secret_key": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "Ab3_" * 10,
        "hf_" + "aB" * 17,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nq83vASNFZ4k=\n-----END RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    ],
}
LOOK_ALIKES = {
    "email": ["user@localhost", "@decorator.name", "a @ b.c", "git@", "x@y", "1@2.3"],
    "phone": [
        "1990-1995",
        "2024-11-27",
        "27.11.2026",
        "ISBN 978-3-16-148410-0",
        "100 000 000",
        "3.14159265358979",
        "17:45:59",
        "1,234,567",
        "(1914) 1918-2000",
        "+5",
        "x+1234567+y",
        "see 123-456",
        "Windows Phone 2019/2020",
        "for mobile 2021-05-04",
        "for mobile 20210504",
        "Tel. 27.11.2026",
        "Windows Phone 8.10.15137",
        "cell 192.168.10.25",
    ],
    "ip_address": [
        "192.168.0.1",
        "127.0.0.1",
        "10.0.0.7",
        "999.1.1.1",
        "v1.2.3.4",
        "1.2.3",
        "1.2.3.4.5",
        "12:30:45",
        "2a00:1450:4001:81b:",
    ],
    "iban": ["DE89 3704 0044 0532 0130 01", "GB00WEST12345698765432", "AB12 ABCD 1234", "US64 1234 5678 9012"],
    "card_number": ["4111 1111 1111 1112", "1234 5678 9012 3452", "0000 0000 0000 0000", "4111.1111.1111.1111", "4111"],
    "secret_key": [
        "sk-short",
        "AKIA1234",
        "hf_hub_download",
        "BEGIN PUBLIC KEY",
        "ghp_",
        "eyJ.eyJ.x",
        "task-" + "a" * 40,
    ],
}


def replace_all(text: str) -> str:
    for replace in REPLACEMENTS.values():
        text = replace(text)
    return text


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_precision_and_recall_on_planted_data(kind: str) -> None:
    """Every value is found whole, in a sentence, in brackets and at the ends of a text; no look-alike is."""
    for value in PLANTED[kind]:
        for form in ("{}", "Write to {}, please.", "({})", '"{}"\n', "one: {} two"):
            assert replace_all(form.format(value)) == form.format(placeholder(kind)), (form, value)
    for text in (f"Read {value} there." for values in LOOK_ALIKES.values() for value in values):
        assert replace_all(text) == text


@pytest.mark.parametrize(
    "value",
    [
        f"{start}{'aB3' * 30}"[:length]
        for start, length in [
            ("AIza", 39),
            ("gho_", 40),
            ("ghu_", 40),
            ("ghs_", 40),
            ("ghr_", 40),
            ("github_pat_", 80),
            ("glpat-", 26),
            ("xoxb-", 20),
            ("sk_live_", 40),
            ("rk_test_", 40),
        ]
    ]
    + ["ASIAIOSFODNN7EXAMPLE"],
)
def test_a_secret_is_found_by_each_mark_alone(value: str) -> None:
    """No other secret stands in the text, so that a mark that is not looked for is a secret that stays."""
    assert replace_all(f"The value is {value}.") == "The value is <secret-key>."


def test_a_telephone_number_of_any_form_is_found_behind_a_word_that_announces_it() -> None:
    assert replace_all("Tel.: 030 1234567, Fax 0221/987 654") == "Tel.: <phone>, Fax <phone>"
    assert replace_all("Tel: 03012345678, Phone: 5551234567.") == "Tel: <phone>, Phone: <phone>."
    assert replace_all("Fax: 030.1234567 or mobile 01.23.45.67.89") == "Fax: <phone> or mobile <phone>"
    assert replace_all("page 030 1234567, model 12 345 678") == "page 030 1234567, model 12 345 678"


@pytest.mark.parametrize(
    "behind", [" BIC: GIBAATWW", " EUR", " EURO 1234 5678 ABCD", " 2024", ": timed out", " DE89 3704 0044 0532 0130 01"]
)
def test_what_follows_a_number_stays(behind: str) -> None:
    for value in (*PLANTED["iban"], "2a00:1450:4001:81b::200e"):
        mark = placeholder("iban" if value in PLANTED["iban"] else "ip_address")
        assert replace_all(f"{value}{behind} and {value}") == f"{mark}{behind} and {mark}"
    assert replace_all(" ".join(PLANTED["iban"])) == " ".join(["<iban>"] * len(PLANTED["iban"]))


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "1 ",
        "a@",
        "a.",
        "1.",
        "A1B2",
        "DE12 ",
        "tel 1234567 ",
        "2001:",
        "+1",
        "(2",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "el 1",
    ],
)
def test_no_text_takes_long(kind: str, unit: str) -> None:
    """Long runs, as in base64 or tables, must not make a search quadratic."""
    text = unit * (60_000 // len(unit)) + " @ eyJ"  # what the searches look for first
    begin = time.process_time()
    REPLACEMENTS[kind](text)
    assert time.process_time() - begin < 2


def test_random_digits_are_seldom_taken_for_anything() -> None:
    """Of random numbers one in ten passes Luhn's check, and about a third of these begins like an issuer's."""
    dice = random.Random(0)
    numbers = ["".join(dice.choices("0123456789", k=16)) for _ in range(2000)]
    assert 10 < sum(replace_all(f"no. {number}.") != f"no. {number}." for number in numbers) < 120
