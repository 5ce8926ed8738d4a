"""config.json as one level of values."""

from atom_cluster.config.hf_values import language_model_values, longest_context


def test_the_text_part_stands_above_the_rest_but_for_what_is_the_whole_models() -> None:
    config = {
        "architectures": ["X"],
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        "text_config": {"architectures": ["Y"], "tie_word_embeddings": False, "eos_token_id": 2, "dtype": None},
    }
    values = language_model_values(config)
    assert values["architectures"] == ["X"]
    assert (values["tie_word_embeddings"], values["eos_token_id"], values["dtype"]) == (True, 2, "bfloat16")


def test_without_a_text_part_values_stay_and_nulls_go() -> None:
    assert language_model_values({"a": 1, "b": None}) == {"a": 1}


def test_what_files_of_a_kind_leave_out_has_its_default() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"sliding_window": 1024}}
    values = language_model_values(config)
    assert (values["max_position_embeddings"], values["sliding_window"]) == (131_072, 1024)


def test_yarn_extends_the_context_in_the_old_spelling_only() -> None:
    old = {"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert longest_context(old) == 400
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert longest_context({"max_position_embeddings": 400, "rope_parameters": scaling}) == 400
    assert longest_context({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4.0}}) == 100
    assert longest_context({}) is None
