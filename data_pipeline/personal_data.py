"""Personal data and secrets in a text: found by their form, proven by their check digits where they have some."""

import functools
import ipaddress
import re
import string
from collections.abc import Callable

import numpy as np
from stdnum import iban, luhn

FEWEST_DIGITS = 4  # of an IPv4 address; all other numbers have more

# Each pattern begins with characters, and only then looks at what stands before them: so the search jumps from one
# such character to the next, several times as fast.
_ALONE = r"(?<![\w.+/=-].)(?<![0-9][ ,:].)"
_ENDS = r"(?![\w/=])(?![.,:-][0-9])(?! ?[0-9])"

# RFC 5321: at most 64 characters before the @
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9-])"
)
# international (E.164: at most 15 digits), North American, and any behind a word that announces it
_INTERNATIONAL = re.compile(rf"\+{_ALONE}[1-9][0-9]{{0,2}}(?:[ .-]?(?:\([0-9]{{1,5}}\)|[0-9]{{1,5}})){{2,5}}{_ENDS}")
_NORTH_AMERICAN = re.compile(
    rf"[1-9(]{_ALONE}(?:(?<=1)[ .-](?:[2-9][0-9]{{2}}[.-]|\([2-9][0-9]{{2}}\) ?)"
    rf"|(?<=\()[2-9][0-9]{{2}}\) ?|(?<=[2-9])[0-9]{{2}}[.-])[2-9][0-9]{{2}}[ .-][0-9]{{4}}{_ENDS}"
)
_ANNOUNCED = re.compile(
    r"[0-9(](?:(?<=[lexLEX][ .:].)|(?<=[lexLEX][.:] .)|(?<=[lexLEX]\.:.)|(?<=[lexLEX]\.: .))"
    rf"(?:(?<=\()[0-9]{{1,5}}\)|(?<=[0-9])[0-9]{{0,14}})(?:[ ./-][0-9]{{2,8}}){{0,5}}{_ENDS}"
)
_ANNOUNCING = re.compile(r"(?<![A-Za-z])(?:tel|telephone|phone|fax|mobile|cell)[.: ]{1,3}$", re.IGNORECASE)
# dates, two years, and versions (of Windows Phone) or addresses of four numbers
_NO_PHONE = re.compile(
    r"(?:19|20)[0-9]{2}(?:[ /-](?:19|20)[0-9]{2}|([./-]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01]))"
    r"|[0-3]?[0-9]([./-])[0-3]?[0-9]\2(?:19|20)[0-9]{2}"
    r"|[0-9]\.[0-9.]+|[1-9][0-9]{0,2}(?:\.[0-9]{1,3}){3}"
)
_IPV4 = re.compile(r"[0-9](?<![\w.-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])")
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?:[0-9A-Fa-f]|::)(?!\w|:[0-9A-Fa-f:])"
)  # global unicast is 2000::/3
_IPV6_INSIDE = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_DIGITS = str.maketrans({letter: str(int(letter, 36)) for letter in string.ascii_uppercase})
_WORD_END = re.compile(r"(?<=[A-Z0-9])(?![A-Z0-9])")
# the issuers' first digits (ISO/IEC 7812): Visa, Mastercard, American Express, Discover, Diners Club, JCB
_CARD = re.compile(
    r"[2-6](?<![\w.+-].)[0-9]{3}([ -]?)(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{6}\1[0-9]{4,5})(?![\w-]|\.[0-9])"
)
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[04578]|6[05]")
# What each secret has in it. Searches for one character that few texts hold are several times as fast as for words.
_SECRET_MARKS = (
    *(re.compile("PRIVATE KEY-----"), re.compile("A(?:KIA|SIA|Iza)"), re.compile("J(?<=eyJ)"), re.compile("xox")),
    re.compile("_(?:(?<=gh[pousr]_)|(?<=github_pat_)|(?<=hf_)|(?<=k_live_)|(?<=k_test_))"),
    re.compile("-(?:(?<=sk-)|(?<=glpat-))"),
)
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\S]{1,10000}?-----END [A-Z ]{0,20}PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9_-])(?:(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,90}"
    r"|glpat-[\w-]{20}|xox[abprs]-[A-Za-z0-9-]{10,80}|hf_[A-Za-z0-9]{34}|sk-[\w-]{20,200}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{24,99}"
    r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000})(?![A-Za-z0-9_-])"
)


def placeholder(kind: str) -> str:
    """What stands in the place of personal data of a kind."""
    return f"<{kind.replace('_', '-')}>"


def _public_address(match: re.Match[str]) -> str:
    try:
        return placeholder("ip_address") if ipaddress.ip_address(match[0]).is_global else match[0]
    except ValueError:
        return match[0]


def _phone(match: re.Match[str]) -> str:
    digits = sum(map(str.isdecimal, match[0]))
    return placeholder("phone") if 7 <= digits <= 15 else match[0]


def _announced_phone(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - 20) : match.start()]
    if not _ANNOUNCING.search(before) or _NO_PHONE.fullmatch(match[0]):
        return match[0]
    return _phone(match)


def _card_number(match: re.Match[str]) -> str:
    digits = match[0].replace(" ", "").replace("-", "")
    return placeholder("card_number") if _ISSUER.match(digits) and luhn.is_valid(digits) else match[0]


@functools.lru_cache(1)
def _numeric_lines(text: str) -> str:
    """The lines with digits enough for a number of any kind."""
    data = text.encode()
    characters = np.frombuffer(data, np.uint8)
    ends = np.append(np.flatnonzero(characters == ord("\n")), len(data))
    digits = np.flatnonzero(characters - ord("0") < 10)
    numeric = np.diff(np.searchsorted(digits, ends), prepend=0) >= FEWEST_DIGITS
    begins = np.append(0, ends[:-1] + 1)[numeric]
    spans = zip(begins.tolist(), ends[numeric].tolist(), strict=True)
    return b"\n".join([data[begin:end] for begin, end in spans]).decode()


def _of_numeric_lines(replace: Callable[[str], str]) -> Callable[[str], str]:
    """The same, and much faster where no line with digits enough changes; no number goes over the end of a line."""

    def apply(text: str) -> str:
        lines = _numeric_lines(text)
        return text if replace(lines) == lines else replace(text)

    return apply


def replace_email(text: str) -> str:
    if "@" not in text:
        return text
    mark = placeholder("email")
    return "\n".join([_EMAIL.sub(mark, line) if "@" in line else line for line in text.split("\n")])


@_of_numeric_lines
def replace_phone(text: str) -> str:
    text = _NORTH_AMERICAN.sub(_phone, _INTERNATIONAL.sub(_phone, text))
    return _ANNOUNCED.sub(_announced_phone, text)


@_of_numeric_lines
def _replace_ipv4(text: str) -> str:
    return _IPV4.sub(_public_address, text)


def replace_ip_address(text: str) -> str:
    text = _replace_ipv4(text)
    return _IPV6.sub(_public_address, text) if _IPV6_INSIDE.search(text) else text


def _has_iban_checksum(found: str) -> bool:
    """ISO 7064, MOD 97-10, a tenth of the time of `iban.is_valid`, which asks for it, too: a text may hold as many
    candidates as words."""
    compact = found.replace(" ", "")
    return int((compact[4:] + compact[:4]).translate(_IBAN_DIGITS)) % 97 == 1


@_of_numeric_lines
def replace_iban(text: str) -> str:
    """What follows an IBAN may look like its last groups: so the ends of all groups are tried, the last one first.

    Banks are not looked up, as the tables of those change.
    """
    parts, kept, place = [], 0, 0
    while match := _IBAN.search(text, place):
        place = match.start() + 1
        ends = [match.start() + word_end.end() for word_end in _WORD_END.finditer(match[0])]
        for end in reversed(ends):
            found = text[match.start() : end]
            if _has_iban_checksum(found) and iban.is_valid(found, check_country=False):
                parts += [text[kept : match.start()], placeholder("iban")]
                kept = place = end
                break
    return "".join([*parts, text[kept:]])


@_of_numeric_lines
def replace_card_number(text: str) -> str:
    return _CARD.sub(_card_number, text)


def replace_secret_key(text: str) -> str:
    return _SECRET.sub(placeholder("secret_key"), text) if any(mark.search(text) for mark in _SECRET_MARKS) else text


# the longest numbers first: an account or card number must not be taken for a telephone number
REPLACEMENTS: dict[str, Callable[[str], str]] = {
    "secret_key": replace_secret_key,
    "email": replace_email,
    "iban": replace_iban,
    "card_number": replace_card_number,
    "ip_address": replace_ip_address,
    "phone": replace_phone,
}
