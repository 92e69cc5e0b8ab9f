"""The recipe: numbers as people write them, every refusal in one message, overrides, places."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_samples import make_recipe, recipe_content

from gpt.recipe import Recipe
from gpt.recipe_file import PROJECT_ROOT, find_shipped_file, fork_recipe, load_recipe, resolve_paths


def write(folder: Path, content: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def refusal(changes: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as caught:
        make_recipe(changes, without)
    return str(caught.value)


def test_steps_to_be_traced_ascend() -> None:
    steps = make_recipe({"profile": {"steps": [20, 22]}}).profile
    assert steps is not None and steps.steps == [20, 22]
    assert "profile.steps is [22, 20]: the first step comes before the last" in refusal(
        {"profile": {"steps": [22, 20]}}
    )
    assert "profile.steps" in refusal({"profile": {"steps": [22]}})


# Numbers


@pytest.mark.parametrize("written", ["3e-4", "3.0e-4", "0.0003", ".0003", "3_0e-5", "+3E-4"])
def test_learning_rates_as_people_write_them(tmp_path: Path, written: str) -> None:
    text = yaml.safe_dump(recipe_content()).replace("learning_rate: 3e-4", f"learning_rate: {written}")
    assert load_recipe(write(tmp_path, text)).optimizer.learning_rate == pytest.approx(3e-4, rel=1e-15)


@pytest.mark.parametrize("written", ["3_000_000", "3e6", "3.0e+6", "3000000", "3000000.0"])
def test_token_counts_as_people_write_them(tmp_path: Path, written: str) -> None:
    text = yaml.safe_dump(recipe_content()).replace("steps: 10", f"tokens: {written}")
    tokens = load_recipe(write(tmp_path, text)).train.tokens
    assert tokens == 3_000_000
    assert type(tokens) is int


def test_numbers_of_the_model_configuration_too(tmp_path: Path) -> None:
    text = yaml.safe_dump(recipe_content()).replace(
        "model_type: llama", "model_type: llama\n    rms_norm_eps: 1e-5\n    rope_parameters: {rope_theta: 5e5}"
    )
    config = load_recipe(write(tmp_path, text)).model.config
    assert config is not None
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_theta": 5e5}
    assert config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("optimizer.learning_rate", float("nan"), "finite"),
        ("optimizer.learning_rate", ".inf", "optimizer.learning_rate"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("optimizer.learning_rate", "1e400", "finite"),
        ("optimizer.learning_rate", 0, "greater than 0"),
        ("optimizer.learning_rate", "-1e-4", "greater than 0"),
        ("optimizer.learning_rate", "fast", "valid number"),
        ("optimizer.learning_rate", True, "True is not a number"),
        ("optimizer.betas", [0.9, True], "True is not a number"),
        ("optimizer.betas", [0.9], "at least 2"),
        ("optimizer.betas", [0.9, 1.0], "less than 1"),
        ("train.steps", True, "True is not a number"),
        ("train.steps", 2.5, "2.5 is not a whole number"),
        ("train.steps", float("inf"), "not a whole number"),
        ("train.steps", 0, "greater than 0"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("data.packing", "tight", "'concatenate' or 'best_fit'"),
        ("data.workers", -1, "greater than or equal to 0"),
        ("train.micro_batch_sequences", False, "False is not a number"),
        ("checkpoint.every_steps", 0, "greater than 0"),
        ("precision", "int8", "'bf16', 'fp16' or 'fp32'"),
        ("evaluate.sample_prompt", "", "at least 1 character"),
    ],
)
def test_bad_values_are_named_with_their_field(field: str, value: Any, said: str) -> None:
    message = refusal({field: value})
    assert field in message
    assert said in message
    assert repr(value) in message or "betas" in field


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"until_tokens": 512, "weights": [1]}, {"weights": [0.5, 0.5]}], "data.stages.0.weights has 1 weights, but"),
        ([{"weights": [1, 0]}, {"weights": [1, 1]}], "every stage of data.stages but the last needs until_tokens"),
        ([{"until_tokens": 512, "weights": [1, 0]}], "the last has none"),
        (
            [{"until_tokens": 1000, "weights": [1, 0]}, {"weights": [1, 1]}],
            "data.stages.0.until_tokens is 1000, which is not a whole number of global batches of 256 tokens: use 768 "
            "or 1024",
        ),
        ([{"until_tokens": 100, "weights": [1, 0]}, {"weights": [1, 1]}], "of 256 tokens: use 256"),
        ([{"until_tokens": 512, "weights": [1, 0]}] * 2 + [{"weights": [1, 1]}], "must grow from stage to stage"),
        ([{"until_tokens": 512, "weights": [1, -1]}, {"weights": [1, 1]}], "data.stages.0.weights.1"),
        (
            [{"until_token": 512, "weights": [1, 1]}],
            "unknown key data.stages.0.until_token: did you mean until_tokens?",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[dict[str, Any]], said: str) -> None:
    two = [{"path": "a"}, {"path": "b"}]
    assert said in refusal({"data.train": two, "data.stages": stages})


def test_stages_that_fit_and_weights_in_one_place_only() -> None:
    stages = [{"until_tokens": "2_560", "weights": [1, 0]}, {"weights": [0.5, 0.5]}]
    two = [{"path": "a"}, {"path": "b"}]
    recipe = make_recipe({"data.train": two, "data.stages": stages})
    assert [stage.until_tokens for stage in recipe.data.stages] == [2560, None]
    two[1]["weight"] = 2  # type: ignore[assignment]
    assert "the weights are in data.stages" in refusal({"data.train": two, "data.stages": stages})


# Keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimiser", "optimizer"),
        ("train.global_batch_token", "global_batch_tokens"),
        ("optimizer.warmup", "warmup_steps"),
        ("checkpoint.keep_lsat", "keep_last"),
        ("gradient_checkpointing.every_layer", "every_layers"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert f"unknown key {key}: did you mean {nearest}?" in refusal({key: 1})


def test_an_unknown_key_in_a_list_names_the_nearest() -> None:
    message = refusal({"data.train": [{"path": "a"}, {"path": "b", "wieght": 2}]})
    assert "unknown key data.train.1.wieght: did you mean weight?" in message


def test_an_unknown_key_near_to_nothing_lists_the_known_ones() -> None:
    assert "unknown key logging.zzz: known here: console_every_steps" in refusal({"logging.zzz": 1})


def test_all_problems_are_in_one_message() -> None:
    changes = {"optimiser": {}, "train.steps": "many", "data.sequence_length": 0, "precision": "bf8"}
    message = refusal(changes, without=("tokenizer",))
    for part in ("optimiser", "train.steps", "data.sequence_length", "precision", "tokenizer is missing"):
        assert part in message
    assert "\n" not in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(recipe_content()) + "precision: fp32\nprecision: bf16\n"
    with pytest.raises(ValueError, match=r"precision.*twice"):
        load_recipe(write(tmp_path, text))


def test_a_yaml_merge_key_is_no_repetition(tmp_path: Path) -> None:
    text = yaml.safe_dump(recipe_content(without=("optimizer",)))
    text += "optimizer: {<<: {learning_rate: 1e-3, epsilon: 1e-6}, learning_rate: 2e-3}\n"
    optimizer = load_recipe(write(tmp_path, text)).optimizer
    assert (optimizer.learning_rate, optimizer.epsilon) == (2e-3, 1e-6)


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "just a text", "", b"\xff\xfe\x00name"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml (is not YAML|holds \w+, not a mapping)") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


# Sections that must agree


def test_a_global_batch_that_is_not_whole_sequences_names_the_neighbours() -> None:
    message = refusal({"train.global_batch_tokens": 250})
    assert "train.global_batch_tokens is 250" in message
    assert "data.sequence_length 32: use 224 or 256" in message
    assert refusal({"train.global_batch_tokens": 20}).endswith("use 32")


@pytest.mark.parametrize("given", [{}, {"steps": 1, "tokens": 10}, {"steps": 1, "tokens": 10, "epochs": 2}])
def test_exactly_one_length(given: dict[str, int]) -> None:
    lengths = {f"train.{key}": value for key, value in given.items()}
    message = refusal(lengths, without=() if "steps" in given else ("train.steps",))
    assert "exactly one of train.tokens, train.epochs and train.steps" in message
    assert all(key in message.split("given:")[1] for key in given or ["none"])


@pytest.mark.parametrize("model", [{}, {"config": {"model_type": "llama"}, "pretrained": "a/b"}])
def test_exactly_one_of_config_and_pretrained(model: dict[str, Any]) -> None:
    assert "exactly one of model.config" in refusal({"model": model})


def test_a_config_needs_its_model_type() -> None:
    assert "model.config needs model_type" in refusal({"model.config": {"hidden_size": 32}})


@pytest.mark.parametrize(
    "changes",
    [{"optimizer.schedule": "warmup_stable_decay"}, {"optimizer.decay_steps": 5}],
)
def test_decay_steps_belong_to_warmup_stable_decay(changes: dict[str, Any]) -> None:
    assert "optimizer.decay_steps belongs to schedule warmup_stable_decay" in refusal(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer.type": "sgd"}, "optimizer.momentum belongs to type sgd and is required there"),
        ({"optimizer.momentum": 0.9}, "type is adamw, momentum is 0.9"),
        (
            {"optimizer.type": "sgd", "optimizer.momentum": 0, "optimizer.betas": [0.9, 0.9]},
            "optimizer.betas is [0.9, ",
        ),
        ({"optimizer.type": "sgd", "optimizer.momentum": 0, "optimizer.epsilon": 1e-5}, "optimizer.epsilon is 1e-05"),
        ({"optimizer.type": "adafactor"}, "optimizer.type"),
    ],
)
def test_options_of_another_optimizer_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(changes)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a b", "a\n", "Übung", 7])
def test_names_that_are_no_directory_of_their_own_are_refused(name: Any) -> None:
    assert "name: " in refusal({"name": name})


@pytest.mark.parametrize("name", ["a", "llama-1b_v2.3", ".hidden", "..a"])
def test_names_of_letters_digits_dots_and_dashes_are_good(name: str) -> None:
    assert make_recipe({"name": name}).name == name


# Overrides


def test_overrides_reach_nested_fields_lists_and_missing_sections(tmp_path: Path) -> None:
    file = write(tmp_path, recipe_content({"data.train": [{"path": "a"}, {"path": "b"}]}))
    recipe = load_recipe(
        file,
        [
            "optimizer.learning_rate=1e-3",
            "data.train.1.weight=2.5",
            "gradient_checkpointing.every_layers=2",
            "evaluate.sample_prompt=To be = or",
            "model.config.hidden_size=64",
            "precision=fp32",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-3
    assert [source.weight for source in recipe.data.train] == [1.0, 2.5]
    assert recipe.gradient_checkpointing is not None
    assert recipe.gradient_checkpointing.every_layers == 2
    assert recipe.evaluate.sample_prompt == "To be = or"
    assert recipe.model.config is not None
    assert recipe.model.config["hidden_size"] == 64
    assert recipe.precision == "fp32"


def test_an_override_to_null_takes_a_section_off(tmp_path: Path) -> None:
    file = write(tmp_path, recipe_content({"gradient_checkpointing": {"every_layers": 1}}))
    assert load_recipe(file, ["gradient_checkpointing=null"]).gradient_checkpointing is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("precision", "is not key=value"),
        ("=fp32", "is not key=value"),
        ("data.train.5.weight=1", "no place data.train.5.weight"),
        ("data.train.x=1", "no place data.train.x"),
        ("name.first=1", "no place name.first"),
        ("data.sequence_length.x=1", "no place data.sequence_length.x"),
        ("precision=[1", "override 'precision=[1'"),
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat: did you mean learning_rate?"),
        ("optimizer.learning_rate=quick", "optimizer.learning_rate"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        load_recipe(write(tmp_path, recipe_content()), [override])


# Places


def test_paths_are_made_absolute_and_hub_ids_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"model": {"pretrained": "organisation/model"}, "runs_directory": "my_runs"}
    recipe = load_recipe(write(tmp_path, recipe_content(changes)))
    assert recipe.model.pretrained == "organisation/model"
    assert recipe.tokenizer == str(tmp_path / "data" / "tokenizer")
    assert recipe.data.train[0].path == str(tmp_path / "data" / "train")
    assert recipe.data.validation == str(tmp_path / "data" / "validation")
    assert recipe.run_directory() == tmp_path / "my_runs" / "small"
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    assert load_recipe(tmp_path / "recipe.yaml").model.pretrained == str(tmp_path / "organisation" / "model")


def test_resolving_again_from_elsewhere_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(tmp_path, recipe_content()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_paths(recipe) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_runs_directory_comes_from_the_environment_unless_the_recipe_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, recipe_content())
    assert load_recipe(file).run_directory() == tmp_path / "runs" / "small"
    monkeypatch.setenv("TRAINYARD_RUNS", str(tmp_path / "large_disk"))
    assert load_recipe(file).run_directory() == tmp_path / "large_disk" / "small"
    assert load_recipe(file, ["runs_directory=here"]).run_directory() == tmp_path / "here" / "small"


def test_shipped_files_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("launch/recipes/quickstart_pretrain.yaml")
    assert recipe.deepspeed == str(PROJECT_ROOT / "ds_configs" / "zero3.json")
    own = tmp_path / "ds_configs" / "zero3.json"
    own.parent.mkdir()
    own.write_text("{}", encoding="utf-8")
    assert find_shipped_file("ds_configs/zero3.json") == own  # the working directory's own comes first


def test_a_missing_recipe_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml does not exist; shipped .*quickstart_pretrain\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


def test_a_fork_starts_from_the_runs_weights_under_another_name(tmp_path: Path) -> None:
    recipe = make_recipe({"runs_directory": str(tmp_path), "model.frozen": ["model.norm.*"]})
    forked = fork_recipe(recipe, "second")
    assert forked.model.pretrained == str(tmp_path / "small")
    assert forked.model.frozen == ["model.norm.*"]
    assert forked.model.config is None
    assert forked.run_directory() == tmp_path / "second"
    assert forked.model_dump(exclude={"name", "model"}) == recipe.model_dump(exclude={"name", "model"})


@pytest.mark.parametrize("name", ["small", "a/b"])
def test_a_fork_needs_a_good_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match=r"--fork needs a name other than|name: "):
        fork_recipe(make_recipe(), name)


@pytest.mark.parametrize(
    ("changes", "without", "good"),
    [
        ({"checkpoint.every_steps": 10, "evaluate.every_steps": 5}, (), True),
        ({"checkpoint.every_steps": 5, "evaluate.every_steps": 10}, (), False),
        ({"checkpoint.every_steps": 10}, (), False),
        ({"evaluate.every_steps": 10}, (), False),
        ({"checkpoint.every_steps": 10, "evaluate.every_steps": 5}, ("data.validation",), False),
    ],
)
def test_the_best_checkpoints_need_an_evaluation_at_every_save(
    changes: dict[str, int], without: tuple[str, ...], good: bool
) -> None:
    if good:
        make_recipe({"checkpoint.keep_best": 1} | changes, without)
    else:
        with pytest.raises(ValueError, match=r"checkpoint\.keep_best needs an evaluation at every save"):
            make_recipe({"checkpoint.keep_best": 1} | changes, without)
    make_recipe(changes, without)
