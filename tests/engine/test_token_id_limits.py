"""Token ids that the model does not have."""

import pytest

from llmd.engine.limits import check_token_ids
from llmd.engine.params import SamplingParams
from llmd.errors import InvalidParams


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {3: 1.0, 100: 1.0}), ("allowed_token_ids", [1, 100]), ("stop_token_ids", [100, 5])],
)
def test_the_field_the_id_and_the_bound_are_named(field, value):
    params = SamplingParams(**{field: value})
    check_token_ids(params, 101)
    with pytest.raises(InvalidParams, match=f"{field} must be token ids between 0 and 99, got 100") as caught:
        check_token_ids(params, 100)
    assert caught.value.param == field


def test_params_without_ids_pass():
    check_token_ids(SamplingParams(), 1)
