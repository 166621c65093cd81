"""SamplingParams: what is refused, with which words, and what is stored."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.errors import InputError

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INFINITY),
        ("temperature", True),
        ("temperature", "0.8"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INFINITY),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", [1, 2]),
        ("logit_bias", {1: NAN}),
        ("logit_bias", {1: INFINITY}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "50282"),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("logprobs", -1),
        ("logprobs", True),
        ("include_stop_str_in_output", None),
        ("skip_special_tokens", "yes"),
    ],
)
def test_an_unusable_value_is_refused_by_the_name_of_its_parameter(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name) as error:
        SamplingParams(**{name: value})
    assert "got" in str(error.value)


def test_the_message_names_value_and_range() -> None:
    with pytest.raises(InputError, match=r"^top_p must be between 0 and 1, got 1\.5$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(InputError, match=r"^top_k must be an integer, at least -1, got -7$"):
        SamplingParams(top_k=-7)


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(InputError, match=r"min_tokens must be at most max_tokens \(16\), got 17"):
        SamplingParams(min_tokens=17)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17


def test_several_greedy_completions_are_refused() -> None:
    with pytest.raises(InputError, match="n must be 1 when temperature is 0, got 3"):
        SamplingParams(n=3, temperature=0)


def test_values_are_stored_in_one_form() -> None:
    params = SamplingParams(
        stop="a", stop_token_ids=[3, 3, 5], top_k=-1, logit_bias={np.int64(4): np.float32(2)}, temperature=1
    )
    assert params.stop == params.stop_strings == ("a",)
    assert params.stop_token_ids == (3, 5)
    assert params.top_k == 0
    assert params.logit_bias == {4: 2.0}
    assert isinstance(params.temperature, float)
    assert SamplingParams().stop == SamplingParams().stop_token_ids == ()


def test_the_callers_containers_can_change_afterwards() -> None:
    stops, biases = ["a"], {1: 1.0}
    params = SamplingParams(stop=stops, logit_bias=biases)
    stops.append("b")
    biases[2] = 1.0
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 1.0}


def test_params_survive_replace_copy_and_pickle() -> None:
    params = SamplingParams(
        stop=["a", "b"], stop_token_ids=[1], logit_bias={1: -float("inf")}, seed=2**64 - 1
    )
    assert dataclasses.replace(params) == params
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(stop_token_ids=[99, 100]), "stop_token_ids"),
        (SamplingParams(logit_bias={100: 1.0}), "logit_bias"),
        (SamplingParams(logprobs=101), "logprobs"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params: SamplingParams, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} must .* got 10[01]"):
        params.validate_against(100)
    params.validate_against(101)


def test_ignoring_the_end_of_text_leaves_the_other_stop_ids() -> None:
    assert SamplingParams(stop_token_ids=[3]).stop_ids([9]) == {3, 9}
    assert SamplingParams(stop_token_ids=[3], ignore_eos=True).stop_ids([9]) == {3}
