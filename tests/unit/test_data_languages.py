"""The language rule: planted texts of nine languages are told apart, counted, and dropped unless they are wanted."""

import sys
from pathlib import Path

import pytest
from data_samples import macbeth, save_tokenizer, write_jsonl

from data_pipeline import languages
from data_pipeline.languages import language_of
from data_pipeline.plan import PrepareOptions
from data_pipeline.prepare import prepare
from data_pipeline.report import summarize
from data_pipeline.rules import Rules
from gpt.recipe_file import load_section

TEXTS = {
    "en": [" ".join(part.split()) for part in macbeth().split("\n\n") if len(part) > 300][:12],
    "de": [
        "Am Morgen gingen die Kinder in den Wald, weil sie Pilze sammeln wollten, und kamen erst am Abend zurück.",
        "Die Bahn fährt heute nicht, denn auf der Strecke liegt ein Baum, den der Sturm umgeworfen hat.",
        "Wer eine Wohnung sucht, muss in dieser Stadt viel Geduld haben und früh aufstehen.",
        "Der Versuch wurde dreimal wiederholt, und jedes Mal zeigte das Gerät denselben Wert an.",
    ],
    "fr": [
        "Le matin, les enfants sont partis dans la forêt pour chercher des champignons, et ils sont rentrés le soir.",
        "Le train ne circule pas aujourd'hui, car un arbre est tombé sur la voie pendant la tempête.",
        "Pour trouver un logement dans cette ville, il faut beaucoup de patience et se lever tôt.",
    ],
    "es": [
        "Por la mañana los niños fueron al bosque a buscar setas y no volvieron hasta la noche.",
        "Hoy no hay trenes porque un árbol cayó sobre la vía durante la tormenta de anoche.",
    ],
    "ru": ["Утром дети пошли в лес за грибами и вернулись домой только поздно вечером, усталые, но довольные."],
    "zh": ["早上孩子们到森林里去采蘑菇。直到晚上才回家。他们很累。但是很高兴。"],
    "ja": ["朝、子どもたちはきのこを採りに森へ行き、夜になってようやく家に帰ってきました。"],
    "ko": ["아침에 아이들은 버섯을 따러 숲으로 갔다가 저녁이 되어서야 집으로 돌아왔습니다."],
    "ar": ["في الصباح ذهب الأطفال إلى الغابة لجمع الفطر ولم يعودوا إلى البيت إلا في المساء."],
}
COUNTS = {code: len(texts) for code, texts in TEXTS.items()} | {"und": 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_planted_languages_are_counted_and_only_the_wanted_stay(tmp_path: Path, workers: int) -> None:
    """Precision and recall are 1; a text that tells too little counts as such, whoever the workers are."""
    rows = [text for texts in TEXTS.values() for text in texts] + ["12345 67890", "- - -"]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in rows])
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    options = PrepareOptions([str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer, validation_fraction=0)
    options.workers, options.unit_bytes = workers, 900
    options.rules = Rules(language={"keep": ["de", "en"]}, length={"max_characters": 9_999})
    report = prepare(options)
    assert report["units"] > 4
    kept = COUNTS["de"] + COUNTS["en"]
    assert report["rules"]["languages"] == COUNTS and list(report["rules"]["languages"])[:3] == ["en", "de", "fr"]
    entry = report["rules"]["dropped"]["language"]
    assert entry["documents"] == len(rows) - kept and report["splits"]["train"]["documents"] == kept
    assert entry["examples"][0] | {"file": ""} == {"file": "", "why": "fr, kept: de, en", "text": TEXTS["fr"][0][:120]}
    assert summarize(report)["rules"]["languages"] == COUNTS
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<tr><td>fr</td><td class="n">3</td><td class="n">{100 * 3 / len(rows):.2f} %</td></tr>' in page


def test_without_a_choice_languages_are_only_counted(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": TEXTS["de"][0]}, {"role": "assistant", "content": TEXTS["de"][1]}]
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    options = PrepareOptions([str(tmp_path / "chat.jsonl")], tmp_path / "out", save_tokenizer(tmp_path / "tokenizer"))
    options.validation_fraction, options.rules = 0, Rules(language={})
    report = prepare(options)["rules"]
    assert report["languages"] == {"de": 1} and "language" not in report["dropped"]


def test_only_the_beginning_of_a_text_is_looked_at() -> None:
    german = " ".join(TEXTS["de"])
    assert language_of(german * 20 + TEXTS["ru"][0] * 999) == "de"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("language: {keep: [de, english]}", "unknown language english; known are"),
        ("language: {keep: []}", "at least 1"),
    ],
)
def test_wrong_languages_are_refused(tmp_path: Path, content: str, message: str) -> None:
    assert message in _refusal(tmp_path, content)


def test_without_the_package_the_rule_is_refused_and_all_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    languages._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    refusal = _refusal(tmp_path, "language: {keep: [de]}")
    assert "the package py3langid is not installed" in refusal and "'.[language]'" in refusal
    assert Rules(length={"min_characters": 1}).language is None


def _refusal(folder: Path, content: str) -> str:
    """What is said of a rules file."""
    (folder / "rules.yaml").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_section(Rules, str(folder / "rules.yaml"), "rules")
    return str(caught.value)
